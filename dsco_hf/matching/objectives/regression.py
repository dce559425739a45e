"""What a ridge regression learns from the few images, in closed form."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline

from ...utils.values import Limits
from ..features import Observation
from ..kernels import regression_errors
from ..targets import MatchingTargets
from .base import Bound, Objective


@dataclasses.dataclass(frozen=True)
class Ridge(Objective):
    """What a ridge regression learns from the images, for a few images of several classes; see [`ridge`].

    Attributes:
        regularization (`float`): λ. On validation data of CIFAR-10 at 16 px, 2 suited 1, 10 and 50 images per class.
    """

    needs: ClassVar[str | None] = "second_moment"
    each_image: ClassVar[bool] = True
    sentence: ClassVar[str] = (
        "a ridge regression trained on the few images makes the smallest error on all of the source."
    )
    regularization: float = 2.0
    field_limits = {"regularization": Limits(0, open_low=True)}

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Also refuses targets of a single class."""
        if isinstance(targets, MatchingTargets) and targets.num_classes < 2:
            raise ValueError(
                f"objective='ridge' tells classes apart, and the targets have only {targets.class_names}: choose "
                "objective='rkhs'."
            )
        super().check(pipe, targets)

    def losses(self, seen: Observation, bound: Bound) -> torch.Tensor:
        """The regression's error on each class, `(K,)`."""
        return ridge(seen, bound.rows, bound.targets, bound.previous, self.regularization)


def ridge(
    observation: Observation,
    rows: torch.Tensor,
    targets: MatchingTargets,
    previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    regularization: float = 2.0,
) -> torch.Tensor:
    """What the images teach: errors on the targets' population of a ridge regression that is trained on them.

    The closed form of "train on the small set, test on the large one", see [`regression_errors`]: the
    regression tells by ψ(φ(x)) whether an image is of class c (1 - 1/C) or of another (-1/C). Errors are means over
    classes of equal weight, so that b_c = (μ_c - μ̄) / C. Unlike [`rkhs`] it couples the classes that are drawn
    together, and only those are told apart. With networks whose weights are random this is the loss of "Efficient
    Dataset Distillation using Random Feature Approximation" (Loo et al. 2022, arXiv 2210.12067) without its rescaling.

    Args:
        observation (`Observation`): features `(B, d)` of the images.
        rows (`torch.Tensor` of shape `(B,)`): each image's row of the targets.
        targets (`MatchingTargets`): of two classes or more, with their second moment.
        previous (`tuple`, *optional*): embeddings `(n, D)` and rows `(n,)` of images that are in the set already; the
            regression is trained on them too.
        regularization (`float`): λ.

    Returns:
        `torch.Tensor` of shape `(K,)`: one loss per class that occurs among the new images, in ascending order of its
            row; the error of always answering zero is 0.
    """
    present = rows.unique()
    psi = targets.embed(observation.features)  # (B, D)
    if previous is not None:
        psi, rows = torch.cat([previous[0].to(psi), psi]), torch.cat([previous[1].to(rows), rows])
    return _errors(psi, rows, present, targets, regularization)


def unexplained(
    psi: torch.Tensor, rows: torch.Tensor, targets: MatchingTargets, regularization: float
) -> torch.Tensor:
    """The share of what is to be known of each class that a ridge regression does not learn from a set; see [`ridge`].

    E(w_cᵀψ - y_c)² / E y_c², with E y_c² = (C - 1) / C²: 1 is as good as always answering zero, 0 makes no error.

    Args:
        psi (`torch.Tensor` of shape `(n, D)`): embeddings of the images.
        rows (`torch.Tensor` of shape `(n,)`): each image's row of the targets.
        targets (`MatchingTargets`): of two classes or more, with their second moment.
        regularization (`float`): λ.

    Returns:
        `torch.Tensor` of shape `(C,)`: of all classes of the targets, also those without an image.
    """
    classes = targets.num_classes
    present = torch.arange(classes, device=rows.device)
    return 1 + _errors(psi, rows, present, targets, regularization) * classes**2 / (classes - 1)


def _errors(
    psi: torch.Tensor, rows: torch.Tensor, present: torch.Tensor, targets: MatchingTargets, regularization: float
) -> torch.Tensor:
    """Errors `(K,)` of the outputs for the classes `present` `(K,)`, of images `(n, D)` with rows `(n,)`."""
    labels = (rows[:, None] == present).to(psi) - 1 / targets.num_classes  # (n, K)
    means = targets.embeddings
    cross = (means[present] - means.mean(dim=0)).T / targets.num_classes  # (D, K)
    assert targets.second_moment is not None  # `Objective.check` refuses targets without
    return regression_errors(psi, labels, targets.second_moment, cross, regularization)
