"""PixArt-α and PixArt-Σ: transformers of diffusers that are conditioned on prompts, as T5 encodes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, PixArtTransformer2DModel
from transformers import PreTrainedTokenizerBase

from ..base import register_denoiser
from ..prompts import Prompts, TextConditioned, blank


@register_denoiser
class PixArt(TextConditioned):
    """A `PixArtTransformer2DModel` (https://arxiv.org/abs/2310.00426); its learned variance is ignored.

    Those of 1024 pixels of α are also told the size, their own.
    """

    name = "pixart"
    component = "transformer"
    kinds = (PixArtTransformer2DModel,)
    hosts = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    classes_field = "caption_channels"
    encoders = ("tokenizer", "text_encoder")
    flow = False

    @property
    def side_factor(self) -> tuple[int, str]:
        """The patches."""
        size = self.network.config.patch_size
        return size, f"cuts it into patches of {size} (`patch_size`)"

    def check_conditioned(self) -> None:
        """Raises ValueError for a transformer without captions."""
        if self.network.config.caption_channels is None:
            raise ValueError(
                "The `transformer`, a PixArtTransformer2DModel, takes no captions (`caption_channels=None`): take one "
                "that was trained with prompts."
            )

    def ask(self, x: torch.Tensor, timesteps: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See [`TextConditioned.ask`]."""
        added = {name: rows.get(name) for name in ("resolution", "aspect_ratio")}
        told = {name: rows[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
        return cast(torch.Tensor, self.network(x, timestep=timesteps, added_cond_kwargs=added, **told).sample)

    def host(self, components: Mapping[str, Any], name: str | None = None) -> DiffusionPipeline:
        """α or Σ, whose components are of the same classes; α, if it is not said."""
        parts = {name: components.get(name) for name in ("vae", *self.encoders)} | {self.component: self.network}
        return getattr(diffusers, name or self.hosts[0])(**parts, scheduler=None)

    def longest(self, host: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase) -> int:
        """As many as the host cuts at: 120 for α, 300 for Σ."""
        return int(inspect.signature(host.encode_prompt).parameters["max_sequence_length"].default)

    def encoded(self, host: DiffusionPipeline, text: str, negative: str | None) -> list[dict[str, torch.Tensor]]:
        """See [`TextConditioned.encoded`]."""
        found = host.encode_prompt(text, negative_prompt=negative or "")
        rows = [
            {"encoder_hidden_states": states[0], "encoder_attention_mask": mask[0].to(states)}
            for states, mask in (found[:2], found[2:])
        ]
        if self.network.use_additional_conditions:
            side = float(self.sample_shape[1] * host.vae_scale_factor)
            own = {"resolution": torch.tensor([side, side]), "aspect_ratio": torch.tensor([1.0])}
            rows = [row | {name: value.to(found[0]) for name, value in own.items()} for row in rows]
        return rows


def pixart_512(classes: int) -> tuple[ModelMixin, Prompts]:
    """The network of PixArt-α at 512 pixels, with random weights, and a table of no prompts."""
    network = PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
    return network, blank(classes, [120, 4096], encoder_attention_mask=[120])
