"""φ: what a frozen image classifier of transformers sees: pooled features, differentiable."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel


logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD, IMAGENET_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224


def ensure_preprocessing(classifier: PreTrainedModel, *, token: str | bool | None = None) -> PreTrainedModel:
    """Writes the input size and normalisation that a classifier expects into its config, where they are saved with it.

    Args:
        classifier (`PreTrainedModel`): its config may hold `image_size`, `image_mean` and `image_std` already (those
            trained by our recipes do). What is missing is read from the `preprocessor_config.json` beside its weights,
            and if there is none, the usual ImageNet values are taken, with a warning.
        token (`str` or `bool`, *optional*): for a private repository on the Hub.

    Returns:
        `PreTrainedModel`: the same object.
    """
    config = classifier.config
    wanted = ("image_size", "image_mean", "image_std")
    if all(getattr(config, name, None) is not None for name in wanted):
        return classifier
    size = IMAGENET_SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    try:
        processor = AutoImageProcessor.from_pretrained(classifier.name_or_path, token=token)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        box = getattr(processor, "crop_size", None) or processor.size
        size = box.get("height") or box.get("shortest_edge") or size
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning(
            "No preprocessor config was found for classifier %r (%s): assuming %d px and ImageNet normalisation. Set "
            "`classifier.config.image_size`, `.image_mean` and `.image_std` to say otherwise.",
            classifier.name_or_path,
            type(error).__name__,
            size,
        )
    channels = getattr(config, "num_channels", 3)
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    for name, value in zip(wanted, (size, list(mean), list(std)), strict=True):
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return classifier


def preprocess(pixels: torch.Tensor, classifier: PreTrainedModel) -> torch.Tensor:
    """Turns pixels in [-1, 1] into the `pixel_values` of a classifier; differentiable.

    Args:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, range [-1, 1]): C is 1 or 3; grayscale is repeated for a colour
            classifier, colour is averaged for a grayscale one.
        classifier (`PreTrainedModel`): its config holds `image_size`, `image_mean` and `image_std`, see
            [`ensure_preprocessing`].

    Returns:
        `torch.Tensor` of shape `(B, num_channels, image_size, image_size)`.
    """
    config = ensure_preprocessing(classifier).config  # a classifier may have been put into a pipeline by hand
    channels = getattr(config, "num_channels", 3)
    if pixels.shape[1] != channels:
        pixels = pixels.expand(-1, channels, -1, -1) if pixels.shape[1] == 1 else pixels.mean(dim=1, keepdim=True)
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(pixels.shape[-2:]) != size:
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    if all(m == 0.5 for m in config.image_mean) and all(s == 0.5 for s in config.image_std):
        return pixels  # (x / 2 + 0.5 - 0.5) / 0.5 = x
    mean, std = (
        torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)
        for v in (config.image_mean, config.image_std)
    )
    return (pixels / 2 + 0.5 - mean) / std


def classification_head(classifier: PreTrainedModel) -> nn.Linear:
    """The linear layer that maps pooled features to logits: the last `nn.Linear` with one output per class."""
    num_labels = classifier.config.num_labels
    heads = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m.out_features == num_labels]
    if not heads:
        raise ValueError(
            f"{type(classifier).__name__} has no linear layer with {num_labels} outputs (config.num_labels), so its "
            "pooled features cannot be found. Pass a model for image classification with a linear head."
        )
    return heads[-1]


def feature_dim(classifier: PreTrainedModel) -> int:
    """d, the dimension of a classifier's pooled features."""
    return classification_head(classifier).in_features


class Observation(NamedTuple):
    """What a classifier sees, per image.

    Attributes:
        features (`torch.Tensor` of shape `(B, d)`): pooled features φ(x), float32.
        logits (`torch.Tensor` of shape `(B, num_labels)`): float32.
        moments (`torch.Tensor` of shape `(B, M, 2)`): mean and mean square over space of the inputs to all BatchNorm
            layers, M channels together; M = 0 if there are none or they were not asked for.
    """

    features: torch.Tensor
    logits: torch.Tensor
    moments: torch.Tensor


def batchnorm_layers(classifier: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that remember statistics of the training images."""
    layers = [m for m in classifier.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


def observe(classifier: PreTrainedModel, pixels: torch.Tensor, *, moments: bool = False) -> Observation:
    """One forward pass; gradients reach the pixels.

    φ is the input of the classifier's linear head, which is the pooled feature of every image classifier in
    transformers (ResNet, ConvNeXt, ViT, Swin, MobileNet, …), whatever its parts are called.

    Args:
        classifier (`PreTrainedModel`): in eval mode.
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, range [-1, 1]): the images.
        moments (`bool`): also record the moments at the BatchNorm layers.
    """
    pooled: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].float().flatten(2) if inputs[0].ndim > 2 else inputs[0].float()[:, :, None]  # (B, M_l, HW)
        seen.append(torch.stack([x.mean(dim=2), x.square().mean(dim=2)], dim=2))

    head = classification_head(classifier)
    handles = [head.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))]
    if moments:
        handles += [layer.register_forward_pre_hook(record) for layer in batchnorm_layers(classifier)]
    try:
        # resized in float32: on CPU there is no antialiased resizing in half precision
        pixels = pixels.float() if pixels.dtype in (torch.float16, torch.bfloat16) else pixels
        logits = classifier(preprocess(pixels, classifier).to(classifier.dtype)).logits
    finally:
        for handle in handles:
            handle.remove()
    features = pooled[-1].flatten(1).float()
    return Observation(
        features, logits.float(), torch.cat(seen, dim=1) if seen else features.new_zeros(len(features), 0, 2)
    )


def features_and_logits(classifier: PreTrainedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(x) `(B, d)` and logits `(B, num_labels)` of pixels `(B, C, H, W)` in [-1, 1], see [`observe`]."""
    seen = observe(classifier, pixels)
    return seen.features, seen.logits


@torch.no_grad()
def probe_features(classifier: PreTrainedModel) -> torch.Tensor:
    """Features of two fixed noise images: they tell two classifiers apart, whatever the device or precision.

    Returns:
        `torch.Tensor` of shape `(2, d)`, float32 on CPU. Compare with a tolerance of some percent.
    """
    parameter = next(classifier.parameters())
    channels = getattr(classifier.config, "num_channels", 3)
    pixels = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return features_and_logits(classifier, pixels.to(parameter.device))[0].cpu()
