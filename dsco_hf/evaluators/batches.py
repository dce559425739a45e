"""Images in memory, checked, and batches of them: in which order, how many, in which layout, what a network says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..utils.names import find_classes, nearest
from ..utils.origins import fingerprint
from ..utils.values import plain_arguments
from .preprocessing import preprocess
from .protocol_fields import CHANGED, COLUMNS
from .protocols import Protocol


# On a CPU a batch passes through the network in parts of this many pixels (32 images of 32 px), twice as many in half
# precision: maps of ConvNet-3 then stay below 32 MB, above which the C library asks the system for memory every time.
CPU_PIXELS = 32 * 32 * 32


@dataclass(frozen=True)
class ImageSet:
    """A dataset in memory.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, range [-1, 1]): images.
        labels (`torch.Tensor` of shape `(N,)`): class indices.
        names (`tuple[str, ...]`): of the classes; a network that is trained has its own.
        soft_labels (`torch.Tensor` of shape `(N, K)`, *optional*): probabilities, or learned labels.
        fingerprint (`str`): of the dataset it came from.
        weights (`torch.Tensor` of shape `(N,)`, *optional*): how much each image counts in the training loss; only
            their ratios matter.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...] = ()
    soft_labels: torch.Tensor | None = None
    fingerprint: str = ""
    weights: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> ImageSet:
        """The images at `rows`, of shape `(n,)`."""
        soft = None if self.soft_labels is None else self.soft_labels[rows]
        weights = None if self.weights is None else self.weights[rows]
        return ImageSet(self.pixels[rows], self.labels[rows], self.names, soft, self.fingerprint, weights)

    def first_of(self, labels: Sequence[int], count: int) -> torch.Tensor:
        """The first images of each of these classes, `(K, n, C, H, W)`: `count`, or fewer if they all have fewer."""
        return torch.stack([self.pixels[self.labels == label][:count] for label in labels])

    @property
    def images_per_class(self) -> float:
        """Mean number of images of the classes that have any."""
        return len(self.labels) / len(self.labels.unique())

    @cached_property
    def digest(self) -> str:
        """A hash of the content."""
        weights = () if self.weights is None else (self.weights,)
        return fingerprint(self.names, self.pixels, self.labels, self.soft_labels, *weights)


def fast_layout(model: torch.nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, which convolutions prefer, unless group norms on an accelerator would undo it at every layer.

    Nor where oneDNN would write past its memory on a CPU: https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    if device.type == "cpu":
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
        unsuited = any(m.stride != (1, 1) and m.in_channels < 16 for m in convolutions)
    else:
        unsuited = any(isinstance(m, torch.nn.GroupNorm) for m in model.modules())
    return torch.contiguous_format if unsuited else torch.channels_last


@plain_arguments(batch_size=1)
@torch.no_grad()
def predict_logits(model: PreTrainedModel, pixels: torch.Tensor, *, batch_size: int = 128) -> torch.Tensor:
    """Logits of images, in eval mode whatever mode the model is in.

    Args:
        model (`PreTrainedModel`): a classifier; its mode is restored.
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, range [-1, 1]): on any device, of any size.
        batch_size (`int`): images per forward pass.

    Returns:
        `torch.Tensor` of shape `(B, K)`: float32, on the device of the model.
    """
    training, layout = model.training, fast_layout(model, model.device)
    model.eval()
    try:
        inputs = (
            preprocess(b.to(model.device), model).to(model.dtype, memory_format=layout)
            for b in pixels.split(batch_size)
        )
        batches = [model(pixel_values).logits.float() for pixel_values in inputs]
    finally:
        model.train(training)
    return torch.cat(batches)


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch of each run, so that an epoch can be repeated without those before it."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]) >> 1


def epoch_batches(
    images: int, batch_size: int, *, generator: torch.Generator, device: torch.device, smallest: int = 2
) -> list[torch.Tensor]:
    """Indices of one pass in random order; a last batch below `smallest` joins the one before it.

    Args:
        images (`int`): size of the training set.
        batch_size (`int`): images per batch.
        generator (`torch.Generator`): on the CPU.
        device (`torch.device`): where the indices go.
        smallest (`int`): a batch of one image would break batch norm.

    Returns:
        `list[torch.Tensor]`: int64 indices, of shape `(batch_size,)`; the last batch has what is left.
    """
    batches = list(torch.randperm(images, generator=generator).to(device).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < smallest:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def part_size(image_size: int, mixed_precision: str) -> int:
    """Images that pass through the network at once on a CPU; at least two."""
    return max(2, CPU_PIXELS * (2 if mixed_precision in ("bf16", "fp16") else 1) // image_size**2)


def counts_of(
    weights: torch.Tensor, indices: torch.Tensor, partner: torch.Tensor | None = None, share: float = 1.0
) -> torch.Tensor:
    """How often each image of a batch counts `(B,)`: once in the mean over the set, so that the learning rate holds.

    Args:
        weights (`torch.Tensor` of shape `(N,)`): of all images.
        indices (`torch.Tensor` of shape `(B,)`): which of them the batch has.
        partner (`torch.Tensor` of shape `(B,)`, *optional*): places in the batch of images that were mixed in.
        share (`float`): of the image itself in the mixture, in [0, 1].
    """
    own = (weights.double() / weights.double().mean()).float()[indices]
    return own if partner is None else share * own + (1 - share) * own[partner]


def hard_label_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    others: torch.Tensor,
    *,
    weight: float = 1.0,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy; where images were mixed, the same mixture of the cross entropies of both labels.

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): of the student.
        labels (`torch.Tensor` of shape `(B,)`): class indices.
        others (`torch.Tensor` of shape `(B,)`): classes of the images that were mixed in.
        weight (`float`): share of `labels` in [0, 1]; at 1 the others are not looked at.
        counts (`torch.Tensor` of shape `(B,)`, *optional*): how often each image counts, (1/B) Σ w·ℓ; once if None.
    """
    reduction = "mean" if counts is None else "none"
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    if weight != 1.0:
        loss = weight * loss + (1 - weight) * F.cross_entropy(logits, others, reduction=reduction)
    return loss if counts is None else (loss * counts).mean()


def soft_label_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, temperature: float, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """KL divergence of the softened student from given probabilities, mean over the batch, without a factor T².

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): of the student.
        targets (`torch.Tensor` of shape `(B, K)`): probabilities, softened already.
        temperature (`float`): T of the student's softmax.
        counts (`torch.Tensor` of shape `(B,)`, *optional*): as of [`hard_label_loss`].
    """
    student = (logits / temperature).log_softmax(1)
    if counts is None:
        return F.kl_div(student, targets, reduction="batchmean")
    return (F.kl_div(student, targets, reduction="none").sum(1) * counts).mean()


def learned_label_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error, sum over classes and mean over the batch: how KIP and FRePo train networks on learned labels.

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): of the student.
        targets (`torch.Tensor` of shape `(B, K)`): labels less 1 / K, so that they are about 0 in the mean (Nguyen et
            al. 2021, arXiv 2011.00050; Zhou et al. 2022, arXiv 2206.00719).
        counts (`torch.Tensor` of shape `(B,)`, *optional*): as of [`hard_label_loss`].
    """
    errors = (logits - targets).square().sum(1)
    return (errors if counts is None else errors * counts).mean()


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose largest logit is their label's.

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): B at least 1.
        labels (`torch.Tensor` of shape `(B,)`): class indices.

    Returns:
        `float`: in [0, 1]; higher is better.
    """
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()


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


def check_weights(weights: torch.Tensor | None, images: int) -> None:
    """Raises ValueError unless weights `(N,)` are at least 0, one for each of the images, and one above 0; or None."""
    if weights is None:
        return
    if tuple(weights.shape) != (images,):
        raise ValueError(
            f"Weights have shape {tuple(weights.shape)}, but {images} images need ({images},): pass one for each "
            "image."
        )
    if not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
        raise ValueError("Weights must be finite numbers of at least 0, and not all 0.")


def check_soft_labels(soft_labels: torch.Tensor, images: int, num_labels: int, *, learned: bool = False) -> None:
    """Checks stored soft labels: a probability for each image and class.

    Args:
        soft_labels (`torch.Tensor` of shape `(N, K)`): rows that sum to 1 within 0.005 (what float16 keeps).
        images (`int`): N.
        num_labels (`int`): K.
        learned (`bool`): they are learned labels, any finite numbers.

    Raises:
        ValueError: where one of these does not hold.
    """
    if tuple(soft_labels.shape) != (images, num_labels):
        raise ValueError(
            f"Soft labels have shape {tuple(soft_labels.shape)}, but {images} images of {num_labels} classes need "
            f"({images}, {num_labels}). Were they made by a teacher with other classes?"
        )
    values = soft_labels.double()
    if learned:
        if not values.isfinite().all():
            raise ValueError("Learned labels are no finite numbers: make them again with `add_learned_labels`.")
        return
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
        soft_labels (`torch.Tensor` of shape `(N, K)`, *optional*): for `"stored"` and `"learned"`.

    Raises:
        ValueError: where something is missing, superfluous or does not fit.
    """
    for kinds, value, option in (
        (["teacher"], teacher, "`teacher`"),
        (COLUMNS, soft_labels, "`soft_labels` of the images"),
    ):
        if (protocol.label_type in kinds) != (value is not None):
            state, fix = ("missing", "Pass it") if value is None else ("given", "Leave it out")
            name = protocol.name.removesuffix(CHANGED)
            raise ValueError(
                f"Protocol {protocol.name!r} has label_type={protocol.label_type!r}, but {option} is {state}. "
                f"{fix}, or change the protocol: get_protocol({name!r}, label_type=...)."
            )
    if soft_labels is not None:
        check_soft_labels(soft_labels, images, model.config.num_labels, learned=protocol.label_type == "learned")
    if teacher is not None:
        class_columns(*(model_classes(m) for m in (model, teacher)), what="the teacher")


def model_classes(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's classes, by its labels."""
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
