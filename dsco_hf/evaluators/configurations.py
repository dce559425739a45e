"""Configurations of the evaluators that transformers does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedConfig


NORMS = ("instance", "batch", "none")


def check_norm(norm: str) -> None:
    """Raises a ValueError for a norm that there is no layer for."""
    if norm not in NORMS:
        raise ValueError(f"Unknown norm {norm!r}; allowed: {', '.join(NORMS)}.")


class EvaluatorConfig(PreTrainedConfig):
    """What the configurations of our networks share.

    Args:
        norm (`str`): `"instance"` (the field's choice), `"batch"` or `"none"`.
        image_size (`int`): height and width of the input in pixels.
        num_channels (`int`): channels of the input.
        image_mean, image_std (`list`, *optional*): per channel on the [0, 1] scale; 0.5 leaves [-1, 1] as it is.
        **kwargs: of `PreTrainedConfig`.

    Raises:
        ValueError: for a size below 1 or an unknown norm.
    """

    def __init__(
        self,
        norm: str = "instance",
        image_size: int = 32,
        num_channels: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: object,
    ) -> None:
        check_norm(norm)
        self.norm = norm
        self.image_size = image_size
        self.num_channels = num_channels
        self.image_mean = [0.5] * num_channels if image_mean is None else list(image_mean)
        self.image_std = [0.5] * num_channels if image_std is None else list(image_std)
        super().__init__(**kwargs)

    def check_sizes(self, *names: str) -> None:
        """Raises ValueError for a size, or one of a list of sizes, below 1."""
        for name in ("image_size", *names):
            value = getattr(self, name)
            if not value or min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"{type(self).__name__} got {name}={value}; it must be at least 1.")


class ConvNetConfig(EvaluatorConfig):
    """Configuration of `ConvNetForImageClassification`, whose `image_size` fixes the size of the linear head.

    Args:
        depth (`int`): number of blocks, at least 1.
        width (`int`): channels of every block, at least 1.
        **kwargs: of `EvaluatorConfig`.
    """

    model_type = "dsco_convnet"

    def __init__(self, depth: int = 3, width: int = 128, **kwargs: Any) -> None:
        self.depth, self.width = depth, width
        super().__init__(**kwargs)
        self.check_sizes("depth", "width")


class EvaluatorResNetConfig(EvaluatorConfig):
    """Configuration of `EvaluatorResNetForImageClassification`; up to 64 px the stem is one 3×3 convolution.

    Args:
        depths (`list[int]`, *optional*): basic blocks of each stage; ResNet-18 has [2, 2, 2, 2].
        width (`int`): channels of the first stage; each further stage has twice as many.
        average_pool (`bool`): halve by average pooling instead of strides (ResNetAP of IDC and Minimax).
        image_size (`int`): height and width of the input in pixels.
        **kwargs: of `EvaluatorConfig`.
    """

    model_type = "dsco_resnet"

    def __init__(
        self,
        depths: list[int] | None = None,
        width: int = 64,
        average_pool: bool = False,
        image_size: int = 224,
        **kwargs: Any,
    ) -> None:
        self.depths = [2, 2, 2, 2] if depths is None else list(depths)
        self.width, self.average_pool = width, average_pool
        super().__init__(image_size=image_size, **kwargs)
        self.check_sizes("depths", "width")


def pooled_sizes(image_size: int, depth: int) -> list[int]:
    """Spatial size after each block of the ConvNet.

    A block halves its map unless that would leave a single pixel: instance norm of one pixel is zero whatever the
    image, so 8 px images would otherwise be lost after three blocks.

    Args:
        image_size (`int`): height and width of the input in pixels.
        depth (`int`): number of blocks.

    Returns:
        `list[int]`: one size per block.
    """
    sizes = []
    for _ in range(depth):
        image_size = image_size // 2 if image_size >= 4 else image_size
        sizes.append(image_size)
    return sizes


def make_norm(norm: str, channels: int) -> nn.Module:
    """The normalisation layer of that name; instance norm is group norm with one channel a group, as the peers do."""
    if norm == "instance":
        return InstanceNorm(channels, channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


class InstanceNorm(nn.GroupNorm):
    """Group norm with one channel a group; on CPUs in few passes over the map, see `fast_instance_norm`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(B, C, h, w)` to the same shape."""
        if hidden.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(hidden)
        return fast_instance_norm(hidden, self.weight, self.bias, self.eps)


def fast_instance_norm(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """Instance norm, `weight · (x - mean) / sqrt(var + eps) + bias` over each map, without PyTorch's slow CPU kernel.

    That kernel is slow on channels-last maps, above all backward; here each pass is one vectorised operation.

    Args:
        hidden (`torch.Tensor` of shape `(B, C, h, w)`): any layout; half precision has float32 statistics.
        weight (`torch.Tensor` of shape `(C,)`): scale.
        bias (`torch.Tensor` of shape `(C,)`): shift.
        eps (`float`): added to the variance.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: in the precision of `hidden`.
    """
    return _InstanceNorm.apply(hidden, weight, bias, eps)


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Two passes for the variance: the square of the mean may be far larger than it.
        mean = hidden.mean((2, 3), keepdim=True, dtype=wide)
        centred = hidden - mean.to(hidden.dtype)
        # Rounding of the mean to half precision is corrected; in float32 it is zero.
        rest = mean - mean.to(hidden.dtype).to(wide)
        variance = (centred * centred).mean((2, 3), keepdim=True, dtype=wide) - rest * rest
        inverse = (variance.clamp(min=0.0) + eps).rsqrt()
        scale = inverse * weight.view(-1, 1, 1).to(inverse.dtype)
        ctx.save_for_backward(centred, inverse, rest, weight)
        shift = bias.view(-1, 1, 1).to(wide) - rest * scale
        return torch.addcmul(shift.to(hidden.dtype), centred, scale.to(hidden.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        centred, inverse, rest, weight = ctx.saved_tensors
        pixels = centred.shape[2] * centred.shape[3]
        total = gradient.sum((2, 3), keepdim=True, dtype=inverse.dtype)  # (B, C, 1, 1)
        # Of the gradient and the normalised map.
        product = (gradient * centred).sum((2, 3), keepdim=True, dtype=inverse.dtype)
        product = (product - rest * total) * inverse
        scale = inverse * weight.view(-1, 1, 1).to(inverse.dtype)
        slope = -scale * inverse * product / pixels
        shift = -scale * total / pixels - slope * rest
        dtype = centred.dtype
        result = torch.addcmul(shift.to(dtype), gradient, scale.to(dtype)).addcmul_(centred, slope.to(dtype))
        return (
            result,
            product.sum((0, 2, 3)).to(weight.dtype),
            total.sum((0, 2, 3)).to(weight.dtype),
            None,
        )
