"""What evaluators are trained on and judged by: losses of hard and soft labels, and accuracy."""

from __future__ import annotations

import torch
from torch.nn import functional as F


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
