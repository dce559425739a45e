import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from dsco_hf import DsCoPipeline, MatchingTargets, QuantileTargets
from dsco_hf.sampling.flat import from_flat


PASSES = []


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Notes every pass through a denoiser."""
    predict = DsCoPipeline.predict_noise
    monkeypatch.setattr(DsCoPipeline, "predict_noise", lambda *given: PASSES.append(1) or predict(*given))
    PASSES.clear()


def nothing_ran(pipe):
    return not PASSES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": -4}, "at least 1, got -4"),
        ({"num_inference_steps": 2.5}, "at least 1, got 2.5"),
        ({"optimization_steps": -1}, "`iterations` must be a whole number of at least 1, got -1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"eta": 1.5}, "`eta` must be a number from 0 to 1, got 1.5"),
        ({"eta": -0.1}, "`eta` must be"),
        ({"optimize_from": 1.1}, "`start` must be a number from 0 to 1"),
        ({"optimize_until": -1}, "`stop` must be a number from 0 to 1"),
        ({"optimize_from": 0.8, "optimize_until": 0.5}, "`start=0.8` must not exceed `stop=0.5`"),
        ({"step_decay": 1.5}, "`step_decay` must be a number from 0 to 1"),
        ({"contrast": -1.0}, "`contrast` must be a finite number of at least 0, got -1.0"),
        ({"contrast": float("nan")}, "`contrast` must be"),
        ({"objective": "ridge", "regularization": 0.0}, "`regularization` must be a finite number above 0, got 0.0"),
        ({"objective": "ridge", "regularization": float("inf")}, "`regularization` must be"),
        ({"objective": "ridge", "regularization": float("nan")}, "`regularization` must be"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a finite number of at least 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be"),
        ({"step_size": float("inf")}, "`step_size` must be"),
        ({"objective": "rigde"}, "`objective` must be one of .*got 'rigde'. Nearest: 'ridge'"),
        ({"output_type": "pli"}, "`output_type` must be one of .*Nearest: 'pil'"),
        ({"lookahead": "guide"}, "`lookahead` must be one of .*Nearest: 'guided'"),
        (
            {"callback_on_step_end_tensor_inputs": ["latent"]},
            "`callback_on_step_end_tensor_inputs` must be one of .*Nearest: 'latents'",
        ),
        ({"generator": [torch.Generator()]}, "Got 1 generators for 2 images"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, re.escape("`latents` must have shape (2, 1, 8, 8)")),
    ],
)
def test_arguments_that_cannot_work(pipe, targets, options, message):
    with pytest.raises(ValueError, match=message):
        pipe([0, 1], targets, **from_flat(options))
    assert nothing_ran(pipe)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "`class_labels` is empty"),
        ("circle", r"must be a list, got 'circle': pass `\['circle'\]`"),
        (["cirle"], "no class 'cirle'. Nearest: 'circle'"),
        ([0, 3], "Class 3 is outside the generator's 3 classes: pass 0 to 2"),
        ([-1], "Class -1 is outside"),
    ],
)
def test_class_labels_that_do_not_exist(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels, num_inference_steps=1)
    assert nothing_ran(pipe)


def test_names_of_a_generator_without_names(make):
    pipe = make.pipe()
    pipe.labels, pipe.id2label = {}, {}
    with pytest.raises(ValueError, match="no class 'circle'.*no class names .*pass indices"):
        pipe(["circle"])


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_scheduler_that_takes_no_noise(pipe, scheduler):
    pipe.scheduler = scheduler()
    with pytest.raises(ValueError, match=f"{scheduler.__name__}.*DDIMScheduler.from_config"):
        pipe([0], num_inference_steps=2)


@pytest.mark.parametrize("name", ["transformer", "vae", "classifier", "preview_vae"])
def test_components_in_train_mode(latent_pipe, make, name):
    images = make.images((2, 2, 2), names=("tench", "goldfish", "chainsaw"))
    targets = MatchingTargets.from_dataset(images, latent_pipe, embedding_dim=16, progress=False)
    latent_pipe.register_modules(preview_vae=make.vae(channels=3, seed=5))
    call = {"targets": targets, "num_inference_steps": 2, "guidance_scale": 1.0}
    latent_pipe([0], **call)
    getattr(latent_pipe, name).train()
    with pytest.raises(ValueError, match=rf"`{name}` is in train mode.*pipe\.{name}\.eval\(\)"):
        latent_pipe([0], **call)


def test_plain_sampling_asks_nothing_of_the_classifier(pipe):
    pipe.classifier.train()
    assert len(pipe([0], num_inference_steps=1).images) == 1


def test_vae_that_does_not_fit(latent_pipe, make):
    latent_pipe.vae = make.vae(channels=3, latent_channels=2)
    with pytest.raises(ValueError, match="VAE has 2 latent channels, the transformer takes 4"):
        latent_pipe([0], num_inference_steps=1)


def test_missing_classifier(pipe, targets, make):
    bare = make.pipe()
    with pytest.raises(ValueError, match="the pipeline has none: pass `classifier=`"):
        bare([0], targets)
    with pytest.raises(ValueError, match="'classifier' objective needs a classifier"):
        bare([0], objective="classifier")


@pytest.mark.parametrize("options", [{"seed": 9}, {"width": 8}])
def test_targets_of_another_classifier(targets, make, options):
    pipe = make.pipe(classifier=make.convnet(**options))
    with pytest.raises(ValueError, match="another classifier|is not the one"):
        pipe([0], targets)
    assert nothing_ran(pipe)


def test_objectives_and_targets_must_fit(pipe, targets, real_images):
    quantiles = QuantileTargets.from_dataset(real_images, pipe, progress=False)
    with pytest.raises(ValueError, match="'classifier' objective uses no targets"):
        pipe([0], targets, objective="classifier")
    with pytest.raises(ValueError, match="takes QuantileTargets, got MatchingTargets.*QuantileTargets.from_dataset"):
        pipe([0], targets, method="released")
    with pytest.raises(ValueError, match="takes MatchingTargets, got QuantileTargets"):
        pipe([0], quantiles)
    with pytest.raises(ValueError, match="takes MatchingTargets, got ndarray"):
        pipe([0], np.zeros(3))
    with pytest.raises(ValueError, match="`objective` is a field of 'nopt', and 'plain' has none: leave it out"):
        pipe([0], targets, method="plain", objective="ridge")
    with pytest.raises(ValueError, match="`method` must be one of .*'nopt'.*got 'npot'"):
        pipe([0], targets, method="npot")
    with pytest.raises(TypeError, match="`objective` must be one of .*'rkhs', .*below Objective, got 3"):
        pipe([0], targets, objective=3)


def test_ridge_needs_classes_to_tell_apart(pipe, make):
    one = make.images((3,), names=("square",))
    targets = MatchingTargets.from_dataset(one, pipe, embedding_dim=32, second_moment=True, progress=False)
    with pytest.raises(ValueError, match=r"tells classes apart, and the targets have only \['square'\]"):
        pipe([1], targets, objective="ridge")
    assert nothing_ran(pipe)


def test_class_without_target(pipe, make):
    images = make.images((2, 2), names=("circle", "triangle"))
    targets = MatchingTargets.from_dataset(images, pipe, embedding_dim=16, progress=False)
    with pytest.raises(ValueError, match=r"no targets for class\(es\) \[1\]"):
        pipe([0, 1], targets, num_inference_steps=2)
    assert nothing_ran(pipe)


def test_classifier_of_other_classes(make):
    pipe = make.pipe(classifier=make.convnet(names=("cat", "dog", "cow")))
    with pytest.raises(ValueError, match="'circle'"):
        pipe([0], objective="classifier", num_inference_steps=2)
