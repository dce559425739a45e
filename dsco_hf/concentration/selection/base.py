"""Selections: rules by which real images are chosen, alone (`select`) or on top of a small set (`dope`).

A rule is a frozen dataclass of its own hyper-parameters that ranks the images of a [`Pool`]. To add one, write it
anywhere and pass it; nothing has to be told of it elsewhere:

    @dataclass(frozen=True)
    class Darkest(Selection):
        power: float = 1.0

        def rank(self, pool, small, wanted, pipe, seed):
            return pool.pixels().sum((1, 2, 3)).mul(self.power).argsort(stable=True)  # (N,): best first

    mixed = dope(small, real, strategy=Darkest(), images_per_class=50)
    few = select(real, Darkest(power=2.0), images_per_class=10)

Of a ranking the first images of every class are taken, so that choices are nested by construction, unless the rule
says `nested = False`. The record of a doped set names the rule, one's own by its import path, with its fields;
`recorded_doping` makes it again. A rule that compares images of different classes says `across_classes = True`, one
that says itself how many are chosen `picks = True`. More rules are in the files beside this one.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from ...data.datasets import Pool
from ...data.labels import class_mapping
from ...data.schema import image_seed
from ...evaluators import predict_logits
from ...evaluators.batches import class_columns, model_classes
from ...evaluators.evaluation import ImageSet, evaluator_builder
from ...evaluators.protocols import Protocol, get_protocol, protocol_from_dict, protocol_to_dict
from ...evaluators.training import train_evaluator
from ...matching.discrepancy import embed_pixels
from ...matching.feature_spec import POOLED
from ...matching.kernels import herd
from ...matching.objectives import class_margin
from ...matching.targets import MatchingTargets
from ...sampling.pipeline import DsCoPipeline
from ...utils.names import find_classes
from ...utils.origins import model_sha256, targets_sha256
from ...utils.values import Choice, Limits, check_choice, plain
from .features import fourier_features, image_features


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection(Choice):
    """A rule that ranks real images; its fields are its hyper-parameters.

    Attributes:
        across_classes (`bool`): its ranking compares images of different classes: the first of all of them may be
            chosen. Otherwise every class is filled by itself.
        picks (`bool`): it ranks only those that should be chosen, so that their number need not be said.
        nested (`bool`): its ranking does not depend on how many are wanted, so that a small choice is part of a large
            one.
        sentence (`str`): what cards say was done; by its name if empty.
    """

    argument: ClassVar[str] = "strategy"
    sentence: ClassVar[str] = ""
    across_classes: ClassVar[bool] = False
    picks: ClassVar[bool] = False
    nested: ClassVar[bool] = True

    @abc.abstractmethod
    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Images of the pool in the order in which they should be chosen.

        Args:
            pool ([`Pool`]): N real images.
            small ([`Pool`], *optional*): the set that they are added to, its classes numbered as in the pool.
            wanted (sequence of `int`, or `int`): how many of each class will be taken; more need not be ranked.
                One number for all classes together, only to rules that say `across_classes` or `picks`.
            pipe (`DsCoPipeline`, *optional*): its models may be asked.
            seed (`int`): of all that is random.

        Returns:
            `torch.Tensor` of shape `(M,)`, int64, M ≤ N: places in the pool, each once, best first.
        """

    def as_record(self) -> dict[str, Any]:
        """`name`, and the fields as plain values; of models, targets and logs their SHA-256."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": self.name, **{key: _told(value) for key, value in fields.items()}}

    def record(self, names: Sequence[str], pipe: DsCoPipeline | None) -> dict[str, Any]:
        """What a doped set records of its rule: [`as_record`], or more exactly.

        Args:
            names (sequence of `str`): the classes, for rules that are more exact with them.
            pipe (`DsCoPipeline`, *optional*): likewise.
        """
        return self.as_record()


@dataclass(frozen=True)
class Random(Selection):
    """Real images at random, every class by itself: the baseline of all others.

    Alone and on top of a set the same seed draws otherwise: what is added is independent of the baseline beside it.
    """

    sentence: ClassVar[str] = "Real images were added at random."

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(N,)`: every class in an order that depends on the seed and, alone, on that class only."""
        generator, parts = torch.Generator().manual_seed(seed), []
        for label in range(len(pool.names)):
            members = (pool.labels == label).nonzero()[:, 0]
            if small is None:
                order = torch.from_numpy(np.random.default_rng([seed, label]).permutation(len(members)))
            else:
                order = torch.randperm(len(members), generator=generator)
            parts.append(members[order])
        return torch.cat(parts)


# The candidates (n, D) of one class, the mean (D,) that they should have, and what the small set has of it (m, D).
Space = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Herding(Selection):
    """Class by class the image that brings the mean of the whole set nearest to that of the class.

    On top of a small set it fills what that leaves unmatched (Chen, Welling & Smola 2010, "Super-Samples from Kernel
    Herding").

    Attributes:
        targets (`MatchingTargets`, *optional*): whose embedding and class means count; by default those made of the
            pool with what the pipeline's classifier sees.
        features (`PreTrainedModel` or "pixels", *optional*): in place of targets: the pooled features of a classifier
            in eval mode, or the pixels themselves, in random Fourier features by the seed. Needs no pipeline.
    """

    targets: MatchingTargets | None = None
    features: PreTrainedModel | str | None = None

    sentence: ClassVar[str] = "Real images were added that fill best what the synthetic ones leave unmatched."

    def __post_init__(self) -> None:
        """Refuses fields that exclude each other."""
        if isinstance(self.features, str):
            check_choice("features", self.features, ["pixels"])
        if self.features is not None and self.targets is not None:
            raise ValueError("Herding goes by `targets` or by `features`, not by both: leave one of them out.")

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(n,)`, as many of each class as are wanted, as every further one depends on all before."""
        assert not isinstance(wanted, int)  # it goes class by class
        rows = [row for row, count in enumerate(wanted) if count]
        if self.features is None:
            space = self._of_targets(pool, small, rows, pipe)
        else:
            space = self._of_features(pool, small, seed)
        picked = [torch.empty(0, dtype=torch.int64)]
        for row in rows:
            members = (pool.labels == row).nonzero()[:, 0]
            psi, aim, have = space(row, members)
            before: dict[str, Any] = (
                {} if have is None else {"initial_sum": have.sum(dim=0), "initial_count": len(have)}
            )
            picked.append(members[herd(psi, aim, wanted[row], **before)])
        return torch.cat(picked)

    def _of_targets(self, pool: Pool, small: Pool | None, rows: Sequence[int], pipe: DsCoPipeline | None) -> Space:
        if pipe is None:
            raise ValueError(
                "strategy='herding' needs `pipe`, whose classifier gives the features, or choose another strategy, "
                "such as `Herding(features='pixels')`."
            )
        targets = self.targets or MatchingTargets.from_dataset(
            pool.dataset, pipe, features=POOLED, second_moment=False, progress=pool.progress, **pool.columns
        )
        targets.check_pipeline(pipe)
        columns = class_columns([pool.names[row] for row in rows], targets.class_names, what="the targets")
        aims = {row: targets.embeddings[column] for row, column in zip(rows, columns, strict=True)}
        have, candidates = (
            None if one is None else embed_pixels(one.pixels(pipe.image_size, pipe.num_channels), pipe, targets)
            for one in (small, pool)
        )
        assert candidates is not None

        def space(row: int, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            mine = None if small is None or have is None else have[small.labels == row]
            return candidates[members], aims[row], mine

        return space

    def _of_features(self, pool: Pool, small: Pool | None, seed: int) -> Space:
        features = image_features(pool, self.features)
        embed = fourier_features(features, seed)
        have = None if small is None else image_features(small, self.features)

        def space(row: int, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            psi = embed(features[members])
            mine = None if small is None or have is None else embed(have[small.labels == row])
            return psi, psi.mean(0), mine

        return space


@dataclass(frozen=True)
class Clarity(Selection):
    """The images that a student of the small set finds least clear, by p(label) - max p(other).

    The rule that the authors of DsCo released (repository kkkkqq/Dataset-Concentration).

    Attributes:
        student (`PreTrainedModel`, *optional*): which is asked; by default students are trained on the small set, on
            soft labels of the pipeline's classifier if there is one.
        protocol (`str` or `Protocol`): how they are trained.
        architecture (`str`): of theirs.
        num_students (`int`): how many; their mean ranks more steadily than one, which is what the authors take.
    """

    student: PreTrainedModel | None = None
    protocol: str | Protocol = "quick"
    architecture: str = "convnet"
    num_students: int = 1

    across_classes: ClassVar[bool] = True
    sentence: ClassVar[str] = "Real images were added that students of the synthetic ones find least clear."

    field_limits = {"num_students": 1}

    def __post_init__(self) -> None:
        """Takes the numbers of NumPy and torch and protocols as they are recorded, too."""
        super().__post_init__()
        if self.student is not None and self.num_students > 1:
            raise ValueError(f"`num_students` must be 1 where a `student` is given; got {self.num_students}.")
        if isinstance(self.protocol, Mapping):
            object.__setattr__(self, "protocol", protocol_from_dict(self.protocol))

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places of all images, `(N,)`, the least clear one first."""
        return self.scores(pool, small, pipe, seed).argsort(stable=True)

    def record(self, names: Sequence[str], pipe: DsCoPipeline | None) -> dict[str, Any]:
        """The student, or how those that are asked are trained: in full, as the protocol's name may change."""
        told = super().record(names, pipe)
        if self.student is not None:
            return {"name": told["name"], "student": told["student"]}
        return {**told, "protocol": protocol_to_dict(self._teaching(names, pipe)[1])}

    def scores(self, pool: Pool, small: Pool | None, pipe: DsCoPipeline | None, seed: int = 0) -> torch.Tensor:
        """The mean clarity of every image of the pool to the students `(N,)`; arguments as for `rank`."""
        shown = self.student.config if pipe is None and self.student is not None else pipe
        channels = 3 if shown is None else shown.num_channels
        students = self._students(small, pipe, channels, seed) if self.student is None else [self.student]
        known = class_columns(pool.names, model_classes(students[0]), what="the student")
        pixels = pool.pixels(students[0].config.image_size, channels)
        logits = (predict_logits(model, pixels)[:, known].cpu() for model in students)
        return torch.stack([clarity_scores(one.softmax(dim=1), pool.labels) for one in logits]).mean(dim=0)

    def _students(
        self, small: Pool | None, pipe: DsCoPipeline | None, channels: int, seed: int
    ) -> list[PreTrainedModel]:
        if small is None:
            raise ValueError(
                "Clarity asks a student of a small set, and there is none: pass `Clarity(student=...)`, or add the "
                "images to a set with `dope`."
            )
        teacher, protocol = self._teaching(small.names, pipe)
        if teacher is None:
            logger.warning(
                "There is no classifier of the dataset's classes alone: the student for clarity is trained on hard "
                "labels."
            )
        images = ImageSet(small.pixels(protocol.image_size, channels), small.labels, small.names)
        build = evaluator_builder(self.architecture, images, protocol)
        seeds = [seed, *(image_seed(seed, 0, place, "student") for place in range(1, self.num_students))]
        options: dict[str, Any] = {"protocol": protocol, "teacher": teacher, "progress": small.progress}
        return [train_evaluator(build, images, seed=one, **options).model for one in seeds]

    def _teaching(self, names: Sequence[str], pipe: DsCoPipeline | None) -> tuple[PreTrainedModel | None, Protocol]:
        """How students are trained: on the labels of the pipeline's classifier, which is given too, or on hard ones.

        Raises:
            ValueError: if that classifier was trained on other classes than `names`.
        """
        teacher = _teacher(pipe, names)
        protocol = self.protocol if isinstance(self.protocol, Protocol) else get_protocol(self.protocol)
        if teacher is not None:
            protocol = dataclasses.replace(protocol, label_type="teacher", temperature=1.0)
        return teacher, protocol


@dataclass(frozen=True)
class Clearest(Selection):
    """The images of every class that the pipeline's classifier is surest of: what a small set should match.

    Few images that match all of a class, its unclear images included, train worse evaluators than few that match its
    clearest part: `MatchingTargets.from_dataset(select(real, Clearest(0.2), pipe=pipe), pipe)`. Images are ranked by
    log p / (1 - p), p the probability of their class.

    Attributes:
        share (`float`): of the images of a class, in (0, 1]; at least one is taken.
    """

    share: float = 0.2

    picks: ClassVar[bool] = True
    sentence: ClassVar[str] = "Real images were added that the classifier is surest of."
    field_limits = {"share": Limits(0, 1, open_low=True)}

    def rank(
        self, pool: Pool, small: Pool | None, wanted: Sequence[int] | int, pipe: DsCoPipeline | None, seed: int
    ) -> torch.Tensor:
        """Places `(n,)` of the share of every class, the surest first.

        Raises:
            ValueError: for a missing classifier, or one that was trained on other classes.
        """
        if pipe is None or pipe.classifier is None:
            raise ValueError(
                "Choosing the clearest images asks the pipeline's classifier, and there is none: pass `classifier=` "
                "to `DsCoPipeline.from_pretrained`, and the pipeline as `pipe`."
            )
        config = pipe.classifier.config
        present = [name for name, count in zip(pool.names, pool.counts, strict=True) if count]
        try:
            known = class_mapping(pool.names, config.id2label, config.num_labels, present=present, owner="classifier")
        except ValueError as error:
            raise ValueError(f"The classifier was trained on other classes than the dataset: {error}") from error
        labels, index = pool.labels.unique(return_inverse=True)
        logits = predict_logits(pipe.classifier, pool.pixels(pipe.image_size, pipe.num_channels)).cpu()
        margins, parts = class_margin(logits, torch.tensor(known)[index]), []
        for label in labels:
            members = (pool.labels == label).nonzero()[:, 0]
            order = margins[members].argsort(descending=True, stable=True)
            parts.append(members[order[: math.ceil(self.share * len(members))]])
        return torch.cat(parts)


def clarity_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p[y] - max_{k≠y} p[k]: `(N, K)` and `(N,)` → `(N,)` in [-1, 1]. Low where a student is wrong or in doubt."""
    own = probabilities.gather(1, labels[:, None])[:, 0]
    return own - probabilities.scatter(1, labels[:, None], float("-inf")).max(dim=1).values


def _teacher(pipe: DsCoPipeline | None, names: Sequence[str]) -> PreTrainedModel | None:
    """The pipeline's classifier if it knows the classes of the dataset by the same labels; hard labels otherwise.

    Raises:
        ValueError: if it was trained on other classes, so that its features may be matched but says nothing of these.
    """
    classifier = None if pipe is None else pipe.classifier
    if classifier is not None:
        config = classifier.config
        if None not in find_classes(names, model_classes(classifier)):
            return classifier
        try:
            class_mapping(names, config.id2label, config.num_labels, owner="classifier")
        except ValueError as error:
            raise ValueError(
                f"The pipeline's classifier was trained on other classes than the dataset, and cannot teach a student "
                f"whose clarity is to be measured: {error} Or pass a `student` of the dataset's classes, "
                "`Clarity(student=...)`, leave `pipe` out to train one on hard labels, or choose strategy='herding', "
                "which needs features only."
            ) from error
    return None


def find_selection(strategy: str | Mapping[str, object] | Selection, **offered: object) -> Selection:
    """A rule by its name, or the rule itself.

    Args:
        strategy (`str`, mapping or [`Selection`]): as for [`Selection.of`].
        offered: values for those fields that the named rule has, as where a recipe knows one protocol for all.
    """
    if isinstance(strategy, Selection):
        return strategy
    told = Selection.told(strategy)
    known = {field.name for field in dataclasses.fields(Selection.kind_of(told["name"]))}
    return Selection.of({**{key: value for key, value in offered.items() if key in known}, **told})


def recorded_selection(told: Mapping[str, Any], **given: object) -> Selection:
    """The rule that was recorded, see [`Selection.record`].

    Args:
        told (mapping): its record.
        given: models and targets, of which the record knows the SHA-256 only, by field.

    Raises:
        ValueError: for a rule or field that is not there, and models or targets that are missing or others.
    """
    fields = dict(told)
    for key, value in told.items():
        if isinstance(value, Mapping) and "sha256" in value:
            if key not in given or _told(given[key]) != value:
                other = "; the one given is another" if key in given else ""
                raise ValueError(
                    f"Of `{key}` of {told.get('name')!r} the record has the SHA-256 {value['sha256'][:12]}… only: "
                    f"pass the same one as `{key}=`{other}."
                )
            fields[key] = given[key]
    return Selection.of(fields)


def _told(value: Any) -> object:
    """A field of a rule as plain values; of a model its type and SHA-256, of targets and logs their SHA-256."""
    if isinstance(value, torch.nn.Module):
        return {"architecture": type(value).__name__, "sha256": model_sha256(value)}
    digest = targets_sha256(value) if hasattr(value, "provenance") else getattr(value, "sha256", None)
    if isinstance(digest, str):
        return {"sha256": digest}
    return protocol_to_dict(value) if isinstance(value, Protocol) else plain(value)
