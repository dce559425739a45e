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

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from dsco_hf.data.datasets import class_names
from dsco_hf.hub.folder import to_json
from dsco_hf.hub.remake import Job
from dsco_hf.studies.kept import kept_check
from dsco_hf.studies.options import OutputOptions, PreviewOptions, TargetsOptions
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.files import write_atomically
from dsco_hf.utils.processes import RunError
from dsco_hf.utils.progress import introduce


@dataclass(frozen=True, kw_only=True)
class ConcentrateRecipe(PreviewOptions, TargetsOptions, OutputOptions):
    """Options of this recipe; those of models, of what is matched and of sampling are inherited.

    Attributes:
        generator, generator_revision: pipeline folder or Hub id, by default outputs/generator, which
            recipes/train_generator.py writes; with `--from`, where the recorded generator lies if not at its recorded
            place (the hash of its weights is compared).
        check_images: plain samples of a class that the classifier is asked about before anything is drawn, 64 at most;
            0 asks nothing.
        max_hours: stop in time, to go on later.
        cpu_threads: threads of a process on a CPU; use several processes to use several cores.
        accept_changed: settings that may differ from those the run was started with, such as `models`.
        from_dataset: `--from`: a published dataset, by Hub id or folder, to draw again.
        from_config, from_revision: its config and its revision.
    """

    check_images: int = 4
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
WITH_FROM = {
    "resume", "generator", "generator_revision", "output_dir", "max_hours", "cpu_threads", "accept_changed", "imports"
}  # fmt: skip


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
    accelerator, output = make_accelerator(), Path(recipe.output_dir)
    work = ("run", "targets", "targets-work", "generator_check.json")
    check_anew(recipe.resume, accelerator, [output / name for name in work])
    try:
        job = recorded_job(recipe, accelerator) if recipe.from_dataset else described_job(recipe, accelerator)
        hours = (time.monotonic() - start) / 3600  # loading and targets count, too
        left = None if recipe.max_hours is None else max(0.0, recipe.max_hours - hours)
        result = job.draw(
            output / "run", max_hours=left, accept_changed=recipe.accept_changed, accelerator=accelerator
        )
    except RunError as error:
        sys.exit(str(error) if accelerator.is_main_process else 1)
    if accelerator.is_main_process:
        outcome = result.message
        if result.finished:
            print("Writing the dataset, its hashes and its card.", flush=True)
            record = job.save(result, output / "dataset")
            results, verdict = job.results(result, record, config=dataclasses.asdict(recipe))
            write_atomically(output / "results.json", to_json(results).encode())
            outcome += f" The dataset is in {output / 'dataset'}.{verdict}"
        print(outcome)
    accelerator.end_training()
    if result.failures:
        sys.exit(1)


def is_from(text: str) -> bool:
    """Whether this is `--from`, which is no name for a field."""
    return text == "--from" or text.startswith("--from=")


def check_recipe(recipe: ConcentrateRecipe) -> None:
    """Refuses options that do not go together."""
    if recipe.from_dataset is None:
        recipe.check_matched()
        return
    names = [f.name for f in dataclasses.fields(recipe) if not f.name.startswith("from_")]
    usual = ConcentrateRecipe()
    changed = [name for name in names if getattr(recipe, name) != getattr(usual, name)]
    if refused := [name for name in changed if name not in WITH_FROM]:
        raise ValueError(
            f"`--from` takes all else from the record of the dataset: leave {refused} out, or leave `--from` out."
        )


def recorded_job(recipe: ConcentrateRecipe, accelerator: Accelerator) -> Job:
    """The job that made a published dataset."""
    with accelerator.main_process_first():  # one process downloads, the others read its cache
        job = Job.recorded(
            str(recipe.from_dataset), recipe.from_config, revision=recipe.from_revision, generator=recipe.generator,
            generator_revision=recipe.generator_revision, cpu_threads=recipe.cpu_threads,
        )  # fmt: skip
    job.pipe.to(accelerator.device)
    names = getattr(job.targets, "class_names", None) or job.parameters["class_labels"]
    shape = {"classes": len(names or range(job.pipe.num_classes)), "size": job.pipe.image_size}
    introduce(accelerator, f"as {recipe.from_dataset}", **shape)
    return job


def described_job(recipe: ConcentrateRecipe, accelerator: Accelerator) -> Job:
    """The job that the options describe."""
    output = Path(recipe.output_dir)
    with accelerator.main_process_first():
        pipe = recipe.load_pipeline().to(accelerator.device)
        real = recipe.splits()[0]
    own = recipe.classes(pipe) or range(pipe.num_classes)
    names = own if real is None else class_names(real, label_column=recipe.label_column)
    data, images = recipe.dataset or recipe.targets or f"generator {recipe.generator}", real and len(real)
    introduce(accelerator, data, images=images, classes=len(names), size=pipe.image_size)
    targets = recipe.matched(pipe, real, output / "targets", accelerator=accelerator, dtype=recipe.dtype)
    sampling = recipe.sampling.for_targets(targets)
    parameters = {"method": sampling} | {name: getattr(recipe, name) for name in SIZES}
    if targets is None and recipe.class_labels:
        parameters["class_labels"] = recipe.classes(pipe)
    source = {"dataset": recipe.dataset, "config": recipe.dataset_name, "revision": recipe.revision}
    stored = None if recipe.targets is None or Path(recipe.targets).is_dir() else recipe.targets
    check = None
    if recipe.check_images and accelerator.is_main_process:
        print("Asking the classifier about plain samples.", flush=True)
        check = kept_check(
            output / "generator_check.json", pipe, real, **recipe.columns,
            class_labels=targets.class_labels if targets is not None else recipe.classes(pipe) or None,
            images_per_class=recipe.check_images, num_inference_steps=sampling.num_inference_steps,
            guidance_scale=recipe.guidance_scale,
        )  # fmt: skip
        print(check or "", flush=True)
    return Job(
        pipe, targets, parameters, recipe.seed, recipe.cpu_threads or 1, sampling.method.label(targets),
        source=None if recipe.dataset is None else {**source, "split": recipe.split}, targets_id=stored,
        targets_revision=recipe.targets_revision if stored else None, check=check,
    )  # fmt: skip


if __name__ == "__main__":
    main()
