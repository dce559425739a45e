"""How the noise of a sampling step is optimised (NOpt): look-ahead, objective and update; a mixin of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..generators.failures import FiniteWatch, refuse_nonfinite
from ..matching.features import Observation
from .noise import joint_gradient, momentum_descent, shell_step
from .plan import NoisePlan
from .released import quantile_loss, shell_penalty


class NoiseOptimizationMixin:
    """What [`DsCoPipeline`] does with the noise of an optimised step. The state is that of the call in progress."""

    scheduler: Any
    classifier: Any
    vae: Any
    preview_vae: Any
    predict_noise: Callable[..., torch.Tensor]
    decode_latents: Callable[..., torch.Tensor]
    _plan: Any
    _watch: FiniteWatch | None
    _calls: dict[str, int]
    _batch_size: int
    _eta: float
    _guidance_scale: float
    _discrepancies: list[torch.Tensor]

    def _preview(
        self,
        i: int,
        latents: torch.Tensor,
        noise_pred: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor,
        lookahead: str,
    ) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """The predicted clean latents as a function of step i's noise z, with everything but z held fixed.

        With look-ahead the denoiser is asked once, at the x_{t-1} that `noise` leads to; without, the current
        prediction is taken to move with z as x_{t-1} does.
        """
        step = self.scheduler.step
        t, t_next = self.scheduler.timesteps[i], self.scheduler.timesteps[i + 1]
        options = {"eta": self._eta, "use_clipped_model_output": True}

        def advance(z: torch.Tensor, part: slice) -> torch.Tensor:
            return step(noise_pred[part], t, latents[part], variance_noise=z, **options).prev_sample

        everything = slice(None)
        if lookahead == "none":
            level = self.scheduler.alphas_cumprod[t_next].to(latents)
            predicted = step(noise_pred, t, latents, variance_noise=noise, **options).pred_original_sample
            base = advance(noise, everything)
            return lambda z, part: predicted[part] + (advance(z, part) - base[part]) / level.sqrt()
        scale = self._guidance_scale if lookahead == "guided" else 1.0
        ahead = self.predict_noise(advance(noise, everything), t_next, labels, scale)
        return lambda z, part: step(ahead[part], t_next, advance(z, part)).pred_original_sample

    def optimize_noise(
        self, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Moves step i's noise `(B, C, h, w)` so that the predicted images lower the objective (NOpt)."""
        plan: NoisePlan = self._plan
        if plan.objective == "quantile":
            return self._optimize_noise_quantile(i, latents, noise_pred, noise)
        moments = plan.objective == "classifier" and plan.classifier_objective.batchnorm > 0
        decoder = self.vae if self.preview_vae is None else self.preview_vae
        models = ([decoder] if decoder is not None and plan.source.needs_pixels else []) + plan.source.networks
        half = any(next(model.parameters()).dtype == torch.float16 for model in models)

        for _ in range(plan.optimization_steps):
            preview = self._preview(i, latents, noise_pred, noise, labels, plan.lookahead)

            def observe_noise(z: torch.Tensor, part: slice, preview: Callable = preview) -> Observation:
                self._calls["classifier"] += len(z) * len(plan.source.networks)
                predicted, pixels = preview(z, part), None
                if plan.source.needs_pixels:
                    pixels = self.decode_latents(predicted, preview=True).clamp(-1, 1)
                return plan.source(pixels, predicted, moments=moments)

            losses, gradient = joint_gradient(
                noise,
                observe_noise,
                lambda seen: plan.loss(Observation(*seen)),
                batch_size=self._batch_size,
                rescale=half,
            )
            self._refuse_nonfinite_gradient(i, losses, gradient, labels)
            self._discrepancies.append(losses.float().cpu())
            noise = shell_step(noise, gradient, plan.step_size_at(i))
        return noise

    def _refuse_nonfinite_gradient(
        self, i: int, losses: torch.Tensor, gradient: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Raises if a loss `(K,)` or the gradient `(B, ...)` is not finite; names the denoiser if it is the cause."""
        if losses.isfinite().all() & gradient.isfinite().all():
            return
        if self._watch is not None:
            self._watch.check()
        bad = ~gradient.flatten(1).isfinite().all(dim=1)
        if losses.ndim:
            bad = bad | ~losses.isfinite()[self._plan.rows.unique(return_inverse=True)[1]]
        what = f"The objective or its gradient at step {i} (t = {int(self.scheduler.timesteps[i])}) is"
        refuse_nonfinite(bad | ~bad.any(), labels.tolist(), what, step=i, models="decoder and classifier")

    def _optimize_noise_quantile(
        self, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The released algorithm: features of x_{t-1} itself against those of real latents at the level of t.

        The classes of a call share their passes through the network; their losses do not touch each other.
        """
        plan, t = self._plan, self.scheduler.timesteps[i]
        dtype = next(plan.extractor.parameters()).dtype
        members = [(plan.rows == row).nonzero()[:, 0] for row in plan.rows.unique()]
        pivots = [
            plan.targets.pivots(int(plan.rows[index[0]]), len(index), int(t), plan.extractor, self.scheduler)
            for index in members
        ]
        options = {"eta": self._eta, "use_clipped_model_output": True}

        def losses(z: torch.Tensor) -> torch.Tensor:
            self._calls["classifier"] += len(z)
            ahead = self.scheduler.step(noise_pred, t, latents, variance_noise=z, **options).prev_sample
            features = plan.extractor(ahead.to(dtype)).to(z.dtype)
            pairs = zip(members, pivots, strict=True)
            return torch.stack([quantile_loss(features[index], p) + shell_penalty(z[index]) for index, p in pairs])

        noise, first = momentum_descent(noise, losses, iterations=plan.optimization_steps)
        self._discrepancies.append(first.float().cpu())
        return noise
