"""Tells how good a small dataset is: trains networks from scratch on it and tests them on real images.

    accelerate launch recipes/train_evaluator.py --config recipes/configs/evaluator_digits.yaml
    accelerate launch --multi_gpu --num_processes 4 recipes/train_evaluator.py --config my.yaml --seeds 5

Seeds and networks are spread over the processes (on CPUs: ACCELERATE_USE_CPU=true before the second command). A killed
run that is started again finishes with the same numbers. `results.json` in the output folder holds all accuracies, of
the last epoch; `--help` lists the options.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_trackio_available

from dsco_hf.data.datasets import load_image_dataset, load_test_split
from dsco_hf.data.splits import NothingToTestError
from dsco_hf.evaluators import ImageSet, Protocol, load_image_set
from dsco_hf.studies.options import ReadOptions, StudyOptions
from dsco_hf.studies.study import Study
from dsco_hf.utils.configs import check_anew, make_accelerator, parse_config
from dsco_hf.utils.progress import introduce
from dsco_hf.utils.values import check_choice


@dataclass(frozen=True, kw_only=True)
class EvaluatorRecipe(ReadOptions, StudyOptions):
    """Options of this recipe; those of the reading and the trainings are inherited.

    Attributes:
        dataset, dataset_name, split, revision: the small dataset; see `dsco_hf.data.datasets.load_image_dataset`.
        test_dataset, test_name, test_revision: the real dataset to test on; the same one by default.
        soft_label_column: of stored or learned labels, "soft_label" or "learned_label" by default.
        test_image_column, test_label_column: of the `test_dataset`; as the others if it is the same dataset.
        first_seed: the seeds are first_seed, first_seed + 1, ...
        label_type: "hard", "teacher", "stored" or "learned"; the protocol's own by default, "teacher" if there is one.
        temperature: of soft labels, in place of the protocol's own.
        best: also report the best epoch on the test set, as most of the field does.
        report_to: "tensorboard", "trackio" or "none".
        save_models: store the trained networks in `<output_dir>/models`.
    """

    dataset: str = "digits"
    dataset_name: str | None = None
    split: str = "train"
    test_dataset: str | None = None
    test_name: str | None = None
    test_revision: str | None = None
    soft_label_column: str | None = None
    test_image_column: str | None = None
    test_label_column: str | None = None
    first_seed: int = 0
    temperature: float | None = None
    best: bool = False
    report_to: str = "none"
    save_models: bool = False
    output_dir: str = "outputs/evaluator"


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains all networks and saves the results."""
    recipe = parse_config(EvaluatorRecipe, arguments, description=__doc__)
    output = Path(recipe.output_dir)
    accelerator = start_accelerator(recipe)
    check_anew(recipe.resume, accelerator, [output / "jobs"])
    changed = ("temperature", "image_size", "label_type")
    protocol = recipe.get_protocol(*changed)
    if recipe.teacher is not None and recipe.label_type is None and protocol.label_type != "teacher":
        protocol = recipe.get_protocol(*changed, label_type="teacher")
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        train, test, splits = load_sets(recipe, protocol, shown=accelerator.is_local_main_process)
        teacher = recipe.load_teacher()
    shape = {"images": len(train.labels), "classes": len(train.names), "size": train.pixels.shape[-1]}
    introduce(accelerator, recipe.dataset, **shape)
    tracked = recipe.report_to != "none" and accelerator.is_main_process

    def log(training: str, figures: dict[str, float]) -> None:
        values = {f"{training}/{name}": value for name, value in figures.items() if name != "epoch"}
        accelerator.log(values, step=int(figures["epoch"]))

    study = Study(
        {"small": train}, test, output, protocol=protocol, teacher=teacher, accelerator=accelerator,
        seeds=range(recipe.first_seed, recipe.first_seed + recipe.seeds), on_epoch=log if tracked else None,
        models=output / "models" if recipe.save_models else None, track_best=recipe.best,
        progress=accelerator.is_local_main_process, **recipe.training,
    )  # fmt: skip
    results = study.run(
        dataset=recipe.dataset, config=dataclasses.asdict(recipe), splits=splits, images=len(train.labels),
        images_per_class=train.images_per_class, dataset_fingerprint=train.fingerprint,
    )  # fmt: skip
    if accelerator.is_main_process and results is not None:
        accelerator.log({f"{row['architecture']}/accuracy_mean": row["accuracy_mean"] for row in results["rows"]})
        for row in results["rows"]:
            print(in_words(row))
        print(f"Saved {len(results['rows'])} result(s) in {output / 'results.json'}.")
    accelerator.end_training()


def load_sets(
    recipe: EvaluatorRecipe, protocol: Protocol, *, shown: bool
) -> tuple[ImageSet, ImageSet, dict[str, Any]]:
    """The small dataset, the images it is tested on, and which splits these are."""
    if recipe.test_dataset or recipe.test_name or recipe.test_revision:
        if recipe.test_split == "none":
            raise ValueError("Networks are tested: `test_split` is a split or 'auto' here, not 'none'.")
        same = None if recipe.test_dataset else recipe  # another config or commit of the small dataset itself
        small = load_image_dataset(recipe.dataset, recipe.dataset_name, split=recipe.split, revision=recipe.revision)
        tested, splits = load_test_split(
            recipe.test_dataset or recipe.dataset, recipe.test_name or (same and same.dataset_name),
            revision=recipe.test_revision or (same and same.revision), test_split=recipe.test_split,
            label_column=recipe.test_label_column or (same and same.label_column), holdout=recipe.holdout,
        )  # fmt: skip
        splits = {"train_split": recipe.split, **splits}
    else:
        nothing = ValueError(
            f"{recipe.dataset} is a small dataset without a test split, and its own images would tell nothing: "
            "name the real dataset that its networks are to be tested on with --test_dataset."
        )
        try:
            small, tested, splits = recipe.open_splits(recipe.dataset, recipe.dataset_name, recipe.split, tested=True)
        except NothingToTestError as error:
            raise nothing from error
        if "holdout" in splits and "source" in small.column_names:
            raise nothing
    columns = {"image_column": recipe.test_image_column, "label_column": recipe.test_label_column}
    if not recipe.test_dataset:
        columns = {name: own or recipe.columns[name] for name, own in columns.items()}
    options: dict[str, Any] = {"protocol": protocol, "num_channels": recipe.num_channels, "progress": shown}
    options["on_error"] = recipe.on_error
    train = load_image_set(small, soft_label_column=recipe.soft_label_column, **recipe.columns, **options)
    return train, load_image_set(tested, test_for=train, **columns, **options), splits


def start_accelerator(recipe: EvaluatorRecipe) -> Accelerator:
    """An accelerator with the recipe's precision and tracker."""
    if recipe.report_to == "none":
        return make_accelerator(recipe.mixed_precision)
    present = {"tensorboard": is_tensorboard_available, "trackio": is_trackio_available}
    check_choice("report_to", recipe.report_to, [*present, "none"])
    if not present[recipe.report_to]():
        raise ValueError(f"--report_to {recipe.report_to} needs that package: pip install {recipe.report_to}.")
    accelerator = make_accelerator(recipe.mixed_precision, log_with=recipe.report_to, project_dir=recipe.output_dir)
    config = {key: value for key, value in dataclasses.asdict(recipe).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers(Path(__file__).stem, config=config)
    return accelerator


def in_words(row: dict[str, Any]) -> str:
    """A result, for the eye."""
    spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
    best = f", best epoch {100 * row['accuracy_best_mean']:.2f}" if "accuracy_best_mean" in row else ""
    found = f"{row['architecture']}: {100 * row['accuracy_mean']:.2f}{spread} % over {row['training_seeds']} seeds"
    return f"{found}{best}, {row['images_per_second']:.0f} images/s"


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
