"""What concentration costs, known before it runs: passes through each model, FLOPs, memory and time.

Passes are counted with the arithmetic that the pipeline and the methods use, so they are exact. FLOPs and memory are
counted by tracing one pass of each kind at its real shape without computing it (fake or meta tensors). Seconds are
passes times the seconds of one pass, which are either measured by a short probe ([`probe_seconds`]) or assumed from a
device's peak rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler

from ..concentration.concentrate import BLOCK_SIZE, IMAGES_PER_CALL, Unit, divide, plan_units
from ..matching.feature_spec import Features, FeatureSource, feature_specs
from ..sampling.call import Sampling
from ..sampling.pipeline import DsCoPipeline
from ..sampling.released import RandomExtractor
from ..utils.values import plain_arguments
from .tracing import PassCost as PassCost
from .tracing import Tracer, modules_of


# Kinds of passes; each is counted in images. "preview" is the decoder that noise is optimised with: the preview
# decoder, or the full one where there is none. A `_backward` pass is forward and backward to its input.
KINDS = {
    "denoiser": "denoiser, at a sampling step",
    "lookahead": "denoiser, at a look-ahead",
    "decoder": "decoder, of the finished images",
    "preview": "decoder while optimising, forward only",
    "preview_backward": "decoder while optimising, forward and backward",
    "classifier": "classifier, forward only",
    "classifier_backward": "classifier, forward and backward",
    "extractor": "random network, forward only",
    "extractor_backward": "random network, forward and backward",
    "embedding": "classifier, of finished blocks",
    "further_networks": "further networks, where features come from several; their work is that of `classifier`",
    "step": "noise and scheduler of a sampling step",
    "update": "objective and update of the noise",
    "call": "checks and conversions, once per image and call",
}
_CALLS = {
    "denoiser_calls": ("denoiser", "lookahead"),
    "decoder_calls": ("decoder", "preview", "preview_backward"),
    "classifier_calls": ("classifier", "classifier_backward", "extractor_backward", "further_networks"),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a concentration will cost.

    Attributes:
        images_per_class, images (`int`): the budget, and images altogether.
        passes (`dict[str, int]`): images by kind of pass, see `KINDS`.
        flops (`float`): of all passes.
        memory_bytes (`int`): tensors of one process at the most: weights, activations of one micro-batch and the
            state of one call. On a CPU the process itself and the libraries' workspace come on top.
        seconds (`dict[int, float]`): wall time by number of processes.
    """

    images_per_class: int
    images: int
    passes: dict[str, int]
    flops: float
    memory_bytes: int
    seconds: dict[int, float]

    @property
    def calls(self) -> dict[str, int]:
        """The calls that a `ConcentrationReport` will show."""
        return calls(self.passes)


def calls(passes: Mapping[str, int]) -> dict[str, int]:
    """`denoiser_calls`, `decoder_calls` and `classifier_calls`, as in [`DsCoPipelineOutput`]."""
    return {name: sum(passes.get(kind, 0) for kind in kinds) for name, kinds in _CALLS.items()}


def count_passes(
    pipe: DsCoPipeline,
    images: int,
    sampling: Sampling,
    *,
    features: Features = None,
    output_type: str = "pt",
) -> Counter[str]:
    """Images that pass through each model in one call of the pipeline, with the targets that the method needs.

    Args:
        pipe (`DsCoPipeline`): its components decide what there is to pass through.
        images (`int`): images that the call is asked for.
        sampling ([`Sampling`]): how they are drawn.
        features (*optional*): what the targets match, see [`dsco_hf.matching.feature_spec.feature_specs`].
        output_type (`str`): latents are not decoded.

    Returns:
        `Counter`: images by kind, see `KINDS`. The passes of target images are not among them, see
            [`SamplingMethod.target_passes`].
    """
    method = sampling.method
    steps, drawn = scheduler_steps(pipe, sampling.num_inference_steps), images * method.candidates
    passes = Counter({"denoiser": drawn * steps * (2 if sampling.guidance_scale > 1 else 1), "step": drawn * steps})
    passes["call"] = drawn
    decoded = pipe.vae is not None and (output_type != "latent" or method.candidates > 1)
    passes["decoder"] = drawn if decoded else 0
    return passes + method.passes(pipe, drawn, steps, sampling, features)


def scheduler_steps(pipe: DsCoPipeline, num_inference_steps: int) -> int:
    """Sampling steps that the pipeline's scheduler really takes."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    return len(scheduler.timesteps)


def count_unit(
    pipe: DsCoPipeline, unit: Unit, sampling: Sampling, *, last: bool, population: int = 0, features: Features = None
) -> Counter[str]:
    """Passes of one unit of a run, see [`dsco_hf.concentrate.plan_units`].

    Args:
        pipe (`DsCoPipeline`): see [`count_passes`].
        unit (`Unit`): a block of images of some classes.
        sampling ([`Sampling`]): how they are drawn.
        last (`bool`): whether it is the last block: the images of all others are embedded for those that follow.
        population (`int`): real images per class, which only some methods pass through a model.
        features (*optional*): see [`count_passes`].
    """
    method = sampling.method
    passes = count_passes(pipe, unit.images, sampling, features=features)
    if method.memory is not None and not last:
        passes["embedding"] = unit.images
    if unit.block == 0:
        once = method.target_passes(population, scheduler_steps(pipe, sampling.num_inference_steps))
        passes += Counter({kind: count * len(unit.rows) for kind, count in once.items()})
    return passes


@plain_arguments()
def count_run(
    pipe: DsCoPipeline,
    num_classes: int,
    images_per_class: int,
    sampling: Sampling,
    *,
    block_size: int = BLOCK_SIZE,
    images_per_call: int = IMAGES_PER_CALL,
    population: int = 0,
    features: Features = None,
) -> Counter[str]:
    """Passes of a whole concentration; arguments as of [`dsco_hf.concentrate.concentrate`] and [`count_unit`]."""
    units = plan_units(num_classes, images_per_class, block_size=block_size, images_per_call=images_per_call)
    total: Counter[str] = Counter()
    for _, passes in _by_unit(pipe, units, sampling, population=population, features=features):
        total += passes
    return total


def _by_unit(
    pipe: DsCoPipeline, units: Sequence[Unit], sampling: Sampling, **options: Any
) -> Iterable[tuple[Unit, Counter[str]]]:
    """Units and their passes; units of the same size are counted once."""
    final = units[-1].block
    known: dict[tuple[int, int, bool, bool], Counter[str]] = {}
    for unit in units:
        key = (len(unit.rows), len(unit.indices), unit.block == final, unit.block == 0)
        if key not in known:
            known[key] = count_unit(pipe, unit, sampling, last=unit.block == final, **options)
        yield unit, known[key]


@plain_arguments()
def predict(
    pipe: DsCoPipeline,
    num_classes: int,
    images_per_class: int,
    sampling: Sampling,
    *,
    costs: Mapping[str, PassCost],
    seconds: Mapping[str, float],
    num_processes: Sequence[int] = (1,),
    block_size: int = BLOCK_SIZE,
    images_per_call: int = IMAGES_PER_CALL,
    population: int = 0,
    features: Features = None,
) -> Prediction:
    """Predicts a concentration.

    Args:
        pipe (`DsCoPipeline`): see [`count_passes`].
        num_classes (`int`): classes that are drawn.
        images_per_class (`int`): the budget.
        sampling ([`Sampling`]): how they are drawn.
        costs (`dict[str, PassCost]`): from [`pass_costs`].
        seconds (`dict[str, float]`): of one image's pass by kind, measured or from [`assumed_seconds`].
        num_processes (sequence of `int`): each has a device of its own. The slowest process's share counts, as runs
            divide it.
        block_size (`int`): images of a class that are optimised jointly.
        images_per_call (`int`): images that are drawn in one call at most.
        population (`int`): see [`count_unit`].
        features (*optional*): likewise.

    Raises:
        ValueError: for a number below 1.
    """
    units = plan_units(num_classes, images_per_class, block_size=block_size, images_per_call=images_per_call)
    total: Counter[str] = Counter()
    by_group: dict[int, float] = defaultdict(float)
    for unit, passes in _by_unit(pipe, units, sampling, population=population, features=features):
        total += passes
        by_group[unit.group] += sum(count * seconds.get(kind, 0.0) for kind, count in passes.items())
    shares = {count: divide(units, count) for count in num_processes}
    return Prediction(
        images_per_class=images_per_class,
        images=num_classes * images_per_class,
        passes=dict(total),
        flops=sum(count * costs[kind].flops for kind, count in total.items() if kind in costs),
        memory_bytes=predict_memory(
            pipe,
            max(unit.images for unit in units) * sampling.method.candidates,
            costs,
            optimised=total["update"] > 0,
            guidance_scale=sampling.guidance_scale,
            batch_size=sampling.batch_size,
        ),
        seconds={
            count: max(sum(by_group[group] for group in share) for share in shares[count]) for count in num_processes
        },
    )


@plain_arguments()
def predict_memory(
    pipe: DsCoPipeline,
    images: int,
    costs: Mapping[str, PassCost],
    *,
    optimised: bool = True,
    guidance_scale: float = 4.0,
    batch_size: int | None = None,
) -> int:
    """Bytes of tensors at the most in one call: weights, activations of one micro-batch, and the call's own state.

    Args:
        pipe (`DsCoPipeline`): its weights count once each.
        images (`int`): drawn in the call.
        costs (`dict[str, PassCost]`): from [`pass_costs`].
        optimised (`bool`): whether gradients are taken.
        guidance_scale (`float`): with guidance, both branches pass through the denoiser together.
        batch_size (`int`, *optional*): images per pass; all at once if None.
    """
    batch = min(images, batch_size or images)
    branches = 2 if guidance_scale > 1 else 1
    kinds = {"denoiser": branches, "decoder": 1} | ({"preview_backward": 1} if optimised else {})
    activations = max(costs[kind].memory * factor for kind, factor in kinds.items() if kind in costs)
    denoiser = pipe.denoiser
    latent = math.prod(pipe.latent_shape) * denoiser.dtype.itemsize
    # x_t, the noise, the prediction, the look-ahead, x_{t-1}, the gradient; images in their own type and in float32
    state = images * (6 * latent + pipe.num_channels * pipe.image_size**2 * (denoiser.dtype.itemsize + 8))
    return weight_bytes(pipe) + batch * activations + state


def largest_batch(
    pipe: DsCoPipeline, images: int, costs: Mapping[str, PassCost], memory_bytes: float, **options: Any
) -> int:
    """The largest `batch_size` with which a call of `images` fits into `memory_bytes`; 0 if none does.

    Other arguments as of [`predict_memory`].
    """
    fits = 0
    low, high = 1, images
    while low <= high:  # memory grows with the batch
        middle = (low + high) // 2
        if predict_memory(pipe, images, costs, batch_size=middle, **options) <= memory_bytes:
            fits, low = middle, middle + 1
        else:
            high = middle - 1
    return fits


def weight_bytes(pipe: DsCoPipeline) -> int:
    """Bytes of all components' parameters and buffers."""
    tensors = {id(t): t for module in modules_of(pipe) for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def assumed_seconds(costs: Mapping[str, PassCost], *, peak_tflops: float, utilisation: float) -> dict[str, float]:
    """Seconds of one image's pass on a device of which a constant share of the peak rate is used.

    Args:
        costs (`dict[str, PassCost]`): from [`pass_costs`].
        peak_tflops (`float`): of matrix multiplications in the models' precision, 10¹² operations per second.
        utilisation (`float`): the share that is reached, in (0, 1].

    Raises:
        ValueError: for a rate or a share out of range.
    """
    if not (peak_tflops > 0 and math.isfinite(peak_tflops)):
        raise ValueError(f"`peak_tflops` must be a positive number, got {peak_tflops!r}: 312 is that of an A100.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"`utilisation` must be in (0, 1], got {utilisation!r}: 0.4 is usual.")
    return {kind: cost.flops / (peak_tflops * 1e12 * utilisation) for kind, cost in costs.items()}


def pass_costs(pipe: DsCoPipeline, *, features: Features = None, extractor: bool = False) -> dict[str, PassCost]:
    """FLOPs and memory of one image's pass of every kind, without computing it.

    Args:
        pipe (`DsCoPipeline`): on any device, also on "meta".
        features (*optional*): what the targets match, see [`dsco_hf.matching.feature_spec.feature_specs`].
        extractor (`bool`): also those of the random network of `Released`.
    """
    denoiser, latent = pipe.denoiser, (1, *pipe.latent_shape)
    pixel = (1, pipe.num_channels, pipe.image_size, pipe.image_size)

    def denoise(x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return pipe.family.forward(x, zeros, zeros)

    trace = Tracer(pipe)
    costs = {"denoiser": trace(denoise, latent)}
    costs["lookahead"] = costs["denoiser"]
    if pipe.vae is not None:
        costs["decoder"] = costs["preview"] = trace(pipe.decode_latents, latent)
    if pipe.preview_vae is not None:
        costs["preview"] = trace(lambda x: pipe.decode_latents(x, preview=True), latent)
    if pipe.classifier is not None:
        source = FeatureSource(pipe, feature_specs(features))
        look = looker(source)
        seen = pixel if source.needs_pixels else latent
        costs["classifier"] = costs["embedding"] = trace(look, seen)
        costs["classifier_backward"] = trace(look, seen, backward=True)
        costs["preview_backward"] = PassCost(0, costs["classifier_backward"].memory)
        if source.needs_pixels and "preview" in costs:
            both = trace(lambda x: look(pipe.decode_latents(x, preview=True)), latent, backward=True)
            costs["preview_backward"] = PassCost(both.flops - costs["classifier_backward"].flops, both.memory)
    if extractor:
        network = RandomExtractor(latent[1]).to(denoiser.device, denoiser.dtype)
        trace = Tracer(pipe, network)
        costs["extractor"] = trace(network, latent)
        costs["extractor_backward"] = trace(network, latent, backward=True)
    return costs


def looker(source: FeatureSource) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sum of what the networks see in pixels, or in latents if none takes pixels: something to take a gradient of.

    Where both are needed, the latents are zeros: their network's work is counted, though not its part of the gradient.
    """

    def look(x: torch.Tensor) -> torch.Tensor:
        latents = None
        if source.needs_latents:
            latents = x.new_zeros(len(x), *source.latent_shape) if source.needs_pixels else x
        seen = source(x.clamp(-1, 1) if source.needs_pixels else None, latents)
        return seen.features.sum()

    return look
