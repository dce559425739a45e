"""Datasets' images as batches of pixels: decoded row by row, if wished by threads that run ahead of their reader."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image

from ..utils.names import find_classes
from ..utils.progress import Bar
from ..utils.values import check_choice, plain_arguments
from .images import decoded, ignored_parts, image_array, pixels_from_arrays
from .schema import AnyDataset, class_names, find_columns, resolved


logger = logging.getLogger(__name__)

T = TypeVar("T")

FALLBACK = 32  # px: what a small generator on a CPU can learn
_LOOKED_AT = 1024
_AHEAD = 2  # batches that wait for their reader: enough to hide a slow one, little memory


class PixelBatch(NamedTuple):
    """A batch of images.

    Attributes:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, float32, range [-1, 1]): the images.
        labels (`torch.Tensor` of shape `(B,)`, int64): labels of the dataset, not of a generator.
        indices (`torch.Tensor` of shape `(B,)`, int64): the row of each image in the dataset.
        keys (`torch.Tensor` of shape `(B,)`, int64): a hash of each image's pixels, by which images can be sampled
            in the same way from a dataset, a stream, or parts of either.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    keys: torch.Tensor


@plain_arguments(image_size=1, batch_size=1)
def iterate_pixels(
    dataset: AnyDataset,
    *,
    image_size: int | None = None,
    num_channels: int = 3,
    batch_size: int = 256,
    image_column: str | None = None,
    label_column: str | None = None,
    on_error: str = "raise",
    classes: Sequence[str] | None = None,
    rows: Sequence[range] | None = None,
    start: int = 0,
    allow_empty: bool = False,
    threads: int = 0,
    progress: bool = False,
) -> Iterator[PixelBatch]:
    """Reads a dataset once, in the order of its rows, in batches.

    Args:
        dataset (`Dataset` or `IterableDataset`): one split; a stream is read only as far as batches are asked for,
            and two batches ahead with `threads`.
        image_size (`int`, *optional*): resize the shorter side to this with bicubic filtering, then crop the centre.
            Without it, all images must have one size.
        num_channels (`int`): 1 (gray) or 3 (RGB).
        batch_size (`int`): images per batch; the last batch may be smaller.
        image_column (`str`, *optional*): see [`find_columns`].
        label_column (`str`, *optional*): see [`find_columns`].
        on_error (`str`): `"raise"` or `"skip"` images that cannot be decoded; skipped rows are counted and logged.
        classes (sequence of `str`, *optional*): number the labels by this order of the class names, whatever the
            dataset's own is; the dataset's if None. See [`class_places`].
        rows (sequence of `range`, *optional*): read these rows of a `Dataset` only; no batch spans two ranges.
        start (`int`): leave out that many rows at the beginning of a stream; they are read but not decoded.
        allow_empty (`bool`): accept that there are no rows, as in one of several parts.
        threads (`int`): threads that decode in the background while the caller works; 0 decodes when asked for the
            next batch. Pillow decodes without Python's lock, so threads keep up with a classifier (see
            `recipes/benchmarks/targets_throughput.py`) and need no copy of the dataset, as processes do.
        progress (`bool`): show a progress bar.

    Yields:
        [`PixelBatch`]: pixels `(B, C, H, W)` in [-1, 1], labels, row indices and keys `(B,)`.

    Raises:
        ValueError: for an unreadable image, a missing label or a class that is not in `classes` (the row is named),
            for sizes that differ, and for an empty dataset.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"`num_channels` must be 1 (gray) or 3 (RGB), got {num_channels}.")
    check_choice("on_error", on_error, ("raise", "skip"))
    image_column, label_column = find_columns(dataset, image_column=image_column, label_column=label_column)
    encoded = encoded_columns(dataset, image_column, label_column)
    places = class_places(class_names(dataset, label_column=label_column), classes)
    options: dict[str, Any] = {"image_size": image_size, "num_channels": num_channels, "skip": on_error == "skip"}
    options |= {"batch_size": batch_size, "rows": rows, "start": start, "allow_empty": allow_empty}
    reader = _Reader(encoded, (image_column, label_column), places, **options, threads=threads, progress=progress)
    # A generator of its own, so that bad arguments are reported by the call and not by the first batch.
    return ahead(reader.batches, _AHEAD) if threads else reader.batches()


def default_threads() -> int:
    """Threads that may decode for one process: its share of the cores, less the one that runs the model; 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 1), 8)


def ahead(produce: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """The items of an iterator that runs in a thread of its own, at most `depth` items ahead of its reader.

    The thread starts with the first item that is asked for, and ends with the iterator or when the reader stops.
    """
    items, end = produce(), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="dsco-read-ahead")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)


def encoded_columns(dataset: AnyDataset, image_column: str, label_column: str) -> AnyDataset:
    """The two columns with images still encoded: decoding row by row tells which row is corrupt."""
    dataset = dataset.with_format(None) if isinstance(dataset, Dataset) else resolved(dataset)
    return dataset.select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))


@dataclass
class _Reader:
    """Reads encoded rows, decodes them, and refuses or skips what is wrong with them, in their order."""

    dataset: AnyDataset
    columns: tuple[str, str]
    places: Sequence[int | str]
    image_size: int | None
    num_channels: int
    skip: bool
    batch_size: int
    rows: Sequence[range] | None
    start: int
    allow_empty: bool
    threads: int
    progress: bool
    skipped: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    size: tuple[int, ...] | None = None

    def batches(self) -> Iterator[PixelBatch]:
        """The batches, with a progress bar."""
        total = len(self.dataset) if isinstance(self.dataset, Dataset) else None
        total = total if self.rows is None else sum(map(len, self.rows))
        read = 0
        with (
            ThreadPoolExecutor(max(self.threads, 1), thread_name_prefix="dsco-decode") as pool,
            Bar(total=total, desc="Reading images", unit="img", disable=not self.progress) as bar,
        ):
            for first, values, labels in self._encoded_batches():
                batch = self._batch(first, self._decode(values, pool), labels)
                read += len(values)
                if batch is not None:
                    yield batch
                bar.update(len(values))
        if read == 0 and not self.allow_empty:
            raise ValueError("The dataset is empty: it has no rows.")
        if self.skipped:
            rows = f"{self.skipped[:20]}{f' and {len(self.skipped) - 20} more' * (len(self.skipped) > 20)}"
            why = "; ".join(self.reasons[:3])
            logger.warning(
                "Skipped %d of %d images that cannot be decoded: rows %s (%s)", len(self.skipped), read, rows, why
            )
        for part, count in sorted(self.ignored.items()):
            logger.warning("%d of %d images have %s, which is left out (see docs/inputs.md).", count, read, part)

    def _encoded_batches(self) -> Iterator[tuple[int, list[Any], list[int | None]]]:
        """(number of the first row, encoded images, labels)."""
        if self.rows is None:
            pieces = [(self.start, self.dataset.skip(self.start) if self.start else self.dataset)]
        else:
            pieces = ((run.start, self.dataset.select(run)) for run in self.rows)  # type: ignore[assignment]
        for first, piece in pieces:
            for batch in piece.iter(batch_size=self.batch_size):
                values, labels = batch[self.columns[0]], batch[self.columns[1]]
                yield first, values, labels
                first += len(values)

    def _decode(self, values: list[Any], pool: ThreadPoolExecutor) -> list[np.ndarray | UnreadableImage]:
        """Images as arrays; what went wrong in the place of those that cannot be decoded."""
        if self.threads < 2:
            return [self._array(value) for value in values]
        size = -(-len(values) // self.threads)
        slices = [values[i : i + size] for i in range(0, len(values), size)]
        parts = pool.map(lambda part: [self._array(value) for value in part], slices)
        return [array for part in parts for array in part]

    def _array(self, value: dict[str, Any] | None) -> np.ndarray | UnreadableImage:
        if value is None:
            return UnreadableImage(None, ValueError("there is none"))
        try:
            with decoded(value) as image:
                for part in ignored_parts(image):
                    self.ignored[part] += 1
                return image_array(image, self.num_channels, self.image_size)
        except Exception as error:  # Pillow's readers raise all sorts of things on broken files
            return UnreadableImage(value.get("path") if isinstance(value, dict) else None, error)

    def _batch(
        self, first: int, arrays: list[np.ndarray | UnreadableImage], labels: list[int | None]
    ) -> PixelBatch | None:
        kept: list[np.ndarray] = []
        kept_labels, indices = [], []
        for row, (array, label) in enumerate(zip(arrays, labels, strict=True), start=first):
            if isinstance(array, UnreadableImage):
                if not self.skip:
                    raise ValueError(
                        f"The image of row {row} cannot be decoded ({array}). Repair or remove the row, or pass "
                        "`on_error='skip'` to leave such images out."
                    ) from array.error
                self.skipped.append(row)
                self.reasons.append(f"row {row}: {array}")
                continue
            self.size = self.size or array.shape
            if array.shape != self.size:
                raise ValueError(
                    f"Image sizes differ: row {row} is {array.shape[1]}x{array.shape[0]} pixels, earlier ones "
                    f"{self.size[1]}x{self.size[0]}. Pass `image_size=` (or a protocol that "
                    "has one) to bring them all to one size."
                )
            kept.append(array)
            kept_labels.append(_checked_place(label, row, self.places))
            indices.append(row)
        if not kept:
            return None
        keys = torch.tensor([_key(array) for array in kept])
        return PixelBatch(pixels_from_arrays(np.stack(kept)), torch.tensor(kept_labels), torch.tensor(indices), keys)


class UnreadableImage(NamedTuple):
    """An image that cannot be decoded: its file, where that is known, and why."""

    path: str | None
    error: Exception

    def __str__(self) -> str:
        """For an error or a log."""
        return f"{f'{self.path}: ' if self.path else ''}{type(self.error).__name__}: {self.error}"


def _key(array: np.ndarray) -> int:
    """63 bits of a hash of an image."""
    digest = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def class_places(names: Sequence[str], classes: Sequence[str] | None) -> list[int | str]:
    """For each label of a dataset its number among `classes`, by name; the name itself where it is none of them."""
    if classes is None:
        return list(range(len(names)))
    places = find_classes(names, classes)
    return [name if place is None else place for name, place in zip(names, places, strict=True)]


def place_of(label: int | None, row: int, places: Sequence[int | str]) -> int | str:
    """The place of a label by [`class_places`]; ValueError for a row without one."""
    if label is None or not 0 <= label < len(places):
        raise ValueError(
            f"Row {row} has no valid label: got {label}, allowed are 0 to {len(places) - 1}. Unlabelled test splits "
            "use -1 or None; choose a labelled split or remove such rows with `dataset.filter`."
        )
    return places[label]


def _checked_place(label: int | None, row: int, places: Sequence[int | str]) -> int:
    place = place_of(label, row, places)
    if isinstance(place, str):
        raise ValueError(
            f"Row {row} is of class {place!r} (label {label}), which is not one of the classes wanted here. Remove "
            "the rows of that class with `dataset.filter`, or give the class the name that it has there."
        )
    return place


def load_pixels(dataset: AnyDataset, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reads a whole dataset into memory; arguments as for [`iterate_pixels`].

    Returns:
        `tuple`: pixels `(N, C, H, W)` float32 in [-1, 1], labels `(N,)` int64, and row indices `(N,)` int64. The
        indices are 0..N-1 unless images were skipped.
    """
    batches = iterate_pixels(dataset, **options)
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    pixels, filled, parts, labels, indices = None, 0, [], [], []
    for batch in batches:
        labels.append(batch.labels)
        indices.append(batch.indices)
        if rows is None:
            parts.append(batch.pixels)
            continue
        if pixels is None:  # one allocation: collecting parts would need twice the memory at the end
            pixels = torch.empty(rows, *batch.pixels.shape[1:])
        pixels[filled : filled + len(batch.pixels)] = batch.pixels
        filled += len(batch.pixels)
    if not labels:
        raise ValueError("Not one image of the dataset can be decoded.")
    pixels = torch.cat(parts) if pixels is None else pixels[:filled]
    return pixels, torch.cat(labels), torch.cat(indices)


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
        low, high, fallback,
    )  # fmt: skip
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
            source = value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])
            with PIL.Image.open(source) as image:
                sizes.add(image.size)
        except (OSError, ValueError, AttributeError, KeyError):
            continue
    return sizes
