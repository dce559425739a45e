"""Class-conditional `UNet2DModel` generators in place of a DiT."""

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from conftest import tiny_unet
from dsco_hf import DsCoPipeline, MatchingTargets, QuantileTargets, concentrate
from dsco_hf.sampling.flat import from_flat


NAMES = ("circle", "square", "triangle")
OPTIONS = {"num_inference_steps": 5, "output_type": "pt", "step_size": 0.2}


def unet_pipe(make, *, classifier=True, **options):
    pipe = DsCoPipeline(
        None,
        DDIMScheduler(clip_sample=True),
        classifier=make.convnet() if classifier else None,
        id2label=dict(enumerate(NAMES)),
        unet=tiny_unet(**options),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def guided_pipe(make):
    return unet_pipe(make)


@pytest.fixture
def unet_targets(guided_pipe, real_images):
    return MatchingTargets.from_dataset(real_images, guided_pipe, features={}, embedding_dim=64, progress=False)


def draw(pipe, make, targets=None, labels=(0, 0, 1, 2), *, scale=2.0, **options):
    seeds = range(10, 10 + len(labels))
    return pipe(
        list(labels),
        targets,
        generator=make.generators(seeds),
        guidance_scale=scale,
        **from_flat({**OPTIONS, **options}),
    )


def test_what_the_unet_says_of_itself(guided_pipe):
    assert guided_pipe.denoiser is guided_pipe.unet and guided_pipe.transformer is None
    assert (guided_pipe.num_classes, guided_pipe.null_class) == (3, 3)
    assert (guided_pipe.image_size, guided_pipe.num_channels, guided_pipe.vae_scale_factor) == (8, 1, 1)
    assert guided_pipe.get_label_ids(["triangle", 0]) == [2, 0]
    with pytest.raises(ValueError, match="outside the generator's 3 classes"):
        guided_pipe.get_label_ids([3])


def test_plain_sampling_by_hand(guided_pipe, make):
    """diffusers' scheduler with the UNet's own call and guidance written out."""
    found = guided_pipe(
        [0, 2], generator=torch.Generator().manual_seed(3), guidance_scale=2.0, **from_flat(OPTIONS)
    ).images
    generator, labels = torch.Generator().manual_seed(3), torch.tensor([0, 2, 3, 3])
    scheduler = DDIMScheduler.from_config(guided_pipe.scheduler.config)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = guided_pipe.unet(torch.cat([x, x]), t, class_labels=labels).sample
            noise_pred = both[2:] + 2.0 * (both[:2] - both[2:])
            z = torch.randn(2, 1, 8, 8, generator=generator)
            x = scheduler.step(noise_pred, t, x, eta=1.0, use_clipped_model_output=True, variance_noise=z).prev_sample
    assert torch.equal(found, (x / 2 + 0.5).clamp(0, 1)) and found.std() > 0.1


def test_classes_and_guidance_change_the_images(guided_pipe, make):
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    images = guided_pipe(
        [0, 1, 2], latents=latents, generator=make.generators([5, 5, 5]), guidance_scale=1.0, **from_flat(OPTIONS)
    ).images
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    assert not torch.equal(draw(guided_pipe, make, scale=1.0).images, draw(guided_pipe, make, scale=3.0).images)


def test_noise_optimisation_lowers_the_discrepancy(guided_pipe, unet_targets, make):
    plain = draw(guided_pipe, make)
    output = draw(guided_pipe, make, unet_targets, optimize_from=0.0, optimization_steps=4, step_size=0.1)
    assert output.discrepancies.shape == (16, 3)
    assert (output.discrepancies[3::4] < output.discrepancies[::4]).all()  # within each sampling step
    assert torch.equal(draw(guided_pipe, make, unet_targets, optimization_steps=0).images, plain.images)
    again = draw(guided_pipe, make, unet_targets, optimize_from=0.0, optimization_steps=4, step_size=0.1)
    assert torch.equal(again.images, output.images)


@pytest.mark.parametrize("objective", ["rkhs", "quantile"])
def test_micro_batches_give_the_images_of_the_full_batch(guided_pipe, unet_targets, real_images, make, objective):
    targets, options = unet_targets, {}
    if objective == "quantile":
        targets = QuantileTargets.from_dataset(real_images, guided_pipe, draws=2, progress=False)
        options = {"objective": "quantile", "optimization_steps": 2}
    whole = draw(guided_pipe, make, targets, **options)
    parts = draw(guided_pipe, make, targets, batch_size=3, **options)
    torch.testing.assert_close(parts.images, whole.images, atol=1e-3, rtol=0)


def test_save_and_load(guided_pipe, unet_targets, make, tmp_path):
    classifier = copy.deepcopy(guided_pipe.classifier)
    plain, optimised = draw(guided_pipe, make).images, draw(guided_pipe, make, unet_targets).images
    guided_pipe.register_modules(classifier=None)  # of our own class: no component, it is passed
    guided_pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["transformer"] == [None, None]
    loaded = DsCoPipeline.from_pretrained(tmp_path, classifier=classifier)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer is None and loaded.null_class == 3
    assert torch.equal(draw(loaded, make).images, plain)
    assert torch.equal(draw(loaded, make, unet_targets).images, optimised)


def test_a_checkpoint_of_diffusers_own_unet_pipeline(make, tmp_path):
    """DDPMPipeline's folder: no names, no null class, and a scheduler that has to be replaced."""
    DDPMPipeline(tiny_unet(embeddings=3), DDPMScheduler()).save_pretrained(tmp_path)
    pipe = DsCoPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.num_classes, pipe.null_class) == (3, None)
    with pytest.raises(ValueError, match="DDPMScheduler.*DDIMScheduler.from_config"):
        draw(pipe, make, scale=1.0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert draw(pipe, make, scale=1.0).images.isfinite().all()


def test_without_a_null_class_guidance_is_refused(make):
    pipe = unet_pipe(make, classifier=False, embeddings=3)
    assert (pipe.num_classes, pipe.null_class) == (3, None)
    with pytest.raises(ValueError, match=r"`guidance_scale=2.0` needs a null class.*`guidance_scale=1.0`"):
        draw(pipe, make)
    assert draw(pipe, make, scale=1.0).denoiser_calls == 5 * 4


def test_learned_variances_are_ignored(make):
    pipe = unet_pipe(make, classifier=False, out_channels=2)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(400), torch.tensor([0, 2])
    with torch.no_grad():
        expected = pipe.unet(x, t, class_labels=labels).sample
    assert expected.shape[1] == 2
    torch.testing.assert_close(pipe.predict_noise(x, t, labels, 1.0), expected[:, :1])


def test_latent_unet(make):
    pipe = DsCoPipeline(
        scheduler=DDIMScheduler(clip_sample=False),
        vae=make.vae(channels=3),
        classifier=make.resnet(names=NAMES),
        id2label=dict(enumerate(NAMES)),
        unet=tiny_unet(channels=4, sample_size=4),
    )
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.image_size, pipe.num_channels) == (8, 3)
    targets = MatchingTargets.from_dataset(make.images((3, 3, 3)), pipe, embedding_dim=32, progress=False)
    output = draw(pipe, make, targets)
    assert output.images.shape == (4, 3, 8, 8) and output.decoder_calls == 4 * (1 + 1)  # step 3 of 0..4


def test_concentrate_and_data_free_targets(guided_pipe):
    options = {"num_inference_steps": 4, "guidance_scale": 1.5}
    targets = MatchingTargets.from_generator(
        guided_pipe, samples_per_class=4, embedding_dim=32, progress=False, **options
    )
    small = concentrate(guided_pipe, targets, 3, block_size=2, progress=False, **options)
    assert small["label"] == [0, 0, 0, 1, 1, 1, 2, 2, 2] and small[0]["image"].size == (8, 8)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({}, "one denoiser, got neither of `transformer`.*pass exactly one"),
        ({"transformer": True, "unet": True}, "one denoiser, got both"),
        ({"unet": "plain"}, "not conditioned on classes: num_class_embeds=None"),
        ({"unet": "timestep"}, "class_embed_type='timestep'"),
        ({"unet": True, "scheduler": None}, "no scheduler: pass `scheduler=DDIMScheduler"),
    ],
)
def test_incomplete_pipelines(make, components, message):
    unets = {
        True: tiny_unet,
        "plain": lambda: tiny_unet(embeddings=None),
        "timestep": lambda: tiny_unet(class_embed_type="timestep"),
    }
    arguments = {"scheduler": DDIMScheduler()} | components
    if "unet" in components:
        arguments["unet"] = unets[components["unet"]]()
    if "transformer" in components:
        arguments["transformer"] = make.transformer()
    with pytest.raises(ValueError, match=message):
        DsCoPipeline(**arguments)


@pytest.mark.parametrize(
    ("size", "message"), [(7, "multiple of 2, for example 8"), (None, "must be one whole number")]
)
def test_sizes_that_the_unet_cannot_take(make, size, message):
    pipe = unet_pipe(make, classifier=False, sample_size=size)
    with pytest.raises(ValueError, match=message):
        draw(pipe, make)


def test_square_sizes_may_be_given_as_a_pair(make):
    pipe = unet_pipe(make, classifier=False, sample_size=(8, 8))
    assert pipe.image_size == 8 and draw(pipe, make).images.shape == (4, 1, 8, 8)
