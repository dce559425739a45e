"""MGD3: each image is drawn towards a mode of its class, a k-means centroid of real latents."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ...utils.values import Limits
from ..call import Call, SamplingMethod
from .statistics import FromCentroids, own_of_slots


@dataclasses.dataclass(frozen=True)
class MGD3(FromCentroids, SamplingMethod):
    """Mode guidance (Chan-Santiago et al., "MGD³: Mode-Guided Dataset Distillation", ICML 2025).

    In the early steps x_{t-1} moves by λ·σ_t·(m_i - x̂0), m_i being the centroid of the image's place in its class.

    As published but for this: σ_t is that of the ancestral step with fixed variance, not one that the model learned;
    latents are the mode of the VAE's posterior; k-means of up to 1,000 images of a class; the method has its default
    guidance scale and steps in [`Sampling`], theirs being 4.0 and 50.

    Attributes:
        scale (`float`): λ.
        stop (`float`): where it ends, as a fraction of the steps. Theirs: while k > 25 of k = 49, …, 0, which are 24
            of 50.
        clusters (`int`, *optional*): centroids of a class; as many as images of it if None, as published.
    """

    sentence: ClassVar[str] = (
        "The sampling of a frozen class-conditional diffusion model was guided to modes of the real images of each "
        "class."
    )
    scale: float = 0.1
    stop: float = 0.48
    clusters: int | None = None
    field_limits = {"clusters": 1, "scale": 0, "stop": Limits(0, 1)}

    def prepare(self, call: Call) -> None:
        """Finds each image's centroid `(C, h, w)`."""
        call.state = own_of_slots(call, "centroids")

    def noise(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Z + λ (m - x̂0) `(B, C, h, w)`: the step multiplies it with σ_t."""
        if i >= round(self.stop * len(call.timesteps)):
            return noise
        return noise + self.scale * (call.state - call.clean(i, latents, noise_pred))
