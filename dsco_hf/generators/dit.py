"""DiT: the class-conditional transformers of diffusers (Peebles and Xie, https://arxiv.org/abs/2212.09748)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from ..utils.values import check_choice
from .base import ArchitectureOptions, Denoiser, check_side, register_denoiser


_ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")


@dataclass(frozen=True)
class DiTOptions(ArchitectureOptions):
    """What a DiT is built with.

    Attributes:
        num_layers (`int`): transformer blocks.
        num_attention_heads (`int`): heads per block.
        attention_head_dim (`int`): channels per head; the width of a DiT is heads times this.
        patch_size (`int`): pixels (or latents) per token side; must divide the sample size.
        activation_fn (`str`): of the feed-forward layers, see `diffusers.models.attention.FeedForward`; "linear-silu"
            is cheaper on a CPU than the usual "gelu-approximate".
    """

    num_layers: int = 4
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"

    field_limits = dict.fromkeys(("num_layers", "num_attention_heads", "attention_head_dim", "patch_size"), 1)

    def __post_init__(self) -> None:
        """Refuses values that no DiT can have."""
        super().__post_init__()
        check_choice("activation_fn", self.activation_fn, _ACTIVATIONS)


@register_denoiser
class DiT(Denoiser):
    """A `DiTTransformer2DModel`: it always has an embedding of the null class, which its config does not count."""

    name = "dit"
    component = "transformer"
    kinds = (DiTTransformer2DModel,)
    classes_field = "num_embeds_ada_norm"
    former_names = ("Transformer2DModel",)  # facebook/DiT-XL-2-256 was saved when it was called so

    @property
    def side_factor(self) -> tuple[int, str]:
        """The patches."""
        return _patches(self.network.config.patch_size)

    @classmethod
    def build(cls, config: DiTOptions, *, num_classes: int, sample_size: int, num_channels: int) -> ModelMixin:
        """A new DiT, initialised as its paper says: every block starts as the identity (adaLN-zero)."""
        remedy = " Choose another patch size, or another `image_size` for the data."
        check_side("DiT", sample_size, *_patches(config.patch_size), remedy=remedy)
        network = DiTTransformer2DModel(
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
        zeroed = [block.norm1.linear for block in network.transformer_blocks]
        for linear in (*zeroed, network.proj_out_1, network.proj_out_2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        return network

    def begin_training(self) -> None:
        """In train mode every block would drop labels on its own, so that hardly ever the whole is unconditional."""
        super().begin_training()
        for module in self.network.modules():
            if isinstance(module, LabelEmbedding):
                module.eval()

    def class_tables(self) -> Iterator[tuple[str, nn.Embedding]]:
        """Every block has a table of its own."""
        for name, module in self.network.named_modules():
            if isinstance(module, LabelEmbedding):
                yield f"{name}.embedding_table", module.embedding_table


def _patches(size: int) -> tuple[int, str]:
    return size, f"cuts it into patches of {size} (`patch_size`)"


def dit_xl_2(*, tiny: bool = False) -> ModelMixin:
    """The network of facebook/DiT-XL-2-256, with random weights; `tiny` has its kind at a size that tests can run."""
    size = {"sample_size": 32, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
    if tiny:
        size = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    return DiTTransformer2DModel(
        in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=4 if tiny else 1000,
        norm_elementwise_affine=False, activation_fn="gelu-approximate", **size,
    )  # fmt: skip
