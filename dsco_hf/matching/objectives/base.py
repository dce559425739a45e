"""Objectives: what the images of a class should achieve, which gives one loss per class. Lower is better.

All objectives are functions of per-image observations, so that their exact joint gradient over any number of images
needs the memory of one micro-batch only (`dsco_hf.sampling.methods.noise.joint_gradient`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import DiffusionPipeline

from ...utils.values import Choice
from ..feature_spec import POOLED, FeatureSource
from ..features import Observation
from ..targets import MatchingTargets


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Objective(Choice):
    """What the images of a class should achieve; a subclass has its hyper-parameters as fields, and `losses`.

    Attributes:
        needs (`str`, *optional*): what targets must hold: "means", "second_moment" (and the means), or None for an
            objective without targets.
        each_image (`bool`): whether it is told of every finished image, embeddings `(n, D)` and rows `(n,)`, rather
            than of their sums `(C, D)` and counts `(C,)` by row of the targets.
        sentence (`str`): what cards say was done.
    """

    argument: ClassVar[str] = "objective"
    needs: ClassVar[str | None] = "means"
    each_image: ClassVar[bool] = False
    sentence: ClassVar[str] = "the few images of a class together teach what the whole class does."

    @property
    def moments(self) -> bool:
        """Whether images are observed at BatchNorm layers, too."""
        return False

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError if the targets and the pipeline's networks do not fit the objective."""
        if self.needs is None:
            if targets is not None:
                raise ValueError(
                    f"The {self.name!r} objective uses no targets: leave `targets` out, or choose objective='rkhs'."
                )
            return
        known = check_kind(f"objective={self.name!r}", MatchingTargets, targets)
        known.check_pipeline(pipe)
        if self.needs == "second_moment" and known.second_moment is None:
            raise ValueError(
                f"objective={self.name!r} takes targets with a second moment, and these have none: make them with "
                "`MatchingTargets.from_dataset(dataset, pipe)`, or choose objective='rkhs'."
            )

    def bind(
        self,
        pipe: DiffusionPipeline,
        targets: MatchingTargets | None,
        ids: Sequence[int],
        previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Bound:
        """The loss of B images of the generator's classes `ids`; done once per call.

        Args:
            pipe (`DiffusionPipeline`): its networks see the images.
            targets (`MatchingTargets`, *optional*): what `needs` says.
            ids (sequence of `int`): each image's class of the generator.
            previous (`tuple`, *optional*): the finished images, `(n, D)` and `(n,)` or `(C, D)` and `(C,)`; see
                `each_image`.
        """
        device = pipe._execution_device
        if targets is None:
            return Bound(self, pipe, FeatureSource(pipe, POOLED), torch.tensor(ids, device=device))
        rows = targets.rows_of(ids).to(device)
        return Bound(self, pipe, FeatureSource(pipe, targets.features), rows, targets.to(device), previous)

    @abc.abstractmethod
    def losses(self, seen: Observation, bound: Bound) -> torch.Tensor:
        """The losses `(K,)` of the K classes that occur, in ascending order of their row; lower is better.

        Args:
            seen ([`Observation`]): what the networks see in the B images; gradients reach it.
            bound ([`Bound`]): each image's row of the targets, the targets, and the finished images.
        """


@dataclasses.dataclass(frozen=True)
class Bound:
    """An objective for the images of one call: observation → losses `(K,)`.

    Attributes:
        objective ([`Objective`]), pipe (`DiffusionPipeline`): whose they are.
        source (`FeatureSource`): what observes the images.
        rows (`torch.Tensor` of shape `(B,)`): each image's row of the targets; without targets its class.
        targets (`MatchingTargets`, *optional*): on the pipeline's device.
        previous (`tuple`, *optional*): the finished images, see [`Objective`].
    """

    objective: Objective
    pipe: DiffusionPipeline
    source: FeatureSource
    rows: torch.Tensor
    targets: Any = None
    previous: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, seen: Observation) -> torch.Tensor:
        """The losses of what is seen in the images."""
        return self.objective.losses(seen, self)


def check_kind(what: str, wanted: type[T], targets: object) -> T:
    """The targets; ValueError unless they are of the wanted class."""
    if not isinstance(targets, wanted):
        raise ValueError(
            f"{what} takes {wanted.__name__}, got {type(targets).__name__}: make them with "
            f"`{wanted.__name__}.from_dataset(dataset, pipe)`."
        )
    return targets


def class_sums(values: torch.Tensor, index: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Sums rows `(B, D)` per class: `(num_classes, D)`; `index` `(B,)` holds each row's class position."""
    return values.new_zeros(num_classes, values.shape[1]).index_add(0, index, values)


def class_means(values: torch.Tensor, index: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Means of rows `(B, D)` per class: `(num_classes, D)`."""
    counts = torch.bincount(index, minlength=num_classes).to(values)
    return class_sums(values, index, num_classes) / counts[:, None]
