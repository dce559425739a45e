"""Tiny text-to-image pipelines of diffusers: random weights, and a real tokenizer whose vocabulary is made here."""

import copy
import json

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


CLASSES = ("rose", "tulip", "daisy")
LETTERS = "abcdefghijklmnopqrstuvwxyz,."


def clip_tokenizer(folder, length=16):
    """Of single letters, with a few pairs merged; `length` tokens at the most."""
    merges = [("p", "h"), ("o", "t"), ("o", "f</w>")]
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def clip_encoder(tokenizer, *, width=8, kind=CLIPTextModel, seed=0):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, projection_dim=width,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).eval()


def unet(*, width=8, seed=1, **options):
    torch.manual_seed(seed)
    options = {"in_channels": 4, "out_channels": 4, "sample_size": 4, **options}
    return UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=width,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    ).eval()  # fmt: skip


def vae(seed=2, channels=4, **options):
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=channels, sample_size=8, **options,
    ).eval()  # fmt: skip


SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "sd1": lambda: PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SD_SCHEDULE),
    "sd2": lambda: DDIMScheduler(
        set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction", **SD_SCHEDULE
    ),
    "zero": lambda: DDIMScheduler(
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        prediction_type="v_prediction",
        **SD_SCHEDULE,
    ),  # fmt: skip
}


def stable_diffusion(folder, kind="sd1", *, length=16, **options):
    """Of Stable Diffusion 1 ("sd1": ε), 2 ("sd2": v) or with all noise at its first level ("zero")."""
    tokenizer = clip_tokenizer(folder / "tokenizer", length)
    pipe = StableDiffusionPipeline(
        vae=vae(), unet=unet(**options), tokenizer=tokenizer, text_encoder=clip_encoder(tokenizer),
        scheduler=SCHEDULERS[kind](), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(folder, *, length=16, **options):
    """With two encoders, whose states stand side by side, and a pooled one."""
    tokenizer = clip_tokenizer(folder / "tokenizer", length)
    second = clip_encoder(tokenizer, width=8, kind=CLIPTextModelWithProjection, seed=5)
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    }
    pipe = StableDiffusionXLPipeline(
        vae=vae(force_upcast=True), unet=unet(width=16, **xl, **options), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=clip_encoder(tokenizer), text_encoder_2=second, add_watermarker=False,
        scheduler=SCHEDULERS["sd1"](),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_lora(host, folder, seed=9):
    """Loads LoRA of random weights into the denoiser of a host, by its own `load_lora_weights`."""
    name = "unet" if hasattr(host, "unet") else "transformer"
    torch.manual_seed(seed)
    network = copy.deepcopy(host.components[name])
    network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    host.save_lora_weights(folder, **{f"{name}_lora_layers": get_peft_model_state_dict(network)})
    host.load_lora_weights(folder)


def t5_tokenizer():
    """Of single letters."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=words, extra_ids=0)


def t5_encoder(tokenizer, width=8):
    """Of one layer."""
    torch.manual_seed(6)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def pixart(kind="PixArtAlphaPipeline", **options):
    """With a T5 of one layer; what it says of its variance is to be left out."""
    tokenizer = t5_tokenizer()
    encoder = t5_encoder(tokenizer)
    transformer = PixArtTransformer2DModel(
        num_layers=1, attention_head_dim=12, num_attention_heads=2, in_channels=4, out_channels=8,
        cross_attention_dim=24, caption_channels=8, **{"sample_size": 4, "patch_size": 2} | options,
    ).eval()  # fmt: skip
    pipe = getattr(diffusers, kind)(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae(), transformer=transformer,
        # of a scheduler that was never saved, diffusers would not hand the default of its spacing on
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", timestep_spacing="linspace"
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_3(folder, *, t5=True, length=16, **options):
    """With three encoders, or without T5; the latents have a shift, and so have the steps."""
    tokenizer, third = clip_tokenizer(folder / "tokenizer", length), t5_tokenizer() if t5 else None
    clips = [clip_encoder(tokenizer, kind=CLIPTextModelWithProjection, seed=seed) for seed in (0, 5)]
    decoder = vae(channels=6, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False)
    torch.manual_seed(7)
    transformer = SD3Transformer2DModel(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=6, out_channels=6,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=6,
        **{"sample_size": 4, "patch_size": 2} | options,
    ).eval()  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        vae=decoder, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=third, text_encoder=clips[0], text_encoder_2=clips[1],
        text_encoder_3=t5_encoder(third, width=24) if t5 else None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def host_of(kind, folder, **options):
    """The pipeline of a kind, see the functions above."""
    if kind.startswith("sd3"):
        return stable_diffusion_3(folder, t5=kind == "sd3", **options)
    if kind.startswith("PixArt"):
        return pixart(kind, **options)
    return stable_diffusion_xl(folder, **options) if kind == "xl" else stable_diffusion(folder, kind, **options)
