"""What a generator is made of and learns from: the DiT, its scheduler, its loss, and the batch of every training step.

All randomness of step i comes from (seed, i): nothing has to be remembered to resume a training, and the number of
processes only changes how a batch is split.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from torch import nn
from tqdm.auto import tqdm

from .schema import nearest


_CHOICES = {
    "lr_schedule": ("cosine", "constant"),
    "timestep_sampling": ("stratified", "uniform"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("trailing", "leading", "linspace"),
}


@dataclass(frozen=True)
class GeneratorTrainingConfig:
    """How a generator is built and trained. The defaults fit the 8x8 digits in a few minutes on two CPU cores.

    Attributes:
        num_layers (`int`): transformer blocks.
        num_attention_heads (`int`): heads per block.
        attention_head_dim (`int`): channels per head; the width of the model is heads times this.
        patch_size (`int`): pixels (or latents) per token side; must divide the sample size.
        class_dropout_prob (`float`): share of labels replaced by the null class, in [0, 1).
        num_train_timesteps (`int`): T, the number of noise levels.
        beta_start, beta_end, beta_schedule: the noise schedule, as in `DDIMScheduler`.
        timestep_spacing (`str`): of the saved scheduler. "trailing" starts sampling at t = T - 1, pure noise, and
            spends no step on t = 0, where nothing is left to remove (https://arxiv.org/abs/2305.08891).
        timestep_sampling (`str`): "stratified" spreads a batch's timesteps evenly over 0..T-1 (one random offset),
            which makes the gradient less noisy; "uniform" draws each on its own.
        min_snr_gamma (`float`, *optional*): weigh the loss by min(SNR, gamma) / SNR (https://arxiv.org/abs/2303.09556).
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

    num_layers: int = 4
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    patch_size: int = 2
    class_dropout_prob: float = 0.1
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    timestep_spacing: str = "trailing"
    timestep_sampling: str = "stratified"
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
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.{nearest(value, allowed)}")
        for name in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "num_train_timesteps"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("train_steps", "batch_size"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("warmup_steps", self.warmup_steps, 0)
        for name in ("class_dropout_prob", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


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
        )
    zeroed = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in (*zeroed, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


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
        prediction_type="epsilon",
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


def noise_prediction_loss(
    transformer: nn.Module,
    scheduler: DDIMScheduler,
    clean: torch.Tensor,
    labels: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    *,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean of ||noise - predicted noise||² / size; DDPM's simple loss (https://arxiv.org/abs/2006.11239).

    Args:
        transformer (`nn.Module`): predicts noise from `(B, C, H, W)`; extra channels (learned sigma) are ignored.
        scheduler (`DDIMScheduler`): adds the noise.
        clean (`torch.Tensor` of shape `(B, C, H, W)`): images in [-1, 1] or scaled latents.
        labels (`torch.Tensor` of shape `(B,)`): classes, or the null class.
        timesteps (`torch.Tensor` of shape `(B,)`, int64): noise levels in [0, T).
        noise (`torch.Tensor` of shape `(B, C, H, W)`): standard normal.
        min_snr_gamma (`float`, *optional*): see [`GeneratorTrainingConfig`].
    """
    noisy = scheduler.add_noise(clean, noise, timesteps)
    predicted = transformer(noisy, timestep=timesteps, class_labels=labels).sample[:, : clean.shape[1]]
    losses = F.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if min_snr_gamma is not None:
        alphas = scheduler.alphas_cumprod.to(losses.device)[timesteps]
        snr = alphas / (1 - alphas)
        losses = losses * snr.clamp(max=min_snr_gamma) / snr
    return losses.mean()


@torch.no_grad()
def encode_latents(
    pixels: torch.Tensor, vae: AutoencoderKL, *, batch_size: int = 32, progress: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the scaled latents of images, on the CPU.

    Args:
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`, range [-1, 1]): the images.
        vae (`AutoencoderKL`): on the device to use; frozen.
        batch_size (`int`): images encoded at once.
        progress (`bool`): show a progress bar.

    Returns:
        `tuple`: two tensors of shape `(N, latent channels, H / f, W / f)`.
    """
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    means, stds = [], []
    for part in tqdm(pixels.split(batch_size), desc="Encoding images", unit="batch", disable=not progress):
        posterior = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
        means.append(((posterior.mean.float() - shift) * scale).cpu())
        stds.append((posterior.std.float() * scale).cpu())
    return torch.cat(means), torch.cat(stds)


@dataclass
class TrainingData:
    """The samples in memory: clean images, or latent means with their deviations; mirrored copies for latents."""

    clean: torch.Tensor  # (N, C, H, W)
    labels: torch.Tensor  # (N,)
    std: torch.Tensor | None = None
    mirrored: TrainingData | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of shapes, labels and up to 256 images."""
        digest = hashlib.sha256(repr(tuple(self.clean.shape)).encode())
        digest.update(self.labels.numpy().tobytes())
        digest.update(self.clean[:: max(1, len(self.clean) // 256)].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass
class Batch:
    """What the loss of one step needs, on the device."""

    clean: torch.Tensor
    labels: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor


def draw_batch(
    data: TrainingData,
    step: int,
    config: GeneratorTrainingConfig,
    null_class: int,
    accelerator: Accelerator,
    *,
    distributed: bool = True,
) -> Batch:
    """This process's part of the batch of a step.

    Every process draws the randomness of the whole batch and takes its own rows of it; all rows if not `distributed`.
    """
    size, device = config.batch_size, accelerator.device
    rows = _rows_of_step(step, len(data.labels), config)
    host = _generator("cpu", config.seed, "levels", step)
    local = _generator(device, config.seed, "noise", step)
    if config.timestep_sampling == "stratified":
        levels = (torch.arange(size) + torch.rand(size, generator=host)) / size
    else:
        levels = torch.rand(size, generator=host)
    timesteps = (levels * config.num_train_timesteps).long().clamp(max=config.num_train_timesteps - 1)
    timesteps = timesteps[torch.randperm(size, generator=host)]
    dropped = torch.rand(size, generator=host) < config.class_dropout_prob
    flipped = torch.rand(size, generator=host) < (0.5 if config.horizontal_flip else 0.0)
    mine = slice(accelerator.process_index, None, accelerator.num_processes) if distributed else slice(None)
    shape = (size, *data.clean.shape[1:])
    noise = torch.randn(shape, generator=local, device=device)[mine]
    clean = _select(data, rows[mine], flipped[mine]).to(device)
    if data.std is not None:
        source = data.mirrored if data.mirrored is not None else data
        other = data.std if source.std is None else source.std
        std = torch.where(flipped[mine, None, None, None], other[rows[mine]], data.std[rows[mine]])
        clean = clean + std.to(device) * torch.randn(shape, generator=local, device=device)[mine]
    labels = torch.where(dropped, null_class, data.labels[rows])[mine]
    return Batch(clean, labels.to(device), timesteps[mine].to(device), noise)


def _select(data: TrainingData, rows: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    clean = data.clean[rows]
    if not flipped.any():
        return clean
    mirrored = data.mirrored.clean[rows] if data.mirrored is not None else clean.flip(-1)
    return torch.where(flipped[:, None, None, None], mirrored, clean)


def _rows_of_step(step: int, rows: int, config: GeneratorTrainingConfig) -> torch.Tensor:
    """Rows of a step's batch: consecutive places in an endless sequence of shuffled epochs."""
    places = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = torch.div(places, rows, rounding_mode="floor")
    chosen = torch.empty_like(places)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        chosen[inside] = _order_of_epoch(config.seed, epoch, rows)[places[inside] % rows]
    return chosen


@functools.lru_cache(maxsize=2)
def _order_of_epoch(seed: int, epoch: int, rows: int) -> torch.Tensor:
    return torch.randperm(rows, generator=_generator("cpu", seed, "order", epoch))


def _generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator for one purpose; hashing its key keeps the streams of neighbouring seeds and steps apart."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
