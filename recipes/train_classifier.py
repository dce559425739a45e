"""Trains an image classifier on any dataset: the feature extractor of targets, the teacher of soft labels.

    accelerate launch recipes/train_classifier.py --dataset digits --num_channels 1 --output_dir outputs/classifier
    accelerate launch --multi_gpu --num_processes 2 recipes/train_classifier.py \
        --config recipes/configs/classifier_cifar10.yaml

All processes train one model together (on CPUs: ACCELERATE_USE_CPU=true before the second command). The folder is read
by `AutoModelForImageClassification.from_pretrained`. Stock architectures such as the default one can also be stored
inside of a pipeline. `--help` lists the options.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from dsco_hf.data.pixels import default_image_size
from dsco_hf.evaluators import Execution, protocol_to_dict, train_evaluator
from dsco_hf.evaluators.evaluation import evaluator_builder, run_environment, save_network
from dsco_hf.evaluators.models import is_own_architecture
from dsco_hf.studies.options import NetworkOptions, RealOptions
from dsco_hf.utils.configs import check_anew, make_accelerator, parse_config
from dsco_hf.utils.files import write_json
from dsco_hf.utils.progress import introduce


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(RealOptions, NetworkOptions):
    """Options of this recipe; those of the data and of the training are inherited.

    Attributes:
        architecture: a name or model type, see `dsco_hf.evaluators.build_evaluator`.
        model_options: values of the network's configuration, as JSON, e.g. '{"depths": [2, 2, 2]}'.
        image_size: what images are brought to (shorter side, then the centre), and the network is fed; by default
            their own size, or 32 if they have several; stock networks are fed at least 32.
        protocol: a protocol's name or YAML file; its hard labels, schedule and augmentation are used.
        weight_decay: in place of the protocol's own.
        seed: decides initial weights, order and augmentation.
        output_dir: the classifier's folder.
    """

    architecture: str = "resnet-small"
    image_size: int | None = None
    weight_decay: float | None = None
    seed: int = 0
    output_dir: str = "outputs/classifier"


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains, and saves the classifier and the results."""
    recipe = parse_config(ClassifierRecipe, arguments, description=__doc__)
    output = Path(recipe.output_dir)
    accelerator = make_accelerator(recipe.mixed_precision)
    protocol = recipe.get_protocol("weight_decay", label_type="hard")
    shown = accelerator.is_local_main_process
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        rows, tested, splits = recipe.splits()
    size = recipe.image_size or protocol.image_size or default_image_size(rows, **recipe.columns)
    train, test = recipe.images(
        rows, tested, protocol=dataclasses.replace(protocol, image_size=size), num_channels=recipe.num_channels,
        progress=shown,
    )  # fmt: skip
    native = train.pixels.shape[-1]
    size = recipe.image_size or (native if is_own_architecture(recipe.architecture) else max(32, native))
    introduce(accelerator, recipe.dataset, images=len(train.labels), classes=len(train.names), size=native)
    checkpoint = output / "checkpoint.safetensors"
    check_anew(recipe.resume, accelerator, [checkpoint])
    result = train_evaluator(
        evaluator_builder(recipe.architecture, train, protocol, **{"image_size": size, **recipe.overrides}),
        train, protocol=protocol, seed=recipe.seed, test=test, checkpoint=checkpoint, progress=shown,
        execution=Execution(accelerator, distributed=True, compiled=recipe.compile),
        checkpoint_seconds=recipe.checkpoint_seconds,
    )  # fmt: skip
    if not accelerator.is_main_process:
        return
    save_network(result.model, output)
    results = {
        "config": dataclasses.asdict(recipe),
        "protocol": protocol_to_dict(protocol),
        "splits": splits,
        "dataset_fingerprint": train.fingerprint,
        "images": len(train.labels),
        **{name: getattr(result, name) for name in ("accuracy", "loss", "steps")},
        "seconds": round(result.seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        **run_environment(accelerator),
    }
    write_json(output / "results.json", results)
    checkpoint.unlink(missing_ok=True)
    tested = "" if result.accuracy is None else f", test accuracy {100 * result.accuracy:.2f} %"
    print(f"Saved the classifier to {output}{tested}, loss {result.loss:.4f} after {result.steps} steps.")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
