"""Image-classification datasets: opened wherever they are, split, chosen from, fingerprinted.

Any dataset that `datasets` can read (Hub id, local folder, parquet, streamed or not) becomes batches of pixels in
[-1, 1] with integer labels (`dsco_hf.data.pixels`), and its class names are matched to the classes of a generator
(`dsco_hf.data.schema`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, Value

from ..utils.names import find_classes
from ..utils.origins import fingerprint
from ..utils.values import plain_arguments
from .images import images_from_pixels as images_from_pixels
from .labels import Mapped
from .labels import class_mapping as class_mapping
from .opening import load_digits_dataset as load_digits_dataset
from .opening import load_image_dataset as load_image_dataset
from .opening import load_splits as load_splits
from .opening import load_test_split as load_test_split
from .pixels import PixelBatch as PixelBatch
from .pixels import class_places, default_image_size, encoded_columns, place_of
from .pixels import iterate_pixels as iterate_pixels
from .pixels import load_pixels as load_pixels
from .schema import AnyDataset, labels_of
from .schema import class_names as class_names
from .schema import find_columns as find_columns
from .splits import stratified_indices


logger = logging.getLogger(__name__)

_FINGERPRINT_ROWS = 1024
_FINGERPRINT_BYTES = 2**29
KEPT = 2**32  # bytes of pixels


@plain_arguments()
def stratified_split(
    dataset: Dataset, *, test_size: int | float, seed: int, label_column: str | None = None
) -> DatasetDict:
    """Splits a dataset so that both parts have the classes in the same proportions.

    Args:
        dataset (`Dataset`): rows in memory or on disk; a stream cannot be split.
        test_size (`int` or `float`): number of rows of the test part, or a fraction in (0, 1).
        seed (`int`): the same seed gives the same split.
        label_column (`str`, *optional*): see [`find_columns`].

    Returns:
        `DatasetDict`: `train` and `test`, each in the order of `dataset`.

    Raises:
        ValueError: if a class has fewer than two images, or `test_size` leaves a part without some class.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError("A streamed dataset cannot be split; load it without `streaming`, or use its own splits.")
    labels = np.asarray(labels_of(dataset, label_column), dtype=np.int64)
    present = np.unique(labels)  # a dataset that was filtered to some classes keeps the names of the others
    names = class_names(dataset, label_column=label_column)
    places = torch.from_numpy(np.searchsorted(present, labels))
    check_classes(places, [names[label] for label in present], images_per_class=2)
    train, test = stratified_indices(labels, test_size, seed)
    return DatasetDict(train=dataset.select(train), test=dataset.select(test))


def check_classes(labels: torch.Tensor, names: Sequence[str], *, images_per_class: int = 1) -> None:
    """Raises ValueError with those of the classes `names` of which `labels` `(N,)` has fewer than are wanted."""
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    lacking = [f"{name!r} has {count}" for name, count in zip(names, counts, strict=False) if count < images_per_class]
    if lacking:
        raise ValueError(
            f"Every class needs at least {images_per_class} image{'s' * (images_per_class > 1)}, but "
            f"{', '.join(lacking[:10])}{', …' * (len(lacking) > 10)}. Add images, ask for fewer per class, or leave "
            "the class out: remove its rows with `dataset.filter`."
        )


def present_classes(dataset: AnyDataset, *, label_column: str | None = None) -> list[str]:
    """The names of the classes that have an image, in the order of their labels.

    A dataset that was filtered to some classes keeps the names of all of them; those without an image are left out,
    and said in the log. Of a stream all names are taken, as its rows are not known.
    """
    names = class_names(dataset, label_column=label_column)
    if not isinstance(dataset, Dataset):
        return names
    used = set(labels_of(dataset, label_column))
    present = [name for label, name in enumerate(names) if label in used]
    if present and len(present) < len(names):
        absent = [name for name in names if name not in set(present)]
        logger.warning("%d classes have no image and are left out: %s", len(absent), absent[:20])
    return present or names  # without a single label, reading says which row has none


def with_classes_of(
    names: Sequence[str], dataset: Dataset, *, mapping: Mapped = None, label_column: str | None = None
) -> Dataset:
    """A dataset whose classes have the names that other images give them, so that both can be numbered alike.

    Published sets name their classes by WordNet id, as ImageNet does, by number ("00007"), or not at all.

    Args:
        names (sequence of `str`): of the other images' classes, by label.
        dataset (`Dataset`): rows whose labels stay what they are.
        mapping (*optional*): which class is which, where names do not tell, as of [`class_mapping`].
        label_column (`str`, *optional*): see [`find_columns`].

    Raises:
        ValueError: for classes that are none of `names`, or in doubt.
    """
    own, present = class_names(dataset, label_column=label_column), present_classes(dataset, label_column=label_column)
    if mapping is None and None not in find_classes(present, names):
        return dataset
    places = class_mapping(
        own, dict(enumerate(names)), len(names), mapping=mapping, present=present, owner="real images"
    )
    told = {name: names[place] for name, place in zip(present, places, strict=True)}
    renamed = [told.get(name, f"without images: {name}") for name in own]
    return dataset.cast_column(label_column or find_columns(dataset)[1], ClassLabel(names=renamed))


def with_numbered_classes(dataset: Dataset, label_column: str | None = None) -> Dataset:
    """A dataset whose labels are mere numbers, with the numbers as names of classes; others are as they were.

    Raises:
        ValueError: for a number below zero, or none at all.
    """
    column = label_column or "label"
    feature = dataset.features.get(column)
    if not isinstance(feature, Value) or not feature.dtype.removeprefix("u").startswith("int"):
        return dataset
    labels = dataset.with_format(None)[column][:]
    if not labels or None in labels or min(labels) < 0:
        raise ValueError(f"The numbers of column {column!r} are no labels: there must be some, and none below 0.")
    return dataset.cast_column(column, ClassLabel(names=list(map(str, range(max(labels) + 1)))))


def dataset_fingerprint(
    dataset: AnyDataset, *, image_column: str | None = None, label_column: str | None = None
) -> str:
    """A short hash of a dataset's content: class names, number of rows, all labels, and the images as they are stored.

    Every image is read where they have about 512 MiB or less together, such as those of CIFAR-10; of larger datasets
    1,024 of them, spread over the rows. The same on every machine, unlike the fingerprint that `datasets` keeps for
    its cache. Of a stream, the first 64 rows are read.
    """
    image_column, label_column = find_columns(dataset, image_column=image_column, label_column=label_column)
    names = class_names(dataset, label_column=label_column)
    encoded = encoded_columns(dataset, image_column, label_column)
    if not isinstance(encoded, Dataset):
        rows = list(encoded.take(64))
        return fingerprint(names, [[row[label_column], _stored(row[image_column])] for row in rows])[:16]
    spread = np.unique(np.linspace(0, max(len(encoded) - 1, 0), min(len(encoded), _FINGERPRINT_ROWS)).astype(np.int64))
    images = [_stored(value) for value in encoded.select(spread)[image_column]]
    size = sum(len(image) for image in images if image is not None) * len(encoded) / max(len(images), 1)
    if len(images) < len(encoded) and size <= _FINGERPRINT_BYTES:
        images = [hashlib.sha256(_stored(row[image_column]) or b"").digest() for row in encoded]
    return fingerprint(names, encoded[label_column][:], images)[:16]


def _stored(value: dict[str, Any] | None) -> bytes | None:
    """An image as it is stored: the bytes of its file, or the name of one that is not there; None for no image."""
    content, path = (value or {}).get("bytes"), (value or {}).get("path")
    if content is None and path is not None:
        return Path(path).read_bytes() if Path(path).is_file() else str(path).encode()
    return content


class Drawn(Protocol):
    """Labelled images in memory, as an `ImageSet`: pixels `(N, C, H, W)` in [-1, 1], labels `(N,)`, their hash."""

    names: Sequence[str]
    pixels: torch.Tensor
    labels: torch.Tensor
    digest: str

    def select(self, rows: Sequence[int]) -> Drawn:
        """Some of them."""
        ...


class Pool:
    """Real images that may be chosen: read when a rule asks for them, and kept for the next selection from this pool.

    Args:
        real (`Dataset` or `ImageSet`): the images; those in memory keep their size and channels.
        image_column (`str`, *optional*): where there are several of the kind.
        label_column (`str`, *optional*): likewise.
        classes (sequence of `str`, *optional*): only the images of these classes, numbered in this order.
        progress (`bool`): show progress bars.

    Attributes:
        names (`tuple[str, ...]`): the classes, by label; some may have no image.
        labels (`torch.Tensor` of shape `(N,)`, int64): of the images.
        rows (`torch.Tensor` of shape `(N,)`, int64): their rows in `real`.

    Raises:
        ValueError: for a row without a label, or where no image is of one of the `classes`.
    """

    def __init__(
        self,
        real: Dataset | Drawn,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        classes: Sequence[str] | None = None,
        progress: bool = True,
    ) -> None:
        self.real, self.progress = real, progress
        self.columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
        self._pixels: dict[tuple[int | None, int | None], torch.Tensor] = {}
        self._parts: dict[tuple[str, ...], Pool] = {}
        if not isinstance(real, Dataset) and hasattr(real, "pixels"):
            self.names, self.labels, self.rows = tuple(real.names), real.labels.cpu(), torch.arange(len(real.labels))
            return
        _, label_column = find_columns(real, **self.columns)
        theirs = class_names(real, label_column=label_column)
        self.names = tuple(theirs if classes is None else classes)
        places = class_places(theirs, self.names)
        given = labels_of(real, label_column)
        rows = [row for row, label in enumerate(given) if not isinstance(place_of(label, row, places), str)]
        if not rows and classes is not None:
            raise ValueError(f"No real image is of a class of the small set, {list(classes)[:10]}: got {theirs[:10]}.")
        self.labels = torch.tensor([places[given[row]] for row in rows], dtype=torch.int64)
        self.rows = torch.tensor(rows, dtype=torch.int64)

    @classmethod
    def of(
        cls,
        real: Dataset | Drawn | Pool,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        progress: bool = True,
    ) -> Pool:
        """The pool of a dataset; one that is given already is kept, and its own options with it."""
        if isinstance(real, Pool):
            return real
        return cls(real, image_column=image_column, label_column=label_column, progress=progress)

    def of_classes(self, names: Sequence[str]) -> Pool:
        """The images of these classes of a dataset, numbered in this order; what it reads is kept here, too."""
        key = tuple(names)
        if key not in self._parts:
            self._parts[key] = Pool(self.dataset, classes=names, progress=self.progress, **self.columns)
        return self._parts[key]

    @cached_property
    def counts(self) -> list[int]:
        """Images of each class."""
        return torch.bincount(self.labels, minlength=len(self.names)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Of the whole dataset, see [`dataset_fingerprint`]."""
        return dataset_fingerprint(self.real, **self.columns) if isinstance(self.real, Dataset) else self.real.digest

    @cached_property
    def dataset(self) -> Dataset:
        """The rows of a dataset that may be chosen, as they are stored."""
        if not isinstance(self.real, Dataset):
            raise TypeError("These images are in memory only: pass the `Dataset` that they were read from.")
        stored = self.real.with_format(None)
        return stored if len(self.rows) == len(stored) else stored.select(self.rows.tolist())

    def pixels(self, image_size: int | None = None, num_channels: int | None = None) -> torch.Tensor:
        """All images `(N, C, H, W)`, float32, in [-1, 1].

        Args:
            image_size (`int`, *optional*): px; by default their own if all are squares of one size, else 32.
            num_channels (`int`, *optional*): 1 or 3, by default 3.
        """
        if not isinstance(self.real, Dataset):
            return self.real.pixels
        key = (image_size, num_channels)
        if key not in self._pixels:
            self._pixels[key], _, _ = load_pixels(
                self.dataset, image_size=image_size or default_image_size(self.dataset, **self.columns),
                num_channels=num_channels or 3, classes=self.names, progress=self.progress, **self.columns,
            )  # fmt: skip
        return self._pixels[key]

    def batches(
        self, batch_size: int, image_size: int | None = None, num_channels: int | None = None
    ) -> Iterator[torch.Tensor]:
        """The same in their order `(B, C, H, W)`; more than `KEPT` bytes of them are read anew each time, not kept.

        Args:
            batch_size (`int`): B; the last batch may be smaller.
            image_size (`int`, *optional*): as of [`pixels`]; without it, all are read at once.
            num_channels (`int`, *optional*): likewise.
        """
        channels, read = num_channels or 3, (image_size, num_channels) in self._pixels
        if isinstance(self.real, Dataset) and image_size is not None and not read:
            if 4 * channels * image_size**2 * len(self.rows) > KEPT:
                options: dict[str, Any] = {"image_size": image_size, "num_channels": channels, **self.columns}
                options |= {"batch_size": batch_size, "classes": self.names, "progress": self.progress}
                yield from (batch.pixels for batch in iterate_pixels(self.dataset, **options))
                return
        yield from self.pixels(image_size, num_channels).split(batch_size)
