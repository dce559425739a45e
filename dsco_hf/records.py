"""How a concentrated dataset was made, in full: what `concentration.json` records, and how to read it back.

Parameters are recorded with their defaults, models by repository and commit, targets by their content, so that the
record alone says how to run it again, also after a default has changed.
"""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .concentrate import ConcentrationReport, concentrate_and_report, sampling_options
from .digests import model_sha256, targets_sha256
from .objectives import OBJECTIVES, ClassifierObjective
from .origins import commit_of
from .schema import nearest
from .targets import MatchingTargets


COSTS = ("images", "seconds", "denoiser_calls", "decoder_calls", "classifier_calls", "peak_memory_bytes")
LIBRARIES = ("dsco_hf", "torch", "diffusers", "transformers", "datasets", "accelerate", "numpy")
# Arguments of `concentrate` that shape the images, beside those of a pipeline call.
RUN_OPTIONS = ("images_per_class", "class_labels", "block_size", "images_per_call")
# Arguments that are recorded elsewhere, or say nothing about the images.
_NOT_RECORDED = {"seed", "progress", "measure_by", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})(?:[/\\](?P<part>\w+))?")
# Components that are often added to a generator by hand, so that they have an origin of their own.
PARTS = ("classifier", "classifier_2", "preview_vae")


def resolve_parameters(**given: Any) -> dict[str, Any]:
    """Fills in the defaults of all parameters that are not given; as plain JSON values.

    Args:
        given: keyword arguments of `concentrate`, such as `images_per_class`, `num_inference_steps`, `objective`.
            What says nothing about the images (`progress`, ...) is left out.

    Raises:
        TypeError: for an argument that `concentrate` does not have, or one that cannot be recorded.
    """
    signature = inspect.signature(concentrate_and_report).parameters
    run = {name: given.get(name, signature[name].default) for name in RUN_OPTIONS}
    if run["images_per_class"] is inspect.Parameter.empty:
        raise TypeError("`images_per_class` is missing: it has no default.")
    return run | sampling_options({k: v for k, v in given.items() if k not in {*RUN_OPTIONS, *_NOT_RECORDED}})


def record_parameters(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded parameters as arguments of `concentrate`: `concentrate(pipe, targets, seed=..., **parameters)`.

    Raises:
        ValueError: if something is recorded that this version does not know, or nothing is.
    """
    recorded = record.get("parameters")
    if not isinstance(recorded, Mapping) or not recorded.get("images_per_class"):
        raise ValueError(
            "The record has no parameters of a concentration: the dataset was not made by `concentrate`, or its maker "
            "did not record it (`concentration_record`)."
        )
    known = {name for kind in OBJECTIVES for name in resolve_parameters(images_per_class=1, objective=kind)}
    if unknown := [name for name in recorded if name not in known]:
        raise ValueError(
            f"The record has a parameter that this version of dsco_hf does not know: {unknown[0]!r}."
            f"{nearest(unknown[0], known)} It was made with dsco_hf "
            f"{(record.get('versions') or {}).get('dsco_hf', 'of unknown version')}."
        )
    parameters = dict(recorded)
    if isinstance(parameters.get("classifier_objective"), Mapping):
        parameters["classifier_objective"] = ClassifierObjective(**parameters["classifier_objective"])
    return parameters


def config_record(record: Mapping[str, Any], config: str | None = None) -> dict[str, Any]:
    """What is recorded of one config: the records of the whole dataset, and over them the config's own.

    Args:
        record: content of `concentration.json`.
        config: name of the config; the default one if None.

    Raises:
        ValueError: if there is no such config.
    """
    configs = record.get("configs") or {}
    name = config or record.get("default_config") or next(iter(configs), None)
    if name not in configs:
        raise ValueError(f"There is no config {name!r}; there are {list(configs)}.{nearest(str(name), configs)}")
    common = {key: value for key, value in record.items() if key not in ("configs", "default_config", "card")}
    own = {key: value for key, value in configs[name].items() if key not in ("features", "splits")}
    return {**common, **own, "config": name}


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
    """
    parameters = dict(parameters)
    doping = parameters.pop("doping", None)
    generator = _generator(pipe, generator_revision)
    record = {
        "method": method,
        "seed": seed,
        "parameters": resolve_parameters(**parameters),
        "doping": doping,
        "source": _source(targets, source),
        "targets": _targets(targets, targets_id, targets_revision),
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
        "cost": None if report is None else _cost(report),
    }
    return {key: value for key, value in record.items() if value is not None}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the images depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cost(report: ConcentrationReport) -> dict[str, Any]:
    values = {name: getattr(report, name, None) for name in COSTS}
    return {name: value for name, value in values.items() if value is not None}


def _source(targets: Any, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    population = dict(getattr(targets, "provenance", None) or {})
    origin: dict[str, Any] = {}
    if population.get("population") == "data":
        names = ("dataset", "config", "revision", "split", "fingerprint")
        origin = {name: population.get(name) for name in names} | {"rows": population.get("images")}
    return {key: value for key, value in {**origin, **(given or {})}.items() if value is not None} or None


def _targets(targets: Any, repo_id: str | None, revision: str | None) -> dict[str, Any] | None:
    if not isinstance(targets, MatchingTargets):
        return None if targets is None else {"kind": type(targets).__name__}
    known = {"id": repo_id, "revision": revision}
    return targets_record(targets) | {key: value for key, value in known.items() if value is not None}


def targets_record(targets: MatchingTargets) -> dict[str, Any]:
    """How targets were made, and the SHA-256 of their content."""
    return {**targets.provenance, "sha256": targets_sha256(targets)}


def _generator(pipe: DiffusionPipeline, revision: str | None) -> dict[str, Any] | None:
    """Repository and commit of a pipeline; the commit is that of its denoiser, which the Hub's cache knows."""
    name = getattr(pipe, "name_or_path", None) or None
    denoiser = next((pipe.components.get(part) for part in ("transformer", "unet") if pipe.components.get(part)), None)
    found = cached_origin(_name_of(denoiser))
    if found is not None:
        name = found["id"] if name is None or Path(str(name)).is_dir() else name
        revision = revision or found["revision"]
    sha256 = model_sha256(denoiser) if denoiser is not None else None
    return _without_none({"id": name and str(name), "revision": revision, "sha256": sha256})


def _part(pipe: DiffusionPipeline, part: str, generator: Mapping[str, Any] | None) -> dict[str, Any] | None:
    model = getattr(pipe, part, None)
    if model is None:
        return None
    name, sha256 = _name_of(model), model_sha256(model)
    revision = commit_of(model)
    origin: dict[str, Any] = cached_origin(name) or {"id": name or None, "revision": revision}
    folder = (generator or {}).get("id")
    if folder and Path(name) == Path(str(folder)) / part:  # a component of a local pipeline
        origin = {"id": folder, "subfolder": part}
    return _without_none({**origin, "sha256": sha256})


def _name_of(model: Any) -> str:
    """What a model was loaded from: transformers keeps it as an attribute, diffusers in the configuration."""
    config = getattr(model, "config", None)
    return str(getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or "")


def cached_origin(path: str) -> dict[str, Any] | None:
    """Repository, commit and subfolder of a model that was loaded from the Hub's cache, told from its path."""
    match = _SNAPSHOT.search(path)
    if match is None:
        return None
    origin = {"id": match["id"].replace("--", "/", 1), "revision": match["revision"], "subfolder": match["part"]}
    return _without_none(origin)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in values.items() if value is not None} or None
