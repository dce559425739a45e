"""The size that images are brought to where nobody says one."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset

from .pixels import encoded_columns
from .schema import find_columns


logger = logging.getLogger(__name__)

FALLBACK = 32  # px: what a small generator on a CPU can learn
_LOOKED_AT = 1024


def default_image_size(
    dataset: Dataset, *, image_column: str | None = None, label_column: str | None = None, fallback: int = FALLBACK
) -> int | None:
    """The size to bring images to: none if all are squares of one size; otherwise `fallback`, as the log then says.

    Up to 1,024 images spread over the dataset are looked at, of each its first bytes; what cannot be read is left to
    whoever decodes it.
    """
    sizes = image_sizes(dataset, image_column=image_column, label_column=label_column)
    if len(sizes) < 2 and all(width == height for width, height in sizes):
        return None
    low, high = min(min(size) for size in sizes), max(max(size) for size in sizes)
    logger.warning(
        "Images have sides of %d to %d pixels: their shorter side is brought to %d and the centre cropped; "
        "`image_size` (--image_size; of a protocol: `get_protocol(name, image_size=64)`) chooses another size.",
        low,
        high,
        fallback,
    )
    return fallback


def image_sizes(
    dataset: Dataset, *, image_column: str | None = None, label_column: str | None = None
) -> set[tuple[int, int]]:
    """The sizes, (width, height), of up to 1,024 images spread over a dataset, by their first bytes."""
    image_column, label_column = find_columns(dataset, image_column=image_column, label_column=label_column)
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _LOOKED_AT)).astype(np.int64))
    sizes = set()
    for row in encoded_columns(dataset, image_column, label_column).select(rows):
        value = row[image_column] or {}
        try:
            source: Any = value.get("path") if value.get("bytes") is None else io.BytesIO(value["bytes"])
            with PIL.Image.open(source) as image:
                sizes.add(image.size)
        except (OSError, ValueError, AttributeError):
            continue
    return sizes
