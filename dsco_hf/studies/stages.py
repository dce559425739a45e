"""Studies: small sets of several methods and sizes, what evaluators reach on them, and the records of the whole."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..concentration.concentrate import measure_discrepancy
from ..concentration.doping import select, selected_rows
from ..concentration.selection import Herding
from ..data.datasets import Pool, load_pixels, load_splits
from ..evaluators import (
    ImageSet,
    Protocol,
    build_evaluator,
    job_identity,
    load_image_set,
    run_job,
    summarise,
    train_job,
)
from ..evaluators.evaluation import read_job
from ..matching.targets import MatchingTargets
from ..sampling.pipeline import DsCoPipeline
from ..utils.values import check_whole
from .figures import sample_grid
from .plans import set_name, set_parts


class Clock:
    """Tells the stages of a study with the time since its start, and when nothing new may be begun.

    Args:
        accelerator (`Accelerator`): the main process speaks.
        max_minutes (`float`, *optional*): time in which something may be begun; without an end if None.
    """

    def __init__(self, accelerator: Accelerator, max_minutes: float | None = None) -> None:
        self.accelerator, self.max_minutes, self.start = accelerator, max_minutes, time.monotonic()
        self.unfinished = False

    def say(self, text: str) -> None:
        """Prints a stage."""
        if self.accelerator.is_main_process:
            seconds = int(time.monotonic() - self.start)
            tqdm.write(f"[{seconds // 60}:{seconds % 60:02d}] {text}")
            sys.stdout.flush()

    def is_over(self) -> bool:
        """Whether this process may begin nothing new; it is remembered."""
        limit = self.max_minutes
        self.unfinished |= limit is not None and time.monotonic() - self.start >= 60 * limit
        return self.unfinished

    def any_unfinished(self) -> bool:
        """Whether any process left something undone; all of them call this."""
        mine = torch.tensor([int(self.unfinished)], device=self.accelerator.device)
        return bool(self.accelerator.gather(mine).max())


def load_study_images(
    path: str,
    name: str | None = None,
    *,
    pipe: DsCoPipeline,
    protocol: Protocol,
    image_column: str | None = None,
    label_column: str | None = None,
    on_error: str = "skip",
    **splits: Any,
) -> tuple[Dataset, ImageSet, ImageSet, dict[str, Any]]:
    """Real images of a study: those to match and train on, and those to test on.

    Args:
        path (`str`): of the dataset, see [`~dsco_hf.data.opening.load_splits`], like `name` and `splits`.
        name (`str`, *optional*): its configuration.
        pipe (`DsCoPipeline`): gives the channels.
        protocol (`Protocol`): gives the sizes.
        image_column (`str`, *optional*): where there are several of the kind.
        label_column (`str`, *optional*): likewise.
        on_error (`str`): "skip" or "raise" for images that cannot be decoded.
        **splits: which images are for what.

    Returns:
        `tuple`: the rows to train on that can be decoded, the same and the test images in memory, and what was taken.

    Raises:
        ValueError: for a dataset without test images.
    """
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column, "on_error": on_error}
    real, test, taken = load_splits(path, name, label_column=label_column, **splits)
    if test is None:
        raise ValueError("Evaluators are tested: `test_split` is a split or 'auto' here, not 'none'.")
    train = load_image_set(real, protocol=protocol, num_channels=pipe.num_channels, **columns)
    tested = load_image_set(test, protocol=protocol, num_channels=pipe.num_channels, test_for=train, **columns)
    if len(train.labels) < len(real):  # nobody is to meet the others again
        readable = load_pixels(real, num_channels=pipe.num_channels, image_size=pipe.image_size, **columns)[2]
        real = real.select(readable.tolist())
    return real, train, tested, taken


def evaluate_sets(
    sets: Mapping[str, ImageSet],
    test: ImageSet,
    *,
    training_seeds: int,
    folder: str | Path,
    clock: Clock,
    rank: int,
    world: int,
    **options: Any,
) -> dict[str, list[Path]]:
    """Trains evaluators from scratch on every set; this process does its share of the trainings, the long ones first.

    Args:
        sets (mapping of `str` to [`~dsco_hf.evaluators.ImageSet`]): by name.
        test ([`~dsco_hf.evaluators.ImageSet`]): images to test on.
        training_seeds (`int`): trainings on each set.
        folder (`str` or `Path`): where results are kept, each with all that decided it.
        clock ([`Clock`]): when it is over, nothing new is begun.
        rank (`int`): of this process among those that share the trainings.
        world (`int`): their number.
        **options: of [`~dsco_hf.evaluators.train_job`]: architecture, protocol, teacher, accelerator, overrides.

    Returns:
        `dict`: the files of the results by set, for [`read_results`].

    Raises:
        ValueError: for a kept result that was made with something else.
    """
    options = {"teacher": None, **options}
    shown = options["accelerator"].is_main_process
    order = sorted(sets, key=lambda name: (-len(sets[name].labels), name))
    jobs = {f"{name}-run{seed}": (name, seed) for name in order for seed in range(training_seeds)}

    def train(key: str, checkpoint: Path) -> dict[str, Any]:
        name, seed = jobs[key]
        return train_job(sets[name], test, seed=seed, checkpoint=checkpoint, **options)

    def settings(key: str) -> dict[str, Any]:
        name, seed = jobs[key]
        return job_identity(sets[name], test, seed=seed, **options)

    for key in tqdm(list(jobs)[rank::world], desc="Evaluators", unit="run", disable=not shown):
        if not clock.is_over():
            run_job(key, train, settings=settings, folder=folder)
    return {name: [Path(folder) / f"{key}.json" for key, (own, _) in jobs.items() if own == name] for name in sets}


def read_results(files: Mapping[str, Sequence[Path]]) -> dict[str, list[dict[str, Any]]]:
    """The results of finished trainings by set."""
    return {name: [read_job(path) for path in paths] for name, paths in files.items()}


def draw_study_samples(sets: Mapping[str, ImageSet], images_per_class: int, path: str | Path) -> Path:
    """Draws real, plain, concentrated and data-free images of up to ten classes side by side, of the first seed.

    Args:
        sets (mapping of `str` to [`~dsco_hf.evaluators.ImageSet`]): by [`set_name`]; those that are there are shown.
        images_per_class (`int`): of the sets to show.
        path (`str` or `Path`): the PNG file to write.
    """
    methods = {"real": "random", "plain": "plain", "nopt": "nopt", "nopt-data-free": "nopt-data-free"}
    found = {title: sets.get(set_name(method, images_per_class, 0)) for title, method in methods.items()}
    there = {title: images for title, images in found.items() if images is not None}
    names = next(iter(there.values())).names[:10]
    grid = {title: images.first_of(range(len(names)), 4) for title, images in there.items()}
    return sample_grid(grid, names, path)


def untrained_network(
    pipe: DsCoPipeline, class_names: Sequence[str], architecture: str, *, seed: int, **overrides: Any
) -> PreTrainedModel:
    """A network as evaluators are before their training, whose features are matched (as in arXiv 2110.04181).

    Args:
        pipe (`DsCoPipeline`): gives the size and the channels of images, and the device.
        class_names (sequence of `str`): of the dataset.
        architecture (`str`): see [`~dsco_hf.evaluators.build_evaluator`], like `overrides`.
        seed (`int`): of its weights; one that no evaluator has.
        **overrides: values of the network's configuration.

    Returns:
        `PreTrainedModel`: frozen, in eval mode.
    """
    size = {"image_size": pipe.image_size, "num_channels": pipe.num_channels}
    network = build_evaluator(architecture, class_names=class_names, seed=seed, **{**size, **overrides})
    return network.eval().requires_grad_(False).to(pipe.device)


def real_baselines(
    train: ImageSet, budgets: Sequence[int], *, random_seeds: int, classifier: PreTrainedModel | None = None
) -> dict[str, ImageSet]:
    """The sets that need no generator: random real images by seed, and herded ones, at every size; by [`set_name`].

    Args:
        train (`ImageSet`): all real images.
        budgets (sequence of `int`): images per class.
        random_seeds (`int`): choices of random images, at least 1.
        classifier (`PreTrainedModel`, *optional*): in eval mode; whose features are herded. Otherwise pixels.
    """
    check_whole("random_seeds", random_seeds, 1)
    most = max(budgets)
    rule = Herding(features="pixels" if classifier is None else classifier)
    herded = selected_rows(Pool(train), rule, images_per_class=most).view(-1, most)  # (K, most)
    found = {}
    for budget in budgets:
        found[set_name("herding", budget, 0)] = train.select(herded[:, :budget].flatten())
        for seed in range(random_seeds):
            found[set_name("random", budget, seed)] = select(train, "random", images_per_class=budget, seed=seed)
    return found


def study_discrepancies(
    sets: Mapping[str, ImageSet], pipe: DsCoPipeline, targets: MatchingTargets
) -> dict[str, float]:
    """MMD² of every set from the real classes, mean over classes; that of random real images among them."""
    return {
        name: statistics.fmean(measure_discrepancy(images.pixels, images.labels, pipe, targets).values())
        for name, images in sets.items()
    }


def random_beside(discrepancies: Mapping[str, float]) -> dict[str, float]:
    """Beside each set of real measures, by [`set_name`], the mean of random real images of as many per class."""
    by_budget: dict[int, list[float]] = {}
    for name, value in discrepancies.items():
        method, budget, _ = set_parts(name)
        if method == "random":
            by_budget.setdefault(budget, []).append(value)
    return {
        name: statistics.fmean(by_budget[budget])
        for name in discrepancies
        if (budget := set_parts(name)[1]) in by_budget
    }


def result_rows(
    sizes: Mapping[str, int],
    jobs: Mapping[str, Sequence[Mapping[str, Any]]],
    discrepancies: Mapping[str, float],
    costs: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of results.json: one for each method and number of images per class, over all seeds.

    Args:
        sizes: images of each set, by [`set_name`].
        jobs: results of [`~dsco_hf.evaluators.train_job`] for each set.
        discrepancies: see [`study_discrepancies`]; each row has that of random real images beside it.
        costs: what sets cost, with fields of `ConcentrationReport`; those that are missing cost nothing.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name in sizes:
        method, budget, _ = set_parts(name)
        groups.setdefault((budget, method), []).append(name)
    beside, rows = random_beside(discrepancies), []
    for (budget, method), names in sorted(groups.items()):
        summary = summarise([job for name in names for job in jobs[name]])
        spent = [costs.get(name, {}) for name in names]
        rows.append(
            {"method": method, "images_per_class": budget, "images": sizes[names[0]]}
            | {key: summary[key] for key in ("accuracy_mean", "accuracy_std", "accuracies")}
            | {"synthesis_seeds": len(names), "training_seeds": len(jobs[names[0]])}
            | {"discrepancy": statistics.fmean(discrepancies[name] for name in names)}
            | {"random_discrepancy": beside.get(names[0])}
            | {"seconds": statistics.fmean(cost.get("seconds", 0.0) for cost in spent)}
            | {key: spent[0].get(key, 0) for key in ("denoiser_calls", "decoder_calls", "classifier_calls")}
        )
    return rows


def full_row(jobs: Sequence[Mapping[str, Any]], images: int) -> dict[str, Any]:
    """What evaluators reach on all real images, for `full` of results.json."""
    summary = summarise(jobs)
    known = {key: summary[key] for key in ("accuracy_mean", "accuracy_std", "accuracies")}
    return known | {"seeds": len(jobs), "images": images}
