"""Rules that cover the data: by strata of difficulty (CCS), by distances of features (Moderate, k-center, D2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ...data.datasets import Pool
from ...sampling.pipeline import DsCoPipeline
from ...utils.values import Limits, check_choice, plain_fields
from .base import Selection
from .difficulty import Forgetting, groups, highest, logged
from .dynamics import TrainingLog
from .features import seen_by


@dataclass(frozen=True)
class CCS(Selection):
    """Without the hardest images, the others evenly over strata of difficulty (Zheng et al. 2023, "coverage-centric").

    Difficulty is the mean margin of a logged training (`AUM`). Of its strata, of equal width, the smallest are asked
    first for an equal part of what is still wanted; within a stratum images are drawn at random.

    Attributes:
        training ([`TrainingLog`]): the logged training.
        left_out (`float`): share of the hardest images that is left out, β, in [0, 1); fewer are where so many are
            wanted that the rest has not enough. The paper takes 0 to keep half, 0.1 to 0.3 for less.
        strata (`int`): their number.
    """

    training: TrainingLog | None = None
    left_out: float = 0.1
    strata: int = 50

    across_classes: ClassVar[bool] = True
    nested: ClassVar[bool] = False
    sentence: ClassVar[str] = "Real images were added evenly over all degrees of difficulty but the highest (CCS)."

    field_limits = {"strata": 1, "left_out": Limits(0, 1)}

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        super().__post_init__()
        if self.left_out == 1:
            raise ValueError("`left_out` must be below 1: of all images none is left to choose.")

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(n,)`, as many as are wanted."""
        margins = logged(self.name, self.training, pool).margins.mean(0)
        generator, parts = torch.Generator().manual_seed(seed), [torch.empty(0, dtype=torch.int64)]
        for places, count in groups(pool, wanted):
            cut = min(int(self.left_out * len(places)), len(places) - min(count, len(places)))
            kept = places[margins[places].argsort(stable=True)[cut:]]
            stratum = strata_of(margins[kept], self.strata)
            budgets = spread_evenly(count, torch.bincount(stratum, minlength=self.strata).tolist())
            order = torch.randperm(len(kept), generator=generator)
            parts += [kept[order[stratum[order] == row][:budget]] for row, budget in enumerate(budgets)]
        return torch.cat(parts)


def strata_of(values: torch.Tensor, number: int) -> torch.Tensor:
    """Stratum `(N,)` of each value `(N,)`: `number` of them, of equal width, from the lowest value to the highest."""
    low, width = values.min(), (values.max() - values.min()) / number
    return ((values - low) / width.clamp_min(1e-12)).long().clamp(0, number - 1)


def spread_evenly(count: int, sizes: Sequence[int]) -> list[int]:
    """How many of `count` each stratum of these sizes gives: an equal part of what is left, the smallest first."""
    budgets = [0] * len(sizes)
    for asked, row in enumerate(sorted(range(len(sizes)), key=lambda row: sizes[row])):
        budgets[row] = min(sizes[row], (count - sum(budgets)) // (len(sizes) - asked))
    return budgets


@dataclass(frozen=True)
class OfFeatures:
    """Ranks by what a network sees.

    Attributes:
        features (`PreTrainedModel` or "pixels", *optional*): pooled features of a classifier in eval mode, or the
            pixels; by default those of the pipeline's classifier.
    """

    features: PreTrainedModel | str | None = None

    across_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Takes the numbers of NumPy and torch, too."""
        plain_fields(self)
        if isinstance(self.features, str):
            check_choice("features", self.features, ["pixels"])

    def seen(self, images: Pool, pipe: DsCoPipeline | None) -> torch.Tensor:
        """φ `(N, d)`, finite; ValueError otherwise, and if nothing gives them."""
        return seen_by(self.features, images, pipe, self.name)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Moderate(OfFeatures, Selection):
    """Images of middle distance from the median of their class, neither typical nor outlying (Xia et al. 2023).

    The nearer to the middle of the ranking by distance, the earlier: the first n are the middle band of n.
    """

    sentence: ClassVar[str] = "Real images were added of middle distance from the median of their class (Moderate)."

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places of all images of what is ranked together, `(N,)`, the middle first."""
        phi, parts = self.seen(pool, pipe), [torch.empty(0, dtype=torch.int64)]
        distance = torch.empty(len(phi))
        for label in pool.labels.unique():
            mine = phi[pool.labels == label]
            low, high = (mine.sort(dim=0).values[place] for place in ((len(mine) - 1) // 2, len(mine) // 2))
            distance[pool.labels == label] = (mine - (low + high) / 2).norm(dim=1)
        for places, _ in groups(pool, wanted):
            order = places[distance[places].argsort(stable=True)]
            parts.append(order[(torch.arange(len(order)) - (len(order) - 1) / 2).abs().argsort(stable=True)])
        return torch.cat(parts)


@dataclass(frozen=True)
class KCenter(OfFeatures, Selection):
    """Each time the image that is farthest from all that are in the set (greedy k-center: Sener & Savarese 2018).

    On top of a set its images are centres from the start, of their own class where every class is filled by itself;
    alone the first is the one nearest to the mean.
    """

    name: ClassVar[str] = "k_center"
    sentence: ClassVar[str] = "Real images were added that are farthest from those in the set before (k-center)."

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(n,)`, as many as are wanted."""
        phi, have = self.seen(pool, pipe), None if small is None else self.seen(small, pipe)
        parts = [torch.empty(0, dtype=torch.int64)]
        for places, count in groups(pool, wanted):
            centres = have
            if small is not None and have is not None and not isinstance(wanted, int):
                centres = have[small.labels == pool.labels[places[0]]]
            parts.append(places[farthest_first(phi[places], count, centres)])
        return torch.cat(parts)


def farthest_first(x: torch.Tensor, count: int, centres: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of `x` `(N, d)`, each the farthest from the centres `(m, d)` and the rows before it: `(count,)`, int64.

    Without a centre the first is the nearest to the mean; ties go to the lowest row.
    """
    count = min(count, len(x))
    if centres is None or not len(centres):
        first = [int((x - x.mean(0)).norm(dim=1).argmin())] if count else []
        nearest = (x - x[first[0]]).norm(dim=1) if count else x.new_empty(0)
    else:
        first, nearest = [], torch.cat([torch.cdist(part, centres).amin(1) for part in x.split(4096)])
    picked = first
    nearest[picked] = -torch.inf
    while len(picked) < count:
        picked.append(int(nearest.argmax()))
        nearest = nearest.minimum((x - x[picked[-1]]).norm(dim=1))
        nearest[picked[-1]] = -torch.inf
    return torch.tensor(picked, dtype=torch.int64)


@dataclass(frozen=True)
class D2(OfFeatures, Selection):
    """Difficulty and density: scores that neighbours add to, and that a pick takes away from (Maharana et al. 2024).

    A graph joins each image with its nearest neighbours by features. An image's score is its difficulty plus
    Σ exp(-gather·d²) · that of its neighbours. Each time the highest is taken, and exp(-reduce·d²) of its score
    is taken away from its neighbours. Distances count in units of the mean one in the graph, as those of features have
    no scale of their own. All distances of what is ranked together are computed: N² of them.

    Attributes:
        features (`PreTrainedModel` or "pixels", *optional*): as for [`KCenter`].
        training ([`TrainingLog`]): the logged training whose forgetting is the difficulty.
        neighbours (`int`): of an image.
        gather (`float`): γ of what is added.
        reduce (`float`): γ of what is taken away.
    """

    training: TrainingLog | None = None
    neighbours: int = 10
    gather: float = 1.0
    reduce: float = 1.0

    sentence: ClassVar[str] = "Real images were added that are hard and far from those added before (D2)."
    field_limits = {"neighbours": 1, "gather": 0, "reduce": 0}

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(n,)`, as many as are wanted; ties by the seed."""
        hard = Forgetting().scores(logged(self.name, self.training, pool))
        phi, parts = self.seen(pool, pipe), [torch.empty(0, dtype=torch.int64)]
        for places, count in groups(pool, wanted):
            places = places[highest(hard[places], seed)]
            index, squares = neighbours(phi[places], self.neighbours)
            parts.append(places[self.order(hard[places], index, squares, count)])
        return torch.cat(parts)

    def order(self, hard: torch.Tensor, index: torch.Tensor, squares: torch.Tensor, count: int) -> torch.Tensor:
        """Places in the order in which they are taken.

        Args:
            hard (`torch.Tensor` of shape `(N,)`): difficulty.
            index (`torch.Tensor` of shape `(N, k)`): neighbours.
            squares (`torch.Tensor` of shape `(N, k)`): d² to them.
            count (`int`): how many, N at most.
        """
        left = hard + (torch.exp(-self.gather * squares) * hard[index]).sum(1)
        taken, less = [], torch.exp(-self.reduce * squares)
        for _ in range(min(count, len(left))):
            place = int(left.argmax())
            taken.append(place)
            left[index[place]] -= less[place] * left[place]
            left[place] = -torch.inf
        return torch.tensor(taken, dtype=torch.int64)


def neighbours(x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest other rows of each row, and d² to them in units of the mean d²: `(N, d)` → `(N, k)`, `(N, k)`.

    k is `number`, or N - 1 where there are fewer.
    """
    k, found = min(number, len(x) - 1), []
    for rows in torch.arange(len(x)).split(1024):
        distances = torch.cdist(x[rows], x)
        distances[torch.arange(len(rows)), rows] = torch.inf
        found.append(distances.topk(k, largest=False))
    index, squares = torch.cat([one.indices for one in found]), torch.cat([one.values for one in found]).square()
    return index, squares / squares.mean().clamp_min(1e-12) if squares.numel() else squares
