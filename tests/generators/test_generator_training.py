import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from safetensors import safe_open

from dsco_hf.generators import training as generator_training
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_denoiser, build_scheduler
from dsco_hf.generators.training import CHECKPOINT, train_generator
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.utils import progress
from dsco_hf.utils.files import DamagedFileError


UNET = {
    "architecture": "unet",
    "block_out_channels": "8,16",
    "attention_head_dim": 8,
    "prediction_type": "v_prediction",
    "min_snr_gamma": 5.0,
}
TINY = GeneratorTrainingConfig(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=4,
    train_steps=12,
    batch_size=5,
    warmup_steps=2,
    learning_rate=1e-2,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def problem(rows=12, classes=3, channels=1, size=4):
    """Images of one brightness per class, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    shade = torch.linspace(-0.8, 0.8, classes)[labels].reshape(rows, 1, 1, 1)
    return shade + 0.05 * torch.randn(rows, channels, size, size, generator=generator), labels


def train(config=TINY, *, data=None, **options):
    pixels, labels = data or problem()
    options = {"num_classes": 3, "accelerator": Accelerator(cpu=True), "progress": False, **options}
    return train_generator(pixels, labels, config, **options)


def kept(folder):
    """What a checkpoint says of how far it is."""
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return json.loads(file.metadata()["progress"])


def weights(result):
    return torch.cat([parameter.flatten() for parameter in result.denoiser.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("predicted", ["epsilon", "flow"])
def test_loss_falls_and_the_model_learns_its_classes(predicted):
    config = dataclasses.replace(TINY, train_steps=150, batch_size=32, attention_head_dim=8, prediction_type=predicted)
    result = train(config, log_every=10)
    losses = [entry["loss"] for entry in result.losses]
    assert result.finished and result.step == 150 and len(losses) == 15
    assert losses[0] > 0.6 and sum(losses[-3:]) / 3 < 0.35
    assert result.losses[-1]["step"] == 150
    model = result.denoiser
    assert isinstance(model, DiTTransformer2DModel) and not model.training and model.dtype == torch.float32
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # in almost pure noise only the label tells what to remove
        predicted = model(noise, timestep=torch.full((3,), 700), class_labels=torch.arange(3)).sample
    shades = (noise - predicted).mean(dim=(1, 2, 3))
    assert shades[0] < shades[1] < shades[2]


def test_same_seed_same_weights_whatever_the_global_random_state():
    first = weights(train())
    torch.manual_seed(1234)
    assert torch.equal(first, weights(train()))
    assert not torch.equal(first, weights(train(dataclasses.replace(TINY, seed=1))))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [4, 5, 12])
@pytest.mark.parametrize("predicted", ["epsilon", "flow"])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, monkeypatch, checkpoint_every, predicted):
    config = dataclasses.replace(TINY, prediction_type=predicted)
    undisturbed = train(config, log_every=2)
    calls, draw = [], generator_training.draw_batch

    def dies_at_step_nine(data, step, *rest, **options):
        calls.append(step)
        if step == 9 and len(calls) <= 10:
            raise KeyboardInterrupt
        return draw(data, step, *rest, **options)

    monkeypatch.setattr(generator_training, "draw_batch", dies_at_step_nine)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": checkpoint_every, "log_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(config, **options)
    torch.manual_seed(77)
    resumed = train(config, resume=True, **options)
    assert calls[10] == {4: 8, 5: 5, 12: 0}[checkpoint_every]
    assert torch.equal(weights(undisturbed), weights(resumed))
    assert [entry["step"] for entry in resumed.losses][-1] == 12
    again = train(config, resume=True, **options)  # nothing left to do
    assert again.step == 12 and torch.equal(weights(again), weights(resumed))


@pytest.mark.slow
def test_the_first_checkpoint_comes_by_the_clock(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, train_steps=24)
    undisturbed, draw = train(config, log_every=4), generator_training.draw_batch

    def dies_at_step_fourteen(data, step, *rest, **options):
        if step == 14:
            raise KeyboardInterrupt
        return draw(data, step, *rest, **options)

    monkeypatch.setattr(generator_training, "draw_batch", dies_at_step_fourteen)
    monkeypatch.setattr(generator_training, "FIRST_CHECKPOINT", 0.0)  # seconds after the tenth step
    with pytest.raises(KeyboardInterrupt):
        train(config, checkpoint_dir=tmp_path, log_every=4)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert kept(tmp_path)["step"] == 12  # the next one that is logged
    monkeypatch.undo()
    resumed = train(config, checkpoint_dir=tmp_path, log_every=4, resume=True)
    assert torch.equal(weights(undisturbed), weights(resumed)) and resumed.losses == undisturbed.losses


@pytest.mark.slow
def test_a_unet_in_bf16_resumes_bit_by_bit(tmp_path):
    config = dataclasses.replace(TINY, **UNET | {"block_out_channels": "8"})

    def run(**options):
        try:
            return train(config, accelerator=Accelerator(cpu=True, mixed_precision="bf16"), log_every=5, **options)
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()

    undisturbed = run()
    slices = [run(checkpoint_dir=tmp_path, resume=True, max_minutes=0.0) for _ in range(3)]
    assert [piece.finished for piece in slices] == [False, False, True]
    assert torch.equal(weights(undisturbed), weights(slices[-1])) and weights(undisturbed).isfinite().all()
    assert list(undisturbed.components) == ["unet"] and isinstance(undisturbed.denoiser, UNet2DModel)


@pytest.mark.slow
def test_a_unet_that_predicts_velocity_draws_its_classes():
    config = dataclasses.replace(TINY, **UNET, train_steps=120, batch_size=32, class_dropout_prob=0.0)
    result = train(config)
    scheduler = build_scheduler(config, latents=False)
    pipe = DsCoPipeline(**result.components, scheduler=scheduler, id2label=dict(enumerate("abc")))
    images = pipe.sample([0, 1, 2], seeds=[5, 5, 5], num_inference_steps=10, guidance_scale=1.0).images
    shades = images.mean(dim=(1, 2, 3)) * 2 - 1
    torch.testing.assert_close(shades, torch.tensor([-0.8, 0.0, 0.8]), atol=0.25, rtol=0)


def test_evaluations_see_the_averaged_weights_and_survive_a_resume(tmp_path):
    seen = []

    def evaluate(step, denoiser):
        assert not denoiser.training
        seen.append((step, torch.cat([p.detach().flatten().clone() for p in denoiser.parameters()])))
        return {"norm": float(seen[-1][1].norm())}

    options = {"evaluate": evaluate, "evaluate_every": 5, "checkpoint_dir": tmp_path, "checkpoint_every": 5}
    first = train(max_minutes=0.0, log_every=5, **options)
    assert [entry["step"] for entry in first.evaluations] == [5] and not first.finished
    second = train(resume=True, **options)
    assert [step for step, _ in seen] == [5, 10, 12] == [entry["step"] for entry in second.evaluations]
    assert torch.equal(seen[-1][1], weights(second)) and second.evaluations[0] == first.evaluations[0]
    assert torch.equal(weights(second), weights(train()))  # looking changes nothing


def test_checkpoints_are_whole_or_absent_and_the_newest_stays(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("disk full")

    train(checkpoint_dir=tmp_path, checkpoint_every=5)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT] and kept(tmp_path)["step"] == 12
    train(checkpoint_dir=tmp_path / "other", max_minutes=0.0, log_every=5)
    monkeypatch.setattr(progress, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        train(checkpoint_dir=tmp_path / "other", checkpoint_every=5, resume=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == [CHECKPOINT]
    assert kept(tmp_path / "other")["step"] == 5
    monkeypatch.undo()
    (tmp_path / "other" / f".{CHECKPOINT}.1.partial").write_bytes(b"of a process that was killed")
    result = train(checkpoint_dir=tmp_path / "other", checkpoint_every=5, resume=True)
    assert torch.equal(weights(result), weights(train()))
    assert [path.name for path in (tmp_path / "other").iterdir()] == [CHECKPOINT]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[: len(content) // 3], lambda content: content[:-1] + b"x"]
)
def test_a_damaged_checkpoint_is_named_and_stays(tmp_path, damage):
    train(checkpoint_dir=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFileError, match=f"{path} is damaged: .*delete it to start anew"):
        train(checkpoint_dir=tmp_path, resume=True)
    path.unlink()  # as it says
    assert train(checkpoint_dir=tmp_path).step == 12


def test_dropout_goes_on_as_it_would_have(tmp_path):
    def noisy():
        network = build_denoiser(TINY, num_classes=3, sample_size=4, num_channels=1)
        network.transformer_blocks[0].attn1.to_out[1].p = 0.5
        return network

    options = {"checkpoint_dir": tmp_path, "resume": True, "max_minutes": 0.0, "log_every": 5}
    undisturbed = train(denoiser=noisy())
    slices = [train(denoiser=noisy(), **options) for _ in range(3)]
    assert slices[-1].finished and torch.equal(weights(undisturbed), weights(slices[-1]))
    assert not torch.equal(weights(undisturbed), weights(train()))


def test_a_checkpoint_is_not_overwritten_nor_mixed_with_another_run(tmp_path):
    train(checkpoint_dir=tmp_path)
    with pytest.raises(FileExistsError, match="checkpoint.safetensors.*resume=True"):
        train(checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another run \\(learning_rate: 0.01 there, 0.02 now"):
        train(dataclasses.replace(TINY, learning_rate=0.02), checkpoint_dir=tmp_path, resume=True)
    pixels, labels = problem()
    with pytest.raises(ValueError, match="belongs to another run .data"):
        train(data=(pixels + 0.1, labels), checkpoint_dir=tmp_path, resume=True)


def test_time_slices_add_up_to_one_run(tmp_path):
    slices = 0
    finished = False
    while not finished:
        result = train(checkpoint_dir=tmp_path, resume=True, max_minutes=0.0, log_every=5)
        finished, slices = result.finished, slices + 1
    assert slices == 3 and torch.equal(weights(result), weights(train(log_every=5)))
    assert kept(tmp_path)["step"] == 12
    with pytest.raises(ValueError, match="needs a `checkpoint_dir`"):
        train(max_minutes=1.0)


def test_nan_loss_names_the_step(tmp_path, monkeypatch):
    draw = generator_training.draw_batch

    def spoils_step_seven(data, step, *rest, **options):
        batch = draw(data, step, *rest, **options)
        return dataclasses.replace(batch, clean=batch.clean * torch.nan) if step == 7 else batch

    monkeypatch.setattr(generator_training, "draw_batch", spoils_step_seven)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 7 .*smaller `learning_rate`"):
        train(checkpoint_dir=tmp_path, checkpoint_every=5)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert kept(tmp_path)["step"] == 5  # the last one from before


def test_nan_pixels_are_refused_before_training():
    pixels, labels = problem()
    pixels[3, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="image 3 .*not finite"):
        train(data=(pixels, labels))


def test_averaged_weights_are_the_average(monkeypatch):
    """With constant decay d: after the first step the average is the weights, then d * average + (1 - d) * weights."""
    history = []
    step = generator_training.EMAModel.step

    def records(self, parameters):
        parameters = list(parameters)
        history.append(torch.cat([p.detach().flatten() for p in parameters]))
        step(self, parameters)

    monkeypatch.setattr(generator_training.EMAModel, "step", records)
    result = train(dataclasses.replace(TINY, ema_decay=0.5, ema_power=10.0))
    average = history[0]
    for current in history[1:]:
        average = 0.5 * average + 0.5 * current
    torch.testing.assert_close(weights(result), average, atol=1e-6, rtol=1e-4)
    assert not torch.equal(weights(result), history[-1])


def test_labels_are_dropped_for_all_blocks_at_once():
    pixels, labels = problem()
    seen = []
    config = dataclasses.replace(TINY, num_layers=3, class_dropout_prob=0.5, batch_size=30, train_steps=1)
    original = LabelEmbedding.forward

    def records(self, labels, force_drop_ids=None):
        assert not self.training
        seen.append(labels.clone())
        return original(self, labels, force_drop_ids)

    LabelEmbedding.forward = records
    try:
        train(config, data=(pixels, labels))
    finally:
        LabelEmbedding.forward = original
    assert len(seen) == 4 and all(torch.equal(seen[0], other) for other in seen)
    assert 5 < (seen[0] == 3).sum() < 25


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        norm_num_groups=1,
        latent_channels=2,
    )


@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_training_in_latents(horizontal_flip):
    vae = tiny_vae()
    before = torch.cat([parameter.detach().flatten().clone() for parameter in vae.parameters()])
    config = dataclasses.replace(TINY, horizontal_flip=horizontal_flip)
    result = train(config, data=problem(channels=3, size=8), vae=vae)
    assert result.denoiser.config.sample_size == 4 and result.denoiser.config.in_channels == 2
    assert torch.equal(before, torch.cat([parameter.detach().flatten() for parameter in vae.parameters()]))
    assert all(parameter.grad is None for parameter in vae.parameters())


@pytest.mark.parametrize(("rows", "classes", "batch_size"), [(1, 1, 1), (1, 1, 4), (7, 3, 5)])
def test_one_image_one_class_and_batches_that_do_not_divide(rows, classes, batch_size):
    config = dataclasses.replace(TINY, batch_size=batch_size, train_steps=3)
    assert train(config, data=problem(rows, classes), num_classes=classes).step == 3


def test_bf16_autocast_trains_and_returns_float32():
    result = train(accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    assert result.denoiser.dtype == torch.float32 and torch.isfinite(weights(result)).all()


def test_a_batch_must_be_split_evenly():
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(ValueError, match="`batch_size=5` cannot be split evenly over 2 processes"):
        train(accelerator=two)


def test_the_accelerator_is_left_empty():
    accelerator = Accelerator(cpu=True)
    train(accelerator=accelerator)
    assert not accelerator._models and not accelerator._optimizers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(12, 1, 4, 6)}, r"square images.*\(12, 1, 4, 6\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "12 images but labels"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, "at least 1 image.*'1' has 0"),
        ({"labels": torch.arange(12)}, "in 0..2.*got 0 to 11"),
        ({"pixels": torch.zeros(0, 1, 4, 4), "labels": torch.zeros(0, dtype=torch.int64)}, "no images"),
    ],
)
def test_bad_data_is_refused(change, message):
    pixels, labels = problem()
    with pytest.raises(ValueError, match=message):
        train(data=(change.get("pixels", pixels), change.get("labels", labels)))


def test_training_alone_gives_the_same_weights_and_keeps_no_checkpoints(tmp_path):
    assert torch.equal(weights(train(distributed=False)), weights(train()))
    with pytest.raises(ValueError, match="`distributed=False` keeps no checkpoints"):
        train(distributed=False, checkpoint_dir=tmp_path)
