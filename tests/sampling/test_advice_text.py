"""What errors about prompts and text-to-image pipelines say to do is done, literally, and works."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

import texts
from advice import FAST, follow
from dsco_hf import DsCoPipeline
from dsco_hf.generators.base import FAMILIES


NAMES = ["rose", "tulip", "daisy"]
LONG = "a rose in the rainy night"  # one token a letter, and those of the beginning and the end


def host(w, kind="sd1", **options):
    return texts.host_of(kind, w.folder / "text", **options)


def made(w, given=None, **options):
    """A pipeline of classes, with what it was told of them."""
    pipe = DsCoPipeline.from_pipe(host(w) if given is None else given, **{"class_names": NAMES, **options})
    return pipe.prompts.as_record()["texts"]


def drawn(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe([0], output_type="pt", **FAST | options).images.shape[-1]


def other(w, kind):
    """A pipeline of another use."""
    return kind(**host(w).components, requires_safety_checker=False)


def scheduled(w, kind, scheduler, where="given"):
    """A pipeline with another scheduler, given at once or set later; or one of the kind in the host's folder."""
    text = host(w, kind)
    text.save_pretrained(w.folder / kind)
    if isinstance(scheduler, type):
        clipped = {"clip_sample": False} if scheduler is DDIMScheduler else {}
        scheduler = scheduler.from_pretrained(w.folder / kind, subfolder="scheduler", **clipped)
    if where == "given":
        return drawn(DsCoPipeline.from_pipe(text, class_names=NAMES, scheduler=scheduler))
    pipe = DsCoPipeline.from_pipe(text, class_names=NAMES)
    pipe.scheduler = scheduler
    return drawn(pipe)


def dropped(w, prompts):
    pipe = DsCoPipeline.from_pipe(host(w), class_names=NAMES, drop_text_encoders=True)
    return pipe.encode_prompts(prompts)


def sized(w, size):
    pipe = DsCoPipeline.from_pipe(host(w), class_names=NAMES)
    pipe.denoiser.register_to_config(sample_size=size)
    return drawn(pipe)


def yaml_of(w, text):
    path = w.folder / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def without_prompts(w):
    pipe = DsCoPipeline.from_pipe(host(w), class_names=NAMES)
    pipe.register_modules(prompts=None)
    return drawn(pipe)


TABLE = {
    "no names": (
        lambda w: made(w, class_names=None),
        r"The classes have no names, and each needs a prompt: pass `class_names=\[...\]`, or the data, `dataset=...`",
        lambda w: [made(w, class_names=["a", "b"]), made(w, class_names=None, dataset=w.real)],
        [
            ["a photo of a a", "a photo of a b"],
            ["a photo of a circle", "a photo of a square", "a photo of a triangle"],
        ],
    ),
    "one name twice": (
        lambda w: made(w, class_names=["rose", "rose"]),
        "Two classes are named 'rose', and prompts go by name: pass other `class_names`",
        lambda w: made(w, prompts="a {}", class_names=["rose", "rose 2"]),
        ["a rose", "a rose 2"],
    ),
    "a template without a place": (
        lambda w: made(w, prompts="a rose"),
        r"A template must have \{\} in it, where the class goes, got 'a rose': for example 'a photo of a {}'. "
        "What is to be said of one class only goes into a dict, by its name",
        lambda w: [made(w, prompts="a photo of a {}")[0], made(w, prompts=dict.fromkeys(NAMES, "a rose"))[2]],
        ["a photo of a rose", "a rose"],
    ),
    "a class without a prompt": (
        lambda w: made(w, prompts={"rose": "red", "daisy": "white"}),
        r"`prompts` has none for 1 of 3 classes: \['tulip'\]. Add them, or pass a template for all, such as "
        r"'a photo of a \{\}'",
        lambda w: [made(w, prompts={"rose": "red", "daisy": "white", "tulip": "pink"}), made(w, prompts="a {}")],
        [["red", "pink", "white"], ["a rose", "a tulip", "a daisy"]],
    ),
    "a prompt without a class": (
        lambda w: made(w, prompts=yaml_of(w, "{rose: red, tulips: pink, daisy: white}")),
        "`prompts` has 'tulips', which is no class. Nearest: 'tulip'",
        lambda w: made(w, prompts=str(yaml_of(w, "{rose: red, tulip: pink, daisy: white}"))),
        ["red", "pink", "white"],
    ),
    "an empty prompt": (
        lambda w: made(w, prompts={"rose": "red", "daisy": " ", "tulip": "pink"}),
        r"The prompt of class 'daisy' is empty, \[' '\]: say what it shows",
        lambda w: made(w, prompts={"rose": "red", "daisy": "white", "tulip": "pink"}),
        ["red", "pink", "white"],
    ),
    "more prompts of one class": (
        lambda w: made(w, prompts={"rose": ["red", "a rose"], "daisy": "white", "tulip": "pink"}),
        "Each class must have as many prompts as the others, got {'rose': 2, 'tulip': 1, 'daisy': 1}",
        lambda w: made(w, prompts={"rose": "red", "daisy": "white", "tulip": "pink"}),
        ["red", "pink", "white"],
    ),
    "a long prompt": (
        lambda w: made(w, prompts=dict.fromkeys(NAMES, LONG)),
        "The prompt of class 'rose' has 22 tokens and the tokenizer takes 16, so that 'y night' would be cut off: "
        "shorten 'a rose in the rainy night'",
        lambda w: made(w, prompts=dict.fromkeys(NAMES, "a rose in"))[0],
        "a rose in",
    ),
    "a long prompt of T5": (
        lambda w: made(w, texts.pixart(), prompts="a {}" + 120 * "x"),
        "has 128 tokens and the tokenizer takes 120, so that 'x{8}' would be cut off: shorten",
        lambda w: made(w, texts.pixart(), prompts="a {}")[0],
        "a rose",
    ),
    "dropped encoders": (
        lambda w: dropped(w, "a {}"),
        "Prompts cannot be encoded without `tokenizer` and `text_encoder`: they were dropped, or never there. Begin "
        r"with the whole pipeline of diffusers, `DsCoPipeline.from_pipe\(pipe, prompts=...\)`",
        lambda w: DsCoPipeline.from_pipe(host(w), class_names=NAMES, prompts="a {}").id2label[1],
        "tulip",
    ),
    "a text model without prompts": (
        without_prompts,
        r"conditioned on prompts, and there are none: make the pipeline with `DsCoPipeline.from_pipe\(pipe, "
        r"class_names=\[...\]\)`, `pipe` being the one of diffusers, a StableDiffusionPipeline",
        lambda w: drawn(DsCoPipeline.from_pipe(host(w), class_names=NAMES)),
        8,
    ),
    "prompts for a model of classes": (
        lambda w: DsCoPipeline(w.make.transformer(), DDIMScheduler(), prompts="a {}"),
        "The pipeline's DiTTransformer2DModel knows its classes by itself and takes no prompts: leave them out",
        lambda w: DsCoPipeline(w.make.transformer(), DDIMScheduler()).num_classes,
        3,
    ),
    "another use of the same components": (
        lambda w: made(w, other(w, StableDiffusionImg2ImgPipeline)),
        "A StableDiffusionImg2ImgPipeline cannot be taken: a pipeline must be a .*StableDiffusionPipeline.* Made of "
        r"the same components is `diffusers.StableDiffusionPipeline.from_pipe\(pipe\)`: pass that",
        lambda w: made(w, StableDiffusionPipeline.from_pipe(other(w, StableDiffusionImg2ImgPipeline)))[0],
        "a photo of a rose",
    ),
    "levels that are not those of diffusion": (
        lambda w: made(w, scheduler=EDMEulerScheduler()),
        r"The scheduler, a EDMEulerScheduler, has not the noise levels of diffusion \(`alphas_cumprod`\), and "
        r"cannot be taken over: pass `scheduler=DDIMScheduler\(...\)` with those that the model was trained with",
        lambda w: made(w, scheduler=DDIMScheduler(**texts.SD_SCHEDULE))[0],
        "a photo of a rose",
    ),
    "a flow's levels for noise": (
        lambda w: scheduled(w, "sd1", FlowMatchEulerDiscreteScheduler(shift=3.0)),
        "The scheduler is a FlowMatchEulerDiscreteScheduler, and a UNet2DConditionModel predicts noise, or a velocity "
        r"of diffusion: give it the levels that it was trained with, `DDIMScheduler.from_pretrained\(folder, "
        r"subfolder='scheduler', clip_sample=False\)`, `folder` being the model's",
        lambda w: [scheduled(w, "sd1", DDIMScheduler, where) for where in ("given", "set")],
        [8, 8],
    ),
    "a flow's levels for noise, set later": (
        lambda w: scheduled(w, "PixArtAlphaPipeline", FlowMatchEulerDiscreteScheduler(), "set"),
        "The scheduler is a FlowMatchEulerDiscreteScheduler, and a PixArtTransformer2DModel predicts noise",
        lambda w: scheduled(w, "PixArtAlphaPipeline", DDIMScheduler, "set"),
        8,
    ),
    "levels of diffusion for a flow": (
        lambda w: scheduled(w, "sd3-clips", DDIMScheduler(**texts.SD_SCHEDULE)),
        "The scheduler is a DDIMScheduler, and a SD3Transformer2DModel predicts the velocity of a flow: give it the "
        r"levels that it was trained with, `FlowMatchEulerDiscreteScheduler.from_pretrained\(folder, "
        r"subfolder='scheduler'\)`, `folder` being the model's",
        lambda w: [scheduled(w, "sd3-clips", FlowMatchEulerDiscreteScheduler, where) for where in ("given", "set")],
        [8, 8],
    ),
    "levels of diffusion for a flow, set later": (
        lambda w: scheduled(w, "sd3-clips", DDIMScheduler(), "set"),
        "The scheduler is a DDIMScheduler, and a SD3Transformer2DModel predicts the velocity of a flow",
        lambda w: scheduled(w, "sd3-clips", FlowMatchEulerDiscreteScheduler, "set"),
        8,
    ),
    "a size that cannot be halved": (
        lambda w: sized(w, 5),
        "The UNet2DConditionModel cannot take `sample_size=5`, .* must be a multiple of 2, for example 6",
        lambda w: sized(w, 6),
        12,
    ),
    "a size that is not square": (
        lambda w: sized(w, (4, 8)),
        "must be one whole number, the height and width of what it draws, got .* set it with "
        r"`denoiser.register_to_config\(sample_size=...\)`",
        lambda w: sized(w, 8),
        16,
    ),
    "images larger than they are drawn": (
        lambda w: made(w, image_size=16),
        "`image_size=16` is more than the generator draws, 8, and would only be blurred: give at most 8, or leave it",
        lambda w: [
            DsCoPipeline.from_pipe(host(w), class_names=NAMES, image_size=size).image_size for size in (8, None)
        ],
        [8, 8],
    ),
    "classes that start from others": (
        lambda w: DsCoPipeline.from_pipe(host(w), class_names=NAMES).family.adapt(3, mapping={0: 1}),
        r"are prompts, and start from nothing else: leave `mapping` \(`--class_mapping`\) out, and say in `prompts`",
        lambda w: (
            DsCoPipeline.from_pipe(host(w), class_names=NAMES).family.adapt(3).config.sample_size,
            made(w, prompts={"rose": "a red tulip", "tulip": "a tulip", "daisy": "a daisy"})[0],
        ),
        (4, "a red tulip"),
    ),
    "text encoders of another family": (
        lambda w: FAMILIES["pixart"].build_encoders(0),
        "has no new text encoders: begin with a pipeline that has",
        lambda w: made(w, host(w, "PixArtAlphaPipeline"))[0],
        "a photo of a rose",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"in_channels": 9}, "another image"),
        ({"time_cond_proj_dim": 8}, "the scale of a guidance that it was distilled with"),
        ({"num_class_embeds": 4}, "classes"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 8}, "a condition of the kind 'image'"),
    ],
)
def test_unets_that_need_more_than_a_prompt(world, options, what):
    with pytest.raises(ValueError, match=f"takes {what} beside noise and a prompt: take the text-to-image model"):
        made(world, host(world, **options))


def test_a_pipeline_of_another_family_is_named_with_the_nearest(tmp_path):
    names = {"flux": "FluxPipeline", "sd3": "StableDiffusion3InpaintPipeline", "pixart": "PixArtSigmaPAGPipeline"}
    for folder, name in names.items():
        assert hasattr(diffusers, name)
        (tmp_path / folder).mkdir()
        index = f'{{"_class_name": "{name}", "text_encoder": ["transformers", "T5EncoderModel"]}}'
        (tmp_path / folder / "model_index.json").write_text(index, encoding="utf-8")
        with pytest.raises(ValueError, match=f"A {name} cannot be taken: a pipeline must be a "):
            DsCoPipeline.from_pretrained(tmp_path / folder, class_names=NAMES)
    for folder, host in {"pixart": "PixArtSigma", "sd3": "StableDiffusion3"}.items():
        with pytest.raises(ValueError, match=rf"diffusers.{host}Pipeline.from_pipe\(pipe\)"):
            DsCoPipeline.from_pretrained(tmp_path / folder, class_names=NAMES)


def test_negative_prompt_and_rescale_out_of_range(world):
    with pytest.raises(ValueError, match="`negative_prompt` has 22 tokens and the tokenizer takes 16"):
        made(world, negative_prompt=LONG)
    with pytest.raises(ValueError, match="`guidance_rescale` must be .* 1"):
        made(world, guidance_rescale=2.0)
    DsCoPipeline(world.make.transformer(), DDIMScheduler()).save_pretrained(world.folder / "classes")
    with pytest.raises(ValueError, match="knows its classes by itself"):
        DsCoPipeline.from_pretrained(world.folder / "classes", class_names=NAMES)
    assert torch.is_tensor(DsCoPipeline.from_pipe(host(world), class_names=NAMES).prompts.encoder_hidden_states)
