"""The plan of one sampling call: what its noise is optimised for, and at which steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ..matching.feature_spec import DEFAULT_FEATURES, FeatureSource
from ..matching.features import Observation
from ..matching.objectives import ClassifierObjective, ridge, rkhs
from .released import RandomExtractor


@dataclasses.dataclass
class NoisePlan:
    """How the noise of one call is optimised."""

    objective: str
    targets: Any  # MatchingTargets, QuantileTargets or None; `check_targets` sees that they fit the objective
    optimization_steps: int
    step_size: float
    lookahead: str
    classifier_objective: ClassifierObjective
    previous: tuple[torch.Tensor, torch.Tensor] | None = None
    step_decay: float = 0.25
    contrast: float = 0.0
    regularization: float = 2.0
    steps: range = range(0)  # indices of the optimised sampling steps

    @property
    def active(self) -> bool:
        """Whether there is anything to optimise."""
        return self.optimization_steps != 0 and (self.targets is not None or self.objective == "classifier")

    def step_size_at(self, i: int) -> float:
        """Length of an update at sampling step i: from `step_size` evenly down to `step_decay` times that."""
        progress = (i - self.steps.start) / (len(self.steps) - 1) if len(self.steps) > 1 else 0.0
        return self.step_size * (1 + progress * (self.step_decay - 1))

    def prepare(self, pipe: DiffusionPipeline, ids: list[int]) -> None:
        """Finds each image's target and moves targets to the pipeline's device."""
        device = pipe._execution_device
        if self.objective == "classifier":
            self.labels = torch.tensor(pipe.classifier_labels(ids), device=device)
            self.rows, self.classifier = self.labels, pipe.classifier
        else:
            self.rows = self.targets.rows_of(ids).to(device)
        if self.objective == "quantile":
            channels = pipe.latent_shape[0]
            extractor = RandomExtractor(channels, seed=self.targets.seed).to(device, pipe.denoiser.dtype)
            # faster, on a CPU by a third
            self.extractor = extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif self.targets is not None:
            self.targets = self.targets.to(device)
        if self.objective != "quantile":
            self.source = FeatureSource(pipe, DEFAULT_FEATURES if self.targets is None else self.targets.features)

    def loss(self, observation: Observation) -> torch.Tensor:
        """The losses of the classes, `(K,)`."""
        if self.objective == "classifier":
            return self.classifier_objective(observation, self.rows, self.labels, self.classifier)
        if self.objective == "ridge":
            return ridge(observation, self.rows, self.targets, self.previous, self.regularization)
        return rkhs(observation, self.rows, self.targets, self.previous, self.contrast)


def optimized_steps(num_steps: int, optimize_from: float, optimize_until: float) -> range:
    """Indices of the steps at which noise is optimised: never the last, whose variance is zero."""
    return range(math.floor(optimize_from * num_steps), min(math.ceil(optimize_until * num_steps), num_steps - 1))


def usable_eta(scheduler: DDIMScheduler, eta: float) -> float:
    """η, or a millionth less where rounding would have DDIM take the root of a negative number.

    A step has the variance σ² = η² (1 - α_s) / (1 - α_t) · (1 - α_t / α_s) and a part of √(1 - α_s - σ²). Where α_t is
    nearly zero, as at the first step of a cosine schedule, η = 1 makes that root 0, or in float32 a little less.
    """
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    for t in scheduler.timesteps.tolist():
        previous = scheduler.alphas_cumprod[t - stride] if t >= stride else scheduler.final_alpha_cumprod
        deviation = eta * scheduler._get_variance(t, t - stride) ** 0.5
        if 1 - previous - deviation**2 < 0:
            return eta * (1 - 1e-6)
    return eta
