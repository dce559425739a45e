"""DiT: the class-conditional transformers of diffusers (Peebles and Xie, https://arxiv.org/abs/2212.09748)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from ...utils.values import check_choice
from ..base import ArchitectureOptions, Denoiser, check_side, register_denoiser


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


@torch.no_grad()
def dit_of_sit(state: Mapping[str, torch.Tensor], *, num_attention_heads: int = 16) -> DiTTransformer2DModel:
    """The network of a SiT (Ma et al., https://arxiv.org/abs/2401.08740) as diffusers has it, in eval mode.

    A SiT is a DiT that is told 1 - σ and predicts x - ε. Here it is told σ T, T = 1000, and predicts ε - x, as
    `FlowMatchEulerDiscreteScheduler()` takes it: the last layer changes its sign, and the first layer of the time the
    basis that it is told the time in, which is exact but for rounding.

    Args:
        state (`Mapping[str, torch.Tensor]`): of the authors' network, as `torch.load(path, weights_only=True)` reads
            the published ones.
        num_attention_heads (`int`): its heads; 16 of SiT-XL and SiT-L, 12 of SiT-B, 6 of SiT-S.

    Raises:
        ValueError: for the weights of another network.
    """
    if missing := sorted({"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "pos_embed"} - set(state)):
        raise ValueError(
            f"These are not the weights of a SiT, as they lack {missing[0]!r}: pass the state of the network itself, "
            "for example `state['ema']` of a whole checkpoint."
        )
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    table = state["y_embedder.embedding_table.weight"]
    network = DiTTransformer2DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=width // num_attention_heads,
        in_channels=channels,
        out_channels=len(state["final_layer.linear.bias"]) // patch**2,
        num_layers=sum(key.endswith("attn.qkv.weight") for key in state),
        sample_size=math.isqrt(state["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        num_embeds_ada_norm=len(table) - 1,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    change, constant = _basis_of_time()
    first = state["t_embedder.mlp.0.weight"].double()
    state = dict(state) | {
        "t_embedder.mlp.0.weight": first @ change,
        "t_embedder.mlp.0.bias": state["t_embedder.mlp.0.bias"].double() + first @ constant,
        "final_layer.linear.weight": -state["final_layer.linear.weight"],
        "final_layer.linear.bias": -state["final_layer.linear.bias"],
    }
    network.pos_embed.pos_embed.copy_(state["pos_embed"])
    for name, parameter in network.named_parameters():
        parameter.copy_(_of_sit(name, state))
    return network.eval()


# Names of a DiT in diffusers, and of the same layer in the authors' code; all blocks share the embeddings there.
_SIT_NAMES = {
    r"pos_embed\.proj": "x_embedder.proj",
    r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.embedding_table": "y_embedder.embedding_table",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"blocks.\1.adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.attn.proj",
    r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]": r"blocks.\1.attn.qkv",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"blocks.\1.mlp.fc2",
    r"proj_out_1": "final_layer.adaLN_modulation.1",
    r"proj_out_2": "final_layer.linear",
}


def _of_sit(name: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    layer, _, kind = name.rpartition(".")
    pattern = next(pattern for pattern in _SIT_NAMES if re.fullmatch(pattern, layer))
    own = re.sub(f"^{pattern}$", _SIT_NAMES[pattern], layer)
    found = state[f"{own}.{kind}"]
    return found.chunk(3)["qkv".index(layer[-1])] if own.endswith("qkv") else found


def _basis_of_time() -> tuple[torch.Tensor, torch.Tensor]:
    """M and m with SiT's features of 1 - σ = M · diffusers' of 1000 σ + m for σ in [0, 1], by least squares."""
    sigma = torch.linspace(0, 1, 4001, dtype=torch.float64)

    def features(time: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        angles = time[:, None] * torch.exp(-math.log(10000) * frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    steps = torch.arange(128, dtype=torch.float64)
    told = torch.cat([features(1000 * sigma, steps / 127), torch.ones(len(sigma), 1, dtype=torch.float64)], dim=1)
    wanted = features(1 - sigma, steps / 128)
    found = torch.linalg.lstsq(told, wanted, rcond=1e-8, driver="gelsd").solution
    return found[:-1].T, found[-1]
