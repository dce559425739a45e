"""Which class of a generator draws which class of a dataset: by name, synonym, WordNet id, index, or as told.

The files in `label_sets/` hold the classes of ImageNet-1k with their WordNet ids and synonyms, and of the subsets that
are in common use.
"""

from __future__ import annotations

import functools
import importlib.resources
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml

from .schema import nearest
from .values import check_whole, plain


logger = logging.getLogger(__name__)

PRESETS = ("imagenet-1k", "imagenet-100", "imagenette", "imagewoof", "cifar10")

Mapped: TypeAlias = Mapping[Any, int | str] | Sequence[int | str] | str | Path | None
"""What a `mapping` argument takes, see [`class_mapping`]."""


class LabelSetClass(NamedTuple):
    """A class of a label set: its ImageNet class by WordNet id, and the names that a dataset may give it."""

    wnid: str
    names: tuple[str, ...]


@functools.cache
def label_set(name: str) -> tuple[LabelSetClass, ...]:
    """The classes of a ready-made label set, in the order of its labels.

    Args:
        name (`str`): "imagenet-1k"; "imagenet-100" (the list of CMC, Tian et al. 2019); "imagenette"; "imagewoof"; or
            "cifar10", where one ImageNet class stands for each class.

    Raises:
        ValueError: for another name; the nearest is suggested.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no label set {name!r}; there are {list(PRESETS)}.{nearest(name, PRESETS)}")
    file = importlib.resources.files(__package__) / "label_sets" / f"{name}.txt"
    classes = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            wnid, _, names = line.partition(" ")
            classes.append(LabelSetClass(wnid, tuple(part.strip() for part in names.split(",") if part.strip())))
    return tuple(classes)


def label_set_named(class_labels: Any) -> str | None:
    """The label set that a `class_labels` argument names, alone or in a list; None for classes."""
    if isinstance(class_labels, str):
        return class_labels
    if isinstance(class_labels, list | tuple) and len(class_labels) == 1 and class_labels[0] in PRESETS:
        return class_labels[0]
    return None


def label_set_classes(name: str, id2label: Mapping[int, str] | None, num_classes: int) -> tuple[list[str], list[int]]:
    """Names of the classes of a label set, and the generator's class for each; arguments as [`class_mapping`].

    Classes of ImageNet are named as the generator names them, those of CIFAR-10 by their own names.
    """
    rows = label_set(name)
    own = name == "cifar10"  # whose classes are not those of the WordNet ids
    keys = [row.names[0] if own else row.wnid for row in rows]
    labels = class_mapping(keys, id2label, num_classes, mapping=name)
    named = {int(key): str(value) for key, value in (id2label or {}).items()}
    return (keys if own else [named.get(label, key) for label, key in zip(labels, keys, strict=True)]), labels


def class_mapping(
    names: Sequence[str],
    id2label: Mapping[int, str] | None,
    num_classes: int,
    *,
    mapping: Mapped = None,
    own_labels: Sequence[int] | None = None,
) -> list[int]:
    """Finds the generator's class for every class of a dataset.

    Names are compared without case, `_` or `-`, and any one of several comma-separated synonyms is enough, as in
    ImageNet's "chain saw, chainsaw". WordNet ids ("n01440764") and further synonyms of ImageNet are understood on
    both sides. Where one side has no real names, classes are matched by index.

    Args:
        names (sequence of `str`): the dataset's classes, by label.
        id2label (`dict[int, str]`, *optional*): the generator's class names.
        num_classes (`int`): number of classes of the generator.
        mapping (*optional*): for the classes that cannot be found, or whose match is wrong. One of:
            - `dict`: dataset class name to generator class (index, name or WordNet id);
            - `list`: the generator's class of every label, in order;
            - "index": label i is the generator's class i;
            - a label set, see [`label_set`], whose names and WordNet ids the dataset uses;
            - path of a YAML (or JSON) file that holds such a dict or list.
        own_labels (sequence of `int`, *optional*): index of each class in a label set of its own. A name that fits
            several classes is settled if the generator has it at that index.

    Returns:
        `list[int]`: for dataset label i, a class in [0, num_classes).

    Raises:
        ValueError: if a class cannot be found or is ambiguous; all such classes are listed with the nearest names.
        FileNotFoundError: if `mapping` is a path and no file is there.
    """
    lookup = ClassLookup(id2label, num_classes)
    told = read_mapping(mapping, names, lookup)
    by_index = len(names) == num_classes and (_are_generic(names) or lookup.is_generic)
    if own_labels is None and len(names) == num_classes:
        own_labels = range(num_classes)  # the same label set on both sides settles names that occur twice
    resolved: list[int] = []
    problems: list[str] = []
    for label, name in enumerate(names):
        found = lookup.find(told[name]) if name in told else lookup.find(name) or ({label} if by_index else set())
        if own_labels is not None and own_labels[label] in found:
            found = {own_labels[label]}
        if len(found) == 1 and (choice := next(iter(found))) in range(num_classes):
            resolved.append(choice)
        else:
            given = f" (mapped to {told[name]!r})" if name in told else ""
            several = f" fits several: {lookup.describe(found)}" if len(found) > 1 else ""
            near = lookup.nearest(str(told.get(name, name))) if not several and len(problems) < 20 else ""
            problems.append(f"{name!r}{given}{several}{near}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(names)} dataset classes have no certain match among the {num_classes} "
            f"classes of the generator: {'; '.join(problems)}. Pass `mapping={{dataset class name: generator "
            "class}`, with indices, names or WordNet ids."
        )
    _refuse_shared_classes(names, resolved, told)
    return resolved


class ClassLookup:
    """Finds classes of a generator (or of a classifier) by name, synonym or WordNet id.

    Args:
        id2label (`dict[int, str]`, *optional*): names of its classes. 1,000 classes without real names are taken for
            those of ImageNet-1k in their usual order.
        num_classes (`int`): their number.
    """

    def __init__(self, id2label: Mapping[int, str] | None, num_classes: int) -> None:
        self.id2label = {int(key): str(value) for key, value in (id2label or {}).items()}
        self.num_classes = num_classes
        self.is_generic = _are_generic(list(self.id2label.values()))
        self._names = _synonyms({index: (label, *label.split(",")) for index, label in self.id2label.items()})

    def find(self, name: int | str) -> set[int]:
        """Every class that a name, a WordNet id or an index may mean; an index is passed on as it is."""
        if not isinstance(name, str):
            return {check_whole("class", name)}
        return _by_any_synonym(name, self._names) or {
            index for imagenet in _imagenet_classes(name) for index in self._of_imagenet.get(imagenet, ())
        }

    def describe(self, classes: Iterable[int]) -> str:
        """Classes by index, name and WordNet id, to choose from."""
        wnids = {index: label_set("imagenet-1k")[i].wnid for i, mine in self._of_imagenet.items() for index in mine}
        return ", ".join(
            f"{index} {self.id2label.get(index, '')!r}{f' ({wnids[index]})' if index in wnids else ''}"
            for index in sorted(classes)
        )

    def nearest(self, name: str) -> str:
        """The names most like `name`, as the end of a clause of an error; empty if there are none."""
        return nearest(name, [part.strip() for label in self.id2label.values() for part in label.split(",")]).rstrip(
            "."
        )

    @functools.cached_property
    def _of_imagenet(self) -> dict[int, set[int]]:
        """The classes that draw a class of ImageNet-1k, by its index there; empty for a class that is in doubt."""
        known = label_set("imagenet-1k")
        if self.is_generic:
            if self.num_classes != len(known):
                return {}
            logger.warning("The %d classes have no names: they are taken for those of ImageNet-1k.", len(known))
            return {index: {index} for index in range(len(known))}
        found: dict[int, set[int]] = defaultdict(set)
        for index, label in self.id2label.items():
            meant = _imagenet_classes(label)
            if self.num_classes == len(known) and index in meant:
                meant = {index}  # the usual order settles names that occur twice
            if len(meant) == 1:
                found[meant.pop()].add(index)
        return dict(found)


def read_mapping(mapping: Mapped, names: Sequence[str], lookup: ClassLookup) -> dict[str, int | str]:
    """Any form of a `mapping` argument as a dict from dataset class name to generator class, see [`class_mapping`]."""
    if mapping is None:
        return {}
    if isinstance(mapping, str) and mapping == "index":
        return {name: label for label, name in enumerate(names)}
    if isinstance(mapping, str) and not mapping.endswith((".yaml", ".yml", ".json")):
        return _told_by_label_set(mapping, names, lookup)
    where = "`mapping`"
    if isinstance(mapping, str | Path):
        where = f"The file {mapping}"
        mapping = _read_file(Path(mapping))
    mapping = plain(mapping)  # of NumPy or pandas
    if isinstance(mapping, Sequence):
        if len(mapping) != len(names):
            raise ValueError(
                f"{where} lists {len(mapping)} classes, the dataset has {len(names)}: one for each label."
            )
        mapping = dict(zip(names, mapping, strict=True))
    if not isinstance(mapping, Mapping) or not all(_is_class(value) for value in mapping.values()):
        raise ValueError(
            f"{where} must give a generator class (index, name or WordNet id) for dataset class names, for example "
            f"`{{{names[0] if names else 'cat'!r}: 281}}`; got {str(mapping)[:200]}."
        )
    told = {str(key): value for key, value in mapping.items()}
    unknown = [key for key in told if key not in names]
    if unknown:
        raise ValueError(f"{where} names {unknown}, which the dataset has not.{nearest(unknown[0], names)}")
    return told


def _read_file(path: Path) -> Any:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.*")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"There is no mapping file {path}.{nearest(path.name, siblings)}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The mapping file {path} is not valid YAML: {error}") from error


def _told_by_label_set(preset: str, names: Sequence[str], lookup: ClassLookup) -> dict[str, int | str]:
    """Class by class what a label set says; a class that the generator knows by its own name keeps that."""
    classes = label_set(preset)
    if _are_generic(names) and len(names) == len(classes):
        return {name: row.wnid for name, row in zip(names, classes, strict=True)}
    imagenet = {row.wnid: row.names for row in label_set("imagenet-1k")}
    members = [(row.wnid, *row.names, *imagenet[row.wnid], ", ".join(imagenet[row.wnid])) for row in classes]
    known = _synonyms(dict(enumerate(members)))
    told: dict[str, int | str] = {}
    problems = []
    for label, name in enumerate(names):
        found = _by_any_synonym(name, known)
        if label in found and len(names) == len(classes):
            found = {label}
        if len(found) == 1:
            if len(lookup.find(name)) != 1:
                told[name] = classes[found.pop()].wnid
        elif found:
            problems.append(f"{name!r} fits several: {', '.join(classes[i].wnid for i in sorted(found))}")
        else:
            choices = [part for row in members for part in row] if len(problems) < 20 else []
            problems.append(f"{name!r}{nearest(name, choices).rstrip('.')}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(names)} dataset classes are not certain in the label set {preset!r}: "
            f"{'; '.join(problems)}. Pass a `dict` as `mapping`, or another label set of {list(PRESETS)}."
        )
    return told


def _is_class(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _refuse_shared_classes(names: Sequence[str], resolved: list[int], told: Mapping[str, Any]) -> None:
    users = defaultdict(list)
    for name, choice in zip(names, resolved, strict=True):
        users[choice].append(name)
    for choice, sharing in users.items():
        if len(sharing) > 1 and not set(sharing) <= set(told):
            raise ValueError(
                f"Classes {sharing} would all be drawn from class {choice} of the generator. If that is what you "
                "want, name each of them in `mapping`."
            )


def _normalise(name: str) -> str:
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def _synonyms(names: Mapping[int, Iterable[str]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for index, synonyms in names.items():
        for synonym in synonyms:
            found[_normalise(synonym)].add(index)
    return dict(found)


def _by_any_synonym(name: str, synonyms: Mapping[str, set[int]]) -> set[int]:
    whole = synonyms.get(_normalise(name), set())
    return whole or set().union(*(synonyms.get(_normalise(part), set()) for part in name.split(",")))


@functools.cache
def _imagenet_synonyms() -> dict[str, set[int]]:
    return _synonyms(
        {i: (row.wnid, *row.names, ", ".join(row.names)) for i, row in enumerate(label_set("imagenet-1k"))}
    )


def _imagenet_classes(name: str) -> set[int]:
    """Indices in ImageNet-1k of the classes that a name or WordNet id may mean."""
    return set(_by_any_synonym(name, _imagenet_synonyms()))


def _are_generic(labels: Sequence[str]) -> bool:
    """Whether labels say nothing but their index: none at all, "7", "LABEL_7", "class 7"."""
    return all(re.fullmatch(rf"(label|class)?\s*{i}", _normalise(label)) for i, label in enumerate(labels))
