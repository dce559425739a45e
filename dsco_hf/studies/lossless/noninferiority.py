"""A one-sided test that a small set does not fall behind all data by a margin, paired by seed and by test image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Look:
    """What a test has shown of a size.

    Attributes:
        difference (`float`): accuracy of the small set minus that of all data, both means over seeds.
        half_width (`float`): of the one-sided bound: that over seeds or that over test images, whichever is wider.
        by_seed, by_image (`float`): the two.
    """

    difference: float
    by_seed: float
    by_image: float

    @property
    def half_width(self) -> float:
        """The wider one."""
        return max(self.by_seed, self.by_image)

    @property
    def lower(self) -> float:
        """One-sided lower bound of the difference."""
        return self.difference - self.half_width

    @property
    def upper(self) -> float:
        """One-sided upper bound of the difference."""
        return self.difference + self.half_width


def compare(
    small: NDArray[np.bool_],
    full: NDArray[np.bool_],
    *,
    level: float,
    small_seeds: Sequence[int] | None = None,
    full_seeds: Sequence[int] | None = None,
) -> Look:
    """Tests a size against all data.

    Over seeds: Student's t for the difference of two means of S and R trainings, less what trainings of the same seed
    have in common (with as many seeds on both sides this is the paired test). Over test images: the mean over seeds
    of every image's difference, which for one seed is McNemar's.

    Args:
        small (array of shape `(S, M)`): which test images the trainings on the small set have right; S at least 2.
        full (array of shape `(R, M)`): those on all data; R at least 2.
        level (`float`): the probability in (0, 0.5) to accept what is worse by the margin exactly.
        small_seeds (sequence of S `int`, *optional*): 0, 1, … by default.
        full_seeds (sequence of R `int`, *optional*): likewise.

    Raises:
        ValueError: for fewer than two seeds, or other test images.
    """
    if min(len(small), len(full)) < 2:
        raise ValueError(
            f"A difference is tested over at least 2 seeds, got {len(small)} of the small set and {len(full)} of all "
            "data: allow more trainings."
        )
    if small.shape[1] != full.shape[1]:
        raise ValueError(f"The trainings were tested on {small.shape[1]} and {full.shape[1]} images: use the same.")
    small_seeds = range(len(small)) if small_seeds is None else small_seeds
    full_seeds = range(len(full)) if full_seeds is None else full_seeds
    ours, theirs = small.mean(1), full.mean(1)  # (S,), (R,)
    degrees = len(ours) + len(theirs) - 2
    variance = (((ours - ours.mean()) ** 2).sum() + ((theirs - theirs.mean()) ** 2).sum()) / degrees
    alone = float(variance * (1 / len(ours) + 1 / len(theirs)))
    shared = sorted(set(small_seeds) & set(full_seeds))
    common = 0.0
    if len(shared) > 2:
        left = ours[[list(small_seeds).index(seed) for seed in shared]]
        right = theirs[[list(full_seeds).index(seed) for seed in shared]]
        common = 2 * float(np.cov(left, right)[0, 1]) * len(shared) / (len(ours) * len(theirs))
    by_seed = stats.t.ppf(1 - level, degrees) * math.sqrt(max(alone - common, alone / 2))
    each = small.mean(0) - full.mean(0)  # (M,)
    by_image = stats.norm.ppf(1 - level) * each.std(ddof=1) / math.sqrt(len(each))
    return Look(float(ours.mean() - theirs.mean()), float(by_seed), float(by_image))


def images_needed(full: NDArray[np.bool_], margin: float, level: float) -> int:
    """Test images with which a set as good as all data could be told from one that is worse by a margin.

    Pairs of trainings on all data differ by chance as a lossless set does from them: their discordant images decide.

    Args:
        full (array of shape `(R, M)`): which test images the trainings on all data have right; R at least 2.
        margin (`float`): in (0, 1).
        level (`float`): of the test.
    """
    half = len(full) // 2
    spread = (full[:half].mean(0) - full[half : 2 * half].mean(0)).std()
    return math.ceil(float((stats.norm.ppf(1 - level) * spread / margin) ** 2))
