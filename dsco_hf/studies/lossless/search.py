"""The search itself: what to train next, and when to stop; it asks for trainings and knows nothing of networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .curves import Curves, bootstrap_curves, seed_std
from .noninferiority import Look, compare


BRACKET = 1.25  # finer than this is not asked for
SHARES = (0.3, 0.5, 0.7)  # of the trainings that are left, for the first of two looks
Trainer = Callable[[Sequence[int], Sequence[int]], list[NDArray[np.bool_]]]


@dataclass(frozen=True)
class SearchPlan:
    """What is decided before the first training.

    Attributes:
        margin (`float`): by how much accuracy, in (0, 1), the small set may fall behind all data.
        confidence (`float`): in [0.5, 0.9999], of the whole search; the rest is divided by the number of looks.
        trainings (`int`): at most, beyond those of the reference.
        looks (`int`): at most so many sizes are tested.
        reference_seeds (`int`): trainings on all data, at least 2.
        first_shares (sequence of `float`): of all images, trained with one seed each to see the curve.
        smallest (`int`): size to which the search does not go below, such as that of a synthetic set.
    """

    margin: float = 0.005
    confidence: float = 0.95
    trainings: int = 20
    looks: int = 2
    reference_seeds: int = 32
    first_shares: Sequence[float] = (0.1, 0.3, 0.6)
    smallest: int = 2

    def splits(self) -> list[tuple[int, ...]]:
        """How trainings that the first sizes leave may be shared out: to one look, or to two in several ways."""
        left = self.trainings - len(self.first_shares)
        pairs = [(round(left * share), left - round(left * share)) for share in SHARES if self.looks > 1]
        return [(left,), *((one, two) for one, two in pairs if min(one, two) >= 2)]


@dataclass
class Search:
    """One search, from the reference to the answer.

    Attributes:
        whole (`int`): number of all images.
        plan ([`SearchPlan`]): what was decided before.
        train (`Callable`): `train(sizes, seeds)` → which test images each training has right, `(S, M)` for each size.
        measured: number of images → what `train` has given, seeds from 0.
        looks: number of images → what its test has shown, in the order of testing.
        level (`float`, *optional*): of each look, once their number is known.
        accepted (`int`, *optional*): the smallest accepted size.
        refuted (`int`, *optional*): the largest size that is not shown to be lossless: below it nothing is tested.
    """

    whole: int
    plan: SearchPlan
    train: Trainer
    measured: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    looks: dict[int, Look] = field(default_factory=dict)
    level: float | None = None
    accepted: int | None = None
    refuted: int | None = None

    def reference(self) -> NDArray[np.bool_]:
        """Trains on all data, once."""
        had = self.measured.get(self.whole)
        return self._more(self.whole, self.plan.reference_seeds) if had is None else had

    def run(self) -> None:
        """Trains the reference and the first sizes, then tests size after size until the bracket is narrow."""
        full = self.reference()
        first = {max(self.plan.smallest, round(share * self.whole)) for share in self.plan.first_shares}
        self.measured |= dict(zip(sorted(first), self.train(sorted(first), [0]), strict=True))
        seeds = min(self.plan.splits(), key=lambda seeds: self.propose(seeds)[1])
        self.level = (1 - self.plan.confidence) / len(seeds)
        for place in range(len(seeds)):
            if self.accepted and self.refuted and self.accepted / self.refuted < BRACKET:
                return
            images, _ = self.propose(seeds[place:])
            if images is None:
                return
            look = compare(self._more(images, seeds[place]), full, level=self.level)
            self.looks[images] = look
            if look.lower >= -self.plan.margin:
                self.accepted = images
            else:
                self.refuted = images

    def curves(self) -> Curves:
        """Curves through all that was trained."""
        return bootstrap_curves(self.measured, lack=self.plan.margin / 10)

    def propose(self, seeds: Sequence[int]) -> tuple[int | None, float]:
        """The size whose test leaves the fewest images on average, and their number; None if there is none to test.

        The fitted curves say with which probability a size passes; one that is refused costs the smallest accepted
        size, or all images. With a second look left, a larger size follows a refusal and a smaller one a success.

        Args:
            seeds (sequence of `int`): trainings of each look that is left: one or two.
        """
        high, low = self.accepted or self.whole, max(self.refuted or 0, self.plan.smallest - 1)
        grid = np.unique(np.geomspace(low + 1, high, 80).round().astype(np.int64))
        grid = grid[(grid > low) & (grid < high)]  # (G,)
        if not len(grid):
            return None, high
        level = self.level or (1 - self.plan.confidence) / len(seeds)
        passing = self._passing(grid, seeds[0], level)  # (B, G)
        failing = 1 - passing
        if len(seeds) == 1:
            left = (passing * grid + failing * high).mean(0)
        else:  # rows: this look; columns: the next one
            then = self._passing(grid, seeds[1], level)
            larger = np.triu((failing.T @ then / len(then)) * (grid - high), 1).min(1) + high * failing.mean(0)
            saved = (passing.T @ then / len(then)) * (grid - grid[:, None])
            left = larger + np.tril(saved, -1).min(1) + grid * passing.mean(0)
        return int(grid[left.argmin()]), float(left.min())

    def _passing(self, grid: NDArray[np.int64], seeds: int, level: float) -> NDArray[np.float64]:
        """The probability that each size passes its test, for each curve: `(B, G)`."""
        curves, full = self.curves(), self.measured[self.whole]
        error = seed_std([own.mean(1) for own in self.measured.values()]) * np.sqrt(1 / seeds + 1 / len(full))
        by_seed = error * stats.t.ppf(1 - level, seeds + len(full) - 2)
        chance = full.var(0, ddof=1).mean()  # of a training for an image
        sizes = sorted(self.measured)
        lasting = [  # by what differences of images vary beyond chance
            (own.mean(0) - full.mean(0)).var() - chance * (1 / len(own) + 1 / len(full)) if own is not full else 0.0
            for own in (self.measured[size] for size in sizes)
        ]
        varying = np.interp(np.log(grid), np.log(sizes), np.maximum(lasting, 0))
        varying += chance * (1 / seeds + 1 / len(full))
        by_image = stats.norm.ppf(1 - level) * np.sqrt(varying / full.shape[1])
        ahead = curves(grid) - curves(self.whole) + self.plan.margin
        chances: NDArray[np.float64] = stats.norm.cdf((ahead - np.maximum(by_seed, by_image)) / error)
        return chances

    def _more(self, images: int, seeds: int) -> NDArray[np.bool_]:
        """So many more trainings of a size; all it has by now."""
        had = self.measured.get(images)
        start = 0 if had is None else len(had)
        (new,) = self.train([images], range(start, start + seeds))
        self.measured[images] = new if had is None else np.concatenate([had, new])
        return self.measured[images]
