"""Compilation, offloading, precision that a device lacks, and pipeline folders that cannot work."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dsco_hf import DsCoPipeline, MatchingTargets
from dsco_hf.generators.failures import cannot_run
from dsco_hf.sampling.flat import from_flat


OPTIONS = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt", "step_size": 0.1}


def draw(pipe, make, targets=None, **options):
    return pipe([0, 0, 1], targets, generator=make.generators(range(3)), **from_flat(OPTIONS | options))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_a_compiled_denoiser_draws_the_same_images(pipe, targets, make, way, tmp_path):
    options = {"guidance_scale": 1.0}  # one shape, one compilation
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, optimised = draw(pipe, make, **options).images, draw(pipe, make, targets, **options).images
    stored = pipe.transformer
    if way == "in place":
        pipe.denoiser.compile(backend="aot_eager")  # all but the C++ code, which is not ours
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    found = draw(pipe, make, **options).images
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(draw(pipe, make, targets, **options).images, optimised, atol=1e-3, rtol=0)
    assert (pipe.num_classes, pipe.null_class, pipe.image_size) == (3, 3, 8)
    classifier = pipe.classifier
    pipe.register_modules(classifier=None)
    pipe.save_pretrained(tmp_path)
    loaded = DsCoPipeline.from_pretrained(tmp_path, classifier=classifier)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.state_dict().keys() == stored.state_dict().keys()
    assert torch.equal(draw(loaded, make, targets, **options).images, optimised)  # as it was before


def test_offloading_keeps_the_images_and_the_classifier(latent_pipe, make):
    """accelerate's own hooks, with the CPU as the device that models are moved to."""
    images = make.images((3, 3, 3), names=("tench", "goldfish", "chainsaw"))
    targets = MatchingTargets.from_dataset(images, latent_pipe, features={}, embedding_dim=32, progress=False)
    plain, optimised = draw(latent_pipe, make).images, draw(latent_pipe, make, targets).images
    latent_pipe.enable_model_cpu_offload(device="cpu")
    assert latent_pipe._execution_device.type == "cpu"
    for name in ("transformer", "vae"):
        assert hasattr(getattr(latent_pipe, name), "_hf_hook")
    assert latent_pipe.vae._hf_hook.prev_module_hook.model is latent_pipe.transformer  # decoding sends it back
    assert not hasattr(latent_pipe.classifier, "_hf_hook")
    for _ in range(2):  # the hooks are set again after each call
        assert torch.equal(draw(latent_pipe, make, targets).images, optimised)
        assert torch.equal(draw(latent_pipe, make).images, plain)
        assert hasattr(latent_pipe.transformer, "_hf_hook")
    assert latent_pipe.encode_pixels(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 4, 4)
    latent_pipe.remove_all_hooks()
    assert torch.equal(draw(latent_pipe, make, targets).images, optimised)


def test_a_precision_that_the_device_lacks(pipe, make):
    pipe.transformer.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"device cpu cannot run `transformer` in torch.float8_e4m3fn.*float32"):
        draw(pipe, make)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert cannot_run(dtype, torch.device("cpu")) is None


def test_a_latent_generator_without_its_vae(latent_pipe, make):
    latent_pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match="draws 4 channels, which is no image, and there is no VAE: pass `vae=...`"):
        draw(latent_pipe, make)
    assert draw(latent_pipe, make, output_type="latent").images.shape == (3, 4, 4, 4)


def test_a_preview_decoder_of_other_latents(latent_pipe, make):
    latent_pipe.register_modules(preview_vae=make.vae(channels=3, latent_channels=2))
    with pytest.raises(ValueError, match="preview VAE has 2 latent channels, the transformer takes 4"):
        draw(latent_pipe, make)


def test_sizes_that_a_transformer_cannot_take(pipe, make):
    pipe.transformer.register_to_config(sample_size=9)
    with pytest.raises(ValueError, match="cannot take `sample_size=9`, as it cuts it into patches of 2.*example 10"):
        draw(pipe, make)


def change(folder, **entries):
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in index.items() if value is not None}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"transformer": None}, r"names no `transformer` or `unet` or `custom_denoiser`, only \['scheduler', 'vae'\]"),
        ({"scheduler": None}, r"names no `scheduler`, only \['transformer', 'vae'\]"),
        ({"vea": ["diffusers", "AutoencoderKL"]}, r"component `vea` .*does not have. Nearest: 'vae'"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "component `image_encoder` .*Its components are"),
        ({"transformer": ["diffusers", "DiTTransfomer2DModel"]}, "'DiTTransfomer2DModel'.*Nearest: 'DiTTransformer2D"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "'UNet3DConditionModel', .*Nearest: 'UNet2DCond"),
        ({"vae": ["diffusers", "DiTTransformer2DModel"]}, "takes AutoencoderKL or AutoencoderTiny"),
        ({"vae": "AutoencoderKL"}, r"must give \[library, class\] for `vae`, got 'AutoencoderKL'"),
        ({"preview_vae": ["diffusers", "AutoencoderTiny"]}, r"no folder `preview_vae`.*preview_vae=\.\.\."),
    ],
)
def test_folders_that_cannot_work(dit_folder, tmp_path, entries, message):
    folder = Path(shutil.copytree(dit_folder, tmp_path / "copy"))
    change(folder, **entries)
    with pytest.raises(ValueError, match=message):
        DsCoPipeline.from_pretrained(folder)


def test_a_missing_component_may_be_passed(dit_folder, tmp_path, make):
    folder = Path(shutil.copytree(dit_folder, tmp_path / "copy"))
    shutil.rmtree(folder / "transformer")
    with pytest.raises(ValueError, match=r"has no folder `transformer`: copy the whole pipeline, or pass"):
        DsCoPipeline.from_pretrained(folder)
    given = make.transformer(channels=4, out_channels=8, sample_size=4)
    assert DsCoPipeline.from_pretrained(folder, transformer=given).transformer is given
    shutil.rmtree(folder / "vae")
    assert DsCoPipeline.from_pretrained(folder, transformer=given, vae=None).vae is None
