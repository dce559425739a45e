"""Latent generators: scaling of VAEs, preview decoders, slices and tiles, half precision."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from dsco_hf import MatchingTargets
from dsco_hf.generators.latents import conventions, decode, encode, to_output
from dsco_hf.sampling.flat import from_flat
from dsco_hf.sampling.methods.noise import joint_gradient, loss_gradient


LABELS = [0, 0, 1, 2, 2, 2]
OPTIONS = {"num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "pt", "step_size": 0.1}


def draw(pipe, make, targets=None, **options):
    return pipe(LABELS, targets, generator=make.generators(range(10, 16)), **from_flat(OPTIONS | options))


def tiny_preview(seed=4, **options):
    """An AutoencoderTiny that halves the side twice less than Stable Diffusion's: 4x4 latents, 8x8 pixels."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        **options,
    ).eval()


@pytest.fixture
def latent_targets(latent_pipe, make):
    images = make.images((4, 4, 4), names=("tench", "goldfish", "chainsaw"))
    return MatchingTargets.from_dataset(images, latent_pipe, features={}, embedding_dim=128, progress=False)


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        ({}, lambda z: z * 0.18215),
        ({"scaling_factor": 0.5}, lambda z: z * 0.5),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, lambda z: (z - 0.1159) * 0.3611),  # as FLUX
        (  # as Playground 2.5
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2, 3, 4], "latents_std": [1.0, 2, 1, 2]},
            lambda z: (
                (z - torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)) * 0.5 / torch.tensor([1.0, 2, 1, 2]).view(4, 1, 1)
            ),
        ),
    ],
)
def test_scaling_of_the_config(make, config, formula):
    vae = make.vae(channels=3)
    vae.register_to_config(**config)
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist
        latents = encode(vae, pixels, sample_posterior=False)
        torch.testing.assert_close(latents, formula(raw.mode()))
        torch.testing.assert_close(decode(vae, latents), vae.decode(raw.mode()).sample, atol=1e-5, rtol=1e-4)
        drawn = encode(vae, pixels, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(drawn, formula(raw.sample(torch.Generator().manual_seed(1))))
        assert not torch.equal(drawn, latents)


def test_a_tiny_autoencoder_has_its_own_scale():
    tiny = tiny_preview()
    assert conventions(tiny) == (1.0, 0.0, 1.0)
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(decode(tiny, latents), tiny.decode(latents).sample, rtol=0, atol=0)
        pixels = torch.rand(2, 3, 8, 8) * 2 - 1
        torch.testing.assert_close(encode(tiny, pixels), tiny.encode(pixels).latents, rtol=0, atol=0)
    shifted = tiny_preview(scaling_factor=2.0, shift_factor=0.5)
    with torch.no_grad():
        torch.testing.assert_close(decode(shifted, latents), shifted.decode(latents / 2 + 0.5).sample)


def test_a_tiny_preview_sees_what_the_denoiser_sees(latent_pipe, latent_targets, make):
    """The same latents go to both decoders, each in its own scale: z / 0.18215 to the VAE, z to the preview."""
    latent_pipe.register_modules(preview_vae=tiny_preview())
    assert latent_pipe.vae.config.scaling_factor == 0.18215
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        cases = ((True, latent_pipe.preview_vae, latents), (False, latent_pipe.vae, latents / 0.18215))
        for preview, decoder, z in cases:
            found = latent_pipe.decode_latents(latents, preview=preview)
            assert found.shape == (2, 3, 8, 8)
            torch.testing.assert_close(found, decoder.decode(z).sample)
    output = draw(latent_pipe, make, latent_targets, optimization_steps=4, optimize_from=0.5)
    assert (output.discrepancies[3::4] < output.discrepancies[::4]).all()


@pytest.mark.parametrize("preview", [False, True])
def test_slices_change_nothing(latent_pipe, latent_targets, make, preview):
    if preview:
        latent_pipe.register_modules(preview_vae=tiny_preview())
    whole = draw(latent_pipe, make, latent_targets)
    seen = []
    decoder = latent_pipe.preview_vae if preview else latent_pipe.vae
    decoder.decoder.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    decoder.enable_slicing()
    sliced = draw(latent_pipe, make, latent_targets)
    assert {count for count, _ in seen} == {1} and any(grad for _, grad in seen)  # also where gradients flow
    torch.testing.assert_close(sliced.images, whole.images, atol=1e-3, rtol=0)
    torch.testing.assert_close(sliced.discrepancies, whole.discrepancies, atol=1e-3, rtol=0)
    assert sliced.decoder_calls == whole.decoder_calls


def test_tiles_carry_gradients(latent_pipe, latent_targets, make):
    """Tiles of 2x2 latents: the picture changes at their seams only, and the gradient reaches every latent."""
    vae = latent_pipe.vae
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        whole = latent_pipe.decode_latents(latents)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 2, 4, 0.5
    leaf = latents.clone().requires_grad_(True)
    tiled = latent_pipe.decode_latents(leaf)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    (gradient,) = torch.autograd.grad(tiled.square().sum(), leaf)
    assert (gradient.abs() > 0).all()
    options = {"num_inference_steps": 3, "optimization_steps": 2, "guidance_scale": 1.0}
    output = draw(latent_pipe, make, latent_targets, **options)
    assert (output.discrepancies[1] < output.discrepancies[0]).all() and output.images.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same_images(latent_pipe, latent_targets, make, dtype):
    """Noise and latents are float32 in both, so a seed gives one image but for the models' rounding."""
    options = {"guidance_scale": 1.0, "num_inference_steps": 4, "step_size": 1.0, "optimize_from": 0.0}
    plain, optimised = draw(latent_pipe, make, **options), draw(latent_pipe, make, latent_targets, **options)
    moved = (optimised.images - plain.images).abs().mean()
    latent_pipe.to(dtype)
    half = draw(latent_pipe, make, **options)
    assert half.images.dtype == torch.float32
    assert (half.images - plain.images).abs().mean() < 0.02
    half_optimised = draw(latent_pipe, make, latent_targets, **options)
    assert half_optimised.discrepancies.dtype == torch.float32 and half_optimised.images.isfinite().all()
    torch.testing.assert_close(half_optimised.discrepancies, optimised.discrepancies, rtol=0.1, atol=0.02)
    assert (half_optimised.images - optimised.images).abs().mean() < 0.5 * moved  # the same move, up to rounding
    latents = draw(latent_pipe, make, output_type="latent", **options).images
    assert latents.dtype == torch.float32


def test_a_vae_may_stay_in_float32(latent_pipe, latent_targets, make):
    """As the VAE of Stable Diffusion XL must, which overflows in float16."""
    latent_pipe.transformer.to(torch.float16)
    output = draw(latent_pipe, make, latent_targets)
    assert latent_pipe.vae.dtype == torch.float32 and output.images.isfinite().all()


def tiny_half_net(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).to(dtype)


@pytest.mark.parametrize("batch_size", [2, 6])
def test_gradients_of_float16_models_do_not_vanish(batch_size):
    """A loss so small that its gradient is below the least float16 keeps its direction; also with micro-batches."""
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(dtype, rescale):
        net = tiny_half_net(dtype)

        def observe(z, part):
            return (net(z.to(dtype)).float(),)

        def loss(seen):
            return 1e-6 * seen[0].mean(dim=0).square().sum()

        return joint_gradient(noise, observe, loss, batch_size=batch_size, rescale=rescale)

    losses, exact = run(torch.float32, False)
    lost = run(torch.float16, False)[1]
    half_losses, kept = run(torch.float16, True)
    assert not lost.any()
    torch.testing.assert_close(half_losses, losses, rtol=0.01, atol=0)
    assert kept.isfinite().all()
    for found, least in ((kept, 0.9999), (run(torch.float32, True)[1], 1 - 1e-6)):
        cosine = torch.nn.functional.cosine_similarity(found.flatten(1), 1e6 * exact.flatten(1), dim=1)
        assert cosine.min() > least


def test_rescaling_leaves_an_image_without_gradient_alone():
    noise = torch.ones(2, 3)

    def observe(z, part):
        return z * torch.tensor([[1.0], [0.0]])[part], z[:, :0]

    def loss(seen):
        return seen[0].sum() + seen[1].sum()

    losses, gradient = joint_gradient(noise, observe, loss, batch_size=2, rescale=True)
    assert losses == 3 and gradient[0].tolist() == [256.0] * 3 and not gradient[1].any()
    plain = loss_gradient(noise, lambda z: observe(z, slice(None))[0].sum())[1]
    assert plain[0].tolist() == [1.0] * 3


def test_sizes_that_do_not_fit(latent_pipe):
    with pytest.raises(ValueError, match=r"takes images of shape \(3, 8, 8\).*got \(3, 16, 16\): resize them to 8"):
        latent_pipe.encode_pixels(torch.zeros(1, 3, 16, 16))
    assert latent_pipe.encode_pixels(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 4, 4)


def test_encoding_by_the_mode_does_not_depend_on_a_draw(latent_pipe):
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    first, again = (latent_pipe.encode_pixels(pixels, sample_posterior=False) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(latent_pipe.encode_pixels(pixels), latent_pipe.encode_pixels(pixels))


def test_memory_of_the_outputs_alone():
    images = torch.rand(2, 3, 4, 4)
    assert to_output(images, "pt") is images and to_output(images, "latent") is images


def test_conventions_of_the_stock_classes():
    assert conventions(AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)) == (0.18215, 0.0, 1.0)
