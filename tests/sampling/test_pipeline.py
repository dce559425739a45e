import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dsco_hf import (
    DsCoPipeline,
    DsCoPipelineOutput,
    MatchingTargets,
    NOpt,
    QuantileTargets,
    Sampling,
    measure_discrepancy,
)
from dsco_hf.matching.features import Observation
from dsco_hf.sampling.flat import from_flat
from dsco_hf.sampling.methods.noise import joint_gradient, loss_gradient
from dsco_hf.sampling.methods.nopt import observation, optimized_steps, preview


LABELS = [0, 0, 1, 2, 2, 2]
SEEDS = list(range(10, 16))
PLAIN = {"num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "pt"}
NOPT = {**PLAIN, "step_size": 0.1}


def draw(pipe, make, labels=LABELS, targets=None, *, seeds=SEEDS, **options):
    return pipe(labels, targets, generator=make.generators(seeds), **from_flat({**NOPT, **options}))


@pytest.fixture
def latent_targets(latent_pipe, make):
    images = make.images((4, 4, 4), names=("tench", "goldfish", "chainsaw"))
    return MatchingTargets.from_dataset(images, latent_pipe, features={}, embedding_dim=128, progress=False)


def test_plain_sampling_is_ancestral_ddim(pipe, make):
    """Against diffusers' own scheduler loop, which draws the same noise from the same generator."""
    found = pipe([0, 2], generator=torch.Generator().manual_seed(3), **PLAIN)
    generator, labels = torch.Generator().manual_seed(3), torch.tensor([0, 2, 3, 3])
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = pipe.transformer(torch.cat([x, x]), timestep=t.expand(4), class_labels=labels).sample
            noise_pred = both[2:] + 2.0 * (both[:2] - both[2:])
            z = torch.randn(2, 1, 8, 8, generator=generator)
            x = scheduler.step(noise_pred, t, x, eta=1.0, use_clipped_model_output=True, variance_noise=z).prev_sample
    assert torch.equal(found.images, (x / 2 + 0.5).clamp(0, 1))
    assert found.images.std() > 0.1
    assert isinstance(found, DsCoPipelineOutput) and found.class_labels == [0, 2]
    assert found.discrepancies.shape == (0, 2)


@pytest.mark.parametrize(
    "options", [{"optimization_steps": 0}, {"optimize_from": 1.0}, {"optimize_from": 0.0, "optimize_until": 0.0}]
)
def test_no_optimisation_is_plain_sampling_bit_for_bit(pipe, targets, make, options):
    plain = draw(pipe, make)
    nothing = draw(pipe, make, targets=targets, **options)
    assert torch.equal(plain.images, nothing.images) and nothing.classifier_calls == 0
    assert nothing.denoiser_calls == plain.denoiser_calls
    assert not torch.equal(draw(pipe, make, targets=targets).images, plain.images)


def test_without_variance_there_is_nothing_to_optimise(pipe, targets, make):
    plain, optimised = draw(pipe, make, eta=0.0), draw(pipe, make, targets=targets, eta=0.0)
    assert torch.equal(plain.images, optimised.images)


@pytest.mark.parametrize("objective", ["plain", "rkhs", "classifier", "quantile"])
def test_a_repeated_call_is_bit_equal(pipe, targets, make, real_images, objective):
    target = {"rkhs": targets, "quantile": QuantileTargets.from_dataset(real_images, pipe, progress=False)}
    options = {} if objective == "plain" else {"objective": objective, "targets": target.get(objective)}
    if objective == "quantile":
        options["optimization_steps"] = 3
    first, again = draw(pipe, make, **options), draw(pipe, make, **options)
    assert torch.equal(first.images, again.images) and torch.equal(first.discrepancies, again.discrepancies)
    other = draw(pipe, make, seeds=[s + 1 for s in SEEDS], **options)
    assert (other.images - first.images).flatten(1).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("objective", ["plain", "rkhs", "quantile"])
@pytest.mark.parametrize("rows", [[0, 1], [2], [3, 4, 5]])
def test_a_class_is_the_same_alone_and_in_a_batch_of_classes(pipe, targets, make, real_images, objective, rows):
    target = {"rkhs": targets, "quantile": QuantileTargets.from_dataset(real_images, pipe, progress=False)}
    options = {"objective": "rkhs" if objective == "plain" else objective, "targets": target.get(objective)}
    if objective == "quantile":
        options["optimization_steps"] = 3
    together = draw(pipe, make, **options)
    alone = draw(pipe, make, [LABELS[r] for r in rows], seeds=[SEEDS[r] for r in rows], **options)
    torch.testing.assert_close(alone.images, together.images[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_micro_batches_give_the_images_of_the_full_batch(request, make, space):
    pipe = request.getfixturevalue("pipe" if space == "pixels" else "latent_pipe")
    targets = request.getfixturevalue("targets" if space == "pixels" else "latent_targets")
    whole = draw(pipe, make, targets=targets)
    for batch_size in (1, 4):
        parts = draw(pipe, make, targets=targets, batch_size=batch_size)
        torch.testing.assert_close(parts.images, whole.images, atol=1e-3, rtol=0)
        torch.testing.assert_close(parts.discrepancies, whole.discrepancies, atol=1e-3, rtol=0)
    assert torch.equal(draw(pipe, make, batch_size=4).images.isfinite(), torch.ones_like(whole.images).bool())
    torch.testing.assert_close(draw(pipe, make, batch_size=4).images, draw(pipe, make).images, atol=1e-5, rtol=0)


def one_step(pipe, targets, *, steps=6, i=3, labels=LABELS, scale=2.0, **method):
    """The middle of a call: the call, latents, predicted noise, noise to optimise, classes."""
    nopt = NOpt(**{"start": 0.6, "step_size": 0.1, **method})
    call = pipe.start_call(labels, targets, Sampling(steps, scale, method=nopt))
    nopt.prepare(call)
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    shape = (2, len(labels), config.in_channels, config.sample_size, config.sample_size)
    latents, noise = torch.randn(shape, generator=generator).to(pipe.transformer.dtype)
    noise_pred = call.predict_noise(latents, call.timesteps[i])
    return call, latents, noise_pred, noise, call.labels


def preview_loss(call, i, latents, noise_pred, noise, lookahead):
    """What is minimised, once more: (observation of noise, loss of observations)."""
    look = observation(call, call.state, preview(call, i, latents, noise_pred, noise, lookahead))
    return look, lambda seen: call.state(Observation(*seen))


@pytest.mark.parametrize("lookahead", ["conditional", "guided", "none"])
@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_gradient_of_the_noise_equals_finite_differences(request, space, lookahead):
    """Through step, decoder and classifier, with the denoiser's answers held fixed; models in float64."""
    pipe = request.getfixturevalue("pipe" if space == "pixels" else "latent_pipe")
    targets = request.getfixturevalue("targets" if space == "pixels" else "latent_targets")
    for name in ("transformer", "classifier", "vae"):
        if getattr(pipe, name) is not None:
            getattr(pipe, name).double()
    if lookahead == "none":  # clipped predictions would lie exactly on the kink of the clipping of pixels
        pipe.scheduler.register_to_config(clip_sample=False)
    call, latents, noise_pred, noise, _ = one_step(pipe, targets)
    look, loss = preview_loss(call, 3, latents, noise_pred, noise, lookahead)
    losses, gradient = loss_gradient(noise, lambda z: loss(look(z, slice(None))))
    assert losses.shape == (3,) and gradient.flatten(1).norm(dim=1).min() > 1e-6
    in_parts, gradient_in_parts = joint_gradient(noise, look, loss, batch_size=4)
    torch.testing.assert_close(gradient_in_parts, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(in_parts, losses)
    generator = torch.Generator().manual_seed(1)
    for k in range(4):
        direction = gradient if k == 0 else torch.randn(noise.shape, generator=generator).double()
        direction, step = direction / direction.norm(), 5e-4
        with torch.no_grad():
            up, down = (loss(look(noise + s * step * direction, slice(None))).double().sum() for s in (1, -1))
        slope = (gradient * direction).sum().item()
        # features are float32 from here on, and clipping and ReLU have kinks
        assert ((up - down) / (2 * step)).item() == pytest.approx(slope, rel=0.03, abs=0.03 * gradient.norm().item())


def test_the_pipeline_moves_noise_along_that_gradient(pipe, targets):
    call, latents, noise_pred, noise, _ = one_step(pipe, targets)
    look, loss = preview_loss(call, 3, latents, noise_pred, noise, "conditional")
    losses, gradient = loss_gradient(noise, lambda z: loss(look(z, slice(None))))
    before = call.counts["classifier_backward"]
    moved = call.method.noise(call, 3, latents, noise_pred, noise)
    torch.testing.assert_close(call.discrepancies[0], losses)
    assert call.counts["classifier_backward"] == before + len(LABELS)
    radius = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    by_hand = noise - 0.1 * radius * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    by_hand = by_hand / by_hand.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * radius
    torch.testing.assert_close(moved, by_hand)


@pytest.mark.parametrize("i", [1, 2, 3, 4])
@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_a_small_step_lowers_the_predicted_discrepancy(request, space, i):
    pipe = request.getfixturevalue("pipe" if space == "pixels" else "latent_pipe")
    targets = request.getfixturevalue("targets" if space == "pixels" else "latent_targets")
    call, latents, noise_pred, noise, _ = one_step(pipe, targets, i=i, start=0.0, step_size=0.01, step_decay=1.0)
    moved = call.method.noise(call, i, latents, noise_pred, noise)
    look, loss = preview_loss(call, i, latents, noise_pred, noise, "conditional")
    with torch.no_grad():
        before, after = (loss(look(z, slice(None))) for z in (noise, moved))
    assert (after < before).all(), (before, after)


def test_optimised_images_are_nearer_to_the_targets(pipe, targets, make):
    def distance(**options):
        output = draw(pipe, make, optimize_from=0.0, num_inference_steps=10, **options)
        with torch.no_grad():
            return measure_discrepancy(output.images * 2 - 1, torch.tensor(LABELS), pipe, targets)

    plain, optimised = distance(), distance(targets=targets, optimization_steps=3)
    assert set(plain) == {"circle", "square", "triangle"}
    assert all(optimised[name] < plain[name] for name in plain)


def test_noise_keeps_its_norm(pipe, targets, make):
    def noises(**options):
        seen = []

        def record(_, step, t, tensors):
            seen.append(tensors["noise"].clone())
            return {}

        inputs = {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": ["noise"]}
        draw(pipe, make, **options, **inputs)
        return torch.stack(seen)

    plain, optimised = noises(), noises(targets=targets, optimization_steps=2)
    torch.testing.assert_close(optimised.flatten(2).norm(dim=2), plain.flatten(2).norm(dim=2), rtol=1e-5, atol=0)
    same = (optimised == plain).flatten(2).all(dim=2)
    assert same[[0, 1, 2, 5]].all() and not same[3:5].any()  # steps 3 and 4 of 0..5: the later half without the last


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((50, 0.5, 1.0), range(25, 49)),
        ((6, 0.0, 1.0), range(5)),
        ((6, 0.0, 0.5), range(3)),
        ((5, 0.5, 0.9), range(2, 4)),
        ((1, 0.0, 1.0), range(0)),
    ],
)
def test_optimised_steps(arguments, expected):
    assert list(optimized_steps(*arguments)) == list(expected)


def test_discrepancies_are_one_row_per_update_and_one_column_per_class(pipe, targets, make):
    output = draw(pipe, make, targets=targets, optimize_from=0.0, optimization_steps=2)
    assert output.discrepancies.shape == (10, 3)  # 5 steps with variance, 2 updates each
    assert output.discrepancies.isfinite().all() and (output.discrepancies > 0).all()
    two = draw(pipe, make, [2, 0], seeds=[1, 2], targets=targets)
    one = draw(pipe, make, [2], seeds=[1], targets=targets)
    torch.testing.assert_close(two.discrepancies[:, 1:], one.discrepancies, atol=1e-5, rtol=0)  # ascending classes


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("lookahead", ["conditional", "guided", "none"])
@pytest.mark.parametrize("updates", [1, 2])
def test_calls_are_counted(latent_pipe, latent_targets, make, scale, lookahead, updates):
    seen = {"transformer": [], "decoder": [], "classifier": []}
    for name, module in (
        ("transformer", latent_pipe.transformer),
        ("decoder", latent_pipe.vae.decoder),
        ("classifier", latent_pipe.classifier),
    ):
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(
                len(args[0] if args else next(iter(kwargs.values())))
            ),
            with_kwargs=True,
        )
    options = {"optimization_steps": updates, "lookahead": lookahead, "guidance_scale": scale}
    latent_targets.check_pipeline(latent_pipe)
    probes = len(seen["classifier"])  # passes of the check that the classifier is the right one
    assert probes > 0
    seen["classifier"].clear()
    output = draw(latent_pipe, make, targets=latent_targets, **options)
    branches, ahead = (
        (2 if scale > 1 else 1),
        {"conditional": 1, "guided": 2 if scale > 1 else 1, "none": 0}[lookahead],
    )
    optimised = 2 * updates  # steps 3 and 4 of 0..5
    assert output.denoiser_calls == 6 * (6 * branches + optimised * ahead) == sum(seen["transformer"])
    assert output.decoder_calls == 6 * (1 + optimised) == sum(seen["decoder"])
    assert output.classifier_calls == 6 * optimised == sum(seen["classifier"][probes:])
    # guidance is one batched call, not two
    assert len(seen["transformer"]) == 6 + (optimised if ahead else 0)
    assert max(seen["transformer"]) == 6 * max(branches, ahead)


def test_calls_in_micro_batches(latent_pipe, latent_targets, make):
    output = draw(latent_pipe, make, targets=latent_targets, batch_size=4)
    assert output.denoiser_calls == 6 * (6 * 2 + 2)
    assert output.decoder_calls == 6 * (1 + 2 * 2)  # two passes for the joint gradient
    assert output.classifier_calls == 6 * 2 * 2


def test_plain_calls_of_a_pixel_generator(pipe, make):
    output = draw(pipe, make)
    assert (output.denoiser_calls, output.decoder_calls, output.classifier_calls) == (72, 0, 0)
    assert draw(pipe, make, guidance_scale=1.0).denoiser_calls == 36


def test_null_class_is_the_one_after_the_last(pipe):
    asked = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    pipe([2, 0], **PLAIN)
    assert asked == [[2, 0, 3, 3]] * 6
    assert pipe.num_classes == pipe.transformer.config.num_embeds_ada_norm == 3


def test_guidance_scale_of_one_is_the_conditional_prediction(pipe):
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 1])
    conditional = pipe.predict_noise(x, t, labels, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(conditional, pipe.transformer(x, timestep=t.expand(2), class_labels=labels).sample)
    null = pipe.predict_noise(x, t, torch.tensor([3, 3]), 1.0)
    torch.testing.assert_close(pipe.predict_noise(x, t, labels, 3.0), null + 3 * (conditional - null))


def test_one_generator_a_list_or_none(pipe, make):
    one = pipe([0, 1], generator=torch.Generator().manual_seed(1), **PLAIN).images
    assert torch.equal(pipe([0, 1], generator=torch.Generator().manual_seed(1), **PLAIN).images, one)
    a, b = (pipe([0], generator=make.generators([seed]), **PLAIN).images for seed in (1, 2))
    both = pipe([0, 0], generator=make.generators([1, 2]), **PLAIN).images
    torch.testing.assert_close(both, torch.cat([a, b]), atol=1e-5, rtol=0)
    torch.manual_seed(5)
    free = pipe([0], **PLAIN).images
    torch.manual_seed(5)
    assert torch.equal(pipe([0], **PLAIN).images, free)


def test_initial_latents_are_used(pipe, make):
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    first, again = (draw(pipe, make, [0, 1], seeds=[1, 2], latents=latents).images for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(pipe, make, [0, 1], seeds=[1, 2], latents=-latents).images)
    generators = make.generators([1, 2])
    drawn = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators])
    rest = pipe([0, 1], generator=generators, latents=drawn, **PLAIN).images
    assert torch.equal(rest, draw(pipe, make, [0, 1], seeds=[1, 2]).images)


def test_names_and_indices_are_the_same_class(latent_pipe, make):
    by_index = draw(latent_pipe, make, [0, 1, 2, 2], seeds=range(4))
    by_name = draw(latent_pipe, make, ["Tinca tinca", "goldfish", "chain saw, chainsaw", "chainsaw"], seeds=range(4))
    assert torch.equal(by_index.images, by_name.images) and by_name.class_labels == [0, 1, 2, 2]


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_output_types(request, make, space):
    pipe = request.getfixturevalue("pipe" if space == "pixels" else "latent_pipe")
    channels = 1 if space == "pixels" else 3
    outputs = {
        kind: draw(pipe, make, [0, 1], seeds=[1, 2], output_type=kind) for kind in ("pil", "np", "pt", "latent")
    }
    tensors = outputs["pt"].images
    assert tensors.shape == (2, channels, 8, 8) and tensors.min() >= 0 and tensors.max() <= 1
    arrays = outputs["np"].images
    assert isinstance(arrays, np.ndarray) and np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    images = outputs["pil"].images
    assert all(isinstance(image, PIL.Image.Image) and image.size == (8, 8) for image in images)
    assert images[0].mode == ("L" if channels == 1 else "RGB")
    expected = (arrays * 255).round().astype(np.uint8)
    assert np.array_equal(np.stack([np.asarray(image).reshape(8, 8, channels) for image in images]), expected)
    latents = outputs["latent"].images
    if space == "pixels":
        assert latents.shape == (2, 1, 8, 8)
        torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), tensors)
    else:
        assert latents.shape == (2, 4, 4, 4) and outputs["latent"].decoder_calls == 0
        with torch.no_grad():
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensors)


def test_tuple(pipe, targets, make):
    output = draw(pipe, make, targets=targets)
    images, labels, discrepancies, denoiser, decoder, classifier = draw(pipe, make, targets=targets, return_dict=False)
    assert torch.equal(images, output.images) and labels == LABELS
    assert torch.equal(discrepancies, output.discrepancies)
    assert (denoiser, decoder, classifier) == (84, 0, 12)


def test_callback_sees_each_step_and_may_change_the_latents(pipe, targets, make):
    calls = []

    def record(self, step, t, tensors):
        assert self is pipe
        calls.append((step, t, sorted(tensors)))
        return {}

    inputs = {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": ["latents", "noise"]}
    watched = draw(pipe, make, targets=targets, **inputs)
    assert torch.equal(watched.images, draw(pipe, make, targets=targets).images)
    assert [step for step, _, _ in calls] == list(range(6))
    scheduler = copy.copy(pipe.scheduler)
    scheduler.set_timesteps(6)
    assert [t for _, t, _ in calls] == scheduler.timesteps.tolist()
    assert all(names == ["latents", "noise"] for _, _, names in calls)
    calls.clear()
    draw(pipe, make, callback_on_step_end=record)
    assert all(names == ["latents"] for _, _, names in calls)

    def blacken(self, step, t, tensors):
        return {"latents": torch.full_like(tensors["latents"], -1.0)} if step == 5 else None

    assert not draw(pipe, make, callback_on_step_end=blacken).images.any()


def test_progress_bar(pipe, make, capsys):
    pipe.set_progress_bar_config(disable=False, desc="Drawing")
    draw(pipe, make)
    shown = capsys.readouterr().err
    assert "Drawing" in shown and "6/6" in shown
    pipe.sample([0], seeds=[1], num_inference_steps=2)
    assert capsys.readouterr().err == ""
    assert pipe._progress_bar_config == {"disable": False, "desc": "Drawing"}
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, make)
    assert capsys.readouterr().err == ""


def test_sample_restores_the_progress_bar_after_an_error(pipe):
    pipe.set_progress_bar_config(desc="mine")
    with pytest.raises(ValueError, match="outside"):
        pipe.sample([7], seeds=[1])
    assert pipe._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_save_and_load_give_identical_pixels(request, tmp_path, make, space):
    pipe = request.getfixturevalue("pipe" if space == "pixels" else "latent_pipe")
    targets = request.getfixturevalue("targets" if space == "pixels" else "latent_targets")
    before, plain = draw(pipe, make, targets=targets).images, draw(pipe, make).images
    if space == "pixels":  # a class of our own is no component, it is passed
        classifier = copy.deepcopy(pipe.classifier)
        pipe.register_modules(classifier=None)
        pipe.save_pretrained(tmp_path)
        loaded = DsCoPipeline.from_pretrained(tmp_path, classifier=classifier)
    else:
        pipe.save_pretrained(tmp_path)
        loaded = DsCoPipeline.from_pretrained(tmp_path)
        assert loaded.classifier.config.image_size == 16
    assert torch.equal(draw(loaded, make).images, plain)
    assert torch.equal(draw(loaded, make, targets=targets).images, before)
    assert loaded.id2label == pipe.id2label and loaded.image_size == 8
    assert (loaded.vae is None) == (space == "pixels")


def test_dit_checkpoint_loads_and_samples_like_diffusers(dit_folder, latent_pipe, make):
    assert isinstance(latent_pipe.transformer, DiTTransformer2DModel) and isinstance(latent_pipe.vae, AutoencoderKL)
    assert latent_pipe.id2label[2] == "chain saw, chainsaw"
    assert (latent_pipe.image_size, latent_pipe.num_channels, latent_pipe.vae_scale_factor) == (8, 3, 2)
    assert latent_pipe.transformer.config.out_channels == 8  # learned sigma
    stock = DiTPipeline.from_pretrained(dit_folder)
    assert stock.transformer.config.num_embeds_ada_norm == latent_pipe.num_classes == 3
    x, t = torch.randn(2, 4, 4, 4), torch.tensor(300)
    ours = latent_pipe.predict_noise(x, t, torch.tensor([0, 2]), 1.0)
    with torch.no_grad():
        both = stock.transformer(x, timestep=t.expand(2), class_labels=torch.tensor([0, 2])).sample
    assert both.shape[1] == 8
    torch.testing.assert_close(ours, both[:, :4])
    bare = DsCoPipeline.from_pretrained(dit_folder)
    bare.set_progress_bar_config(disable=True)
    assert bare.classifier is None
    assert torch.equal(draw(bare, make).images, draw(latent_pipe, make).images)
    same = DsCoPipeline(**stock.components, id2label=latent_pipe.id2label)
    same.set_progress_bar_config(disable=True)
    assert torch.equal(draw(same, make).images, draw(bare, make).images)


def test_preview_decoder_is_for_previews_only(latent_pipe, latent_targets, make):
    plain, optimised = draw(latent_pipe, make), draw(latent_pipe, make, targets=latent_targets)
    latent_pipe.register_modules(preview_vae=make.vae(channels=3, seed=8))
    decoded = {"vae": 0, "preview_vae": 0}
    for name in decoded:
        getattr(latent_pipe, name).decoder.register_forward_pre_hook(
            lambda _, args, name=name: decoded.__setitem__(name, decoded[name] + len(args[0]))
        )
    assert torch.equal(draw(latent_pipe, make).images, plain.images)
    assert decoded == {"vae": 6, "preview_vae": 0}
    previewed = draw(latent_pipe, make, targets=latent_targets)
    assert decoded == {"vae": 12, "preview_vae": 12}
    assert previewed.decoder_calls == 18
    assert not torch.equal(previewed.images, optimised.images)


def test_lookaheads_differ_only_where_they_should(pipe, targets, make):
    images = {
        (mode, scale): draw(pipe, make, targets=targets, lookahead=mode, guidance_scale=scale).images
        for mode in ("conditional", "guided", "none")
        for scale in (1.0, 2.0)
    }
    assert torch.equal(images["conditional", 1.0], images["guided", 1.0])
    for other in ("guided", "none"):
        assert not torch.equal(images["conditional", 2.0], images[other, 2.0])


@pytest.mark.parametrize("lookahead", ["conditional", "guided", "none"])
def test_previews_by_the_formula(latent_pipe, latent_targets, lookahead):
    pipe, i = latent_pipe, 3
    call, x, eps, z, ids = one_step(pipe, latent_targets, i=i)
    moved = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    t, t_next = call.timesteps[i : i + 2].tolist()
    a, a_next = pipe.scheduler.alphas_cumprod[t], pipe.scheduler.alphas_cumprod[t_next]
    sigma = ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()  # eta = 1; Song et al. 2021, eq. 16
    clean = (x - (1 - a).sqrt() * eps) / a.sqrt()

    def ahead(noise):
        return a_next.sqrt() * clean + (1 - a_next - sigma**2).sqrt() * eps + sigma * noise

    if lookahead == "none":
        expected = clean + (ahead(moved) - ahead(z)) / a_next.sqrt()
    else:
        scale = 2.0 if lookahead == "guided" else 1.0
        eps_next = pipe.predict_noise(ahead(z), torch.tensor(t_next), ids, scale)  # at z, not where it has moved
        expected = (ahead(moved) - (1 - a_next).sqrt() * eps_next) / a_next.sqrt()
    found = preview(call, i, x, eps, z, lookahead)(moved[1:4], slice(1, 4))
    torch.testing.assert_close(found, expected[1:4], atol=1e-4, rtol=1e-4)


def test_previous_images_change_what_is_drawn(pipe, targets, make):
    counts = torch.tensor([5.0, 0.0, 0.0])
    sums = torch.zeros_like(targets.embeddings)
    sums[0] = -5 * targets.embeddings[0]
    alone = draw(pipe, make, targets=targets).images
    after = draw(pipe, make, targets=targets, previous=(sums, counts)).images
    same = (alone == after).flatten(1).all(dim=1)
    assert same[2:].all() and not same[:2].any()  # only class 0 has earlier images


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_classifier_objective_lowers_its_loss(request, make, space):
    pipe = request.getfixturevalue("pipe" if space == "pixels" else "latent_pipe")
    options = {
        "objective": "classifier",
        "classifier_objective": {"batchnorm": 0.05},
        "step_size": 0.05,
        "optimize_from": 0.8,
    }
    output = draw(pipe, make, num_inference_steps=8, optimization_steps=6, **options)
    assert output.discrepancies.shape == (6, 3)  # one step: 6 of 0..7, the last is left out
    assert (output.discrepancies[-1] < output.discrepancies[0]).all()
    assert output.classifier_calls == 36
    assert torch.equal(draw(pipe, make, objective="classifier", optimization_steps=0).images, draw(pipe, make).images)


def test_quantile_objective_counts_and_differs(pipe, real_images, make):
    targets = QuantileTargets.from_dataset(real_images, pipe, draws=2, progress=False)
    output = draw(pipe, make, targets=targets, objective="quantile", optimization_steps=4)
    assert output.discrepancies.shape == (2, 3) and output.classifier_calls == 2 * 4 * 6
    assert output.denoiser_calls == 72
    assert not torch.equal(output.images, draw(pipe, make).images)


def test_models_stay_as_they_are(pipe, targets, make):
    before = [copy.deepcopy(getattr(pipe, name).state_dict()) for name in ("transformer", "classifier")]
    draw(pipe, make, targets=targets, optimization_steps=2)
    for name, state in zip(("transformer", "classifier"), before, strict=True):
        module = getattr(pipe, name)
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


def test_no_gradient_through_the_denoiser(pipe, targets, make):
    enabled = []
    pipe.transformer.register_forward_pre_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    draw(pipe, make, targets=targets)
    assert enabled and not any(enabled)


def test_bfloat16(latent_pipe, latent_targets, make):
    latent_pipe.to(torch.bfloat16)
    output = draw(latent_pipe, make, targets=latent_targets)
    assert output.images.dtype == torch.float32 and output.images.isfinite().all()
    assert output.discrepancies.shape == (2, 3)


def test_classifier_registered_later_gets_its_preprocessing(make, real_images, tmp_path):
    pipe, resnet = make.pipe(), make.resnet()
    for name in ("image_size", "image_mean", "image_std"):
        delattr(resnet.config, name)
    resnet.config.name_or_path = resnet.name_or_path = str(tmp_path)
    pipe.register_modules(classifier=resnet)
    targets = MatchingTargets.from_dataset(real_images, pipe, features={}, embedding_dim=16, progress=False)
    assert resnet.config.image_size == 224 and targets.feature_dim == 6


def test_the_older_class_name_of_published_checkpoints_loads(dit_folder, tmp_path):
    """facebook/DiT-XL-2-256 was saved when the transformer was called Transformer2DModel."""
    folder = Path(shutil.copytree(dit_folder, tmp_path / "older"))
    for path, change in (
        (folder / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        (folder / "transformer" / "config.json", {"_class_name": "Transformer2DModel"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    pipe = DsCoPipeline.from_pretrained(folder)
    assert isinstance(pipe.transformer, DiTTransformer2DModel)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    older = pipe([0, 1], generator=torch.Generator().manual_seed(0), **options).images
    newer = DsCoPipeline.from_pretrained(dit_folder)(
        [0, 1], generator=torch.Generator().manual_seed(0), **options
    ).images
    assert torch.equal(older, newer)


def test_a_call_leaves_the_pipeline_as_it_was(pipe, targets, make):
    def state():
        return {name: repr(value) for name, value in vars(pipe).items()}, repr(pipe.scheduler.timesteps)

    def fail(*_):
        raise KeyError("stop")

    before = state()
    draw(pipe, make, targets=targets, batch_size=2)
    assert state() == before
    with pytest.raises(KeyError):
        draw(pipe, make, targets=targets, batch_size=2, callback_on_step_end=fail)
    assert state() == before


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["rkhs", "classifier"])
def test_two_threads_draw_with_one_pipeline(pipe, targets, make, objective):
    """Sets of other sizes, steps, guidance and seeds at the same time, each as if it were drawn alone."""
    chosen = targets if objective == "rkhs" else None
    jobs = [
        {"labels": [seed % 3, 2, 1][: 1 + seed % 3], "seeds": range(seed, seed + 1 + seed % 3),
         "batch_size": 1 + seed % 2, "num_inference_steps": 4 + seed, "guidance_scale": 1.0 + seed % 2,
         "optimize_from": 0.0}
        for seed in range(6)
    ]  # fmt: skip

    def run(job):
        return draw(pipe, make, targets=chosen, objective=objective, **job)

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(run, jobs))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.discrepancies, other.discrepancies)
        assert one.denoiser_calls == other.denoiser_calls and one.classifier_calls == other.classifier_calls
