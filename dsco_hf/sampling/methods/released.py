"""The objective that the DsCo authors released: quantiles of random-network features at every noise level.

It is the baseline to beat. Facts from the authors' scripts (repository kkkkqq/Dataset-Concentration); the paper
describes another objective, the one in `dsco_hf.matching.objectives.rkhs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from torch import nn

from ...data.datasets import class_names, iterate_pixels, present_classes
from ...data.labels import Mapped, class_mapping
from ...data.schema import image_seed
from ...generators.steps import Scheduler, level_at, noised
from ...matching.features import RandomExtractor as RandomExtractor
from ...matching.objectives import check_kind
from ...matching.population import refuse_empty_classes, rows_of_labels
from ...utils.values import plain_arguments
from ..call import Call, Plain, Population, Sampling, SamplingMethod
from .noise import momentum_descent
from .nopt import NOISE, check_interval, optimized_steps


# Of images in the random network: what a CPU's caches hold of its activations. The features do not depend on it.
BATCH = 128


@dataclasses.dataclass
class QuantileTargets:
    """Targets of the objective that the DsCo authors released: real images themselves, per class.

    At every noise level they are noised, passed through a random network, sorted per dimension and averaged into as
    many chunks as images are drawn ([`quantile_pivots`]). Unlike [`MatchingTargets`] this is as large as the
    dataset, and there is nothing to save: it is the baseline to compare with.

    Attributes:
        class_names (`list[str]`), class_labels (`list[int]`): as in [`MatchingTargets`].
        latents (`list[torch.Tensor]`): per class, `(n_c, C, H, W)`: pixels in [-1, 1], or scaled VAE latents.
        draws (`int`): noise draws per image and level; the authors use 5.
        seed (`int`): of the random network and of the noise draws.
    """

    class_names: list[str]
    class_labels: list[int]
    latents: list[torch.Tensor]
    draws: int = 5
    seed: int = 0
    _counts: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    _pivots: dict[tuple[int, int, float], QuantilePivots] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    @plain_arguments(draws=1, batch_size=1)
    @torch.no_grad()
    def from_dataset(
        cls,
        dataset: Dataset | IterableDataset,
        pipe: DiffusionPipeline,
        *,
        mapping: Mapped = None,
        image_column: str | None = None,
        label_column: str | None = None,
        on_error: str = "raise",
        draws: int = 5,
        batch_size: int = 64,
        seed: int = 0,
        counts: Sequence[int] = (),
        progress: bool = True,
    ) -> QuantileTargets:
        """Encodes every image of a dataset; arguments as above and in [`MatchingTargets.from_dataset`].

        `counts` are the numbers of images of a class that will be drawn together, where there are several: most of the
        work at a noise level is the same for all of them, and is then done once.
        """
        names = present_classes(dataset, label_column=label_column)
        known = class_names(dataset, label_column=label_column)
        labels = class_mapping(known, pipe.id2label, pipe.num_classes, mapping=mapping, present=names)
        found: list[list[torch.Tensor]] = [[] for _ in names]
        generator = torch.Generator().manual_seed(seed)
        for batch in iterate_pixels(
            dataset,
            image_size=pipe.image_size,
            num_channels=pipe.num_channels,
            image_column=image_column,
            label_column=label_column,
            on_error=on_error,
            batch_size=batch_size,
            classes=names,
            progress=progress,
        ):
            latents = pipe.encode_pixels(batch.pixels, generator=generator).cpu()
            for row in batch.labels.unique().tolist():
                found[row].append(latents[batch.labels == row])
        refuse_empty_classes([len(chunks) for chunks in found], names)
        return cls(names, labels, [torch.cat(chunks) for chunks in found], draws, seed, tuple(counts))

    def rows_of(self, generator_labels: Sequence[int]) -> torch.Tensor:
        """Row of the targets for each of n classes of the generator, `(n,)`; see [`MatchingTargets.rows_of`]."""
        return rows_of_labels(self.class_labels, generator_labels)

    def pivots(
        self, row: int, count: int, timestep: float, extractor: nn.Module, scheduler: Scheduler
    ) -> QuantilePivots:
        """What `count` images of class `row` have to match at one noise level, see [`quantile_pivots`].

        They are kept, as drawing another seed needs them again. All calls must be for one extractor.
        """
        key = (row, count, timestep)
        if key not in self._pivots:
            weight = next(extractor.parameters())
            latents = self.latents[row].to(weight).repeat(self.draws, 1, 1, 1)
            generator = torch.Generator().manual_seed(image_seed(self.seed, row, round(timestep), "pivots"))
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            at_level = noised(level_at(scheduler, timestep), latents, noise)
            with torch.no_grad():
                features = torch.cat([extractor(part) for part in at_level.split(BATCH)])
            found = pivots_by_count(features.float(), {count, *self._counts})
            self._pivots |= {(row, number, timestep): pivots for number, pivots in found.items()}
        return self._pivots[key]


@dataclasses.dataclass
class QuantilePivots:
    """Quantiles of a population's features: `pivots` `(n, d)`, and `mean` and `std` `(d,)` that standardise them."""

    pivots: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def quantile_pivots(features: torch.Tensor, count: int) -> QuantilePivots:
    """Standardises each dimension, sorts it, and averages it in `count` equal chunks: `(N, d)` → pivots `(count, d)`.

    With N not a multiple of `count`, chunks differ by one row at most; with N < `count`, rows are repeated.
    """
    return pivots_by_count(features, [count])[count]


def pivots_by_count(features: torch.Tensor, counts: Iterable[int]) -> dict[int, QuantilePivots]:
    """[`quantile_pivots`] of `(N, d)` for several numbers of images; the features are sorted once."""
    found, ordered = {}, {}
    for count in counts:
        repeats = -(-count // len(features)) if len(features) < count else 1
        if repeats not in ordered:
            rows = features.repeat(repeats, 1)
            mean, std = rows.mean(dim=0), rows.std(dim=0, unbiased=False).clamp_min(1e-6)
            ordered[repeats] = (_sorted_columns((rows - mean) / std), mean, std)
        values, mean, std = ordered[repeats]
        found[count] = QuantilePivots(torch.stack([c.mean(dim=0) for c in values.tensor_split(count)]), mean, std)
    return found


def _sorted_columns(values: torch.Tensor) -> torch.Tensor:
    """Each column of `(N, d)` sorted; on a CPU by NumPy, whose vectorised sort of contiguous rows takes an eighth."""
    rows = values.T.contiguous()
    if rows.is_cpu and rows.dtype == torch.float32:
        return torch.from_numpy(np.sort(rows.numpy(), axis=1)).T.contiguous()
    return rows.sort(dim=1).values.T.contiguous()


def quantile_loss(features: torch.Tensor, target: QuantilePivots, *, strength: float = 0.0005) -> torch.Tensor:
    """s·n·(‖sort(f) - P‖₁ + ‖sort(f) - P‖₂²), f `(n, d)` standardised and sorted per dimension. Lower is better."""
    ordered = ((features - target.mean) / target.std).sort(dim=0).values
    difference = ordered - target.pivots
    return strength * len(features) * (difference.abs().sum() + difference.square().sum())


def shell_penalty(noise: torch.Tensor) -> torch.Tensor:
    """Σ_j |‖z_j‖ - √d| + (‖z_j‖ - √d)²: keeps each noise `(n, ...)` of d values near the Gaussian shell."""
    flat = noise.flatten(1)
    excess = flat.norm(dim=1) - flat.shape[1] ** 0.5
    return (excess.abs() + excess.square()).sum()


@dataclasses.dataclass(frozen=True)
class Released(SamplingMethod):
    """The algorithm that the DsCo authors released: 200 iterations of SGD on the noise of every step.

    Features of x_{t-1} itself are held against those of real latents at the level of t; takes [`QuantileTargets`].

    Attributes:
        iterations (`int`): of SGD, per sampling step.
        start, stop (`float`): where it begins and ends, as fractions of the sampling steps.
    """

    sentence: ClassVar[str] = (
        f"{NOISE} at every step the features of the latents have the quantiles of those of real images."
    )
    targets_class: ClassVar[type | None] = None
    iterations: int = 200
    start: float = 0.0
    stop: float = 1.0

    field_limits = {"iterations": 1}

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        super().__post_init__()
        check_interval(self.start, self.stop)

    def label(self, targets: object) -> str:
        """By which the results of this baseline are known."""
        return "nopt-quantile"

    def without_targets(self) -> SamplingMethod:
        """Plain samples."""
        return Plain()

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError for targets of another kind."""
        check_kind(f"method={self.name!r}", QuantileTargets, targets)

    def stand_in_targets(self, pipe: DiffusionPipeline) -> QuantileTargets:
        """Of one image a class."""
        names = [pipe.id2label.get(index, str(index)) for index in range(pipe.num_classes)]
        generator = torch.Generator().manual_seed(0)
        latents = [torch.randn(1, *pipe.latent_shape, generator=generator)] * len(names)
        return QuantileTargets(names, list(range(len(names))), latents)

    def make_targets(
        self, pipe: DiffusionPipeline, given: Population, sampling: Sampling, *, progress: bool = True, **_: object
    ) -> QuantileTargets:
        """Of real images only."""
        if not isinstance(given, Dataset | IterableDataset):
            raise ValueError(f"The method {self.name!r} matches real images: pass a dataset, or another method.")
        return QuantileTargets.from_dataset(given, pipe, progress=progress)

    def steps(self, num_steps: int) -> range:
        """Indices of the steps whose noise is optimised."""
        return optimized_steps(num_steps, self.start, self.stop)

    def prepare(self, call: Call) -> None:
        """Makes the random network, and finds each image's row `(B,)` of the targets."""
        if call.eta > 0:
            denoiser, device = call.pipe.denoiser, call.pipe._execution_device
            extractor = self.network(call.pipe.latent_shape[0], call.targets.seed)
            # faster, on a CPU by a third
            extractor = extractor.to(device, denoiser.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            extractor.register_forward_hook(lambda _, given, __: call.passed("extractor", len(given[0])))
            call.state = extractor, call.targets.rows_of(call.ids).to(device)

    def network(self, num_channels: int, seed: int) -> nn.Module:
        """What looks at latents `(B, C, h, w)`: features `(B, d)`."""
        return RandomExtractor(num_channels, seed=seed)

    def rehearsed(self) -> SamplingMethod:
        """With a network of next to nothing."""
        return _Rehearsed(**vars(self))

    def noise(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Moves the noise `(B, C, h, w)`; classes share their passes through the network, but not their losses."""
        if call.state is None or i not in self.steps(len(call.timesteps)):
            return noise
        extractor, rows = call.state
        dtype, t = next(extractor.parameters()).dtype, call.timesteps[i].item()
        members = [(rows == row).nonzero()[:, 0] for row in rows.unique()]
        pivots = [
            call.targets.pivots(int(rows[index[0]]), len(index), t, extractor, call.steps.scheduler)
            for index in members
        ]

        def losses(z: torch.Tensor) -> torch.Tensor:
            features = extractor(call.step(i, latents, noise_pred, z).to(dtype)).to(z.dtype)
            pairs = zip(members, pivots, strict=True)
            return torch.stack([quantile_loss(features[index], p) + shell_penalty(z[index]) for index, p in pairs])

        noise, first = momentum_descent(noise, losses, iterations=self.iterations)
        call.discrepancies.append(first.float().cpu())
        return noise


class _Rehearsed(Released):
    name: ClassVar[str] = "released:rehearsed"  # hidden where methods are listed

    def network(self, num_channels: int, seed: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(num_channels, 1, 1), nn.Flatten())
