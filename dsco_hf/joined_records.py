"""What a set carries of how it was drawn, joined with what its maker adds; what contradicts it is refused.

From here on records go by config: `{config: all that is recorded of it}`, see `dsco_hf.config_records`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from .config_records import by_config, to_json
from .digests import targets_sha256
from .schema import nearest
from .set_records import PARTS, changed_since, more_exact, named_source, record_of, targets_record, without_paths
from .targets import MatchingTargets


TargetsLike = MatchingTargets | Mapping[str, MatchingTargets] | None
Records = dict[str, dict[str, Any]]

MODELS = ("generator", *PARTS)


def joined_records(configs: Mapping[str, Mapping[str, Dataset]], given: Mapping[str, Any] | None) -> Records:
    """All that is known of how each config was made: what its rows carry, and what is given beside.

    Rows that were changed, added or left out since they were drawn are said to be so, whoever told how they were.

    Args:
        configs: the datasets by config and split.
        given: content of `concentration.json`, or a part of it.

    Raises:
        ValueError: if what is given contradicts what a set says itself, naming both; or is of a config that is not
            there.
    """
    told = by_config(given or {}, configs)
    return {name: _joined_record(name, splits, told[name]) for name, splits in configs.items()}


def _joined_record(name: str, splits: Mapping[str, Dataset], told: Mapping[str, Any]) -> dict[str, Any]:
    carried = {split: found for split, rows in splits.items() if (found := _carried(rows)) is not None}
    first = next(iter(splits))
    own = carried.pop(first, {})
    if isinstance(source := told.get("source"), Mapping):
        told = {**told, "source": named_source((own.get("source") or {}).get("dataset"), source)}
    record = _join(own, without_paths(told), f"Config {name!r}", "")
    if changed := changed_since(record, splits[first]):
        record["changed"] = changed
    others = {}
    for split, other in carried.items():
        if _without_rows(other) != _without_rows(own):
            changed = changed_since(other, splits[split])
            others[split] = {**other, "changed": changed} if changed else other
    return {**record, "other_splits": others} if others else record


def _carried(dataset: Dataset) -> dict[str, Any] | None:
    record = record_of(dataset)
    return None if record is None else json.loads(to_json(without_paths(record)))


def _without_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("synthetic", "doped", "cost", "changed")}


def _join(own: Mapping[str, Any], told: Mapping[str, Any], what: str, path: str) -> dict[str, Any]:
    """Both mappings in one, the carried one first; ValueError where they contradict each other."""
    joined = dict(own)
    if path in MODELS and told.get("id") and "id" not in own:  # a folder that was published since
        joined.pop("folder", None)
    for key, there in told.items():
        here, place = own.get(key), f"{path}.{key}" if path else str(key)
        if here is None:
            if not (path in MODELS and key == "folder" and own.get("id")):
                joined[key] = there
        elif there is None or here == there or place in ("parameters.class_labels", "changed"):
            continue  # classes are told by name or by id
        elif isinstance(here, Mapping) and isinstance(there, Mapping):
            joined[key] = _join(here, there, what, place)
        elif more_exact(place, here, there):
            joined[key] = there
        elif not more_exact(place, there, here):
            raise ValueError(
                f"{what} says itself that it was drawn with {place}={here!r}, the given record says {there!r}: leave "
                f"{place!r} out of `concentration`, and what the set says is recorded."
            )
    return joined


def with_targets(
    records: Records, targets: TargetsLike, folder: Path, *, class_names: Mapping[str, Sequence[str]]
) -> Records:
    """Stores targets below `folder/targets`, by their content, and returns the records with their place.

    Args:
        records: of all configs.
        targets: what the sets were drawn for; one for all configs, or by config.
        folder: of the dataset.
        class_names: of each config.

    Raises:
        ValueError: If they are given for a config that is not published, or are not those that it was drawn for.
    """
    if targets is None:
        return records
    by_name = dict.fromkeys(records, targets) if isinstance(targets, MatchingTargets) else dict(targets)
    if unknown := sorted(set(by_name) - set(records)):
        raise ValueError(
            f"There are targets for a config {unknown[0]!r}, but the configs are {list(records)}."
            f"{nearest(unknown[0], records)}"
        )
    found, stored = dict(records), dict[int, dict[str, Any]]()
    for name, own in by_name.items():
        _check_targets(name, records, own, class_names[name])
        place = stored.get(id(own)) or _store_targets(own, folder)
        stored[id(own)] = place
        found[name] = {**records[name], "targets": {**(records[name].get("targets") or {}), **place}}
    return found


def _check_targets(name: str, records: Records, targets: MatchingTargets, names: Sequence[str]) -> None:
    record = records[name]
    recorded = record.get("targets")
    given = f"those given have the SHA-256 {targets_sha256(targets)[:12]}… ({_population(targets.provenance)})"
    if isinstance(recorded, Mapping) and recorded.get("sha256") not in (None, targets_sha256(targets)):
        raise ValueError(
            f"Config {name!r} was drawn for targets with the SHA-256 {str(recorded['sha256'])[:12]}… "
            f"({_population(recorded)}), {given}: pass the targets that it was drawn for, or leave `targets` out."
        )
    if isinstance(recorded, Mapping) and recorded.get("kind"):
        raise ValueError(f"Config {name!r} was drawn for {recorded['kind']}, {given}: leave `targets` out.")
    if recorded is None and "parameters" in record and "synthetic" in record:
        others = [other for other, one in records.items() if one.get("targets")]
        advice = f"`targets={{name: targets for name in {others}}}`" if others else "leave `targets` out"
        raise ValueError(f"Config {name!r} was drawn without targets ({record.get('method', 'plain')}): {advice}.")
    if missing := [one for one in names if one not in targets.class_names]:
        raise ValueError(
            f"The targets for config {name!r} are of other classes: they have {targets.class_names[:10]}, but not "
            f"{missing[0]!r}.{nearest(missing[0], targets.class_names)} Pass the targets that it was drawn for, or "
            "leave `targets` out."
        )


def _population(provenance: Mapping[str, Any]) -> str:
    name = provenance.get("dataset") or provenance.get("generator") or "of no recorded data"
    number = provenance.get("images")
    return f"{name}, {number} images" if number is not None else str(name)


def _store_targets(targets: MatchingTargets, folder: Path) -> dict[str, Any]:
    record = targets_record(targets)
    path = f"targets/{record['sha256'][:12]}"
    targets.save_pretrained(folder / path)
    return json.loads(to_json({**record, "path": path}))
