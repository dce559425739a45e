import dataclasses

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from dsco_hf.generators.base import denoiser_of
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_denoiser, with_schedule_of
from dsco_hf.generators.training import train_generator


TUNING = GeneratorTrainingConfig(
    train_steps=6, batch_size=4, warmup_steps=1, learning_rate=1e-2, num_train_timesteps=1000
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def unet():
    config = GeneratorTrainingConfig(architecture="unet", block_out_channels="8,16", attention_levels=0)
    return build_denoiser(config, num_classes=3, sample_size=8, num_channels=1)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def tune(denoiser, trainable, classes, size=8):
    pixels = torch.rand(10, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = dataclasses.replace(TUNING, trainable=trainable)
    return train_generator(
        pixels,
        torch.arange(10) % classes,
        config,
        num_classes=classes,
        accelerator=Accelerator(cpu=True),
        denoiser=denoiser,
        progress=False,
    )


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_new_classes_start_from_the_mean_or_from_the_named_ones(make, kind):
    old = make.transformer() if kind == "dit" else unet()
    new = denoiser_of(old).adapt(5, mapping={0: 2, 4: [0, 1]})
    tables = dict(denoiser_of(old).class_tables())
    assert len(tables) == 1
    for name, module in denoiser_of(new).class_tables():
        known = tables[name].weight
        mean = known[:3].mean(dim=0)
        expected = torch.stack([known[2], mean, mean, mean, known[:2].mean(dim=0), known[3]])
        torch.testing.assert_close(module.weight, expected)
        assert torch.equal(module.weight[-1], known[3])  # the null class stays the last
    rest = {key: value for key, value in old.state_dict().items() if key.removesuffix(".weight") not in tables}
    assert rest and all(torch.equal(new.state_dict()[key], value) for key, value in rest.items())
    old.eval(), new.eval()
    noisy, times = torch.randn(2, 1, 8, 8), torch.tensor([100, 800])
    same = [model(noisy, times, class_labels=labels).sample for model, labels in
            ((old, torch.tensor([2, 3])), (new, torch.tensor([0, 5])))]  # fmt: skip
    torch.testing.assert_close(*same)


@pytest.mark.parametrize(("mapping", "said"), [({5: 0}, "5: 0"), ({0: 3}, "0: 3"), ({1: []}, "at least one")])
def test_a_mapping_to_what_does_not_exist_is_refused(make, mapping, said):
    with pytest.raises(ValueError, match=f"{said}.*|.*{said}"):
        denoiser_of(make.transformer()).adapt(5, mapping=mapping)


def test_bias_and_norm_trains_those_alone(make):
    denoiser = denoiser_of(make.transformer()).adapt(2)
    before = state(denoiser)
    named = denoiser_of(denoiser).set_trainable("bias_and_norm")
    assert all(name.endswith(("bias", "embedding_table.weight")) for name in named)
    assert 0 < sum(before[name].numel() for name in named) < sum(value.numel() for value in before.values()) / 3
    result = tune(denoiser, "bias_and_norm", 2)
    found = changed(before, state(result.denoiser))
    assert found <= set(named) and any(name.endswith("embedding_table.weight") for name in found)
    # the last bias of attention's keys has no effect on the softmax; everything else is moved
    assert {name for name in named if not name.endswith("to_k.bias")} <= found


def test_norms_of_a_unet_are_trained(make):
    denoiser = unet()
    named = denoiser_of(denoiser).set_trainable("bias_and_norm")
    assert "down_blocks.0.resnets.0.norm1.weight" in named and "class_embedding.weight" in named
    assert "down_blocks.0.resnets.0.conv1.weight" not in named and "conv_in.bias" in named
    assert len(denoiser_of(denoiser).set_trainable("all")) == len(list(denoiser.parameters()))


def test_a_learned_variance_is_left_as_it_was(make):
    denoiser = make.transformer(out_channels=2)
    before = state(denoiser)
    result = tune(denoiser, "all", 3)
    after = state(result.denoiser)
    # rows of the last layer: pixels of a patch, then channels: the noise first, the variance second
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        old, new = before[name].unflatten(0, (4, 2)), after[name].unflatten(0, (4, 2))
        assert torch.equal(old[:, 1], new[:, 1]) and not torch.equal(old[:, 0], new[:, 0])
    assert "pos_embed.proj.weight" in changed(before, after)


def test_the_schedule_is_that_of_the_trained_generator():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.01, prediction_type="v_prediction")
    config = with_schedule_of(TUNING, scheduler)
    assert (config.beta_schedule, config.beta_end, config.prediction_type) == ("scaled_linear", 0.01, "v_prediction")
    assert config.learning_rate == TUNING.learning_rate
    flow = with_schedule_of(TUNING, FlowMatchEulerDiscreteScheduler(num_train_timesteps=500))
    assert (flow.prediction_type, flow.num_train_timesteps) == ("flow", 500)
    asked = dataclasses.replace(TUNING, prediction_type="flow")
    with pytest.raises(
        ValueError, match="`prediction_type='flow'` is not .* predicts, 'v_prediction', .*: leave it out"
    ):
        with_schedule_of(asked, scheduler)
    with pytest.raises(ValueError, match="predicts, 'flow'"):
        with_schedule_of(
            dataclasses.replace(TUNING, prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()
        )
    assert with_schedule_of(asked, FlowMatchEulerDiscreteScheduler()).prediction_type == "flow"
    with pytest.raises(ValueError, match="'sample'"):
        with_schedule_of(TUNING, DDIMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="trained_betas"):
        with_schedule_of(TUNING, DDPMScheduler(trained_betas=[0.1] * 10, num_train_timesteps=10))


def test_a_unet_is_brought_to_another_size():
    old = unet()
    new = denoiser_of(old).adapt(3, sample_size=12, mapping={0: 0, 1: 1, 2: 2})
    assert new.config.sample_size == 12 and old.config.sample_size == 8
    assert not changed(state(old), state(new))
    trained = tune(new, "all", 3, size=12).denoiser
    assert trained.config.sample_size == 12 and changed(state(old), state(trained))
    with pytest.raises(ValueError, match="`sample_size=9`, as it halves it .*multiple of 2, for example 10"):
        denoiser_of(old).adapt(3, sample_size=9)


def test_a_transformer_keeps_its_size(make):
    old = make.transformer()
    assert denoiser_of(old).adapt(3, sample_size=8).config.sample_size == 8
    with pytest.raises(ValueError, match="trained at size 8 has positions .* at 16. Leave `image_size` out"):
        denoiser_of(old).adapt(3, sample_size=16)


def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ValueError, match=r"\(1, 8, 3\), the data has \(1, 8, 2\)"):
        tune(make.transformer(), "all", 2)
    with pytest.raises(ValueError, match="is for fine-tuning"):
        tune(None, "bias_and_norm", 2)


def test_a_checkpoint_remembers_what_was_fine_tuned(make, tmp_path):
    def run(seed):
        pixels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return train_generator(
            pixels,
            torch.arange(6) % 3,
            TUNING,
            num_classes=3,
            accelerator=Accelerator(cpu=True),
            denoiser=make.transformer(seed=seed),
            checkpoint_dir=tmp_path,
            resume=True,
            progress=False,
        )

    first = run(0)
    again = run(0)  # finished: the checkpoint's weights, not those it began with
    assert not changed(state(first.denoiser), state(again.denoiser))
    with pytest.raises(ValueError, match="belongs to another run .denoiser"):
        run(1)
