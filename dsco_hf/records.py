"""How a concentrated dataset was made, in full: what `concentration.json` records, and how to read it back.

Parameters are recorded with their defaults, models by repository and commit, targets by their content, so that the
record alone says how to run it again, also after a default has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from .concentrate import COSTS, ConcentrationReport, concentrate_and_report, sampling_options
from .config_records import by_config
from .objectives import OBJECTIVES, ClassifierObjective
from .schema import nearest
from .set_records import PARTS as PARTS
from .set_records import cached_origin as cached_origin
from .set_records import drawn_record
from .set_records import library_versions as library_versions
from .set_records import targets_record as targets_record
from .targets import MatchingTargets


# Arguments of `concentrate` that shape the images, beside those of a pipeline call.
RUN_OPTIONS = ("images_per_class", "class_labels", "block_size", "images_per_call")
# Arguments that are recorded elsewhere, or say nothing about the images.
_NOT_RECORDED = {"seed", "progress", "measure_by", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}


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
    origin = {"repo_id": targets_id, "revision": targets_revision}
    return drawn_record(
        pipe,
        targets,
        method=method,
        seed=seed,
        parameters=resolve_parameters(**parameters),
        doping=doping,
        source=source,
        generator_revision=generator_revision,
        targets_origin=origin,
        cost=None if report is None else _cost(report),
    )


def _cost(report: ConcentrationReport) -> dict[str, Any]:
    values = {name: getattr(report, name, None) for name in COSTS}
    return {name: value for name, value in values.items() if value is not None}
