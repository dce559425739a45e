"""D4M: images begin at noised centroids of real latents; DDOQ: such images count as much as their cells hold."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ...generators.steps import noised
from ...utils.values import Limits
from ..call import Call, SamplingMethod
from .statistics import FromCentroids, own_of_slots


@dataclasses.dataclass(frozen=True)
class D4M(FromCentroids, SamplingMethod):
    """Disentangled diffusion (Su et al., "D⁴M: Dataset Distillation via Disentangled Diffusion Model", CVPR 2024).

    The centroid of the image's place in its class is noised to a part of the schedule, and sampled from there.

    As published but for this: k-means is Lloyd's of up to 1,000 images of a class, not of mini-batches; a
    class-conditional model takes the place of Stable Diffusion and its prompts; guidance scale and steps are those of
    [`Sampling`], theirs being 8 and 50.

    Attributes:
        strength (`float`): share of the steps that is left to do, in (0, 1].
        clusters (`int`, *optional*): centroids of a class; as many as images of it if None, as published.
    """

    sentence: ClassVar[str] = (
        "A frozen class-conditional diffusion model drew the synthetic images from noised centroids of the real "
        "images of each class."
    )
    strength: float = 0.7
    clusters: int | None = None
    field_limits = {"clusters": 1, "strength": Limits(0, 1, open_low=True)}

    def begin(self, call: Call) -> tuple[torch.Tensor, int]:
        """Noised centroids `(B, C, h, w)`, and the step whose level they have."""
        noise, steps = call.first_latents(), len(call.timesteps)
        first = steps - max(1, int(self.strength * steps))
        return noised(call.steps.starts[first], own_of_slots(call, "centroids").to(noise), noise), first


@dataclasses.dataclass(frozen=True)
class DDOQ(D4M):
    """Distillation as optimal quantisation (Tan & Slade, "Dataset Distillation as Data Compression", ICLR 2026).

    D4M whose images have a weight in the training loss: the share of the class that is in their centroid's cell, so
    that the weighted images are the nearest of such sets to the class in the Wasserstein distance.

    As published but for what is said of [`D4M`]. Weights are multiplied with the number of cells: 1 is the mean of a
    class, and every class counts alike.
    """

    sentence: ClassVar[str] = (
        "A frozen class-conditional diffusion model drew the synthetic images from noised centroids of the real "
        "images of each class; each has as its `weight` the share of the class that its centroid stands for."
    )

    @property
    def weighs(self) -> bool:
        """By the shares of the cells."""
        return True

    def weights(self, call: Call) -> torch.Tensor:
        """Share of the cell times the number of cells, `(B,)`."""
        shares = own_of_slots(call, "shares")
        return (shares * call.targets.tensors["shares"].shape[1]).cpu()
