"""DMGD: images of a class are drawn so that together they lie where optimal transport puts the real class."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch

from ...utils.values import Limits
from ..call import Call, SamplingMethod
from ..methods.noise import loss_gradient, norms
from .statistics import FromCentroids


@dataclasses.dataclass(frozen=True)
class DMGD(FromCentroids, SamplingMethod):
    """The distribution matching of DMGD (CVPR 2026): a Sinkhorn divergence between images and centroids of a class.

    In the middle steps z ← z - ρ·√d·g/‖g‖ with g the gradient, to x_t, of the transport cost between the latents of
    the class and K centroids of real latents whose masses are the shares of their cells; both lie on the unit sphere,
    where the cost of a pair is its distance.

    Otherwise than published: the images of a block are guided together, where theirs are drawn one by one, each with
    all earlier ones (an image of another block is not looked at); the gradient has the length ρ in units of the
    noise's norm, as what is stored of theirs does not show how it enters the step (their scale is 0.05 to 0.5); their
    soft class labels between classes are left out; k-means is Lloyd's of up to 1,000 images of a class.

    Attributes:
        scale (`float`): ρ.
        clusters (`int`, *optional*): K; classes of fewer images need fewer.
        blur (`float`): ε, of the entropic regularisation.
        iterations_of_sinkhorn (`int`): row and column scalings.
        start (`float`), stop (`float`): where it begins and ends, as fractions of the steps; theirs are k = 45, …, 30
            of 49, …, 0.
    """

    sentence: ClassVar[str] = (
        "The sampling of a frozen class-conditional diffusion model was guided so that optimal transport takes the "
        "few images of a class to its real ones at little cost."
    )
    scale: float = 0.1
    clusters: int | None = 10
    blur: float = 0.1
    iterations_of_sinkhorn: int = 5
    start: float = 0.08
    stop: float = 0.4

    field_limits = {
        **{"clusters": 1, "iterations_of_sinkhorn": 1, "scale": 0, "blur": Limits(0, open_low=True)},
        **{"start": Limits(0, 1), "stop": Limits(0, 1)},
    }

    def prepare(self, call: Call) -> None:
        """Finds the centroids `(K, M, C, h, w)` and shares `(K, M)` of the K classes, M of each."""
        present, index = call.labels.unique(return_inverse=True)
        rows = call.targets.rows_of(present.tolist())
        own = [call.targets.tensors[name][rows].to(call.labels.device) for name in ("centroids", "shares")]
        call.state = (index, *own)

    def noise(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Z `(B, C, h, w)`, moved against the gradient of the transport cost."""
        steps = len(call.timesteps)
        if not round(self.start * steps) <= i < round(self.stop * steps):
            return noise
        index, centres, shares = call.state
        cost = functools.partial(
            class_costs, index=index, centres=centres, shares=shares, blur=self.blur,
            iterations=self.iterations_of_sinkhorn,
        )  # fmt: skip
        _, gradient = loss_gradient(latents, cost)
        length = norms(gradient)
        direction = torch.where(length > 0, gradient / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)
        return noise - self.scale * noise[0].numel() ** 0.5 * direction


def class_costs(
    latents: torch.Tensor,
    *,
    index: torch.Tensor,
    centres: torch.Tensor,
    shares: torch.Tensor,
    blur: float,
    iterations: int,
) -> torch.Tensor:
    """Transport cost of each class, `(K,)`; gradients reach the latents.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): images of all classes.
        index (`torch.Tensor` of shape `(B,)`): the class of each, from 0 to K - 1.
        centres (`torch.Tensor` of shape `(K, n, C, h, w)`): centroids of each class.
        shares (`torch.Tensor` of shape `(K, n)`): their masses.
        blur (`float`): ε.
        iterations (`int`): of Sinkhorn.
    """
    on_sphere = torch.nn.functional.normalize(latents.flatten(1), dim=1)
    points = torch.nn.functional.normalize(centres.flatten(2), dim=2)
    return torch.stack([
        transport_cost(torch.cdist(on_sphere[index == row], points[row]), shares[row], blur, iterations)
        for row in range(len(centres))
    ])  # fmt: skip


def transport_cost(costs: torch.Tensor, shares: torch.Tensor, blur: float, iterations: int) -> torch.Tensor:
    """Σ P·C of the plan that Sinkhorn's scalings make (Cuturi 2013, arXiv 1306.0895), rows of equal mass; a scalar.

    Args:
        costs (`torch.Tensor` of shape `(n, m)`): C.
        shares (`torch.Tensor` of shape `(m,)`): masses of the columns, of sum 1.
        blur (`float`): ε of the kernel exp(-C / ε).
        iterations (`int`): scalings of rows, then columns.
    """
    plan = (-costs / blur).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True) / len(costs)
        plan = plan * (shares / plan.sum(dim=0).clamp_min(torch.finfo(plan.dtype).tiny))
    return (plan * costs).sum()
