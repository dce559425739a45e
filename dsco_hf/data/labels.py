"""Which class of a generator draws which class of a dataset: by name, synonym, WordNet id, index, or as told.

The files in `label_sets/` hold the classes of ImageNet-1k with their WordNet ids and synonyms, and of the subsets that
are in common use.
"""

from __future__ import annotations

import functools
import importlib.resources
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..utils.files import Entry, read_entries
from ..utils.names import canonical, find_classes, folded, nearest, number_of, numbers_of
from ..utils.values import check_whole, plain


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


def label_set_named(class_labels: object) -> str | None:
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
    present: Sequence[str] | None = None,
    owner: str = "generator",
) -> list[int]:
    """Finds the generator's class for every class of a dataset.

    Names are compared in their canonical form (NFC), without case, `_` or `-`, see `utils.names`; of classes whose
    whole names differ in these only, the one that is written alike is meant. Any one of several comma-separated
    synonyms is enough, as in ImageNet's "chain saw, chainsaw". WordNet ids ("n01440764", "n01440764-tench") and
    further synonyms of ImageNet are understood on both sides. Where one side has no real names, a name that is a
    number means the class of that number, and other classes are matched by their place.

    Args:
        names (sequence of `str`): the dataset's classes, by label.
        id2label (`dict[int, str]`, *optional*): the generator's class names.
        num_classes (`int`): number of classes of the generator.
        mapping (*optional*): for the classes that cannot be found, or whose match is wrong. One of:
            - `dict`: dataset class name to generator class (index, name or WordNet id);
            - `list`: the generator's class of every label, in order;
            - "index": label i is the generator's class i;
            - "number": the class named "7" is the generator's class 7, whatever its label;
            - a label set, see [`label_set`], whose names and WordNet ids the dataset uses;
            - path of a YAML (or JSON) file that holds such a dict or list.
        own_labels (sequence of `int`, *optional*): index of each class in a label set of its own. A name that fits
            several classes is settled if the generator has it at that index.
        present (sequence of `str`, *optional*): those of `names` that are wanted, as the others have no image. What
            `mapping` says of the others is left aside; labels and places are those among all `names`.
        owner (`str`): whose classes these are, for errors: "generator", "real images", or that of a network which
            takes no `mapping`, such as "classifier".

    Returns:
        `list[int]`: for each of `names` (or of `present`) a class in [0, num_classes).

    Raises:
        ValueError: if a class cannot be found or is ambiguous; all such classes are listed with the nearest names.
        FileNotFoundError: if `mapping` is a path and no file is there.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()) or names is None:
        raise ValueError(f"`names` must be a list of class names, got {names!r}.")
    if id2label is not None and not isinstance(id2label, Mapping):
        raise ValueError(f"`id2label` must be a dict of class to name, such as {{0: 'cat'}}, got {id2label!r}.")
    num_classes = check_whole("num_classes", num_classes, 1)
    if unknown := [name for name in present or () if name not in names]:
        raise ValueError(f"`present` holds {unknown[0]!r}, which is none of the classes.{nearest(unknown[0], names)}")
    if own_labels is not None and len(own_labels) != len(names):
        raise ValueError(f"`own_labels` must hold one number for each of {len(names)} classes, got {len(own_labels)}.")
    lookup = ClassLookup(id2label, num_classes)
    wanted = set(names if present is None else present)
    told = read_mapping(mapping, names, lookup, wanted)
    unnamed = _of_unnamed(names, lookup, own_labels)
    if own_labels is None and len(names) == num_classes:
        own_labels = range(num_classes)  # the same label set on both sides settles names that occur twice
    resolved: list[int] = []
    problems: list[str] = []
    for label, name in enumerate(names):
        if name not in wanted:
            continue
        found = lookup.find(told[name]) if name in told else lookup.find(name) or unnamed[label]
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
            f"{len(problems)} of {len(wanted)} dataset classes have no certain match among the {num_classes} "
            f"classes of the {owner}: {'; '.join(problems)}. {_advice(names, num_classes, owner)}"
        )
    _refuse_shared_classes([name for name in names if name in wanted], resolved, told, owner)
    return resolved


def _of_unnamed(names: Sequence[str], lookup: ClassLookup, own_labels: Sequence[int] | None) -> list[set[int]]:
    """For each class what its number or its place says, where one of the two sides has no names."""
    numbers = [number_of(name) for name in names]
    places = list(range(len(names)) if own_labels is None else own_labels)
    if sorted(places) != list(range(lookup.num_classes)):  # some of the classes: a number must agree with its place
        agree = own_labels is not None and lookup.is_generic and places == numbers
        return [{place} if agree else set() for place in places]
    if lookup.is_generic:
        return [{place if number is None else number} for place, number in zip(places, numbers, strict=True)]
    agree = places == numbers and not lookup.has_numbers
    return [{place} if agree else set() for place in places]


def _advice(names: Sequence[str], num_classes: int, owner: str) -> str:
    """What to do about classes without a match."""
    if owner == "real images":
        return (
            'Say which is which with --datasets_classes: "index" if label i is class number i there, or a YAML file '
            "of {name of the class: its name or number there}."
        )
    if owner != "generator":
        return f"If the {owner} knows them by other names, give it these: its `config.id2label`."
    advice = "Pass `mapping={dataset class name: generator class}`, with indices, names or WordNet ids."
    numbers = numbers_of(names)
    if numbers and len(set(numbers)) == len(numbers):
        if max(numbers) < num_classes:
            advice += ' If the numbers are the generator\'s indices: `mapping="number"`.'
        if len(names) <= num_classes:
            advice += ' If label i is the generator\'s class i: `mapping="index"`.'
    return advice


def first_synonym(name: str) -> str:
    """The first name of a class that is told as ImageNet does, "tench, Tinca tinca" or "n01440764"; others stay."""
    wnid, rest = _split_wnid(name)
    parts, known = _parts(rest), _imagenet_classes(name)
    if len(known) != 1:
        return name
    row = label_set("imagenet-1k")[known.pop()]
    names = {folded(one) for one in row.names}
    if folded(name) == row.wnid:
        return row.names[0]
    return parts[0] if (wnid or len(parts) > 1) and all(folded(part) in names for part in parts) else name


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
        numbers = {index: number_of(label) for index, label in self.id2label.items()}
        self.is_generic = all(index == number for index, number in numbers.items())
        self.has_numbers = any(number is not None for number in numbers.values())
        self._names = _synonyms({index: (label, *_parts(label)) for index, label in self.id2label.items()})
        self._whole = _synonyms({index: (label,) for index, label in self.id2label.items()})

    def find(self, name: int | str) -> set[int]:
        """Every class that a name, a WordNet id or an index may mean; an index is passed on as it is."""
        if not isinstance(name, str):
            return {check_whole("class", name)}
        wnid, rest = _split_wnid(name)
        if wnid and rest and folded(name) not in self._names:
            by_id, by_name = self.find(wnid), self.find(rest)
            return (by_id & by_name) or by_id | by_name if by_id else set()
        found = _by_any_synonym(name, self._names)
        if len(found) > 1 and found == self._whole.get(folded(name)):  # "a" and "A": as it is written, if it is
            found = {index for index in found if canonical(self.id2label[index]) == canonical(name)} or found
        return found or {
            index for imagenet in _imagenet_classes(name) for index in self._of_imagenet.get(imagenet, ())
        }

    def find_typed(self, text: str) -> set[int]:
        """Like `find` for what a user typed, where a number is an index unless classes are named by numbers."""
        is_index = text.isdecimal() and (self.is_generic or not self.has_numbers)
        return self.find(text) or ({int(text)} if is_index else set())

    def describe(self, classes: Iterable[int]) -> str:
        """Classes by index, name and WordNet id, to choose from."""
        wnids = {index: label_set("imagenet-1k")[i].wnid for i, mine in self._of_imagenet.items() for index in mine}
        return ", ".join(
            f"{index} {self.id2label.get(index, '')!r}{f' ({wnids[index]})' if index in wnids else ''}"
            for index in sorted(classes)
        )

    def nearest(self, name: str) -> str:
        """The names most like `name`, as the end of a clause of an error; empty if there are none."""
        return nearest(name, [part for label in self.id2label.values() for part in _parts(label)]).rstrip(".")

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


def read_mapping(
    mapping: Mapped, names: Sequence[str], lookup: ClassLookup, wanted: Container[str]
) -> dict[str, int | str]:
    """Any form of a `mapping` argument as a dict from dataset class name to generator class, see [`class_mapping`]."""
    if mapping is None:
        return {}
    if isinstance(mapping, str) and mapping == "index":
        return {name: label for label, name in enumerate(names)}
    if isinstance(mapping, str) and mapping == "number":
        found = {name: number_of(name) for name in names if name in wanted}
        if words := [name for name, number in found.items() if number is None]:
            raise ValueError(f'`mapping="number"` takes names that are numbers, and these are none: {words[:10]}.')
        return found  # type: ignore[return-value]
    if isinstance(mapping, str) and not mapping.lower().endswith((".yaml", ".yml", ".json")):
        return _told_by_label_set(mapping, names, lookup, wanted)
    where = "`mapping`"
    if isinstance(mapping, str | Path):
        where = f"The file {mapping}"
    mapping = plain(_read_file(Path(mapping)) if isinstance(mapping, str | Path) else mapping)  # of NumPy or pandas
    if isinstance(mapping, Sequence):
        if len(mapping) != len(names):
            raise ValueError(
                f"{where} lists {len(mapping)} classes, the dataset has {len(names)}: one for each label."
            )
        mapping = dict(zip(names, mapping, strict=True))
    if not isinstance(mapping, Mapping) or not all(map(_is_class, [*mapping, *mapping.values()])):
        raise ValueError(
            f"{where} must give a generator class (index, name or WordNet id) for dataset class names, for example "
            f"`{{{names[0] if names else 'cat'!r}: 281}}`; got {str(mapping)[:200]}."
        )
    keys = [str(key) for key in mapping]
    places = find_classes(keys, names)
    unknown = [key for key, place in zip(keys, places, strict=True) if place is None]
    if unknown:
        raise ValueError(f"{where} names {unknown}, which the dataset has not.{nearest(unknown[0], names)}")
    if len(set(places)) < len(places):
        raise ValueError(f"{where} names a class of the dataset twice: {keys}.")
    return {names[place]: value for place, value in zip(places, mapping.values(), strict=True) if place is not None}


def _read_file(path: Path) -> object:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.*")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"There is no mapping file {path}.{nearest(path.name, siblings)}")
    entries = read_entries(path, "mapping file")
    if isinstance(entries, dict):
        return {key: _as_class(entry) for key, entry in entries.items()}
    return [_as_class(entry) for entry in entries] if isinstance(entries, list) else entries


def _as_class(entry: Entry) -> object:
    """A class as a file writes it: a plain decimal number is an index, anything else a name, `no` and `012` too."""
    if entry.text is None or (entry.text in ("", "~") and entry.value is None):
        return entry.value
    return int(entry.text) if re.fullmatch(r"-?(0|[1-9][0-9]*)", entry.text) else entry.text


def _told_by_label_set(
    preset: str, names: Sequence[str], lookup: ClassLookup, wanted: Container[str]
) -> dict[str, int | str]:
    """Class by class what a label set says; a class that the generator knows by its own name keeps that."""
    classes = label_set(preset)
    numbers = numbers_of(names)
    if numbers is not None and sorted(numbers) == list(range(len(classes))):
        return {name: classes[number].wnid for name, number in zip(names, numbers, strict=True)}
    imagenet = {row.wnid: row.names for row in label_set("imagenet-1k")}
    members = [(row.wnid, *row.names, *imagenet[row.wnid], ", ".join(imagenet[row.wnid])) for row in classes]
    known = _synonyms(dict(enumerate(members)))
    told: dict[str, int | str] = {}
    problems = []
    for label, name in enumerate(names):
        if name not in wanted:
            continue
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


def _is_class(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _refuse_shared_classes(names: Sequence[str], resolved: list[int], told: Mapping[str, Any], owner: str) -> None:
    users = defaultdict(list)
    for name, choice in zip(names, resolved, strict=True):
        users[choice].append(name)
    for choice, sharing in users.items():
        if len(sharing) > 1 and not set(sharing) <= set(told):
            fix = "If that is what you want, name each of them in `mapping`."
            if owner != "generator":
                fix = f"Give each class a name of its own, in the dataset and in the {owner}'s `config.id2label`."
            written = sharing if all(map(str.isascii, sharing)) else [ascii(name) for name in sharing]
            verb = "drawn from" if owner == "generator" else "taken for"
            raise ValueError(f"Classes {written} would all be {verb} class {choice} of the {owner}. {fix}")


def _synonyms(names: Mapping[int, Iterable[str]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for index, synonyms in names.items():
        for synonym in synonyms:
            found[folded(synonym)].add(index)
    return dict(found)


def _parts(name: str) -> list[str]:
    """Comma-separated synonyms; the comma of "1,000" separates none."""
    return [part.strip() for part in re.split(r",(?!\d)", name) if part.strip()]


def _split_wnid(name: str) -> tuple[str, str]:
    """WordNet id and name of "n01440764-tench", as folders are often called; ("", name) for others."""
    found = re.fullmatch(r"\s*(n\d{8})[\s_\-:.,]+(\S.*)", name, flags=re.IGNORECASE | re.DOTALL)
    return (found[1], found[2]) if found else ("", name)


def _by_any_synonym(name: str, synonyms: Mapping[str, set[int]]) -> set[int]:
    whole = synonyms.get(folded(name), set())
    return whole or set().union(*(synonyms.get(folded(part), set()) for part in _parts(name)))


@functools.cache
def _imagenet_synonyms() -> dict[str, set[int]]:
    return _synonyms(
        {i: (row.wnid, *row.names, ", ".join(row.names)) for i, row in enumerate(label_set("imagenet-1k"))}
    )


def _imagenet_classes(name: str) -> set[int]:
    """Indices in ImageNet-1k of the classes that a name or WordNet id may mean."""
    wnid, rest = _split_wnid(name)
    return set(_by_any_synonym(wnid or rest, _imagenet_synonyms()))


def counted_in_class(ids: Sequence[int]) -> list[int]:
    """Which image of its class each is, counted from 0: `[4, 2, 4]` → `[0, 0, 1]`."""
    seen: Counter[int] = Counter()
    found = []
    for one in ids:
        found.append(seen[one])
        seen[one] += 1
    return found
