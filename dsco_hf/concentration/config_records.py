"""The records of a dataset's configs: of each all that is known, and written down once where it holds for all."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..data.schema import nearest
from ..matching.objectives import Objective
from ..sampling.call import Plain, SamplingMethod
from ..sampling.flat import from_flat
from ..sampling.methods.nopt import NOISE
from ..utils.markdown import Trusted, escape_id, escape_markdown, format_number, parameter_rows
from .methods import find_method
from .selection import Selection


MARK = "dsco_hf"  # under which a record stands in the description of a dataset
ABOUT_FILES = ("features", "splits")  # what an entry of `configs` says of its files
ABOUT_ALL = ("format_version", "default_config", "card", "configs")  # what says nothing of how rows were made


def to_json(values: object) -> str:
    """Writes JSON that any reader accepts: NaN and infinity are null, numbers of NumPy and torch plain, paths text."""

    def plain(value: object) -> object:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
        if isinstance(value, np.ndarray | np.generic | torch.Tensor):
            return plain(value.tolist())
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if value is None or isinstance(value, bool | int | float):
            return value
        text = str(value)
        if re.search(r" at 0x[0-9a-fA-F]+>", text):
            raise TypeError(f"{text} cannot be recorded: give numbers, text, lists or dicts.")
        return text.encode("utf-8", "replace").decode()  # without lone surrogates, which no file can hold

    return json.dumps(plain(values), indent=2, ensure_ascii=False) + "\n"


def recorded_only(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of how a config was made, without the description of its files."""
    return {key: value for key, value in entry.items() if key not in ABOUT_FILES}


def by_config(record: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """All that is recorded of each config: the records of the whole dataset, and over them the config's own.

    Raises:
        ValueError: for a record of a config that is not among `names`.
    """
    entries = record.get("configs") or {}
    names = list(entries) if names is None else list(names)
    if unknown := [name for name in entries if name not in names]:
        raise ValueError(
            f"There is a record of a config {unknown[0]!r}, but the configs are {names}."
            f"{nearest(str(unknown[0]), names)} Call it as the config is called, or leave it out."
        )
    common = json.loads(to_json({key: value for key, value in record.items() if key not in ABOUT_ALL}))
    own = {name: json.loads(to_json(recorded_only(entries.get(name) or {}))) for name in names}
    return {name: {**common, **own[name]} for name in names}


def laid_out(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The records of all configs with what is the same in all of them written once, beside `configs`.

    So `by_config` gives them back, and no config inherits what was never recorded of it.
    """
    first, nothing = next(iter(records.values()), {}), object()
    common = {k: v for k, v in first.items() if all(one.get(k, nothing) == v for one in records.values())}
    own = {name: {key: v for key, v in one.items() if key not in common} for name, one in records.items()}
    return {**common, "configs": own}


def shared(values: Iterable[Any]) -> Any:
    """What several values have in common: all of it if they are equal, of mappings the entries that are, else None."""
    first, *others = list(values) or [None]
    if all(value == first for value in others):
        return first
    if not all(isinstance(value, Mapping) for value in (first, *others)):
        return None
    found = {key: shared([value, *(other[key] for other in others)]) for key, value in first.items()
             if all(key in other for other in others)}  # fmt: skip
    return {key: value for key, value in found.items() if value is not None} or None


def as_description(record: Mapping[str, Any]) -> str:
    """A record as the description of a dataset, in which it travels. Files of a repository do not travel with it."""
    kept = dict(record)
    if isinstance(targets := kept.get("targets"), Mapping):
        kept["targets"] = {key: value for key, value in targets.items() if key != "path"}
    return json.dumps({MARK: kept}, ensure_ascii=False)


# What cards tell of how images were made.

_PAPER = "[arXiv 2603.27987](https://arxiv.org/abs/2603.27987)"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PARTS = {
    "source": "source data",
    "generator": "generator",
    "classifier": "classifier",
    "classifier_2": "second classifier",
    "preview_vae": "preview decoder",
    "prompts": "prompts",
    "targets": "targets",
    "environment": "computed on",
    "doping": "doping",
    "generator_check": "plain samples",
    "discrepancy": "discrepancy",
    "soft_labels": "soft labels",
    "learned_labels": "learned labels",
}
_UNTOLD = ("license", "names", "by class", "random by class")  # what cards tell elsewhere, or not at all
_BY_CLASS = ("class_names", "texts")  # one row each
MOST = 100  # classes whose prompts a card tells
NOT_RECORDED = "How its images were made is not recorded."


def how_made(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What was really done, by the records of the configs: one sentence for each way in which images were made."""
    sentences = list(dict.fromkeys(text for record in records.values() for text in what_was_done(record)))
    known = any(_drawn(record) for record in records.values())
    return " ".join([*sentences] if known else [NOT_RECORDED, *sentences]) + f" Written with `dsco_hf` ({_PAPER})."


def what_was_done(record: Mapping[str, Any]) -> list[str]:
    """How the images of one config were made, in up to two sentences; none for what is not recorded."""
    doping = value if isinstance(value := record.get("doping"), Mapping) else {}
    rule = doping.get("strategy")
    name = rule.get("name") if isinstance(rule, Mapping) else rule  # a text in records of version 0.1
    other = f"Real images were added by the rule {escape_markdown(str(name))}." if name else ""
    added = getattr(Selection.kinds.get(str(name)), "sentence", "") or other
    return [text for text in (_drawn(record), added) if text]


def _drawn(record: Mapping[str, Any]) -> str:
    """What the method of a record did; of one that is not of this package only that it steered the sampling."""
    label, parameters = str(record.get("method") or ""), record.get("parameters")
    if label.startswith("plain"):
        return Plain.sentence
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # written by hand, or by another version
        recorded = from_flat(parameters if isinstance(parameters, Mapping) else {}).get("method", {})
        if isinstance(recorded, SamplingMethod):
            return recorded.sentence
        if ":" in str(recorded.get("name")):  # somebody's own, which need not be imported
            return SamplingMethod.sentence
        if ":" not in str(recorded.get("objective", {}).get("name")):
            return SamplingMethod.of(recorded).sentence
    return f"{NOISE} {Objective.sentence}" if label.startswith("nopt") else ""


def what_labels_are(record: Mapping[str, Any]) -> dict[str, Trusted]:
    """A sentence on each of the label columns that a record tells of, by the name of its entry."""
    found = {}
    if isinstance(soft := record.get("soft_labels"), Mapping):
        views, seen = _short(soft.get("views")), escape_id(_short(soft.get("augmentation")))
        text = f"The teacher is {escape_id(soft.get('id') or soft.get('folder') or 'a network without a name')}, at "
        text += f"temperature {escape_id(_short(soft.get('temperature')))}, "
        text += "asked once" if views == 1 else f"mean over {escape_id(views)} views of each image ({seen})"
        kept = soft.get("top_k")
        found["soft_labels"] = Trusted(f"{text}; {escape_id(kept)} classes are kept." if kept else f"{text}.")
    if isinstance(learned := record.get("learned_labels"), Mapping):
        strength = escape_id(_short(learned.get("regularization")))
        text = f"A ridge regression (λ = {strength}) learns most of the targets' population from these labels."
        found["learned_labels"] = Trusted(text)
    return found


def method_label(record: Mapping[str, Any]) -> str:
    """What tables call the way in which a config was made."""
    method = str(record.get("method") or "")
    return find_method(method).label if method else "–"


def can_be_remade(record: Mapping[str, Any]) -> bool:
    """Whether the records of a config name all that others need: a repository, targets, and parameters."""
    generator, targets = record.get("generator"), record.get("targets")
    published = isinstance(generator, Mapping) and REPOSITORY.fullmatch(str(generator.get("id")))
    matched = not targets or isinstance(targets, Mapping) and ("path" in targets or "id" in targets)
    return bool(published and matched and isinstance(record.get("parameters"), Mapping))


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("method", record.get("method")), ("seed", record.get("seed")), ("since then", record.get("changed"))]
    for key, title in PARTS.items():
        entry = record.get(key)
        if isinstance(entry, Mapping):
            main = "dataset" if key == "source" else "id"
            rows.append((title, entry.get(main)))
            told = (main, *_UNTOLD, *(_BY_CLASS if "texts" in entry else ()))
            rows += [(f"{title}: {k}", _short(v)) for k, v in entry.items() if k not in told]
            rows += _texts(title, *(entry.get(k) for k in _BY_CLASS))
    versions = record.get("versions")
    if isinstance(versions, Mapping):
        rows.append(("made with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [(Trusted(escape_markdown(k)), Trusted(escape_id(v))) for k, v in rows if v is not None]


def _texts(title: str, names: object, texts: object) -> list[tuple[str, str]]:
    """What is said of each class, for a table; of many classes the first."""
    told = list(zip(names, texts, strict=False)) if isinstance(names, list) and isinstance(texts, list) else []
    texts = ["; ".join(map(str, text)) if isinstance(text, list) else str(text) for _, text in told[:MOST]]
    rows = [(f"{title}: {name}", text) for (name, _), text in zip(told, texts, strict=False)]
    return [*rows, (f"{title}: …", f"{len(told) - MOST} more, in the records")] if len(told) > MOST else rows


def _short(value: object) -> object:
    """What a card has room for, as all of it is in the records.

    Of something that has a name and many fields its name; of numbers by class the five least.
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and one.get("name") for one in value):
        return ", ".join(str(one["name"]) for one in value)
    if not isinstance(value, Mapping):
        return value
    if value and all(isinstance(number, int | float) for number in value.values()):
        least = sorted(value.items(), key=lambda item: item[1])
        more = f", … ({len(least) - 5} more)" if len(least) > 5 else ""
        return ", ".join(f"{str(name)[:20]} {number:.3g}" for name, number in least[:5]) + more
    return value.get("name") or value


def ways(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How the configs were made, for a card: what is the same for all of them, and of each, by its name, its own."""
    tables: dict[str, dict[str, list[tuple[str, str]]]] = {
        "provenance": {name: _provenance(record) for name, record in records.items()},
        "parameters": {name: parameter_rows(record.get("parameters")) for name, record in records.items()},
        "cost": {name: cost_rows(record.get("cost")) for name, record in records.items()},
    }
    common = {kind: [row for row in next(iter(found.values())) if all(row in other for other in found.values())]
              for kind, found in tables.items()}  # fmt: skip
    own = []
    for name, record in records.items():
        parts = {kind: [row for row in found[name] if row not in common[kind]] for kind, found in tables.items()}
        sentence = " ".join(what_was_done(record)) or NOT_RECORDED
        own.append({"config": Trusted(name), "sentence": Trusted(sentence), **parts})
    differ = any(way[kind] for way in own for kind in tables)
    return {**common, "own_ways": own if differ else []}


def cost_rows(cost: object, prefix: str = "") -> list[tuple[str, str]]:
    """What a recorded cost is made of, for a table: names and numbers, as text that is not escaped."""
    rows: list[tuple[str, str]] = []
    for key, value in cost.items() if isinstance(cost, Mapping) else ():
        if isinstance(value, Mapping):
            rows += cost_rows(value, f"{key}: ")
            continue
        number = format_number(value, digits=1)
        if key.endswith("_bytes") and isinstance(value, int):
            key, number = key.removesuffix("_bytes"), f"{value / 2**20:,.0f} MiB"
        rows.append((f"{prefix}{key.replace('_', ' ')}", number if number != "–" else str(value)))
    return rows
