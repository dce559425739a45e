"""Image-classification datasets in, pixel tensors out.

Any dataset that `datasets` can read (Hub id, local folder, parquet, streamed or not) becomes batches of pixels in
[-1, 1] with integer labels, and its class names are matched to the classes of a generator.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from tqdm.auto import tqdm

from .schema import AnyDataset, features_of, find_column, nearest
from .schema import class_mapping as class_mapping
from .schema import class_names as class_names
from .schema import find_columns as find_columns


logger = logging.getLogger(__name__)

_FINGERPRINT_ROWS = 1024


class PixelBatch(NamedTuple):
    """A batch of images.

    Attributes:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, float32, range [-1, 1]): the images.
        labels (`torch.Tensor` of shape `(B,)`, int64): labels of the dataset, not of a generator.
        indices (`torch.Tensor` of shape `(B,)`, int64): the row of each image in the dataset.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


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
        FileNotFoundError: if `path` looks like a local path and is not there.
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
        loaded = load_dataset("parquet", data_files={"train": texts}, streaming=streaming, token=token)
        return _open_splits(loaded, split, streaming=False)
    if Path(texts[0]).exists():
        return _load_local(Path(texts[0]), name, split=split, revision=revision, streaming=streaming)
    looks_local = isinstance(paths[0], Path) or texts[0].count("/") > 1 or texts[0].startswith((".", "/", "~"))
    if looks_local and "://" not in texts[0]:
        _check_exists(Path(texts[0]))
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


def iterate_pixels(
    dataset: AnyDataset,
    *,
    image_size: int | None = None,
    num_channels: int = 3,
    batch_size: int = 256,
    image_column: str | None = None,
    label_column: str | None = None,
    on_error: str = "raise",
    progress: bool = False,
) -> Iterator[PixelBatch]:
    """Streams a dataset as pixels, in constant memory and in the dataset's order.

    Images of any mode and bit depth are converted to gray or RGB with 8 bits per channel.

    Args:
        dataset (`Dataset` or `IterableDataset`): one split. Its format and transforms, if any, are not applied.
        image_size (`int`, *optional*): resize the shorter side to this many pixels (bicubic) and crop the centre.
            Without it images keep their size, which must then be the same for all.
        num_channels (`int`): 1 (gray) or 3 (RGB).
        batch_size (`int`): images per batch; the last batch may be smaller.
        image_column (`str`, *optional*): see [`find_columns`].
        label_column (`str`, *optional*): see [`find_columns`].
        on_error (`str`): `"raise"` or `"skip"` images that cannot be decoded; skipped rows are counted and logged.
        progress (`bool`): show a progress bar.

    Yields:
        [`PixelBatch`]: pixels `(B, C, H, W)` in [-1, 1], labels `(B,)` and row indices `(B,)`.

    Raises:
        ValueError: for an unreadable image or a missing label (the row is named), for sizes that differ, and for an
            empty dataset.
    """
    _check_pixel_options(image_size, num_channels, batch_size, on_error)
    image_column, label_column = find_columns(dataset, image_column=image_column, label_column=label_column)
    num_classes = len(class_names(dataset, label_column=label_column))
    # A generator of its own, so that bad arguments are reported by the call and not by the first batch.
    return _pixel_batches(
        _encoded_columns(dataset, image_column, label_column),
        (image_column, label_column),
        num_classes,
        image_size=image_size,
        num_channels=num_channels,
        batch_size=batch_size,
        skip=on_error == "skip",
        progress=progress,
    )


def _check_pixel_options(image_size: int | None, num_channels: int, batch_size: int, on_error: str) -> None:
    if num_channels not in (1, 3):
        raise ValueError(f"`num_channels` must be 1 (gray) or 3 (RGB), got {num_channels}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"`image_size` must be at least 1 pixel, or None for the images' own size; got {image_size}.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"`on_error` must be 'raise' or 'skip', got {on_error!r}.")


def _encoded_columns(dataset: AnyDataset, image_column: str, label_column: str) -> AnyDataset:
    """The two columns with images still encoded: decoding row by row tells which row is corrupt."""
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format(None)
    elif dataset.features is None:
        dataset = dataset._resolve_features()
    return dataset.select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))


def _pixel_batches(
    dataset: AnyDataset,
    columns: tuple[str, str],
    num_classes: int,
    *,
    image_size: int | None,
    num_channels: int,
    batch_size: int,
    skip: bool,
    progress: bool,
) -> Iterator[PixelBatch]:
    decoder, row, size, skipped = Image(), 0, None, []
    total = len(dataset) if isinstance(dataset, Dataset) else None
    with tqdm(total=total, desc="Reading images", unit="img", disable=not progress) as bar:
        for batch in dataset.iter(batch_size=batch_size):
            arrays, labels, indices = [], [], []
            for value, label in zip(batch[columns[0]], batch[columns[1]], strict=True):
                try:
                    array = _to_array(decoder.decode_example(value), image_size, num_channels)
                except Exception as error:  # Pillow's readers raise all sorts of things on broken files
                    if not skip:
                        raise ValueError(
                            f"The image of row {row} cannot be decoded ({type(error).__name__}: {error}). Repair or "
                            "remove the row, or pass `on_error='skip'` to leave such images out."
                        ) from error
                    skipped.append(row)
                else:
                    size = size or array.shape
                    if array.shape != size:
                        raise ValueError(
                            f"Image sizes differ: row {row} is {array.shape[1]}x{array.shape[0]} pixels, earlier ones "
                            f"{size[1]}x{size[0]}. Pass `image_size=` to resize and crop them all to one size."
                        )
                    arrays.append(array)
                    labels.append(_checked_label(label, row, num_classes))
                    indices.append(row)
                row += 1
            bar.update(len(batch[columns[0]]))
            if arrays:
                yield PixelBatch(_to_pixels(np.stack(arrays)), torch.tensor(labels), torch.tensor(indices))
    if row == 0:
        raise ValueError("The dataset is empty: it has no rows.")
    if skipped:
        more = f" and {len(skipped) - 20} more" if len(skipped) > 20 else ""
        logger.warning(
            "Skipped %d of %d images that cannot be decoded: rows %s%s", len(skipped), row, skipped[:20], more
        )


def _checked_label(label: int | None, row: int, num_classes: int) -> int:
    if label is None or not 0 <= label < num_classes:
        raise ValueError(
            f"Row {row} has no valid label: got {label}, allowed are 0 to {num_classes - 1}. Unlabelled test splits "
            "use -1 or None; choose a labelled split or remove such rows with `dataset.filter`."
        )
    return label


def _to_array(image: PIL.Image.Image, image_size: int | None, num_channels: int) -> np.ndarray:
    """An image as uint8 of shape (H, W) or (H, W, 3)."""
    mode = "L" if num_channels == 1 else "RGB"
    if image.mode != mode:
        image = _convert(image, mode)
    if image_size is not None and image.size != (image_size, image_size):
        width, height = image.size
        scale = image_size / min(width, height)
        width, height = max(round(width * scale), image_size), max(round(height * scale), image_size)
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def _convert(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range; store them with 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip instead of scale
        values = np.asarray(image).astype(np.float32) / 257
        image = PIL.Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _to_pixels(arrays: np.ndarray) -> torch.Tensor:
    """uint8 `(B, H, W)` or `(B, H, W, 3)` to float32 `(B, C, H, W)` in [-1, 1]."""
    values = torch.from_numpy(arrays if arrays.ndim == 4 else arrays[..., None]).permute(0, 3, 1, 2)
    return values.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def load_pixels(
    dataset: AnyDataset,
    *,
    image_size: int | None = None,
    num_channels: int = 3,
    batch_size: int = 256,
    image_column: str | None = None,
    label_column: str | None = None,
    on_error: str = "raise",
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reads a whole dataset into memory; arguments as for [`iterate_pixels`].

    Returns:
        `tuple`: pixels `(N, C, H, W)` float32 in [-1, 1], labels `(N,)` int64, and row indices `(N,)` int64. The
        indices are 0..N-1 unless images were skipped.
    """
    batches = iterate_pixels(
        dataset,
        image_size=image_size,
        num_channels=num_channels,
        batch_size=batch_size,
        image_column=image_column,
        label_column=label_column,
        on_error=on_error,
        progress=progress,
    )
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


def images_from_pixels(pixels: torch.Tensor) -> list[PIL.Image.Image]:
    """Pixels `(B, 1 or 3, H, W)` in [-1, 1] as images of mode L or RGB; values outside are clipped.

    Raises:
        ValueError: if the shape is another, or a value is NaN.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"Expected pixels of shape (B, 1 or 3, H, W), got {tuple(pixels.shape)}.")
    if torch.isnan(pixels).any():
        raise ValueError("The pixels contain NaN; they cannot be made images.")
    values = pixels.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    arrays = values.permute(0, 2, 3, 1).contiguous().numpy()  # (B, H, W, C)
    return [PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


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
    check_classes(torch.from_numpy(labels), features[column].names, images_per_class=2)
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
            "the class out: filter the rows and cast the label to a `ClassLabel` without it."
        )


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
    if images_per_class < 1:
        raise ValueError(f"`images_per_class` must be at least 1, got {images_per_class}.")
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
    sample = _encoded_columns(dataset, image_column, label_column)
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
