"""Class-conditional UNets of diffusers, whose convolutions learn small natural images from fewer of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diffusers import ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..base import ArchitectureOptions, Denoiser, check_side, register_denoiser


@dataclass(frozen=True)
class UNetOptions(ArchitectureOptions):
    """What a UNet is built with.

    Attributes:
        block_out_channels (`str`): channels of the levels, finest first, as in "64,128,256". Each level halves the
            sample size of the one before.
        layers_per_block (`int`): residual blocks per level on the way down, one more on the way up.
        attention_levels (`int`): how many of the coarsest levels have self-attention.
        attention_head_dim (`int`): channels per head.
    """

    block_out_channels: str = "64,128,256"
    layers_per_block: int = 1
    attention_levels: int = 1
    attention_head_dim: int = 32

    field_limits = {"layers_per_block": 1, "attention_head_dim": 1, "attention_levels": 0}

    def __post_init__(self) -> None:
        """Refuses values that no UNet can have."""
        super().__post_init__()
        if self.attention_levels > len(self.channels):
            raise ValueError(
                f"`attention_levels` must be at most {len(self.channels)}, the levels of "
                f"`block_out_channels={self.block_out_channels!r}`, got {self.attention_levels}."
            )

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


@register_denoiser
class UNet(Denoiser):
    """A `UNet2DModel`: with one more of its `num_class_embeds` than there are names, the last is the null class."""

    name = "unet"
    component = "unet"
    kinds = (UNet2DModel,)
    classes_field = "num_class_embeds"
    counts_null = True
    any_size = True
    channels_last = True  # on a CPU, group norms of this layout in bf16 cost more than the convolutions gain

    @property
    def side_factor(self) -> tuple[int, str]:
        """The halvings."""
        return halvings(len(self.network.config.down_block_types))

    @classmethod
    def build(cls, config: UNetOptions, *, num_classes: int, sample_size: int, num_channels: int) -> ModelMixin:
        """A new UNet with one class embedding more than there are classes: the last is the null class of guidance.

        Timestep and class scale and shift every norm, and every residual block starts as the identity, as in ADM
        (https://arxiv.org/abs/2105.05233).
        """
        channels, levels = config.channels, len(config.channels)
        remedy = " Choose fewer levels, or another `image_size` for the data."
        check_side("UNet", sample_size, *halvings(levels), remedy=remedy)
        attends = [level >= levels - config.attention_levels for level in range(levels)]
        network = UNet2DModel(
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
        zero_residuals(network)
        return network

    def class_tables(self) -> Iterator[tuple[str, nn.Embedding]]:
        """There is one."""
        yield "class_embedding", self.network.class_embedding


def zero_residuals(network: nn.Module) -> None:
    """Makes every residual block of a new UNet begin as the identity, and its answer as zero."""
    zeroed = [network.get_submodule("conv_out")]
    zeroed += [module.conv2 for module in network.modules() if isinstance(module, ResnetBlock2D)]
    zeroed += [module.to_out[0] for module in network.modules() if isinstance(module, Attention)]
    for module in zeroed:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def halvings(levels: int) -> tuple[int, str]:
    """What a UNet's side must be a multiple of, and why."""
    return 2 ** (levels - 1), f"halves it at each of its {levels} levels but the last"
