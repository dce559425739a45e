"""Compares small datasets of equal size under one protocol, with random real and herded real images beside them.

    accelerate launch recipes/compare.py --config recipes/configs/compare_digits.yaml
    accelerate launch recipes/compare.py --config my.yaml --budgets 1 10 50 --datasets
        "ours=user/small@ipc{budget}" "peer=outputs/peer/ipc{budget}"

A dataset is `name=path[@config[@split[@revision]]]`, where a part may be empty (`name=path@@@main`) and `{budget}`
stands for the images per class. Trainings are spread over processes and survive a kill. Writes `results.json`,
`table.md`, `table.tex` and `accuracy.png`.
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

from dsco_hf.concentration.additions.doping import select
from dsco_hf.data.pixels import default_image_size
from dsco_hf.studies.options import ClassifierOptions, ReadOptions, StudyOptions
from dsco_hf.studies.study import FULL, ComparedOptions, Study, real_baselines
from dsco_hf.studies.tables import write_comparison
from dsco_hf.utils.configs import check_anew, make_accelerator, parse_config
from dsco_hf.utils.progress import introduce


@dataclass(frozen=True, kw_only=True)
class ComparisonRecipe(ComparedOptions, ReadOptions, StudyOptions, ClassifierOptions):
    """Options of this recipe; those of the compared sets, the reading and the trainings are inherited.

    Attributes:
        real, real_name: the real dataset that baselines are drawn from and that is tested on.
        title: what tables and figures call it; the last part of `real` by default.
        train_split: of it.
        seeds: trainings of each network; each has random real images of its own.
        image_size: what the images of all datasets are brought to (shorter side, then the centre); the protocol's by
            default, or else that of the compared images, which must then be one; without any, that of the real ones,
            or 32 if they have several sizes.
        classifier, classifier_revision: a classifier (folder or Hub id) whose features are herded; pixels without one.
        teacher, teacher_revision: a classifier for protocols with a teacher's labels; `classifier` by default.
        full: also train on all real images.
    """

    real: str = "digits"
    real_name: str | None = None
    title: str | None = None
    train_split: str = "train"
    full: bool = False
    output_dir: str = "outputs/comparison"


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains everything and writes the table and the figure."""
    recipe = parse_config(ComparisonRecipe, arguments, description=__doc__)
    accelerator = make_accelerator(recipe.mixed_precision)
    check_anew(recipe.resume, accelerator, [Path(recipe.output_dir) / "jobs"])
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        study, told = described_study(recipe, accelerator)
    study.train()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        results = study.results(dataset=recipe.real, title=recipe.title, config=dataclasses.asdict(recipe), **told)
        print(write_comparison(results, recipe.output_dir))
        print(f"Saved {len(results['rows'])} rows, tables and figures in {recipe.output_dir}.")


def described_study(recipe: ComparisonRecipe, accelerator: Accelerator) -> tuple[Study, dict[str, Any]]:
    """The study of the compared sets and the real ones beside them, and what is told of its images."""
    protocol = recipe.get_protocol("label_type", "image_size")
    if protocol.label_type in ("stored", "learned"):
        raise ValueError(
            f"compare.py needs labels that all datasets can have, but label_type is {protocol.label_type!r}. "
            "Use --label_type hard, or teacher with --teacher; recipes/train_evaluator.py evaluates one dataset with "
            "its stored labels."
        )
    compared = recipe.open_compared()
    train, tested, splits = recipe.open_splits(recipe.real, recipe.real_name, recipe.train_split, tested=True)
    if protocol.image_size is None:
        size = recipe.size_of_all(compared) if compared else default_image_size(train, **recipe.columns)
        protocol = dataclasses.replace(protocol, image_size=size)
    reading: dict[str, Any] = {"num_channels": recipe.num_channels, "progress": accelerator.is_local_main_process}
    real, test = recipe.images(train, tested, protocol=protocol, **reading)
    if protocol.image_size is None:  # nothing is compared but real images, at their own size
        protocol = dataclasses.replace(protocol, image_size=real.pixels.shape[-1])
    introduce(accelerator, recipe.real, images=len(real.labels), classes=len(real.names), size=real.pixels.shape[-1])
    classifier, teacher = recipe.load_classifier(), None
    if classifier is not None:
        classifier.to(accelerator.device)
    if protocol.label_type == "teacher":
        teacher = classifier if (own := recipe.load_teacher()) is None else own.to(accelerator.device)
    sets: dict[str, Any] = dict(recipe.load_compared(compared, real, protocol=protocol, **reading))
    sets |= real_baselines(real, recipe.budgets, random_seeds=0, classifiers=[classifier])
    for budget in recipe.budgets:
        sets[f"random-ipc{budget}"] = lambda seed, budget=budget: select(
            real, "random", images_per_class=budget, seed=seed
        )
    study = Study(
        sets | ({FULL: real} if recipe.full else {}), test, recipe.output_dir, protocol=protocol, teacher=teacher,
        seeds=recipe.seeds, accelerator=accelerator, progress=accelerator.is_local_main_process, **recipe.training,
    )  # fmt: skip
    return study, {"splits": splits, "dataset_fingerprint": real.fingerprint}


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
