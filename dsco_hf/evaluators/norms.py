"""Normalisation layers of the evaluators, and an instance norm that is fast on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


NORMS = ("instance", "batch", "none")


def check_norm(norm: str) -> None:
    """Raises a ValueError for a norm that there is no layer for."""
    if norm not in NORMS:
        raise ValueError(f"Unknown norm {norm!r}; allowed: {', '.join(NORMS)}.")


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
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
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
