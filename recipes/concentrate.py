"""Concentrates a dataset: draws a few images per class that match what a classifier sees in whole classes.

    accelerate launch recipes/concentrate.py --config recipes/configs/concentrate_digits.yaml
    accelerate launch --multi_gpu --num_processes 8 recipes/concentrate.py --config ...     (also without a GPU)
    accelerate launch recipes/concentrate.py --from user/name --output_dir outputs/again

A run that was stopped, however, goes on where it was when the same command is run again; so does one that is to have
more images per class, by whole blocks. `--from` draws the synthetic images of a published dataset again, with what its
`concentration.json` records; on a CPU with the same versions they are the same bit by bit.

Writes to the output folder: dataset/, which `load_dataset` reads and recipes/publish.py sends; results.json; run/, the
finished units and the log; and targets/, if it made them.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dsco_hf.concentration.records import library_versions, record_parameters
from dsco_hf.concentration.runs import RunResult, concentrate_to_folder
from dsco_hf.hub.folder import to_json
from dsco_hf.hub.remake import compared, load_recorded, read_concentration, recorded_rows, save_run
from dsco_hf.matching.kept import kept_targets, pipeline_identity
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.flat import SamplingOptions
from dsco_hf.sampling.methods.nopt import NOpt
from dsco_hf.sampling.methods.released import QuantileTargets, Released
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.studies.generator_check import GeneratorCheck
from dsco_hf.studies.kept import kept_check
from dsco_hf.studies.options import MatchOptions, OutputOptions, PreviewOptions
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.files import write_atomically
from dsco_hf.utils.processes import RunError


@dataclass(frozen=True, kw_only=True)
class ConcentrateRecipe(PreviewOptions, MatchOptions, SamplingOptions, OutputOptions):
    """Options of this recipe; those of models, matched images and sampling are inherited.

    Attributes:
        generator, generator_revision: pipeline folder or Hub id, by default outputs/generator, which
            recipes/train_generator.py writes; with `--from`, where the recorded generator lies if not at its recorded
            place (the hash of its weights is compared).
        targets, targets_revision: folder or Hub repository of finished targets, in place of `dataset` or `data_free`.
        draws: of objective "quantile".
        images_per_class: more of them, by whole blocks, extend a finished run.
        check_images: plain samples of a class that the classifier is asked about before anything is drawn, 64 at most;
            0 asks nothing.
        seed: with class and index it fixes an image.
        max_hours: stop in time, to go on later.
        cpu_threads: threads of a process on a CPU; use several processes to use several cores.
        accept_changed: settings that may differ from those the run was started with, such as `models`.
        from_dataset: `--from`: a published dataset, by Hub id or folder, to draw again.
        from_config, from_revision: its config and its revision.
    """

    targets: str | None = None
    targets_revision: str | None = None
    draws: int = 5
    images_per_class: int = 10
    check_images: int = 4
    seed: int = 0
    output_dir: str = "outputs/concentrated"
    max_hours: float | None = None
    cpu_threads: int | None = None
    accept_changed: list[str] = field(default_factory=list)
    from_dataset: str | None = None
    from_config: str | None = None
    from_revision: str | None = None


MADE = "outputs/generator"  # by recipes/train_generator.py
SIZES = ("images_per_class", "block_size", "images_per_call")
# what `--from` leaves to the user
WITH_FROM = {"resume", "generator", "generator_revision", "output_dir", "max_hours", "cpu_threads", "accept_changed"}


@dataclass
class Job:
    """What is to be drawn, read from the options or from the record of a published dataset."""

    pipe: DsCoPipeline
    targets: MatchingTargets | QuantileTargets | None
    parameters: dict[str, Any]
    seed: int
    cpu_threads: int
    method: str
    source: dict[str, Any] | None = None
    targets_id: str | None = None
    targets_revision: str | None = None
    origin: dict[str, Any] | None = None
    check: GeneratorCheck | None = None


def main(arguments: list[str] | None = None) -> None:
    """Reads the options, draws, and writes the dataset."""
    start = time.monotonic()
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = [f"--from_dataset{text.removeprefix('--from')}" if is_from(text) else text for text in given]
    recipe = parse_config(ConcentrateRecipe, given, description=__doc__)
    check_recipe(recipe)
    if recipe.from_dataset is None and recipe.generator is None:
        recipe = dataclasses.replace(recipe, generator=MADE)
    check_made(Path(__file__).parent, {name: getattr(recipe, name) for name in ("generator", "classifier", "targets")})
    accelerator = make_accelerator()
    work = ("run", "targets", "targets-work", "generator_check.json")
    check_anew(recipe.resume, accelerator, [Path(recipe.output_dir) / name for name in work])
    try:
        job = recorded_job(recipe, accelerator) if recipe.from_dataset else described_job(recipe, accelerator)
        parameters = dict(job.parameters)
        hours = (time.monotonic() - start) / 3600  # loading and targets count, too
        left = None if recipe.max_hours is None else max(0.0, recipe.max_hours - hours)
        result = concentrate_to_folder(
            job.pipe, job.targets, parameters.pop("images_per_class"), Path(recipe.output_dir) / "run", seed=job.seed,
            cpu_threads=job.cpu_threads, max_hours=left, accept_changed=recipe.accept_changed,
            accelerator=accelerator, **parameters,
        )  # fmt: skip
    except RunError as error:
        sys.exit(str(error) if accelerator.is_main_process else 1)
    outcome = result.message
    if accelerator.is_main_process and result.finished:
        outcome += finish(recipe, job, result)
    if accelerator.is_main_process:
        print(outcome)
    accelerator.end_training()
    if result.failures:
        sys.exit(1)


def is_from(text: str) -> bool:
    """Whether this is `--from`, which is no name for a field."""
    return text == "--from" or text.startswith("--from=")


def check_recipe(recipe: ConcentrateRecipe) -> None:
    """Refuses options that do not go together."""
    if recipe.from_dataset is not None:
        names = [f.name for f in dataclasses.fields(recipe) if not f.name.startswith("from_")]
        usual = ConcentrateRecipe()
        changed = [name for name in names if getattr(recipe, name) != getattr(usual, name)]
        if refused := [name for name in changed if name not in WITH_FROM]:
            raise ValueError(
                f"`--from` takes all else from the record of the dataset: leave {refused} out, or leave `--from` out."
            )
        return
    sources = [name for name in ("targets", "dataset", "data_free") if getattr(recipe, name)]
    if len(sources) > 1:
        raise ValueError(f"{sources} were given: images can match one of them only.")
    method = recipe.sampling.method
    if sources and isinstance(method, NOpt) and method.objective.needs is None:
        raise ValueError(f"The {method.objective.name!r} objective matches nothing: leave {sources[0]!r} out.")
    if isinstance(method, Released) and sources != ["dataset"]:
        raise ValueError("The 'quantile' objective matches real images: give `dataset`.")
    if not sources and method.without_targets() != method:
        raise ValueError(
            "Nothing to match: give `dataset`, `targets` or `data_free`, or `optimization_steps: 0` for plain samples."
        )


def recorded_job(recipe: ConcentrateRecipe, accelerator: Accelerator) -> Job:
    """The job that made a published dataset."""
    name, options = str(recipe.from_dataset), {"revision": recipe.from_revision}
    with accelerator.main_process_first():
        place = {"generator": recipe.generator, "generator_revision": recipe.generator_revision}
        pipe, targets, record = load_recorded(name, recipe.from_config, **place, **options)
        published = read_concentration(name, **options)
    parameters = record_parameters(record)
    if isinstance(parameters["method"].method, Released):
        raise ValueError(
            f"{name} matches real images one by one (objective 'quantile'): only with them can it be drawn."
        )
    rows = recorded_rows(published, record["config"])
    origin = {"dataset": name, "config": record["config"], "revision": recipe.from_revision, **rows}
    recorded = (record.get("environment") or {}).get("threads")
    return Job(
        pipe=pipe.to(accelerator.device),
        targets=targets,
        parameters=parameters,
        seed=record["seed"],
        cpu_threads=recipe.cpu_threads or recorded or 1,
        method=str(record.get("method") or "nopt").removesuffix("+doping"),
        source=record.get("source"),
        origin={**origin, "versions": record.get("versions") or {}},
    )


def described_job(recipe: ConcentrateRecipe, accelerator: Accelerator) -> Job:
    """The job that the options describe."""
    with accelerator.main_process_first():  # one process downloads, the others read its cache
        pipe = recipe.load_pipeline().to(accelerator.device)
        real = recipe.splits()[0]
    targets = targets_of(recipe, real, pipe, accelerator)
    sampling = recipe.sampling.for_targets(targets)
    parameters = {"method": sampling} | {name: getattr(recipe, name) for name in SIZES}
    if targets is None and recipe.class_labels:
        parameters["class_labels"] = recipe.classes(pipe)
    source = {"dataset": recipe.dataset, "config": recipe.dataset_name, "revision": recipe.revision}
    stored = None if recipe.targets is None or Path(recipe.targets).is_dir() else recipe.targets
    check = None
    if recipe.check_images and accelerator.is_main_process:
        check = kept_check(
            Path(recipe.output_dir) / "generator_check.json", pipe, real, **recipe.columns,
            class_labels=targets.class_labels if targets is not None else recipe.classes(pipe) or None,
            images_per_class=recipe.check_images, num_inference_steps=recipe.num_inference_steps,
            guidance_scale=recipe.guidance_scale,
        )  # fmt: skip
        print(check or "", flush=True)
    return Job(
        pipe, targets, parameters, recipe.seed, recipe.cpu_threads or 1, sampling.method.label(targets),
        source=None if recipe.dataset is None else {**source, "split": recipe.split}, targets_id=stored,
        targets_revision=recipe.targets_revision if stored else None, check=check,
    )  # fmt: skip


def targets_of(
    recipe: ConcentrateRecipe, real: Any, pipe: DsCoPipeline, accelerator: Accelerator
) -> MatchingTargets | QuantileTargets | None:
    """What to match: loaded, or made by all processes together and kept in the output folder."""
    if recipe.targets is not None:
        with accelerator.main_process_first():
            return MatchingTargets.from_pretrained(recipe.targets, revision=recipe.targets_revision)
    if recipe.dataset is None and not recipe.data_free:
        return None
    method, shown = recipe.sampling.method, accelerator.is_main_process
    if isinstance(method, Released):
        own = {name: getattr(recipe, name) for name in ("on_error", "mapping", "draws", "seed")}
        return QuantileTargets.from_dataset(real, pipe, progress=shown, **recipe.columns, **own)
    drawing = {name: getattr(recipe, name) for name in ("num_inference_steps", "guidance_scale", "eta")}
    options = recipe.targets_options(pipe, **drawing) | {"seed": recipe.seed}
    options |= {"second_moment": True} if method.second_moment else {}
    made_with = pipeline_identity(pipe, real, draws=real is None, **{**options, **recipe.asked, "dtype": recipe.dtype})
    return kept_targets(
        Path(recipe.output_dir) / "targets", made_with, accelerator=accelerator,
        make=lambda **shared: recipe.make_targets(pipe, real, progress=shown, **options, **shared),
    )  # fmt: skip


def finish(recipe: ConcentrateRecipe, job: Job, result: RunResult) -> str:
    """Writes the dataset and the results; returns what to tell."""
    output, report = Path(recipe.output_dir), vars(result.report)
    record = save_run(
        result, output / "dataset", pipe=job.pipe, targets=job.targets, parameters=job.parameters, check=job.check,
        **{name: getattr(job, name) for name in ("method", "seed", "source", "targets_id", "targets_revision")},
    )  # fmt: skip
    results = {
        "config": dataclasses.asdict(recipe), "method": job.method, "seed": job.seed,
        "cost": {name: value for name, value in report.items() if "discrepancy" not in name},
        "session": result.session, **{name: value for name, value in report.items() if "discrepancy" in name},
        "settings": result.settings, "versions": library_versions(),
    }  # fmt: skip
    told = f" The dataset is in {output / 'dataset'}."
    if job.origin is not None:
        results["from"], verdict = compared(job.origin, record["synthetic"]["rows_sha256"])
        told += verdict
    write_atomically(output / "results.json", to_json(results).encode())
    return told


if __name__ == "__main__":
    main()
