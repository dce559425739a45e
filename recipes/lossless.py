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
from pathlib import Path

import torch

from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.studies.lossless.find import find_lossless_budget
from dsco_hf.studies.lossless.options import SearchOptions, accepted_rows
from dsco_hf.studies.lossless.report import accepted_results, claim, write_lossless
from dsco_hf.utils.configs import check_anew, make_accelerator, parse_config
from dsco_hf.utils.progress import introduce


def main(arguments: list[str] | None = None) -> None:
    """Searches, and writes what was found."""
    recipe = parse_config(SearchOptions, arguments, description=__doc__)
    accelerator, output = make_accelerator(recipe.mixed_precision), Path(recipe.output_dir)
    check_anew(recipe.resume, accelerator, [output / "jobs", output / "search.json", output / "log"])
    with accelerator.main_process_first():  # one process downloads, converts and logs, the others read what it has
        given = recipe.load(progress=accelerator.is_local_main_process)
    (images, *_, size), names = given.real.pixels.shape, given.real.names
    introduce(accelerator, recipe.dataset, images=images, classes=len(names), size=size)
    if given.teacher is not None:
        given.teacher.to(accelerator.device)
    found = find_lossless_budget(
        given.real, given.test, output, strategy=given.rule, small=given.small, protocol=given.protocol,
        architecture=recipe.architecture, length=recipe.length, plan=recipe.plan, accelerator=accelerator,
        overrides=recipe.overrides, compiled=recipe.compile, checkpoint_seconds=recipe.checkpoint_seconds,
        teacher=given.teacher,
    )  # fmt: skip
    if not accelerator.is_main_process:
        return
    told = {"dataset": recipe.dataset, "splits": given.splits, "config": dataclasses.asdict(recipe)}
    print(write_lossless(found | told, output))
    if found["rows"] is not None:
        source = {"dataset": recipe.dataset, "split": recipe.train_split, "rows": found["all_images"]}
        card = DatasetCardFields(description=claim(found))
        save_dataset_folder(
            accepted_rows(given, found["rows"]), output / "dataset", card=card, results=accepted_results(found),
            figures=[output / "lossless.png"], concentration={"source": source},
        )  # fmt: skip
    print(f"Saved what was found ({found['status']}) in {output}.")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
