import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.utils.configs import parse_config
from launches import launch_command, launch_environment, run


ROOT = Path(__file__).parents[2]
TINY = """
dataset: digits
num_channels: 1
num_layers: 1
num_attention_heads: 2
attention_head_dim: 8
train_steps: 12
batch_size: 32
warmup_steps: 2
checkpoint_every: 5
num_samples_per_class: 2
num_inference_steps: 3
"""


def launch(folder, *options, processes=1):
    """Runs the recipe as a user does."""
    (folder / "tiny.yaml").write_text(TINY)
    command = launch_command("train_generator", "--config", "tiny.yaml", *options, processes=processes)
    done = run(command, cwd=folder, env=launch_environment())
    if done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/configs/generator_*.yaml")), ids=lambda path: path.stem)
def test_configs_load_and_say_how_they_are_launched(path):
    from recipes.train_generator import GeneratorRecipe

    assert parse_config(GeneratorRecipe, ["--config", str(path)]).output_dir.startswith("outputs/")
    assert "accelerate launch" in path.read_text() and f"configs/{path.name}" in path.read_text()


@pytest.mark.slow
def test_begun_by_one_process_and_finished_by_two(tmp_path):
    first = launch(tmp_path, "--output_dir", "out", "--max_minutes", "0", "--log_every", "3")
    assert "Stopped at step 3 of 12" in first.stdout and not (tmp_path / "out").exists()
    second = launch(tmp_path, "--output_dir", "out", "--resume", processes=2)
    assert second.stdout.count("Saved the pipeline") == 1
    folder = tmp_path / "out"
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 12 and results["images"] == 1437 and results["processes"] == 2
    assert len(results["dataset_fingerprint"]) == 16 and results["losses"][-1]["step"] == 12
    assert results["config"]["dataset"] == "digits" and set(results["versions"]) >= {"torch", "diffusers", "python"}
    assert (folder / "samples.png").stat().st_size > 1000
    pipeline = DsCoPipeline.from_pretrained(folder)
    assert pipeline.transformer.config.num_embeds_ada_norm == 10 and pipeline.scheduler.config.clip_sample
    assert json.loads((folder / "model_index.json").read_text())["id2label"] == {str(i): str(i) for i in range(10)}
    launch(tmp_path, "--output_dir", "undisturbed")
    ours, theirs = weights(folder), weights(tmp_path / "undisturbed")
    for name in theirs:  # the same batches, summed in another order
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_training_in_the_latents_of_an_autoencoder(tmp_path):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=1, latent_channels=2, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    launch(tmp_path, "--output_dir", "out", "--vae", "vae", "--num_channels", "3", "--horizontal_flip")
    pipeline = DsCoPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.vae.config.latent_channels == pipeline.transformer.config.in_channels == 2
    assert pipeline.transformer.config.sample_size == 4 and not pipeline.scheduler.config.clip_sample
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_unet_is_scored_while_it_trains_and_fine_tuned_to_other_classes(tmp_path, make, fresh_accelerate):
    from recipes.train_generator import main

    (tmp_path / "tiny.yaml").write_text(TINY)
    make.convnet(names=[str(digit) for digit in range(10)]).save_pretrained(tmp_path / "classifier")
    first, second = tmp_path / "unet", tmp_path / "tuned"
    common = ["--config", str(tmp_path / "tiny.yaml"), "--train_steps", "4", "--batch_size", "8"]
    scored = ["--classifier", str(tmp_path / "classifier"), "--evaluate_every", "3", "--num_evaluation_samples", "20"]
    unet = ["--architecture", "unet", "--block_out_channels", "8,16", "--attention_levels", "0"]
    main([*common, *unet, *scored, "--prediction_type", "v_prediction", "--output_dir", str(first)])
    results = json.loads((first / "results.json").read_text())
    assert [entry["step"] for entry in results["evaluations"]] == [3, 4]
    assert all(entry["frechet_distance"] > 0 and entry["samples"] == 20 for entry in results["evaluations"])
    assert {path.name for path in first.glob("*.png")} == {"samples.png", "samples-000003.png", "samples-000004.png"}
    pipeline = DsCoPipeline.from_pretrained(first)
    assert pipeline.unet.config.num_class_embeds == 11 and pipeline.num_classes == 10
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and pipeline.classifier is not None

    make.images().save_to_disk(str(tmp_path / "shapes"))  # three classes; `split` needs splits
    (tmp_path / "mapping.yaml").write_text("circle: '0'\nsquare: [1, '7']\n")
    tuning = ["--finetune_from", str(first), "--trainable", "bias_and_norm", "--dataset", str(tmp_path / "shapes")]
    main([*common, *tuning, "--class_mapping", str(tmp_path / "mapping.yaml"), "--output_dir", str(second)])
    tuned = DsCoPipeline.from_pretrained(second)
    assert tuned.num_classes == 3 and tuned.id2label == {0: "circle", 1: "square", 2: "triangle"}
    assert tuned.scheduler.config == pipeline.scheduler.config  # its own, with its kind of prediction
    assert torch.equal(tuned.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    assert not torch.equal(tuned.unet.conv_in.bias, pipeline.unet.conv_in.bias)
    assert json.loads((second / "results.json").read_text())["config"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class_mapping", "m.yaml"], "`finetune_from`, which is missing"),
        (["--finetune_from", "a", "--vae", "b"], "leave `vae` out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    from recipes.train_generator import GeneratorRecipe

    with pytest.raises(ValueError, match=message):
        parse_config(GeneratorRecipe, options).load_base()


@pytest.mark.slow
def test_unknown_options_are_named():
    done = run([sys.executable, str(ROOT / "recipes" / "train_generator.py"), "--train_step", "3"])
    assert done.returncode and "Unknown option '--train_step'. Did you mean --train_steps" in done.stderr
