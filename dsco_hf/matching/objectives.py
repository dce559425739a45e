"""What the images of a class should achieve: objectives, which give one loss per class. Lower is better.

All objectives are functions of per-image observations, so that their exact joint gradient over any number of images
needs the memory of one micro-batch only (`dsco_hf.sampling.noise.joint_gradient`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import nn

from ..utils.values import Choice, check_real
from .feature_spec import POOLED, FeatureSource
from .features import Observation, batchnorm_layers
from .kernels import mmd2, regression_errors
from .targets import MatchingTargets


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

    def check(self, pipe: DiffusionPipeline, targets: Any) -> None:
        """Raises ValueError if the targets and the pipeline's networks do not fit the objective."""
        if self.needs is None:
            if targets is not None:
                raise ValueError(
                    f"The {self.name!r} objective uses no targets: leave `targets` out, or choose objective='rkhs'."
                )
            return
        check_kind(f"objective={self.name!r}", MatchingTargets, targets)
        targets.check_pipeline(pipe)
        if self.needs == "second_moment" and targets.second_moment is None:
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
        """The loss of images of the generator's classes `ids`; done once per call.

        Args:
            pipe (`DiffusionPipeline`): its networks see the images.
            targets (`MatchingTargets`, *optional*): what `needs` says.
            ids (sequence of `int`): each image's class of the generator.
            previous (`tuple`, *optional*): the finished images, see `each_image`.
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


def check_kind(what: str, wanted: type, targets: Any) -> None:
    """Raises ValueError unless the targets are of the wanted class."""
    if not isinstance(targets, wanted):
        raise ValueError(
            f"{what} takes {wanted.__name__}, got {type(targets).__name__}: make them with "
            f"`{wanted.__name__}.from_dataset(dataset, pipe)`."
        )


@dataclasses.dataclass(frozen=True)
class RKHS(Objective):
    """Kernel mean matching, see [`rkhs`].

    Attributes:
        contrast (`float`): γ: a class aims at μ_c + γ (μ_c - μ̄), away from the mean over all classes. 0 matches the
            class itself, which suits all but the smallest sets. At one image per class, values like 2 (digits) and 8
            (CIFAR-10 at 16 px) train better evaluators.
    """

    sentence: ClassVar[str] = "the few images drawn for a class together match the features of the whole class."
    contrast: float = 0.0

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        super().__post_init__()
        check_real("contrast", self.contrast, 0)

    def losses(self, seen: Observation, bound: Bound) -> torch.Tensor:
        """MMD² of each class."""
        return rkhs(seen, bound.rows, bound.targets, bound.previous, self.contrast)


@dataclasses.dataclass(frozen=True)
class Ridge(Objective):
    """What a ridge regression learns from the images, for a few images of several classes; see [`ridge`].

    Attributes:
        regularization (`float`): λ. On validation data of CIFAR-10 at 16 px, 2 suited 1, 10 and 50 images per class.
    """

    needs: ClassVar[str | None] = "second_moment"
    each_image: ClassVar[bool] = True
    sentence: ClassVar[str] = (
        "a ridge regression trained on the few images makes the smallest error on all of the source."
    )
    regularization: float = 2.0

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        super().__post_init__()
        check_real("regularization", self.regularization, 0, open_low=True)

    def check(self, pipe: DiffusionPipeline, targets: Any) -> None:
        """Also refuses targets of a single class."""
        if isinstance(targets, MatchingTargets) and targets.num_classes < 2:
            raise ValueError(
                f"objective='ridge' tells classes apart, and the targets have only {targets.class_names}: choose "
                "objective='rkhs'."
            )
        super().check(pipe, targets)

    def losses(self, seen: Observation, bound: Bound) -> torch.Tensor:
        """The regression's error on each class."""
        return ridge(seen, bound.rows, bound.targets, bound.previous, self.regularization)


def class_sums(values: torch.Tensor, index: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Sums rows `(B, D)` per class: `(num_classes, D)`; `index` `(B,)` holds each row's class position."""
    return values.new_zeros(num_classes, values.shape[1]).index_add(0, index, values)


def rkhs(
    observation: Observation,
    rows: torch.Tensor,
    targets: MatchingTargets,
    previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    contrast: float = 0.0,
) -> torch.Tensor:
    """Squared maximum mean discrepancy of every class: ‖(1/n) Σ_j ψ(φ(x_j)) - μ_c‖² (DsCo, arXiv 2603.27987, Prop. 1).

    With `contrast` the images aim beyond μ_c, away from the other classes; see [`contrasted_means`].

    Args:
        observation (`Observation`): features `(B, d)` of the images.
        rows (`torch.Tensor` of shape `(B,)`): each image's row of the targets.
        targets (`MatchingTargets`): the mean embeddings.
        previous (`tuple`, *optional*): sums `(C, D)` and counts `(C,)` of the embeddings of images that are in the set
            already, by row of the targets: the new images then match what these leave.
        contrast (`float`): γ, at least 0.

    Returns:
        `torch.Tensor` of shape `(K,)`: one loss per class that occurs, in ascending order of its row.
    """
    present, index = rows.unique(return_inverse=True)
    sums = class_sums(targets.embed(observation.features), index, len(present))  # (K, D)
    counts = torch.bincount(index, minlength=len(present)).to(sums)
    if previous is not None:
        sums, counts = sums + previous[0][present].to(sums), counts + previous[1][present].to(counts)
    return mmd2(sums / counts[:, None], contrasted_means(targets.embeddings, contrast)[present])


def contrasted_means(means: torch.Tensor, contrast: float) -> torch.Tensor:
    """μ_c + γ (μ_c - μ̄), with μ̄ the mean over all classes: `(C, D)` → `(C, D)`; the same means for γ = 0.

    ‖s - μ_c‖² - 2γ ⟨s, μ_c - μ̄⟩ up to a constant in s: few images cannot resemble a whole class, and teach more if
    they show what sets it apart. With many images the classes themselves should be matched, γ = 0.
    """
    return means + contrast * (means - means.mean(dim=0)) if contrast else means


def ridge(
    observation: Observation,
    rows: torch.Tensor,
    targets: MatchingTargets,
    previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    regularization: float = 2.0,
) -> torch.Tensor:
    """What the images teach: errors on the targets' population of a ridge regression that is trained on them.

    The closed form of "train on the small set, test on the large one", see [`regression_errors`]: the
    regression tells by ψ(φ(x)) whether an image is of class c (1 - 1/C) or of another (-1/C). Errors are means over
    classes of equal weight, so that b_c = (μ_c - μ̄) / C. Unlike [`rkhs`] it couples the classes that are drawn
    together, and only those are told apart. With networks whose weights are random this is the loss of "Efficient
    Dataset Distillation using Random Feature Approximation" (Loo et al. 2022, arXiv 2210.12067) without its rescaling.

    Args:
        observation (`Observation`): features `(B, d)` of the images.
        rows (`torch.Tensor` of shape `(B,)`): each image's row of the targets.
        targets (`MatchingTargets`): of two classes or more, with their second moment.
        previous (`tuple`, *optional*): embeddings `(n, D)` and rows `(n,)` of images that are in the set already; the
            regression is trained on them too.
        regularization (`float`): λ.

    Returns:
        `torch.Tensor` of shape `(K,)`: one loss per class that occurs among the new images, in ascending order of its
            row; the error of always answering zero is 0.
    """
    present = rows.unique()
    psi = targets.embed(observation.features)  # (B, D)
    if previous is not None:
        psi, rows = torch.cat([previous[0].to(psi), psi]), torch.cat([previous[1].to(rows), rows])
    labels = (rows[:, None] == present).to(psi) - 1 / targets.num_classes  # (n + B, K)
    means = targets.embeddings
    cross = (means[present] - means.mean(dim=0)).T / targets.num_classes  # (D, K)
    assert targets.second_moment is not None  # `Objective.check` refuses targets without
    return regression_errors(psi, labels, targets.second_moment, cross, regularization)


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

    def check(self, pipe: DiffusionPipeline, targets: Any) -> None:
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
        """Rows are the classifier's labels; ValueError if it was trained on other classes."""
        return super().bind(pipe, None, pipe.classifier_labels(ids))

    def losses(self, seen: Observation, bound: Bound) -> torch.Tensor:
        """The weighted sum of the three parts."""
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


def class_means(values: torch.Tensor, index: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Means of rows `(B, D)` per class: `(num_classes, D)`."""
    counts = torch.bincount(index, minlength=num_classes).to(values)
    return class_sums(values, index, num_classes) / counts[:, None]


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
