"""How far a set of images is from its targets: of all of it, block by block, and of as many random real images."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from ..data.labels import counted_in_class
from .feature_spec import FeatureSource
from .kernels import mmd2
from .objectives import class_means, unexplained
from .targets import MatchingTargets


MEASURED_BLOCKS = 5
REGULARIZATION = 2.0  # λ, as of the objective


class PreviousBlocks:
    """Embedding sums and counts of the finished images by row of the targets; if wanted, `each` embedding, too."""

    def __init__(self, targets: MatchingTargets, *, each: bool = False) -> None:
        self.targets = targets
        self.sums = torch.zeros_like(targets.embeddings)
        self.counts = torch.zeros(targets.num_classes, device=targets.embeddings.device)
        self.each: dict[int, list[torch.Tensor]] | None = {} if each else None

    def statistics(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """What a call for these classes takes as `previous`.

        Sums `(C, D)` and counts `(C,)`; of each image, embeddings `(n, D)` and rows `(n,)`.
        """
        if self.each is None:
            return self.sums.clone(), self.counts.clone()
        found = [(row, psi) for row in rows for psi in self.each[row]]
        return torch.stack([psi for _, psi in found]), torch.tensor([row for row, _ in found])

    def add(self, pixels: torch.Tensor, rows: Sequence[int], pipe: DiffusionPipeline) -> None:
        """Takes pixels `(B, C, H, W)` of finished images as they are stored, so that a run can go on from these."""
        psi = embed_pixels(pixels, pipe, self.targets)
        index = torch.tensor(rows, device=psi.device)
        self.sums.index_add_(0, index, psi)
        self.counts.index_add_(0, index, torch.ones_like(index, dtype=self.counts.dtype))
        if self.each is not None:
            for row, embedding in zip(rows, psi, strict=True):
                self.each.setdefault(row, []).append(embedding)

    def discrepancies(self, rows: Sequence[int]) -> list[float]:
        """MMD² of the images so far from the targets, for each of these classes."""
        index = torch.tensor(rows, device=self.sums.device)
        means = self.sums[index] / self.counts[index, None]
        return mmd2(means, self.targets.embeddings[index]).tolist()


@torch.no_grad()
def embed_pixels(pixels: torch.Tensor, pipe: DiffusionPipeline, targets: MatchingTargets) -> torch.Tensor:
    """ψ(φ(x)) `(B, D)` of pixels `(B, C, H, W)` in [-1, 1], on the device of the targets."""
    device, source = targets.embeddings.device, FeatureSource(pipe, targets.features)
    # few at a time: a classifier's activations at 256 images can be more than all of the noise optimisation takes
    return torch.cat([targets.embed(source.of_pixels(part).features.to(device)) for part in pixels.split(32)])


def measure_discrepancy(
    pixels: torch.Tensor, rows: torch.Tensor, pipe: DiffusionPipeline, targets: MatchingTargets
) -> dict[str, float]:
    """MMD² of a set of images from the targets, per class name. Lower is better.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, range [-1, 1]): the images.
        rows (`torch.Tensor` of shape `(N,)`): their row of the targets; every class that occurs is measured.
        pipe (`DsCoPipeline`): has the classifier that the targets were made with.
        targets (`MatchingTargets`): the class means.
    """
    targets.check_pipeline(pipe)
    return _discrepancy(embed_pixels(pixels, pipe, targets), rows.to(targets.embeddings.device), targets)


@dataclasses.dataclass(frozen=True)
class SetMeasures:
    """What can be said of a set of images without training on it.

    Attributes:
        discrepancy (`dict[str, float]`): MMD² from the real class, by class.
        unexplained (`float`, *optional*): share of the variance of the labels that a ridge regression does not learn
            from the set, mean over classes, see [`~dsco_hf.matching.objectives.unexplained`].
        redundancy (list of lists of `float`, *optional*): how much of what a block teaches an earlier or later one
            taught already, see [`redundancy`].
    """

    discrepancy: dict[str, float]
    unexplained: float | None = None
    redundancy: list[list[float | None]] | None = None


def measure_set(
    pixels: torch.Tensor,
    rows: torch.Tensor,
    pipe: DiffusionPipeline,
    targets: MatchingTargets,
    *,
    block_size: int = 10,
) -> SetMeasures:
    """Discrepancy, regression error and redundancy of a set of images.

    The latter two need targets of two classes or more with their second moment, redundancy a second block.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, range [-1, 1]): the images.
        rows (`torch.Tensor` of shape `(N,)`): their row of the targets.
        pipe (`DsCoPipeline`): has the classifier that the targets were made with.
        targets (`MatchingTargets`): of the real classes.
        block_size (`int`): images of a class in a block.
    """
    targets.check_pipeline(pipe)
    psi, rows = embed_pixels(pixels, pipe, targets), rows.to(targets.embeddings.device)
    found = _discrepancy(psi, rows, targets)
    if targets.second_moment is None or targets.num_classes < 2:
        return SetMeasures(found)
    share = float(unexplained(psi, rows, targets, REGULARIZATION).mean())
    return SetMeasures(found, share, redundancy(psi, rows, targets, block_size))


def redundancy(
    psi: torch.Tensor, rows: torch.Tensor, targets: MatchingTargets, block_size: int = 10
) -> list[list[float | None]] | None:
    """How much of what block j of a set teaches block i taught already: R[i][j] = 1 - (e_i - e_ij) / (1 - e_j).

    e is what a ridge regression leaves unexplained after one block or both ([`unexplained`]), with λ in proportion to
    the images. 0: the two teach different things; 1: j adds nothing to i, as a copy of i does. Only the first
    `MEASURED_BLOCKS` blocks that are whole are looked at.

    Args:
        psi (`torch.Tensor` of shape `(N, D)`): embeddings, the images of a class in the order of their blocks.
        rows (`torch.Tensor` of shape `(N,)`): their row of the targets.
        targets (`MatchingTargets`): of two classes or more, with their second moment.
        block_size (`int`): images of a class in a block.

    Returns:
        A square of lists, None on its diagonal and where block j alone teaches nothing; None where fewer than two
        blocks are whole.
    """
    blocks = torch.tensor(counted_in_class(rows.tolist()), device=rows.device) // block_size
    whole = min(int(torch.bincount(rows).min()) // block_size, MEASURED_BLOCKS)
    if whole < 2:
        return None

    def left(*chosen: int) -> float:
        mine = (blocks[:, None] == torch.tensor(chosen, device=rows.device)).any(dim=1)
        share = unexplained(psi[mine], rows[mine], targets, REGULARIZATION * len(chosen))
        return float(share.mean())

    alone = [left(i) for i in range(whole)]
    both = {pair: left(*pair) for pair in itertools.combinations(range(whole), 2)}

    def taught(i: int, j: int) -> float | None:
        if i == j or alone[j] >= 1:  # a block that teaches nothing
            return None
        return 1 - (alone[i] - both[min(i, j), max(i, j)]) / (1 - alone[j])

    return [[taught(i, j) for j in range(whole)] for i in range(whole)]


def _discrepancy(psi: torch.Tensor, rows: torch.Tensor, targets: MatchingTargets) -> dict[str, float]:
    present, index = rows.unique(return_inverse=True)
    values = mmd2(class_means(psi, index, len(present)), targets.embeddings[present])
    return {targets.class_names[row]: value for row, value in zip(present.tolist(), values.tolist(), strict=True)}


def random_discrepancy(targets: MatchingTargets, images: Mapping[str, int]) -> dict[str, float]:
    """MMD² that as many random real images of each class have on average: what a discrepancy is to be held against.

    Means of n images that are drawn from the N of a class without putting back are (1 - ‖μ‖²) / n · (N - n) / (N - 1)
    away from its own on average, as ‖ψ‖ = 1: no image has to be read for it.

    Args:
        targets (`MatchingTargets`): of real images.
        images (mapping of `str` to `int`): images of each class, by its name in the targets; at least 1.

    Returns:
        `dict[str, float]`: by class; empty for targets of a generator's samples, which know no real image.
    """
    if targets.provenance.get("population") != "data":
        return {}
    found = {}
    for name, count in images.items():
        row = targets.class_names.index(name)
        whole, spread = float(targets.counts[row]), 1 - float(targets.embeddings[row].double().square().sum())
        found[name] = max(0.0, spread) / count * max(0.0, whole - count) / max(whole - 1, 1)
    return found
