"""What errors about pipelines, their components and classifiers say to do is done, literally, and works."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler

from advice import FAST, follow, is_of
from dsco_hf import DsCoPipeline, FeatureSpec, MatchingTargets, QuantileTargets
from dsco_hf.generators.base import denoiser_of
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_denoiser
from dsco_hf.matching.features import observe, pool


IMAGES = torch.zeros(2, 3, 16, 16)
SIZES = {"num_classes": 3, "num_channels": 1}


def with_unet(w, names=("circle", "square", "triangle"), **options):
    """A UNet with three embeddings; with as many names, none of them is the null class."""
    unet = w.make.unet(**{"embeddings": 3, **options})
    return DsCoPipeline(None, DDIMScheduler(), id2label=dict(enumerate(names)), unet=unet)


def bare_latents(w, vae=None):
    """A generator of latents, without what decodes them."""
    return DsCoPipeline(
        w.make.transformer(channels=4, sample_size=4), DDIMScheduler(), vae=vae, id2label=dict(enumerate("abc"))
    )


def without_size(w, size=None):
    pipe = with_unet(w, sample_size=None)
    if size is not None:
        pipe.denoiser.register_to_config(sample_size=size)
    return pipe


def stored(w, name, change=None, *, without=()):
    """A stored pipeline whose index was changed."""
    folder = w.folder / name
    w.pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if change is not None:
        change(index)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for part in without:
        shutil.rmtree(folder / part)
    return folder


def pooled(hidden, pooling):
    return pool(hidden, pooling, layer="x", grid=(16, 16)).shape[1]


def seen(model, layer, pooling="average", images=IMAGES):
    return observe(model, images, layers=[(layer, pooling)]).features.shape[1]


def targets_of(w, features=None, pipe=None, cls=MatchingTargets, **options):
    """Targets of the real images."""
    if cls is MatchingTargets:
        options |= {"features": features, "embedding_dim": 8}
    return cls.from_dataset(w.real, pipe or w.pipe, progress=False, **options)


def ridge(w, targets, **options):
    return w.pipe([0, 1], targets, **{"objective": "ridge", **FAST, **options}).images


def trained_classifier(w, trained):
    w.pipe.classifier.train(trained)
    return w.pipe


def headless(w):
    model = w.make.convnet()
    model.classifier = torch.nn.Identity()
    return model


def one_class(w):
    circles = w.real.filter(lambda row: row["label"] == 0)
    return MatchingTargets.from_dataset(circles, w.pipe, second_moment=True, embedding_dim=8, progress=False)


def small_pipe(w):
    """A generator of images of 4 pixels a side."""
    return DsCoPipeline(
        w.make.transformer(sample_size=4),
        DDIMScheduler(),
        classifier=w.make.convnet(),
        id2label=w.pipe.id2label,
    )


def new_targets(w, **changes):
    """Images that another classifier sees, with targets of its own."""
    pipe = w.make.pipe(classifier=w.make.convnet(**changes))
    return pipe([0], targets_of(w, pipe=pipe), **FAST).images


def listed_modules(model):
    """Those that the error of a classifier without hidden states names."""
    with pytest.raises(ValueError, match="returns no hidden states") as raised:
        seen(model, "hidden_1")
    return str(raised.value).rpartition("its modules, ")[2].rstrip(".").split(", ")


def emptied(w):
    folder = stored(w, "a")
    for path in (folder / "classifier").glob("*.safetensors"):
        path.unlink()
    return folder


def in_half(w):
    if not (w.folder / "half").exists():
        w.pipe.save_pretrained(w.folder / "half", variant="fp16")
    return w.folder / "half"


CHECKS = {
    "no null class: another scale": (
        lambda w: with_unet(w)([0], **{**FAST, "guidance_scale": 2.0}),
        "needs a null class, .* Pass `guidance_scale=1.0`",
        lambda w: with_unet(w)([0], **{**FAST, "guidance_scale": 1.0}).images,
        is_of(1),
    ),
    "no null class: names": (
        lambda w: with_unet(w)([0], **{**FAST, "guidance_scale": 2.0}),
        "if its last embedding is the null class, name the other classes in `id2label`",
        lambda w: with_unet(w, ["circle", "square"])([0, 1], **{**FAST, "guidance_scale": 2.0}).images,
        is_of(2),
    ),
    "no VAE": (
        lambda w: bare_latents(w)([0], **FAST),
        "pass `vae=...`, the AutoencoderKL that it was trained with, or `output_type='latent'`",
        lambda w: (
            bare_latents(w, w.make.vae(channels=3))([0], **FAST).images[0].size,
            bare_latents(w)([0], output_type="latent", **FAST).images.shape,
        ),
        ((8, 8), (1, 4, 4, 4)),
    ),
    "a VAE of other latents": (
        lambda w: bare_latents(w, w.make.vae(channels=3, latent_channels=2))([0], **FAST),
        "load the VAE that the transformer was trained with",
        lambda w: bare_latents(w, w.make.vae(channels=3))([0], **FAST).images,
        is_of(1),
    ),
    "targets of another kind": (
        lambda w: ridge(w, targets_of(w, cls=QuantileTargets)),
        r"make them with `MatchingTargets.from_dataset\(dataset, pipe\)`",
        lambda w: ridge(w, MatchingTargets.from_dataset(w.real, w.pipe), objective="rkhs"),
        is_of(2),
    ),
    "no second moment": (
        lambda w: ridge(w, targets_of(w, second_moment=False)),
        r"make them with `MatchingTargets.from_dataset\(dataset, pipe\)`, or choose objective='rkhs'",
        lambda w: [
            *ridge(w, MatchingTargets.from_dataset(w.real, w.pipe)),
            *ridge(w, targets_of(w, second_moment=False), objective="rkhs"),
        ],
        is_of(4),
    ),
    "an objective of a method that has none": (
        lambda w: w.pipe([0], method="plain", objective="ridge", **FAST),
        "`objective` is a field of 'nopt', and 'plain' has none: leave it out",
        lambda w: w.pipe([0], method="plain", **FAST).images,
        is_of(1),
    ),
    "ridge of one class": (
        lambda w: w.pipe([0], one_class(w), objective="ridge", **FAST),
        "have only .*: choose objective='rkhs'",
        lambda w: w.pipe([0], one_class(w), objective="rkhs", **FAST).images,
        is_of(1),
    ),
    "the classifier objective without one": (
        lambda w: w.without([0], objective="classifier", **FAST),
        "load the pipeline with `classifier=...`",
        lambda w: (
            DsCoPipeline.from_pretrained(w.saved("plain"), classifier=w.pipe.classifier)(
                [0], objective="classifier", **FAST
            ).images
        ),
        is_of(1),
    ),
}


COMPONENTS = {
    "both denoisers": (
        lambda w: DsCoPipeline(w.make.transformer(), DDIMScheduler(), unet=w.make.unet()),
        "pass exactly one",
        lambda w: [
            DsCoPipeline(w.make.transformer(), DDIMScheduler()),
            DsCoPipeline(None, DDIMScheduler(), unet=w.make.unet()),
        ],
        is_of(2),
    ),
    "no scheduler": (
        lambda w: DsCoPipeline(w.make.transformer()),
        r"pass `scheduler=DDIMScheduler\(...\)` with the noise levels of the training",
        lambda w: (
            DsCoPipeline(w.make.transformer(), scheduler=DDIMScheduler(beta_schedule="linear"))([0], **FAST).images
        ),
        is_of(1),
    ),
    "a size that is not known": (
        lambda w: without_size(w)([0], **FAST),
        r"set it with `denoiser.register_to_config\(sample_size=...\)`",
        lambda w: [image.size for image in without_size(w, 8)([0], **FAST).images],
        [(8, 8)],
    ),
    "a folder that is missing: the component": (
        lambda w: DsCoPipeline.from_pretrained(stored(w, "a", without=["classifier"])),
        r"has no folder `classifier`: copy the whole pipeline, or pass the component, "
        r"`from_pretrained\(..., classifier=...\)`",
        lambda w: [
            DsCoPipeline.from_pretrained(w.folder / "a", classifier=w.pipe.classifier).classifier,
            DsCoPipeline.from_pretrained(shutil.copytree(w.saved("b", w.pipe), w.folder / "c")).classifier,
        ],
        lambda found: None not in found,
    ),
    "an index without a denoiser": (
        lambda w: DsCoPipeline.from_pretrained(stored(w, "a", lambda index: index.pop("transformer"))),
        "names no .*: save the pipeline again, or pass the component to `from_pretrained`",
        lambda w: [
            DsCoPipeline.from_pretrained(w.folder / "a", transformer=w.pipe.transformer).num_classes,
            w.pipe.save_pretrained(w.folder / "a") or DsCoPipeline.from_pretrained(w.folder / "a").num_classes,
        ],
        [3, 3],
    ),
    "an index that names no class": (
        lambda w: DsCoPipeline.from_pretrained(stored(w, "a", lambda index: index.update(classifier="ConvNet"))),
        r"must give \[library, class\] for `classifier`",
        lambda w: [DsCoPipeline.from_pretrained(stored(w, "a", lambda index: index.update(classifier=[None, None])))],
        is_of(1),
    ),
    "no weights": (
        lambda w: DsCoPipeline.from_pretrained(emptied(w)),
        "has no weights of `classifier`: a safetensors file is needed, .* Save it again, or download it again",
        lambda w: w.pipe.save_pretrained(w.folder / "a") or [DsCoPipeline.from_pretrained(w.folder / "a")],
        is_of(1),
    ),
    "weights of a variant only": (
        lambda w: DsCoPipeline.from_pretrained(in_half(w)),
        "pass `variant='fp16'` to `from_pretrained`",
        lambda w: DsCoPipeline.from_pretrained(in_half(w), variant="fp16")([0], **FAST).images,
        is_of(1),
    ),
    "patches that do not fit": (
        lambda w: build_denoiser(GeneratorTrainingConfig(patch_size=3), sample_size=8, **SIZES),
        "Choose another patch size, or another `image_size` for the data",
        lambda w: [
            build_denoiser(GeneratorTrainingConfig(patch_size=patch), sample_size=size, **SIZES).config.sample_size
            for patch, size in ((4, 8), (3, 9))
        ],
        [8, 9],
    ),
    "levels that do not fit": (
        lambda w: build_denoiser(
            GeneratorTrainingConfig(architecture="unet", block_out_channels="8,8,8"), sample_size=6, **SIZES
        ),
        "Choose fewer levels, or another `image_size` for the data",
        lambda w: [
            build_denoiser(
                GeneratorTrainingConfig(architecture="unet", block_out_channels=levels), sample_size=size, **SIZES
            ).config.sample_size
            for levels, size in (("8,8", 6), ("8,8,8", 8))
        ],
        [6, 8],
    ),
    "another size of a trained DiT": (
        lambda w: denoiser_of(w.make.transformer()).adapt(num_classes=2, sample_size=16),
        "Leave `image_size` out, or start from a denoiser that takes any size, such as a UNet",
        lambda w: [
            denoiser_of(w.make.transformer()).adapt(num_classes=2).config.sample_size,
            denoiser_of(w.make.unet()).adapt(num_classes=2, sample_size=16).config.sample_size,
        ],
        [8, 16],
    ),
}


FEATURES = {
    "a pooling without positions": (
        lambda w: FeatureSpec(pooling="grid2"),
        "add a layer such as 'hidden_3', or leave `pooling` out",
        lambda w: [FeatureSpec(layers=("pooled", "hidden_3"), pooling="grid2").layers, FeatureSpec().pooling],
        [("pooled", "hidden_3"), "average"],
    ),
    "the same layer twice": (
        lambda w: targets_of(w, [{}, {}]),
        "must name at least one layer, and none twice",
        lambda w: targets_of(w, [{}, {"layers": ["logits"]}]).feature_dim,
        lambda found: found == 6 * 2 * 2 + 3,
    ),
    "latents of a generator of pixels": (
        lambda w: targets_of(w, {"space": "latents"}),
        r"use FeatureSpec\(space='pixels'\)",
        lambda w: targets_of(w, FeatureSpec(space="pixels")).num_classes,
        3,
    ),
    "a network that is missing": (
        lambda w: targets_of(w, {"network": "classifier_2"}),
        r"pass `classifier_2=` to `DsCoPipeline.from_pretrained`",
        lambda w: (
            targets_of(
                w,
                {"network": "classifier_2"},
                DsCoPipeline.from_pretrained(w.saved("plain"), classifier_2=w.pipe.classifier),
            ).num_classes
        ),
        3,
    ),
    "a classifier that is missing": (
        lambda w: targets_of(w, {}, w.without),
        r"has none: pass `classifier=` .*or match FeatureSpec\(network='untrained'\)",
        lambda w: targets_of(w, FeatureSpec(network="untrained"), w.without).num_classes,
        3,
    ),
    "the architecture of a trained network": (
        lambda w: FeatureSpec(architecture="convnet-2"),
        "leave it out, or choose network='untrained'",
        lambda w: (
            FeatureSpec().architecture,
            FeatureSpec(network="untrained", architecture="convnet-2").architecture,
        ),
        (None, "convnet-2"),
    ),
    "the width of a network that has its own": (
        lambda w: FeatureSpec(network="untrained", architecture="vit", width=8),
        "leave it out, or choose a ConvNet, such as 'convnet-3'",
        lambda w: [
            FeatureSpec(network="untrained", architecture=name, width=width).width
            for name, width in (("vit", None), ("convnet-3", 8))
        ],
        [None, 8],
    ),
    "a component in the place of another": (
        lambda w: DsCoPipeline(w.make.transformer(), DDIMScheduler(), w.make.convnet()),
        "`vae` must be an AutoencoderKL of diffusers, got ConvNet.*: pass it by name, `classifier=...`",
        lambda w: DsCoPipeline(w.make.transformer(), DDIMScheduler(), classifier=w.make.convnet()).vae,
        None,
    ),
    "a component in no place": (
        lambda w: DsCoPipeline(w.make.transformer(), DDIMScheduler(), None, w.make.transformer()),
        "`classifier` must be an image classifier of transformers, got DiT.*: pass components by name",
        lambda w: DsCoPipeline(denoiser=w.make.transformer(), scheduler=DDIMScheduler()).classifier,
        None,
    ),
    "the revision of no classifier": (
        lambda w: DsCoPipeline.from_pretrained(w.saved("plain"), classifier_revision="main"),
        "pass its id as well, `classifier='user/name'`",
        lambda w: (
            DsCoPipeline.from_pretrained(
                w.saved("plain"), classifier=w.saved("full", w.pipe) + "/classifier", classifier_revision="main"
            ).classifier.training
        ),
        False,
    ),
    "a classifier in train mode": (
        lambda w: targets_of(w, pipe=trained_classifier(w, True)),
        r"call `pipe.classifier.eval\(\)` first",
        lambda w: targets_of(w, pipe=(trained_classifier(w, True).classifier.eval(), w.pipe)[1]).num_classes,
        3,
    ),
    "too few positions for the random network": (
        lambda w: targets_of(w, {"network": "random"}, small_pipe(w)),
        "needs at least 8 positions a side, .*: use a classifier's features",
        lambda w: targets_of(w, {"network": "classifier"}, small_pipe(w)).num_classes,
        3,
    ),
    "targets of another classifier": (
        lambda w: w.make.pipe(classifier=w.make.convnet(width=4))([0], w.targets, **FAST),
        "Load that one or make new targets",
        lambda w: [
            *w.make.pipe(classifier=w.make.convnet())([0], w.targets, **FAST).images,
            *new_targets(w, width=4),
        ],
        is_of(2),
    ),
    "targets of another training": (
        lambda w: w.make.pipe(classifier=w.make.convnet(seed=9))([0], w.targets, **FAST),
        "has the same feature size but sees other features. .* Load that one or make new targets",
        lambda w: [
            *w.make.pipe(classifier=w.make.convnet())([0], w.targets, **FAST).images,
            *new_targets(w, seed=9),
        ],
        is_of(2),
    ),
    "features of another size": (
        lambda w: w.targets.embed(torch.zeros(1, 5)),
        "Use the classifier they were made with .* or make new ones",
        lambda w: w.targets.embed(observe(w.pipe.classifier, torch.zeros(1, 1, 8, 8)).features),
        is_of(1),
    ),
    "no linear head": (
        lambda w: observe(headless(w), torch.zeros(1, 1, 8, 8)),
        "Pass a model for image classification with a linear head",
        lambda w: observe(w.make.convnet(), torch.zeros(1, 1, 8, 8)).logits[0],
        is_of(3),
    ),
    "no hidden states": (
        lambda w: seen(w.make.convnet(channels=3), "hidden_1"),
        "returns no hidden states: choose 'pooled', 'logits' or one of its modules, convnet, ",
        lambda w: [
            seen(w.make.convnet(channels=3), layer)
            for layer in ("pooled", "logits", *listed_modules(w.make.convnet(channels=3)))
        ],
        is_of(2 + 11),
    ),
    "an output without positions": (
        lambda w: pool(torch.zeros(2), "average", layer="norm", grid=(16, 16)),
        "choose one with tokens or feature maps",
        lambda w: [pooled(torch.zeros(2, 5, 8), "average"), pooled(torch.zeros(2, 8, 4, 4), "average")],
        [8, 8],
    ),
    "a class token of a map": (
        lambda w: seen(w.make.resnet(), "hidden_1", "cls"),
        "is a feature map: choose 'average', 'mean_std' or 'grid2'",
        lambda w: [seen(w.make.resnet(), "hidden_1", pooling) for pooling in ("average", "mean_std", "grid2")],
        [4, 8, 16],
    ),
    "a class token that is not there": (
        lambda w: pooled(torch.zeros(2, 16, 8), "cls"),
        "has none among its 16 tokens: choose 'average', 'mean_std' or 'grid2'",
        lambda w: [pooled(torch.zeros(2, 16, 8), pooling) for pooling in ("average", "mean_std", "grid2")],
        [8, 16, 32],
    ),
    "quarters of one position": (
        lambda w: seen(w.make.resnet(image_size=8), "hidden_2", "grid2"),
        "choose 'average' or an earlier layer",
        lambda w: [
            seen(w.make.resnet(image_size=8), "hidden_2", "average"),
            seen(w.make.resnet(image_size=8), "hidden_0", "grid2"),
        ],
        [6, 16],
    ),
}


TABLE = CHECKS | COMPONENTS | FEATURES


@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])
