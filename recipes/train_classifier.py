"""Trains an image classifier on any dataset: the feature extractor of targets, the teacher of soft labels.

    accelerate launch recipes/train_classifier.py --dataset digits --num_channels 1 --output_dir outputs/classifier
    accelerate launch --multi_gpu --num_processes 2 recipes/train_classifier.py \
        --config recipes/configs/classifier_cifar10.yaml

All processes train one model together (on CPUs: ACCELERATE_USE_CPU=true before the second command). The folder is read
by `AutoModelForImageClassification.from_pretrained`. Stock architectures such as the default one can also be stored
inside of a pipeline. `--help` lists the options.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from dsco_hf.data.datasets import load_splits
from dsco_hf.data.pixels import default_image_size
from dsco_hf.evaluators import (
    Execution,
    ImageSet,
    Protocol,
    get_protocol,
    load_image_set,
    protocol_to_dict,
    train_evaluator,
)
from dsco_hf.evaluators.evaluation import evaluator_builder, run_environment
from dsco_hf.evaluators.models import is_own_architecture
from dsco_hf.utils.configs import check_anew, make_accelerator, parse_config


@dataclass(frozen=True)
class ClassifierRecipe:
    """Options of this recipe.

    Attributes:
        dataset, dataset_name, train_split, revision: what to train on; see `dsco_hf.data.datasets.load_image_dataset`.
        test_split: what to test on: a split, "none", or "auto": the test split, else the validation split, else the
            share `holdout` of every class of the training images, the same ones in every recipe.
        holdout: see `test_split`.
        image_column, label_column: for datasets with several of them.
        architecture: a name or model type, see `dsco_hf.evaluators.build_evaluator`.
        model_options: values of the network's configuration, as JSON, e.g. '{"depths": [2, 2, 2]}'.
        image_size: what images are brought to (shorter side, then the centre), and the network is fed; by default
            their own size, or 32 if they have several; stock networks are fed at least 32.
        num_channels: 1 or 3.
        protocol: a protocol's name or YAML file; its hard labels, schedule and augmentation are used.
        epochs, steps, batch_size, learning_rate, weight_decay: changes to the protocol.
        seed: decides initial weights, order and augmentation.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        mixed_precision: "no", "fp16" or "bf16"; without it, what `accelerate launch` was told.
        compile: pass the networks through `torch.compile`; pays from about a minute of training on.
        checkpoint_seconds: time between checkpoints.
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        output_dir: the classifier's folder.
    """

    dataset: str = "digits"
    dataset_name: str | None = None
    train_split: str = "train"
    revision: str | None = None
    test_split: str = "auto"
    holdout: float = 0.2
    image_column: str | None = None
    label_column: str | None = None
    architecture: str = "resnet-small"
    model_options: str = "{}"
    image_size: int | None = None
    num_channels: int = 3
    protocol: str = "quick"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    on_error: str = "skip"
    mixed_precision: str | None = None
    compile: bool = False
    checkpoint_seconds: float = 60.0
    resume: bool = True
    output_dir: str = "outputs/classifier"


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains, and saves the classifier and the results."""
    recipe = parse_config(ClassifierRecipe, arguments, description=__doc__)
    output = Path(recipe.output_dir)
    accelerator = make_accelerator(
        recipe.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))]
    )
    names = ("epochs", "steps", "batch_size", "learning_rate", "weight_decay")
    changes = {name: getattr(recipe, name) for name in names if getattr(recipe, name) is not None}
    protocol = get_protocol(recipe.protocol, label_type="hard", **changes)
    train, test, splits = load_sets(recipe, protocol, accelerator)
    native = train.pixels.shape[-1]
    size = recipe.image_size or (native if is_own_architecture(recipe.architecture) else max(32, native))
    checkpoint = output / "checkpoint.safetensors"
    check_anew(recipe.resume, accelerator, [checkpoint])
    result = train_evaluator(
        evaluator_builder(
            recipe.architecture, train, protocol, **{"image_size": size, **json.loads(recipe.model_options)}
        ),
        train,
        protocol=protocol,
        seed=recipe.seed,
        test=test,
        execution=Execution(accelerator, distributed=True, compiled=recipe.compile),
        checkpoint=checkpoint,
        checkpoint_seconds=recipe.checkpoint_seconds,
        progress=accelerator.is_local_main_process,
    )
    if not accelerator.is_main_process:
        return
    result.model.save_pretrained(output)
    results: dict[str, Any] = {
        "config": dataclasses.asdict(recipe),
        "protocol": protocol_to_dict(protocol),
        "splits": splits,
        "dataset_fingerprint": train.fingerprint,
        "images": len(train.labels),
        "accuracy": result.accuracy,
        "loss": result.loss,
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        **run_environment(accelerator),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    tested = "" if result.accuracy is None else f", test accuracy {100 * result.accuracy:.2f} %"
    print(f"Saved the classifier to {output}{tested}, loss {result.loss:.4f} after {result.steps} steps.")


def load_sets(
    recipe: ClassifierRecipe, protocol: Protocol, accelerator: Accelerator
) -> tuple[ImageSet, ImageSet | None, dict[str, Any]]:
    """Training images, test images (None without a test split), and where they are from."""
    columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        train, test, splits = load_splits(
            recipe.dataset,
            recipe.dataset_name,
            train_split=recipe.train_split,
            test_split=recipe.test_split,
            holdout=recipe.holdout,
            label_column=recipe.label_column,
            revision=recipe.revision,
        )
    size = recipe.image_size or protocol.image_size or default_image_size(train, **columns)
    options: dict[str, Any] = {
        "protocol": dataclasses.replace(protocol, image_size=size),
        "num_channels": recipe.num_channels,
        "on_error": recipe.on_error,
        "progress": accelerator.is_local_main_process,
        **columns,
    }
    images = load_image_set(train, **options)
    return images, None if test is None else load_image_set(test, test_for=images, **options), splits


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
