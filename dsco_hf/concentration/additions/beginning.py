"""Where doping begins: the synthetic images that a set keeps when real ones are to take the place of the others."""

from __future__ import annotations

import itertools

from datasets import Dataset

from ...data.schema import find_columns, labels_of
from ..concentrate import SOURCES
from ..set_records import record_of, with_record


def until_doping(small: Dataset, begin: float | None) -> tuple[Dataset, int]:
    """The first synthetic images of every class, and the images per class that the whole set had.

    Images of one block were drawn together, so that whole blocks stay: the record of what stays is that of a run which
    drew no more. Where it is not known which block an image is of, each counts as one.

    Args:
        small (`Dataset`): synthetic images.
        begin (`float`, *optional*): images per class from where on the next synthetic image is worth less than a real
            one; blocks that end beyond it are left out.

    Raises:
        ValueError: without a moment, for one that keeps all images or none, or a set with real images.
    """
    if begin is None:
        raise ValueError(
            "`images_per_class='auto'` needs the moment at which doping should begin: pass "
            "`begin_doping=recommended_doping('figures/efficiency.json')`, a number, or the `images_per_class` wanted."
        )
    _, label_column = find_columns(small)
    labels, known = labels_of(small, label_column), set(small.column_names)
    sources = small.with_format(None)["source"][:] if "source" in known else []
    if SOURCES.index("real") in sources or "real" in sources:
        raise ValueError("The set has real images already: pass the set that they were added to, or a number.")
    blocks = small.with_format(None)["block"][:] if "block" in known else [-1] * len(small)
    by_class: dict[int | None, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    size = max(map(len, by_class.values()), default=0)
    if begin >= size:
        raise ValueError(
            f"Doping should begin at {begin:g} images per class, and the set has {size}: every synthetic image is "
            "worth more than a real one. Keep it as it is, draw more, or pass a number as `images_per_class`."
        )
    kept = {row for rows in by_class.values() for row in _whole_blocks(rows, blocks, begin)}
    if not kept:
        first = sum(1 for row in by_class[labels[0]] if blocks[row] == blocks[0])
        raise ValueError(
            f"Doping should begin at {begin:g} images per class, before the first block ends, of {first}: draw the "
            "set with a smaller `block_size`, or choose real images alone, `select(real, ...)`."
        )
    record, part = dict(record_of(small) or {}), small.select(sorted(kept))
    if record:
        drawn = {**record.get("parameters", {}), "images_per_class": len(kept) // len(by_class)}
        gone = ("synthetic", "cost")  # of all images
        part = with_record(
            part, {key: value for key, value in record.items() if key not in gone} | {"parameters": drawn}
        )
    return part, size


def _whole_blocks(rows: list[int], blocks: list[int], begin: float) -> list[int]:
    """Those of one class's rows, in their order, that are of blocks which end at `begin` or before."""
    kept: list[int] = []
    for _, group in itertools.groupby(rows, key=lambda row: blocks[row] if blocks[row] >= 0 else -1 - row):
        own = list(group)
        if len(kept) + len(own) > begin:
            break
        kept += own
    return kept
