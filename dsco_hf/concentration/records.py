"""How a concentrated dataset was made, in full: what `concentration.json` records, and how to read it back.

Parameters are recorded with their defaults, models by repository and commit, targets by their content, so that the
record alone says how to run it again, also after a default has changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline

from ..data.schema import nearest
from ..matching.targets import MatchingTargets
from ..sampling.call import Sampling
from ..sampling.flat import FLAT, from_flat
from ..utils.origins import targets_sha256
from ..utils.values import plain
from .concentrate import BLOCK_SIZE, COSTS, IMAGES_PER_CALL, ConcentrationReport
from .config_records import by_config, to_json
from .set_records import PARTS as PARTS
from .set_records import cached_origin as cached_origin
from .set_records import (
    changed_since,
    drawn_record,
    more_exact,
    named_source,
    record_of,
    without_lost_labels,
    without_paths,
)
from .set_records import library_versions as library_versions
from .set_records import targets_record as targets_record


# Arguments of `concentrate` that shape the images, beside those of `Sampling`.
RUN_OPTIONS = {"images_per_class": None, "class_labels": None, "block_size": BLOCK_SIZE,
               "images_per_call": IMAGES_PER_CALL}  # fmt: skip
# Arguments that are recorded elsewhere, or say nothing about the images.
_NOT_RECORDED = {"seed", "progress", "measure_by"}


def resolve_parameters(**given: object) -> dict[str, Any]:
    """Fills in the defaults of all parameters that are not given; as plain JSON values.

    What says nothing about the images (`progress`, ...) is left out.

    Raises:
        TypeError: for an argument that `concentrate_and_report` does not have.
    """
    if given.get("images_per_class") is None:
        raise TypeError("`images_per_class` is missing: it has no default.")
    run = {name: given.get(name, default) for name, default in RUN_OPTIONS.items()}
    sampling = Sampling.of(**{k: v for k, v in given.items() if k not in {*RUN_OPTIONS, *_NOT_RECORDED}})
    return plain(run) | sampling.as_record()


def record_parameters(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded parameters as arguments of `concentrate`: `concentrate(pipe, targets, seed=..., **parameters)`.

    Returns:
        `dict`: `images_per_class`, `class_labels`, `block_size`, `images_per_call`, and as `method` a [`Sampling`].

    Raises:
        ValueError: if something is recorded that this version does not know, or nothing is.
    """
    recorded = record.get("parameters")
    if not isinstance(recorded, Mapping) or not recorded.get("images_per_class"):
        raise ValueError(
            "The record has no parameters of a concentration: the dataset was not made by `concentrate`, or its maker "
            "did not record it (`concentration_record`)."
        )
    recorded = from_flat({"num_inference_steps": 50, **recorded})  # what it was when records could leave it out
    known = [*RUN_OPTIONS, *(field.name for field in dataclasses.fields(Sampling))]
    if unknown := [name for name in recorded if name not in known]:
        raise ValueError(
            f"The record has a parameter that this version of dsco_hf does not know: {unknown[0]!r}."
            f"{nearest(unknown[0], [*known, *FLAT])} It was made with dsco_hf "
            f"{(record.get('versions') or {}).get('dsco_hf', 'of unknown version')}."
        )
    run = {name: value for name, value in recorded.items() if name in RUN_OPTIONS}
    return {**run, "method": Sampling(**{name: value for name, value in recorded.items() if name not in run})}


def config_record(record: Mapping[str, Any], config: str | None = None) -> dict[str, Any]:
    """What is recorded of one config: the records of the whole dataset, and over them the config's own.

    Args:
        record: content of `concentration.json`.
        config: name of the config; the default one if None.

    Raises:
        ValueError: if there is no such config.
    """
    configs = by_config(record)
    name = config or record.get("default_config") or next(iter(configs), None)
    if name not in configs:
        raise ValueError(f"There is no config {name!r}; there are {list(configs)}.{nearest(str(name), configs)}")
    return {**configs[str(name)], "config": name}


def concentration_record(
    pipe: DiffusionPipeline,
    targets: MatchingTargets | None = None,
    report: ConcentrationReport | None = None,
    *,
    method: str,
    seed: int,
    parameters: Mapping[str, Any],
    source: Mapping[str, Any] | None = None,
    generator_revision: str | None = None,
    targets_id: str | None = None,
    targets_revision: str | None = None,
) -> dict[str, Any]:
    """Records how a dataset was made, for the `concentration` argument of `publish` and `save_dataset_folder`.

    Args:
        pipe: The pipeline that drew the images; models that were loaded from the Hub are recorded with their commit.
        targets: What they were matched to; their own record is taken over.
        report: The `ConcentrationReport` of the run, for its cost.
        method: As in `results.json`: `"nopt"`, `"nopt-data-free"`, ...
        seed: Seed of the run.
        parameters: Further arguments of `concentrate`: `images_per_class`, `num_inference_steps`, ...; those left out
            are recorded with their defaults. Arguments of `dope` go under `"doping"`.
        source: What is known of the source data beyond the targets' record: `dataset` (its id), `config`, `revision`,
            `split`, `license`, `rows`, ...
        generator_revision: Commit that the pipeline was loaded from, where the models do not tell.
        targets_id: Model repository that holds the targets, if they are not published with the dataset.
        targets_revision: Its commit.

    Raises:
        TypeError: For a parameter that `concentrate` does not have.
        ValueError: If the targets are of another classifier than the pipeline's, or of other data than `source` says.
    """
    if isinstance(targets, MatchingTargets):
        targets.check_pipeline(pipe)
    parameters = dict(parameters)
    doping = parameters.pop("doping", None)
    cost = {name: value for name in COSTS if (value := getattr(report, name, None)) is not None}
    return drawn_record(
        pipe, targets, method=method, seed=seed, parameters=resolve_parameters(**parameters), doping=doping,
        source=source, generator_revision=generator_revision, cost=None if report is None else cost,
        targets_origin={"id": targets_id, "revision": targets_revision},
    )  # fmt: skip


TargetsLike = MatchingTargets | Mapping[str, MatchingTargets] | None
Records = dict[str, dict[str, Any]]

MODELS = ("generator", *PARTS)


def joined_records(configs: Mapping[str, Mapping[str, Dataset]], given: Mapping[str, Any] | None) -> Records:
    """All that is known of how each config was made: what its rows carry, and what is given beside.

    Rows that were changed, added or left out since they were drawn are said to be so, whoever told how they were.

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
    record = _join(own, without_lost_labels(without_paths(told), splits[first]), f"Config {name!r}", "")
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
