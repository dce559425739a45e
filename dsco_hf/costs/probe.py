"""How long a concentration's passes take on this machine: a few real steps of the pipeline itself."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import ResNetConfig, ResNetForImageClassification

from ..data.images import to_signed
from ..generators.base import family_of
from ..generators.families.dit import dit_xl_2
from ..generators.families.pixart import pixart_512
from ..generators.families.stable_diffusion import sd_1_5, sdxl
from ..generators.families.stable_diffusion_3 import sd3_medium
from ..generators.steps import Scheduler
from ..matching.feature_spec import FeatureSource
from ..matching.targets import MatchingTargets
from ..sampling.call import Sampling, Targets
from ..sampling.methods import JointTargets
from ..sampling.pipeline import DsCoPipeline
from ..utils.values import check_choice, plain_arguments
from .passes import Rehearsal, stand_in_targets


FEWEST_STEPS = 3  # the first has kernels to load, the last has no noise
Mark = tuple[float, Counter[str]]


@plain_arguments(images=1, images_per_class=1, repeats=1)
def probe_seconds(
    rehearsal: Rehearsal,
    images: int,
    *,
    images_per_class: int = 10,
    embedding_dim: int = 2048,
    repeats: int = 3,
    max_seconds: float = 10.0,
) -> dict[str, float]:
    """Seconds of one image's pass by kind, see `KINDS`, of whole calls with few steps; the first is not counted.

    A step without optimisation gives those of the denoiser, one with optimisation those of all networks in it alike,
    whose shares are those of the run; what remains of a call, the decoder too, is that of an image ("call").

    Args:
        rehearsal ([`Rehearsal`]): of the pipeline on the device that will be used, and how images are drawn. Weights
            may be random: they do not change the time.
        images (`int`): of a call, as in the run that is to be predicted. With micro-batches two of them are done.
        images_per_class (`int`): images that are optimised jointly.
        embedding_dim (`int`): of the targets.
        repeats (`int`): calls, besides the first.
        max_seconds (`float`): no further call begins after this time.

    Raises:
        ValueError: for a number below 1, or a call that the pipeline refuses.
    """
    pipe, sampling = rehearsal.pipe, few_steps(rehearsal)
    candidates, batch_size = sampling.method.candidates, sampling.batch_size or images * sampling.method.candidates
    images = min(images, -(-2 * batch_size // candidates))
    labels = [index // images_per_class % pipe.num_classes for index in range(images)]
    targets = stand_in_targets(pipe, sampling.method, features=rehearsal.features, embedding_dim=embedding_dim)
    if isinstance(targets, MatchingTargets | JointTargets):
        targets = targets.to(pipe.device)
    runs: list[list[Mark]] = []
    while len(runs) <= repeats and (len(runs) < 2 or sum(run[-1][0] for run in runs[1:]) < max_seconds):
        runs.append(timed_call(pipe, labels, targets, sampling))
    found = rates(runs[1:], images)
    if targets is not None and pipe.classifier is not None:
        source = FeatureSource(pipe, rehearsal.features)
        pixels = to_signed(torch.rand(images, pipe.num_channels, pipe.image_size, pipe.image_size))
        seconds = median_seconds(
            lambda: source.of_pixels(pixels), pipe.device, repeats=repeats, max_seconds=max_seconds
        )
        found["embedding"] = seconds / images
    return found


def few_steps(rehearsal: Rehearsal) -> Sampling:
    """The same sampling with the fewest steps among which one is optimised, if one of its own is."""
    sampling = rehearsal.sampling
    steered = set(rehearsal.passes(1))
    for steps in range(min(FEWEST_STEPS, sampling.num_inference_steps), sampling.num_inference_steps):
        few = dataclasses.replace(sampling, num_inference_steps=steps)
        if set(Rehearsal(rehearsal.pipe, few, rehearsal.features).passes(1)) == steered:
            return few
    return sampling


def timed_call(pipe: DsCoPipeline, labels: list[int], targets: Targets | None, sampling: Sampling) -> list[Mark]:
    """Seconds since the beginning, and passes so far, after every step of a call and at its end."""
    marks: list[Mark] = []
    begin = time.perf_counter()

    def mark(i: int, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        synchronize(pipe.device)
        marks.append((time.perf_counter() - begin, Counter(call.counts)))
        return latents

    generators = [torch.Generator().manual_seed(index) for index in range(len(labels))]
    call = pipe.start_call(labels, targets, sampling, generator=generators)
    pipe.draw(call, "pil", mark)
    synchronize(pipe.device)
    return [*marks, (time.perf_counter() - begin, marks[-1][1])]


def rates(runs: list[list[Mark]], images: int) -> dict[str, float]:
    """Seconds of one pass by kind from the marks of equal calls; of their steps the first counts only if alone."""
    steps = [
        (after[0] - before[0], after[1] - before[1])
        for run in runs
        for before, after in zip(run[:-2], run[1:-1], strict=True)
    ]
    steps = steps or [run[0] for run in runs]
    passes = runs[0][-1][1]
    others = [kind for kind in passes if kind != "denoiser"]
    plain = [(seconds, counts) for seconds, counts in steps if not any(counts[kind] for kind in others)]
    denoiser = statistics.median(seconds / counts["denoiser"] for seconds, counts in plain or steps)
    rest = [
        (seconds - denoiser * counts["denoiser"]) / more
        for seconds, counts in steps if (more := sum(counts[kind] for kind in others))
    ]  # fmt: skip
    other = max(0.0, statistics.median(rest)) if rest else 0.0
    found = {"denoiser": denoiser, **dict.fromkeys(others, other)}
    total = statistics.median(run[-1][0] for run in runs)
    found["call"] = max(0.0, total - sum(count * found[kind] for kind, count in passes.items())) / images
    if "extractor_backward" in found:
        found["extractor"] = other / 2  # forward only
    return found


def median_seconds(
    run: Callable[[], object], device: torch.device, *, repeats: int = 3, max_seconds: float = 10.0
) -> float:
    """Median wall time of a function, after one run that is not counted; arguments as of [`probe_seconds`]."""
    run()
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < max_seconds):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Waits for what the device has been given; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Networks whose shapes a plan can be made for: the pipeline's, for so many classes, and its prompts.
SHAPES = {"dit-xl-2": None, "sd-1.5": sd_1_5, "sdxl": sdxl, "pixart-512": pixart_512, "sd3-medium": sd3_medium}


def imagenet_pipeline(
    *,
    shapes: str = "dit-xl-2",
    prompted: int | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
    preview: bool = True,
    tiny: bool = False,
    seed: int = 0,
) -> DsCoPipeline:
    """The shapes of facebook/DiT-XL-2-256, its AutoencoderKL, an AutoencoderTiny and microsoft/resnet-18 at 224 px.

    Args:
        shapes (`str`): of another generator, of `SHAPES`, in the place of DiT-XL/2.
        prompted (`int`, *optional*): classes that it has prompts for, whose encoded rows take memory; all if None.
        device (`str` or `torch.device`): "meta" has shapes only, and needs no memory.
        dtype (`torch.dtype`): of all weights.
        preview (`bool`): whether there is a preview decoder.
        tiny (`bool`): the same classes at a size that tests can run.
        seed (`int`): of the weights; the global random state is left as it is.
    """
    check_choice("shapes", shapes, list(SHAPES))
    channels, widths, depths, classes, image_size = [128, 256, 512, 512], [64, 128, 256, 512], [2] * 4, 1000, 224
    preview_options: dict[str, Any] = {}
    if tiny:
        channels, widths, depths, classes, image_size = [8, 8], [4, 8], [1, 1], 4, 24
        for part in ("encoder", "decoder"):
            preview_options |= {f"{part}_block_out_channels": (8, 8), f"num_{part}_blocks": (1, 1)}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are drawn in their own type: a float32 copy would need twice the memory
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            make = SHAPES[shapes]
            denoiser, prompts = (dit_xl_2(tiny=tiny), None) if make is None else make(prompted or classes)
            vae = AutoencoderKL(
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * len(channels),
                up_block_types=("UpDecoderBlock2D",) * len(channels),
                layers_per_block=2,
                latent_channels=denoiser.config.in_channels,
                norm_num_groups=min(32, channels[0]),
                sample_size=denoiser.config.sample_size * 2 ** (len(channels) - 1),
            )
            preview_options["latent_channels"] = denoiser.config.in_channels
            preview_vae = AutoencoderTiny(**preview_options) if preview else None
            config = ResNetConfig(
                embedding_size=widths[0], hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=classes
            )
            # what the preprocessor_config.json of such a checkpoint says
            config.image_size, config.image_mean, config.image_std = image_size, [0.485, 0.456, 0.406], [0.229] * 3
            classifier = ResNetForImageClassification(config)
    finally:
        torch.set_default_dtype(before)
    for module in (denoiser, vae, preview_vae, classifier, prompts):
        if module is not None:  # some buffers are made on the CPU, or in float32, whatever the defaults are
            torch.nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of models whose types are mixed
            module.eval().requires_grad_(False)
    scheduler: Scheduler = DDIMScheduler(clip_sample=False, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    if family_of(denoiser).flow:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = DsCoPipeline(denoiser, scheduler, vae=vae, classifier=classifier, preview_vae=preview_vae, prompts=prompts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
