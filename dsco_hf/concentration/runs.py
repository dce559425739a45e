"""Runs: concentration into a folder, by any number of processes, that may stop anywhere and goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..data.images import pixels_from_images
from ..generators.failures import NonFiniteError
from ..matching.discrepancy import PreviousBlocks, random_discrepancy
from ..matching.targets import MatchingTargets
from ..sampling.call import Sampling
from ..sampling.methods.combined import matching_of
from ..sampling.pipeline import DsCoPipeline
from ..utils.origins import model_sha256, targets_sha256, versions
from ..utils.processes import RunError, Team
from ..utils.values import plain_arguments
from .concentrate import (
    BLOCK_SIZE,
    COSTS,
    IMAGES_PER_CALL,
    ConcentrationReport,
    Given,
    Unit,
    UnitSampler,
    divide,
    peak_memory_bytes,
    plan_units,
    row_features,
    targets_in,
    to_dataset,
)
from .run_folder import RunFolder, RunProgress, RunSession, unit_name
from .set_records import drawn_record, set_size, with_record


logger = logging.getLogger(__name__)

_COUNTS = ("images", "seconds", "denoiser_calls", "decoder_calls", "classifier_calls")


@dataclasses.dataclass
class RunResult:
    """What became of a run.

    Attributes:
        folder (`Path`): the run's folder.
        units, finished_units (`int`): all units, and those that are finished.
        failures (`list[dict]`): units whose images are not finite: `unit` and `error`.
        stopped (`bool`): whether `max_hours` ended it.
        report (`ConcentrationReport`): cost and discrepancy of all finished units, those of earlier sessions too.
        changes (`list[dict]`): settings that were changed on the way, see [`RunFolder.changes`].
        session (`dict`): what this session did: `images`, `seconds` of wall time, `images_per_second`, `processes`.
        settings (`dict`): what fixes the images, as in `run.json`.
        class_names (`list[str]`): names of the dataset's classes.
        record (`dict`): what the images are drawn with, see [`~dsco_hf.concentration.records.concentration_record`].
        weighted (`bool`): whether images count unequally in training: rows then have a `weight`.
    """

    folder: Path
    units: int
    finished_units: int
    failures: list[dict[str, str]]
    stopped: bool
    report: ConcentrationReport
    changes: list[dict[str, Any]]
    session: dict[str, Any]
    settings: dict[str, Any]
    class_names: list[str]
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    weighted: bool = False

    @property
    def finished(self) -> bool:
        """Whether every unit is finished."""
        return self.finished_units == self.units

    @property
    def message(self) -> str:
        """One sentence on where the run stands, and what to do."""
        done = f"{self.finished_units} of {self.units} units are finished"
        if self.failures:
            errors = "; ".join(f"{failure['unit']}: {failure['error']}" for failure in self.failures[:5])
            hint = (
                "Run again to draw what is missing; models that a repair changed have to be named in `accept_changed`."
            )
            return f"{len(self.failures)} unit(s) failed, {done}. {errors} {hint}"
        if not self.finished:
            return f"Stopped by the time limit: {done}. Run the same command again to go on."
        return f"{done}: {self.report.images} images."

    def dataset(self, *, cache_file: Path | None = None) -> Dataset:
        """The concentrated dataset: rows by class and index.

        Args:
            cache_file: an Arrow file to keep the rows in; in memory if None.

        Raises:
            RunError: if the run is not finished.
        """
        if not self.finished:
            raise RunError(self.message)
        units = _units(self.settings)
        features = row_features(self.class_names, weighted=self.weighted)
        rows = RunFolder(self.folder).assemble(units, features, cache_file=cache_file)
        return with_record(rows, self.record) if self.record else rows


@plain_arguments(images_per_class=1, block_size=1, images_per_call=1)
def concentrate_to_folder(
    pipe: DsCoPipeline,
    targets: Given,
    images_per_class: int,
    folder: str | Path,
    *,
    seed: int = 0,
    class_labels: Sequence[int | str] | None = None,
    block_size: int = BLOCK_SIZE,
    images_per_call: int = IMAGES_PER_CALL,
    measure_by: MatchingTargets | None = None,
    session: RunSession | None = None,
    progress: bool = True,
    **options: object,
) -> RunResult:
    """Draws the images of [`concentrate`] into a folder; every process of a launch calls this.

    The work is divided into units (a block of images of a group of classes, see [`plan_units`]), which do not depend
    on the number of processes: on CPUs of one kind, any number of processes gives the same bytes, however often the
    run was stopped. A group's blocks belong to one process. A process whose generator gives values that are not finite
    notes the unit as failed and goes on with other groups.

    Args:
        pipe (`DsCoPipeline`): the generator and the classifier, on this process's device.
        targets: see [`concentrate`]. Those that are made of a dataset or of classes are kept in `folder/targets`, so
            that the run goes on with them, without another pass.
        images_per_class (`int`): at least 1. A finished run grows by whole blocks when it is run again with more.
        folder (`str` or `Path`): the run's folder, on a file system that all processes see.
        seed (`int`): with the class and the index it fixes an image's noise.
        class_labels (sequence of `int` or `str`, *optional*): without targets, the generator's classes to draw; all if
            None.
        block_size (`int`): images of a class that are optimised jointly.
        images_per_call (`int`): several small classes are drawn in one call of at most this many images. Smaller calls
            are more units, which can occupy more processes.
        measure_by (`MatchingTargets`, *optional*): targets to measure the discrepancy by; `targets` if None.
        session ([`RunSession`], *optional*): how the processes work: until when, with how many threads, ...
        progress (`bool`): show a progress bar over all processes.
        options: of [`Sampling.of`], as in [`concentrate_and_report`].

    Returns:
        `RunResult`: the same in every process.

    Raises:
        RunError: if another run holds the folder, or it cannot be written to.
        TypeError, ValueError: for arguments that cannot work, or settings other than those the folder was started
            with.
    """
    session, sampling = session or RunSession(), Sampling.of(**options)
    shared: dict[str, Any] = {"accelerator": session.accelerator, "seed": seed, "progress": progress}
    shared["images_per_class"] = images_per_class
    matched = targets_in(pipe, targets, sampling, Path(folder) / "targets", **shared)
    sampler = UnitSampler(pipe, matched, sampling, seed=seed, class_labels=class_labels)
    judge = measure_by or matching_of(matched)
    numbers = {
        "images_per_class": images_per_class, "block_size": block_size, "images_per_call": images_per_call,
        "num_classes": len(sampler.class_names), "seed": seed,
    }  # fmt: skip
    units = _units(numbers)
    team = Team(session.accelerator)
    run = _Run(RunFolder(folder), team, sampler, units, judge, session.max_hours, progress)
    with team, contextlib.ExitStack() as held, _threads(pipe.device, session.cpu_threads):
        settings = team.from_main(
            lambda: numbers | run_settings(sampler, cpu_threads=session.cpu_threads, measure_by=measure_by),
            "describing the models",
        )
        team.from_main(lambda: held.enter_context(run.folder.locked()), "locking the folder")
        team.from_main(lambda: run.folder.begin(settings, accept_changed=session.accept_changed), "opening the folder")
        return run.go(settings)


def run_settings(
    sampler: UnitSampler, *, cpu_threads: int, measure_by: MatchingTargets | None = None
) -> dict[str, Any]:
    """What fixes a run's images and their measures beside its numbers, as JSON; models and targets by content."""
    pipe, targets = sampler.pipe, sampler.targets
    on_cpu = pipe.device.type == "cpu"
    return {
        "class_labels": sampler.class_labels,
        "class_names": sampler.class_names,
        "options": sampler.sampling.as_record(),
        **({} if (size := set_size(pipe)) is None else {"image_size": size}),
        "targets": None if targets is None else targets_sha256(targets),
        "measure_by": None if measure_by is None else targets_sha256(measure_by),
        "models": {
            name: model_sha256(model)
            for name, model in sorted(pipe.components.items())
            if name not in pipe.only_prepares
            and (isinstance(getattr(pipe, name, None), torch.nn.Module) or name == "scheduler")
        },
        "device": pipe.device.type,
        "cpu_threads": cpu_threads if on_cpu else None,
        "versions": versions(),
    }


class _Run:
    """One session of a run, in one process."""

    def __init__(
        self,
        folder: RunFolder,
        team: Team,
        sampler: UnitSampler,
        units: list[Unit],
        judge: MatchingTargets | None,
        max_hours: float | None,
        progress: bool,
    ) -> None:
        self.folder, self.team, self.sampler, self.units, self.progress = folder, team, sampler, units, progress
        self.names = [unit_name(unit) for unit in units]
        self.max_seconds = None if max_hours is None else 3600 * max_hours
        self.start, self.longest = time.monotonic(), 0.0
        self.failures: list[dict[str, str]] = []
        self.stopped, self.drawn = False, 0
        self.judged: PreviousBlocks | None = None  # embedding sums of the finished images, to measure them by
        if judge is not None:
            judge.check_pipeline(sampler.pipe)
            shared = sampler.previous is not None and judge is matching_of(sampler.targets)
            self.judged = sampler.previous if shared else PreviousBlocks(judge)

    def go(self, settings: dict[str, Any]) -> RunResult:
        """Checks what is there, draws this process's share, and waits for the others."""
        rank, world = self.team.rank, self.team.world
        there = sorted(self.folder.finished() & set(self.names))
        self.team.gather(None)  # nobody changes anything before all have looked
        damaged = self.team.everywhere(lambda: self.folder.verify(there[rank::world]), "checking finished units")
        finished = set(there) - {name for names in damaged for name in names}
        todo = [unit for unit, name in zip(self.units, self.names, strict=True) if name not in finished]
        shares = divide(todo, world)
        if rank == 0:
            self._announce(todo, shares)
        mine = [unit for unit in self.units if unit.group in shares[rank]]
        last = {unit.group: unit.block for unit in todo}  # of each group, the last block to draw
        self.folder.log(
            rank, "started", pid=os.getpid(), host=_host(), processes=world, units=len(todo),
            mine=sum(unit_name(unit) not in finished for unit in mine), versions=versions(),
        )  # fmt: skip
        shown = self.progress and rank == 0
        with RunProgress(self.folder, dict(zip(self.names, (u.images for u in self.units), strict=True)), shown=shown):
            self.team.everywhere(lambda: self._work(mine, finished, last), "drawing")
            outcomes = self.team.gather((self.failures, self.stopped, self.drawn))
        seconds = time.monotonic() - self.start
        return self.team.from_main(lambda: self._result(settings, outcomes, seconds), "reading the manifest")

    def _announce(self, todo: Sequence[Unit], shares: Sequence[set[int]]) -> None:
        groups = len({unit.group for unit in todo})
        if groups and groups < self.team.world:
            logger.warning(
                "%d processes for %d group(s) of classes: the others stay idle. A smaller `images_per_call` makes "
                "more groups.",
                self.team.world,
                groups,
            )

    def _work(self, mine: Sequence[Unit], finished: set[str], last: Mapping[int, int]) -> None:
        """Draws this process's units, block after block; a group whose unit failed is left as it is."""
        broken: set[int] = set()
        features = row_features(self.sampler.class_names, weighted=self.sampler.sampling.method.weighs)
        try:
            for unit in mine:
                if unit.group in broken or unit.block > last[unit.group]:
                    continue
                if unit_name(unit) in finished:
                    self._add(unit, pixels_from_images(self.folder.rows(unit, features)["image"][:]))
                    continue
                if self.max_seconds is not None and time.monotonic() - self.start + self.longest >= self.max_seconds:
                    self.stopped = True
                    self.folder.log(self.team.rank, "stopped", reason="max_hours")
                    break
                if not self._draw(unit):
                    broken.add(unit.group)
        except Exception as error:
            self.folder.log(self.team.rank, "error", error=f"{type(error).__name__}: {error}")
            raise
        self.folder.log(self.team.rank, "finished", images=self.drawn, failed=len(self.failures))

    def _draw(self, unit: Unit) -> bool:
        """Draws and stores one unit; False if its images are not finite."""
        name, begin = unit_name(unit), time.monotonic()
        classes = [self.sampler.class_names[row] for row in unit.rows]
        try:
            rows, pixels, output = self.sampler.draw(unit)
        except NonFiniteError as error:
            self.failures.append({"unit": name, "error": str(error)})
            self.folder.log(
                self.team.rank,
                "failed",
                unit=name,
                block=unit.block,
                classes=classes,
                step=error.step,
                error=str(error),
            )
            return False
        seconds = time.monotonic() - begin
        self._add(unit, pixels)
        entry = {
            "rows": [unit.rows.start, unit.rows.stop],
            "block": unit.block,
            "seconds": round(seconds, 4),
            "denoiser_calls": output.denoiser_calls,
            "decoder_calls": output.decoder_calls,
            "classifier_calls": output.classifier_calls,
            "peak_memory_bytes": peak_memory_bytes(self.sampler.pipe),
            "discrepancies": self.judged.discrepancies(self._judged_rows(unit)) if self.judged is not None else None,
        }
        self.folder.write_unit(unit, to_dataset(rows, self.sampler.class_names), entry)
        self.longest, self.drawn = max(self.longest, time.monotonic() - begin), self.drawn + unit.images
        self.folder.log(
            self.team.rank, "unit", unit=name, block=unit.block, classes=classes, images=unit.images, begin=begin,
            seconds=entry["seconds"],
        )  # fmt: skip
        return True

    def _add(self, unit: Unit, pixels: torch.Tensor) -> None:
        self.sampler.add(unit, pixels)
        if self.judged is not None and self.judged is not self.sampler.previous:
            rows = [row for row in self._judged_rows(unit) for _ in unit.indices]
            self.judged.add(pixels, rows, self.sampler.pipe)

    def _judged_rows(self, unit: Unit) -> list[int]:
        """Rows of the judging targets for the unit's classes, which are those of the dataset if it has the same."""
        assert self.judged is not None
        if self.judged is self.sampler.previous:
            return list(unit.rows)
        return self.judged.targets.rows_of([self.sampler.class_labels[row] for row in unit.rows]).tolist()

    def _result(self, settings: dict[str, Any], outcomes: Sequence[Any], seconds: float) -> RunResult:
        done = self.folder.finished()
        entries = {
            unit: self.folder.entry(name) for unit, name in zip(self.units, self.names, strict=True) if name in done
        }
        drawn = sum(images for _, _, images in outcomes)
        report = self._report({unit: entry for unit, entry in entries.items() if entry})
        return RunResult(
            folder=self.folder.path,
            units=len(self.units),
            finished_units=len(entries),
            failures=[failure for failures, _, _ in outcomes for failure in failures],
            stopped=any(stopped for _, stopped, _ in outcomes),
            report=report,
            changes=self.folder.changes(),
            session={
                "images": drawn,
                "seconds": round(seconds, 3),
                "images_per_second": round(drawn / seconds, 3) if seconds else 0.0,
                "processes": self.team.world,
            },
            settings=settings,
            record=self._record(settings, report),
            class_names=list(self.sampler.class_names),
            weighted=self.sampler.sampling.method.weighs,
        )

    def _report(self, entries: Mapping[Unit, Mapping[str, Any]]) -> ConcentrationReport:
        """Cost and discrepancies of finished units, and those of as many random real images."""
        report, names = summarise(entries, self.sampler.class_names), self.sampler.class_names
        if self.judged is not None:
            judge = self.judged.targets
            counts: dict[tuple[int, int], int] = {}  # images by row of the set and of the judge
            for unit in sorted(entries, key=lambda unit: unit.block):
                counts |= dict.fromkeys(zip(unit.rows, self._judged_rows(unit), strict=True), unit.indices.stop)
            found = random_discrepancy(judge, {judge.class_names[row]: count for (_, row), count in counts.items()})
            report.measured(
                report.discrepancy_by_class,
                {names[own]: found[judge.class_names[row]] for own, row in counts} if found else {},
            )
        return report

    def _record(self, settings: dict[str, Any], report: ConcentrationReport) -> dict[str, Any]:
        """What the images are drawn with, as [`concentrate`] says it."""
        pipe, targets = self.sampler.pipe, self.sampler.targets
        parameters = {name: settings[name] for name in ("images_per_class", "block_size", "images_per_call")}
        parameters["class_labels"] = settings["class_labels"] if targets is None else None
        return drawn_record(
            pipe,
            targets,
            method=self.sampler.sampling.method.label(targets),
            seed=settings["seed"],
            parameters={**parameters, **settings["options"]},
            cost={name: value for name in COSTS if (value := getattr(report, name)) is not None},
        )


def summarise(entries: Mapping[Unit, Mapping[str, Any]], names: Sequence[str]) -> ConcentrationReport:
    """The report of a run from its manifest entries."""
    report = ConcentrationReport()
    for name in _COUNTS:
        setattr(report, name, sum(entry[name] for entry in entries.values()))
    report.peak_memory_bytes = max((entry["peak_memory_bytes"] for entry in entries.values()), default=0)
    found: dict[str, float] = {}
    for unit in sorted(entries, key=lambda unit: (unit.block, unit.group)):  # the last block's value stays
        measured = entries[unit]["discrepancies"] or []
        found |= {names[row]: value for row, value in zip(unit.rows, measured, strict=False)}
    report.measured(found, {})
    return report


def _units(numbers: Mapping[str, Any]) -> list[Unit]:
    sizes = {"block_size": numbers["block_size"], "images_per_call": numbers["images_per_call"]}
    return plan_units(numbers["num_classes"], numbers["images_per_class"], **sizes)


def _host() -> str:
    """By which a machine is told from others; its name is nobody else's business."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _threads(device: torch.device, cpu_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
