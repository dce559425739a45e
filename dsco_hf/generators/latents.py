"""Between latents, as a denoiser sees them, and pixels: the conventions of diffusers' VAE configs, and image types.

Every VAE says itself how its latents are scaled: an `AutoencoderKL` by `scaling_factor` (0.18215 for Stable
Diffusion's), `shift_factor` or `latents_mean` and `latents_std`; an `AutoencoderTiny` was trained on scaled latents,
its factor is 1. And the generators of the noise that latents begin as.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from ..data.images import images_from_unit
from ..data.schema import image_seed


if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

Vae: TypeAlias = "AutoencoderKL | AutoencoderTiny"
Scale: TypeAlias = torch.Tensor | float
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
Output: TypeAlias = torch.Tensor | np.ndarray | list[PIL.Image.Image]


def conventions(vae: Vae) -> tuple[float, Scale, Scale]:
    """(factor, shift, std) of a VAE: the denoiser's latents are (z - shift) * factor / std of the VAE's own z.

    Shift and std are numbers, or per-channel tensors `(C, 1, 1)`.
    """
    config = vae.config
    factor = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift, std = (torch.tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return factor, shift, std
    return factor, config.get("shift_factor") or 0.0, 1.0


def decode(vae: Vae, latents: torch.Tensor) -> torch.Tensor:
    """The denoiser's latents `(B, C, h, w)` → pixels `(B, 3, H, W)` in about [-1, 1]; gradients reach the latents.

    Slices and tiles, if the VAE was told so (`vae.enable_slicing()`, `vae.enable_tiling()`).
    """
    factor, shift, std = conventions(vae)
    z = latents / factor
    if isinstance(std, torch.Tensor) and isinstance(shift, torch.Tensor):
        z = z * std.to(z) + shift.to(z)
    elif shift:
        z = z + shift
    return vae.decode(z.to(vae.dtype)).sample


def encode(
    vae: Vae, pixels: torch.Tensor, *, generator: torch.Generator | None = None, sample_posterior: bool = True
) -> torch.Tensor:
    """Pixels `(B, 3, H, W)` in [-1, 1] → latents as the denoiser sees them, in float32 or better.

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): the encoder.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): on its device.
        generator (`torch.Generator`, *optional*): of the draw from the posterior.
        sample_posterior (`bool`): draw from the posterior, or take its mode. An `AutoencoderTiny` has none to draw
            from.
    """
    encoded = vae.encode(pixels.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        z = encoded.latent_dist.sample(generator) if sample_posterior else encoded.latent_dist.mode()
    else:
        z = encoded.latents
    return scaled(vae, z.to(torch.promote_types(z.dtype, torch.float32)))


def scaled(vae: Vae, z: torch.Tensor) -> torch.Tensor:
    """The VAE's own z `(B, C, h, w)` → latents as the denoiser sees them; the inverse of what `decode` begins with."""
    factor, shift, std = conventions(vae)
    if isinstance(std, torch.Tensor) and isinstance(shift, torch.Tensor):
        return (z - shift.to(z)) * factor / std.to(z)
    return (z - shift if shift else z) * factor


def scale_of(vae: Vae) -> Scale:
    """What a deviation of z is multiplied with: a number, or one per channel `(C, 1, 1)`."""
    factor, _, std = conventions(vae)
    return factor / std


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Square images `(B, C, H, W)` at another size, in float32, as real images are resized: bicubic, antialiased."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)


def to_output(images: torch.Tensor, output_type: str) -> Output:
    """Images `(B, C, H, W)` in [0, 1] as "pil", "np" or "pt"; "latent" is left as it is."""
    if output_type in ("pt", "latent"):
        return images
    arrays = images.cpu().permute(0, 2, 3, 1).numpy()
    return arrays if output_type == "np" else images_from_unit(arrays)


def seeds_of(generator: Generators, images: int) -> list[int]:
    """The seed of each image's own generator, or numbers that follow from the seed of the one of all."""
    if isinstance(generator, Sequence):
        return [one.initial_seed() for one in generator]
    seed = 0 if generator is None else generator.initial_seed()
    return [image_seed(seed, 0, number, "one generator") for number in range(images)]


def with_candidates(generator: Generators, candidates: int) -> Generators:
    """One generator per image as one for each of its candidates: the first draws what the image alone would draw."""
    if candidates == 1 or not isinstance(generator, Sequence):
        return generator
    further = [
        torch.Generator(one.device).manual_seed(image_seed(one.initial_seed(), 0, number, "candidate"))
        for number in range(1, candidates)
        for one in generator
    ]
    return [*generator, *further]
