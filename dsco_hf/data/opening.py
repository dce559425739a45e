"""Image-classification datasets, opened wherever they are: Hub, folder, parquet, saved to disk, or embedded."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDatasetDict,
    ReadInstruction,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import DatasetCard, HfApi

from ..utils.files import check_path
from ..utils.names import nearest
from ..utils.safety import explained
from ..utils.values import plain_arguments
from .image_folders import image_files, is_image_folder, load_image_folder
from .schema import AnyDataset, WithSplits
from .shards import explained_tables
from .splits import divide, part_to_test, refuse_slice, split_named, stratified_indices, take_split


WANTED = "Give a folder, parquet file(s), or an id such as 'user/name'."


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
    for split, rows in zip(("train", "test"), stratified_indices(labels, 360, seed), strict=True):
        columns = {"image": [PIL.Image.fromarray(pixels[i]) for i in rows], "label": labels[rows]}
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def load_image_dataset(
    path: str | Path | Sequence[str | Path],
    name: str | None = None,
    *,
    split: str | ReadInstruction | None = None,
    revision: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> WithSplits:
    """Opens an image-classification dataset, wherever it is.

    Args:
        path (`str`, `Path` or a list of them): `"digits"`; a Hub id; a local folder (images in one folder per class,
            see [`load_image_folder`]; a folder of parquet files with or without README.md, or
            one written by `save_to_disk`); or parquet file(s).
        name (`str`, *optional*): the configuration, where the dataset has several.
        split (`str` or `ReadInstruction`, *optional*): one split, a slice ("train[:100]") or a sum ("train+test"), of
            every kind of dataset alike; without it all of them come, as a dict.
        revision (`str`, *optional*): branch, tag or commit of a Hub dataset. Pin a commit for results that last.
        streaming (`bool`): read row by row without downloading or converting the whole.
        token (`str` or `bool`, *optional*): for private or gated Hub datasets.

    Raises:
        FileNotFoundError: if `path` looks like a local path and is not there, or the Hub has no such dataset.
        PermissionError: if the dataset is gated, or the token is not valid.
        ConnectionError: if the Hub cannot be reached; the message says what is in the cache.
        ValueError: if the split does not exist, or `name` or `revision` has no meaning for this kind of dataset.
    """
    loaded = _load(path, name, split=split, revision=revision, streaming=streaming, token=token)
    return as_streams(loaded) if streaming else loaded


def _load(
    path: str | Path | Sequence[str | Path],
    name: str | None,
    *,
    split: str | ReadInstruction | None = None,
    revision: str | None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> WithSplits:
    """Opens a dataset; what is on this machine is never a stream yet."""
    if isinstance(path, str) and path == "digits":
        _refuse_options("the embedded digits", name=name, revision=revision)
        return _open_splits(load_digits_dataset(), split)
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ValueError("`path` is an empty list; give a Hub id, a folder, or parquet file(s).")
    texts = [str(p) if "://" in str(p) else str(Path(p).expanduser()) for p in paths]
    if len(texts) > 1 or texts[0].endswith(".parquet"):
        _refuse_options("parquet files", name=name, revision=revision)
        return _open_splits(_load_parquet(texts, token), split)
    local = Path(texts[0])
    if local.exists():
        _refuse_options(f"the local dataset {local}", revision=revision)
        with explained(texts[0], token=token, action="load"), explained_tables([local]):
            return _open_splits(_load_local(local, name), split)
    check_path(paths[0], wanted=WANTED)
    if streaming and split is not None:
        refuse_slice(split)
    with explained(texts[0], token=token, action="load"):
        loaded = load_dataset(texts[0], name, split=split, revision=revision, streaming=streaming, token=token)
        _refuse_lost_files(loaded, texts[0], name, revision=revision, token=token)
        return loaded


def _refuse_lost_files(
    loaded: WithSplits, repo_id: str, name: str | None, *, revision: str | None, token: str | bool | None
) -> None:
    """Raises where datasets takes class folders of a repository ("train", "test-a") for splits and drops others."""
    info = getattr(next(iter(loaded.values()), None) if isinstance(loaded, dict) else loaded, "info", None)
    if name is not None or info is None or info.builder_name != "imagefolder" or not info.splits:
        return
    files = HfApi(token=token).list_repo_files(repo_id, repo_type="dataset", revision=revision)
    images = image_files(files)
    rows = sum(split.num_examples for split in info.splits.values())
    if rows < len(images):
        raise ValueError(
            f"Of the {len(images)} images of {repo_id}, datasets reads {rows}: it takes folders called like splits "
            f"for splits, and has found {sorted(info.splits)}. Read its folders as classes: "
            f'`load_image_dataset(huggingface_hub.snapshot_download("{repo_id}", repo_type="dataset"))`.'
        )


def _load_parquet(texts: Sequence[str], token: str | bool | None) -> DatasetDict:
    """Parquet files as one split; a pattern ("*") only where no file is called so."""
    files = {text for text in texts if "://" not in text and Path(text).is_file()}
    for text in texts:
        if "://" not in text and text not in files and not glob.has_magic(text):
            check_path(Path(text), wanted=WANTED)
    patterns = [glob.escape(text) if text in files else text for text in texts]
    with explained_tables([Path(text) for text in texts if text in files]):
        return load_dataset("parquet", data_files={"train": patterns}, token=token)


def _load_local(path: Path, name: str | None) -> Dataset | DatasetDict:
    if path.is_file():
        raise ValueError(f"Cannot read {path} as a dataset. Give its folder, or a file that ends in .parquet.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by `save_to_disk`
        _refuse_options(f"the saved dataset {path}", name=name)
        return load_from_disk(str(path))
    if not any(path.iterdir()):
        raise FileNotFoundError(f"The folder {path} is empty: no images and no parquet files to read.")
    if is_image_folder(path):
        _refuse_options(f"the folder of images {path}", name=name)
        return load_image_folder(path)
    if glob.has_magic(str(path.resolve())):
        return _load_tables(path.resolve(), name)
    return load_dataset(str(path), name)


def _load_tables(path: Path, name: str | None) -> DatasetDict:
    """A folder of parquet files under a name that datasets would read as a pattern: its files one by one."""
    configs = _configs(path)
    if name is not None and name not in configs:
        raise ValueError(
            f"There is no configuration {name!r} of {path}; there are {list(configs)}.{nearest(name, configs)}"
        )
    if name is None and len(configs) > 1 and "default" not in configs:
        raise ValueError(f"{path} has several configurations, {list(configs)}: choose one with `name=`.")
    files = configs[name or ("default" if "default" in configs else next(iter(configs)))]
    if not files:
        raise ValueError(f"{path} has no parquet files, and datasets reads its name as a pattern: rename it.")
    return load_dataset(
        "parquet", data_files={split: [glob.escape(file) for file in found] for split, found in files.items()}
    )


def _configs(path: Path) -> dict[str, dict[str, list[str]]]:
    """The files of every split of every configuration, by the folder's README.md or by their names."""
    readme, listed = path / "README.md", None
    if readme.is_file():
        listed = DatasetCard.load(readme).data.to_dict().get("configs")
    if listed:
        return {
            config["config_name"]: {
                entry["split"]: sorted(str(file) for file in path.glob(entry["path"]))
                for entry in config["data_files"]
            }
            for config in sorted(listed, key=lambda config: not config.get("default"))
        }
    found: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*.parquet")):
        found.setdefault(split_named(re.split(r"[-._]", file.name)[0]) or "train", []).append(str(file))
    return {"default": found}


def _open_splits(loaded: Dataset | DatasetDict, split: str | ReadInstruction | None) -> Dataset | DatasetDict:
    """All splits, or what `split` says."""
    if split is None:
        return loaded
    return take_split({"train": loaded} if isinstance(loaded, Dataset) else loaded, split)


def as_streams(loaded: WithSplits) -> WithSplits:
    """A dataset, or all of a dict, as streams."""
    if isinstance(loaded, DatasetDict):
        return IterableDatasetDict({key: value.to_iterable_dataset() for key, value in loaded.items()})
    return loaded.to_iterable_dataset() if isinstance(loaded, Dataset) else loaded


def load_splits(
    path: str | Path | Sequence[str | Path],
    name: str | None = None,
    *,
    train_split: str = "train",
    test_split: str = "auto",
    holdout: float = 0.2,
    seed: int = 0,
    label_column: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> tuple[AnyDataset, AnyDataset | None, dict[str, Any]]:
    """The images to train and to test with, of a dataset wherever it is.

    Arguments as for [`load_image_dataset`] and [`~dsco_hf.data.splits.divide`]. Of what is streamed from the Hub no
    images can be held out.

    Returns:
        `tuple`: training images, test images or None, and what was taken, to be recorded.
    """
    loaded = _load(path, name, revision=revision, streaming=streaming, token=token)
    splits = {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    train, test, facts = divide(
        splits, train_split=train_split, test_split=test_split, holdout=holdout, seed=seed, label_column=label_column,
        what=str(path),
    )  # fmt: skip
    return (as_streams(train), as_streams(test), facts) if streaming else (train, test, facts)


def load_test_split(
    path: str | Path | Sequence[str | Path],
    name: str | None = None,
    *,
    test_split: str = "auto",
    holdout: float = 0.2,
    seed: int = 0,
    label_column: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """The images to test with, of a dataset wherever it is, and what was taken: those that [`load_splits`] gives.

    Arguments as there; networks are tested, so that `test_split` is not "none".
    """
    loaded = _load(path, name, revision=revision, token=token)
    splits = {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    return part_to_test(
        splits, test_split=test_split, label_column=label_column, what=str(path), holdout=holdout, seed=seed
    )


def _refuse_options(what: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"`{option}={value!r}` has no meaning for {what}; leave it out.")
