"""Clarity: how sure students of a small set are of real images, the rule by which DsCo's authors choose them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.datasets import load_pixels
from ..data.labels import class_mapping
from ..data.pixels import default_image_size
from ..data.schema import class_names, image_seed
from ..evaluators import predict_logits
from ..evaluators.checks import class_columns, model_classes
from ..evaluators.evaluation import ImageSet, evaluator_builder
from ..evaluators.protocols import Protocol, get_protocol
from ..evaluators.training import train_evaluator
from ..sampling.pipeline import DsCoPipeline
from ..utils.names import find_classes
from ..utils.values import plain_arguments


logger = logging.getLogger(__name__)


def clarity_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p[y] - max_{k≠y} p[k]: `(N, K)` and `(N,)` → `(N,)` in [-1, 1]. Low where a student is wrong or in doubt."""
    own = probabilities.gather(1, labels[:, None])[:, 0]
    return own - probabilities.scatter(1, labels[:, None], float("-inf")).max(dim=1).values


@plain_arguments(num_students=1)
def clarity(
    small: Dataset,
    real: Dataset,
    pipe: DsCoPipeline | None,
    student: PreTrainedModel | None = None,
    protocol: str | Protocol = "quick",
    architecture: str = "convnet",
    num_students: int = 1,
    seed: int = 0,
    progress: bool = True,
    image_column: str | None = None,
    label_column: str | None = None,
) -> torch.Tensor:
    """Clarity of every real image `(N,)` to students of the synthetic images; arguments as for [`dope`].

    All real images must be of classes of the synthetic ones.
    """
    names = class_names(small)
    channels = pipe.num_channels if pipe is not None else student.config.num_channels if student is not None else 3
    students = [] if student is None else [student]
    if student is None:
        teacher, protocol = student_protocol(pipe, names, protocol)
        if teacher is None:
            logger.warning(
                "There is no classifier of the dataset's classes alone: the student for clarity is trained on hard "
                "labels."
            )
        size = protocol.image_size or default_image_size(small)
        pixels, labels, _ = load_pixels(small, image_size=size, num_channels=channels)
        build = evaluator_builder(architecture, ImageSet(pixels, labels, tuple(names)), protocol)
        seeds = [seed, *(image_seed(seed, 0, place, "student") for place in range(1, num_students))]
        students = [
            train_evaluator(
                build, pixels, labels, protocol=protocol, seed=one, teacher=teacher, progress=progress
            ).model
            for one in seeds
        ]
    known = class_columns(names, model_classes(students[0]), what="the student")
    pixels, labels, indices = load_pixels(
        real, image_size=students[0].config.image_size, num_channels=channels, image_column=image_column,
        label_column=label_column, classes=names, progress=progress,
    )  # fmt: skip
    scores = torch.full((len(real),), float("inf"))  # images that could not be read are never chosen
    logits = (predict_logits(model, pixels)[:, known].cpu() for model in students)
    found = [clarity_scores(values.softmax(dim=1), labels) for values in logits]
    scores[indices] = torch.stack(found).mean(dim=0)
    return scores


def student_protocol(
    pipe: DsCoPipeline | None, names: Sequence[str], protocol: str | Protocol
) -> tuple[PreTrainedModel | None, Protocol]:
    """How a student for clarity is trained: on the labels of the pipeline's classifier, which is given too, or hard.

    Raises:
        ValueError: if that classifier was trained on other classes than `names`.
    """
    teacher = _teacher(pipe, names)
    protocol = protocol if isinstance(protocol, Protocol) else get_protocol(protocol)
    return teacher, protocol if teacher is None else dataclasses.replace(
        protocol, label_type="teacher", temperature=1.0
    )


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
                f"whose clarity is to be measured: {error} Or pass a `student` of the dataset's classes, leave `pipe` "
                "out to train one on hard labels, or choose strategy='herding', which needs features only."
            ) from error
    return None
