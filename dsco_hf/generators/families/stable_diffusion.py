"""Stable Diffusion 1.x, 2.x and XL, and small ones of one's own: UNets of diffusers, conditioned on prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..base import check_side, register_denoiser
from ..prompts import Encoders, Prompts, TextConditioned, blank
from .unet import UNetOptions, halvings, zero_residuals


WIDTH = 64  # of the text encoder of a new network


@register_denoiser
class StableDiffusion(TextConditioned):
    """A `UNet2DConditionModel`, of Stable Diffusion 1.x and 2.x (https://arxiv.org/abs/2112.10752) or of SDXL.

    SDXL (https://arxiv.org/abs/2307.01952) is also told a pooled embedding, and the size: uncropped, its own.
    """

    name = "stable-diffusion"
    component = "unet"
    kinds = (UNet2DConditionModel,)
    hosts = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    classes_field = "cross_attention_dim"
    encoders = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    any_size = True
    flow = False

    @property
    def is_xl(self) -> bool:
        """Whether it is SDXL's."""
        return self.network.config.addition_embed_type == "text_time"

    @property
    def overflows(self) -> bool:
        """SDXL's does, by its own pipeline; that of 1.x and 2.x says so as well, but is right."""
        return self.is_xl

    def needed(self, components: Mapping[str, Any]) -> tuple[str, ...]:
        """SDXL's are two of each."""
        return self.encoders if self.is_xl else self.encoders[:2]

    @property
    def side_factor(self) -> tuple[int, str]:
        """The halvings."""
        return halvings(len(self.network.config.down_block_types))

    @classmethod
    def build(cls, config: UNetOptions, *, num_classes: int, sample_size: int, num_channels: int) -> ModelMixin:
        """A new UNet, the class-conditional one with a prompt in the place of the class.

        The layout is that of DeepFloyd IF, after Imagen (https://arxiv.org/abs/2205.11487): the prompt's states,
        pooled by attention, are added to the timestep, and cross-attention looks at them in the middle and at the
        coarsest `attention_levels`.
        """
        channels, levels = config.channels, len(config.channels)
        remedy = " Choose fewer levels, or another `image_size` for the data."
        check_side("UNet", sample_size, *halvings(levels), remedy=remedy)
        attending = channels[-max(1, config.attention_levels) :]
        if wrong := [width for width in attending if width % config.attention_head_dim]:
            raise ValueError(
                f"`attention_head_dim={config.attention_head_dim}` must divide the channels of the levels that attend "
                f"to the prompt, got {wrong[0]}: choose {math.gcd(config.attention_head_dim, *wrong)}."
            )
        attends = [level >= levels - config.attention_levels for level in range(levels)]
        network = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=num_channels,
            out_channels=num_channels,
            block_out_channels=channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("SimpleCrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=tuple("SimpleCrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=math.gcd(8, *channels),
            resnet_time_scale_shift="scale_shift",
            time_embedding_dim=channels[-1],
            cross_attention_dim=WIDTH,
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
        )
        zero_residuals(network)
        return network

    @classmethod
    def build_encoders(cls, seed: int) -> Encoders:
        """A small CLIP of random weights, which says different things of different texts, and bytes as its tokens."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
        options = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = CLIPTextConfig(
            vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=WIDTH, **options,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval().requires_grad_(False)}

    def check_conditioned(self) -> None:
        """Raises ValueError for a UNet that needs more than noise and a prompt, or has guidance built in."""
        config = self.network.config
        needs = {
            "another image": config.in_channels != config.out_channels,
            "classes": config.class_embed_type is not None or config.num_class_embeds is not None,
            f"a condition of the kind {config.addition_embed_type!r}": config.addition_embed_type
            not in (None, "text", "text_time"),
            "the scale of a guidance that it was distilled with": config.time_cond_proj_dim is not None,
        }
        if wrong := [what for what, needed in needs.items() if needed]:
            raise ValueError(
                f"The `unet`, a {type(self.network).__name__}, takes {' and '.join(wrong)} beside noise and a prompt: "
                "take the text-to-image model that it was made of."
            )

    def ask(self, x: torch.Tensor, timesteps: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See [`TextConditioned.ask`]."""
        added = {name: row for name, row in rows.items() if name != "encoder_hidden_states"} or None
        answer = self.network(
            x, timesteps, encoder_hidden_states=rows["encoder_hidden_states"], added_cond_kwargs=added
        )
        return cast(torch.Tensor, answer.sample)

    def host(self, components: Mapping[str, Any], name: str | None = None) -> DiffusionPipeline:
        """A pipeline without a scheduler and a safety checker."""
        parts = {name: components.get(name) for name in ("vae", *self.needed(components))} | {
            self.component: self.network
        }
        if self.is_xl:
            return diffusers.StableDiffusionXLPipeline(**parts, scheduler=None)
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts, scheduler=None, **unchecked)

    def encoded(self, host: DiffusionPipeline, text: str, negative: str | None) -> list[dict[str, torch.Tensor]]:
        """See [`TextConditioned.encoded`]."""
        options = {"device": host._execution_device, "num_images_per_prompt": 1, "negative_prompt": negative}
        found = host.encode_prompt(text, do_classifier_free_guidance=True, **options)
        if not self.is_xl:
            return [{"encoder_hidden_states": row[0]} for row in found]
        side = self.sample_shape[1] * host.vae_scale_factor
        times = torch.tensor([side, side, 0, 0, side, side]).to(found[0])  # original size, corner, size
        names = ("encoder_hidden_states", "text_embeds", "time_ids")
        return [
            dict(zip(names, (*pair, times), strict=True)) for pair in ((found[i][0], found[i + 2][0]) for i in (0, 1))
        ]


def sd_1_5(classes: int) -> tuple[ModelMixin, Prompts]:
    """The network of Stable Diffusion 1.5, with random weights, and a table of no prompts."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768), blank(classes, [77, 768])


def sdxl(classes: int) -> tuple[ModelMixin, Prompts]:
    """The network of SDXL, with random weights, and a table of no prompts."""
    network = UNet2DConditionModel(
        sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return network, blank(classes, [77, 2048], text_embeds=[1280], time_ids=[6])
