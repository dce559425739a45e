"""What a set was drawn with: a record that travels with the set, and names nothing of the machine it was made on."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, DatasetInfo, Features
from diffusers import DiffusionPipeline

from ..data.shards import embedded, rows_record, synthetic_rows
from ..matching.targets import MatchingTargets
from ..sampling.call import Targets
from ..sampling.methods import JointTargets
from ..sampling.peers import ClassStatistics
from ..utils.files import whole
from ..utils.origins import cached_origin as cached_origin
from ..utils.origins import commit_of, model_sha256, targets_sha256, versions
from ..utils.origins import published_origin as published_origin
from ..utils.values import plain
from .config_records import MARK, as_description


LIBRARIES = ("dsco_hf", "torch", "diffusers", "transformers", "datasets", "accelerate", "numpy")
# Components that are often added to a generator by hand, so that they have an origin of their own.
PARTS = ("classifier", "classifier_2", "preview_vae", "prompts")
# Columns of labels that were added, by what a record calls them.
LABELS = {"soft_labels": "soft_label", "learned_labels": "learned_label"}
# What datasets of files, or made in memory, are called: no name of their source.
_BUILDERS = {"imagefolder", "parquet", "arrow", "generator", "webdataset", "json", "csv", "text", "pandas", "default"}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the images depend on."""
    return versions(LIBRARIES)


def drawn_record(
    pipe: DiffusionPipeline,
    targets: Targets | None,
    *,
    method: str,
    seed: int,
    parameters: Mapping[str, Any],
    doping: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    generator_revision: str | None = None,
    targets_origin: Mapping[str, str | None] | None = None,
    cost: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a set was drawn with, as plain JSON values; see [`~dsco_hf.concentration.records.concentration_record`]."""
    generator = _generator(pipe, generator_revision)
    record = {
        "method": method,
        "seed": seed,
        "parameters": dict(parameters),
        "doping": doping,
        "source": _source(targets, source),
        "targets": _targets(targets, targets_origin or {}),
        "generator": generator,
        **{part: _part(pipe, part, generator) for part in PARTS},
        "environment": {
            "device": pipe.device.type,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "versions": library_versions(),
        "cost": cost,
    }
    return {key: value for key, value in record.items() if value is not None}


def with_record(dataset: Dataset, record: Mapping[str, Any]) -> Dataset:
    """The dataset with what it was drawn with, in its info: it goes along with `select`, `filter`, `save_to_disk`.

    Saying what the drawn rows were, `synthetic`, it tells later whether they still are.
    """
    told = {"synthetic": rows_record(synthetic_rows(dataset)), **record}
    dataset.info.description = as_description(plain(told))
    return dataset


def record_of(dataset: Dataset | DatasetDict) -> dict[str, Any] | None:
    """What a dataset says it was drawn with; None for one that does not say, or that was put together of several."""
    if isinstance(dataset, DatasetDict):
        dataset = next(iter(dataset.values()))
    try:
        found = json.loads(dataset.info.description or "null")
    except ValueError:
        return None
    record = found.get(MARK) if isinstance(found, dict) else None
    return without_lost_labels(record, dataset) if isinstance(record, dict) else None


def without_lost_labels(record: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """A record without what it tells of labels whose column is no longer there."""
    return {key: value for key, value in record.items() if LABELS.get(key, "label") in {"label", *dataset.features}}


def _source(targets: Targets | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    population = dict(getattr(targets, "provenance", None) or {})
    origin: dict[str, Any] = {}
    if population.get("population") == "data":
        names = ("dataset", "config", "revision", "split", "fingerprint")
        origin = {name: population.get(name) for name in names} | {"rows": population.get("images")}
    given = named_source(origin.get("dataset"), given)
    for key, here in origin.items():
        there = given.get(key)
        differ = None not in (here, there) and here != there and key != "rows"  # of which some may be unreadable
        if differ and not more_exact(f"source.{key}", here, there):
            raise ValueError(
                f"The targets were made of data with {key}={here!r}, but `source` says {key}={there!r}: pass the "
                f"targets of that data, or leave {key!r} out of `source`: it is recorded as the targets say."
            )
    known = {key: value for key, value in {**origin, **given}.items() if value is not None}
    if isinstance(name := known.get("dataset"), str) and "folder" in (place := published_origin(name)):
        known["dataset"] = place["folder"]
    return known or None


def named_source(own: str | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is told of the source, without a folder's name where the dataset has a better one of its own."""
    given = dict(given or {})
    if is_place(given.get("dataset")) and own not in (None, *_BUILDERS):
        del given["dataset"]
    return given


def more_exact(place: str, here: object, there: object) -> bool:
    """Whether `there` says the same as `here` and more: the id of a dataset for its name, a part for a split."""
    short, long = str(here), str(there)
    if place == "source.dataset":
        return short in _BUILDERS or _plain_name(short) == _plain_name(long)
    return place == "source.split" and long.startswith((f"{short}[", f"{short},"))


def _plain_name(dataset: str) -> str:
    return re.sub(r"[-_. ]", "", re.split(r"[\\/]", dataset.rstrip("\\/"))[-1].lower())


def _targets(targets: Targets | None, origin: Mapping[str, str | None]) -> dict[str, Any] | None:
    if isinstance(targets, ClassStatistics):
        # of names alone the record says all: they can be made again from it
        names = {name: getattr(targets, name) for name in ("class_names", "class_labels")}
        told = {"kind": type(targets).__name__, "statistics": targets.kind, **targets_record(targets)}
        return told | (names if targets.kind == "names" else {})
    if not isinstance(targets, MatchingTargets):
        several = targets.parts if isinstance(targets, JointTargets) else {}
        parts = {"parts": {name: _targets(one, {}) for name, one in several.items()}} if several else {}
        return None if targets is None else {"kind": type(targets).__name__, **parts}
    return targets_record(targets) | (_without_none(origin) or {})


def targets_record(targets: MatchingTargets | ClassStatistics) -> dict[str, Any]:
    """How targets were made, and the SHA-256 of their content."""
    names = {
        key: next(iter(published_origin(value).values()), value) if isinstance(value, str) and "/" in value else value
        for key, value in targets.provenance.items()
    }
    return {**names, "sha256": targets_sha256(targets)}


def _generator(pipe: DiffusionPipeline, revision: str | None) -> dict[str, Any] | None:
    """Repository and commit of a pipeline; the commit is that of its denoiser, which the Hub's cache knows."""
    name = getattr(pipe, "name_or_path", None) or None
    denoiser = getattr(pipe, "denoiser", None)
    found = cached_origin(_name_of(denoiser))
    if found is not None:
        name = found["id"] if name is None or Path(str(name)).is_dir() else name
        revision = revision or found["revision"]
    sha256 = model_sha256(denoiser) if denoiser is not None else None
    family = type(getattr(pipe, "family", None))
    outside = denoiser is not None and not family.__module__.startswith("dsco_hf.")  # a name that the loader must know
    path = f"{family.__module__}.{family.__qualname__}" if outside else None
    told = {"revision": revision, "sha256": sha256, "family": path, "image_size": set_size(pipe)}
    return _without_none({**published_origin(name), **told})


def set_size(pipe: DiffusionPipeline) -> int | None:
    """The size that images are brought to, if it is not the generator's own."""
    return getattr(getattr(pipe, "config", None), "image_size", None)


def network_record(model: torch.nn.Module) -> dict[str, Any] | None:
    """Repository and commit of a network, or the name of its folder, and the SHA-256 of its weights."""
    name = _name_of(model)
    origin: dict[str, Any] = cached_origin(name) or {**published_origin(name), "revision": commit_of(model)}
    return _without_none({**origin, "sha256": model_sha256(model)})


def _part(pipe: DiffusionPipeline, part: str, generator: Mapping[str, Any] | None) -> dict[str, Any] | None:
    model = getattr(pipe, part, None)
    if model is None:
        return None
    of_pipe, told = str(getattr(pipe, "name_or_path", None) or ""), network_record(model) or {}
    own = model.as_record() if hasattr(model, "as_record") else {}
    if of_pipe and Path(_name_of(model)) == Path(of_pipe) / part:  # a component of a local pipeline
        told = {**published_origin(of_pipe), "subfolder": part, "sha256": told["sha256"]}
    return _without_none({**own, **told})


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, however it was made, with the names of folders in place of where they lie on a machine."""
    clean = dict(record)
    for part in ("generator", *PARTS, "source", "targets"):
        entry, key = clean.get(part), "dataset" if part in ("source", "targets") else "id"
        if isinstance(entry, Mapping) and is_place(name := entry.get(key)):
            place = published_origin(name)
            rest = {one: value for one, value in entry.items() if one != key}
            clean[part] = {**entry, key: place["folder"]} if key == "dataset" else {**rest, **place}
    if isinstance(clean.get("configs"), Mapping):
        clean["configs"] = {name: without_paths(entry) for name, entry in clean["configs"].items()}
    return clean


def is_place(name: object) -> bool:
    """Whether a recorded name is a path on this machine."""
    return isinstance(name, str) and "folder" in published_origin(name)


def _name_of(model: object) -> str:
    """What a model was loaded from: transformers keeps it as an attribute, diffusers in the configuration."""
    config = getattr(model, "config", None)
    return str(getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or "")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in values.items() if value is not None} or None


def write_set(dataset: Dataset, path: Path) -> None:
    """Keeps a set with its record in one parquet file, whole or absent, of which any reader reads the rows."""
    table = embedded(dataset)
    told = {**(table.schema.metadata or {}), MARK: dataset.info.description or ""}
    with whole(path) as partial:
        pq.write_table(table.replace_schema_metadata(told), partial)


def read_set(path: Path) -> Dataset:
    """A set that `write_set` kept, in memory, with its record; errors of a damaged file are those of pyarrow."""
    table = pq.read_table(path)
    told = (table.schema.metadata or {}).get(MARK.encode(), b"").decode()
    features = Features.from_arrow_schema(table.schema)
    return Dataset(table, info=DatasetInfo(description=told, features=features))


_CHANGED = "rows were changed, added or left out after they were drawn, or put in another order"
_CHANGED_COLUMNS = "what the columns say of the rows was changed after they were drawn"
_CHANGED_REAL = "real rows were changed, added or left out after they were chosen, or put in another order"
_UNKNOWN = "columns were left out after the rows were drawn, so that nobody can tell whether these are those rows"


def changed_since(record: Mapping[str, Any], dataset: Dataset) -> str | None:
    """What happened to a set since its record was made; None if it holds the rows that the record says were drawn.

    Columns that were added, such as soft labels, and real rows that `dope` added change no drawn row. A record that
    says nothing of rows cannot tell.
    """
    drawn, doped = (one if isinstance(one := record.get(key), Mapping) else {} for key in ("synthetic", "doped"))
    part = synthetic_rows(dataset)
    if doped and "source" not in dataset.features:  # the drawn rows come first
        part = dataset.select(range(min(int(drawn.get("rows") or 0), len(dataset))))
    return _differs(drawn, part, _CHANGED) or _differs(doped, dataset, _CHANGED_REAL)


def _differs(recorded: Mapping[str, Any], dataset: Dataset, rows_changed: str) -> str | None:
    known = {key: recorded[key] for key in ("images_sha256", "rows_sha256") if recorded.get(key)}
    if not known:
        return None
    if recorded.get("rows") not in (None, len(dataset)):
        return rows_changed
    found = rows_record(dataset)
    compared = {key: known[key] == found[key] for key in known if key in found}
    if not compared:
        return _UNKNOWN
    if all(compared.values()):
        return None
    return _CHANGED_COLUMNS if compared.get("images_sha256") else rows_changed
