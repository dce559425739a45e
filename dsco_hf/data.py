"""Image-classification datasets: opened wherever they are, split, chosen from, fingerprinted.

Any dataset that `datasets` can read (Hub id, local folder, parquet, streamed or not) becomes batches of pixels in
[-1, 1] with integer labels (`dsco_hf.pixels`), and its class names are matched to the classes of a generator
(`dsco_hf.schema`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)

from .images import images_from_pixels as images_from_pixels
from .labels import class_mapping as class_mapping
from .pixels import PixelBatch as PixelBatch
from .pixels import encoded_columns
from .pixels import iterate_pixels as iterate_pixels
from .pixels import load_pixels as load_pixels
from .safety import explained
from .schema import AnyDataset, features_of, find_column, nearest
from .schema import class_names as class_names
from .schema import find_columns as find_columns
from .shards import explained_tables
from .values import plain_arguments


logger = logging.getLogger(__name__)

_FINGERPRINT_ROWS = 1024


@plain_arguments()
def load_digits_dataset(*, seed: int = 0) -> DatasetDict:
    """The 1,797 handwritten digits that scikit-learn ships (8x8, https://archive.ics.uci.edu/dataset/80).

    Args:
        seed (`int`): seed of the stratified split.

    Returns:
        `DatasetDict`: `train` (1,437 rows) and `test` (360), columns `image` (mode L) and `label` ("0" to "9").
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), intensities come as 0..16
    labels = digits.target.astype(np.int64)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    splits = {}
    for split, rows in zip(("train", "test"), _stratified_indices(labels, 360, seed), strict=True):
        columns = {"image": [PIL.Image.fromarray(pixels[i]) for i in rows], "label": labels[rows]}
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def load_image_dataset(
    path: str | Path | Sequence[str | Path],
    name: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Opens an image-classification dataset, wherever it is.

    Args:
        path (`str`, `Path` or a list of them): `"digits"`; a Hub id; a local folder (images in one folder per class, a
            folder of parquet files with or without README.md, or one written by `save_to_disk`); or parquet file(s).
        name (`str`, *optional*): the configuration, where the dataset has several.
        split (`str`, *optional*): one split; without it all of them come, as a dict.
        revision (`str`, *optional*): branch, tag or commit of a Hub dataset. Pin a commit for results that last.
        streaming (`bool`): read row by row without downloading or converting the whole.
        token (`str` or `bool`, *optional*): for private or gated Hub datasets.

    Raises:
        FileNotFoundError: if `path` looks like a local path and is not there, or the Hub has no such dataset.
        PermissionError: if the dataset is gated, or the token is not valid.
        ConnectionError: if the Hub cannot be reached; the message says what is in the cache.
        ValueError: if the split does not exist, or `name` or `revision` has no meaning for this kind of dataset.
    """
    if isinstance(path, str) and path == "digits":
        _refuse_options("the embedded digits", name=name, revision=revision)
        return _open_splits(load_digits_dataset(), split, streaming)
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ValueError("`path` is an empty list; give a Hub id, a folder, or parquet file(s).")
    texts = [str(p) if "://" in str(p) else str(Path(p).expanduser()) for p in paths]
    if len(texts) > 1 or texts[0].endswith(".parquet"):
        _refuse_options("parquet files", name=name, revision=revision)
        for text in texts:
            if "://" not in text and "*" not in text:
                _check_exists(Path(text))
        with explained_tables([Path(text) for text in texts if Path(text).is_file()]):
            loaded = load_dataset("parquet", data_files={"train": texts}, streaming=streaming, token=token)
        return _open_splits(loaded, split, streaming=False)
    if Path(texts[0]).exists():
        with explained(texts[0], token=token, action="load"), explained_tables([Path(texts[0])]):
            return _load_local(Path(texts[0]), name, split=split, revision=revision, streaming=streaming)
    looks_local = isinstance(paths[0], Path) or texts[0].count("/") > 1 or texts[0].startswith((".", "/", "~"))
    if looks_local and "://" not in texts[0]:
        _check_exists(Path(texts[0]))
    with explained(texts[0], token=token, action="load"):
        return load_dataset(texts[0], name, split=split, revision=revision, streaming=streaming, token=token)


def _load_local(
    path: Path, name: str | None, *, split: str | None, revision: str | None, streaming: bool
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    _refuse_options(f"the local dataset {path}", revision=revision)
    if path.is_file():
        raise ValueError(f"Cannot read {path} as a dataset. Give its folder, or a file that ends in .parquet.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by `save_to_disk`
        _refuse_options(f"the saved dataset {path}", name=name)
        return _open_splits(load_from_disk(str(path)), split, streaming)
    if not any(path.iterdir()):
        raise FileNotFoundError(f"The folder {path} is empty: no images and no parquet files to read.")
    return load_dataset(str(path), name, split=split, streaming=streaming)


def _open_splits(loaded: Any, split: str | None, streaming: bool) -> Any:
    if isinstance(loaded, Dataset):
        loaded = DatasetDict(train=loaded) if split is not None else loaded
    if split is not None:
        if split not in loaded:
            raise ValueError(f"There is no split {split!r}; the dataset has {list(loaded)}.{nearest(split, loaded)}")
        loaded = loaded[split]
    if not streaming:
        return loaded
    if isinstance(loaded, Dataset):
        return loaded.to_iterable_dataset()
    return IterableDatasetDict({key: value.to_iterable_dataset() for key, value in loaded.items()})


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileNotFoundError(f"There is no file or folder {path}.{nearest(path.name, siblings)}")


def _refuse_options(what: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"`{option}={value!r}` has no meaning for {what}; leave it out.")


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
    features = features_of(dataset)
    column = find_column(features, "label_column", label_column, ClassLabel)
    labels = np.asarray(dataset.with_format(None)[column][:], dtype=np.int64)
    present = np.unique(labels)  # a dataset that was filtered to some classes keeps the names of the others
    check_classes(
        torch.from_numpy(np.searchsorted(present, labels)),
        [features[column].names[i] for i in present],
        images_per_class=2,
    )
    train, test = _stratified_indices(labels, test_size, seed)
    return DatasetDict(train=dataset.select(train), test=dataset.select(test))


def _stratified_indices(labels: np.ndarray, test_size: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=seed)
    return np.sort(train), np.sort(test)


def check_classes(labels: torch.Tensor, names: Sequence[str], *, images_per_class: int = 1) -> None:
    """Makes sure that every class has enough images.

    Args:
        labels (`torch.Tensor` of shape `(N,)`, int64): labels in [0, len(names)).
        names (sequence of `str`): all classes, by label.
        images_per_class (`int`): how many images each class must have.

    Raises:
        ValueError: naming the classes that have fewer.
    """
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
    column = find_column(features_of(dataset), "label_column", label_column, ClassLabel)
    used = set(dataset.with_format(None)[column][:])
    present = [name for label, name in enumerate(names) if label in used]
    if present and len(present) < len(names):
        absent = [name for name in names if name not in set(present)]
        logger.warning("%d classes have no image and are left out: %s", len(absent), absent[:20])
    return present or names  # without a single label, reading says which row has none


@plain_arguments(images_per_class=1)
def select_per_class(
    labels: torch.Tensor, images_per_class: int, *, seed: int, names: Sequence[str] | None = None
) -> torch.Tensor:
    """Draws the same number of rows from every class: the random-real baseline.

    The choice for a class depends on the seed and that class only, and a smaller choice is part of a larger one.

    Args:
        labels (`torch.Tensor` of shape `(N,)`, int64): labels of the rows.
        images_per_class (`int`): rows to draw from each class, at least 1.
        seed (`int`): the same seed gives the same rows.
        names (sequence of `str`, *optional*): all classes, by label. Without it, classes are 0 to the largest label.

    Returns:
        `torch.Tensor` of shape `(classes * images_per_class,)`, int64: rows, class by class.

    Raises:
        ValueError: if a class has fewer rows, or none.
    """
    if len(labels) == 0:
        raise ValueError("There are no labels to choose from: the dataset is empty.")
    labels = labels.cpu()
    names = names or [str(label) for label in range(int(labels.max()) + 1)]
    check_classes(labels, names, images_per_class=images_per_class)
    chosen = []
    for label in range(len(names)):
        rows = torch.nonzero(labels == label).flatten()
        order = np.random.default_rng([seed, label]).permutation(len(rows))
        chosen.append(rows[torch.from_numpy(order[:images_per_class])])
    return torch.cat(chosen)


def dataset_fingerprint(
    dataset: AnyDataset, *, image_column: str | None = None, label_column: str | None = None
) -> str:
    """A short hash of a dataset's content: columns, class names, number of rows, and up to 1,024 rows spread over it.

    The same on every machine, unlike the fingerprint that `datasets` keeps for its cache. Of a stream, the first 64
    rows are read.
    """
    image_column, label_column = find_columns(dataset, image_column=image_column, label_column=label_column)
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    digest = hashlib.sha256(repr((rows, class_names(dataset, label_column=label_column))).encode())
    sample = encoded_columns(dataset, image_column, label_column)
    if rows is None:
        sample = sample.take(64)
    else:
        sample = sample.select(np.unique(np.linspace(0, rows - 1, min(rows, _FINGERPRINT_ROWS)).astype(np.int64)))
    for row in sample:
        value = row[image_column] or {}
        content = value.get("bytes")
        if content is None and value.get("path") is not None and Path(value["path"]).is_file():
            content = Path(value["path"]).read_bytes()
        digest.update(repr(row[label_column]).encode())
        digest.update(content if content is not None else repr(value.get("path")).encode())
    return digest.hexdigest()[:16]
