"""A page to look at a set: all images with what is known of each, in one HTML file that asks nothing of a network."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import PIL.Image
import torch
from datasets import ClassLabel, Dataset
from transformers import PreTrainedModel

from ...concentration.config_records import cost_rows, method_label
from ...concentration.selection.features import image_features
from ...concentration.set_records import record_of
from ...data.datasets import Pool, default_image_size, find_columns
from ...data.images import image_array
from ...data.shards import check_rows
from ...matching.discrepancy import measure_discrepancy, random_discrepancy
from ...matching.targets import MatchingTargets
from ...sampling.pipeline import DsCoPipeline
from ...utils.files import write_atomically
from ...utils.markdown import format_number, inert
from ...utils.progress import Bar
from ...utils.values import plain_arguments
from .accuracy import accuracy_table


PIXELS = 16_000_000  # of all images of a page together: 40 px each for 10,000 images, 400 px for 100
LOSSLESS = 2_000_000  # up to which no detail is given up
SMALL = 64  # px; smaller images are enlarged without smoothing
COLUMNS, SHEET = 32, 1024  # images beside each other on a sheet, and on all of it


@dataclass(frozen=True)
class Near:
    """The nearest real image of each image of a set.

    Attributes:
        images (`Dataset`): the real ones, as `image`.
        rows (sequence of `int`): of each image its nearest one's row in `images`.
        distances (sequence of `float`): the root mean square difference of their features.
        seen_by (`str`): what features these are.
    """

    images: Dataset
    rows: Sequence[int]
    distances: Sequence[float]
    seen_by: str


@plain_arguments()
def look(
    dataset: Dataset,
    path: str | Path = "look.html",
    *,
    real: Dataset | Pool | None = None,
    pipe: DsCoPipeline | None = None,
    targets: MatchingTargets | None = None,
    record: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    title: str | None = None,
    progress: bool = True,
) -> Path:
    """Writes a page with all images of a set: by class, with source, seed and block, to be filtered by these.

    One file of HTML: it loads nothing, sends nothing, and can be published with the set, as one of the `figures` of
    `publish`. Many images are shown smaller than they are stored.

    Args:
        dataset: One split of a concentrated set, or any dataset with `image` and `label`.
        path: The file.
        real: Real images, the nearest of which, of the same class, is shown beside each image.
        pipe: A pipeline, by whose classifier's features is told what is near; by pixels if `None`.
        targets: What the set is to match; with `pipe`, the discrepancy of each class is measured from them.
        record: How it was made; what the set carries if `None`.
        results: Content of `results.json`, for a table of accuracies.
        title: Of the page.
        progress: Show a progress bar.

    Returns:
        The path.

    Raises:
        ValueError: If a column is missing, there are no rows, no real image is of one of the classes, or the targets
            are of another classifier than the pipeline's.
    """
    check_rows(dataset, where="the page")
    record = record_of(dataset) if record is None else record
    measured = _measured(dataset, pipe, targets) or (record or {}).get("discrepancy")
    near = None if real is None else nearest_real(dataset, real, pipe, progress=progress)
    told: dict[str, Any] = {"record": record or {}, "results": results, "discrepancy": measured or {}, "title": title}
    write_atomically(Path(path), draw_page(dataset, near, **told, progress=progress).encode())
    return Path(path)


def nearest_real(
    dataset: Dataset, real: Dataset | Pool, pipe: DsCoPipeline | None = None, *, progress: bool = True
) -> Near:
    """The nearest real image of the same class, for every image of a set; arguments and errors as of [`look`]."""
    names = dataset.features["label"].names
    classifier = None if pipe is None else pipe.classifier
    whole, own = Pool.of(real, progress=progress), Pool(dataset, progress=progress)
    present = own.labels.unique().tolist()
    pool = whole.of_classes([names[label] for label in present])
    size = default_image_size(dataset) or _images(dataset)[0]["image"].width  # all have one size where none is named
    ours, theirs = _features(own, classifier, size), _features(pool, classifier, size)
    rows, distances = [-1] * len(dataset), [math.inf] * len(dataset)
    for place, label in enumerate(present):
        candidates = (pool.labels == place).nonzero()[:, 0]
        if not len(candidates):
            raise ValueError(f"No real image is of class {names[label]!r}: pass the images that the set was made for.")
        for part in (own.labels == label).nonzero()[:, 0].split(256):
            nearest = candidates[torch.cdist(ours[part], theirs[candidates]).argmin(1)]
            # anew, as differences of squares tell an image from itself
            gaps = (ours[part] - theirs[nearest]).square().mean(1).sqrt()
            for one, other, gap in zip(own.rows[part], whole.rows[pool.rows[nearest]], gaps, strict=True):
                rows[int(one)], distances[int(one)] = int(other), float(gap)
    kind = "pixels" if classifier is None else "features of the classifier"
    assert isinstance(whole.real, Dataset)  # as `of_classes` has seen
    return Near(_images(whole.real), rows, distances, kind)


def _features(images: Pool, classifier: PreTrainedModel | None, image_size: int) -> torch.Tensor:
    """Features `(N, d)` of a classifier, or else the pixels at one size."""
    return image_features(images, classifier) if classifier is not None else images.pixels(image_size).flatten(1)


def _measured(
    dataset: Dataset, pipe: DsCoPipeline | None, targets: MatchingTargets | None
) -> dict[str, dict[str, float]] | None:
    """The discrepancy of each class, as a record tells it; None where it cannot be measured."""
    if pipe is None or targets is None:
        return None
    images = Pool(dataset, classes=targets.class_names, progress=False)
    pixels = images.pixels(pipe.image_size, pipe.num_channels)
    found = measure_discrepancy(pixels, images.labels, pipe, targets)
    counts = {name: images.counts[targets.class_names.index(name)] for name in found}
    return {"by class": found, "random by class": random_discrepancy(targets, counts)}


def draw_page(
    dataset: Dataset,
    near: Near | None = None,
    *,
    record: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
    discrepancy: object,
    title: str | None = None,
    progress: bool = False,
) -> str:
    """The page as text; see [`look`]. `discrepancy` is as records tell it, `by class` and `random by class`."""
    rows, names = dataset.with_format(None), dataset.features["label"].names
    known, images = _known(rows), _images(rows)
    order = sorted(range(len(rows)), key=known["label"].__getitem__)  # stable: in each class as they are stored
    side = _side(images, order)
    own, real = _Sheets("s", side, len(rows)), _Sheets("r", side, len(rows))
    classes: dict[int, list[dict[str, Any]]] = {}
    for row in Bar(order, desc="Drawing the page", unit="img", disable=not progress):
        tile = {"row": row, "image": own.add(images[row]["image"]), **{name: known[name][row] for name in known}}
        if near is not None:
            tile |= {"near": near.rows[row], "distance": near.distances[row]}
            tile["near_image"] = real.add(near.images[near.rows[row]]["image"])
        classes.setdefault(tile["label"], []).append(tile)
    tiles = [tile for found in classes.values() for tile in found]
    measured, random = (_numbers(discrepancy, key) for key in ("by class", "random by class"))
    sources = _counts(tiles, "source")
    filters = {"class": [(label, names[label]) for label in classes if label >= 0]}
    filters |= {"source": [(name, name) for name, _ in sources]}
    filters |= {"block": [(block, block) for block, _ in _counts(tiles, "block") if block >= 0]}
    told = {name: (measured.get(name), random.get(name)) for name in names}
    named: list[dict[str, Any]] = [
        {"label": label, "name": name, "tiles": found, "discrepancy": told.get(name, (None, None))}
        for label, found in classes.items()
        for name in [names[label] if label >= 0 else "without a label"]
    ]
    return _environment().get_template("page.html.jinja").render(
        title=title or "A concentrated set", classes=named, total=len(tiles), sources=sources, filters=filters,
        facts=_facts(record), costs=cost_rows(record.get("cost")), accuracies=accuracy_table(results),
        measured=sorted(
            (one for one in named if one["discrepancy"][0] is not None), key=lambda one: -one["discrepancy"][0]
        ),
        largest=max([*measured.values(), *random.values()], default=0), seen_by=near and near.seen_by,
        side=side, small=side < SMALL, sheets=[*own.done(), *real.done()],
    )  # fmt: skip


def _numbers(discrepancy: object, key: str) -> dict[str, float]:
    """Numbers by class from a record, which may be anybody's: what is no number is left out."""
    found = discrepancy.get(key) if isinstance(discrepancy, Mapping) else None
    known = found.items() if isinstance(found, Mapping) else ()
    return {name: value for name, value in known if isinstance(value, int | float) and math.isfinite(value)}


def _side(images: Dataset, order: Sequence[int]) -> int:
    """How large images are shown, in px: as they are, unless together they have more than `PIXELS`."""
    largest = max(max(images[row]["image"].size) for row in order[:: max(1, len(order) // 100)])
    return min(largest, max(16, int(math.sqrt(PIXELS / len(order)))))


def _known(rows: Dataset) -> dict[str, list[Any]]:
    """What is known of all images, by column; -1 for a label, and None for anything else, that is not known."""
    usual = {"label": -1, "source": None, "seed": None, "block": None, "real_index": None}
    known = {name: rows[name][:] if name in rows.features else [usual[name]] * len(rows) for name in usual}
    known["label"] = [-1 if label is None else label for label in known["label"]]
    feature = rows.features.get("source")
    if isinstance(feature, ClassLabel):
        known["source"] = [None if one is None else feature.int2str(one) for one in known["source"]]
    return known


def _images(rows: Dataset) -> Dataset:
    """The images of a dataset alone, in whichever column they are, as `image`."""
    column = find_columns(rows)[0]
    images = rows.with_format(None).select_columns([column])
    return images if column == "image" else images.rename_column(column, "image")


def _counts(tiles: Sequence[Mapping[str, Any]], key: str) -> list[tuple[Any, int]]:
    """The values of something known of all images, and how many have each; none where it is not known."""
    found = Counter(tile[key] for tile in tiles)
    return [] if None in found else sorted(found.items())


def _facts(record: Mapping[str, Any]) -> list[tuple[str, object]]:
    """How a set was made, in a few words; its card has all of them."""
    rows: list[tuple[str, object]] = [("method", method_label(record) if record.get("method") else None)]
    rows.append(("seed", record.get("seed")))
    for part, key in (("source", "dataset"), ("generator", "id"), ("classifier", "id")):
        entry = record.get(part)
        known = entry if isinstance(entry, Mapping) else {}
        rows.append(({"source": "source data"}.get(part, part), known.get(key) or known.get("folder")))
    rows.append(("since then", record.get("changed")))
    return [(name, value) for name, value in rows if value is not None]


class _Sheets:
    """Images of one size on few large ones, that a page may hold thousands of them."""

    def __init__(self, letter: str, side: int, images: int) -> None:
        self.letter, self.side, self.images, self.count = letter, side, images, 0
        self.lossless = images * side**2 <= LOSSLESS
        self.finished: list[dict[str, Any]] = []
        self.sheet: PIL.Image.Image | None = None

    def add(self, image: PIL.Image.Image) -> dict[str, Any]:
        """Draws one image, in the middle of its place; returns where: the sheet, and how far it is moved, in %."""
        place = self.count % SHEET
        if place == 0:
            self._finish()
            self.columns, rest = COLUMNS, min(SHEET, self.images - self.count)
            self.lines = -(-rest // COLUMNS)
            self.sheet = PIL.Image.new("RGBA", (self.columns * self.side, self.lines * self.side))
        line, column = divmod(place, self.columns)
        drawn = PIL.Image.fromarray(image_array(image, 3))
        scale = min(1.0, self.side / max(drawn.size))
        size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
        drawn = drawn if size == drawn.size else drawn.resize(size, PIL.Image.Resampling.LANCZOS)
        left, top = ((self.side - length) // 2 for length in size)
        assert self.sheet is not None
        self.sheet.paste(drawn, (column * self.side + left, line * self.side + top))
        self.count += 1
        x, y = column / max(1, self.columns - 1), line / max(1, self.lines - 1)
        return {"sheet": f"{self.letter}{len(self.finished)}", "x": f"{100 * x:.6g}", "y": f"{100 * y:.6g}"}

    def _finish(self) -> None:
        if self.sheet is None:
            return
        self.sheet.save(buffer := io.BytesIO(), "WEBP", lossless=self.lossless, quality=90, method=2)
        data = base64.b64encode(buffer.getvalue()).decode()
        told = {"name": f"{self.letter}{len(self.finished)}", "columns": self.columns, "lines": self.lines}
        self.finished.append({**told, "data": markupsafe.Markup(f"data:image/webp;base64,{data}")})
        self.sheet = None

    def done(self) -> list[dict[str, Any]]:
        """All sheets: name, columns, lines and data."""
        self._finish()
        return self.finished


def _environment() -> jinja2.Environment:
    """Templates of HTML in which every value is escaped, and loses what has no shape of its own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: inert(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: format_number(value, digits=4)
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment
