"""What a concentration will cost: budgets by processes, on this machine or an assumed device; numbers and table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..concentration.concentrate import Unit, plan_units
from ..sampling.call import Plain, Sampling
from ..sampling.flat import SamplingOptions
from ..sampling.methods.released import Released
from ..sampling.pipeline import DsCoPipeline
from ..utils.values import LARGEST_SET, check_choice
from .passes import Prediction, Rehearsal, assumed_seconds, predict, takes_gradients
from .probe import probe_seconds
from .tracing import PassCost, largest_batch, pass_costs, weight_bytes


# TFLOP/s of dense bfloat16 matrix multiplications and GiB of memory, as the vendor's data sheets have them
DEVICES = {
    "rtx4090": (165.0, 24.0),
    "a100": (312.0, 80.0),
    "l40s": (362.0, 48.0),
    "h100": (989.0, 80.0),
    "h200": (989.0, 141.0),
}
MEMORY_SHARE = 0.9  # the rest is for kernels' workspace, the allocator's gaps and whoever else is there


@dataclass(frozen=True, kw_only=True)
class CostPlan(SamplingOptions):
    """What is to be drawn, and where.

    Attributes:
        features: what the targets match, as YAML or JSON, see `dsco_hf.matching.feature_spec`.
        num_classes: classes to draw; by default the preset's, or all that the pipeline has.
        population: real images per class, which pass through the classifier once, for the targets.
        images_per_class: budgets, one row each.
        num_processes: numbers of processes with a device each, one column each.
        plain: plain sampling, without optimised noise.
        device: "here" measures this machine, "a100", "h100", ... assumes.
        peak_tflops: another peak rate than that of `device`.
        utilisation: the share of it that is assumed to be reached.
        memory_gib: another memory than that of `device`.
        max_hours: also say which budget fits into this time.
    """

    features: str | None = None
    num_classes: int | None = None
    population: int | None = None
    images_per_class: list[int] = field(default_factory=lambda: [10])
    num_processes: list[int] = field(default_factory=lambda: [1])
    plain: bool = False
    device: str = "here"
    peak_tflops: float | None = None
    utilisation: float = 0.4
    memory_gib: float | None = None
    max_hours: float | None = None

    def check(self) -> None:
        """Raises ValueError for another device, or rates that cannot be."""
        check_choice("device", self.device, ["here", *DEVICES])
        assumed_seconds({}, peak_tflops=self.peak_tflops or 1.0, utilisation=self.utilisation)

    @property
    def sampling(self) -> Sampling:
        """How the images are drawn."""
        return dataclasses.replace(super().sampling, method=Plain()) if self.plain else super().sampling

    @property
    def uses_extractor(self) -> bool:
        """Whether the random network of the released algorithm has a part in it."""
        return any(isinstance(part, Released) for part in self.sampling.method.takers.values())

    def of(self, pipe: DsCoPipeline) -> dict[str, Any]:
        """The numbers of the plan for a pipeline; `num_classes` and `population` are known by now."""
        method = self.sampling.method
        costs = pass_costs(pipe, features=self.features, extractor=self.uses_extractor, method=method)
        rehearsal = Rehearsal(pipe, self.sampling, self.features)
        seconds, source = self._rates(rehearsal, costs)
        device_bytes = self._memory(pipe)
        names = ("num_classes", "block_size", "images_per_call", "population", "num_processes")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}

        def foresee(images_per_class: int) -> Prediction:
            return predict(rehearsal, images_per_class=images_per_class, costs=costs, seconds=seconds, **options)

        def fitting(count: int) -> int:
            most = LARGEST_SET // (self.num_classes or 1)
            return largest_budget(lambda budget: foresee(budget).seconds[count], 3600 * (self.max_hours or 0), most)

        return {
            "rows": [self._row(pipe, costs, foresee(budget), device_bytes) for budget in self.images_per_class],
            "targets_seconds": (self.population or 0) * (self.num_classes or 1) * seconds.get("embedding", 0.0),
            "largest_budgets": {count: fitting(count) for count in self.num_processes if self.max_hours is not None},
            "device_memory_gib": device_bytes / 2**30,
            "weights_gib": weight_bytes(pipe) / 2**30,
            "seconds_per_image_pass": seconds,
            "flops_per_image_pass": {kind: cost.flops for kind, cost in costs.items()},
            "source": source,
            "config": dataclasses.asdict(self),
        }  # fmt: skip

    def _rates(self, rehearsal: Rehearsal, costs: dict[str, PassCost]) -> tuple[dict[str, float], str]:
        """Seconds of one image's pass by kind, and a sentence on where they come from."""
        pipe = rehearsal.pipe
        dtype = str(pipe.dtype).removeprefix("torch.")
        if self.device == "here":
            images = max(unit.images for unit in self._units(max(self.images_per_class)))
            seconds = probe_seconds(rehearsal, images, images_per_class=self.block_size)
            batch = min(images, self.batch_size or images)
            return seconds, f"Measured on this machine's {pipe.device.type}, passes of {batch} images, {dtype}."
        peak = self.peak_tflops or DEVICES[self.device][0]
        seconds = assumed_seconds(costs, peak_tflops=peak, utilisation=self.utilisation)
        return seconds, (
            f"Predictions, not measurements. Assumed: {self.device}, {100 * self.utilisation:g} % of {peak:g} TFLOP/s "
            f"({dtype}) in every model; counted FLOPs of matrix multiplications and convolutions only."
        )

    def _memory(self, pipe: DsCoPipeline) -> float:
        """Bytes of the device's memory."""
        if self.memory_gib is not None:
            return self.memory_gib * 2**30
        if self.device != "here":
            return DEVICES[self.device][1] * 2**30
        if pipe.device.type == "cuda":
            return torch.cuda.get_device_properties(pipe.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def _row(
        self, pipe: DsCoPipeline, costs: dict[str, PassCost], found: Prediction, device_bytes: float
    ) -> dict[str, Any]:
        """One budget: what it costs, and the largest batch that the device can hold (0: it cannot)."""
        images = max(unit.images for unit in self._units(found.images_per_class)) * self.sampling.method.candidates
        limit = min(images, self.batch_size or images)
        fitting = largest_batch(
            pipe, images, costs, MEMORY_SHARE * device_bytes, optimised=takes_gradients(found.passes),
            guidance_scale=self.guidance_scale or 1.0,
        )  # fmt: skip
        return {
            "images_per_class": found.images_per_class,
            "images": found.images,
            "images_per_call": images,
            **found.calls,
            "passes": found.passes,
            "pflop": found.flops / 1e15,
            "memory_gib": found.memory_bytes / 2**30,
            "batch_size": min(limit, fitting),
            "fits": fitting >= limit,
            "seconds": found.seconds,
        }

    def markdown(self, plan: dict[str, Any]) -> str:
        """The plan as a table, with what it rests on."""
        one, several = ("process", "processes") if self.device == "here" else ("GPU", "GPUs")
        names = [f"time on {count} {one if count == 1 else several}" for count in self.num_processes]
        header = ["images per class", "images", "denoiser calls", "PFLOP", "memory", "fits", *names]
        lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        for found in plan["rows"]:
            fits = (
                "yes" if found["fits"] else f"with batch_size {found['batch_size']}" if found["batch_size"] else "no"
            )
            times = [duration(found["seconds"][count]) for count in self.num_processes]
            cells = [
                f"{found['images_per_class']:,}", f"{found['images']:,}", f"{found['denoiser_calls']:,}",
                significant(found["pflop"]), f"{found['memory_gib']:.1f} GiB", fits, *times,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", plan["source"], *self._notes(plan)]
        return "\n".join(lines)

    def _notes(self, plan: dict[str, Any]) -> list[str]:
        """What the table does not say."""
        calls, method = plan["rows"][0], self.sampling.method
        steered = "+".join(getattr(part, "objective", part).name for part in getattr(method, "parts", [method]))
        found = [
            f"{self.num_classes} classes, {self.sampling.num_inference_steps} steps, "
            f"guidance {self.guidance_scale:g}, {steered}; calls of up to {calls['images_per_call']} images. "
            f"Memory is that of tensors, {plan['weights_gib']:.2f} GiB of it weights; a batch fits if it takes at "
            f"most {100 * MEMORY_SHARE:.0f} % of {plan['device_memory_gib']:.0f} GiB. "
            "Time is that of the slowest process."
        ]
        if self.population and not self.plain:
            found.append(
                f"The targets need {self.population * (self.num_classes or 1):,} real images through the classifier "
                f"once, {duration(plan['targets_seconds'])} of one device beside reading and decoding them."
            )
        groups = {len({unit.group for unit in self._units(budget)}) for budget in self.images_per_class}
        if max(self.num_processes) > min(groups):
            found.append(
                f"There are only {min(groups)} groups of classes: more processes stay idle. A smaller "
                "`images_per_call` makes more groups."
            )
        found += [
            f"Within {self.max_hours:g} h on {count}: {budget:,} images per class."
            for count, budget in plan["largest_budgets"].items()
        ]
        return found

    def _units(self, images_per_class: int) -> list[Unit]:
        """What is drawn in one call each."""
        return plan_units(
            self.num_classes or 1, images_per_class, block_size=self.block_size,
            images_per_call=self.images_per_call,
        )  # fmt: skip


def largest_budget(seconds_of: Callable[[int], float], limit: float, most: int = LARGEST_SET) -> int:
    """The most images per class that take at most `limit` seconds, `most` at most; 0 if one takes longer."""
    high = 1
    while high <= min(most, 2**20) and seconds_of(high) <= limit:
        high *= 2
    low, high = high // 2, min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds_of(middle) <= limit else (low, middle)
    return low


def significant(value: float) -> str:
    """A positive number with three digits or all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in a unit that people read."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
