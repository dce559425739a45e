"""Fits a trained denoiser to the user's own classes, and chooses which of its weights are trained further."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from ..utils.values import plain_arguments
from .denoisers import Denoiser, GeneratorTrainingConfig, check_unet_size, null_class


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@plain_arguments()
def adapt_denoiser(
    denoiser: Denoiser,
    num_classes: int,
    *,
    mapping: Mapping[int, int | Sequence[int]] | None = None,
    sample_size: int | None = None,
) -> Denoiser:
    """A copy of a denoiser with embeddings of other classes, and for another size; all other weights are its own.

    The embedding of the null class stays the last one. A DiT of diffusers holds a table of classes in every block, and
    all of them are replaced.

    Args:
        denoiser (`DiTTransformer2DModel` or `UNet2DModel`): trained with a null class.
        num_classes (`int`): number of the new classes.
        mapping (`dict`, *optional*): new class to old class, or to several old ones whose mean is taken. Classes that
            are not named start from the mean of all old classes.
        sample_size (`int`, *optional*): height and width of the samples, in pixels or latents; its own if None. Only a
            UNet knows no positions, so that its weights serve any size.

    Raises:
        ValueError: for a class of `mapping` that does not exist, or a size that the denoiser cannot take.
    """
    mapping, old_classes = dict(mapping or {}), null_class(denoiser)
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    for new, old in mapping.items():
        olds = [old] if isinstance(old, int) else list(old)
        if new not in range(num_classes) or not olds or not set(olds) <= set(range(old_classes)):
            raise ValueError(
                f"`mapping` has {new}: {old}; new classes are 0 to {num_classes - 1}, from at least one old class "
                f"of 0 to {old_classes - 1}."
            )
    size = {"num_class_embeds": num_classes + 1}
    if hasattr(denoiser.config, "num_embeds_ada_norm"):
        size = {"num_embeds_ada_norm": num_classes}
    if sample_size is not None and sample_size != denoiser.config.sample_size:
        check_sample_size(denoiser, sample_size)
        size["sample_size"] = sample_size
    adapted = type(denoiser).from_config(denoiser.config, **size).to(denoiser.device, denoiser.dtype)
    tables = {name: module.weight.detach() for name, module in class_tables(denoiser)}
    state = {
        name: value for name, value in denoiser.state_dict().items() if name.removesuffix(".weight") not in tables
    }
    for name, table in tables.items():
        known = table[:old_classes]
        rows = [
            known[[old] if isinstance(old, int) else list(old)].mean(dim=0)
            for old in (mapping.get(new, range(old_classes)) for new in range(num_classes))
        ]
        state[f"{name}.weight"] = torch.stack([*rows, table[old_classes]])
    adapted.load_state_dict(state)
    return adapted


def check_sample_size(denoiser: Denoiser, sample_size: int) -> None:
    """Refuses a size that a trained denoiser cannot be brought to."""
    if not isinstance(denoiser, UNet2DModel):
        raise ValueError(
            f"A {type(denoiser).__name__} trained at size {denoiser.config.sample_size} has positions of that size "
            f"and cannot be trained at {sample_size}. Leave `image_size` out, or start from a UNet."
        )
    check_unet_size(sample_size, len(denoiser.config.block_out_channels))


def class_tables(denoiser: Denoiser) -> Iterator[tuple[str, nn.Embedding]]:
    """Names and modules of a denoiser's tables of class embeddings."""
    for name, module in denoiser.named_modules():
        if isinstance(module, LabelEmbedding):
            yield f"{name}.embedding_table", module.embedding_table
        elif name == "class_embedding":
            yield name, module


def set_trainable(denoiser: Denoiser, trainable: str) -> list[str]:
    """Freezes the weights that are not to be trained, and names the others.

    Args:
        denoiser (`DiTTransformer2DModel` or `UNet2DModel`): changed in place.
        trainable (`str`): "all" weights, or "bias_and_norm": every bias, every norm, and the tables of classes.

    Returns:
        `list[str]`: names of the parameters that are trained.
    """
    chosen = {f"{name}.weight" for name, _ in class_tables(denoiser)}
    for name, module in denoiser.named_modules():
        chosen |= {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False) if isinstance(module, _NORMS)}
    for name, parameter in denoiser.named_parameters():
        # a positional table and other buffers are no parameters and never train
        parameter.requires_grad_(trainable == "all" or name in chosen or name.rpartition(".")[2] == "bias")
    return [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]


def with_schedule_of(config: GeneratorTrainingConfig, scheduler: DDIMScheduler) -> GeneratorTrainingConfig:
    """`config` with the noise schedule and the kind of prediction that a trained generator was trained with.

    Raises:
        ValueError: if the scheduler has betas of its own, or predicts something else than noise or velocity.
    """
    if scheduler.config.get("trained_betas") is not None:
        raise ValueError("A scheduler with `trained_betas` cannot be fine-tuned with: its schedule has no name.")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing", "prediction_type")
    return dataclasses.replace(config, **{name: scheduler.config[name] for name in names})
