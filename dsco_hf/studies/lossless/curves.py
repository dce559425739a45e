"""Learning curves: accuracy = a - b·n^(-c), fitted to few trainings, with what seeds and test images leave open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Floats = NDArray[np.float64]
EXPONENTS = np.geomspace(0.1, 3.0, 24)  # of published curves: 0.1 to 1, more where hard images are kept first
LEAST_STD = 3e-4  # over seeds: two of them may agree by chance


@dataclass(frozen=True)
class Curves:
    """A learning curve for each draw of a bootstrap.

    Attributes:
        top (array of shape `(B,)`): accuracy with all images, a - b.
        drop (array of shape `(B,)`): b, at least 0.
        exponent (array of shape `(B,)`): c, one of `EXPONENTS`.
        whole (`int`): number of all images, N.
    """

    top: Floats
    drop: Floats
    exponent: Floats
    whole: int

    def __call__(self, images: NDArray[np.int64] | int) -> Floats:
        """Accuracy with so many images, `(B, G)`, or `(B, 1)` for one number."""
        share = np.atleast_1d(images) / self.whole
        return self.top[:, None] - self.drop[:, None] * (share ** -self.exponent[:, None] - 1)


def fit_curves(images: NDArray[np.int64], accuracy: Floats, std: Floats) -> Curves:
    """Least squares, weighted by 1 / std², for each row of measurements.

    For a given exponent the other two are those of a straight line; of all exponents the best is kept.

    Args:
        images (array of shape `(K,)`): numbers of images; the largest is that of all.
        accuracy (array of shape `(B, K)`): in [0, 1].
        std (array of shape `(K,)`): of the accuracies.

    Raises:
        ValueError: for fewer than two sizes.
    """
    if len(images) < 2:
        raise ValueError(f"A learning curve needs at least 2 sizes, got {len(images)}.")
    weight, share = (1 / std**2) / (1 / std**2).sum(), images / images.max()
    middle = accuracy @ weight  # (B,)
    least, best = np.full(len(accuracy), np.inf), np.zeros((3, len(accuracy)))
    for exponent in EXPONENTS:
        lost = share**-exponent - 1  # (K,), 0 for all images
        centred = lost - weight @ lost
        slope = np.maximum(-((accuracy - middle[:, None]) @ (weight * centred)) / (weight @ centred**2), 0)
        top = middle + slope * (weight @ lost)
        error = (accuracy - top[:, None] + slope[:, None] * lost) ** 2 @ weight
        better = error < least
        least[better] = error[better]
        best[:, better] = np.stack([top, slope, np.full(len(top), exponent)])[:, better]
    return Curves(best[0], best[1], best[2], int(images.max()))


def bootstrap_curves(
    measured: Mapping[int, NDArray[np.bool_]], *, draws: int = 200, lack: float = 0.0, seed: int = 0
) -> Curves:
    """Curves through accuracies that are drawn again as other seeds and other test images would have given them.

    Both are drawn as normal deviates with the covariances that a bootstrap over seeds and one over images have; sizes
    with a single seed borrow the deviation over seeds of the others.

    Args:
        measured (mapping of `int` to array of shape `(S, M)`): number of images → which of M test images each of S
            trainings has right.
        draws (`int`): B.
        lack (`float`): deviation by which a curve of this form may miss a size.
        seed (`int`): of the draws.
    """
    random = np.random.default_rng(seed)
    sizes = np.array(sorted(measured))
    accuracies = [measured[size].mean(1) for size in sizes]  # each (S,)
    counts = np.array([len(own) for own in accuracies])
    mean = np.array([own.mean() for own in accuracies])
    spread = seed_std(accuracies) / np.sqrt(counts)  # (K,)
    right = np.stack([measured[size].mean(0) for size in sizes])  # (K, M)
    shared = np.atleast_2d(np.cov(right - right[-1])) / right.shape[1]  # (K, K), of differences from all images
    drawn = mean + random.standard_normal((draws, len(sizes))) * np.hypot(spread, lack * (sizes < sizes[-1]))
    drawn += random.multivariate_normal(np.zeros(len(sizes)), shared, size=draws, method="eigh")
    return fit_curves(sizes, drawn, np.hypot(spread, lack))


def seed_std(accuracies: list[Floats]) -> float:
    """The deviation over seeds, of all sizes together; at least `LEAST_STD`."""
    squares = sum(float(((own - own.mean()) ** 2).sum()) for own in accuracies)
    return max(float(np.sqrt(squares / max(sum(len(own) - 1 for own in accuracies), 1))), LEAST_STD)
