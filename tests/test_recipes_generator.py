import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from dsco_hf.configs import parse_config
from dsco_hf.pipeline import DsCoPipeline


ROOT = Path(__file__).parents[1]
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


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(folder, *options, processes=1):
    """Runs the recipe as a user does."""
    (folder / "tiny.yaml").write_text(TINY)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    launcher += ["--multi_gpu"] if processes > 1 else ["--cpu"]  # the former starts several processes, GPU or not
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(free_port())]
    recipe = [str(ROOT / "recipes" / "train_generator.py"), "--config", "tiny.yaml", *options]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        launcher + recipe, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
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


def test_unknown_options_are_named():
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "train_generator.py"), "--train_step", "3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "Unknown option '--train_step'. Nearest: 'train_steps'" in done.stderr
