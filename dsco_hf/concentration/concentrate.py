"""Concentration: pipeline + targets + plan → a small `datasets.Dataset`, by blocks of images per class."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from ..data.images import as_stored, images_from_pixels, to_signed
from ..data.schema import image_seed
from ..generators.failures import NonFiniteError
from ..matching.discrepancy import PreviousBlocks, measure_discrepancy, random_discrepancy
from ..matching.kept import kept_targets, pipeline_identity
from ..matching.objectives import Objective
from ..matching.targets import MatchingTargets
from ..sampling.call import Sampling, SamplingMethod, Targets, is_population
from ..sampling.checks import check_targets
from ..sampling.methods.combined import matching_of
from ..sampling.pipeline import DsCoPipeline, DsCoPipelineOutput
from ..utils.progress import Bar, peak_bytes
from ..utils.values import LARGEST_SET, plain_arguments
from .set_records import drawn_record, with_record


logger = logging.getLogger(__name__)

SOURCES = ("synthetic", "real")
COSTS = ("images", "seconds", "denoiser_calls", "decoder_calls", "classifier_calls", "peak_memory_bytes")
BLOCK_SIZE, IMAGES_PER_CALL = 10, 128
Given: TypeAlias = Targets | Dataset | IterableDataset | str | Sequence[int | str] | None
"""Targets, or what they are made of."""


def row_features(class_names: Sequence[str], *, weighted: bool = False) -> Features:
    """Columns of a concentrated dataset: the image, its label, where it comes from, and perhaps how much it counts."""
    columns = {
        "image": Image(),
        "label": ClassLabel(names=list(class_names)),
        "source": ClassLabel(names=list(SOURCES)),
        "seed": Value("int64"),
        "block": Value("int32"),
        "real_index": Value("int64"),
    }
    return Features(columns | ({"weight": Value("float32")} if weighted else {}))


@dataclasses.dataclass
class ConcentrationReport:
    """What a concentration cost and reached.

    Attributes:
        images (`int`): images drawn.
        seconds (`float`): time of sampling, without loading or targets; of several processes, the sum of theirs.
        denoiser_calls, decoder_calls, classifier_calls (`int`): images that passed through each model.
        peak_memory_bytes (`int`): the most memory that a process held: of the accelerator, or else of the whole
            process.
        discrepancy (`float`, *optional*): MMD² of the finished images, mean over classes; None without targets to
            measure by.
        discrepancy_by_class (`dict[str, float]`): the same per class.
        random_discrepancy (`float`, *optional*): what as many random real images have on average, see
            [`random_discrepancy`]; None where the targets are not those of real images.
        random_discrepancy_by_class (`dict[str, float]`): the same per class.
    """

    images: int = 0
    seconds: float = 0.0
    denoiser_calls: int = 0
    decoder_calls: int = 0
    classifier_calls: int = 0
    peak_memory_bytes: int = 0
    discrepancy: float | None = None
    discrepancy_by_class: dict[str, float] = dataclasses.field(default_factory=dict)
    random_discrepancy: float | None = None
    random_discrepancy_by_class: dict[str, float] = dataclasses.field(default_factory=dict)

    def measured(self, by_class: Mapping[str, float], random_by_class: Mapping[str, float]) -> None:
        """Takes the discrepancies of the classes, and those of as many random real images if they are known."""
        self.discrepancy_by_class, self.random_discrepancy_by_class = dict(by_class), dict(random_by_class)
        self.discrepancy = statistics.fmean(by_class.values()) if by_class else None
        self.random_discrepancy = statistics.fmean(random_by_class.values()) if random_by_class else None

    @property
    def images_per_second(self) -> float:
        """Images by seconds of sampling."""
        return self.images / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """What is drawn in one call and never divided: one block of images of each class of a group.

    Attributes:
        group, block (`int`): its place; the blocks of a group are drawn one after the other.
        rows (`range`): the group's classes, by their label in the dataset.
        indices (`range`): the block's images of every class.
    """

    group: int
    block: int
    rows: range
    indices: range

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.rows) * len(self.indices)


@plain_arguments(images_per_class=1, block_size=1, images_per_call=1)
def plan_units(
    num_classes: int, images_per_class: int, *, block_size: int = BLOCK_SIZE, images_per_call: int = IMAGES_PER_CALL
) -> list[Unit]:
    """Divides a run into units, block after block.

    The units depend on nothing else, so that a run on any number of processes makes the same calls. Groups are of
    nearly the same size, at most `images_per_call` images a call, but never less than one class.

    Raises:
        ValueError: for a number below 1, or more than `values.LARGEST_SET` images.
    """
    if num_classes * images_per_class > LARGEST_SET:
        raise ValueError(
            f"`images_per_class={images_per_class}` of {num_classes} classes are {num_classes * images_per_class:,} "
            f"images, and a set has at most {LARGEST_SET:,}: ask for at most {LARGEST_SET // num_classes} per class."
        )
    classes = max(1, images_per_call // min(block_size, images_per_class))
    groups = -(-num_classes // classes)
    return [
        Unit(
            group,
            block,
            range(num_classes * group // groups, num_classes * (group + 1) // groups),
            range(first, min(first + block_size, images_per_class)),
        )
        for block, first in enumerate(range(0, images_per_class, block_size))
        for group in range(groups)
    ]


def divide(units: Sequence[Unit], processes: int) -> list[set[int]]:
    """Gives each process groups of classes so that all have about the same number of images to draw.

    The largest group first, each to the process that has least ("longest processing time", Graham 1969). Processes
    beyond the number of groups get none.
    """
    costs: dict[int, int] = {}
    for unit in units:
        costs[unit.group] = costs.get(unit.group, 0) + unit.images
    shares: list[set[int]] = [set() for _ in range(processes)]
    loads = [0] * processes
    for group in sorted(costs, key=lambda group: (-costs[group], group)):
        least = loads.index(min(loads))
        shares[least].add(group)
        loads[least] += costs[group]
    return shares


class UnitSampler:
    """Draws the units of one run: what all of them share, and what is finished of each class.

    Args:
        pipe (`DsCoPipeline`): the generator, and the classifier that the targets were made with.
        targets (`MatchingTargets`, `QuantileTargets` or None): what to match.
        sampling ([`Sampling`], *optional*): how.
        seed (`int`): of the run.
        class_labels (sequence of `int` or `str`, *optional*): without targets, the generator's classes.
    """

    def __init__(
        self,
        pipe: DsCoPipeline,
        targets: Targets | None,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        class_labels: Sequence[int | str] | None = None,
    ) -> None:
        check_targets(targets)
        asked = sampling or Sampling()
        self.pipe, self.targets, self.seed, self.sampling = pipe, targets, seed, asked.for_targets(targets)
        if self.sampling != asked:
            left = self.sampling.method.label(None)
            drawn = "plain samples are" if left == "plain" else f"{left!r} is what is"
            logger.warning(
                f"There are no targets, so nothing is optimised: {drawn} drawn. Pass targets, such as "
                f"`MatchingTargets.from_generator(pipe)`, or `method={left!r}` to say that this is meant."
            )
        self.class_labels, self.class_names = _classes(pipe, targets, class_labels)
        self.previous: PreviousBlocks | None = None
        memory, matched = self.sampling.method.memory, matching_of(targets)
        if matched is not None and memory is not None:
            self.previous = PreviousBlocks(matched, each=memory == "images")

    def draw(self, unit: Unit) -> tuple[list[dict[str, Any]], torch.Tensor, DsCoPipelineOutput]:
        """Draws a unit; all earlier blocks of its classes must have been given to `add`.

        Returns:
            `tuple`: rows by class and index (`image`, `label`, `seed`, `block`, perhaps `weight`); the pixels
                `(B, C, H, W)` of these images, in [-1, 1]; and what the pipeline returned.

        Raises:
            NonFiniteError: if an image or a gradient is not finite; classes, block and step are named.
        """
        batch = [(row, index) for row in unit.rows for index in unit.indices]
        seeds = [image_seed(self.seed, self.class_labels[row], index) for row, index in batch]
        previous = None
        if unit.block and self.previous is not None:
            device = self.pipe._execution_device  # where the images are; the targets may lie elsewhere
            sums, counts = self.previous.statistics(unit.rows)
            previous = sums.to(device), counts.to(device)
        labels = [self.class_labels[row] for row, _ in batch]
        try:
            output = self.pipe.sample(
                labels, self.targets, seeds=seeds, previous=previous, method=self.sampling,
                indices=[index for _, index in batch],
            )  # fmt: skip
        except NonFiniteError as error:
            names = [self.class_names[row] for row in unit.rows if self.class_labels[row] in error.class_labels]
            where = f"Class(es) {names[:10]}, block {unit.block}, step {error.step}"
            raise NonFiniteError(f"{where}: {error}", step=error.step, class_labels=error.class_labels) from error
        pixels = as_stored(to_signed(output.images))
        rows = [
            {"image": image, "label": row, "seed": drawn_from, "block": unit.block}
            for (row, _), drawn_from, image in zip(batch, seeds, images_from_pixels(pixels), strict=True)
        ]
        for one, weight in zip(rows, output.weights or [], strict=output.weights is not None):
            one["weight"] = weight
        return rows, pixels, output

    def add(self, unit: Unit, pixels: torch.Tensor) -> None:
        """Takes a unit's finished images `(B, C, H, W)` into account for the later blocks of its classes."""
        if self.previous is not None:
            self.previous.add(pixels, [row for row in unit.rows for _ in unit.indices], self.pipe)


def concentrate(
    pipe: DsCoPipeline,
    targets: Given,
    images_per_class: int,
    *,
    method: SamplingMethod | Sampling | str | None = None,
    objective: Objective | str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    class_labels: Sequence[int | str] | None = None,
    block_size: int = BLOCK_SIZE,
    images_per_call: int = IMAGES_PER_CALL,
    progress: bool = True,
) -> Dataset:
    """Draws a small dataset that teaches what the targets' whole classes do.

    [`concentrate_and_report`] without its report; see there.

    Args:
        pipe (`DsCoPipeline`): see [`concentrate_and_report`], as for the others that are not described here.
        targets: what to match.
        images_per_class (`int`): at least 1.
        method ([`SamplingMethod`], *optional*): what steers the sampling, an object or a name, such as "plain";
            [`NOpt`] if None. Or a [`Sampling`], which has all that can be chosen (`eta`, `batch_size`).
        objective ([`Objective`], *optional*): short for `method=NOpt(objective=...)`; an object or a name, such as
            "rkhs"; [`Ridge`] if None.
        num_inference_steps (`int`, *optional*): see [`Sampling`].
        guidance_scale (`float`, *optional*): likewise.
        seed (`int`): of the run.
        class_labels (sequence of `int` or `str`, *optional*): without targets, the generator's classes to draw.
        block_size (`int`): images of a class that are optimised jointly.
        images_per_call (`int`): of several classes, at most.
        progress (`bool`): show a progress bar.

    Returns:
        `Dataset`: rows by class and index.
    """
    return concentrate_and_report(
        pipe, targets, images_per_class, seed=seed, class_labels=class_labels, block_size=block_size,
        images_per_call=images_per_call, progress=progress, method=method, objective=objective,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
    )[0]  # fmt: skip


@plain_arguments(images_per_class=1, block_size=1, images_per_call=1)
def concentrate_and_report(
    pipe: DsCoPipeline,
    targets: Given,
    images_per_class: int,
    *,
    seed: int = 0,
    class_labels: Sequence[int | str] | None = None,
    block_size: int = BLOCK_SIZE,
    images_per_call: int = IMAGES_PER_CALL,
    measure_by: MatchingTargets | None = None,
    progress: bool = True,
    **options: object,
) -> tuple[Dataset, ConcentrationReport]:
    """Draws a small dataset whose class means match the targets, in memory and by this process alone.

    The images of a class are drawn in blocks; a block is optimised jointly, and matches what the finished blocks of
    its class leave unmatched. So the first k blocks are a good smaller set, and a set can be extended. Block and seed
    fix an image: with the same `block_size` and `images_per_call` on the same kind of device, a run gives the same
    images. `concentrate_to_folder` does the same with any number of processes, and survives being killed.

    Args:
        pipe (`DsCoPipeline`): the generator, and the classifier that the targets were made with.
        targets: what to match: targets, or what they are then made of, a dataset of real images or, data-free, a label
            set's name or the generator's classes. None draws plain samples, or what needs no targets.
        images_per_class (`int`): at least 1.
        seed (`int`): with the class and the index it fixes an image's noise.
        class_labels (sequence of `int` or `str`, *optional*): without targets, the generator's classes to draw; all if
            None.
        block_size (`int`): images of a class that are optimised jointly.
        images_per_call (`int`): several small classes are drawn in one call of at most this many images.
        measure_by (`MatchingTargets`, *optional*): targets to measure the discrepancy by; `targets` if None.
        progress (`bool`): show a progress bar.
        options: of [`Sampling.of`]: `method`, `objective`, `num_inference_steps`, `guidance_scale`, `eta`,
            `batch_size`.

    Returns:
        `tuple[Dataset, ConcentrationReport]`: rows by class and index; columns `image`, `label`, `source`, `seed`,
            `block`, `real_index` (-1).

    Raises:
        TypeError: for an option that the pipeline does not have.
        ValueError: for a number of images below 1, or anything that the pipeline refuses.
        NonFiniteError: if an image or a gradient is not finite.
    """
    sampling = Sampling.of(**options)
    shared: dict[str, Any] = {"seed": seed, "progress": progress, "images_per_class": images_per_class}
    matched = sampling.make_targets(pipe, targets, **shared)
    sampler = UnitSampler(pipe, matched, sampling, seed=seed, class_labels=class_labels)
    units = plan_units(
        len(sampler.class_names), images_per_class, block_size=block_size, images_per_call=images_per_call
    )
    finished: list[dict[str, Any]] = []
    drawn: list[torch.Tensor] = []
    judge = measure_by or matching_of(matched)
    report = ConcentrationReport()
    start = time.perf_counter()
    total = images_per_class * len(sampler.class_names)
    with Bar(total=total, desc="Concentrating", unit="img", disable=not progress) as bar:
        for unit in units:
            rows, pixels, output = sampler.draw(unit)
            if unit.block < units[-1].block:
                sampler.add(unit, pixels)
            count_calls(report, output)
            finished += rows
            drawn += [] if judge is None else [pixels]
            bar.update(unit.images)
    report.seconds = time.perf_counter() - start
    report.peak_memory_bytes = peak_memory_bytes(pipe)
    order = sorted(range(len(finished)), key=lambda i: finished[i]["label"])  # stable: block after block in a class
    finished = [finished[i] for i in order]
    if judge is not None:
        labels = torch.tensor([row["label"] for row in finished])
        found = measure_discrepancy(torch.cat(drawn)[order], labels, pipe, judge)
        report.measured(found, random_discrepancy(judge, dict.fromkeys(found, images_per_class)))
    parameters = {
        "images_per_class": images_per_class,
        "class_labels": class_labels,
        "block_size": block_size,
        "images_per_call": images_per_call,
        **sampler.sampling.as_record(),
    }
    cost = {name: value for name in COSTS if (value := getattr(report, name)) is not None}
    method = sampler.sampling.method.label(matched)
    record = drawn_record(pipe, matched, method=method, seed=seed, parameters=parameters, cost=cost)
    return with_record(to_dataset(finished, sampler.class_names), record), report


def targets_in(
    pipe: DsCoPipeline,
    given: Given,
    sampling: Sampling,
    folder: Path,
    *,
    accelerator: Accelerator,
    seed: int,
    progress: bool,
    images_per_class: int,
    **decisive: Any,
) -> Targets | None:
    """The targets that are given, or made of what is given and kept in a folder; `decisive` are further options."""

    def make(**shared: Any) -> Any:
        options: dict[str, Any] = {"seed": seed, "progress": progress, "images_per_class": images_per_class}
        return sampling.make_targets(pipe, given, **options, **decisive, **shared)

    method = sampling.method
    if not is_population(given) or method.targets_class is None:
        return make()
    real = given if isinstance(given, Dataset | IterableDataset) else None
    made_with: dict[str, Any] = {"second_moment": method.second_moment, **decisive}
    if method.targets_class is not MatchingTargets:
        made_with |= {"method": method.as_record()}
        made_with |= {"images_per_class": images_per_class} if method.by_budget else {}
    draws = real is None or method.targets_class is not MatchingTargets
    if draws:
        drawn = ("num_inference_steps", "guidance_scale", "eta")
        made_with |= {"population": given if real is None else None, "seed": seed}
        made_with |= {name: getattr(sampling, name) for name in drawn}
    made_with = pipeline_identity(pipe, real, draws=draws, **made_with)
    return kept_targets(folder, made_with, make, accelerator=accelerator, kind=method.targets_class)


def _classes(
    pipe: DsCoPipeline, targets: Targets | None, class_labels: Sequence[int | str] | None
) -> tuple[list[int], list[str]]:
    """The generator's classes to draw, and their names in the dataset."""
    if targets is None:
        labels = pipe.get_label_ids(range(pipe.num_classes) if class_labels is None else class_labels)
        return labels, [pipe.id2label.get(label, str(label)) for label in labels]
    if class_labels is not None:
        raise ValueError("The targets name the classes: leave `class_labels` out, or make targets of those classes.")
    labels = list(targets.class_labels)
    if shared := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"Several classes would be drawn from the same class(es) {shared[:10]} of the generator, with the same "
            "noise and target: give each dataset class a generator class of its own (`mapping=`), or merge them first."
        )
    return labels, list(targets.class_names)


def count_calls(report: ConcentrationReport, output: DsCoPipelineOutput) -> None:
    """Adds what one call of the pipeline cost."""
    report.images += len(output.class_labels)
    for name in ("denoiser_calls", "decoder_calls", "classifier_calls"):
        setattr(report, name, getattr(report, name) + getattr(output, name))


def peak_memory_bytes(pipe: DsCoPipeline) -> int:
    """The most memory held so far: of the pipeline's GPU, or else of this process."""
    if pipe.device.type == "cuda":
        return torch.cuda.max_memory_allocated(pipe.device)
    return peak_bytes()


def to_dataset(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Dataset:
    """Rows that were drawn (`image`, `label`, `seed`, `block`, perhaps `weight`) as a concentrated dataset."""
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"source": [SOURCES.index("synthetic")] * len(rows), "real_index": [-1] * len(rows)}
    features = row_features(names, weighted="weight" in columns)
    return Dataset.from_dict({name: columns[name] for name in features}, features=features)
