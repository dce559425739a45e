"""The columns and classes of a dataset: which they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict

from ..utils.names import nearest as nearest


AnyDataset: TypeAlias = Dataset | IterableDataset
WithSplits: TypeAlias = AnyDataset | DatasetDict | IterableDatasetDict

# what such columns are called, surely and perhaps
_IMAGE_NAMES = ("image|img|picture|photo|pixel", "path|file")
_LABEL_NAMES = ("label|class|target|category|species|digit", "fine|coarse|^y$")


def find_columns(
    dataset: AnyDataset, *, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """The image and the label column of a dataset, found by their feature types unless named.

    Args:
        dataset (`Dataset` or `IterableDataset`): one split.
        image_column (`str`, *optional*): a column of type `Image`; needed where there are several.
        label_column (`str`, *optional*): a column of type `ClassLabel`; needed where there are several.

    Raises:
        TypeError: if `dataset` is not one split of a dataset.
        ValueError: if a column is missing, ambiguous or of another type. The message names the columns there are.
    """
    features = features_of(dataset)
    return (
        find_column(features, "image_column", image_column, Image),
        find_column(features, "label_column", label_column, ClassLabel),
    )


def class_names(dataset: AnyDataset, *, label_column: str | None = None) -> list[str]:
    """The names of a dataset's classes, by label."""
    features = features_of(dataset)
    return list(features[find_column(features, "label_column", label_column, ClassLabel)].names)


def labels_of(dataset: Dataset, label_column: str | None = None) -> list[Any]:
    """The labels of a dataset as they are stored, whole numbers or None, whatever format it has."""
    column = find_column(features_of(dataset), "label_column", label_column, ClassLabel)
    return dataset.with_format(None)[column][:]


def features_of(dataset: AnyDataset) -> Features:
    """The columns of one split and their types, also of a stream whose types are not declared."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise TypeError(
            f"Got all splits, {list(dataset)}; choose one, for example `dataset[{next(iter(dataset))!r}]`."
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"Expected a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}. "
            "`load_image_dataset(path, split=...)` opens one."
        )
    features = dataset.features
    if features is None:  # a stream that declares no types; its first row may tell them
        try:
            features = resolved(dataset).features
        except ValueError as error:
            raise ValueError(
                "The column types of this streamed dataset are unknown; `map` forgets them. Keep them with "
                "`stream.map(function, features=stream.features)`, or declare them with `stream.cast(features)`."
            ) from error
        except StopIteration:  # there is none
            features = None
    if not features:
        raise ValueError("The dataset is empty: it has no rows and no columns.")
    return features


def resolved(stream: IterableDataset) -> IterableDataset:
    """A stream that knows the types of its columns, told from its first row where they are not declared."""
    return stream if stream.features is not None else stream._resolve_features()  # `datasets` has no public name


def find_column(features: Features, option: str, column: str | None, kind: type) -> str:
    """One column of type `kind`; `option` is the argument that an error tells to use."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    have = ", ".join(f"{key!r} ({_kind(feature)})" for key, feature in features.items())
    if column is None:
        if len(found) == 1:
            return found[0]
        if found:
            usual = "image" if kind is Image else "label"  # our own rows have a `source` beside the `label`
            if usual in found:
                return usual
            raise ValueError(f"Several columns are of type {kind.__name__}: {found}. Choose one with `{option}=`.")
        hint = column_hint(features, kind)
        raise ValueError(f"No column is of type {kind.__name__}. The columns are {have}.{hint}")
    if column not in features:
        raise ValueError(f"There is no column {column!r}. The columns are {have}.{nearest(column, found or features)}")
    if column not in found:
        hint = f" Of type {kind.__name__} are: {found}." if found else column_hint(features, kind, column)
        raise ValueError(f"Column {column!r} is {_kind(features[column])}, not {kind.__name__}.{hint}")
    return column


def _kind(feature: object) -> str:
    return str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else type(feature).__name__


def column_hint(features: Mapping[str, Any], kind: type, column: str | None = None) -> str:
    """The call that most likely repairs a column of the wrong type: the one that was named, or the most plausible."""
    is_image = kind is Image
    fits, likely, less = (_may_be_image, *_IMAGE_NAMES) if is_image else (_may_be_label, *_LABEL_NAMES)
    if column is not None:  # chosen by the user: its name need not speak for it
        key, asked = column if fits(_kind(features[column]), features[column]) else "", ""
    else:

        def rank(key: str) -> int:
            return 2 if re.search(likely, key, re.IGNORECASE) else 1 if re.search(less, key, re.IGNORECASE) else 0

        found = [key for key, feature in features.items() if fits(_kind(feature), feature) > (2 - rank(key))]
        key = max(found, key=rank, default="")
        asked = f" Did you mean {key!r}?"
    if is_image:
        return key and f"{asked} Make it one with `dataset.cast_column({key!r}, datasets.Image())`."
    return key and (
        f"{asked} Make it one with `dataset.class_encode_column({key!r})`, or, of a stream, "
        f"`dataset.cast_column({key!r}, datasets.ClassLabel(names=[...]))`."
    )


def _may_be_image(kind: str, feature: object) -> int:
    """How little a column's name has to say: 3 nothing, 2 something, 1 that it is an image, 0 it cannot be one."""
    if (isinstance(feature, dict) and "bytes" in feature) or kind in ("binary", "large_binary", "Array2D", "Array3D"):
        return 3
    if kind in ("string", "large_string"):
        return 2
    return 1 if kind in ("List", "LargeList", "Sequence") else 0


def _may_be_label(kind: str, feature: object) -> int:
    """As for images; a number may be anything (an id, a width), so its name has to speak for it."""
    return 2 if re.fullmatch(r"bool|u?int\d+", kind) else 1 if kind in ("string", "large_string") else 0


def image_seed(seed: int, label: int, index: int, stream: str = "image") -> int:
    """The seed of one image's noise: 48 bits from the run's seed, the generator's class and the image's index.

    Any image can be drawn again on its own, in any batch and by any process.
    """
    words = np.random.SeedSequence([seed, label, index, *stream.encode()]).generate_state(2)
    return int(words[0]) << 16 | int(words[1]) & 0xFFFF
