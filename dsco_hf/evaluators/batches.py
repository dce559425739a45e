"""Images in memory, and batches of them: in which order, how many at once, in which layout, what a network says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..matching.features import preprocess
from ..utils.files import explained, reading, whole
from ..utils.origins import fingerprint
from ..utils.values import plain, plain_arguments


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
        soft_labels (`torch.Tensor` of shape `(N, K)`, *optional*): probabilities.
        fingerprint (`str`): of the dataset it came from.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...] = ()
    soft_labels: torch.Tensor | None = None
    fingerprint: str = ""

    def select(self, rows: torch.Tensor) -> ImageSet:
        """The images at `rows`, of shape `(n,)`."""
        soft = None if self.soft_labels is None else self.soft_labels[rows]
        return ImageSet(self.pixels[rows], self.labels[rows], self.names, soft, self.fingerprint)

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
        return fingerprint(self.names, self.pixels, self.labels, self.soft_labels)


def fast_layout(model: torch.nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, which convolutions prefer, unless group norms on an accelerator would undo it at every layer."""
    groups = any(isinstance(m, torch.nn.GroupNorm) for m in model.modules())
    return torch.contiguous_format if groups and device.type != "cpu" else torch.channels_last


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
        `list[torch.Tensor]`: int64 index vectors.
    """
    batches = list(torch.randperm(images, generator=generator).to(device).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < smallest:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def part_size(image_size: int, mixed_precision: str) -> int:
    """Images that pass through the network at once on a CPU; at least two."""
    return max(2, CPU_PIXELS * (2 if mixed_precision in ("bf16", "fp16") else 1) // image_size**2)


def hard_label_loss(
    logits: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, *, weight: float = 1.0
) -> torch.Tensor:
    """Cross entropy; where images were mixed, the same mixture of the cross entropies of both labels.

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): of the student.
        labels (`torch.Tensor` of shape `(B,)`): class indices.
        others (`torch.Tensor` of shape `(B,)`): classes of the images that were mixed in.
        weight (`float`): share of `labels` in [0, 1]; at 1 the others are not looked at.
    """
    loss = F.cross_entropy(logits, labels)
    return loss if weight == 1.0 else weight * loss + (1 - weight) * F.cross_entropy(logits, others)


def soft_label_loss(logits: torch.Tensor, targets: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """KL divergence of the softened student from given probabilities, mean over the batch, without a factor T².

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): of the student.
        targets (`torch.Tensor` of shape `(B, K)`): probabilities, softened already.
        temperature (`float`): T of the student's softmax.
    """
    return F.kl_div((logits / temperature).log_softmax(1), targets, reduction="batchmean")


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose largest logit is their label's.

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): B at least 1.
        labels (`torch.Tensor` of shape `(B,)`): class indices.

    Returns:
        `float`: in [0, 1]; higher is better.
    """
    return (logits.argmax(1) == labels.to(logits.device)).double().mean().item()


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: Any) -> None:
    """Writes tensors and JSON values, the settings of the run among them, into a file, whose folder is made.

    Raises:
        RunError: if it cannot be written.
    """
    texts = {name: json.dumps(plain(value)) for name, value in metadata.items()}
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            # clone: safetensors refuses tensors that share memory, such as tied weights.
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, texts)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata (`settings`, `progress`, `scaler`) and tensors of a checkpoint.

    Raises:
        DamagedFileError: if it is truncated, or something else.
    """
    remedy = "No training can go on from it: delete it to start anew, or write to another file."
    with reading(path, remedy), safe_open(path, framework="pt") as file:
        texts = dict(file.metadata() or {})
        metadata = {name: json.loads(texts[name]) for name in ("settings", "progress", "scaler")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    return metadata, tensors
