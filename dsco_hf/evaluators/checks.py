"""What can be wrong with the images, labels and teachers an evaluator is given; checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..utils.names import find_classes, nearest
from .protocol_fields import CHANGED
from .protocols import Protocol


def check_images(pixels: torch.Tensor, labels: torch.Tensor, num_labels: int, *, what: str = "training") -> None:
    """Checks what an evaluator is trained or tested on.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`): N at least 1.
        labels (`torch.Tensor` of shape `(N,)`): class indices below `num_labels`; training needs two different ones.
        num_labels (`int`): outputs of the evaluator.
        what (`str`): `"training"` or `"test"`, for the message.

    Raises:
        ValueError: where one of these does not hold.
    """
    if pixels.ndim != 4 or labels.ndim != 1 or len(pixels) != len(labels):
        raise ValueError(
            f"The {what} set needs pixels (N, C, H, W) and labels (N,), got {tuple(pixels.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if len(pixels) == 0:
        raise ValueError(f"The {what} set is empty; check the split and the filters that made it.")
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"The {what} labels run from {labels.min()} to {labels.max()}, but the evaluator has {num_labels} "
            "classes; build it with the class names of the training set."
        )
    if what == "training" and len(labels.unique()) < 2:
        raise ValueError(
            f"All {len(labels)} training images have the label {labels[0]}; a classifier needs at least two classes. "
            "Check the label column and the filters that made the dataset."
        )


def check_soft_labels(soft_labels: torch.Tensor, images: int, num_labels: int) -> None:
    """Checks stored soft labels: a probability for each image and class.

    Args:
        soft_labels (`torch.Tensor` of shape `(N, K)`): rows that sum to 1 within 0.005 (what float16 keeps).
        images (`int`): N.
        num_labels (`int`): K.

    Raises:
        ValueError: where one of these does not hold.
    """
    if tuple(soft_labels.shape) != (images, num_labels):
        raise ValueError(
            f"Soft labels have shape {tuple(soft_labels.shape)}, but {images} images of {num_labels} classes need "
            f"({images}, {num_labels}). Were they made by a teacher with other classes?"
        )
    values = soft_labels.double()
    wrong = ~(((values.sum(1) - 1).abs() <= 5e-3) & (values >= 0).all(1))  # NaN is wrong too
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            f"{int(wrong.sum())} of {images} soft labels are no probabilities, the first one in row {row} with sum "
            f"{values[row].sum().item():.4g}. Rows must be non-negative and sum to 1; logits need a softmax first."
        )


def class_columns(names: Sequence[str], others: Sequence[str], *, what: str) -> list[int]:
    """Where each class stands among the classes of a model or another dataset, which may know more of them.

    Args:
        names (`Sequence[str]`): of the training set.
        others (`Sequence[str]`): of what is asked.
        what (`str`): how the message calls it, e.g. `"the teacher"`.

    Returns:
        `list[int]`: for each of `names` its place in `others`, by [`~dsco_hf.utils.names.find_classes`].

    Raises:
        ValueError: for classes that are not there.
    """
    places = find_classes(names, others)
    missing = [name for name, place in zip(names, places, strict=True) if place is None]
    if missing:
        raise ValueError(
            f"The training set has {len(names)} classes, and {what} has {len(others)} without {missing[:5]}."
            f"{nearest(missing[0], others)} Use the same names for both; their order does not matter."
        )
    return [place for place in places if place is not None]


def check_same_classes(names: Sequence[str], others: Sequence[str], *, what: str) -> None:
    """Checks that two sets number the same classes alike, for labels that are not aligned as they are read.

    Args:
        names (`Sequence[str]`): of the training set.
        others (`Sequence[str]`): of what is compared.
        what (`str`): how the message calls it, e.g. `"the test set"`.

    Raises:
        ValueError: for other classes, or the same ones in another order; Unicode forms of a name are the same.
    """
    if class_columns(names, others, what=what) != list(range(len(others))):
        raise ValueError(
            f"The training set and {what} number their classes differently: {list(names)[:5]} here, "
            f"{list(others)[:5]} there. Read {what} with `load_pixels(..., classes=names)`, names of the training "
            "set: labels are then numbered by name. (A cast would keep the numbers.)"
        )


def check_label_source(
    model: PreTrainedModel,
    protocol: Protocol,
    images: int,
    teacher: PreTrainedModel | None,
    soft_labels: torch.Tensor | None,
) -> None:
    """Checks that the labels a protocol asks for were given, and fit.

    Args:
        model (`PreTrainedModel`): the student; its class names are compared with the teacher's.
        protocol (`Protocol`): its `label_type` decides what is needed.
        images (`int`): size of the training set.
        teacher (`PreTrainedModel`, *optional*): for `"teacher"`.
        soft_labels (`torch.Tensor`, *optional*): for `"stored"`.

    Raises:
        ValueError: where something is missing, superfluous or does not fit.
    """
    for kind, value, option in (
        ("teacher", teacher, "`teacher`"),
        ("stored", soft_labels, "`soft_labels` of the images"),
    ):
        if (protocol.label_type == kind) != (value is not None):
            state, fix = ("missing", "Pass it") if value is None else ("given", "Leave it out")
            name = protocol.name.removesuffix(CHANGED)
            raise ValueError(
                f"Protocol {protocol.name!r} has label_type={protocol.label_type!r}, but {option} is {state}. "
                f"{fix}, or change the protocol: get_protocol({name!r}, label_type=...)."
            )
    if soft_labels is not None:
        check_soft_labels(soft_labels, images, model.config.num_labels)
    if teacher is not None:
        class_columns(*(model_classes(m) for m in (model, teacher)), what="the teacher")


def model_classes(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's classes, by its labels."""
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
