"""Splits of a dataset: slices and sums by one notation, and a test part where there is none."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, ReadInstruction, concatenate_datasets

from ..utils.names import nearest
from ..utils.values import check_real, check_whole
from .schema import AnyDataset, class_names, features_of, find_column, labels_of


logger = logging.getLogger(__name__)

# what folders and files of a split are called, as in datasets
ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class NothingToTestError(ValueError):
    """There is no split to test on, and no image that can be held out."""


def split_named(name: str) -> str | None:
    """The split that a folder is called after: "train", "validation", "test"; None for other names."""
    return next((split for split, names in ALIASES.items() if name.lower() in names), None)


def take_split(
    splits: Mapping[str, AnyDataset], split: str | ReadInstruction, *, what: str = "the dataset"
) -> AnyDataset:
    """One split, a slice or a sum, in datasets' own notation: "train", "train[:100]", "train[10%:20%]", "train+test".

    Args:
        splits (mapping of `str` to `Dataset` or `IterableDataset`): the whole ones; of streams no slices are taken.
        split (`str` or `ReadInstruction`): which.
        what (`str`): how an error calls the dataset.

    Raises:
        ValueError: for a split that does not exist, or a text that is no split.
    """
    if isinstance(split, str) and split in splits:
        return splits[split]
    lengths = {name: len(part) for name, part in splits.items() if isinstance(part, Dataset)}
    if len(lengths) < len(splits):
        refuse_slice(split)
    try:
        wanted = ReadInstruction.from_spec(split) if isinstance(split, str) else split
        ranges = wanted.to_absolute(lengths)
    except (ValueError, AssertionError, KeyError) as error:
        name = str(split).partition("[")[0].partition("+")[0].strip()
        alias = split_named(name)
        hint = f" Nearest: {alias!r}." if alias in splits else nearest(name, splits)
        raise ValueError(
            f"There is no split {str(split)!r} of {what}, which has {list(splits)}.{hint} Slices and sums are written "
            "'train[:100]', 'train[10%:20%]', 'train+test'."
        ) from error
    parts = [splits[part.splitname].select(range(part.from_, max(part.from_, part.to))) for part in ranges]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def divide(
    splits: Mapping[str, AnyDataset],
    *,
    train_split: str = "train",
    test_split: str = "auto",
    holdout: float = 0.2,
    seed: int = 0,
    label_column: str | None = None,
    what: str = "the dataset",
) -> tuple[AnyDataset, AnyDataset | None, dict[str, Any]]:
    """The images to train and to test with.

    Args:
        splits (mapping of `str` to `Dataset` or `IterableDataset`): the whole splits. A stream counts as labelled if
            its first row is, as reading all would take as long as the work itself; of it nothing can be held out.
        train_split (`str`): a split, slice or sum, see [`take_split`].
        test_split (`str`): likewise; "none"; or "auto": the test split if it has labels, else the validation split,
            else a part of the training images is held out.
        holdout (`float`): that share of every class, in (0, 1), at least one image; a class of one image keeps it.
        seed (`int`): which images are held out.
        label_column (`str`, *optional*): where there are several of the kind.
        what (`str`): how an error calls the dataset.

    Returns:
        `tuple`: the training images, the test images (None for "none"), and what was taken as plain JSON values.

    Raises:
        ValueError: for a split that does not exist, one without labels, or a slice that leaves classes out.
    """
    check_real("holdout", holdout, 0, 0.95, open_low=True)
    check_whole("seed", seed, 0)
    train = take_split(splits, train_split, what=what)
    _refuse_lost_classes(splits, train, train_split, label_column)
    if test_split == "none":
        return train, None, {"train_split": train_split, "test_split": "none"}
    if test_split == "auto":
        found = _own_test_split(splits, train_split, label_column, what)
        if found is None and not isinstance(train, Dataset):
            raise ValueError(
                f"There is no test split with labels of {what}, which has {list(splits)}, and of a stream no images "
                "can be held out. Read it without `streaming`, or take all of them with `test_split='none'` "
                "(--test_split none)."
            )
        if found is None:
            return _held_out(train, train_split, holdout, seed, label_column)
        test_split = found
    test = _test_split(splits, test_split, label_column, what)
    return train, test, {"train_split": train_split, "test_split": test_split}


def part_to_test(
    splits: Mapping[str, Dataset],
    *,
    test_split: str = "auto",
    label_column: str | None = None,
    what: str = "the dataset",
    holdout: float = 0.2,
    seed: int = 0,
) -> tuple[Dataset, dict[str, Any]]:
    """The images to test with and what was taken, by the rule of [`divide`], where there need be no training split.

    Raises:
        ValueError: as [`divide`], and for "none".
    """
    if test_split == "none":
        raise ValueError("Networks are tested: `test_split` is a split or 'auto' here, not 'none'.")
    found = _own_test_split(splits, "", label_column, what) if test_split == "auto" else test_split
    if found is not None:
        return _test_split(splits, found, label_column, what), {"test_split": found}
    _, test, facts = divide(splits, label_column=label_column, what=what, holdout=holdout, seed=seed)
    return test, {name: facts[name] for name in facts if name != "train_split"}


def refuse_slice(split: str | ReadInstruction) -> None:
    """Raises ValueError for a slice or a sum, which streams do not have."""
    if re.search(r"[\[+]", str(split)):
        raise ValueError(
            f"A stream has whole splits only, got {str(split)!r}. Take the first rows with `.take(n)`, leave rows out "
            "with `.skip(n)`, or load without `streaming`."
        )


def _names_in(split: str) -> list[str]:
    """The splits that a text names: `["train", "test"]` of "train[:50%]+test"."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _own_test_split(
    splits: Mapping[str, AnyDataset], train_split: str, label_column: str | None, what: str
) -> str | None:
    """The test split, else the validation split, if it has labels and is not trained on; None if there is none."""
    for kind in ("test", "validation"):
        name = next((name for name in splits if split_named(name) == kind), None)
        if name is None or name in _names_in(train_split):
            continue
        if _is_labelled(splits[name], label_column):
            return name
        logger.warning("The split %r of %s has no labels and is left aside.", name, what)
    return None


def _test_split(splits: Mapping[str, AnyDataset], split: str, label_column: str | None, what: str) -> AnyDataset:
    """A split to test with, which has labels and every class."""
    test = take_split(splits, split, what=what)
    if not _is_labelled(test, label_column):
        raise ValueError(
            f"The split {split!r} of {what} has images without a label (-1 or None), so nothing can be "
            "tested on it. Choose another one, or 'auto', which takes the validation split or holds images out."
        )
    _refuse_lost_classes(splits, test, split, label_column)
    return test


def _is_labelled(dataset: AnyDataset, label_column: str | None) -> bool:
    """Whether every row, of a stream the first, has a label; unlabelled test splits have -1 or None."""
    if isinstance(dataset, Dataset):
        labels = labels_of(dataset, label_column)
    else:
        column = find_column(features_of(dataset), "label_column", label_column, ClassLabel)
        labels = [row[column] for row in dataset.select_columns([column]).take(1)]
    return len(labels) > 0 and all(label is not None and label >= 0 for label in labels)


def _refuse_lost_classes(
    splits: Mapping[str, AnyDataset], part: Dataset, split: str, label_column: str | None
) -> None:
    """Raises if a slice leaves out classes that its whole split has, as of rows that are sorted by class."""
    if "[" not in split:
        return
    wholes = [splits[name] for name in _names_in(split) if name in splits]
    lost = {label for whole in wholes for label in labels_of(whole, label_column)} - set(labels_of(part, label_column))
    if lost := {label for label in lost if label is not None and label >= 0}:
        names = class_names(part, label_column=label_column)
        raise ValueError(
            f"The split {split!r} leaves {len(lost)} classes out, {[names[i] for i in sorted(lost)][:10]}: the rows "
            "are sorted by class. Shuffle them first (`dataset.shuffle(seed=0)`), or take the whole split."
        )


def _held_out(
    train: Dataset, train_split: str, holdout: float, seed: int, label_column: str | None
) -> tuple[Dataset, Dataset, dict[str, Any]]:
    labels = np.array([-1 if label is None else label for label in labels_of(train, label_column)])
    test_rows: list[int] = []
    single = []
    for label in np.unique(labels[labels >= 0]).tolist():
        rows = np.flatnonzero(labels == label)
        count = min(max(round(holdout * len(rows)), 1), len(rows) - 1)
        if count == 0:
            single.append(label)
        test_rows += np.random.default_rng([seed, label]).permutation(rows)[:count].tolist()
    if not test_rows:
        raise NothingToTestError(
            f"No image can be held out of {len(train)} to test on, as no class has two. Pass `test_split='none'`, or "
            "more images."
        )
    if single:
        names = class_names(train, label_column=label_column)
        logger.warning("Classes of one image are not tested: %s", [names[label] for label in single][:20])
    kept = np.setdiff1d(np.arange(len(train)), test_rows)
    share = f"{100 * holdout:g} % of every class, seed {seed}"
    facts = {"train_split": f"{train_split}, less {share}", "test_split": f"{train_split}, held out: {share}",
             "holdout": holdout, "holdout_seed": seed}  # fmt: skip
    logger.warning("There is no test split: %s images are held out of %r (%s).", len(test_rows), train_split, share)
    return train.select(kept), train.select(sorted(test_rows)), facts


def stratified_indices(labels: np.ndarray, test_size: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the test part, each in order, with the classes in the same proportions."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=seed)
    return np.sort(train), np.sort(test)
