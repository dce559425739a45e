"""`train_generator` with prompts: new networks and text-to-image pipelines, in one and two processes."""

import json

import pytest
import torch
from safetensors.torch import load_file

import texts
from dsco_hf import DsCoPipeline, MatchingTargets, concentrate, save_dataset_folder
from dsco_hf.studies.generator_check import FineTuneOptions
from dsco_hf.utils.configs import parse_config
from launches import launch_command, launch_environment, run


LORA = "pytorch_lora_weights.safetensors"
OWN = """
dataset: digits
num_channels: 1
architecture: stable-diffusion
block_out_channels: "8,16"
attention_levels: 1
attention_head_dim: 8
train_steps: 9
batch_size: 16
warmup_steps: 2
checkpoint_every: 5
num_samples_per_class: 1
num_inference_steps: 2
negative_prompt: a letter
"""


@pytest.fixture
def shapes(tmp_path, make):
    make.images().save_to_disk(str(tmp_path / "shapes"))
    return str(tmp_path / "shapes")


def launch(folder, *options, processes=1):
    (folder / "own.yaml").write_text(OWN, encoding="utf-8")
    command = launch_command("train_generator", "--config", "own.yaml", *options, processes=processes)
    done = run(command, cwd=folder, env=launch_environment())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def silent(folder, **options):
    pipe = DsCoPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tuned(tmp_path, host, shapes, *options):
    """What the recipe makes of a host's folder and three classes."""
    from recipes.train_generator import main

    tiny = ["--train_steps", "3", "--batch_size", "4", "--num_samples_per_class", "1", "--num_inference_steps", "2"]
    main([*tiny, "--finetune_from", str(host), "--dataset", shapes, "--output_dir", str(tmp_path / "out"), *options])
    return silent(tmp_path / "out")


@pytest.mark.slow
def test_a_new_text_to_image_model_is_trained_stopped_and_resumed_by_two_processes(tmp_path, make):
    assert "Stopped at step 3 of 9" in launch(
        tmp_path, "--output_dir", "out", "--max_minutes", "0", "--log_every", "3"
    )
    assert launch(tmp_path, "--output_dir", "out", processes=2).count("Saved the pipeline") == 1
    launch(tmp_path, "--output_dir", "undisturbed")
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "undisturbed")
    for name in theirs:  # the same batches, summed in another order
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=1e-2)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["processes"] == 2 and results["steps"] == 9
    assert results["prompts"]["texts"][7] == "a photo of a 7" and results["prompts"]["negative_prompt"] == "a letter"
    classifier = make.convnet(names=[str(digit) for digit in range(10)])
    pipe = silent(tmp_path / "out", classifier=classifier)
    assert (pipe.image_size, pipe.num_channels, pipe.num_classes, pipe.vae) == (8, 1, 10, None)
    assert pipe.scheduler.config.clip_sample and len(pipe.tokenizer) == 514
    before = pipe.prompts.encoder_hidden_states.clone()
    pipe.encode_prompts(negative_prompt="a letter")  # by the encoder that was saved
    assert torch.equal(pipe.prompts.encoder_hidden_states, before) and pipe.scheduler.config.clip_sample
    images = make.images((4,) * 10, names=[str(digit) for digit in range(10)], size=8)
    targets = MatchingTargets.from_dataset(images, pipe, embedding_dim=32, progress=False)
    drawing = {"num_inference_steps": 3, "guidance_scale": 2.0, "progress": False}
    sets = [concentrate(pipe, targets, 1, seed=3, method=method, **drawing) for method in ("plain", "nopt")]
    pixels = [[image.tobytes() for image in rows["image"]] for rows in sets]
    assert len(set(sum(pixels, []))) == 20
    save_dataset_folder(sets[1], tmp_path / "set", targets=targets)
    record = json.loads((tmp_path / "set" / "concentration.json").read_text())
    assert record["prompts"]["texts"][4] == "a photo of a 4"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "xl", "PixArtSigmaPipeline", "sd3"])
def test_a_text_to_image_pipeline_is_trained_further(tmp_path, shapes, fresh_accelerate, kind):
    host = texts.host_of(kind, tmp_path / "host")
    host.save_pretrained(tmp_path / "saved")
    (tmp_path / "prompts.yaml").write_text("circle: [a ball, a disc]\nsquare: [a box, a tile]\ntriangle: [a, b]\n")
    options = ["--prompts", str(tmp_path / "prompts.yaml"), "--negative_prompt", "bad"]
    pipe = tuned(tmp_path, tmp_path / "saved", shapes, *options)
    family = pipe.family
    assert pipe.id2label == {0: "circle", 1: "square", 2: "triangle"} and pipe.text_encoder is not None
    assert pipe.prompts.as_record()["texts"][1] == ["a box", "a tile"]
    old, new = host.components[family.component].state_dict(), family.network.state_dict()
    assert any(not torch.equal(new[name], value) for name, value in old.items())
    for name in ("text_encoder", "vae"):
        kept = getattr(pipe, name).state_dict()
        assert all(torch.equal(kept[key], value) for key, value in host.components[name].state_dict().items())
    assert pipe.sample([0, 2], seeds=[1, 2], num_inference_steps=2, guidance_scale=2.0).images.isfinite().all()
    again = tuned(tmp_path / "again", tmp_path / "out", shapes, "--drop_text_encoders", "true")  # its own folder
    assert again.text_encoder is None and again.prompts.as_record() == pipe.prompts.as_record()
    last = tuned(tmp_path / "last", tmp_path / "again" / "out", shapes)  # without encoders, as the prompts are known
    assert last.prompts.as_record() == pipe.prompts.as_record()
    with pytest.raises(ValueError, match="cannot be encoded without"):
        FineTuneOptions(finetune_from=str(tmp_path / "again" / "out"), prompts="a {}").load_base(["x", "y"])


@pytest.mark.slow
def test_lora_by_two_processes_stopped_and_resumed(tmp_path, shapes):
    host = texts.host_of("sd1", tmp_path / "host")
    host.save_pretrained(tmp_path / "saved")
    options = ["--dataset", shapes, "--finetune_from", "saved", "--trainable", "lora", "--lora_rank", "2"]
    options += ["--learning_rate", "0.05", "--prompts", "a {}", "--evaluate_every", "6"]
    for folder, last in (("out", 2), ("undisturbed", 1)):
        place = [*options, "--output_dir", folder]
        if folder == "out":
            assert "Stopped at step 3" in launch(tmp_path, *place, "--max_minutes", "0", "--log_every", "3")
        launch(tmp_path, *place, processes=last)
    lora, other = (load_file(tmp_path / folder / LORA) for folder in ("out", "undisturbed"))
    for name in other:
        torch.testing.assert_close(lora[name], other[name], atol=2e-3, rtol=1e-2)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["lora_parameters"] == sum(value.numel() for value in lora.values())
    assert results["config"]["lora_rank"] == 2 and (tmp_path / "out" / "samples-000006.png").exists()
    pipe = silent(tmp_path / "out")
    assert set(pipe.unet.state_dict()) == set(host.unet.state_dict())
    host.load_lora_weights(tmp_path / "out")
    theirs = DsCoPipeline.from_pipe(host, class_names=list(pipe.id2label.values()), prompts="a {}")
    theirs.encode_prompts("a {}", negative_prompt="a letter")
    noisy, labels = torch.randn(3, *pipe.latent_shape), torch.arange(3)
    found = [one.predict_noise(noisy, 500, labels, 2.0) for one in (pipe, theirs)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_another_size_is_told_to_a_model_that_is_told_its_size(tmp_path, shapes, fresh_accelerate):
    texts.host_of("xl", tmp_path / "host").save_pretrained(tmp_path / "saved")
    pipe = tuned(tmp_path, tmp_path / "saved", shapes, "--image_size", "16")
    assert pipe.image_size == 16 and pipe.prompts.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 4


def test_what_cannot_be_trained_is_refused(tmp_path, make, shapes):
    from recipes.train_generator import GeneratorRecipe

    texts.host_of("sd1", tmp_path / "host").save_pretrained(tmp_path / "saved")
    (tmp_path / "few.yaml").write_text("circle: a ball\n")
    options = FineTuneOptions(finetune_from=str(tmp_path / "saved"), prompts=str(tmp_path / "few.yaml"))
    with pytest.raises(ValueError, match=r"`prompts` has none for 1 of 2 classes: \['square'\]"):
        options.load_base(["circle", "square"])
    with pytest.raises(ValueError, match="has 'circle', which is no class"):
        options.load_base(["square"])
    with pytest.raises(ValueError, match="has 17 tokens and the tokenizer takes 16"):
        FineTuneOptions(finetune_from=str(tmp_path / "saved"), prompts="a {}").load_base(["abcdefghijklmn"])
    with pytest.raises(ValueError, match="The classes have no names"):
        FineTuneOptions(finetune_from=str(tmp_path / "saved")).load_base()
    with pytest.raises(ValueError, match="knows its classes by itself and takes no prompts"):
        FineTuneOptions(finetune_from="digits", prompts="a {}").load_base(["square"])
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        FineTuneOptions(finetune_from="no/such/folder").load_base(["square"])
    for family, said in (("pixart", "cannot be built: pass a network"), ("dit", "takes no prompts: leave")):
        recipe = parse_config(GeneratorRecipe, ["--architecture", family, "--prompts", "a {}"])
        with pytest.raises(ValueError, match=said):
            recipe.check_new(recipe, ["square"])
            recipe.new_base(recipe, ["square"], (1, 8))
