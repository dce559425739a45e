"""The ridge rule: greedily the real image that lowers most, on all real images, the error of a ridge regression.

Where herding asks which image brings a mean nearest, this asks which one teaches most, given all images before it,
the synthetic ones included: it is the greedy counterpart of the objective `Ridge`, whose regression it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ...data.datasets import Pool
from ...sampling.pipeline import DsCoPipeline
from ...utils.values import Limits, check_choice
from .base import Selection
from .features import fourier_features, seen_by


# Rounding of the rank-one updates stays below what tells candidates apart for so many picks.
REFRESH = 256
# Candidates that are embedded or multiplied at once.
CHUNK = 4096


@dataclass(frozen=True)
class RidgeRule(Selection):
    """Image by image the one that lowers most the regression's error on all real images, given those before it.

    The regression is that of the objective `Ridge`: W = (ΨᵀΨ + λI)⁻¹ΨᵀY of embeddings ψ and labels y = onehot - 1/C;
    its error is the mean over classes of equal weight of E‖Wᵀψ - y‖² on the pool. On top of a set W starts from that.
    Adding an image is a rank-one update (Sherman & Morrison 1950), so that the change of the error is known of every
    candidate without solving anything, see [`RidgeGreedy`]. A pick costs 10·N·D operations; embeddings are kept in
    half precision, 2·N·D bytes, and nothing else of that size.

    Where every class is filled by itself, each in turn gives an image, the best one first, until none is wanted: what
    is chosen of few is part of what is chosen of many.

    Attributes:
        features (`PreTrainedModel` or "pixels", *optional*): what is embedded, in random Fourier features by the
            seed: pooled features of a classifier in eval mode, or the pixels; by default those of the pipeline's.
        regularization (`float`): λ > 0.
        embedding_dim (`int`): D, even.
    """

    features: PreTrainedModel | str | None = None
    regularization: float = 2.0
    embedding_dim: int = 1024

    name: ClassVar[str] = "ridge_rule"
    across_classes: ClassVar[bool] = True
    sentence: ClassVar[str] = (
        "Real images were added that lower most the error of a ridge regression on all real images."
    )

    field_limits = {"regularization": Limits(0, open_low=True), "embedding_dim": 2}

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        super().__post_init__()
        if self.embedding_dim % 2:
            raise ValueError(f"`embedding_dim` must be even, as each frequency gives two; got {self.embedding_dim}.")
        if isinstance(self.features, str):
            check_choice("features", self.features, ["pixels"])

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(n,)`, as many as are wanted, best first.

        Raises:
            ValueError: for a pool of one class, of which nothing can be told apart, or without features.
        """
        if sum(count > 0 for count in pool.counts) < 2:
            raise ValueError(
                f"{self.name!r} chooses what tells classes apart, and the pool has one: choose another rule, such as "
                "`Herding(features='pixels')`, or add images of a second class."
            )
        phi = seen_by(self.features, pool, pipe, self.name)
        embed = fourier_features(phi, seed, self.embedding_dim)
        psi = torch.empty(len(phi), self.embedding_dim, dtype=torch.float16)
        for part in torch.arange(len(phi)).split(CHUNK):
            psi[part] = embed(phi[part]).half()
        greedy = RidgeGreedy(psi, pool.labels, len(pool.names), self.regularization)
        if small is not None and len(small.labels):
            greedy.start(embed(seen_by(self.features, small, pipe, self.name)), small.labels)
        return greedy.pick(wanted)


class RidgeGreedy:
    """The regression, and of every candidate what its addition would change.

    With P = (ΨᵀΨ + λI)⁻¹, H = MW - B (M and B the population's E ψψᵀ and E ψyᵀ) and r = y - Wᵀψ, adding ψ changes W by
    g rᵀ, g = Pψ / (1 + s), s = ψᵀPψ, and the error tr WᵀMW - 2 tr WᵀB by

        ‖r‖² q / (1 + s)² + 2 c / (1 + s),    q = ψᵀPMPψ,    c = rᵀHᵀPψ.

    Of each candidate four numbers are kept: s, q, ‖r‖² and c. After a pick they follow from products of Ψ with five
    vectors, as P, W and PH change by ranks one and two; every [`REFRESH`] picks they are computed anew.

    Args:
        psi (`torch.Tensor` of shape `(N, D)`): embeddings of the candidates, which are the population, of any
            precision, in which they stay.
        labels (`torch.Tensor` of shape `(N,)`): their classes.
        num_classes (`int`): C.
        regularization (`float`): λ.
    """

    def __init__(self, psi: torch.Tensor, labels: torch.Tensor, num_classes: int, regularization: float) -> None:
        self.psi, self.labels, self.num_classes = psi, labels, num_classes
        dims, counts = psi.shape[1], torch.bincount(labels, minlength=num_classes).double()
        present = counts > 0
        self.classes = int(present.sum())
        weights = torch.where(present, 1 / (counts.clamp_min(1) * self.classes), 0.0)[labels]  # (N,), sum 1
        moment, sums = torch.zeros(dims, dims).double(), torch.zeros(num_classes, dims).double()
        for rows in torch.arange(len(psi)).split(CHUNK):
            part = psi[rows].double()
            moment += part.T @ (part * weights[rows, None])
            sums.index_add_(0, labels[rows], part * weights[rows, None])
        self.moment = moment  # M (D, D)
        self.cross = (sums - present[:, None] * sums.sum(0) / self.classes).T  # B (D, C)
        self.present = present
        self.inverse = torch.eye(dims).double() / regularization  # P (D, D)
        self.weights = torch.zeros(dims, num_classes).double()  # W (D, C)

    def error(self) -> float:
        """The error on the population, less that of always answering zero."""
        return float(((self.moment @ self.weights - 2 * self.cross) * self.weights).sum())

    def start(self, psi: torch.Tensor, labels: torch.Tensor) -> None:
        """Begins with images `(m, D)`, `(m,)` in the set."""
        psi, regularization = psi.double(), 1 / self.inverse[0, 0]
        gram = psi.T @ psi + regularization * torch.eye(psi.shape[1]).double()
        self.inverse = torch.linalg.inv(gram)
        self.weights = self.inverse @ (psi.T @ self.answers(labels))

    def answers(self, labels: torch.Tensor) -> torch.Tensor:
        """Y `(n, C)`: onehot - 1/C of the classes that have images."""
        return torch.nn.functional.one_hot(labels, self.num_classes).double() - self.present.double() / self.classes

    def pick(self, wanted: Sequence[int] | int) -> torch.Tensor:
        """Places `(n,)` of the picks in their order: so many of each class, or of all; ties go to the lowest.

        For the sake of nesting every class has its turn in every round, also one that gives no more than was wanted.
        """
        left = torch.tensor([wanted] if isinstance(wanted, int) else list(wanted))
        group = torch.zeros_like(self.labels) if isinstance(wanted, int) else self.labels
        left = left.minimum(torch.bincount(group, minlength=len(left)))
        free, picked, waiting, step = torch.ones_like(group, dtype=torch.bool), [], torch.zeros_like(left).bool(), 0
        while (left > 0).any():
            if step % REFRESH == 0:
                self.refresh()
            if not waiting.any():
                waiting[group[free].unique()] = True
            change = (self.residual * self.gain / (1 + self.spread) + 2 * self.slope) / (1 + self.spread)
            best = int(change.masked_fill(~(free & waiting[group]), torch.inf).argmin())
            own = group[best]
            if left[own] > 0:
                picked.append(best)
            left[own] -= 1
            self.add(best)
            free[best] = waiting[own] = False
            step += 1
        return torch.tensor(picked, dtype=torch.int64)

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """Ψ times vectors `(D, k)`, in float32 → `(N, k)`, float64; never a copy of all of Ψ."""
        columns, found = vectors.float(), torch.empty(len(self.psi), vectors.shape[1])
        for part, place in zip(self.psi.split(CHUNK), found.split(CHUNK), strict=True):
            place.copy_(part.float() @ columns)
        return found.double()

    def refresh(self) -> None:
        """Computes s, q, ‖r‖² and c of every candidate, `(N,)` each, in float64."""
        slopes = self.inverse @ (self.moment @ self.weights - self.cross)  # PH (D, C)
        found = torch.empty(4, len(self.psi)).double()  # small results kept apart would split the memory of large ones
        for rows in torch.arange(len(self.psi)).split(CHUNK):
            part = self.psi[rows].double()
            seen = part @ self.inverse
            residual = self.answers(self.labels[rows]) - part @ self.weights
            found[:, rows] = torch.stack(
                [
                    (seen * part).sum(1),
                    ((seen @ self.moment) * seen).sum(1),
                    residual.square().sum(1),
                    (residual * (part @ slopes)).sum(1),
                ]
            )
        self.spread, self.gain, self.residual, self.slope = found

    def add(self, place: int) -> None:
        """Takes a candidate into the set: P, W and the four numbers of every candidate change."""
        psi, label = self.psi[place].double(), self.labels[place : place + 1]
        u = self.inverse @ psi  # (D,)
        scale = 1 / (1 + psi @ u)
        g = u * scale
        r = self.answers(label)[0] - psi @ self.weights  # (C,)
        v = self.inverse @ (self.moment @ u)  # P M u
        height = self.moment @ self.weights - self.cross  # H (D, C)
        h = u @ height + (u @ self.moment @ g) * r  # what PH loses along u, (C,)
        slope = self.inverse @ (height @ r)  # P H r
        vectors = torch.stack([u, v, self.weights @ r, self.weights @ h, slope], dim=1)
        a, b, wr, wh, pr = self.products(vectors).T  # (N,) each
        own, other = (x[self.labels] - (self.present * x).sum() / self.classes for x in (r, h))
        rr, rh = own - wr, other - wh  # rᵢ·r and rᵢ·h
        alpha, beta = a * scale, b * scale
        self.slope += beta * rr - alpha * (rh + pr) - alpha * beta * (r @ r) + alpha.square() * (r @ h)
        self.residual += alpha.square() * (r @ r) - 2 * alpha * rr
        self.gain += alpha.square() * (u @ self.moment @ u) - 2 * alpha * b
        self.spread -= alpha * a
        self.inverse -= torch.outer(u, g)
        self.weights += torch.outer(g, r)
