"""A pipeline of the size that users run, with random weights: for counting and measuring cost, not for images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTTransformer2DModel
from transformers import ResNetConfig, ResNetForImageClassification

from .pipeline import DsCoPipeline


def imagenet_pipeline(
    *,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
    preview: bool = True,
    tiny: bool = False,
    seed: int = 0,
) -> DsCoPipeline:
    """The shapes of facebook/DiT-XL-2-256, its AutoencoderKL, an AutoencoderTiny and microsoft/resnet-18 at 224 px.

    Args:
        device (`str` or `torch.device`): "meta" has shapes only, and needs no memory.
        dtype (`torch.dtype`): of all weights.
        preview (`bool`): whether there is a preview decoder.
        tiny (`bool`): the same classes at a size that tests can run.
        seed (`int`): of the weights; the global random state is left as it is.
    """
    size = {"sample_size": 32, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
    channels, widths, depths, classes, image_size = [128, 256, 512, 512], [64, 128, 256, 512], [2] * 4, 1000, 224
    preview_options: dict[str, Any] = {}
    if tiny:
        size = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
        channels, widths, depths, classes, image_size = [8, 8], [4, 8], [1, 1], 4, 24
        for part in ("encoder", "decoder"):
            preview_options |= {f"{part}_block_out_channels": (8, 8), f"num_{part}_blocks": (1, 1)}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are drawn in their own type: a float32 copy would need twice the memory
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            transformer = DiTTransformer2DModel(
                in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=classes,
                norm_elementwise_affine=False, activation_fn="gelu-approximate", **size,
            )  # fmt: skip
            vae = AutoencoderKL(
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * len(channels),
                up_block_types=("UpDecoderBlock2D",) * len(channels),
                layers_per_block=2,
                latent_channels=4,
                norm_num_groups=min(32, channels[0]),
                sample_size=size["sample_size"] * 2 ** (len(channels) - 1),
            )
            preview_vae = AutoencoderTiny(**preview_options) if preview else None
            config = ResNetConfig(
                embedding_size=widths[0], hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=classes
            )
            # what the preprocessor_config.json of such a checkpoint says
            config.image_size, config.image_mean, config.image_std = image_size, [0.485, 0.456, 0.406], [0.229] * 3
            classifier = ResNetForImageClassification(config)
    finally:
        torch.set_default_dtype(before)
    for module in (transformer, vae, preview_vae, classifier):
        if module is not None:  # some buffers are made on the CPU, or in float32, whatever the defaults are
            torch.nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of models whose types are mixed
            module.eval().requires_grad_(False)
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    pipe = DsCoPipeline(transformer, scheduler, vae=vae, classifier=classifier, preview_vae=preview_vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe
