"""Stable Diffusion 3 and 3.5: transformers of diffusers that flow from noise to images, conditioned on prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SD3Transformer2DModel
from transformers import PreTrainedTokenizerBase

from ..base import register_denoiser
from ..prompts import Prompts, TextConditioned, blank


@register_denoiser
class StableDiffusion3(TextConditioned):
    """A `SD3Transformer2DModel` (https://arxiv.org/abs/2403.03206), with the states of two CLIPs and T5 in one row."""

    name = "stable-diffusion-3"
    component = "transformer"
    kinds = (SD3Transformer2DModel,)
    hosts = ("StableDiffusion3Pipeline",)
    classes_field = "joint_attention_dim"
    encoders = (*["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"], "tokenizer_3", "text_encoder_3")
    flow = True
    own_spacing = True

    @property
    def side_factor(self) -> tuple[int, str]:
        """The patches."""
        size = self.network.config.patch_size
        return size, f"cuts it into patches of {size} (`patch_size`)"

    def needed(self, components: Mapping[str, Any]) -> tuple[str, ...]:
        """Both CLIPs; T5 may be left out, whose states are zeros then."""
        return self.encoders if components.get("text_encoder_3") is not None else self.encoders[:4]

    def ask(self, x: torch.Tensor, timesteps: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See [`TextConditioned.ask`]."""
        return cast(torch.Tensor, self.network(x, timestep=timesteps, **rows).sample)

    def host(self, components: Mapping[str, Any], name: str | None = None) -> DiffusionPipeline:
        """A pipeline without a scheduler."""
        parts = {name: components.get(name) for name in ("vae", *self.encoders)} | {self.component: self.network}
        return diffusers.StableDiffusion3Pipeline(**parts, scheduler=None)

    def longest(self, host: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase) -> int:
        """As many as the host cuts at: 256 for T5, and those of the first tokenizer for both CLIPs."""
        most = inspect.signature(host.encode_prompt).parameters["max_sequence_length"].default
        return int(most if tokenizer is host.tokenizer_3 else host.tokenizer_max_length)

    def encoded(self, host: DiffusionPipeline, text: str, negative: str | None) -> list[dict[str, torch.Tensor]]:
        """See [`TextConditioned.encoded`]."""
        found = host.encode_prompt(text, None, None, negative_prompt=negative)
        return [{"encoder_hidden_states": found[i][0], "pooled_projections": found[i + 2][0]} for i in (0, 1)]


def sd3_medium(classes: int) -> tuple[ModelMixin, Prompts]:
    """The network of Stable Diffusion 3 medium, with random weights, and a table of no prompts."""
    network = SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )
    return network, blank(classes, [333, 4096], pooled_projections=[2048])
