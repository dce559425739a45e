"""What a concentration will cost, before it runs: calls, FLOPs, memory, and time on any number of devices.

    python recipes/plan.py --generator outputs/pipeline --images_per_class 1 10 50 --guidance_scale 1.0
    python recipes/plan.py --run_config recipes/configs/concentrate_digits.yaml --num_processes 1 2
    python recipes/plan.py --preset imagenet1k --images_per_class 10 50 650 --num_processes 1 8 64 --device a100
    python recipes/plan.py --preset imagenet1k --device a100 --memory_gib 24 --max_hours 8

Calls are counted with the pipeline's own arithmetic, and are exact. Time comes from a short probe of this machine
(`--device here`), or from counted FLOPs and a stated share of a device's peak rate, which is an assumption. Prints
Markdown; `--help` lists the options.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from dsco_hf.concentration.concentrate import plan_units
from dsco_hf.costs.passes import (
    PassCost,
    Prediction,
    assumed_seconds,
    largest_batch,
    pass_costs,
    predict,
    weight_bytes,
)
from dsco_hf.costs.probe import imagenet_pipeline, probe_seconds
from dsco_hf.data.labels import PRESETS as LABEL_SETS
from dsco_hf.data.labels import label_set
from dsco_hf.data.schema import nearest
from dsco_hf.sampling.call import Plain, Sampling
from dsco_hf.sampling.flat import from_flat
from dsco_hf.sampling.models import load_classifier, load_model
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.sampling.released import Released
from dsco_hf.utils.configs import check_made, parse_config, read_config
from dsco_hf.utils.values import LARGEST_SET


# TFLOP/s of dense bfloat16 matrix multiplications and GiB of memory, as the vendor's data sheets have them
DEVICES = {
    "rtx4090": (165.0, 24.0),
    "a100": (312.0, 80.0),
    "l40s": (362.0, 48.0),
    "h100": (989.0, 80.0),
    "h200": (989.0, 141.0),
}
# preset: (classes, real images per class, guidance)
PRESETS = {"imagenet1k": (1000, 1281, 4.0), "imagenet100": (100, 1281, 4.0), "imagenette": (10, 947, 4.0)}
MEMORY_SHARE = 0.9  # the rest is for kernels' workspace, the allocator's gaps and whoever else is there
_OF_A_CALL = (
    "objective", "guidance_scale", "num_inference_steps", "eta", "optimization_steps", "optimize_from",
    "optimize_until", "lookahead", "batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class PlanRecipe:
    """Options of this recipe.

    Attributes:
        preset: "imagenet1k", "imagenet100" or "imagenette": the shapes of facebook/DiT-XL-2-256, its VAE, a tiny
            preview VAE and ResNet-18, without weights.
        generator: a pipeline's folder or Hub id, instead.
        classifier, preview_vae: folders or Hub ids; those of the pipeline if none.
        generator_revision, classifier_revision, preview_vae_revision: of those on the Hub.
        features: what the targets match, as YAML or JSON, see `dsco_hf.matching.feature_spec`.
        run_config: a YAML file of `recipes/concentrate.py`; options that both recipes have are taken from it.
        num_classes: classes to draw; by default the preset's, or all that the pipeline has.
        population: real images per class, which pass through the classifier once, for the targets.
        images_per_class: budgets, one row each.
        num_processes: numbers of processes with a device each, one column each.
        block_size, images_per_call: how the run is divided, see `dsco_hf.concentrate.plan_units`.
        plain: plain sampling, without optimised noise.
        objective, guidance_scale, num_inference_steps, eta: of the sampling, see `DsCoPipeline`.
        optimization_steps, optimize_from, optimize_until, lookahead, batch_size: likewise.
        device: "here" measures this machine, "a100", "h100", ... assumes.
        peak_tflops: another peak rate than that of `device`.
        utilisation: the share of it that is assumed to be reached.
        memory_gib: another memory than that of `device`.
        max_hours: also say which budget fits into this time.
        dtype: "float32", "bfloat16" or "float16".
        tiny: the preset's shapes at a size for tests.
        output_file: JSON file for all numbers.
    """

    preset: str | None = None
    generator: str | None = None
    classifier: str | None = None
    preview_vae: str | None = None
    generator_revision: str | None = None
    classifier_revision: str | None = None
    preview_vae_revision: str | None = None
    features: str | None = None
    run_config: str | None = None
    num_classes: int | None = None
    population: int | None = None
    images_per_class: list[int] = field(default_factory=lambda: [10])
    num_processes: list[int] = field(default_factory=lambda: [1])
    block_size: int = 10
    images_per_call: int = 128
    plain: bool = False
    objective: str = "rkhs"
    guidance_scale: float | None = None
    num_inference_steps: int = 50
    eta: float = 1.0
    optimization_steps: int | None = None
    optimize_from: float = 0.6
    optimize_until: float = 1.0
    lookahead: str = "conditional"
    batch_size: int | None = None
    device: str = "here"
    peak_tflops: float | None = None
    utilisation: float = 0.4
    memory_gib: float | None = None
    max_hours: float | None = None
    dtype: str = "bfloat16"
    tiny: bool = False
    output_file: str | None = None


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the config, predicts, prints the plan, and returns its numbers."""
    recipe = parse_config(PlanRecipe, arguments, description=__doc__)
    if recipe.run_config is not None:
        recipe = parse_config(PlanRecipe, arguments, defaults=of_run_config(Path(recipe.run_config)))
    pipe = load(recipe)
    recipe = with_defaults(recipe, pipe)
    costs = pass_costs(pipe, features=recipe.features, extractor=uses_extractor(recipe))
    seconds, source = rates(recipe, pipe, costs)
    device_bytes = memory_of(recipe, pipe)

    def foresee(images_per_class: int) -> Prediction:
        return predict(
            pipe, images_per_class=images_per_class, costs=costs, seconds=seconds,
            num_processes=recipe.num_processes, **run_options(recipe),
        )  # fmt: skip

    rows = [row(recipe, pipe, costs, foresee(budget), device_bytes) for budget in recipe.images_per_class]
    plan: dict[str, Any] = {
        "rows": rows,
        "targets_seconds": recipe.population * recipe.num_classes * seconds.get("classifier", 0.0),
        "largest_budgets": {},
        "device_memory_gib": device_bytes / 2**30,
        "weights_gib": weight_bytes(pipe) / 2**30,
        "seconds_per_image_pass": seconds,
        "flops_per_image_pass": {kind: cost.flops for kind, cost in costs.items()},
        "source": source,
        "config": dataclasses.asdict(recipe),
    }
    if recipe.max_hours is not None:
        plan["largest_budgets"] = {
            count: largest_budget(
                lambda budget, n=count: foresee(budget).seconds[n],
                3600 * recipe.max_hours,
                LARGEST_SET // (recipe.num_classes or 1),
            )
            for count in recipe.num_processes
        }
    print(as_markdown(recipe, plan))
    if recipe.output_file is not None:
        path = Path(recipe.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    return plan


@dataclass(frozen=True)
class RunClasses:
    """What the file of a run says of its classes, beside its dataset."""

    class_labels: list[str] = field(default_factory=list)
    mapping: str | None = None


def of_run_config(path: Path) -> dict[str, Any]:
    """The options of a run that this recipe has too; those of the command line come before them."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}: `--run_config` is that of recipes/concentrate.py.")
    found = {"dtype": "float32", **read_config(path, PlanRecipe, others=True)}  # the run's default
    found.pop("max_hours", None)
    classes = RunClasses(**read_config(path, RunClasses, others=True))
    if classes.class_labels:
        found["num_classes"] = len(classes.class_labels)
    elif classes.mapping in LABEL_SETS:
        found["num_classes"] = len(label_set(str(classes.mapping)))
    return found


def load(recipe: PlanRecipe) -> DsCoPipeline:
    """The pipeline that is to be predicted; a preset has shapes only, unless this machine is to be measured."""
    if (recipe.preset is None) == (recipe.generator is None):
        raise ValueError(f"Give either `--generator` (a folder or Hub id) or `--preset`, one of {list(PRESETS)}.")
    for name, value, allowed in (
        ("dtype", recipe.dtype, ["float32", "bfloat16", "float16"]),
        ("device", recipe.device, ["here", *DEVICES]),
        ("preset", recipe.preset, [None, *PRESETS]),
    ):
        if value not in allowed:
            known = [choice for choice in allowed if choice is not None]
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}.{nearest(str(value), known)}")
    assumed_seconds({}, peak_tflops=recipe.peak_tflops or 1.0, utilisation=recipe.utilisation)
    dtype = getattr(torch, recipe.dtype)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.preset is not None:
        return imagenet_pipeline(device=here if recipe.device == "here" else "meta", dtype=dtype, tiny=recipe.tiny)
    check_made(Path(__file__).parent, {"generator": recipe.generator, "classifier": recipe.classifier})
    options: dict[str, Any] = {}
    if recipe.classifier is not None:
        options["classifier"] = load_classifier(recipe.classifier, revision=recipe.classifier_revision, dtype=dtype)
    if recipe.preview_vae is not None:
        options["preview_vae"] = load_model(
            AutoencoderTiny, recipe.preview_vae, revision=recipe.preview_vae_revision, dtype=dtype
        )
    pipe = DsCoPipeline.from_pretrained(
        recipe.generator, revision=recipe.generator_revision, dtype=dtype, **options
    ).to(here)
    if pipe.classifier is None and not recipe.plain:
        raise ValueError(
            f"{recipe.generator} has no classifier: name one with `--classifier`, or plan `--plain true`."
        )
    return pipe


def with_defaults(recipe: PlanRecipe, pipe: DsCoPipeline) -> PlanRecipe:
    """Fills in what depends on the preset or the pipeline."""
    classes, population, guidance = PRESETS.get(recipe.preset or "", (pipe.num_classes, 0, 4.0))
    return dataclasses.replace(
        recipe,
        num_classes=recipe.num_classes or min(classes, pipe.num_classes),
        population=population if recipe.population is None else recipe.population,
        guidance_scale=guidance if recipe.guidance_scale is None else recipe.guidance_scale,
    )


def run_options(recipe: PlanRecipe) -> dict[str, Any]:
    """Arguments of `predict` that the recipe holds."""
    names = ("num_classes", "block_size", "images_per_call", "population", "features")
    return {"sampling": sampling_of(recipe)} | {name: getattr(recipe, name) for name in names}


def sampling_of(recipe: PlanRecipe) -> Sampling:
    """How the images are drawn."""
    sampling = Sampling.of(**from_flat({name: getattr(recipe, name) for name in _OF_A_CALL}))
    return dataclasses.replace(sampling, method=Plain()) if recipe.plain else sampling


def uses_extractor(recipe: PlanRecipe) -> bool:
    """Whether the random network of the released algorithm has a part in it."""
    return isinstance(sampling_of(recipe).method, Released)


def rates(recipe: PlanRecipe, pipe: DsCoPipeline, costs: dict[str, PassCost]) -> tuple[dict[str, float], str]:
    """Seconds of one image's pass by kind, and a sentence on where they come from."""
    if recipe.device == "here":
        units = plan_units(
            recipe.num_classes or 1, max(recipe.images_per_class), block_size=recipe.block_size,
            images_per_call=recipe.images_per_call,
        )  # fmt: skip
        images = max(unit.images for unit in units)
        batch = min(images, recipe.batch_size or images)
        seconds = probe_seconds(
            pipe, batch, guidance_scale=recipe.guidance_scale or 1.0, images_per_class=recipe.block_size,
            features=recipe.features, extractor=uses_extractor(recipe),
        )  # fmt: skip
        return seconds, f"Measured on this machine's {pipe.device.type}, passes of {batch} images, {recipe.dtype}."
    peak = recipe.peak_tflops or DEVICES[recipe.device][0]
    seconds = assumed_seconds(costs, peak_tflops=peak, utilisation=recipe.utilisation)
    return seconds, (
        f"Predictions, not measurements. Assumed: {recipe.device}, {100 * recipe.utilisation:g} % of {peak:g} TFLOP/s "
        f"({recipe.dtype}) in every model; counted FLOPs of matrix multiplications and convolutions only."
    )


def memory_of(recipe: PlanRecipe, pipe: DsCoPipeline) -> float:
    """Bytes of the device's memory."""
    if recipe.memory_gib is not None:
        return recipe.memory_gib * 2**30
    if recipe.device != "here":
        return DEVICES[recipe.device][1] * 2**30
    if pipe.device.type == "cuda":
        return torch.cuda.get_device_properties(pipe.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def row(
    recipe: PlanRecipe, pipe: DsCoPipeline, costs: dict[str, PassCost], found: Prediction, device_bytes: float
) -> dict[str, Any]:
    """One budget: what it costs, and the largest batch that the device can hold (0: it cannot)."""
    per_call = plan_units(
        recipe.num_classes or 1, found.images_per_class, block_size=recipe.block_size,
        images_per_call=recipe.images_per_call,
    )  # fmt: skip
    images = max(unit.images for unit in per_call) * sampling_of(recipe).method.candidates
    limit = min(images, recipe.batch_size or images)
    fitting = largest_batch(
        pipe, images, costs, MEMORY_SHARE * device_bytes, optimised=found.passes.get("update", 0) > 0,
        guidance_scale=recipe.guidance_scale or 1.0,
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


def as_markdown(recipe: PlanRecipe, plan: dict[str, Any]) -> str:
    """The plan as a table, with what it rests on."""
    one, several = ("process", "processes") if recipe.device == "here" else ("GPU", "GPUs")
    names = [f"time on {count} {one if count == 1 else several}" for count in recipe.num_processes]
    header = ["images per class", "images", "denoiser calls", "PFLOP", "memory", "fits", *names]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for found in plan["rows"]:
        fits = "yes" if found["fits"] else f"with batch_size {found['batch_size']}" if found["batch_size"] else "no"
        times = [duration(found["seconds"][count]) for count in recipe.num_processes]
        cells = [
            f"{found['images_per_class']:,}", f"{found['images']:,}", f"{found['denoiser_calls']:,}",
            significant(found["pflop"]), f"{found['memory_gib']:.1f} GiB", fits, *times,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", plan["source"], *notes(recipe, plan)]
    return "\n".join(lines)


def notes(recipe: PlanRecipe, plan: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    calls = plan["rows"][0]
    found = [
        f"{recipe.num_classes} classes, {recipe.num_inference_steps} steps, guidance {recipe.guidance_scale:g}, "
        f"{'plain sampling' if recipe.plain else recipe.objective}; calls of up to {calls['images_per_call']} images. "
        f"Memory is that of tensors, {plan['weights_gib']:.2f} GiB of it weights; a batch fits if it takes at most "
        f"{100 * MEMORY_SHARE:.0f} % of {plan['device_memory_gib']:.0f} GiB. Time is that of the slowest process."
    ]
    if recipe.population and not recipe.plain:
        found.append(
            f"The targets need {recipe.population * (recipe.num_classes or 1):,} real images through the classifier "
            f"once, {duration(plan['targets_seconds'])} of one device beside reading and decoding them."
        )
    groups = {len(plan_groups(recipe, budget)) for budget in recipe.images_per_class}
    if max(recipe.num_processes) > min(groups):
        found.append(
            f"There are only {min(groups)} groups of classes: more processes stay idle. A smaller "
            "`images_per_call` makes more groups."
        )
    found += [
        f"Within {recipe.max_hours:g} h on {count}: {budget:,} images per class."
        for count, budget in plan["largest_budgets"].items()
    ]
    return found


def plan_groups(recipe: PlanRecipe, images_per_class: int) -> set[int]:
    """The groups of classes that processes share out among themselves."""
    units = plan_units(
        recipe.num_classes or 1, images_per_class, block_size=recipe.block_size,
        images_per_call=recipe.images_per_call,
    )  # fmt: skip
    return {unit.group for unit in units}


def significant(value: float) -> str:
    """A positive number with three digits or all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in a unit that people read."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


if __name__ == "__main__":
    main()
