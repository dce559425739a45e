"""Batches of images: in which order, how many at once, in which memory layout, and what a network says of them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from ..features import preprocess
from ..values import plain_arguments


# On a CPU a batch passes through the network in parts of this many pixels (32 images of 32 px), twice as many in half
# precision: maps of ConvNet-3 then stay below 32 MB, above which the C library asks the system for memory every time.
CPU_PIXELS = 32 * 32 * 32


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
