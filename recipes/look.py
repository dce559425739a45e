"""Makes a page to look at a set: all its images by class, with source, seed and block, in one file of HTML.

    python recipes/look.py outputs/concentrated/dataset
    python recipes/look.py outputs/quickstart/dataset --dataset_name doped --real digits
    python recipes/look.py user/imagenette-dsco --real frgfm/imagenette --real_name 320px --measure

The page can be filtered by class, source and block, tells how the set was made, what it cost and how accurate it is,
and needs nothing but a browser: no server and no network. With `--real` the nearest real image of its class is beside
each image.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from dsco_hf.concentration.records import config_record
from dsco_hf.data.datasets import Pool, class_names, find_columns, load_image_dataset
from dsco_hf.hub.folder import CONCENTRATION, RESULTS, WRITE_AGAIN
from dsco_hf.hub.given import check_given
from dsco_hf.hub.remake import fetch, load_recorded
from dsco_hf.studies.figures.page import look
from dsco_hf.utils.configs import parse_config
from dsco_hf.utils.files import read_json
from dsco_hf.utils.progress import introduce


@dataclass(frozen=True, kw_only=True)
class LookRecipe:
    """Options of this recipe.

    Attributes:
        dataset: the set: a folder or a Hub id, which can also be given first, without the option's name.
        dataset_name, revision: its config, by default that which loads by default, and its branch, tag or commit.
        split: of the set.
        real, real_name, real_split, real_revision: real images, whose nearest ones are shown; see
            `dsco_hf.data.datasets.load_image_dataset`.
        image_column, label_column: of the real images, where there are several.
        measure: load the pipeline and the targets that the set was drawn with, so that its classifier says what is
            near, and the discrepancy of each class is measured.
        generator, generator_revision: where that pipeline lies now, if not at its recorded place.
        results: a results.json with accuracies; that of the set by default.
        title: of the page; the name of the set by default.
        output_file: the page.
    """

    dataset: str = "outputs/concentrated/dataset"
    dataset_name: str | None = None
    revision: str | None = None
    split: str = "train"
    real: str | None = None
    real_name: str | None = None
    real_split: str = "train"
    real_revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    measure: bool = False
    generator: str | None = None
    generator_revision: str | None = None
    results: str | None = None
    title: str | None = None
    output_file: str = "look.html"


def main(arguments: list[str] | None = None) -> Path:
    """Reads the options, writes the page, and says where it is."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-"):
        given[0] = f"--dataset={given[0]}"
    recipe = parse_config(LookRecipe, given, description=__doc__)
    rows = load_image_dataset(recipe.dataset, recipe.dataset_name, split=recipe.split, revision=recipe.revision)
    size = rows[0][find_columns(rows)[0]].width if len(rows) else None
    introduce(None, recipe.dataset, images=len(rows), classes=len(class_names(rows)), size=size)
    told = recorded(recipe, rows)
    if recipe.results is not None:
        told["results"] = read_json(Path(recipe.results), WRITE_AGAIN)
    check_given([], results=told.get("results"))
    if recipe.real is not None:
        real = load_image_dataset(
            recipe.real, recipe.real_name, split=recipe.real_split, revision=recipe.real_revision
        )
        told["real"] = Pool(real, image_column=recipe.image_column, label_column=recipe.label_column)
    if recipe.measure:
        told["pipe"], told["targets"], _ = load_recorded(
            recipe.dataset, recipe.dataset_name, revision=recipe.revision, generator=recipe.generator,
            generator_revision=recipe.generator_revision,
        )  # fmt: skip
    title = recipe.title or " ".join(filter(None, [Path(recipe.dataset).name, recipe.dataset_name]))
    page = look(rows, recipe.output_file, title=title, **told)
    print(f"{len(rows):,} images, {page.stat().st_size / 1e6:.1f} MB: open {page.resolve().as_uri()} in a browser.")
    return page


def recorded(recipe: LookRecipe, rows: Dataset) -> dict[str, Any]:
    """What was published with a set: its record, and results if there are some; nothing for images alone."""
    if "source" not in rows.features or Path(recipe.dataset).is_file():
        return {}
    options: dict[str, Any] = {"revision": recipe.revision, "token": None, "cache_dir": None}
    folder = fetch(recipe.dataset, [CONCENTRATION, RESULTS], **options)
    found: dict[str, Any] = {}
    if (folder / CONCENTRATION).is_file():
        record = read_json(folder / CONCENTRATION, WRITE_AGAIN)
        check_given(list(record.get("configs") or ()), concentration=record)
        found["record"] = config_record(record, recipe.dataset_name)
    if (folder / RESULTS).is_file():
        found["results"] = read_json(folder / RESULTS, WRITE_AGAIN)
    return found


if __name__ == "__main__":
    main()
