"""What a generator is built and trained with, its scheduler and its loss; here the built-in families are known."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin

from ..data.schema import nearest
from ..utils.values import check_choice
from .base import FAMILIES, Denoiser, denoiser_of, family_of
from .families.dit import DiT, DiTOptions
from .families.pixart import PixArt
from .families.stable_diffusion import StableDiffusion
from .families.stable_diffusion_3 import StableDiffusion3
from .families.unet import UNet, UNetOptions
from .steps import Scheduler, is_flow, level_at, noised, prediction_type, training_target


BUILT_IN = (DiT, UNet, StableDiffusion, PixArt, StableDiffusion3)
# Where a pipeline may keep its denoiser. Published pipelines name the first; the last is for families from outside.
SLOTS = tuple(dict.fromkeys(family.component for family in (*BUILT_IN, Denoiser)))
ENCODERS = tuple(dict.fromkeys(name for family in BUILT_IN for name in family.encoders))

_CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "flow"),
    "trainable": ("all", "bias_and_norm", "lora"),
    "lr_schedule": ("cosine", "constant"),
    "timestep_sampling": ("stratified", "uniform"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("trailing", "leading", "linspace"),
}


@dataclass(frozen=True)
class GeneratorTrainingConfig(DiTOptions, UNetOptions):
    """How a generator is built and trained. The defaults fit the 8x8 digits in a few minutes on two CPU cores.

    What an architecture is built with, see its own options; a family from outside may read those of a subclass.

    Attributes:
        architecture (`str`): "dit", a `DiTTransformer2DModel`; "unet", a class-conditional `UNet2DModel`, whose
            convolutions learn small natural images from fewer of them; "stable-diffusion", that UNet with prompts in
            the place of classes, as a small frozen text encoder of random weights says them; or the name of a
            registered family.
        trainable (`str`): when an existing denoiser is fine-tuned: "all" weights, or "bias_and_norm": biases, norms
            and tables of classes only, as in DiffFit (https://arxiv.org/abs/2304.06648), without its scale factors, or
            "lora", small matrices beside the projections of attention (https://arxiv.org/abs/2106.09685), which are
            added to them in the end; it needs peft.
        lora_rank (`int`): of these matrices.
        class_dropout_prob (`float`): share of labels replaced by the null class, in [0, 1).
        num_train_timesteps (`int`): T, the number of noise levels.
        beta_start, beta_end, beta_schedule: the noise schedule, as in `DDIMScheduler`; a flow has none of these.
        rescale_betas_zero_snr (`bool`): shift the levels so that the last is nothing but noise
            (https://arxiv.org/abs/2305.08891), as in `DDIMScheduler`.
        timestep_spacing (`str`): of the saved scheduler, but for a flow. "trailing" starts sampling at t = T - 1, pure
            noise, and spends no step on t = 0, where nothing is left to remove (https://arxiv.org/abs/2305.08891).
        timestep_sampling (`str`): "stratified" spreads a batch's timesteps evenly over 0..T-1 (one random offset),
            which makes the gradient less noisy; "uniform" draws each on its own.
        prediction_type (`str`): what the denoiser predicts: "epsilon", the noise, or "v_prediction", the velocity
            √ᾱ ε - √(1 - ᾱ) x (https://arxiv.org/abs/2202.00512), or "flow", the velocity ε - x of flow matching
            (https://arxiv.org/abs/2210.02747), whose noise levels are σ and 1 - σ.
        min_snr_gamma (`float`, *optional*): weigh the loss by min(SNR, gamma) / SNR, or for velocities by
            min(SNR, gamma) / (SNR + 1), which is the same weight on the clean image
            (https://arxiv.org/abs/2303.09556).
        train_steps (`int`): optimiser steps.
        batch_size (`int`): images per step over all processes.
        learning_rate (`float`): peak of the schedule.
        lr_schedule (`str`): after the warm-up, "cosine" to 0 or "constant".
        warmup_steps (`int`): steps of linear warm-up.
        adam_beta1, adam_beta2, weight_decay (`float`): AdamW.
        max_grad_norm (`float`): gradients are clipped to this norm.
        ema_decay (`float`): largest decay of the averaged weights; at step i it is at most 1 - (1 + i) ** -ema_power.
        ema_power (`float`): the warm-up of the averaging.
        horizontal_flip (`bool`): mirror half of the images; not for digits or text.
        seed (`int`): of initial weights, order of the data, noise and timesteps.
    """

    architecture: str = "dit"
    trainable: str = "all"
    lora_rank: int = 8
    class_dropout_prob: float = 0.1
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "trailing"
    timestep_sampling: str = "stratified"
    prediction_type: str = "epsilon"
    min_snr_gamma: float | None = None
    train_steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 2e-3
    lr_schedule: str = "cosine"
    warmup_steps: int = 100
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    ema_power: float = 0.75
    horizontal_flip: bool = False
    seed: int = 0

    field_limits = {
        **dict.fromkeys(("num_train_timesteps", "train_steps", "batch_size", "lora_rank"), 1),
        "warmup_steps": 0,
    }

    def __post_init__(self) -> None:
        """Refuses values that no training can use."""
        super().__post_init__()
        for name, allowed in {"architecture": tuple(FAMILIES), **_CHOICES}.items():
            check_choice(name, getattr(self, name), allowed)
        for name in ("class_dropout_prob", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm", "min_snr_gamma"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.prediction_type == "flow" and self.min_snr_gamma is not None:
            raise ValueError(
                f"`min_snr_gamma={self.min_snr_gamma}` weighs the noise levels of diffusion, and "
                "`prediction_type='flow'` has others: leave it out."
            )


def build_denoiser(
    config: GeneratorTrainingConfig, *, num_classes: int, sample_size: int, num_channels: int
) -> ModelMixin:
    """A new network of the configured architecture, see [`Denoiser.build`].

    The weights depend on `config.seed` only; the global random state is left as it is.
    """
    family = FAMILIES[config.architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return family.build(config, num_classes=num_classes, sample_size=sample_size, num_channels=num_channels)


def as_components(denoiser: ModelMixin | None, named: Mapping[str, ModelMixin | None]) -> dict[str, ModelMixin | None]:
    """What a pipeline has in each of `SLOTS`: None but for the one where the denoiser's family keeps it.

    Args:
        denoiser: a network, to be put where it belongs; None if it is among `named`.
        named (`Mapping`): networks by slot, as a pipeline's `__init__` is given them.

    Raises:
        TypeError: for another name than a slot's.
        ValueError: unless there is exactly one denoiser, of a registered family, conditioned on classes.
    """
    if unknown := sorted(set(named) - set(SLOTS)):
        raise TypeError(f"A pipeline has no component {unknown[0]!r}.{nearest(unknown[0], SLOTS)}")
    given = [(name, network) for name, network in named.items() if network is not None]
    if denoiser is not None:
        given.append((family_of(denoiser).component, denoiser))
    if len(given) != 1:
        places = ", ".join(f"`{family.component}` (a {family.kinds[0].__name__})" for family in FAMILIES.values())
        got = f"both {' and '.join(f'`{name}`' for name, _ in given)}" if given else f"neither of {places}"
        raise ValueError(f"The pipeline needs one denoiser, got {got}: pass exactly one.")
    ((name, network),) = given
    if (component := family_of(network).component) != name:
        raise ValueError(f"`{name}` is no place for a {type(network).__name__}: pass it as `{component}`.")
    denoiser_of(network).check_conditioned()
    return dict.fromkeys(SLOTS) | {name: network}


def with_slots(init: Callable) -> Callable:
    """Shows `__init__(..., **slots)` with one keyword per slot: diffusers reads a pipeline's components off it."""
    signature = inspect.signature(init)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    names = (*SLOTS, *ENCODERS)
    slots = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    vars(init)["__signature__"] = signature.replace(parameters=[*own, *slots])
    return init


def build_scheduler(config: GeneratorTrainingConfig, *, latents: bool) -> Scheduler:
    """The sampling scheduler that belongs to a generator trained with `config`.

    Pixels that diffusion predicts are clipped to [-1, 1], where images are; latents have no such bounds, and a flow's
    predictions need none.
    """
    if config.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing=config.timestep_spacing,
        clip_sample=not latents,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type=config.prediction_type,
    )


def with_schedule_of(config: GeneratorTrainingConfig, scheduler: Scheduler) -> GeneratorTrainingConfig:
    """`config` with the noise schedule and the kind of prediction that a trained generator was trained with.

    Raises:
        ValueError: if the scheduler has betas of its own, or predicts something else than noise or velocity, or than
            `config` asks for.
    """
    own = prediction_type(scheduler)
    if config.prediction_type not in (own, GeneratorTrainingConfig.prediction_type):
        raise ValueError(
            f"`prediction_type={config.prediction_type!r}` is not what the generator predicts, {own!r}, and its "
            "training goes on with that: leave it out."
        )
    if is_flow(scheduler):
        return dataclasses.replace(
            config, prediction_type="flow", num_train_timesteps=scheduler.config.num_train_timesteps
        )
    if scheduler.config.get("trained_betas") is not None:
        raise ValueError("A scheduler with `trained_betas` cannot be fine-tuned with: its schedule has no name.")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing", "prediction_type")
    zero = bool(scheduler.config.get("rescale_betas_zero_snr"))
    own_levels = {name: scheduler.config[name] for name in names} | {"rescale_betas_zero_snr": zero}
    return dataclasses.replace(config, **own_levels)


def learning_rate_at(step: int, config: GeneratorTrainingConfig) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then cosine to 0 or constant."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        return rate * (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return rate
    progress = (step - config.warmup_steps) / max(config.train_steps - config.warmup_steps, 1)
    return rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def denoising_loss(
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: Scheduler,
    clean: torch.Tensor,
    labels: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    *,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean of ||target - predicted||² / size; the target is the noise or a velocity, as the scheduler says.

    Sources: DDPM's simple loss (https://arxiv.org/abs/2006.11239), velocity (https://arxiv.org/abs/2202.00512), flow
    matching (https://arxiv.org/abs/2210.02747).

    Args:
        forward (`Callable`): of a [`Denoiser`]: what it predicts of noisy samples, timesteps and labels.
        scheduler (`DDIMScheduler` or `FlowMatchEulerDiscreteScheduler`): has the levels, and decides on the target.
        clean (`torch.Tensor` of shape `(B, C, H, W)`): images in [-1, 1] or scaled latents.
        labels (`torch.Tensor` of shape `(B,)`): classes, or the null class.
        timesteps (`torch.Tensor` of shape `(B,)`, int64): noise levels in [0, T), of a flow in [1, T].
        noise (`torch.Tensor` of shape `(B, C, H, W)`): standard normal.
        min_snr_gamma (`float`, *optional*): see [`GeneratorTrainingConfig`].
    """
    kind, level = prediction_type(scheduler), level_at(scheduler, timesteps)
    target = training_target(kind, level, clean, noise)
    predicted = forward(noised(level, clean, noise), timesteps, labels)
    losses = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if min_snr_gamma is not None:
        losses = losses * min_snr_weights(level.signal.flatten().to(losses), min_snr_gamma, kind)
    return losses.mean()


def min_snr_weights(alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weights min(SNR, γ) / SNR for noise and min(SNR, γ) / (SNR + 1) for velocity (https://arxiv.org/abs/2303.09556).

    Args:
        alphas_cumprod (`torch.Tensor` of shape `(B,)`, in (0, 1)): ᾱ of each image's timestep; SNR = ᾱ / (1 - ᾱ).
        gamma (`float`): γ, above which the signal-to-noise ratio counts no more; 5 in the paper.
        prediction_type (`str`): "epsilon" or "v_prediction".
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def read_class_mapping(
    path: str | Path | None, names: Sequence[str], label_ids: Callable[[Sequence[int | str]], list[int]]
) -> dict[int, list[int]]:
    """The classes that new ones start from, out of a YAML file with `new class: old class` or a list of old ones.

    Args:
        path (`str` or `Path`, *optional*): the file; without one nothing is mapped.
        names (sequence of `str`): the new classes, by label.
        label_ids (`Callable`): the old classes by index or name, such as `DsCoPipeline.get_label_ids`.

    Raises:
        ValueError: for a class that there is not.
    """
    chosen = {} if path is None else yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if unknown := [name for name in chosen if str(name) not in names]:
        raise ValueError(f"{path} names {unknown[0]!r}, no class of the dataset.{nearest(str(unknown[0]), names)}")
    return {names.index(str(name)): label_ids(old if isinstance(old, list) else [old]) for name, old in chosen.items()}
