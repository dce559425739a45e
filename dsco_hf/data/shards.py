"""The rows of a published dataset: checked, counted, hashed, and written as parquet shards of reproducible bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image, List, Value
from datasets.table import embed_table_storage

from ..utils.files import portable, reading, same_file
from ..utils.values import plain_arguments
from .schema import column_hint


if TYPE_CHECKING:
    from _hashlib import HASH

ROWS_PER_GROUP = 256
MAX_SHARD_BYTES = 500_000_000
HALF_LEAST = 2.0**-24  # the smallest number above 0 of half precision
DRAWN_COLUMNS = ("image", "label", "source", "seed", "block", "real_index")
COLUMN_ORDER = (*DRAWN_COLUMNS, "weight", "soft_label")
CONFIG_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")

DatasetLike = Dataset | DatasetDict

_STREAM = "Turn a stream into one with `Dataset.from_generator(stream.__iter__, features=stream.features)`."


def as_configs(
    dataset: object, *, config_name: str = "default", soft_label_top_k: int | None = None
) -> dict[str, dict[str, Dataset]]:
    """Brings a dataset, a `DatasetDict` of splits, or a dict of configs into the form {config: {split: dataset}}.

    Soft labels come out as they are stored, see [`compact_soft_labels`].

    Raises:
        TypeError: If something in it is not a `datasets.Dataset`.
        ValueError: If it is empty, a name cannot be used in a path, or a column is missing.
    """
    if isinstance(dataset, Dataset | DatasetDict):
        dataset = {config_name: dataset}
    if not isinstance(dataset, Mapping):
        raise TypeError(
            "Expected a Dataset, a DatasetDict (splits) or a dict of them (configs), but got a "
            f"{type(dataset).__name__}. {_STREAM}"
        )
    if not dataset:
        raise ValueError("There is no config to publish: the dict is empty.")
    _refuse_same_files("configs", dataset)
    configs: dict[str, dict[str, Dataset]] = {}
    for name, value in dataset.items():
        if not isinstance(name, str) or not CONFIG_NAME.fullmatch(name) or ".." in name:
            raise ValueError(
                f"{name!r} cannot be a config name: letters, digits, '_', '-' and '.' are allowed, at most 64, "
                "starting with a letter or a digit; for example 'ipc10'."
            )
        if not portable(name):
            raise ValueError(
                f"{name!r} cannot be a config name: Windows can have no folder of that name. Choose another, for "
                f"example 'set-{name.rstrip('.')}'."
            )
        splits = dict(value) if isinstance(value, DatasetDict) else {"train": value}
        _refuse_same_files("splits", splits)
        for split, rows in splits.items():
            if not SPLIT_NAME.fullmatch(split):
                raise ValueError(
                    f"{split!r} cannot be a split name: letters, digits and '_' are allowed, for example 'train'."
                )
            check_rows(rows, where=f"config {name!r}, split {split!r}")
            if "soft_label" in rows.features:
                splits[split] = compact_soft_labels(rows, top_k=soft_label_top_k)
        first = next(iter(splits.values()))
        if different := [s for s, rows in splits.items() if rows.features != first.features]:
            raise ValueError(
                f"All splits of config {name!r} must have the same features, but {different} differ from the first."
            )
        # One column order for all, the order of the features on the card and in the files.
        configs[name] = {split: _ordered(rows) for split, rows in splits.items()}
    return configs


def _refuse_same_files(what: str, names: Iterable[Any]) -> None:
    """Names differ by more than their case: on Windows and macOS their files would be one."""
    if clash := same_file(name for name in names if isinstance(name, str)):
        raise ValueError(
            f"The {what} {clash[0]} would be one folder or file on systems where upper and lower case do not count. "
            "Rename all but one of them."
        )


def check_rows(dataset: object, *, where: str) -> None:
    """Raises if a dataset has no rows, or lacks `image` (Image) or `label` (ClassLabel)."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected a datasets.Dataset for {where}, but got a {type(dataset).__name__}. {_STREAM}")
    for column, kind in (("image", Image), ("label", ClassLabel)):
        feature = dataset.features.get(column)
        if not isinstance(feature, kind):
            found = [name for name, value in dataset.features.items() if isinstance(value, kind)]
            others = [name for name in found if name not in DRAWN_COLUMNS]  # a `source` may be of classes, too
            hint = column_hint(dataset.features, kind, column if column in dataset.features else None)
            if others and column not in dataset.features:
                hint = f" Rename {others[0]!r} to it: `dataset.rename_column({others[0]!r}, {column!r})`."
            raise ValueError(
                f"The dataset of {where} needs a column {column!r} of type {kind.__name__}, but its columns are "
                f"{dict(dataset.features)}.{hint}"
            )
    if not len(dataset):
        raise ValueError(f"The dataset of {where} has no rows.")


@plain_arguments()
def compact_soft_labels(dataset: Dataset, *, top_k: int | None = None, column: str = "soft_label") -> Dataset:
    """Stores soft labels in half precision, all classes or only the most probable ones.

    Args:
        dataset: Dataset whose `column` holds one probability per class.
        top_k: Classes kept per row, as `{"indices": [...], "probabilities": [...]}`, most probable first; all if
            `None`.
        column: Name of the column.

    Raises:
        ValueError: If the column is missing or `top_k` is out of range.
    """
    if column not in dataset.features:
        raise ValueError(f"There is no column {column!r}; the columns are {dataset.column_names}.")
    if isinstance(dataset.features[column], dict):
        return dataset
    num_classes = len(dataset[0][column])
    if lengths := {len(row) for row in dataset.with_format(None)[column][:]} - {num_classes}:
        raise ValueError(
            f"Each row of {column!r} needs one probability per class, but some have {min(lengths)} and the first has "
            f"{num_classes}."
        )
    features = dataset.features.copy()
    features[column] = compact_feature(num_classes, top_k)
    if dataset.features[column] == features[column]:
        return dataset
    return dataset.map(
        lambda batch: {column: [compact_row(row, top_k) for row in batch[column]]}, batched=True, features=features
    )


def compact_feature(num_classes: int, top_k: int | None) -> List | dict[str, List]:
    """The type of a column of soft labels as they are stored; ValueError for a `top_k` out of range."""
    if top_k is None:
        return List(Value("float16"), length=num_classes)
    if not 1 <= top_k <= num_classes:
        raise ValueError(f"top_k must be between 1 and the number of classes, {num_classes}, but is {top_k}.")
    return {"indices": List(Value("int32"), length=top_k), "probabilities": List(Value("float16"), length=top_k)}


def compact_row(row: Sequence[float] | np.ndarray, top_k: int | None) -> np.ndarray | dict[str, np.ndarray]:
    """Probabilities `(K,)` as they are stored."""
    if top_k is None:
        return np.asarray(row, dtype=np.float16)
    values = np.asarray(row, dtype=np.float32)
    indices = np.argsort(-values, kind="stable")[:top_k].astype(np.int32)
    return {"indices": indices, "probabilities": values[indices].astype(np.float16)}


def embedded(dataset: Dataset) -> pa.Table:
    """The rows with their images, in one chunk, so that what is written of them depends on the rows only."""
    rows = dataset.with_format("arrow")[:].cast(dataset.features.arrow_schema)
    return embed_table_storage(rows).combine_chunks()


def _ordered(dataset: Dataset) -> Dataset:
    known = [name for name in COLUMN_ORDER if name in dataset.features]
    return dataset.with_format(None).select_columns(known + sorted(set(dataset.column_names) - set(known)))


def write_shards(
    dataset: Dataset, folder: Path, *, split: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[list[Path], int]:
    """Writes parquet shards whose bytes depend on the rows only; returns them and the size of all images.

    Images are embedded. `Dataset.to_parquet` is not used because its bytes depend on how the rows were put together
    (indices, chunks).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _ordered(dataset)
    parts: list[Path] = []
    writer, in_shard, total = None, 0, 0
    for start in range(0, len(rows), ROWS_PER_GROUP):
        table = embedded(rows.select(range(start, min(start + ROWS_PER_GROUP, len(rows)))))
        # Not `table.nbytes`, which depends on how the buffers came to be.
        size = pc.sum(pc.binary_length(pc.struct_field(table["image"], "bytes"))).as_py() or 0
        if writer is not None and in_shard + size > max_shard_bytes:
            writer.close()
            writer = None
        if writer is None:
            parts.append(folder / f"part-{len(parts)}")
            writer, in_shard = pq.ParquetWriter(parts[-1], rows.features.arrow_schema, write_page_index=True), 0
        writer.write_table(table)
        in_shard, total = in_shard + size, total + size
    if writer is not None:
        writer.close()
    names = [folder / f"{split}-{i:05d}-of-{len(parts):05d}.parquet" for i in range(len(parts))]
    return [part.rename(name) for part, name in zip(parts, names, strict=True)], total


def rows_sha256(dataset: Dataset) -> str:
    """Hashes decoded pixels and values of all rows, whatever the codecs and files they are stored in."""
    digest = hashlib.sha256()
    for row in _ordered(dataset):
        _add_row(digest, row)
    return digest.hexdigest()


def _add_row(digest: HASH, row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        digest.update(f"\0{name}\0".encode())
        if isinstance(value, PIL.Image.Image):
            digest.update(f"{value.mode} {value.size} ".encode())
            digest.update(value.tobytes())
        else:
            digest.update(json.dumps(value, default=repr, sort_keys=True).encode())


def synthetic_rows(dataset: Dataset) -> Dataset:
    """The rows that were drawn: those that are not said to be real, in their order."""
    feature = dataset.features.get("source")
    if feature is None:
        return dataset
    real = feature.str2int("real") if isinstance(feature, ClassLabel) and "real" in feature.names else "real"
    column = dataset.with_format(None)["source"][:]
    return dataset if real not in column else dataset.select([row for row, one in enumerate(column) if one != real])


def rows_record(dataset: Dataset) -> dict[str, Any]:
    """By which rows are known again: their number, and hashes that no column hides which was added later.

    Returns:
        `dict`: `rows`; `images_sha256` of the pixels with the names of their classes; and `rows_sha256` of the
            columns of a drawn set, as [`rows_sha256`] makes it, unless one of them is missing.
    """
    names = dataset.features["label"].names
    known = [name for name in (*DRAWN_COLUMNS, "weight") if name in dataset.features]
    rows, images = hashlib.sha256(), hashlib.sha256()
    for row in dataset.with_format(None).select_columns(known):
        _add_row(rows, row)
        label = row["label"]
        _add_row(images, {"image": row["image"], "label": names[label] if label is not None and label >= 0 else None})
    found = {"rows": len(dataset), "images_sha256": images.hexdigest()}
    return found if not set(DRAWN_COLUMNS) <= set(known) else {**found, "rows_sha256": rows.hexdigest()}


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_split(dataset: Dataset) -> dict[str, Any]:
    """Counts a split's rows per class and per source, and hashes their content.

    The drawn rows have a hash of their own, `synthetic_sha256`, where there are others or further columns.
    """
    labels = np.asarray(dataset.with_format(None)["label"][:], dtype=np.int64)
    names = dataset.features["label"].names
    if labels.size and (labels.min() < 0 or labels.max() >= len(names)):
        raise ValueError(
            f"Labels must be between 0 and {len(names) - 1}, but the dataset has some from {labels.min()} to "
            f"{labels.max()} (-1 stands for a missing label). Filter those rows out."
        )
    feature, values = dataset.features.get("source"), dataset["source"] if "source" in dataset.features else ()
    sources = Counter(feature.int2str(one) if isinstance(feature, ClassLabel) else str(one) for one in values)
    told = {
        "rows": len(dataset),
        "rows_per_class": np.bincount(labels, minlength=len(names)).tolist(),
        "sources": dict(sorted(sources.items())),
        "rows_sha256": rows_sha256(dataset),
    }
    further = "real" in sources or len(dataset.features) > len(DRAWN_COLUMNS)
    if further and set(DRAWN_COLUMNS) <= set(dataset.features):
        told["synthetic_sha256"] = rows_record(synthetic_rows(dataset))["rows_sha256"]
    return told


@contextmanager
def explained_tables(paths: Sequence[Path]) -> Iterator[None]:
    """Names the damaged file, where an error comes from reading parquet or Arrow files, or folders of them.

    Raises:
        DamagedFileError: for the first that cannot be opened; any other error passes as it is.
    """
    try:
        yield
    except Exception:
        for path in paths:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                with reading(file, "Download it again, or write it again."):
                    if file.suffix == ".parquet":
                        pq.read_metadata(file)
                    elif file.suffix == ".arrow":
                        pa.ipc.open_stream(file.read_bytes()).read_all()
        raise


def read_split(paths: Sequence[Path], features: Features) -> Dataset:
    """Reads the parquet shards of a split into memory."""
    tables = []
    for path in paths:
        with reading(path, "Download it again, or write the folder again."):
            tables.append(pq.read_table(path, schema=features.arrow_schema))
    return Dataset(pa.concat_tables(tables), info=DatasetInfo(features=features))
