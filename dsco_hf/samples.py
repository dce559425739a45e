"""A grid of a dataset's images, for its card."""

from __future__ import annotations

import PIL.Image
from datasets import Dataset


def draw_samples(
    dataset: Dataset, *, max_classes: int = 10, per_class: int = 10, max_side: int = 96
) -> PIL.Image.Image:
    """Draws the first images of the first classes, one row per class.

    Args:
        dataset: Dataset with `image` and `label`.
        max_classes: Rows at most.
        per_class: Images in a row at most.
        max_side: Side of a tile in pixels; smaller images are enlarged by whole factors, without smoothing.
    """
    labels = list(dataset["label"])
    chosen: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        if len(members := chosen.setdefault(label, [])) < per_class:
            members.append(index)
    rows = [chosen[label] for label in sorted(chosen)[:max_classes]]
    tiles = [[dataset[i]["image"].convert("RGB") for i in row] for row in rows]
    side = max(max(tile.size) for row in tiles for tile in row)
    side = side * max(1, 48 // side) if side < max_side else max_side
    grid = PIL.Image.new("RGB", ((side + 2) * max(map(len, tiles)) - 2, (side + 2) * len(tiles) - 2), "white")
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            resample = PIL.Image.Resampling.NEAREST if side >= max(tile.size) else PIL.Image.Resampling.LANCZOS
            scale = side / max(tile.size)
            size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
            grid.paste(tile.resize(size, resample), ((side + 2) * x, (side + 2) * y))
    return grid
