"""A population of images as a classifier sees it: features on disk, moments and embeddings in constant memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch

from .kernels import draw_frequencies, fourier_embedding, median_bandwidth


class Population:
    """Features of a population on disk, with running moments in float64 (Chan, Golub & LeVeque 1983)."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.images = 0
        self._weight = torch.zeros(len(names), dtype=torch.float64)
        self._total = 0.0
        self._mean: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None  # weighted sum of squared deviations from the mean
        self._rows: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="dsco-features-")

    def __enter__(self) -> Population:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, features: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Takes features `(B, d)`, their class rows `(B,)` and weights `(B,)` (1 if None)."""
        features = features.detach().float().cpu()
        weights = torch.ones(len(features)) if weights is None else weights.float().cpu()
        self._file.write(np.ascontiguousarray(features.numpy()).tobytes())
        self._rows.append(rows.cpu())
        self._weights.append(weights)
        self.images += len(features)
        x, w = features.double(), weights.double()
        self._weight.index_add_(0, rows.cpu(), w)
        total = w.sum().item()
        if total == 0:
            return
        mean = (w[:, None] * x).sum(dim=0) / total
        squares = (w[:, None] * (x - mean).square()).sum(dim=0)
        if self._mean is None or self._squares is None:
            self._mean, self._squares, self._total = mean, squares, total
            return
        delta, joint = mean - self._mean, self._total + total
        self._mean = self._mean + delta * (total / joint)
        self._squares = self._squares + squares + delta.square() * (self._total * total / joint)
        self._total = joint

    def embed(self, *, embedding_dim: int, bandwidth: float | None, seed: int) -> dict[str, Any]:
        """Standardises, chooses the bandwidth, embeds, and averages per class.

        Returns:
            `dict`: `embeddings`, `counts`, `feature_mean`, `feature_std`, `frequencies` and `bandwidth`, as in
            `dsco_hf.targets.MatchingTargets`.
        """
        refuse_empty_classes(self._weight.tolist(), self.names)
        assert self._mean is not None and self._squares is not None
        mean = self._mean.float()
        std = (self._squares / self._total).sqrt().float()
        std = torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.ones_like(std))  # constant dimensions
        rows, weights, d = torch.cat(self._rows), torch.cat(self._weights), mean.shape[0]
        if bandwidth is None:
            used = weights.nonzero()[:, 0]
            order = torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))
            bandwidth = median_bandwidth((self._read(used[order[:2000]].sort().values, d) - mean) / std)
        frequencies = draw_frequencies(d, embedding_dim, bandwidth, generator=torch.Generator().manual_seed(seed))
        sums = torch.zeros(len(self.names), embedding_dim, dtype=torch.float64)
        for chunk in torch.arange(self.images).split(4096):
            psi = fourier_embedding((self._read(chunk, d) - mean) / std, frequencies)
            sums.index_add_(0, rows[chunk], psi.double() * weights[chunk, None].double())
        return {
            "embeddings": (sums / self._weight[:, None]).float(),
            "counts": self._weight.float(),
            "feature_mean": mean,
            "feature_std": std,
            "frequencies": frequencies,
            "bandwidth": float(bandwidth),
        }

    def _read(self, indices: torch.Tensor, d: int) -> torch.Tensor:
        """Rows of the file `(n, d)`, by ascending index; neighbours are read together."""
        pieces = []
        for first, last in _runs(indices.tolist()):
            self._file.seek(4 * d * first)
            pieces.append(np.frombuffer(self._file.read(4 * d * (last - first)), dtype=np.float32).reshape(-1, d))
        return torch.from_numpy(np.concatenate(pieces))


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending indices as half-open intervals."""
    start = previous = indices[0]
    for index in indices[1:]:
        if index != previous + 1:
            yield start, previous + 1
            start = index
        previous = index
    yield start, previous + 1


def refuse_empty_classes(weights: Iterable[float], names: Sequence[str]) -> None:
    """Raises ValueError for classes without an image or with no weight at all."""
    empty = [name for name, weight in zip(names, weights, strict=True) if not weight > 0]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(names)} classes have no image to learn a target from: {empty[:10]}. Give each "
            "class at least one image, or remove the class from the dataset's labels."
        )
