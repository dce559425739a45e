"""What a caller says of a dataset that is published: checked before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..matching.targets import MatchingTargets
from ..utils.names import nearest
from ..utils.values import check_choice, check_real, check_whole
from .cards import USES, DatasetCardFields


PARTS = ("parameters", "source", "generator", "classifier", "classifier_2", "preview_vae", "prompts", "targets",
         "cost", "doping", "versions", "environment", "synthetic", "soft_labels", "learned_labels")  # fmt: skip
COUNTS = ("images_per_class", "images", "synthesis_seeds", "training_seeds", "seeds")
# that the mean is a fraction the card says itself
LEAST = {"accuracy_mean": -math.inf, "accuracy_std": 0, "discrepancy": 0, "seconds": 0}


def check_given(
    names: Sequence[str],
    *,
    concentration: object = None,
    results: object = None,
    targets: object = None,
    card: object = None,
    figures: object = (),
) -> None:
    """Refuses by name what `save_dataset_folder` and `publish` cannot take, see there; `names` are of the configs.

    Raises:
        TypeError: for something of another kind than is asked for.
        ValueError: for an entry that cannot be, such as a fingerprint that is none, or an unknown config.
    """
    if card is not None and not isinstance(card, DatasetCardFields):
        raise TypeError(f"`card` must be `DatasetCardFields(pretty_name=..., ...)`, got a {type(card).__name__}.")
    if card is not None and card.use is not None:
        check_choice("card.use", card.use, tuple(USES))
    if isinstance(figures, str | Path) or not isinstance(figures, Sequence):
        raise TypeError(f"`figures` must be a list of paths, got {figures!r}.")
    for own in targets.values() if isinstance(targets, Mapping) else [targets]:
        if own is not None and not isinstance(own, MatchingTargets):
            raise TypeError(
                f"`targets` must be `MatchingTargets`, or a dict of them by config, got {str(own)[:60]!r} of type "
                f"{type(own).__name__}. `MatchingTargets.from_pretrained(folder)` reads those in a folder."
            )
    for name, entry in _check_record("concentration", {} if concentration is None else concentration).items():
        if name not in names:
            raise ValueError(
                f"`concentration` tells of a config {name!r}, but the configs are {list(names)}."
                f"{nearest(str(name), names)}"
            )
        _check_record(f"concentration['configs'][{name!r}]", entry)
    if results is not None:
        _check_results(results)


def _check_record(what: str, given: object) -> Mapping[str, Any]:
    """Checks what is recorded of the whole dataset or of a config; returns the records of its configs."""
    record = _mapping(what, given)
    for key in record:
        if not isinstance(key, str):
            raise TypeError(f"The keys of `{what}` must be text, got {key!r}.")
    if not isinstance(record.get("method"), str | None):
        raise TypeError(f"`{what}['method']` must be text such as 'nopt', got {record['method']!r}.")
    if record.get("seed") is not None:
        check_whole(f"{what}['seed']", record["seed"])
    for part in PARTS:
        if record.get(part) is not None:
            _check_hashes(f"{what}[{part!r}]", _mapping(f"{what}[{part!r}]", record[part]))
    return _mapping(f"{what}['configs']", record.get("configs") or {})


def _check_hashes(what: str, entry: Mapping[str, Any]) -> None:
    for key, value in entry.items():
        if isinstance(value, Mapping):
            _check_hashes(f"{what}[{key!r}]", value)
        elif str(key).endswith("sha256") and value is not None:
            if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
                raise ValueError(f"`{what}[{key!r}]` must be a SHA-256, 64 digits 0-9 and a-f, got {value!r}.")


def _check_results(given: object) -> None:
    results = _mapping("results", given)
    rows = results.get("rows") or []
    if not isinstance(rows, list | tuple):
        raise TypeError(f"`results['rows']` must be a list of rows, got {rows!r}.")
    entries = {f"results['rows'][{place}]": row for place, row in enumerate(rows)}
    if results.get("full") is not None:
        entries["results['full']"] = results["full"]
    for what, row in entries.items():
        if "rows" in what and not isinstance(_mapping(what, row).get("method"), str):
            raise TypeError(f"`{what}['method']` must be text such as 'nopt', got {row.get('method')!r}.")
        for key, least in LEAST.items():
            if _mapping(what, row).get(key) is not None:
                check_real(f"{what}[{key!r}]", row[key], least)
        for key in COUNTS:
            if isinstance(row.get(key), str | bool):
                raise TypeError(f"`{what}[{key!r}]` must be a number, got {row[key]!r}.")


def _mapping(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"`{what}` must be a dict, got {value!r}.")
    return value
