"""Denoisers of every family learn from prompts; killed and resumed they end with the same weights."""

import dataclasses
import re

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

import texts
from dsco_hf import DsCoPipeline
from dsco_hf.generators import training as generator_training
from dsco_hf.generators.base import FAMILIES, denoiser_of
from dsco_hf.generators.data import TrainingData, draw_batch
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_denoiser, with_schedule_of
from dsco_hf.generators.prompts import class_prompts
from dsco_hf.generators.training import CHECKPOINT, train_generator


TINY = GeneratorTrainingConfig(train_steps=6, batch_size=4, warmup_steps=1, learning_rate=1e-2)
OWN = GeneratorTrainingConfig(
    architecture="stable-diffusion",
    block_out_channels="8,16",
    attention_levels=0,
    attention_head_dim=8,
    train_steps=6,
    batch_size=32,
    warmup_steps=2,
    learning_rate=1e-2,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def hosted(kind, folder, **options):
    return DsCoPipeline.from_pipe(
        texts.host_of(kind, folder), **{"class_names": texts.CLASSES, "prompts": "a {}", **options}
    )


def tune(pipe, config=TINY, **options):
    """Trains a copy of a pipeline's network on images of 8 pixels."""
    pixels = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    denoiser = pipe.family.adapt(3)
    return train_generator(
        pixels, torch.arange(9) % 3, with_schedule_of(config, pipe.scheduler), num_classes=3, vae=pipe.vae,
        accelerator=Accelerator(cpu=True), denoiser=denoiser, prompts=pipe.prompts, progress=False, **options,
    )  # fmt: skip


def own_network(size=4, classes=3):
    """A new network and the table of its prompts."""
    network = build_denoiser(OWN, num_classes=classes, sample_size=size, num_channels=1)
    family, encoders = FAMILIES["stable-diffusion"](network), FAMILIES["stable-diffusion"].build_encoders(0)
    return network, family.encode(encoders, class_prompts(None, texts.CLASSES[:classes]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "zero", "xl", "PixArtAlphaPipeline", "sd3-clips"])
def test_every_family_learns_and_draws_what_it_learnt(tmp_path, kind):
    pipe = hosted(kind, tmp_path)
    before, encoder = state(pipe.denoiser), state(pipe.text_encoder)
    result = tune(pipe)
    assert result.finished and torch.tensor([entry["loss"] for entry in result.losses]).isfinite().all()
    after = state(result.denoiser)
    assert same(state(pipe.denoiser), before) and same(state(pipe.text_encoder), encoder)
    assert set(after) == set(before) and not same(after, before)
    parameters = {name for name, _ in result.denoiser.named_parameters()}
    assert all(torch.equal(after[name], before[name]) for name in set(before) - parameters)
    trained = DsCoPipeline.from_pipe(pipe, **result.components)
    trained.set_progress_bar_config(disable=True)
    trained.save_pretrained(tmp_path / "saved")
    loaded = DsCoPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    drawn = [one.sample([0, 2], seeds=[1, 2], num_inference_steps=2).images for one in (trained, loaded)]
    assert drawn[0].isfinite().all() and torch.equal(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "xl"])
@pytest.mark.parametrize("trainable", ["all", "bias_and_norm", "lora"])
def test_killed_and_resumed_it_ends_with_the_weights_of_an_undisturbed_one(tmp_path, monkeypatch, kind, trainable):
    pipe = hosted(kind, tmp_path / "host", prompts=["a {}", "my {}"])
    config = dataclasses.replace(TINY, trainable=trainable)
    undisturbed, draw, steps = tune(pipe, config), generator_training.draw_batch, []

    def dies(data, step, *rest, **options):
        steps.append(step)
        if steps == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return draw(data, step, *rest, **options)

    monkeypatch.setattr(generator_training, "draw_batch", dies)
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        tune(pipe, config, **options)
    resumed = tune(pipe, config, resume=True, **options)
    assert steps[5:] == [3, 4, 5] and same(state(undisturbed.denoiser), state(resumed.denoiser))
    if trainable != "all":
        frozen = "down_blocks.0.resnets.0.conv1.weight"
        assert torch.equal(resumed.denoiser.state_dict()[frozen], pipe.denoiser.state_dict()[frozen])
        with safe_open(tmp_path / "run" / CHECKPOINT, framework="pt") as file:
            kept = {name for name in file.keys() if name.startswith(("model.", "other."))}  # noqa: SIM118
        assert kept and all(("lora_" in name) == (trainable == "lora") for name in kept)
        assert f"model.{frozen}" not in kept
    pipe.encode_prompts("the {}")
    with pytest.raises(ValueError, match="belongs to another run .prompts"):
        tune(pipe, config, resume=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "xl", "sd3"])
def test_lora_is_in_the_weights_and_in_a_file_that_the_host_loads(tmp_path, kind):
    host = texts.host_of(kind, tmp_path / "host")
    pipe = DsCoPipeline.from_pipe(host, class_names=texts.CLASSES, prompts="a {}")
    options = {"trainable": "lora", "lora_rank": 3, "learning_rate": 0.05}
    result = tune(pipe, dataclasses.replace(TINY, **options))
    before, after = state(pipe.denoiser), state(result.denoiser)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert set(after) == set(before) and not getattr(result.denoiser, "peft_config", None)
    assert changed and all(re.search(r"\.(add|to)_", name) and name.endswith("weight") for name in changed)
    assert {f"{name.rpartition('.lora_')[0]}.weight" for name in result.lora} >= changed
    assert {min(value.shape) for value in result.lora.values()} == {3}
    host.save_lora_weights(tmp_path / "lora", **{f"{pipe.family.component}_lora_layers": result.lora})
    noisy, labels = torch.randn(3, *pipe.latent_shape), torch.arange(3)
    old, new = pipe, DsCoPipeline.from_pipe(pipe, **result.components)
    first, fused = (one.predict_noise(noisy, 500, labels, 2.0) for one in (old, new))
    host.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(pipe.predict_noise(noisy, 500, labels, 2.0), fused, rtol=0, atol=1e-5)
    assert (fused - first).abs().max() > 0.01


def test_lora_where_there_is_none(tmp_path, make, monkeypatch):
    config = dataclasses.replace(TINY, trainable="lora")
    images = (torch.zeros(3, 1, 8, 8), torch.arange(3))
    options = {"num_classes": 3, "accelerator": Accelerator(cpu=True), "progress": False}
    with pytest.raises(ValueError, match="no LoRA for a DiTTransformer2DModel: set `trainable='bias_and_norm'`"):
        train_generator(*images, config, denoiser=make.transformer(), **options)
    few = dataclasses.replace(config, trainable="bias_and_norm", batch_size=3)
    assert train_generator(*images, few, denoiser=make.transformer(), **options).finished
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs that package: pip install 'dsco_hf\[lora\]'"):
        tune(hosted("sd1", tmp_path), config)
    with pytest.raises(ValueError, match="`lora_rank` must be a whole number of at least 1, got 0"):
        dataclasses.replace(config, lora_rank=0)


@pytest.mark.slow
def test_a_new_network_learns_what_prompts_say(tmp_path):
    network, prompts = own_network()
    labels = torch.arange(24) % 3
    shade = torch.linspace(-0.8, 0.8, 3)[labels].reshape(-1, 1, 1, 1)
    pixels = shade + 0.05 * torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    result = train_generator(
        pixels, labels, dataclasses.replace(OWN, train_steps=200), num_classes=3, denoiser=network, prompts=prompts,
        accelerator=Accelerator(cpu=True), progress=False,
    )  # fmt: skip
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    family = denoiser_of(result.denoiser, prompts=prompts)
    with torch.no_grad():  # in almost pure noise only the prompt tells what to remove
        predicted = family.forward(noise, torch.full((3,), 700), torch.arange(3))
    shades = (noise - predicted).mean(dim=(1, 2, 3))
    assert shades[0] < shades[1] < shades[2]


def test_each_image_of_each_step_has_one_of_its_prompts_and_dropped_labels_the_negative_one(tmp_path):
    pipe, accelerator = hosted("sd1", tmp_path, prompts=["a {}", "my {}"]), Accelerator(cpu=True)
    data = TrainingData(torch.zeros(60, 1, 2, 2), torch.arange(60) % 3)
    config = dataclasses.replace(TINY, batch_size=60, class_dropout_prob=0.2)
    options = {"conditions": pipe.family.conditions}
    rows = draw_batch(data, 0, config, pipe.null_class, accelerator, **options).labels
    classes = draw_batch(data, 0, config, pipe.null_class, accelerator).labels
    assert set(rows.tolist()) == {0, 1, 2, 3, 4, 5, 6} and ((rows == 3) == (classes == 3)).all()
    assert torch.equal(torch.tensor([0, 1, 2, 3, 0, 1, 2])[rows], classes)  # rows after the negative one: "my {}"
    assert torch.equal(rows, draw_batch(data, 0, config, pipe.null_class, accelerator, **options).labels)
    other = draw_batch(data, 1, config, pipe.null_class, accelerator, **options).labels
    assert not torch.equal(rows, other)


def test_a_new_text_encoder_is_the_same_for_a_seed_and_tells_texts_apart():
    family, (network, prompts) = FAMILIES["stable-diffusion"], own_network()
    states = prompts.encoder_hidden_states
    assert torch.equal(own_network()[1].encoder_hidden_states, states)
    assert min((states[i] - states[j]).norm() for i in range(4) for j in range(i)) > 1
    other = family(network).encode(family.build_encoders(1), class_prompts(None, texts.CLASSES))
    assert not torch.equal(other.encoder_hidden_states, states)
    encoders = family.build_encoders(0)
    assert not any(parameter.requires_grad for parameter in encoders["text_encoder"].parameters())
    tokenizer, text = encoders["tokenizer"], "a Täst, 日本"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "a täst , 日本"


def test_a_new_network_is_as_large_as_that_of_classes():
    own = dataclasses.replace(OWN, block_out_channels="32,64,128", attention_head_dim=32)
    counts = [
        sum(
            parameter.numel()
            for parameter in build_denoiser(
                dataclasses.replace(own, architecture=name), num_classes=10, sample_size=16, num_channels=3
            ).parameters()
        )
        for name in ("unet", "stable-diffusion")
    ]
    assert counts == [2_592_003, 2_694_787]


def test_heads_of_attention_that_channels_cannot_be_cut_into():
    wide = dataclasses.replace(OWN, attention_head_dim=32)
    with pytest.raises(ValueError, match="must divide the channels .* attend to the prompt, got 16: choose 16"):
        build_denoiser(wide, num_classes=3, sample_size=4, num_channels=1)
    build_denoiser(dataclasses.replace(OWN, attention_head_dim=16), num_classes=3, sample_size=4, num_channels=1)


def test_another_size_and_other_errors(tmp_path):
    pipe = hosted("sd1", tmp_path)
    larger = pipe.family.adapt(3, sample_size=6)
    assert larger.config.sample_size == 6 and same(state(larger), state(pipe.denoiser))
    with pytest.raises(ValueError, match="cannot take `sample_size=5`"):
        pipe.family.adapt(3, sample_size=5)
    with pytest.raises(ValueError, match="has positions of that size"):
        hosted("sd3-clips", tmp_path / "sd3").family.adapt(3, sample_size=6)
    with pytest.raises(ValueError, match=r"\(4, 4, 3\), the data has \(4, 4, 2\)"):
        train_generator(
            torch.zeros(4, 3, 8, 8), torch.arange(4) % 2, TINY, num_classes=2, vae=pipe.vae, progress=False,
            denoiser=pipe.family.adapt(2), prompts=pipe.prompts, accelerator=Accelerator(cpu=True),
        )  # fmt: skip
