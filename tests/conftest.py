"""Tiny real components: generators of three classes in pixel and latent space, classifiers, and 8x8 images."""

import copy
import functools
import gc
import multiprocessing
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from transformers import ResNetConfig, ResNetForImageClassification

import launches
from advice import World
from dsco_hf import (
    ConvNetConfig,
    ConvNetForImageClassification,
    DsCoPipeline,
    MatchingTargets,
    Pool,
    TrainingLog,
)
from hub import Client, LoopbackHub
from hub.samples import TOKEN


NAMES = ("circle", "square", "triangle")
IMAGENET_NAMES = ("tench, Tinca tinca", "goldfish, Carassius auratus", "chain saw, chainsaw")


def tiny_transformer(*, channels=1, out_channels=None, sample_size=8, classes=3, seed=0):
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=out_channels or channels,
        num_layers=1,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=1,
    ).eval()


def tiny_unet(*, embeddings=4, channels=1, sample_size=8, out_channels=None, seed=0, **options):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=out_channels or channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=embeddings,
        **options,
    ).eval()


def tiny_vae(*, channels=1, latent_channels=4, seed=1):
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=8,
    ).eval()


def tiny_convnet(*, names=NAMES, channels=1, width=6, norm="batch", seed=2):
    torch.manual_seed(seed)
    labels = dict(enumerate(names))
    config = ConvNetConfig(
        depth=2,
        width=width,
        norm=norm,
        image_size=8,
        num_channels=channels,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    model = ConvNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if trained: statistics that are not those of standard noise
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def tiny_resnet(*, names=NAMES, channels=3, image_size=16, widths=(4, 6), seed=3):
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=4,
        hidden_sizes=list(widths),
        depths=[1] * len(widths),
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    config.image_size, config.image_mean, config.image_std = image_size, [0.4] * channels, [0.2] * channels
    return ResNetForImageClassification(config).eval()


def pixel_pipeline(*, classifier=None, seed=0):
    pipe = DsCoPipeline(
        tiny_transformer(seed=seed),
        DDIMScheduler(clip_sample=True),
        classifier=classifier,
        id2label=dict(enumerate(NAMES)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def striped_images(counts=(9, 7, 5), *, names=NAMES, size=8, seed=0):
    """Horizontal stripes, vertical stripes, checkers, with noise; the classes follow one another in turn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    patterns = [y // 2 % 2, x // 2 % 2, (x + y) % 2]
    rows = sorted((index, label) for label, count in enumerate(counts) for index in range(count))
    pixels = [
        (patterns[label % 3] * 160 + rng.integers(0, 90, (size, size))).clip(0, 255).astype(np.uint8)
        for _, label in rows
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    columns = {"image": [PIL.Image.fromarray(array) for array in pixels], "label": [label for _, label in rows]}
    return Dataset.from_dict(columns, features=features)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: the others fill up what is left of the time at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported stays: accelerate collects garbage after each training, and would look at it all each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make():
    """The builders above, by name: `make.transformer()`, `make.vae()`, `make.convnet()`, ..."""

    class Builders:
        transformer = staticmethod(tiny_transformer)
        unet = staticmethod(tiny_unet)
        vae = staticmethod(tiny_vae)
        convnet = staticmethod(tiny_convnet)
        resnet = staticmethod(tiny_resnet)
        pipe = staticmethod(pixel_pipeline)
        images = staticmethod(striped_images)
        generators = staticmethod(lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds])

    return Builders


@pytest.fixture(scope="session")
def real_images():
    return striped_images()


@pytest.fixture
def pool(real_images):
    return Pool(real_images, progress=False)


@pytest.fixture
def training(pool):
    """Twelve epochs of random values of the 21 real images."""
    values = torch.rand(3, 12, 21, generator=torch.Generator().manual_seed(1))
    return TrainingLog(values[0], 2 * values[1] - 1, values[2], pool.fingerprint)


@pytest.fixture(scope="session")
def _pixel_pipe():
    return pixel_pipeline(classifier=tiny_convnet())


@pytest.fixture
def pipe(_pixel_pipe):
    """A pixel-space pipeline with a ConvNet; the test's own copy."""
    return copy.deepcopy(_pixel_pipe)


@pytest.fixture(scope="session")
def _targets(_pixel_pipe, real_images):
    pipe = copy.deepcopy(_pixel_pipe)
    return MatchingTargets.from_dataset(real_images, pipe, features={}, embedding_dim=256, progress=False)


@pytest.fixture
def targets(_targets):
    """Targets of `real_images` for `pipe`."""
    return copy.deepcopy(_targets)


@pytest.fixture
def world(pipe, targets, real_images, make, tmp_path):
    """What the tables of advice work with; accelerate's state is that of the process, and left as it was found."""
    yield World(pipe, targets, real_images, make, tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory):
    """A checkpoint as diffusers' own DiTPipeline saves it, in the layout of facebook/DiT-XL-2-256."""
    folder = tmp_path_factory.mktemp("dit")
    stock = DiTPipeline(
        tiny_transformer(channels=4, out_channels=8, sample_size=4),
        tiny_vae(channels=3),
        DDIMScheduler(clip_sample=False, beta_schedule="linear"),
    )
    stock.register_to_config(id2label={str(index): name for index, name in enumerate(IMAGENET_NAMES)})
    stock.save_pretrained(folder)
    return folder


@pytest.fixture
def latent_pipe(dit_folder):
    """That checkpoint with a stock ResNet as the classifier."""
    pipe = DsCoPipeline.from_pretrained(dit_folder, classifier=tiny_resnet(names=IMAGENET_NAMES))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def forked(monkeypatch):
    """Python processes that something starts are forked from one that has imported the libraries; see `launches`."""
    start = subprocess.run

    def run(command, *, check=False, env=None, **options):
        if command[0] != sys.executable:
            return start(command, check=check, env=env, **options)
        done = launches.run(command, env=env)
        if check:
            done.check_returncode()
        return done

    launches.serve()
    monkeypatch.setattr(subprocess, "run", run)
    spawn = functools.partial(torch.multiprocessing.start_processes, start_method=launches.METHOD)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    for module in (multiprocessing, torch.multiprocessing):
        monkeypatch.setattr(module, "get_context", lambda method: launches.CONTEXT)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub on loopback with one user."""
    with LoopbackHub(tmp_path_factory.mktemp("server")) as hub:
        hub.add_user("ann", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def ann(hub, tmp_path_factory):
    """Her process, which prints no token."""
    with Client(hub.url, tmp_path_factory.mktemp("ann"), token=TOKEN) as client:
        yield client
        assert TOKEN not in client.output()


@pytest.fixture
def fresh_accelerate():
    """Leaves no device, precision or number of processes behind for the next test."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
