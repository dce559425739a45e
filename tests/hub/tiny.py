"""A tiny pipeline of real components, and what can be done with it in a client's process."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from transformers import ResNetConfig, ResNetForImageClassification

from .samples import tiny_dataset


NAMES = ["cat", "dog"]


def tiny_pipeline(*, own_classifier: bool = False) -> Any:
    """A one-layer DiT on 8×8 pixels and a two-stage ResNet or our own ConvNet, of fixed random weights."""
    from dsco_hf.sampling.pipeline import DsCoPipeline

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=2,
    )
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_channels=1,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    config.image_size, config.image_mean, config.image_std = 8, [0.5], [0.5]
    classifier = ResNetForImageClassification(config)
    if own_classifier:
        from dsco_hf.evaluators import build_evaluator

        classifier = build_evaluator("convnet", class_names=NAMES, image_size=8, num_channels=1, width=4)
    return DsCoPipeline(
        transformer.eval(),
        DDIMScheduler(clip_sample=False),
        classifier=classifier.eval(),
        id2label=dict(enumerate(NAMES)),
    )


def tiny_targets(pipe: Any) -> Any:
    """Targets of a tiny dataset."""
    from dsco_hf.matching.targets import MatchingTargets

    dataset = tiny_dataset(4, NAMES).select_columns(["image", "label"])
    return MatchingTargets.from_dataset(dataset, pipe, features={}, embedding_dim=16, progress=False)


def draw(pipe: Any) -> list[str]:
    """Pixels of two plain samples, as text that can be compared over processes."""
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    images = pipe(class_labels=[0, 1], num_inference_steps=2, guidance_scale=1.0, generator=generator).images
    return [image.tobytes().hex() for image in images]


def publish_tiny_pipeline(
    repo_id: str, *, with_targets: bool = True, own_classifier: bool = False, **options: Any
) -> dict[str, Any]:
    """Publishes the tiny pipeline and returns what was done, and what the pipeline draws."""
    from dsco_hf.hub.publish import publish_pipeline

    pipe = tiny_pipeline(own_classifier=own_classifier)
    result = publish_pipeline(pipe, repo_id, targets=tiny_targets(pipe) if with_targets else None, **options)
    return {**vars(result), "pixels": draw(pipe)}


def train_tiny_pipeline() -> Any:
    """The tiny pipeline with a generator trained for a few steps."""
    from accelerate import Accelerator

    from dsco_hf.data.datasets import load_pixels
    from dsco_hf.generators.denoisers import GeneratorTrainingConfig
    from dsco_hf.generators.training import train_generator

    pipe = tiny_pipeline()
    dataset = tiny_dataset(4, NAMES).select_columns(["image", "label"])
    pixels, labels, _ = load_pixels(dataset, num_channels=1)
    config = GeneratorTrainingConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=4, train_steps=3, batch_size=4
    )
    result = train_generator(pixels, labels, config, num_classes=2, accelerator=Accelerator(cpu=True), progress=False)
    pipe.register_modules(transformer=result.denoiser.eval())
    return pipe


def pickle_weights(folder: Any) -> list[str]:
    """Replaces all weights of a saved pipeline by pickled ones; returns their paths."""
    from pathlib import Path

    from safetensors.torch import load_file

    pickles = []
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
        pickles.append(f"{path.parent.name}/{name}")
    return pickles
