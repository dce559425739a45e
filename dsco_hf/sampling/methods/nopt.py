"""NOpt: the noise of sampling steps is moved so that the images, as predicted from it, lower an objective."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...generators.failures import refuse_nonfinite
from ...matching.features import Observation
from ...matching.objectives import Bound, Objective, Ridge
from ...matching.targets import MatchingTargets
from ...utils.values import Limits, check_choice, check_real
from ..call import Call, Plain, Population, Sampling, SamplingMethod, Targets
from .noise import joint_gradient, shell_step


NOISE = "The sampling noise of a frozen class-conditional diffusion model was optimised so that"
LOOKAHEADS = ("conditional", "guided", "none")


@dataclasses.dataclass(frozen=True)
class NOpt(SamplingMethod):
    """Noise optimisation (DsCo, arXiv 2603.27987): the models stay frozen, and no gradient passes the denoiser.

    Attributes:
        objective ([`Objective`]): what the images should achieve; a name, such as "ridge", becomes the object.
        start (`float`): where it begins, as a fraction of the sampling steps; 0 is the first.
        stop (`float`): where it ends, likewise; the last step has no noise.
        iterations (`int`): updates of the noise per sampling step.
        step_size (`float`): η, length of the first update in units of the noise's norm.
        step_decay (`float`): the last step's update is this times `step_size`, in between it falls evenly: coarse
            moves first, fine ones at the end.
        lookahead (`str`): how the images are predicted from x_{t-1}: "conditional" asks the denoiser again without
            guidance, "guided" with, "none" reuses its last answer, at no cost.
    """

    objective: Objective = Ridge()
    start: float = 0.0
    stop: float = 1.0
    iterations: int = 1
    step_size: float = 1.0
    step_decay: float = 0.25
    lookahead: str = "conditional"

    # as few as three families of networks do not notice, see recipes/benchmarks/sampling_steps.py
    usual_steps = 16
    field_limits = {"iterations": 1, "step_size": 0, "step_decay": Limits(0, 1)}

    def __post_init__(self) -> None:
        """Refuses values out of range; makes the objective of its name or record."""
        super().__post_init__()
        object.__setattr__(self, "objective", Objective.of(self.objective))
        check_interval(self.start, self.stop)
        check_choice("lookahead", self.lookahead, LOOKAHEADS)

    @property
    def sentence(self) -> str:  # type: ignore[override]
        """What cards say was done."""
        return f"{NOISE} {self.objective.sentence}"

    @property
    def takes_targets(self) -> bool:  # type: ignore[override]
        """As the objective needs."""
        return self.objective.needs is not None

    @property
    def second_moment(self) -> bool:
        """As the objective needs."""
        return self.objective.needs == "second_moment"

    @property
    def memory(self) -> str | None:
        """As the objective is told of finished images."""
        return None if self.objective.needs is None else "images" if self.objective.each_image else "sums"

    @property
    def uses_classifier(self) -> bool:
        """Networks see every preview."""
        return True

    def label(self, targets: object) -> str:
        """With the data, data-free, or of a classifier only."""
        if self.objective.needs is None:
            return f"{self.name}-{self.objective.name}-only"
        real = isinstance(targets, MatchingTargets) and targets.provenance.get("population") == "data"
        return self.name if real else f"{self.name}-data-free"

    def without_targets(self) -> SamplingMethod:
        """Plain samples, but for an objective that needs no targets."""
        return self if self.objective.needs is None else Plain()

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """As the objective says."""
        self.objective.check(pipe, targets)

    def make_targets(self, pipe: DiffusionPipeline, given: Population, sampling: Sampling, **options: Any) -> Targets:
        """As all methods do; ValueError for an objective that matches nothing."""
        if self.objective.needs is None:
            raise ValueError(
                f"The {self.objective.name!r} objective matches nothing: pass None, and classes as `class_labels=`."
            )
        return super().make_targets(pipe, given, sampling, **options)

    def steps(self, num_steps: int) -> range:
        """Indices of the steps whose noise is optimised."""
        return optimized_steps(num_steps, self.start, self.stop)

    def step_size_at(self, i: int, num_steps: int) -> float:
        """Length of an update at step i: from `step_size` evenly down to `step_decay` times that."""
        steps = self.steps(num_steps)
        progress = (i - steps.start) / (len(steps) - 1) if len(steps) > 1 else 0.0
        return self.step_size * (1 + progress * (self.step_decay - 1))

    def prepare(self, call: Call) -> None:
        """Binds the objective to the call's images."""
        if call.eta > 0:
            call.state = self.objective.bind(call.pipe, call.targets, call.ids, call.previous)

    def noise(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Moves step i's noise `(B, C, h, w)` so that the predicted images lower the objective."""
        if call.state is None or i not in self.steps(len(call.timesteps)):
            return noise
        bound: Bound = call.state
        half = any(next(model.parameters()).dtype == torch.float16 for model in models_of(bound))
        for _ in range(self.iterations):
            losses, gradient = joint_gradient(
                noise,
                observation(call, bound, preview(call, i, latents, noise_pred, noise, self.lookahead)),
                lambda seen: bound(Observation(*seen)),
                batch_size=call.batch_size,
                rescale=half,
            )
            refuse_nonfinite_gradient(call, i, bound.rows, losses, gradient)
            call.discrepancies.append(losses.float().cpu())
            noise = shell_step(noise, gradient, self.step_size_at(i, len(call.timesteps)))
        return noise


def check_interval(start: float, stop: float) -> None:
    """Raises ValueError unless 0 <= start <= stop <= 1."""
    for name, value in (("start", start), ("stop", stop)):
        check_real(name, value, 0, 1)
    if start > stop:
        raise ValueError(f"`start={start}` must not exceed `stop={stop}`.")


def optimized_steps(num_steps: int, start: float, stop: float) -> range:
    """Indices of the steps from the fraction `start` to `stop`: never the last, whose variance is zero."""
    return range(math.floor(start * num_steps), min(math.ceil(stop * num_steps), num_steps - 1))


def models_of(bound: Bound) -> list[torch.nn.Module]:
    """What the images of an objective pass through: the decoder, if pixels are seen, and the networks."""
    decoder = bound.pipe.vae if bound.pipe.preview_vae is None else bound.pipe.preview_vae
    return ([decoder] if decoder is not None and bound.source.needs_pixels else []) + bound.source.networks


def observation(
    call: Call, bound: Bound, predict: Callable[[torch.Tensor, slice], torch.Tensor]
) -> Callable[[torch.Tensor, slice], Observation]:
    """What the networks see in the images, as a function of a slice of them and its noise `(b, C, h, w)`."""
    source = bound.source

    def observe(z: torch.Tensor, part: slice) -> Observation:
        call.passed("classifier", len(z) * len(source.networks))
        predicted = predict(z, part)
        pixels = call.decode(predicted, preview=True).clamp(-1, 1) if source.needs_pixels else None
        return source(pixels, predicted, moments=bound.objective.moments)

    return observe


def preview(
    call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor, lookahead: str
) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    """The predicted clean latents `(b, C, h, w)` as a function of step i's noise z of b images, all else held fixed.

    With look-ahead the denoiser is asked once, at the x_{t-1} that `noise` leads to; without, the current prediction
    is taken to move with z as x_{t-1} does.
    """

    def advance(z: torch.Tensor, part: slice) -> torch.Tensor:
        return call.step(i, latents[part], noise_pred[part], z)

    base = advance(noise, slice(None))
    if lookahead == "none":
        alpha, predicted = call.steps.starts[i + 1].alpha.to(latents), call.clean(i, latents, noise_pred)
        return lambda z, part: predicted[part] + (advance(z, part) - base[part]) / alpha
    scale = call.sampling.guidance_scale if lookahead == "guided" else 1.0
    ahead = call.predict_noise(base, call.timesteps[i + 1], scale)
    return lambda z, part: call.clean(i + 1, advance(z, part), ahead[part])


def refuse_nonfinite_gradient(
    call: Call, i: int, rows: torch.Tensor, losses: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Raises if a loss `(K,)` or the gradient `(B, ...)` is not finite; names the denoiser if it is the cause."""
    if losses.isfinite().all() & gradient.isfinite().all():
        return
    call.watch.check()
    bad = ~gradient.flatten(1).isfinite().all(dim=1)
    if losses.ndim:
        bad = bad | ~losses.isfinite()[rows.unique(return_inverse=True)[1]]
    what = f"The objective or its gradient at step {i} (t = {call.timesteps[i].item():g}) is"
    refuse_nonfinite(bad | ~bad.any(), call.ids, what, step=i, models="decoder and classifier")
