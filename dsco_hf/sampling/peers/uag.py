"""UAG: the prediction moves so that the classifier becomes less sure of the predicted image."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline

from ...generators.steps import with_noise_shifted
from ...matching.features import features_and_logits
from ...utils.values import Limits
from ..call import Call, SamplingMethod
from ..methods.noise import loss_gradient
from .best_of_n import need_teacher
from .statistics import NeedsNames


@dataclasses.dataclass(frozen=True)
class UAG(NeedsNames, SamplingMethod):
    """Uncertainty-aware guidance (2026, as its reproduction has it): the data-free rival.

    ε ← ε - λ·√(1 - ᾱ_t)·∇_{x_t} H(p(decode(x̂0))), H being the entropy of the classifier's probabilities, and ε held
    fixed within x̂0. Neither targets nor images are needed: a dataset that is given names the classes only.

    As published but for this: the preview decoder, where there is one, takes the VAE's place; guidance scale and steps
    are those of [`Sampling`].

    Attributes:
        scale (`float`): λ.
        below (`float`): steps are guided whose t is at most this share of the noise levels of training.
    """

    sentence: ClassVar[str] = (
        "The sampling of a frozen class-conditional diffusion model was guided to images that a classifier is less "
        "sure of."
    )
    scale: float = 10.0
    below: float = 0.795
    field_limits = {"scale": 0, "below": Limits(0, 1)}

    @property
    def uses_classifier(self) -> bool:
        """It says how sure it is."""
        return True

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError without a classifier; targets only name classes."""
        need_teacher(self.name, pipe)

    def guide(self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """ε `(B, C, h, w)` less the gradient of the entropy, where the step is guided."""
        if call.timesteps[i] > self.below * call.steps.scheduler.config.num_train_timesteps:
            return noise_pred
        gradients = []
        for part in torch.arange(len(latents)).split(call.batch_size):
            rows = slice(int(part[0]), int(part[-1]) + 1)

            def uncertainty(x: torch.Tensor, rows: slice = rows) -> torch.Tensor:
                pixels = call.decode(call.clean(i, x, noise_pred[rows]), preview=True)
                call.passed("classifier", len(pixels))
                return entropy(features_and_logits(call.pipe.classifier, pixels)[1])

            gradients.append(loss_gradient(latents[rows], uncertainty)[1])
        shift = self.scale * call.steps.starts[i].sigma.to(latents) * torch.cat(gradients)
        return with_noise_shifted(call.steps.kind, call.steps.starts[i], noise_pred, -shift)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H = -Σ p log p in nats, `(B, K)` → `(B,)`; gradients reach the logits."""
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)
