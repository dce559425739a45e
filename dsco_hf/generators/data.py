"""What a generator learns from: clean images or latents in memory, and the batch of every training step.

All randomness of step i comes from (seed, i): nothing has to be remembered to resume a training, and the number of
processes only changes how a batch is split.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from ..data.datasets import check_classes
from ..utils.origins import fingerprint
from ..utils.progress import Bar
from .denoisers import GeneratorTrainingConfig
from .latents import scale_of, scaled


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
    means, stds = [], []
    for part in Bar(pixels.split(batch_size), desc="Encoding images", unit="batch", disable=not progress):
        posterior = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
        means.append(scaled(vae, posterior.mean.float()).cpu())
        stds.append(posterior.std.float().cpu() * scale_of(vae))
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
        """A hash of all that is learned from: images or latents, their deviations, mirrored copies and labels."""
        return fingerprint(self.clean, self.labels, self.std, self.mirrored)[:16]


def check_training_inputs(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    config: GeneratorTrainingConfig,
    num_processes: int,
) -> None:
    """Raises ValueError for images `(N, C, H, H)`, labels `(N,)` or a batch size that no training can use."""
    if pixels.ndim != 4 or pixels.shape[-1] != pixels.shape[-2]:
        raise ValueError(
            f"Expected square images of shape (N, C, H, H), got {tuple(pixels.shape)}. `load_pixels(image_size=...)` "
            "crops them."
        )
    if labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"Got {len(pixels)} images but labels of shape {tuple(labels.shape)}; one per image is needed."
        )
    if len(labels) == 0:
        raise ValueError("There are no images to train on.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels must be in 0..{num_classes - 1} (`num_classes={num_classes}`), got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    check_classes(labels, [str(label) for label in range(num_classes)])
    bad = torch.nonzero(~torch.isfinite(pixels).flatten(1).all(dim=1)).flatten()
    if len(bad):
        raise ValueError(f"The pixels of image {int(bad[0])} are not finite ({len(bad)} such images).")
    if config.batch_size % num_processes:
        raise ValueError(
            f"`batch_size={config.batch_size}` cannot be split evenly over {num_processes} processes. "
            "It is the size over all processes; choose a multiple of their number."
        )


def prepare_data(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    config: GeneratorTrainingConfig,
    vae: AutoencoderKL | None,
    *,
    progress: bool,
) -> TrainingData:
    """What is trained on, of pixels `(N, C, H, H)` in [-1, 1] and labels `(N,)`: latents, with an autoencoder."""
    pixels, labels = pixels.detach().cpu().float(), labels.detach().cpu()
    if vae is None:
        return TrainingData(pixels, labels)
    vae.eval()
    mean, std = encode_latents(pixels, vae, progress=progress)
    mirrored = None
    if config.horizontal_flip:  # the latents of a mirrored image are not the mirrored latents
        mirrored_mean, mirrored_std = encode_latents(pixels.flip(-1), vae, progress=progress)
        mirrored = TrainingData(mirrored_mean, labels, mirrored_std)
    return TrainingData(mean, labels, std, mirrored)


@dataclass
class Batch:
    """What the loss of one step needs, on the device."""

    clean: torch.Tensor
    labels: torch.Tensor
    timesteps: torch.Tensor  # in 0..T-1, those of a flow in 1..T
    noise: torch.Tensor


def draw_batch(
    data: TrainingData,
    step: int,
    config: GeneratorTrainingConfig,
    null_class: int | None,
    accelerator: Accelerator,
    *,
    distributed: bool = True,
    conditions: Callable[[Sequence[int], Iterable[int]], Sequence[int]] | None = None,
) -> Batch:
    """This process's part of the batch of a step.

    Every process draws the randomness of the whole batch and takes its own rows of it; all rows if not `distributed`.
    `conditions` of a [`Denoiser`] say what stands for each label, given a seed for each.
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
    timesteps = timesteps[torch.randperm(size, generator=host)] + (config.prediction_type == "flow")
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
    labels = data.labels[rows]
    if conditions is not None:
        seeds = torch.randint(2**31, (size,), generator=_generator("cpu", config.seed, "conditions", step))
        labels = torch.tensor(conditions(labels.tolist(), seeds.tolist()))
    labels = (labels if null_class is None else torch.where(dropped, null_class, labels))[mine]
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
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A seed for one purpose; hashing its key keeps the streams of neighbouring seeds and steps apart."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
