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
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoencoderTiny

from dsco_hf.concentration.records import config_record, library_versions, record_parameters
from dsco_hf.concentration.runs import RunResult, concentrate_to_folder
from dsco_hf.data.datasets import load_splits
from dsco_hf.data.shards import rows_sha256
from dsco_hf.hub.folder import concentration_record, read_folder, save_dataset_folder, to_json
from dsco_hf.hub.remake import load_recorded, read_concentration, recorded_rows
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.call import Sampling
from dsco_hf.sampling.flat import FLAT, from_flat
from dsco_hf.sampling.models import load_classifier, load_model
from dsco_hf.sampling.nopt import NOpt
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.sampling.released import QuantileTargets, Released
from dsco_hf.studies.generator_check import GeneratorCheck
from dsco_hf.studies.kept import kept_check, kept_targets, pipeline_identity
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.files import write_atomically
from dsco_hf.utils.processes import RunError


@dataclass(frozen=True)
class ConcentrateRecipe:
    """Options of this recipe; those from `objective` to `batch_size` are of `Sampling`, `NOpt` and its objectives.

    Attributes:
        generator, generator_revision: pipeline folder or Hub id, by default outputs/generator, which
            recipes/train_generator.py writes; with `--from`, where the recorded generator lies if not at its recorded
            place (the hash of its weights is compared).
        classifier, classifier_revision: folder or Hub id; that of the pipeline if none.
        preview_vae, preview_vae_revision: an `AutoencoderTiny` for the look-ahead; that of the pipeline if none.
        dtype: "float32", "bfloat16" or "float16".
        targets, targets_revision: folder or Hub repository of finished targets, in place of the next two.
        dataset, dataset_name, split, revision, image_column, label_column, mapping: real images to match, see
            `MatchingTargets.from_dataset`; `mapping` is a label set or a YAML file.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        data_free, samples_per_class, weighting: match samples of the generator instead, and read no real image.
        class_labels: the generator's classes, for data-free and plain sets; all if none.
        features: what to match, as JSON; see `dsco_hf.matching.feature_spec`.
        draws: of objective "quantile".
        test_split, holdout: what is not matched, see recipes/train_classifier.py.
        images_per_class: more of them, by whole blocks, extend a finished run.
        check_images: plain samples of a class that the classifier is asked about before anything is drawn, 64 at most;
            0 asks nothing.
        seed: with class and index it fixes an image.
        block_size: images of a class that are optimised jointly.
        images_per_call: of several classes, at most; smaller calls occupy more processes.
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        output_dir: see above.
        max_hours: stop in time, to go on later.
        cpu_threads: threads of a process on a CPU; use several processes to use several cores.
        accept_changed: settings that may differ from those the run was started with, such as `models`.
        from_dataset: `--from`: a published dataset, by Hub id or folder, to draw again.
        from_config, from_revision: its config and its revision.
    """

    generator: str | None = None
    generator_revision: str | None = None
    classifier: str | None = None
    classifier_revision: str | None = None
    preview_vae: str | None = None
    preview_vae_revision: str | None = None
    dtype: str = "float32"
    targets: str | None = None
    targets_revision: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    split: str = "train"
    test_split: str = "auto"
    holdout: float = 0.2
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    on_error: str = "skip"
    mapping: str | None = None
    data_free: bool = False
    samples_per_class: int = 200
    weighting: str = "confidence"
    class_labels: list[str] = field(default_factory=list)
    features: str | None = None
    draws: int = 5
    images_per_class: int = 10
    check_images: int = 4
    seed: int = 0
    block_size: int = 10
    images_per_call: int = 128
    objective: str = "rkhs"
    guidance_scale: float = 4.0
    num_inference_steps: int = 50
    eta: float = 1.0
    optimization_steps: int | None = None
    step_size: float = 1.0
    step_decay: float = 0.25
    optimize_from: float = 0.6
    optimize_until: float = 1.0
    lookahead: str = "conditional"
    contrast: float = 0.0
    regularization: float = 2.0
    batch_size: int | None = None
    resume: bool = True
    output_dir: str = "outputs/concentrated"
    max_hours: float | None = None
    cpu_threads: int | None = None
    accept_changed: list[str] = field(default_factory=list)
    from_dataset: str | None = None
    from_config: str | None = None
    from_revision: str | None = None


SAMPLING = ("guidance_scale", "num_inference_steps", "eta", "batch_size", *FLAT)
MADE = "outputs/generator"  # by recipes/train_generator.py
SIZES = ("images_per_class", "block_size", "images_per_call")
WITH_FROM = {
    "resume",
    "generator",
    "generator_revision",
    "output_dir",
    "max_hours",
    "cpu_threads",
    "accept_changed",
}  # what `--from` leaves to the user


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
    # the pass over a large dataset, or a download, takes longer than the 10 or 30 minutes that processes usually wait
    accelerator = make_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
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
    method = sampling_of(recipe).method
    if sources and isinstance(method, NOpt) and method.objective.needs is None:
        raise ValueError(f"The {method.objective.name!r} objective matches nothing: leave {sources[0]!r} out.")
    if isinstance(method, Released) and sources != ["dataset"]:
        raise ValueError("The 'quantile' objective matches real images: give `dataset`.")
    if not sources and method.without_targets() != method:
        raise ValueError(
            "Nothing to match: give `dataset`, `targets` or `data_free`, or `optimization_steps: 0` for plain samples."
        )
    if recipe.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {recipe.dtype!r}.")


def sampling_of(recipe: ConcentrateRecipe) -> Sampling:
    """How the images are drawn."""
    return Sampling.of(**from_flat({name: getattr(recipe, name) for name in SAMPLING if hasattr(recipe, name)}))


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
    dtype = getattr(torch, recipe.dtype)
    parts: dict[str, Any] = {}
    with accelerator.main_process_first():  # one process downloads, the others read its cache
        if recipe.classifier is not None:
            parts["classifier"] = load_classifier(recipe.classifier, revision=recipe.classifier_revision, dtype=dtype)
        if recipe.preview_vae is not None:
            parts["preview_vae"] = load_model(
                AutoencoderTiny, recipe.preview_vae, revision=recipe.preview_vae_revision, dtype=dtype
            )
        pipe = DsCoPipeline.from_pretrained(
            recipe.generator, revision=recipe.generator_revision, dtype=dtype, **parts
        ).to(accelerator.device)
    real = real_images(recipe, accelerator)
    targets = make_targets(recipe, real, pipe, accelerator)
    sampling = sampling_of(recipe).for_targets(targets)
    parameters = {"method": sampling} | {name: getattr(recipe, name) for name in SIZES}
    if targets is None and recipe.class_labels:
        parameters["class_labels"] = classes(recipe, pipe)
    source = {"dataset": recipe.dataset, "config": recipe.dataset_name, "revision": recipe.revision}
    stored = None if recipe.targets is None or Path(recipe.targets).is_dir() else recipe.targets
    return Job(
        pipe=pipe,
        targets=targets,
        parameters=parameters,
        seed=recipe.seed,
        cpu_threads=recipe.cpu_threads or 1,
        method=sampling.method.label(targets),
        source=None if recipe.dataset is None else {**source, "split": recipe.split},
        targets_id=stored,
        targets_revision=recipe.targets_revision if stored else None,
        check=checked(recipe, pipe, real, targets) if accelerator.is_main_process else None,
    )


def real_images(recipe: ConcentrateRecipe, accelerator: Accelerator) -> Any:
    """The images to match, without those that are held out to test on; None if there are none."""
    if recipe.dataset is None:
        return None
    with accelerator.main_process_first():
        columns = {"label_column": recipe.label_column, "revision": recipe.revision}
        splits = {"train_split": recipe.split, "test_split": recipe.test_split, "holdout": recipe.holdout}
        return load_splits(recipe.dataset, recipe.dataset_name, **splits, **columns)[0]


def checked(recipe: ConcentrateRecipe, pipe: DsCoPipeline, real: Any, targets: Any) -> GeneratorCheck | None:
    """What the classifier makes of plain samples, told before anything is drawn."""
    if not recipe.check_images:
        return None
    found = kept_check(
        Path(recipe.output_dir) / "generator_check.json",
        pipe,
        real,
        class_labels=targets.class_labels if targets is not None else classes(recipe, pipe) or None,
        images_per_class=recipe.check_images,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
    )
    if found is not None:
        print(found, flush=True)
    return found


def classes(recipe: ConcentrateRecipe, pipe: DsCoPipeline) -> list[int | str]:
    """The generator's classes, by index or name; a number is an index unless its classes are named by numbers."""
    return [pipe.get_label_ids([label])[0] if label.isdecimal() else label for label in recipe.class_labels]


def make_targets(
    recipe: ConcentrateRecipe, dataset: Any, pipe: DsCoPipeline, accelerator: Accelerator
) -> MatchingTargets | QuantileTargets | None:
    """What to match: loaded, or made by all processes together and kept in the output folder."""
    if recipe.targets is not None:
        with accelerator.main_process_first():
            return MatchingTargets.from_pretrained(recipe.targets, revision=recipe.targets_revision)
    if recipe.dataset is None and not recipe.data_free:
        return None
    method = sampling_of(recipe).method
    if isinstance(method, Released):
        named = ("image_column", "label_column", "on_error", "mapping", "draws", "seed")
        chosen = {name: getattr(recipe, name) for name in named}
        return QuantileTargets.from_dataset(dataset, pipe, progress=accelerator.is_main_process, **chosen)
    options: dict[str, Any] = {"features": None if recipe.features is None else json.loads(recipe.features)}
    if recipe.data_free:
        names = ("samples_per_class", "weighting", "num_inference_steps", "guidance_scale", "eta", "seed")
        options |= {"class_labels": classes(recipe, pipe) or None}
    else:
        names = ("image_column", "label_column", "on_error", "mapping", "seed")
    options |= {name: getattr(recipe, name) for name in names}
    if method.second_moment:
        options["second_moment"] = True
    chosen = ("dataset", "dataset_name", "split", "test_split", "holdout", "revision", "data_free", "dtype")
    request = {**options, "mapping": mapping_told(recipe.mapping)} | {name: getattr(recipe, name) for name in chosen}

    def make(**shared: Any) -> MatchingTargets:
        shared["progress"] = accelerator.is_main_process
        if dataset is None:
            return MatchingTargets.from_generator(pipe, **options, **shared)
        return MatchingTargets.from_dataset(dataset, pipe, **options, **shared)

    made_with = pipeline_identity(pipe, dataset, draws=dataset is None, **request)
    return kept_targets(Path(recipe.output_dir) / "targets", made_with, make, accelerator=accelerator)


def mapping_told(mapping: str | None) -> str | None:
    """A mapping as it decides something: a label set by its name, a file by what is in it."""
    path = Path(mapping or "")
    return path.read_text(encoding="utf-8") if mapping and path.is_file() else mapping


def earlier_sizes(folder: Path, images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The other sizes of a set that has grown, and their records: they stay beside the new one."""
    if not (folder / "concentration.json").is_file():
        return {}, {}
    stored = read_folder(folder)
    configs = {name: splits for name, splits in stored["configs"].items() if name != f"ipc{images}"}
    records = {name: config_record(stored["concentration"], name) for name in configs}
    return configs, {name: {k: v for k, v in record.items() if k != "config"} for name, record in records.items()}


def finish(recipe: ConcentrateRecipe, job: Job, result: RunResult) -> str:
    """Writes the dataset and the results; returns what to tell."""
    output, cache = Path(recipe.output_dir), Path(recipe.output_dir) / "run" / "rows.arrow"
    dataset = result.dataset(cache_file=cache)
    images = job.parameters["images_per_class"]
    kept = job.targets if isinstance(job.targets, MatchingTargets) else None
    record = concentration_record(
        job.pipe, kept, result.report, method=job.method, seed=job.seed, parameters=job.parameters, source=job.source,
        targets_id=job.targets_id, targets_revision=job.targets_revision,
    )  # fmt: skip
    size = min(job.parameters["block_size"], images)
    record["blocks"] = {
        "size": size,
        "count": -(-images // size),
        "nested": "the images of the first k blocks are those of a run with k times `size` images per class",
    }
    record["models"] = result.settings["models"]
    record["changes"] = result.changes
    record["environment"]["threads"] = result.settings["cpu_threads"]
    record["synthetic"] = {"rows": len(dataset), "rows_sha256": rows_sha256(dataset)}
    if job.check is not None:
        record["generator_check"] = job.check.record()
    if (measured := result.report.discrepancy) is not None:
        record["discrepancy"] = {"set": measured, "as many random real images": result.report.random_discrepancy}
    configs, records = earlier_sizes(output / "dataset", images)
    save_dataset_folder(
        {**configs, f"ipc{images}": dataset},
        output / "dataset",
        default_config=f"ipc{images}",
        concentration={"configs": {**records, f"ipc{images}": record}} if configs else record,
        targets=kept if not job.targets_id else None,
    )
    cache.unlink()
    results = {
        "config": dataclasses.asdict(recipe),
        "method": job.method,
        "seed": job.seed,
        "cost": {name: value for name, value in vars(result.report).items() if "discrepancy" not in name},
        "session": result.session,
        "discrepancy": result.report.discrepancy,
        "discrepancy_by_class": result.report.discrepancy_by_class,
        "random_discrepancy": result.report.random_discrepancy,
        "random_discrepancy_by_class": result.report.random_discrepancy_by_class,
        "settings": result.settings,
        "versions": library_versions(),
    }
    told = f" The dataset is in {output / 'dataset'}."
    if job.origin is not None:
        results["from"], verdict = compared(job.origin, record["synthetic"]["rows_sha256"])
        told += verdict
    write_atomically(output / "results.json", to_json(results).encode())
    return told


def compared(origin: Mapping[str, Any], found: str) -> tuple[dict[str, Any], str]:
    """Whether the images are those of the published dataset, for the results and in words."""
    versions = dict(origin["versions"])
    now = library_versions()
    other = {name: [versions[name], now.get(name)] for name in versions if versions[name] != now.get(name)}
    expected, changed = origin.get("rows_sha256"), origin.get("changed")
    same = None if expected is None else expected == found
    outcome = {key: value for key, value in origin.items() if key not in ("versions", "real")}
    outcome |= {"identical": same and changed is None, "as_drawn": same, "other_versions": other}
    if same is None:
        return outcome, " The record has no hash of the synthetic rows to compare them with."
    if same and changed is not None:
        told = f"The rows are as they were first drawn, but NOT as {origin['dataset']} has them: {changed}."
        return outcome, f" {told}"
    if same:
        which = "All synthetic rows" if origin.get("real") else "All rows"
        if origin.get("published_sha256") is None:  # a record of an earlier version
            return outcome, f" {which} are identical to those that the record of {origin['dataset']} says were drawn."
        return outcome, f" {which} are identical to those of {origin['dataset']}."
    why = "; ".join(f"{name} {a} there, {b} here" for name, (a, b) in other.items()) or "the versions are the same"
    return (
        outcome,
        f" The rows DIFFER from those of {origin['dataset']} ({why}; another device or CPU can be the cause).",
    )


if __name__ == "__main__":
    main()
