"""How long one pass of each kind takes on this machine: a short measurement of the pipeline's own parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from transformers import ResNetConfig, ResNetForImageClassification

from ..generators.dit import dit_xl_2
from ..matching.feature_spec import Features, FeatureSource, feature_specs
from ..matching.features import Observation, feature_dim, probe_features
from ..matching.kernels import draw_frequencies
from ..matching.objectives import rkhs
from ..matching.targets import MatchingTargets
from ..sampling.noise import loss_gradient, shell_step
from ..sampling.pipeline import DsCoPipeline
from ..sampling.released import QuantilePivots, RandomExtractor, quantile_loss, shell_penalty
from ..utils.values import check_whole, plain_arguments
from .passes import looker


@plain_arguments()
def probe_seconds(
    pipe: DsCoPipeline,
    batch_size: int,
    *,
    guidance_scale: float = 4.0,
    images_per_class: int = 10,
    embedding_dim: int = 2048,
    features: Features = None,
    extractor: bool = False,
    repeats: int = 3,
    max_seconds: float = 10.0,
) -> dict[str, float]:
    """Seconds of one image's pass by kind, see `KINDS`; medians of several runs after a first one.

    Args:
        pipe (`DsCoPipeline`): on the device that will be used. Weights may be random: they do not change the time.
        batch_size (`int`): images per pass, as in the run that is to be predicted.
        guidance_scale (`float`): above 1 both branches pass through the denoiser at a sampling step.
        images_per_class (`int`): images that are optimised jointly.
        embedding_dim (`int`): of the targets.
        features (*optional*): what the targets match, see [`dsco_hf.matching.feature_spec.feature_specs`].
        extractor (`bool`): also measure the random network of `Released`.
        repeats (`int`): runs of each kind, besides the first.
        max_seconds (`float`): no further run of a kind begins after this time.

    Raises:
        ValueError: for a number below 1, or a call that the pipeline refuses.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("images_per_class", images_per_class, 1)
    check_whole("repeats", repeats, 1)
    labels = [index // images_per_class % pipe.num_classes for index in range(batch_size)]
    # a step of the pipeline itself: it checks the components and brings weights and kernels to where they are needed
    pipe.sample(labels, seeds=range(batch_size), num_inference_steps=1, guidance_scale=guidance_scale)
    pipe.scheduler.set_timesteps(50, device=pipe.device)
    parts = _parts(pipe, labels, guidance_scale, embedding_dim, features, extractor)
    found = {}
    for kind, (images, run) in parts.items():
        found[kind] = median_seconds(run, pipe.device, repeats=repeats, max_seconds=max_seconds) / images
    if "classifier" in found:
        found["embedding"] = found["classifier"]
    targets = None if pipe.classifier is None else stand_in_targets(pipe, embedding_dim=embedding_dim)
    one_step = median_seconds(
        lambda: pipe.sample(
            labels, targets, seeds=range(batch_size), num_inference_steps=1, guidance_scale=guidance_scale
        ),
        pipe.device,
        repeats=repeats,
        max_seconds=max_seconds,
    )
    branches = parts["denoiser"][0] // batch_size
    known = found["denoiser"] * branches + found["step"] + found.get("decoder", 0.0)
    found["call"] = max(0.0, one_step / batch_size - known)
    return found


def median_seconds(
    run: Callable[[], Any], device: torch.device, *, repeats: int = 3, max_seconds: float = 10.0
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


@plain_arguments()
def stand_in_targets(pipe: DsCoPipeline, *, embedding_dim: int = 2048) -> MatchingTargets:
    """Targets of the right shapes for all of a pipeline's classes, without data: for measurements of cost only."""
    classes, features = range(pipe.num_classes), feature_dim(pipe.classifier)
    generator = torch.Generator().manual_seed(0)
    return MatchingTargets(
        class_names=[pipe.id2label.get(index, str(index)) for index in classes],
        class_labels=list(classes),
        embeddings=torch.zeros(pipe.num_classes, embedding_dim),
        counts=torch.ones(pipe.num_classes),
        feature_mean=torch.zeros(features),
        feature_std=torch.ones(features),
        frequencies=draw_frequencies(features, embedding_dim, 1.0, generator=generator),
        bandwidth=1.0,
        probe=probe_features(pipe.classifier),
    )


def _parts(
    pipe: DsCoPipeline,
    labels: list[int],
    guidance_scale: float,
    embedding_dim: int,
    features: Features,
    extractor: bool,
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Of each kind the images that a run passes through, and the run."""
    count, device, dtype = len(labels), pipe.device, pipe.denoiser.dtype
    generator = torch.Generator().manual_seed(0)
    classes, (t, t_next) = torch.tensor(labels, device=device), pipe.scheduler.timesteps[:2]
    shape = (count, *pipe.latent_shape)
    latents, predicted, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    branches = 2 if guidance_scale > 1 else 1
    generators = [torch.Generator().manual_seed(index) for index in range(count)]
    options = {"eta": 1.0, "use_clipped_model_output": True}

    def advance(z: torch.Tensor) -> torch.Tensor:
        return pipe.scheduler.step(predicted, t, latents, variance_noise=z, **options).prev_sample

    def step() -> torch.Tensor:
        return advance(randn_tensor(shape, generator=generators, device=device, dtype=dtype))

    parts: dict[str, tuple[int, Callable[[], Any]]] = {
        "denoiser": (count * branches, lambda: pipe.predict_noise(latents, t, classes, guidance_scale)),
        "lookahead": (count, lambda: pipe.predict_noise(latents, t, classes, 1.0)),
        "step": (count, step),
    }
    decode, preview = pipe.decode_latents, lambda x: pipe.decode_latents(x, preview=True)
    if pipe.vae is not None:
        parts["decoder"] = (count, torch.no_grad()(lambda: decode(latents)))
    if pipe.vae is not None or pipe.preview_vae is not None:
        parts["preview"] = (count, torch.no_grad()(lambda: preview(latents)))
        parts["preview_backward"] = (count, lambda: loss_gradient(latents, lambda x: preview(x).float().sum()))
    if pipe.classifier is not None:
        source = FeatureSource(pipe, feature_specs(features))
        look = looker(source)
        seen = latents
        if source.needs_pixels:
            seen = torch.rand(count, pipe.num_channels, pipe.image_size, pipe.image_size, generator=generator)
            seen = (seen * 2 - 1).to(device)
        parts["classifier"] = (count, torch.no_grad()(lambda: look(seen)))
        parts["classifier_backward"] = (count, lambda: loss_gradient(seen, look))
        targets = stand_in_targets(pipe, embedding_dim=embedding_dim).to(device)
        pooled = torch.randn(count, targets.feature_dim, generator=generator).to(device)

        def update() -> torch.Tensor:
            loss_gradient(pooled, lambda x: rkhs(Observation(x, x, x), classes, targets))
            _, gradient = loss_gradient(
                noise, lambda z: pipe.scheduler.step(predicted, t_next, advance(z)).pred_original_sample.sum()
            )
            return shell_step(noise, gradient, 0.5)

        parts["update"] = (count, update)
    if extractor:
        parts |= _extractor_parts(pipe, noise, advance)
    return parts


def _extractor_parts(
    pipe: DsCoPipeline, noise: torch.Tensor, advance: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """The passes of `Released`: its loss and update belong to the pass."""
    network: Any = RandomExtractor(noise.shape[1]).to(noise.device, noise.dtype)
    network = network.to(memory_format=torch.channels_last)
    many = noise.repeat(-(-64 // len(noise)), 1, 1, 1)[:64]  # target images come in large batches
    with torch.no_grad():
        width = network(noise[:1]).shape[1]
    still = torch.zeros(len(noise), width, device=noise.device)
    pivots = QuantilePivots(still, still[0], still[0] + 1)

    def losses(z: torch.Tensor) -> torch.Tensor:
        return quantile_loss(network(advance(z)), pivots) + shell_penalty(z)

    return {
        "extractor": (len(many), torch.no_grad()(lambda: network(many))),
        "extractor_backward": (len(noise), lambda: loss_gradient(noise, losses)),
    }


def imagenet_pipeline(
    *,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
    preview: bool = True,
    tiny: bool = False,
    seed: int = 0,
) -> DsCoPipeline:
    """The shapes of facebook/DiT-XL-2-256, its AutoencoderKL, an AutoencoderTiny and microsoft/resnet-18 at 224 px.

    Args:
        device (`str` or `torch.device`): "meta" has shapes only, and needs no memory.
        dtype (`torch.dtype`): of all weights.
        preview (`bool`): whether there is a preview decoder.
        tiny (`bool`): the same classes at a size that tests can run.
        seed (`int`): of the weights; the global random state is left as it is.
    """
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
            denoiser: Any = dit_xl_2(tiny=tiny)
            vae = AutoencoderKL(
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * len(channels),
                up_block_types=("UpDecoderBlock2D",) * len(channels),
                layers_per_block=2,
                latent_channels=4,
                norm_num_groups=min(32, channels[0]),
                sample_size=denoiser.config.sample_size * 2 ** (len(channels) - 1),
            )
            preview_vae = AutoencoderTiny(**preview_options) if preview else None
            config = ResNetConfig(
                embedding_size=widths[0], hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=classes
            )
            # what the preprocessor_config.json of such a checkpoint says
            config.image_size, config.image_mean, config.image_std = image_size, [0.485, 0.456, 0.406], [0.229] * 3
            classifier = ResNetForImageClassification(config)
    finally:
        torch.set_default_dtype(before)
    for module in (denoiser, vae, preview_vae, classifier):
        if module is not None:  # some buffers are made on the CPU, or in float32, whatever the defaults are
            torch.nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of models whose types are mixed
            module.eval().requires_grad_(False)
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    pipe = DsCoPipeline(denoiser, scheduler, vae=vae, classifier=classifier, preview_vae=preview_vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe
