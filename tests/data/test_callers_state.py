"""What we are given is left as it was: modes, precisions, devices, gradients, random states, formats, environment."""

import os
import random
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch

from dsco_hf import (
    Clarity,
    MatchingTargets,
    QuantileTargets,
    build_evaluator,
    concentrate,
    concentrate_to_folder,
    dope,
    get_protocol,
    save_dataset_folder,
    select,
    train_evaluator,
)
from dsco_hf.data.datasets import stratified_split
from dsco_hf.evaluators import load_image_set


pytest.importorskip("sklearn.model_selection")  # its first import draws a random number


SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0, "progress": False}
SHORT = get_protocol("quick", epochs=None, steps=2)


def of_process():
    """All that a library could change of the process, but what it is asked for."""
    return {
        "random": random.getstate(),
        "numpy": tuple(np.random.get_state()[1].tolist()),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "environment": dict(os.environ),
        "pillow": (PIL.Image.MAX_IMAGE_PIXELS, PIL.Image.LOAD_TRUNCATED_IMAGES)
        if hasattr(PIL.Image, "LOAD_TRUNCATED_IMAGES")
        else PIL.Image.MAX_IMAGE_PIXELS,
    }


def of_model(model):
    return {
        "modes": [module.training for module in model.modules()],
        "gradients": [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
        "places": [(parameter.dtype, parameter.device) for parameter in model.parameters()],
        "weights": [tensor.clone() for tensor in model.state_dict().values()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def same(before, after):
    for key in before:
        if key == "weights":
            assert all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True)), key
        else:
            assert before[key] == after[key], key


def of_dataset(dataset):
    format = dict(dataset.format)
    return {key: format[key] for key in ("type", "columns")} | {"features": dataset.features, "rows": len(dataset)}


CALLS = {
    "targets": lambda pipe, real, small, folder: MatchingTargets.from_dataset(real, pipe, progress=False),
    "data-free targets": lambda pipe, real, small, folder: MatchingTargets.from_generator(
        pipe, samples_per_class=2, num_inference_steps=2, guidance_scale=1.0, progress=False
    ),
    "quantile targets": lambda pipe, real, small, folder: QuantileTargets.from_dataset(real, pipe, progress=False),
    "concentrate": lambda pipe, real, small, folder: concentrate(
        pipe, MatchingTargets.from_dataset(real, pipe, embedding_dim=64, progress=False), 1, **SAMPLING
    ),
    "run": lambda pipe, real, small, folder: concentrate_to_folder(
        pipe, MatchingTargets.from_dataset(real, pipe, embedding_dim=64, progress=False), 1, folder, **SAMPLING
    ),
    "dope by herding": lambda pipe, real, small, folder: dope(small, real, pipe, images_per_class=2, progress=False),
    "dope by clarity": lambda pipe, real, small, folder: dope(
        small, real, pipe, images_per_class=2, strategy=Clarity(protocol=SHORT), progress=False
    ),
    "clearest": lambda pipe, real, small, folder: select(real, "clearest", pipe=pipe, progress=False),
    "split": lambda pipe, real, small, folder: stratified_split(real, test_size=3, seed=0),
    "images": lambda pipe, real, small, folder: load_image_set(real, protocol=SHORT, num_channels=1),
    "save": lambda pipe, real, small, folder: save_dataset_folder(small, folder / "saved"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shown", ["plain", "torch", "transform"])
def test_a_call_leaves_everything_as_it_was(name, shown, pipe, real_images, make, tmp_path):
    show = {
        "plain": lambda dataset: dataset,
        "torch": lambda dataset: dataset.with_format("torch", columns=["label"]),
        "transform": lambda dataset: dataset.with_transform(lambda rows: {"image": [0], "label": [0]}),
    }[shown]
    real, small = show(real_images), show(make.images((1, 1, 1), seed=4))
    models = [pipe.transformer, pipe.classifier]
    next(pipe.classifier.parameters()).requires_grad_(False)
    before = [of_process(), *map(of_model, models), *map(of_dataset, (real, small))]
    CALLS[name](pipe, real, small, tmp_path)
    for old, new in zip(before, [of_process(), *map(of_model, models), *map(of_dataset, (real, small))], strict=True):
        same(old, new)


def test_a_call_that_fails_leaves_everything_as_it_was(pipe, real_images, targets, monkeypatch):
    before = [of_process(), of_model(pipe.transformer), of_model(pipe.classifier)]
    settings = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
    calls = []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory, say")
        return type(pipe.transformer).forward(pipe.transformer, *arguments, **options)

    monkeypatch.setattr(pipe.transformer, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        concentrate(pipe, targets, 1, **{**SAMPLING, "num_inference_steps": 6})
    monkeypatch.undo()
    for old, new in zip(before, [of_process(), of_model(pipe.transformer), of_model(pipe.classifier)], strict=True):
        same(old, new)
    assert concentrate(pipe, targets, 1, **SAMPLING)["seed"][:]  # and works again
    assert set(settings) <= set(vars(pipe))


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_and_a_student_keep_their_modes_and_precision(training, make, real_images):
    images = load_image_set(real_images, protocol=SHORT, num_channels=1)
    protocol = get_protocol("quick", epochs=None, steps=2, label_type="teacher")
    teacher, student = make.convnet(seed=5).to(torch.float64).train(training), make.convnet()
    before = of_model(teacher), of_process()
    train_evaluator(student, images, protocol=protocol, teacher=teacher)
    same(before[0], of_model(teacher))
    same(before[1], of_process())
    kept = images.pixels.clone()
    build = partial(build_evaluator, "convnet-2", class_names=list("abc"), image_size=8, num_channels=1, width=4)
    train_evaluator(build, images, protocol=SHORT, seed=3)
    assert torch.equal(kept, images.pixels)
    same(before[1], of_process())
