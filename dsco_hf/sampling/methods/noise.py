"""Noise optimisation: moves the sampling noise of one step so that a loss falls; models stay untouched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def on_shell(noise: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Scales each noise `(B, ...)` to norm `radius` `(B, 1, ...)`.

    Gaussian noise of d values lies near a shell of radius √d.
    """
    return noise * (radius / norms(noise).clamp_min(torch.finfo(noise.dtype).tiny))


def norms(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each row of `(B, ...)`, as `(B, 1, ...)`."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def shell_step(noise: torch.Tensor, gradient: torch.Tensor, step_size: float) -> torch.Tensor:
    """One step of normalised descent on the shell: z ← z - η‖z‖ g/‖g‖, back to the norm of z. Per image.

    Args:
        noise (`torch.Tensor` of shape `(B, ...)`): z.
        gradient (`torch.Tensor` of shape `(B, ...)`): g; only its direction counts. An image with g = 0 keeps its z.
        step_size (`float`): η, in units of the noise's norm.

    Returns:
        `torch.Tensor` of shape `(B, ...)`.
    """
    radius, length = norms(noise), norms(gradient)
    direction = torch.where(length > 0, gradient / length.clamp_min(torch.finfo(gradient.dtype).tiny), 0.0)
    return torch.where(length > 0, on_shell(noise - step_size * radius * direction, radius), noise)


def loss_gradient(
    noise: torch.Tensor, loss_fn: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient at a detached copy of the noise; no parameter's `.grad` is touched.

    Args:
        noise (`torch.Tensor`): z.
        loss_fn (`Callable`): z → losses, a scalar or one per class; their sum is differentiated.

    Returns:
        `tuple`: the losses, detached, and the gradient, shaped like `noise`.
    """
    with torch.enable_grad():
        leaf = noise.detach().requires_grad_(True)
        losses = loss_fn(leaf)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def joint_gradient(
    noise: torch.Tensor,
    observe: Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]],
    objective: Callable[[tuple[torch.Tensor, ...]], torch.Tensor],
    *,
    batch_size: int,
    rescale: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact gradient of a loss over all images in the memory of one micro-batch, in two passes.

    First all images are observed without gradients and the loss is differentiated with respect to the observations;
    then each micro-batch is observed again and carries its part of that gradient back (as Gao et al. 2021, "Scaling
    Deep Contrastive Learning Batch Size under Memory Limited Setup").

    Args:
        noise (`torch.Tensor` of shape `(B, ...)`): z.
        observe (`Callable`): (z of a slice, the slice) → per-image tensors `(b, ...)`; images do not depend on one
            another.
        objective (`Callable`): the observations of all B images → losses.
        batch_size (`int`): images per micro-batch.
        rescale (`bool`): for models in float16, whose gradients of single images would vanish below 6e-8: what is
            carried back is scaled per image. Then the gradient's direction is exact, its length has no meaning.

    Returns:
        `tuple`: the losses, detached, and the gradient, shaped like `noise`.
    """
    parts = [slice(first, first + batch_size) for first in range(0, len(noise), batch_size)]
    at_once = len(parts) == 1
    if at_once and not rescale:
        return loss_gradient(noise, lambda z: objective(observe(z, parts[0])))
    with torch.enable_grad():
        leaf = noise.detach().requires_grad_(True)
        with torch.set_grad_enabled(at_once):  # a graph only if there is no second pass
            seen = [observe(leaf[part], part) for part in parts]
        leaves = tuple(torch.cat(tensors).detach().requires_grad_(True) for tensors in zip(*seen, strict=True))
        losses = objective(leaves)
        upstream: Sequence[torch.Tensor | None] = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        if rescale:
            upstream = rescale_rows(upstream)
        gradients: list[torch.Tensor] = []
        for part in parts:
            if not at_once:
                leaf = noise[part].detach().requires_grad_(True)
                seen = [observe(leaf, part)]
            used = [(o, g[part]) for o, g in zip(seen[0], upstream, strict=True) if g is not None]
            outputs, weights = zip(*used, strict=True)
            gradients += torch.autograd.grad(outputs, leaf, weights)
    return losses.detach(), torch.cat(gradients)


def rescale_rows(gradients: Sequence[torch.Tensor | None], largest: float = 256.0) -> tuple[torch.Tensor | None, ...]:
    """Scales the gradients `(B, ...)` of each image so that the largest entry of all its tensors is `largest`.

    float16 ends at 65504 and at 6e-8: that leaves a factor of about 10^2 upwards and of 10^9 downwards.
    """
    present = [g.flatten(1).abs().amax(dim=1) for g in gradients if g is not None and g.numel()]
    length = torch.stack(present).amax(dim=0)
    factor = torch.where(length > 0, largest / length.clamp_min(torch.finfo(length.dtype).tiny), 1.0)
    return tuple(g if g is None else g * factor.view(-1, *[1] * (g.ndim - 1)) for g in gradients)


def momentum_descent(
    noise: torch.Tensor,
    loss_fn: Callable[[torch.Tensor], torch.Tensor],
    *,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    iterations: int = 200,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The released noise optimisation: SGD with momentum on z (repository kkkkqq/Dataset-Concentration).

    Returns:
        `tuple`: the noise, `(B, C, h, w)` as it was given, after `iterations` steps, and the loss before the first.
    """
    leaf = noise.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([leaf], lr=learning_rate, momentum=momentum)
    first = torch.empty(0)
    for iteration in range(iterations):
        losses, leaf.grad = loss_gradient(leaf, loss_fn)
        first = losses if iteration == 0 else first
        optimizer.step()
    return leaf.detach(), first
