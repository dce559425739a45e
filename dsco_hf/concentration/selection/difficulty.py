"""Scores of how hard an image is to learn, all of one logged training: EL2N, forgetting, AUM, Dyn-Unc and DUAL."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...data.datasets import Pool
from ...sampling.pipeline import DsCoPipeline
from ...utils.values import Limits
from .base import Selection
from .dynamics import TrainingLog


def logged(rule: str, training: TrainingLog | None, pool: Pool, least: int = 1) -> TrainingLog:
    """The log of a pool's images, of `least` epochs or more.

    Raises:
        ValueError: if there is none, it is too short, of other images, or has values that are no finite numbers.
    """
    if training is None:
        raise ValueError(
            f"{rule!r} goes by a logged training, and has none: pass `training=log_training(real, folder)`, or a kept "
            "one, `training=TrainingLog.load(folder)`."
        )
    if training.epochs < least:
        raise ValueError(
            f"{rule!r} needs {least} epochs, and the training was logged for {training.epochs}: log a longer one, "
            f"`protocol=get_protocol('quick', epochs={max(30, least)})`, or give the rule a smaller `window`."
        )
    return training.of(pool, rule)


def groups(pool: Pool, wanted: Sequence[int] | int) -> Iterator[tuple[torch.Tensor, int]]:
    """What is ranked together, and how many of it are wanted: places `(n,)` of each class, or of all."""
    if isinstance(wanted, int):
        yield torch.arange(len(pool.labels)), min(wanted, len(pool.labels))
        return
    for row, count in enumerate(wanted):
        if count:
            yield (pool.labels == row).nonzero()[:, 0], count


def highest(scores: torch.Tensor, seed: int) -> torch.Tensor:
    """Places by descending score `(N,)`; equal ones in an order that the seed draws, as counts are often equal."""
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    return order[scores[order].argsort(descending=True, stable=True)]


@dataclass(frozen=True)
class OfTraining:
    """Ranks by a score of a logged training, the highest first: the hardest.

    Attributes:
        training ([`TrainingLog`], *optional*): which `rank` needs.
    """

    training: TrainingLog | None = None

    least: ClassVar[int] = 1  # epochs
    across_classes: ClassVar[bool] = True

    @abc.abstractmethod
    def scores(self, training: TrainingLog) -> torch.Tensor:
        """`(N,)` of a log `(E, N)`; high where an image should be chosen."""

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places of all images, `(N,)`, the highest score first; ValueError without a log of them."""
        return highest(self.scores(logged(self.name, self.training, pool, self.least)), seed)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class EL2N(OfTraining, Selection):
    """Images of the largest mean error ‖p - onehot(y)‖₂ early in training (Paul, Ganguli & Dziugaite 2021).

    The paper takes the mean of ten networks after some epochs; as its successors do, this takes that of the first
    epochs of one.

    Attributes:
        training ([`TrainingLog`]): the logged training.
        epochs (`int`): how many of its epochs count, or as many as there are.
    """

    epochs: int = 10

    sentence: ClassVar[str] = "Real images were added whose error was largest early in a training (EL2N)."
    field_limits = {"epochs": 1}

    def scores(self, training: TrainingLog) -> torch.Tensor:
        """The mean error of the first epochs, `(N,)`."""
        return training.errors[: self.epochs].mean(0)


@dataclass(frozen=True)
class Forgetting(OfTraining, Selection):
    """Images that are forgotten most often: right after an epoch and wrong after the next (Toneva et al. 2019).

    Images that are never right count as forgotten more often than all others, as in the paper.
    """

    sentence: ClassVar[str] = "Real images were added that were forgotten most often in a training."

    def scores(self, training: TrainingLog) -> torch.Tensor:
        """The number of changes from right to wrong, `(N,)`; E where it was never right."""
        right = training.margins > 0
        forgotten = (right[:-1] & ~right[1:]).sum(0)
        return torch.where(right.any(0), forgotten, training.epochs).float()


@dataclass(frozen=True)
class AUM(OfTraining, Selection):
    """Images of the smallest mean margin over a training (Pleiss et al. 2020, "area under the margin").

    The margin is that of probabilities, p[y] - max p[other], as in the coresets that build on it (CCS); the paper,
    which looks for wrong labels, takes that of logits.
    """

    sentence: ClassVar[str] = "Real images were added whose margin was smallest over a training (AUM)."

    def scores(self, training: TrainingLog) -> torch.Tensor:
        """The mean margin, negative, `(N,)`: hard images first."""
        return -training.margins.mean(0)


@dataclass(frozen=True)
class DynUnc(OfTraining, Selection):
    """Images whose probability varies most within windows of a training (He, Yang, Huang & Zhao 2024, "Dyn-Unc").

    Attributes:
        training ([`TrainingLog`]): the logged training.
        window (`int`): epochs of a window; the score is the mean over all windows of the standard deviation of p[y].
    """

    window: int = 10

    name: ClassVar[str] = "dyn_unc"
    sentence: ClassVar[str] = "Real images were added whose probability varied most in a training (Dyn-Unc)."
    field_limits = {"window": 2}

    @property
    def least(self) -> int:  # type: ignore[override]
        """Epochs that the log must have."""
        return self.window

    def scores(self, training: TrainingLog) -> torch.Tensor:
        """The mean over windows of the standard deviation (of the sample) of p[y], `(N,)`."""
        return training.probabilities.unfold(0, self.window, 1).std(-1).mean(0)


@dataclass(frozen=True)
class DUAL(OfTraining, Selection):
    """Hard and uncertain images, and easier ones where few are wanted (Cho et al. 2025, "DUAL": arXiv 2502.06905).

    The score is the mean over windows of std p[y] · (1 - mean p[y]), early in a training. Images are drawn without
    putting back by score · Beta(p̄; a, b), p̄ the mean of p[y], b = 15 (1 - p̄ of the ten of highest score)
    (1 - r^curve), a = 16 - b, r the share that is not chosen: the fewer, the easier.

    Attributes:
        training ([`TrainingLog`]): the logged training.
        epochs (`int`): how many of its epochs count, or as many as there are; 30 of 200 in the paper, 60 on ImageNet.
        window (`int`): epochs of a window.
        curve (`float`): 4 in the paper on CIFAR-100; simpler datasets take more.
        left_out (`float`, *optional*): r in [0, 1], whatever the size: choices then nest; by default that of the size.
    """

    epochs: int = 30
    window: int = 10
    curve: float = 4.0
    left_out: float | None = None

    nested: ClassVar[bool] = False
    sentence: ClassVar[str] = "Real images were added that were hard and uncertain early in a training (DUAL)."

    field_limits = {"window": 2, "curve": Limits(0, open_low=True), "left_out": Limits(0, 1)}

    def __post_init__(self) -> None:
        """Refuses numbers that do not go together."""
        super().__post_init__()
        if self.epochs < self.window:
            raise ValueError(f"`epochs` must be at least `window`, {self.window}; got {self.epochs}.")

    @property
    def least(self) -> int:  # type: ignore[override]
        """Epochs that the log must have."""
        return self.window

    def scores(self, training: TrainingLog) -> torch.Tensor:
        """The mean over windows of std p[y] · (1 - mean p[y]), `(N,)`."""
        windows = training.probabilities[: self.epochs].unfold(0, self.window, 1)  # (W, N, window)
        return (windows.std(-1) * (1 - windows.mean(-1))).mean(0)

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(n,)`, as many as are wanted, in the order in which they are drawn."""
        training = logged(self.name, self.training, pool, self.least)
        scores, mean = self.scores(training), training.probabilities[: self.epochs].mean(0)
        generator, parts = torch.Generator().manual_seed(seed), []
        for places, count in groups(pool, wanted):
            share = 1 - count / len(places) if self.left_out is None else self.left_out
            drawn = beta_weights(scores[places], mean[places], share, self.curve)
            # The largest of log weight + Gumbel noise are a draw without putting back; weights of 0 come last.
            noise = -torch.empty(len(places)).exponential_(generator=generator).log()
            parts.append(places[(drawn + noise).argsort(descending=True, stable=True)[:count]])
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def beta_weights(scores: torch.Tensor, mean: torch.Tensor, left_out: float, curve: float) -> torch.Tensor:
    """log(score · Beta(p̄; a, b)) up to a constant, `(N,)`; see [`DUAL`].

    Args:
        scores (`torch.Tensor` of shape `(N,)`): at least 0.
        mean (`torch.Tensor` of shape `(N,)`): p̄ in [0, 1].
        left_out (`float`): r in [0, 1].
        curve (`float`): above 0.
    """
    hardest = mean[scores.argsort(descending=True, stable=True)[:10]].mean()
    b = 15 * (1 - hardest) * (1 - left_out**curve)
    a, inside = 16 - b, mean.double().clamp(1e-6, 1 - 1e-6)  # the density may be infinite at the ends
    return scores.double().clamp_min(1e-300).log() + (a - 1) * inside.log() + (b - 1) * (1 - inside).log()
