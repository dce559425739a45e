"""D3HR: images begin at latents that are drawn with the statistics of the class's own inverted latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from ...data.schema import image_seed
from ...generators.steps import Level, Steps, level_at, noised, prediction_type, split
from ...matching.population import refuse_empty_classes
from ...utils.values import Limits
from ..call import Call, Population, Sampling, SamplingMethod
from .statistics import ClassStatistics, check_statistics, refuse_without_images, stand_in, stream_classes


VALUES_AT_ONCE = 2**22  # of groups that are compared, 16 MiB


@dataclasses.dataclass(frozen=True)
class D3HR(SamplingMethod):
    """Diffusion inversion with group sampling (Zhao et al., "Taming Diffusion for Dataset Distillation", ICML 2025).

    All real latents are inverted by DDIM to a noise level, where each class has a mean μ and a deviation σ of every
    value. Of m groups of as many latents as images are wanted, drawn from N(μ, σ²), the one stays whose own mean and
    deviation are nearest to these, with a small part of skewness: ‖mean - μ‖ + ‖deviation - σ‖ + w·‖skewness‖. From
    there DDIM denoises it, without noise.

    As published but for this: groups are those of a block, as sets grow by blocks; guidance scale and steps are those
    of [`Sampling`], theirs being 4 and 50; the skewness is that of each standardised latent over its values; inversion
    and denoising use the same steps, where theirs inverts by more of them.

    Attributes:
        start (`float`): share of the steps that is left out; the level of the first that is done is inverted to.
            Theirs: 18 of 50.
        groups (`int`): m.
        skew (`float`): w.
    """

    sentence: ClassVar[str] = (
        "A frozen class-conditional diffusion model drew the synthetic images from latents with the statistics of the "
        "inverted real images of each class."
    )
    targets_class: ClassVar[type | None] = ClassStatistics
    statistics: ClassVar[str] = "inverted"
    adds_noise: ClassVar[bool] = False
    start: float = 0.36
    groups: int = 100_000
    skew: float = 0.1

    field_limits = {"start": Limits(0, 1), "groups": 1, "skew": 0}

    def first(self, steps: int) -> int:
        """The first of so many steps that is done."""
        return min(round(self.start * steps), steps - 1)

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError for anything but statistics of the generator's size."""
        check_statistics(self.name, "inverted", targets, dict.fromkeys(("means", "deviations"), pipe.latent_shape))

    def stand_in_targets(self, pipe: DiffusionPipeline) -> ClassStatistics:
        """Standard noise."""
        zeros = torch.zeros(pipe.num_classes, *pipe.latent_shape)
        return stand_in(pipe, "inverted", {"means": zeros, "deviations": torch.ones_like(zeros)})

    def rehearsed(self) -> SamplingMethod:
        """Of one group: groups pass through no network."""
        return dataclasses.replace(self, groups=1)

    def make_targets(
        self, pipe: DiffusionPipeline, given: Population, sampling: Sampling, **options: Any
    ) -> ClassStatistics:
        """Mean and deviation of the inverted latents of each class; arguments as of [`SamplingMethod.make_targets`].

        Raises:
            ValueError: for classes without images.
        """
        refuse_without_images(self.name, given)
        family = pipe.family
        spacing = {"tokens": family.tokens, "own_spacing": family.own_spacing}
        steps = Steps(pipe.scheduler, sampling.num_inference_steps, **spacing)
        times = steps.timesteps[self.first(len(steps)) :].flip(0).tolist()
        return inverted_statistics(given, pipe, times, sampling.guidance_scale, **options)

    def begin(self, call: Call) -> tuple[torch.Tensor, int]:
        """The best group of each class `(B, C, h, w)`, and the step whose level it has.

        Raises:
            ValueError: for statistics of another level.
        """
        first = self.first(len(call.timesteps))
        level, made_for = call.timesteps[first].item(), call.targets.provenance.get("timestep")
        if made_for not in (None, level):
            raise ValueError(
                f"These targets were inverted to t = {made_for:g}, and {len(call.timesteps)} steps begin at "
                f"t = {level:g}: make them for as many steps."
            )
        call.steps.eta = 0.0
        means, deviations = call.targets.of_call(call, "means"), call.targets.of_call(call, "deviations")
        chosen = torch.empty_like(means)
        for one in dict.fromkeys(call.ids):
            rows = [row for row, label in enumerate(call.ids) if label == one]
            shape, sigma = means[rows].shape, deviations[rows[0]].flatten().cpu()
            best = best_group(len(rows), sigma, self.groups, self.skew, generator_of(call, rows[0]))
            chosen[rows] = best.view(shape).to(means)
        return means + deviations * chosen, first


def generator_of(call: Call, row: int) -> torch.Generator:
    """A generator of its own for a choice among groups, that follows from those of the call."""
    given = call.generator
    if isinstance(given, Sequence):
        return torch.Generator().manual_seed(image_seed(given[row].initial_seed(), 0, 0, "groups"))
    device = "cpu" if given is None else given.device
    seed = int(torch.randint(2**48, (), generator=given, device=device))
    return torch.Generator().manual_seed(seed)


def best_group(
    images: int, deviations: torch.Tensor, groups: int, skew: float, generator: torch.Generator
) -> torch.Tensor:
    """Standard noise `(n, d)`: of many groups the one whose statistics are nearest to those that it is drawn from.

    Args:
        images (`int`): n.
        deviations (`torch.Tensor` of shape `(d,)`): σ, by which the distances of values are weighted.
        groups (`int`): m.
        skew (`float`): w.
        generator (`torch.Generator`): on the CPU.
    """
    at_once = max(1, VALUES_AT_ONCE // (images * len(deviations)))
    best, least = torch.empty(0), float("inf")
    for first in range(0, groups, at_once):
        drawn = torch.randn(min(at_once, groups - first), images, len(deviations), generator=generator)
        scores = group_scores(drawn, deviations, skew)
        if (score := float(scores.min())) < least:
            best, least = drawn[int(scores.argmin())].clone(), score
    return best


def group_scores(noise: torch.Tensor, deviations: torch.Tensor, skew: float) -> torch.Tensor:
    """‖σ·mean‖ + ‖σ·(deviation - 1)‖ + w·‖skewness‖ of groups of standard noise, `(m,)`: lower is better.

    Args:
        noise (`torch.Tensor` of shape `(m, n, d)`): m groups of n latents.
        deviations (`torch.Tensor` of shape `(d,)`): σ.
        skew (`float`): w, of the skewness of each latent over its values.
    """
    centre = (deviations * noise.mean(dim=1)).norm(dim=1)
    spread = (deviations * (noise.std(dim=1, unbiased=False) - 1)).norm(dim=1)
    away = noise - noise.mean(dim=2, keepdim=True)
    scale = away.square().mean(dim=2).sqrt().clamp_min(torch.finfo(noise.dtype).eps)
    return centre + spread + skew * (away.pow(3).mean(dim=2) / scale.pow(3)).norm(dim=1)


@torch.no_grad()
def invert(
    latents: torch.Tensor, labels: torch.Tensor, pipe: DiffusionPipeline, times: Sequence[float],
    guidance_scale: float,
) -> torch.Tensor:  # fmt: skip
    """DDIM's steps backwards (Song et al. 2021, arXiv 2010.02502): clean latents `(B, C, h, w)` → those of a level.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): x_0.
        labels (`torch.Tensor` of shape `(B,)`): the generator's classes.
        pipe (`DsCoPipeline`): its denoiser is asked once a level.
        times (sequence of `float`): t of the levels, ascending.
        guidance_scale (`float`): of the predictions.
    """
    level, kind = Level(torch.ones(()), torch.zeros(())), prediction_type(pipe.scheduler)
    for t in times:
        clean, noise = split(kind, level, latents, pipe.predict_noise(latents, t, labels, guidance_scale))
        level = level_at(pipe.scheduler, t)
        latents = noised(level, clean, noise)
    return latents


@torch.no_grad()
def inverted_statistics(
    given: Dataset | IterableDataset, pipe: DiffusionPipeline, times: Sequence[float], guidance_scale: float,
    **options: Any,
) -> ClassStatistics:  # fmt: skip
    """`means` and `deviations` `(C, C', h, w)` of the inverted latents of each class, in one pass, summed in float64.

    Arguments are those of [`invert`] and [`~dsco_hf.sampling.peers.statistics.stream_classes`].
    """
    found, batches = stream_classes(given, pipe, **options)
    shape = (len(found.class_names), *pipe.latent_shape)
    sums, squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    counts = torch.zeros(len(sums), dtype=torch.float64)
    ids = torch.tensor(found.class_labels)
    for batch in batches:
        clean = pipe.encode_pixels(batch.pixels, sample_posterior=False).to(pipe._execution_device)
        labels = ids[batch.labels].to(clean.device)
        latents = invert(clean.float(), labels, pipe, times, guidance_scale).cpu().double()
        sums.index_add_(0, batch.labels, latents)
        squares.index_add_(0, batch.labels, latents.square())
        counts += batch.labels.bincount(minlength=len(counts))
    refuse_empty_classes(counts.tolist(), found.class_names)
    means = sums / (number := counts.view(-1, *[1] * (sums.ndim - 1)))
    deviations = (squares / number - means.square()).clamp_min(0).sqrt()
    images = int(counts.sum())
    denoised = images * len(times) * (2 if guidance_scale > 1 else 1)
    passes = {"encoder": images * (pipe.vae is not None), "denoiser": denoised}
    found.provenance |= {"images": images, "passes": passes, "timestep": times[-1]}
    return dataclasses.replace(
        found, kind="inverted", tensors={"means": means.float(), "deviations": deviations.float()}
    )
