"""How much of the data is enough? Finds the smallest number of images that trains as well as all of them.

    accelerate launch recipes/lossless.py --config recipes/configs/lossless_digits.yaml

Trains on all images over several seeds, then on fewer, and tests whether accuracy falls behind by more than a margin.
Trainings are spread over processes and survive a kill. Writes lossless.json, lossless.md, lossless.png and, where a
size was accepted, dataset/: that set with a card that states claim, margin, confidence and protocol.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.studies.lossless.find import find_lossless_budget
from dsco_hf.studies.lossless.report import claim, write_lossless
from dsco_hf.studies.lossless.search import SearchPlan
from dsco_hf.studies.options import NetworkOptions, RealOptions, frozen
from dsco_hf.utils.configs import ImportOptions, check_anew, make_accelerator, parse_config
from dsco_hf.utils.values import Named


@dataclass(frozen=True, kw_only=True)
class LosslessRecipe(RealOptions, NetworkOptions, ImportOptions):
    """Options of this recipe; those of the data and the trainings are inherited.

    Attributes:
        strategy: by which rule real images come first: "random", or the name of another that needs no model, also with
            fields, `{name: ..., field: value}`.
        length: "same steps" as all data, or "same epochs".
        margin: by how much accuracy, in (0, 1), fewer images may fall behind all.
        confidence: in [0.5, 0.9999].
        trainings: at most, beyond those on all images.
        reference_seeds: trainings on all images.
        architecture: of the network, see `dsco_hf.evaluators.build_evaluator`.
        teacher, teacher_revision: a classifier (folder or Hub id) whose soft labels are trained on, in place of hard
            ones.
    """

    strategy: Named = "random"
    length: str = "same steps"
    margin: float = 0.005
    confidence: float = 0.95
    trainings: int = 20
    reference_seeds: int = 16
    architecture: str = "convnet-3"
    teacher: str | None = None
    teacher_revision: str | None = None
    output_dir: str = "outputs/lossless"


def main(arguments: list[str] | None = None) -> None:
    """Searches, and writes what was found."""
    recipe = parse_config(LosslessRecipe, arguments, description=__doc__)
    accelerator, output = make_accelerator(recipe.mixed_precision), Path(recipe.output_dir)
    check_anew(recipe.resume, accelerator, [output / "jobs"])
    protocol = recipe.get_protocol(label_type="hard" if recipe.teacher is None else "teacher")
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        rows, tested, _ = recipe.splits(tested=True)
        reading = {"num_channels": recipe.num_channels, "progress": accelerator.is_local_main_process}
        real, test = recipe.images(rows, tested, protocol=protocol, **reading)
    teacher = frozen(recipe.teacher, recipe.teacher_revision)
    plan = SearchPlan(margin=recipe.margin, confidence=recipe.confidence, trainings=recipe.trainings,
                      reference_seeds=recipe.reference_seeds)  # fmt: skip
    found = find_lossless_budget(
        real, test, output, strategy=recipe.strategy, protocol=protocol, architecture=recipe.architecture,
        length=recipe.length, plan=plan, accelerator=accelerator, overrides=recipe.overrides,
        compiled=recipe.compile, checkpoint_seconds=recipe.checkpoint_seconds,
        **({} if teacher is None else {"teacher": teacher.to(accelerator.device)}),
    )  # fmt: skip
    if not accelerator.is_main_process:
        return
    print(write_lossless(found | {"dataset": recipe.dataset, "config": dataclasses.asdict(recipe)}, output))
    if found["rows"] is not None:
        rows = recipe.readable(rows, real)
        card = DatasetCardFields(description=claim(found))
        save_dataset_folder(
            rows.select(found["rows"]), output / "dataset", card=card, figures=[output / "lossless.png"]
        )


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
