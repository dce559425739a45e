"""Noise levels and the steps between them, of diffusion and of flow matching alike: x = α x0 + σ ε.

Diffusion (DDPM, https://arxiv.org/abs/2006.11239) has α² + σ² = 1, flow matching (https://arxiv.org/abs/2210.02747;
as rectified flow, https://arxiv.org/abs/2209.03003) α + σ = 1. From the prediction at one level follow x̂0 and ε̂, and
the next level is x' = α' x̂0 + √(σ'² - s²) ε̂ + s z with fresh noise z, whose deviation s is at most σ'.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ..utils.values import check_choice


Scheduler: TypeAlias = DDIMScheduler | FlowMatchEulerDiscreteScheduler
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")
NEARLY_ONE = 1 - 1e-6


@dataclass(frozen=True)
class Level:
    """A noise level, or one for each of B samples; kept as squares, which is how diffusion tells them, bit for bit.

    Attributes:
        signal, noise (`torch.Tensor` of shape `()` or `(B, 1, 1, 1)`): α² and σ².
    """

    signal: torch.Tensor
    noise: torch.Tensor

    @property
    def alpha(self) -> torch.Tensor:
        """α, in [0, 1]."""
        return self.signal**0.5

    @property
    def sigma(self) -> torch.Tensor:
        """σ, in [0, 1]."""
        return self.noise**0.5


def is_flow(scheduler: object) -> bool:
    """Whether a scheduler is one of flow matching."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def prediction_type(scheduler: Scheduler) -> str:
    """What the denoiser of a scheduler predicts, of `PREDICTIONS`."""
    return "flow" if is_flow(scheduler) else str(scheduler.config.prediction_type)


def check_fits(scheduler: SchedulerMixin, network: str, flow: bool | None) -> None:
    """Raises ValueError for a scheduler of diffusion with a network of a flow, or the other way round.

    Args:
        scheduler (`SchedulerMixin`): of any class.
        network (`str`): the network's class.
        flow (`bool`, *optional*): whether such networks predict the velocity of a flow; None: they may do either.
    """
    if flow is None or flow == is_flow(scheduler):
        return
    predicts, own, options = "noise, or a velocity of diffusion", "DDIMScheduler", ", clip_sample=False"
    if flow:
        predicts, own, options = "the velocity of a flow", "FlowMatchEulerDiscreteScheduler", ""
    raise ValueError(
        f"The scheduler is a {type(scheduler).__name__}, and a {network} predicts {predicts}: give it the levels that "
        f"it was trained with, `{own}.from_pretrained(folder, subfolder='scheduler'{options})`, `folder` being the "
        "model's."
    )


def level_at(scheduler: Scheduler, timesteps: torch.Tensor | float) -> Level:
    """The level of a time `()`, or those of `(B,)` as `(B, 1, 1, 1)`: t in 0..T-1, or of a flow σ T in [0, T]."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        found = flow_level(torch.as_tensor(timesteps) / scheduler.config.num_train_timesteps)
    else:
        kept = scheduler.alphas_cumprod
        if isinstance(timesteps, torch.Tensor):  # on whose device the levels then are: nothing waits for it
            alphas = kept.to(timesteps.device)[timesteps]
        else:
            alphas = kept[int(timesteps)]
        found = Level(alphas, 1 - alphas)
    if found.signal.ndim == 0:
        return found
    return Level(*(squares.view(-1, 1, 1, 1) for squares in (found.signal, found.noise)))


def flow_level(sigma: torch.Tensor) -> Level:
    """α = 1 - σ."""
    return Level((1 - sigma) ** 2, sigma**2)


def noised(level: Level, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """α x0 + σ ε `(B, C, h, w)`."""
    return level.alpha.to(clean) * clean + level.sigma.to(clean) * noise


def training_target(kind: str, level: Level, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What a denoiser learns to say of `noised(level, clean, noise)`, all `(B, C, h, w)`; `kind` of `PREDICTIONS`."""
    if kind == "flow":  # the derivative by σ
        return noise - clean
    if kind == "v_prediction":  # https://arxiv.org/abs/2202.00512
        return level.alpha.to(clean) * noise - level.sigma.to(clean) * clean
    return clean if kind == "sample" else noise


def split(kind: str, level: Level, x: torch.Tensor, prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂0 and ε̂ `(B, C, h, w)` of what a denoiser predicts of x at a level; `kind` of `PREDICTIONS`.

    Raises:
        ValueError: for another kind.
    """
    alpha, sigma = level.alpha, level.sigma
    if kind == "flow":
        return x - sigma * prediction, x + alpha * prediction
    if kind == "v_prediction":
        return alpha * x - sigma * prediction, alpha * prediction + sigma * x
    if kind == "sample":
        return prediction, (x - alpha * prediction) / sigma
    check_choice("prediction_type", kind, PREDICTIONS)
    return (x - sigma * prediction) / alpha, prediction


def with_noise_shifted(kind: str, level: Level, prediction: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """A prediction `(B, C, h, w)` whose ε̂ is larger by `shift`, at the same x; `kind` of `PREDICTIONS`."""
    if kind == "epsilon":
        return prediction + shift
    if kind == "sample":
        return prediction - shift * (level.sigma / level.alpha)
    return prediction + shift / level.alpha  # of both velocities


class Steps:
    """The steps of one sampling, from pure noise at the first to an image at the last.

    Attributes:
        scheduler (`DDIMScheduler` or `FlowMatchEulerDiscreteScheduler`): a copy, set to these steps.
        timesteps (`torch.Tensor` of shape `(S,)`): what the denoiser is told at each.
        eta (`float`): η, share of the most noise that a step may add: 1 is ancestral sampling, 0 none (DDIM, and
            Euler's method of a flow). With the scheduler's `stochastic_sampling` a step of a flow may add σ', so that
            η = 1 replaces all noise: x' = (1 - σ') x̂0 + σ' z.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_inference_steps: int,
        eta: float = 1.0,
        *,
        tokens: int = 1,
        own_spacing: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Sets a copy of a scheduler; `tokens` of an image and `own_spacing` are as of [`set_flow_steps`]."""
        self.scheduler = copy.copy(scheduler)
        self.kind = prediction_type(scheduler)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            set_flow_steps(self.scheduler, num_inference_steps, tokens, device, own_spacing=own_spacing)
            levels = [flow_level(sigma) for sigma in self.scheduler.sigmas.cpu()]
            self.starts, self.ends = levels[:-1], levels[1:]
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            stride = self.scheduler.config.num_train_timesteps // num_inference_steps
            times, last = self.scheduler.timesteps.tolist(), self.scheduler.final_alpha_cumprod
            self.starts = [level_at(self.scheduler, t) for t in times]
            # which is not always the level of the next step: T need not be a multiple of S
            self.ends = [level_at(self.scheduler, t - stride) if t >= stride else Level(last, 1 - last) for t in times]
        self.timesteps: torch.Tensor = self.scheduler.timesteps
        self.eta = self._usable(eta)

    def __len__(self) -> int:
        """S."""
        return len(self.timesteps)

    def clean(self, i: int, x: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """x̂0 `(B, C, h, w)` of a prediction at step i, clipped as the scheduler says; gradients reach both."""
        found, config = split(self.kind, self.starts[i], x, prediction)[0], self.scheduler.config
        if is_flow(self.scheduler):
            return found
        if config.thresholding:
            return self.scheduler._threshold_sample(found)
        return found.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else found

    def step(self, i: int, x: torch.Tensor, prediction: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """X' `(B, C, h, w)`, at the level after step i; gradients reach the noise."""
        start, end, clean = self.starts[i], self.ends[i], self.clean(i, x, prediction)
        again = (x - start.alpha * clean) / start.sigma  # the noise that is left, if x̂0 was clipped
        deviation = self._deviation(i, self.eta)
        moved = end.alpha * clean + (end.noise - deviation**2).clamp_min(0) ** 0.5 * again
        return moved + deviation * noise if self.eta > 0 else moved

    def deviation(self, i: int) -> float:
        """s, the standard deviation of the noise that step i adds; 0 at the last."""
        return float(self._deviation(i, self.eta))

    def _deviation(self, i: int, eta: float) -> torch.Tensor:
        """S = η σ'/σ √(σ² - σ'² α²/α'²), the posterior's, or η σ'."""
        start, end = self.starts[i], self.ends[i]
        if not is_flow(self.scheduler):
            variance = (end.noise / start.noise) * (1 - start.signal / end.signal)
        elif self.scheduler.config.stochastic_sampling:
            variance = end.noise
        else:
            variance = (end.noise / start.noise) * (start.noise - end.noise * start.signal / end.signal)
        return eta * variance**0.5

    def _usable(self, eta: float) -> float:
        """η, or a millionth less where rounding makes s larger than σ', as at the first step of a cosine schedule."""
        too_much = any(self._deviation(i, eta) ** 2 > end.noise for i, end in enumerate(self.ends))
        # a flow's s may be all of σ', and what rounding adds to it is cut off in the step
        return eta * NEARLY_ONE if too_much and not is_flow(self.scheduler) else eta


def set_flow_steps(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_inference_steps: int,
    tokens: int,
    device: torch.device | str,
    *,
    own_spacing: bool = False,
) -> None:
    """Sets S steps from σ = 1 evenly down to 1 / S and then 0, moved by what the scheduler says of its shift.

    So FLUX's pipeline spaces them. Those of Stable Diffusion 3 and others leave it to the scheduler, whose last level
    is the lowest of the training: it spends a step on what is nearly done there.

    Args:
        scheduler (`FlowMatchEulerDiscreteScheduler`): is set.
        num_inference_steps (`int`): S.
        tokens (`int`): of an image, by which `use_dynamic_shifting` shifts.
        device (`torch.device` or `str`): of the timesteps.
        own_spacing (`bool`): leave it to the scheduler.
    """
    mu, config = None, scheduler.config
    if config.use_dynamic_shifting:  # linear in the tokens, as `calculate_shift` of diffusers' pipelines
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    if own_spacing:
        scheduler.set_timesteps(num_inference_steps, mu=mu, device=device)
        return
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device=device)
