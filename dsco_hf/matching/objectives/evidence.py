"""Classifier-only: what a trained classifier remembers of its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import nn

from ..features import Observation, batchnorm_layers
from ..targets import MatchingTargets
from .base import Bound, Objective, class_means, class_sums


@dataclasses.dataclass(frozen=True)
class ClassifierEvidence(Objective):
    """Strictly classifier-only: no image, no sample, only what a trained classifier remembers of its data.

    loss_c = evidence · mean_j softplus(margin - m_j) + repulsion · R_c + batchnorm · S, where m_j is the logit of the
    image's class minus the log-sum-exp of the others (images beyond the margin are left alone), R_c the mean kernel
    similarity of the images of a class (0 for one image), and S the distance of the images' statistics from those in
    the classifier's BatchNorm layers (Yin et al. 2020, "Dreaming to Distill", eq. 4), over all images drawn together
    (0 if it has no such layer).

    Attributes:
        evidence, repulsion, batchnorm (`float`): weights of the three parts.
        margin (`float`): logits; about the margin that the classifier has on its own training images.
    """

    name: ClassVar[str] = "classifier"
    needs: ClassVar[str | None] = None
    sentence: ClassVar[str] = "a classifier is sure of every image and finds its own statistics; nothing was matched."
    evidence: float = 1.0
    repulsion: float = 10.0
    batchnorm: float = 1.0
    margin: float = 8.0

    @property
    def moments(self) -> bool:
        """Where their distance from the classifier's counts."""
        return self.batchnorm > 0

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError if there are targets, or there is no classifier."""
        super().check(pipe, targets)
        if pipe.classifier is None:
            raise ValueError("The 'classifier' objective needs a classifier: load the pipeline with `classifier=...`.")

    def bind(
        self,
        pipe: DiffusionPipeline,
        targets: MatchingTargets | None,
        ids: Sequence[int],
        previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Bound:
        """Rows `(B,)` are the classifier's labels; ValueError if it was trained on other classes."""
        return super().bind(pipe, None, pipe.classifier_labels(ids))

    def losses(self, seen: Observation, bound: Bound) -> torch.Tensor:
        """The weighted sum of the three parts, `(K,)`."""
        classifier = bound.pipe.classifier
        present, index = bound.rows.unique(return_inverse=True)
        evidence = class_means(
            class_evidence(seen.logits, bound.rows, margin=self.margin)[:, None], index, len(present)
        )
        loss = self.evidence * evidence[:, 0]
        if self.repulsion:
            loss = loss + self.repulsion * repulsion(seen.features, index, len(present))
        if self.batchnorm and seen.moments.numel():
            loss = loss + self.batchnorm * batchnorm_distance(seen.moments, classifier) / len(present)
        return loss


def class_evidence(logits: torch.Tensor, labels: torch.Tensor, *, margin: float) -> torch.Tensor:
    """softplus(margin - m), with m by [`class_margin`]: `(B, K)` → `(B,)`. Lower is better."""
    return F.softplus(margin - class_margin(logits, labels))


def class_margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logit of the class - logsumexp of the others: `(B, K)` → `(B,)`; log p / (1 - p), where p itself rounds to 1."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], float("-inf")).logsumexp(dim=1)


def repulsion(features: torch.Tensor, index: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean cosine similarity of each image to the others of its class: `(B, d)` → `(num_classes,)`, range [-1, 1].

    A class of one image has nothing to repel and scores 0.
    """
    directions = F.normalize(features, dim=1)
    sums = class_sums(directions, index, num_classes)
    counts = torch.bincount(index, minlength=num_classes).to(sums)
    pairs = counts * (counts - 1)
    return torch.where(pairs > 0, (sums.square().sum(dim=1) - counts) / pairs.clamp_min(1), 0.0)


def batchnorm_distance(moments: torch.Tensor, classifier: nn.Module) -> torch.Tensor:
    """Distance of the images' channel statistics from the running ones, averaged over all BatchNorm channels.

    Mean of (m - μ)²/σ² + (s/σ - 1)² over channels: m, s of the images, μ, σ remembered (after Yin et al. 2020, eq. 4,
    made free of each layer's scale).

    Args:
        moments (`torch.Tensor` of shape `(B, M, 2)`): per image and channel the mean and the mean square over space.
        classifier (`nn.Module`): has BatchNorm layers with M channels together.
    """
    mean, square = moments.mean(dim=0).unbind(dim=1)  # (M,), (M,)
    spread = (square - mean.square()).clamp_min(1e-8).sqrt()
    layers: list[Any] = batchnorm_layers(classifier)
    mu = torch.cat([layer.running_mean for layer in layers]).float()
    sigma = torch.cat([layer.running_var for layer in layers]).float().clamp_min(1e-8).sqrt()
    return (((mean - mu) / sigma).square() + (spread / sigma - 1).square()).mean()
