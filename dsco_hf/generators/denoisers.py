"""What a generator is made of: its denoiser (a DiT or a UNet), its scheduler and its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..data.schema import nearest
from ..utils.values import plain_fields


Denoiser: TypeAlias = DiTTransformer2DModel | UNet2DModel

_CHOICES = {
    "architecture": ("dit", "unet"),
    "activation_fn": ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"),
    "prediction_type": ("epsilon", "v_prediction"),
    "trainable": ("all", "bias_and_norm"),
    "lr_schedule": ("cosine", "constant"),
    "timestep_sampling": ("stratified", "uniform"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("trailing", "leading", "linspace"),
}


@dataclass(frozen=True)
class GeneratorTrainingConfig:
    """How a generator is built and trained. The defaults fit the 8x8 digits in a few minutes on two CPU cores.

    Attributes:
        architecture (`str`): "dit", a `DiTTransformer2DModel`; or "unet", a class-conditional `UNet2DModel`, whose
            convolutions learn small natural images from fewer of them.
        num_layers (`int`): transformer blocks (DiT).
        num_attention_heads (`int`): heads per block (DiT).
        attention_head_dim (`int`): channels per head; the width of a DiT is heads times this.
        patch_size (`int`): pixels (or latents) per token side; must divide the sample size (DiT).
        activation_fn (`str`): of a DiT's feed-forward layers, see `diffusers.models.attention.FeedForward`;
            "linear-silu" is cheaper on a CPU than the usual "gelu-approximate".
        block_out_channels (`str`): channels of a UNet's levels, finest first, as in "64,128,256". Each level halves
            the sample size of the one before.
        layers_per_block (`int`): residual blocks per level on the way down, one more on the way up (UNet).
        attention_levels (`int`): how many of the coarsest levels have self-attention (UNet).
        trainable (`str`): when an existing DiT is fine-tuned: "all" weights, or "bias_and_norm": biases, norms and the
            table of classes only, as in DiffFit (https://arxiv.org/abs/2304.06648), without its scale factors.
        class_dropout_prob (`float`): share of labels replaced by the null class, in [0, 1).
        num_train_timesteps (`int`): T, the number of noise levels.
        beta_start, beta_end, beta_schedule: the noise schedule, as in `DDIMScheduler`.
        timestep_spacing (`str`): of the saved scheduler. "trailing" starts sampling at t = T - 1, pure noise, and
            spends no step on t = 0, where nothing is left to remove (https://arxiv.org/abs/2305.08891).
        timestep_sampling (`str`): "stratified" spreads a batch's timesteps evenly over 0..T-1 (one random offset),
            which makes the gradient less noisy; "uniform" draws each on its own.
        prediction_type (`str`): what the denoiser predicts: "epsilon", the noise, or "v_prediction", the velocity
            √ᾱ ε - √(1 - ᾱ) x (https://arxiv.org/abs/2202.00512).
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
    num_layers: int = 4
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    block_out_channels: str = "64,128,256"
    layers_per_block: int = 1
    attention_levels: int = 1
    trainable: str = "all"
    class_dropout_prob: float = 0.1
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
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

    def __post_init__(self) -> None:
        """Refuses values that no training can use."""
        plain_fields(self)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.{nearest(value, allowed)}")
        for name in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "num_train_timesteps"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("train_steps", "batch_size", "layers_per_block"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "attention_levels"):
            _check_at_least(name, getattr(self, name), 0)
        if self.attention_levels > len(self.channels):
            raise ValueError(
                f"`attention_levels` must be at most {len(self.channels)}, the levels of "
                f"`block_out_channels={self.block_out_channels!r}`, got {self.attention_levels}."
            )
        for name in ("class_dropout_prob", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"`min_snr_gamma` must be positive or left out, got {self.min_snr_gamma}.")

    @property
    def channels(self) -> tuple[int, ...]:
        """`block_out_channels` as numbers."""
        try:
            channels = tuple(int(part) for part in self.block_out_channels.split(","))
        except ValueError:
            channels = ()
        if not channels or min(channels) < 1:
            raise ValueError(
                "`block_out_channels` must be whole numbers of at least 1 with commas between them, for example "
                f"'64,128', got {self.block_out_channels!r}."
            )
        return channels


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def build_transformer(
    config: GeneratorTrainingConfig, *, num_classes: int, sample_size: int, num_channels: int
) -> DiTTransformer2DModel:
    """A new DiT, initialised as its paper says: every block starts as the identity (adaLN-zero).

    The weights depend on `config.seed` only; the global random state is left as it is.
    """
    if sample_size % config.patch_size:
        raise ValueError(
            f"`patch_size={config.patch_size}` does not divide the sample size {sample_size}. Choose another patch "
            "size, or another `image_size` for the data."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=num_channels,
            out_channels=num_channels,
            num_layers=config.num_layers,
            sample_size=sample_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=num_classes,
            norm_type="ada_norm_zero",
            activation_fn=config.activation_fn,
        )
    zeroed = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in (*zeroed, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def check_unet_size(sample_size: int, levels: int) -> None:
    """Refuses a sample size that a UNet of so many levels cannot halve from each to the next."""
    if sample_size < 1 or sample_size % 2 ** (levels - 1):
        raise ValueError(
            f"A UNet of {levels} levels (as many as `block_out_channels`) halves its input {levels - 1} times; the "
            f"sample size {sample_size} cannot be. Choose fewer levels, or another `image_size` for the data."
        )


def build_unet(
    config: GeneratorTrainingConfig, *, num_classes: int, sample_size: int, num_channels: int
) -> UNet2DModel:
    """A new UNet with one class embedding more than there are classes: the last is the null class of guidance.

    Timestep and class scale and shift every norm, and every residual block starts as the identity, as in ADM
    (https://arxiv.org/abs/2105.05233). The weights depend on `config.seed` only; the global random state is left as it
    is.
    """
    channels, levels = config.channels, len(config.channels)
    check_unet_size(sample_size, levels)
    attends = [level >= levels - config.attention_levels for level in range(levels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=num_channels,
            out_channels=num_channels,
            block_out_channels=channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
            add_attention=config.attention_levels > 0,
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=math.gcd(8, *channels),
            resnet_time_scale_shift="scale_shift",
            time_embedding_dim=channels[-1],
            num_class_embeds=num_classes + 1,
        )
    zeroed: list[nn.Module] = [unet.conv_out]
    zeroed += [module.conv2 for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    zeroed += [module.to_out[0] for module in unet.modules() if isinstance(module, Attention)]
    for module in zeroed:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    return unet


def build_denoiser(
    config: GeneratorTrainingConfig, *, num_classes: int, sample_size: int, num_channels: int
) -> Denoiser:
    """A new denoiser of the configured architecture; see [`build_transformer`] and [`build_unet`]."""
    build = build_unet if config.architecture == "unet" else build_transformer
    return build(config, num_classes=num_classes, sample_size=sample_size, num_channels=num_channels)


def null_class(denoiser: Denoiser) -> int:
    """Index of the embedding that stands for "no class": the last of the table."""
    if isinstance(denoiser, UNet2DModel):
        return denoiser.config.num_class_embeds - 1
    return denoiser.config.num_embeds_ada_norm


def component_name(denoiser: Denoiser) -> str:
    """The name of a denoiser among the components of a pipeline."""
    return "unet" if isinstance(denoiser, UNet2DModel) else "transformer"


def build_scheduler(config: GeneratorTrainingConfig, *, latents: bool) -> DDIMScheduler:
    """The sampling scheduler that belongs to a generator trained with `config`.

    Predicted pixels are clipped to [-1, 1], where images are; latents have no such bounds.
    """
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        timestep_spacing=config.timestep_spacing,
        clip_sample=not latents,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type=config.prediction_type,
    )


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
    denoiser: nn.Module,
    scheduler: DDIMScheduler,
    clean: torch.Tensor,
    labels: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    *,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean of ||target - predicted||² / size; the target is the noise or the velocity, as the scheduler says.

    Sources: DDPM's simple loss (https://arxiv.org/abs/2006.11239), velocity (https://arxiv.org/abs/2202.00512).

    Args:
        denoiser (`nn.Module`): takes `(B, C, H, W)`; extra channels of its answer (learned sigma) are ignored.
        scheduler (`DDIMScheduler`): adds the noise; its `prediction_type` decides on the target.
        clean (`torch.Tensor` of shape `(B, C, H, W)`): images in [-1, 1] or scaled latents.
        labels (`torch.Tensor` of shape `(B,)`): classes, or the null class.
        timesteps (`torch.Tensor` of shape `(B,)`, int64): noise levels in [0, T).
        noise (`torch.Tensor` of shape `(B, C, H, W)`): standard normal.
        min_snr_gamma (`float`, *optional*): see [`GeneratorTrainingConfig`].
    """
    velocity = scheduler.config.prediction_type == "v_prediction"
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
    predicted = denoiser(noisy, timesteps, class_labels=labels).sample[:, : clean.shape[1]]
    losses = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if min_snr_gamma is not None:
        alphas = scheduler.alphas_cumprod.to(losses.device)[timesteps]
        losses = losses * min_snr_weights(alphas, min_snr_gamma, scheduler.config.prediction_type)
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
