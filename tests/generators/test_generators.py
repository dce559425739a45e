import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from dsco_hf.generators.base import Denoiser, denoiser_of, family_of
from dsco_hf.generators.data import TrainingData, draw_batch, encode_latents
from dsco_hf.generators.denoisers import (
    GeneratorTrainingConfig,
    build_denoiser,
    build_scheduler,
    denoising_loss,
    learning_rate_at,
    min_snr_weights,
)


TINY = GeneratorTrainingConfig(num_layers=1, num_attention_heads=2, attention_head_dim=4, batch_size=6, train_steps=10)


def process(index=0, count=1):
    return SimpleNamespace(device=torch.device("cpu"), process_index=index, num_processes=count)


def training_data(rows=8):
    return TrainingData(torch.randn(rows, 1, 4, 4), torch.arange(rows) % 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta_schedule", "liner", "Nearest: 'linear'"),
        ("train_steps", 0, "at least 1, got 0"),
        ("class_dropout_prob", 1.0, r"in \[0, 1\)"),
        ("learning_rate", 0.0, "positive"),
        ("warmup_steps", -1, "at least 0"),
        ("architecture", "u-net", "Nearest: 'unet'"),
        ("prediction_type", "v", "'v_prediction'"),
        ("prediction_type", "flow_prediction", "'v_prediction', 'flow'.*, got 'flow_prediction'"),
        ("activation_fn", "gelu-approx", "Nearest: 'gelu-approximate'"),
        ("trainable", "bias", "'bias_and_norm'"),
        ("block_out_channels", "64;128", "'64,128', got '64;128'"),
        ("block_out_channels", "0,8", "at least 1"),
        ("attention_levels", 4, "at most 3"),
        ("min_snr_gamma", 0.0, "positive"),
    ],
)
def test_config_refuses_impossible_values(field, value, message):
    with pytest.raises(ValueError, match=f"`{field}`.*{message}"):
        GeneratorTrainingConfig(**{field: value})


def test_transformer_follows_its_seed_and_starts_from_zero():
    before = torch.random.get_rng_state()
    first, again = (build_denoiser(TINY, num_classes=3, sample_size=4, num_channels=1) for _ in range(2))
    other = build_denoiser(dataclasses.replace(TINY, seed=1), num_classes=3, sample_size=4, num_channels=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights, same, different = (model.pos_embed.proj.weight for model in (first, again, other))
    assert torch.equal(weights, same) and not torch.equal(weights, different)
    assert first.config.num_embeds_ada_norm == 3
    first.eval()
    noise = first(torch.randn(2, 1, 4, 4), timestep=torch.tensor([3, 900]), class_labels=torch.tensor([0, 3])).sample
    assert noise.shape == (2, 1, 4, 4) and not noise.any()


def test_the_activation_reaches_every_block():
    config = dataclasses.replace(TINY, num_layers=2, activation_fn="linear-silu")
    model = build_denoiser(config, num_classes=3, sample_size=4, num_channels=1)
    assert model.config.activation_fn == "linear-silu"
    usual = build_denoiser(dataclasses.replace(TINY, num_layers=2), num_classes=3, sample_size=4, num_channels=1)
    for block, other in zip(model.transformer_blocks, usual.transformer_blocks, strict=True):
        assert isinstance(block.ff.net[0].activation, torch.nn.SiLU) and type(block.ff.net[0]) is not type(
            other.ff.net[0]
        )


UNET = dataclasses.replace(TINY, architecture="unet", block_out_channels="8,16", attention_head_dim=8)


def test_unet_has_a_null_class_and_starts_from_zero():
    before = torch.random.get_rng_state()
    first, again = (build_denoiser(UNET, num_classes=3, sample_size=4, num_channels=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.conv_in.weight, again.conv_in.weight) and first.conv_in.weight.any()
    assert first.config.num_class_embeds == 4 and denoiser_of(first).null_class == 3
    other = build_denoiser(TINY, num_classes=3, sample_size=4, num_channels=1)
    assert (family_of(first).component, family_of(other).component) == ("unet", "transformer")
    first.eval()
    noise = first(torch.randn(2, 1, 4, 4), torch.tensor([3, 900]), class_labels=torch.tensor([0, 3])).sample
    assert noise.shape == (2, 1, 4, 4) and not noise.any()


@pytest.mark.parametrize(("levels", "attending"), [(0, []), (1, [1]), (2, [0, 1])])
def test_unet_attends_at_its_coarsest_levels(levels, attending):
    unet = build_denoiser(
        dataclasses.replace(UNET, attention_levels=levels), num_classes=3, sample_size=4, num_channels=1
    )
    assert [i for i, kind in enumerate(unet.config.down_block_types) if kind == "AttnDownBlock2D"] == attending
    assert [1 - i for i, kind in enumerate(unet.config.up_block_types) if kind == "AttnUpBlock2D"] == attending[::-1]
    assert unet.config.add_attention == bool(levels)
    first = unet.down_blocks[0].resnets[0]
    assert not first.conv2.weight.any() and first.conv1.weight.any()


def test_unet_must_be_able_to_halve_its_input():
    with pytest.raises(
        ValueError, match="`sample_size=5`, as it halves it at each of its 2 levels but the last: .*for example 6"
    ):
        build_denoiser(UNET, num_classes=3, sample_size=5, num_channels=1)


def test_patches_must_fit():
    with pytest.raises(ValueError, match="`sample_size=5`, as it cuts it into patches of 2 .*for example 6"):
        build_denoiser(TINY, num_classes=3, sample_size=5, num_channels=1)


def test_scheduler_starts_from_pure_noise_and_clips_pixels_only():
    pixels, latents = build_scheduler(TINY, latents=False), build_scheduler(TINY, latents=True)
    assert pixels.config.clip_sample and not latents.config.clip_sample
    pixels.set_timesteps(20)
    assert pixels.timesteps[0] == 999 and pixels.timesteps[-1] == 49
    assert pixels.config.prediction_type == "epsilon"
    velocity = build_scheduler(dataclasses.replace(TINY, prediction_type="v_prediction"), latents=False)
    assert velocity.config.prediction_type == "v_prediction"


def test_learning_rate_warms_up_and_ends():
    config = dataclasses.replace(TINY, train_steps=100, warmup_steps=9, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[100] == pytest.approx(0, abs=1e-9)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate_at(99, dataclasses.replace(config, lr_schedule="constant")) == 1.0


def test_loss_of_a_model_that_says_zero_is_the_noise_power():
    model = build_denoiser(TINY, num_classes=3, sample_size=4, num_channels=1).eval()
    scheduler = build_scheduler(TINY, latents=False)
    clean, noise = torch.randn(2, 5, 1, 4, 4)
    timesteps, labels = torch.tensor([0, 10, 300, 700, 999]), torch.arange(5) % 3
    loss = denoising_loss(denoiser_of(model).forward, scheduler, clean, labels, timesteps, noise)
    torch.testing.assert_close(loss, noise.square().mean())
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    expected = (noise.square().mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr).mean()
    weighted = denoising_loss(
        denoiser_of(model).forward, scheduler, clean, labels, timesteps, noise, min_snr_gamma=5.0
    )
    torch.testing.assert_close(weighted, expected)


class TruthTeller(torch.nn.Module):
    """Says what it is told, in a denoiser's form."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, noisy, timestep, class_labels):
        return SimpleNamespace(sample=self.answer)


def test_a_predicted_velocity_gives_noise_and_image_back():
    scheduler = build_scheduler(dataclasses.replace(TINY, prediction_type="v_prediction"), latents=False)
    clean, noise = torch.rand(4, 1, 4, 4) * 2 - 1, torch.randn(4, 1, 4, 4)
    timesteps, labels = torch.tensor([1, 250, 600, 999]), torch.zeros(4, dtype=torch.int64)
    alphas = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
    for extra in (velocity, torch.cat([velocity, torch.full_like(velocity, 9)], dim=1)):  # learned sigma: ignored
        assert denoising_loss(Denoiser(TruthTeller(extra)).forward, scheduler, clean, labels, timesteps, noise) < 1e-10
    for row in range(4):  # the scheduler of the pipeline reads it in the same way
        noisy = scheduler.add_noise(clean[row], noise[row], timesteps[row])
        scheduler.set_timesteps(1000)
        step = scheduler.step(velocity[row], int(timesteps[row]), noisy)
        torch.testing.assert_close(step.pred_original_sample, clean[row], atol=1e-3, rtol=0)


def test_a_flow_learns_the_difference_of_noise_and_image_at_levels_from_one_to_all():
    config = dataclasses.replace(TINY, prediction_type="flow")
    scheduler, data = build_scheduler(config, latents=False), training_data()
    flow, diffusion = (draw_batch(data, 4, one, 3, process()) for one in (config, TINY))
    assert torch.equal(flow.timesteps, diffusion.timesteps + 1) and flow.timesteps.max() <= 1000
    truth = Denoiser(TruthTeller(flow.noise - flow.clean)).forward
    batch = (flow.clean, flow.labels, flow.timesteps, flow.noise)
    assert denoising_loss(truth, scheduler, *batch) < 1e-10
    assert denoising_loss(Denoiser(TruthTeller(flow.noise)).forward, scheduler, *batch) > 0.1
    with pytest.raises(ValueError, match="`min_snr_gamma=5.0` weighs .*`prediction_type='flow'` .*: leave it out"):
        dataclasses.replace(config, min_snr_gamma=5.0)


def test_min_snr_weighs_the_clean_image_alike_in_both_predictions():
    """An error d of the image is an error d √SNR of the noise and d √(SNR + 1) of the velocity."""
    alphas = torch.tensor([0.001, 0.3, 5 / 6, 0.95, 0.9999], dtype=torch.float64)
    snr = alphas / (1 - alphas)
    noise, velocity = (min_snr_weights(alphas, 5.0, kind) for kind in ("epsilon", "v_prediction"))
    torch.testing.assert_close(noise * snr, velocity * (snr + 1))
    torch.testing.assert_close(noise * snr, snr.clamp(max=5.0))


def test_a_batch_depends_on_seed_and_step_only():
    data = training_data()
    first, again, later = (draw_batch(data, step, TINY, 3, process()) for step in (4, 4, 5))
    assert all(torch.equal(getattr(first, f), getattr(again, f)) for f in ("clean", "labels", "timesteps", "noise"))
    assert not torch.equal(first.noise, later.noise)
    other = draw_batch(data, 4, dataclasses.replace(TINY, seed=1), 3, process())
    assert not torch.equal(first.noise, other.noise)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_share_the_batch_of_one(count):
    data = training_data()
    whole = draw_batch(data, 2, TINY, 3, process())
    parts = [draw_batch(data, 2, TINY, 3, process(index, count)) for index in range(count)]
    for name in ("clean", "labels", "timesteps", "noise"):
        together = torch.empty_like(getattr(whole, name))
        for index, part in enumerate(parts):
            together[index::count] = getattr(part, name)
        assert torch.equal(together, getattr(whole, name))


@pytest.mark.parametrize("rows", [1, 4, 6, 7, 20])
def test_every_image_is_seen_once_per_epoch(rows):
    data = TrainingData(torch.arange(rows).float().reshape(rows, 1, 1, 1), torch.zeros(rows, dtype=torch.int64))
    config = dataclasses.replace(TINY, class_dropout_prob=0.0)
    seen = torch.cat([draw_batch(data, step, config, 1, process()).clean.flatten() for step in range(rows)]).long()
    for epoch in seen.split(rows):  # 6 whole epochs
        assert sorted(epoch.tolist()) == list(range(rows))


def test_stratified_timesteps_cover_all_levels():
    config = dataclasses.replace(TINY, batch_size=10)
    timesteps = draw_batch(training_data(), 0, config, 3, process()).timesteps
    assert sorted((timesteps // 100).tolist()) == list(range(10))
    uniform = dataclasses.replace(config, timestep_sampling="uniform", batch_size=1000)
    timesteps = draw_batch(training_data(), 0, uniform, 3, process()).timesteps
    assert timesteps.min() < 20 and timesteps.max() > 980


def test_labels_are_dropped_at_the_given_rate_for_the_null_class():
    config = dataclasses.replace(TINY, batch_size=2000, class_dropout_prob=0.25)
    labels = draw_batch(training_data(), 0, config, 3, process()).labels
    assert 0.2 < (labels == 3).float().mean() < 0.3
    none = dataclasses.replace(config, class_dropout_prob=0.0)
    assert draw_batch(training_data(), 0, none, 3, process()).labels.max() == 2


def test_half_of_the_images_are_mirrored_when_asked():
    data = TrainingData(torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2), torch.zeros(1, dtype=torch.int64))
    config = dataclasses.replace(TINY, batch_size=1000, horizontal_flip=True)
    clean = draw_batch(data, 0, config, 1, process()).clean
    assert 0.4 < (clean[:, 0, 0, 0] > 0).float().mean() < 0.6
    assert (clean.sum(-1) == 0).all()
    config = dataclasses.replace(config, horizontal_flip=False)
    assert (draw_batch(data, 0, config, 1, process()).clean[:, 0, 0, 0] < 0).all()


def tiny_vae():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        norm_num_groups=1,
        latent_channels=2,
        scaling_factor=0.5,
    )
    return vae.eval()


def test_latents_are_the_scaled_posterior():
    vae, pixels = tiny_vae(), torch.rand(5, 3, 8, 8) * 2 - 1
    mean, std = encode_latents(pixels, vae, batch_size=2)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean.detach() * 0.5)
    torch.testing.assert_close(std, posterior.std.detach() * 0.5)
    assert mean.shape == (5, 2, 4, 4) and not mean.requires_grad


def test_latents_are_sampled_anew_each_step_and_mirrored_copies_are_used():
    rows = 1
    labels = torch.zeros(rows, dtype=torch.int64)
    shape = (rows, 1, 2, 2)
    mirrored = TrainingData(torch.full(shape, 50.0), labels, torch.full(shape, 0.0))
    data = TrainingData(torch.full(shape, -50.0), labels, torch.ones(shape), mirrored)
    config = dataclasses.replace(TINY, batch_size=500, horizontal_flip=True)
    clean = draw_batch(data, 0, config, 1, process()).clean
    flipped = clean[:, 0, 0, 0] > 0
    assert 0.4 < flipped.float().mean() < 0.6
    assert (clean[flipped] == 50).all()
    assert clean[~flipped].std() == pytest.approx(1, abs=0.1)
