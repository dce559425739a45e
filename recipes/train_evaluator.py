"""Tells how good a small dataset is: trains networks from scratch on it and tests them on real images.

    accelerate launch recipes/train_evaluator.py --config recipes/configs/evaluator_digits.yaml
    accelerate launch --multi_gpu --num_processes 4 recipes/train_evaluator.py --config my.yaml --seeds 5

Seeds and networks are spread over the processes (on CPUs: ACCELERATE_USE_CPU=true before the second command). A killed
run that is started again finishes with the same numbers. `results.json` in the output folder holds all accuracies, of
the last epoch; `--help` lists the options.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import is_tensorboard_available, is_trackio_available
from datasets import Dataset
from transformers import PreTrainedModel

from dsco_hf.data.datasets import load_image_dataset, load_splits, load_test_split
from dsco_hf.data.schema import nearest
from dsco_hf.data.splits import NothingToTestError
from dsco_hf.evaluators import ImageSet, Protocol, get_protocol, protocol_to_dict
from dsco_hf.evaluators.evaluation import job_identity, load_image_set, run_environment, run_jobs, summarise, train_job
from dsco_hf.sampling.models import load_classifier
from dsco_hf.utils.configs import check_anew, make_accelerator, parse_config


@dataclass(frozen=True)
class EvaluatorRecipe:
    """Options of this recipe.

    Attributes:
        dataset, dataset_name, split, revision: the small dataset; see `dsco_hf.data.datasets.load_image_dataset`.
        test_dataset, test_name, test_revision: the real dataset to test on; the same one by default.
        test_split, holdout: of it, as in recipes/train_classifier.py; what is held out there is held out here.
        image_column, label_column, soft_label_column: for datasets with several of them.
        test_image_column, test_label_column: of the `test_dataset`; as the others if it is the same dataset.
        protocol: a name (quick, minimax-hard, rded-soft, rded-soft-small, released-dsco, cifar-convnet) or YAML file.
        architectures: names or model types, see `dsco_hf.evaluators.build_evaluator`.
        seeds: number of trainings of each network, with the seeds first_seed, first_seed + 1, ...
        model_options: values of the networks' configurations, as JSON, e.g. '{"width": 32}'.
        teacher, teacher_revision: a classifier (folder or Hub id); soft labels are then made by it on each batch.
        label_type: "hard", "teacher" or "stored"; the protocol's own by default, "teacher" where one is given.
        epochs, steps, batch_size, learning_rate, temperature: changes to the protocol.
        image_size: what all images are brought to (shorter side, then the centre); the protocol's by default, or else
            that of the small dataset's images, or 32 if they have several sizes.
        num_channels: 1 or 3.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        best: also report the best epoch on the test set, as most of the field does.
        mixed_precision: "no", "fp16" or "bf16"; without it, what `accelerate launch` was told.
        compile: pass the networks through `torch.compile`; pays from about a minute of training on.
        checkpoint_seconds: time between checkpoints; 0 writes one after every epoch.
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        report_to: "tensorboard", "trackio" or "none".
        save_models: store the trained networks in `<output_dir>/models`.
        output_dir: where results, jobs and checkpoints go.
    """

    dataset: str = "digits"
    dataset_name: str | None = None
    split: str = "train"
    revision: str | None = None
    test_dataset: str | None = None
    test_name: str | None = None
    test_split: str = "auto"
    holdout: float = 0.2
    test_revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    soft_label_column: str = "soft_label"
    test_image_column: str | None = None
    test_label_column: str | None = None
    protocol: str = "quick"
    architectures: list[str] = field(default_factory=lambda: ["convnet-3"])
    seeds: int = 3
    first_seed: int = 0
    model_options: str = "{}"
    teacher: str | None = None
    teacher_revision: str | None = None
    label_type: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    temperature: float | None = None
    image_size: int | None = None
    num_channels: int = 3
    on_error: str = "skip"
    best: bool = False
    mixed_precision: str | None = None
    compile: bool = False
    checkpoint_seconds: float = 60.0
    resume: bool = True
    report_to: str = "none"
    save_models: bool = False
    output_dir: str = "outputs/evaluator"


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains all networks and saves the results."""
    recipe = parse_config(EvaluatorRecipe, arguments, description=__doc__)
    output = Path(recipe.output_dir)
    accelerator = start_accelerator(recipe)
    check_anew(recipe.resume, accelerator, [output / "jobs"])
    protocol = get_protocol(recipe.protocol, **protocol_changes(recipe))
    train, test, splits = load_sets(recipe, protocol, accelerator)
    teacher = load_teacher(recipe, accelerator)
    model_options = json.loads(recipe.model_options)
    seeds = range(recipe.first_seed, recipe.first_seed + recipe.seeds)
    jobs = {f"{name.replace('/', '_')}-seed{seed}": (name, seed) for seed in seeds for name in recipe.architectures}

    def run(key: str, checkpoint: Path) -> dict[str, Any]:
        architecture, seed = jobs[key]
        return train_job(
            train,
            test,
            architecture=architecture,
            seed=seed,
            protocol=protocol,
            teacher=teacher,
            accelerator=accelerator,
            compiled=recipe.compile,
            checkpoint=checkpoint,
            checkpoint_seconds=recipe.checkpoint_seconds,
            overrides=model_options,
            track_best=recipe.best,
            save_to=output / "models" / key if recipe.save_models else None,
            on_epoch=epoch_logger(accelerator, recipe, key),
            progress=accelerator.is_local_main_process,
        )

    def settings(key: str) -> dict[str, Any]:
        architecture, seed = jobs[key]
        return job_identity(
            train,
            test,
            architecture=architecture,
            seed=seed,
            protocol=protocol,
            teacher=teacher,
            accelerator=accelerator,
            compiled=recipe.compile,
            overrides=model_options,
            track_best=recipe.best,
        ) | {"save_models": recipe.save_models}

    finished = run_jobs(
        list(jobs),
        run,
        settings=settings,
        accelerator=accelerator,
        folder=output / "jobs",
    )
    if accelerator.is_main_process:
        rows = [
            {"architecture": name, **summarise([job for job in finished.values() if job["architecture"] == name])}
            for name in recipe.architectures
        ]
        results = {
            "dataset": recipe.dataset,
            "config": dataclasses.asdict(recipe),
            "protocol": protocol_to_dict(protocol),
            "splits": splits,
            "images": len(train.labels),
            "images_per_class": train.images_per_class,
            "classes": len(train.names),
            "test_images": len(test.labels),
            "dataset_fingerprint": train.fingerprint,
            "test_fingerprint": test.fingerprint,
            "rows": rows,
            **run_environment(accelerator),
        }
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        accelerator.log({f"{row['architecture']}/accuracy_mean": row["accuracy_mean"] for row in rows})
        print_rows(rows)
    accelerator.end_training()


def open_sets(recipe: EvaluatorRecipe) -> tuple[Dataset, Dataset, dict[str, Any]]:
    """The small dataset, what it is tested on, and which splits these are."""
    if recipe.test_split == "none":
        raise ValueError("Networks are tested: `test_split` is a split or 'auto' here, not 'none'.")
    tested: dict[str, Any] = {"test_split": recipe.test_split, "holdout": recipe.holdout}
    small: dict[str, Any] = {"revision": recipe.revision}
    other = [name for name in ("test_dataset", "test_name", "test_revision") if getattr(recipe, name)]
    if not other:
        small |= {"train_split": recipe.split, "label_column": recipe.label_column}
        own = (
            f"{recipe.dataset} is a small dataset without a test split, and its own images would tell nothing: "
            "name the real dataset that its networks are to be tested on with --test_dataset."
        )
        try:
            dataset, test, splits = load_splits(recipe.dataset, recipe.dataset_name, **small, **tested)
        except NothingToTestError as error:
            raise ValueError(own) from error
        if "holdout" in splits and "source" in dataset.column_names:
            raise ValueError(own)
        return dataset, test, splits
    dataset = load_image_dataset(recipe.dataset, recipe.dataset_name, split=recipe.split, **small)
    test, splits = load_test_split(
        recipe.test_dataset or recipe.dataset,
        recipe.test_name or (None if recipe.test_dataset else recipe.dataset_name),
        revision=recipe.test_revision or (None if recipe.test_dataset else recipe.revision),
        label_column=recipe.test_label_column or (None if recipe.test_dataset else recipe.label_column),
        **tested,
    )
    return dataset, test, {"train_split": recipe.split, **splits}


def load_sets(
    recipe: EvaluatorRecipe, protocol: Protocol, accelerator: Accelerator
) -> tuple[ImageSet, ImageSet, dict[str, Any]]:
    """The small dataset, the images it is tested on, and which splits these are."""
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        dataset, test_dataset, splits = open_sets(recipe)
    options = {"num_channels": recipe.num_channels, "on_error": recipe.on_error}
    train = load_image_set(
        dataset,
        protocol=protocol,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        soft_label_column=recipe.soft_label_column,
        progress=accelerator.is_local_main_process,
        **options,
    )
    test = load_image_set(
        test_dataset,
        protocol=protocol,
        test_for=train,
        image_column=recipe.test_image_column or (None if recipe.test_dataset else recipe.image_column),
        label_column=recipe.test_label_column or (None if recipe.test_dataset else recipe.label_column),
        progress=accelerator.is_local_main_process,
        **options,
    )
    return train, test, splits


def start_accelerator(recipe: EvaluatorRecipe) -> Accelerator:
    """An accelerator with the recipe's precision and tracker; processes wait for each other for up to a week."""
    trackers = ("none", "tensorboard", "trackio")
    if recipe.report_to not in trackers:
        raise ValueError(
            f"--report_to must be tensorboard, trackio or none, got {recipe.report_to!r}."
            f"{nearest(recipe.report_to, trackers)}"
        )
    tracked = recipe.report_to != "none"
    present = {"none": True, "tensorboard": is_tensorboard_available(), "trackio": is_trackio_available()}
    if not present[recipe.report_to]:
        raise ValueError(f"--report_to {recipe.report_to} needs that package: pip install {recipe.report_to}.")
    accelerator = make_accelerator(
        recipe.mixed_precision,
        log_with=recipe.report_to if tracked else None,
        project_dir=recipe.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if tracked:
        values = {
            key: value for key, value in dataclasses.asdict(recipe).items() if isinstance(value, int | float | str)
        }
        accelerator.init_trackers(Path(__file__).stem, config=values)
    return accelerator


def protocol_changes(recipe: EvaluatorRecipe) -> dict[str, Any]:
    """What the command line changes about the protocol."""
    names = ("epochs", "steps", "batch_size", "learning_rate", "temperature", "image_size", "label_type")
    changes = {name: getattr(recipe, name) for name in names if getattr(recipe, name) is not None}
    if recipe.teacher is not None and get_protocol(recipe.protocol).label_type != "teacher":
        changes.setdefault("label_type", "teacher")
    return changes


def load_teacher(recipe: EvaluatorRecipe, accelerator: Accelerator) -> PreTrainedModel | None:
    """The teacher, frozen, or None."""
    if recipe.teacher is None:
        return None
    with accelerator.main_process_first():
        teacher = load_classifier(recipe.teacher, revision=recipe.teacher_revision)
    return teacher.requires_grad_(False)


def epoch_logger(accelerator: Accelerator, recipe: Any, key: str) -> Callable[[dict[str, float]], None] | None:
    """Sends loss and accuracy of each epoch to the tracker; only the main process has one."""
    if recipe.report_to == "none" or not accelerator.is_main_process:
        return None

    def log(metrics: dict[str, float]) -> None:
        values = {f"{key}/{name}": value for name, value in metrics.items() if name != "epoch"}
        accelerator.log(values, step=int(metrics["epoch"]))

    return log


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The result, for the eye."""
    for row in rows:
        mean = 100 * row["accuracy_mean"]
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
        best = f", best epoch {100 * row['accuracy_best_mean']:.2f}" if "accuracy_best_mean" in row else ""
        print(
            f"{row['architecture']}: {mean:.2f}{spread} % over {row['training_seeds']} seeds{best}, "
            f"{row['images_per_second']:.0f} images/s"
        )


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
