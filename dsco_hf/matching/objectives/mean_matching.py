"""Kernel mean matching: the few images of a class have the mean embedding of the whole class."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..features import Observation
from ..kernels import mmd2
from ..targets import MatchingTargets
from .base import Bound, Objective, class_sums


@dataclasses.dataclass(frozen=True)
class RKHS(Objective):
    """Kernel mean matching, see [`rkhs`].

    Attributes:
        contrast (`float`): γ: a class aims at μ_c + γ (μ_c - μ̄), away from the mean over all classes. 0 matches the
            class itself, which suits all but the smallest sets. At one image per class, values like 2 (digits) and 8
            (CIFAR-10 at 16 px) train better evaluators.
    """

    sentence: ClassVar[str] = "the few images drawn for a class together match the features of the whole class."
    contrast: float = 0.0
    field_limits = {"contrast": 0}

    def losses(self, seen: Observation, bound: Bound) -> torch.Tensor:
        """MMD² of each class, `(K,)`."""
        return rkhs(seen, bound.rows, bound.targets, bound.previous, self.contrast)


def rkhs(
    observation: Observation,
    rows: torch.Tensor,
    targets: MatchingTargets,
    previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    contrast: float = 0.0,
) -> torch.Tensor:
    """Squared maximum mean discrepancy of every class: ‖(1/n) Σ_j ψ(φ(x_j)) - μ_c‖² (DsCo, arXiv 2603.27987, Prop. 1).

    With `contrast` the images aim beyond μ_c, away from the other classes; see [`contrasted_means`].

    Args:
        observation (`Observation`): features `(B, d)` of the images.
        rows (`torch.Tensor` of shape `(B,)`): each image's row of the targets.
        targets (`MatchingTargets`): the mean embeddings.
        previous (`tuple`, *optional*): sums `(C, D)` and counts `(C,)` of the embeddings of images that are in the set
            already, by row of the targets: the new images then match what these leave.
        contrast (`float`): γ, at least 0.

    Returns:
        `torch.Tensor` of shape `(K,)`: one loss per class that occurs, in ascending order of its row.
    """
    present, index = rows.unique(return_inverse=True)
    sums = class_sums(targets.embed(observation.features), index, len(present))  # (K, D)
    counts = torch.bincount(index, minlength=len(present)).to(sums)
    if previous is not None:
        sums, counts = sums + previous[0][present].to(sums), counts + previous[1][present].to(counts)
    return mmd2(sums / counts[:, None], contrasted_means(targets.embeddings, contrast)[present])


def contrasted_means(means: torch.Tensor, contrast: float) -> torch.Tensor:
    """μ_c + γ (μ_c - μ̄), with μ̄ the mean over all classes: `(C, D)` → `(C, D)`; the same means for γ = 0.

    ‖s - μ_c‖² - 2γ ⟨s, μ_c - μ̄⟩ up to a constant in s: few images cannot resemble a whole class, and teach more if
    they show what sets it apart. With many images the classes themselves should be matched, γ = 0.
    """
    return means + contrast * (means - means.mean(dim=0)) if contrast else means
