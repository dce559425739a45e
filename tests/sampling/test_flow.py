"""Flow matching generators do all that diffusion does: drawn, steered, stored, stopped, made again."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    NOpt,
    QuantileTargets,
    Released,
    Sampling,
    concentrate,
    concentrate_to_folder,
    load_recorded,
    read_concentration,
)
from dsco_hf.concentration.records import record_parameters
from dsco_hf.costs.passes import Rehearsal
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.sampling.call import calls
from dsco_hf.sampling.peers import D3HR, D4M, IGD, UAG
from launches import launch_command, launch_environment, run


NAMES = ("circle", "square", "triangle")
SCHEDULERS = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "fresh": {"stochastic_sampling": True},
}
DRAWN = {"num_inference_steps": 5, "guidance_scale": 1.0}
RUN = {"block_size": 1, "images_per_call": 4, "progress": False, "seed": 3}


def flow_pipe(make, kind="transformer", **scheduler):
    network = {"transformer": make.transformer, "unet": make.unet}[kind]()
    pipe = DsCoPipeline(
        network, FlowMatchEulerDiscreteScheduler(**scheduler), classifier=make.convnet(),
        id2label=dict(enumerate(NAMES)),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_pixels(one, other):
    return [np.asarray(a).tobytes() for a in one["image"]] == [np.asarray(b).tobytes() for b in other["image"]]


@pytest.fixture
def flow(make):
    return flow_pipe(make)


@pytest.fixture
def flow_targets(flow, real_images):
    return MatchingTargets.from_dataset(
        real_images, flow, features={}, embedding_dim=64, second_moment=True, progress=False
    )


@pytest.mark.parametrize("kind", ["transformer", "unet"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_plain_samples_are_those_of_diffusers_scheduler(make, kind, name, monkeypatch):
    """Its own steps: of Euler, or with fresh noise; the model is asked as any pipeline of diffusers asks it."""
    pipe, own = flow_pipe(make, kind, **SCHEDULERS[name]), FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name])
    fresh, labels = name == "fresh", torch.tensor([0, 2])
    found = pipe.sample([0, 2], seeds=[4, 5], eta=float(fresh), method="plain", **DRAWN).images
    tokens = 64 if kind == "unet" else 16
    mu = 0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5) if name == "dynamic" else None
    own.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2], mu=mu)
    generators = make.generators([4, 5])
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=one) for one in generators])
    with torch.no_grad():
        for t in own.timesteps:
            z = torch.cat([torch.randn(1, 1, 8, 8, generator=one) for one in generators])
            place = "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor"
            monkeypatch.setattr(place, lambda *_, z=z, **__: z)
            velocity = pipe.denoiser(x, timestep=t.expand(2), class_labels=labels).sample
            x = own.step(velocity, t, x).prev_sample
    torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert found.std() > 0.05


@pytest.mark.parametrize("lookahead", ["conditional", "guided", "none"])
def test_moved_noise_lowers_the_objective(flow, flow_targets, lookahead):
    method = NOpt("rkhs", start=0.0, iterations=4, step_size=0.1, step_decay=1.0, lookahead=lookahead)
    output = flow.sample([0, 0, 1, 2], flow_targets, seeds=range(4), method=method, **{**DRAWN, "guidance_scale": 2.0})
    assert output.discrepancies.shape == (16, 3) and output.images.isfinite().all()
    if lookahead != "none":  # which sees no move of the noise before the next step
        assert (output.discrepancies[3::4] < output.discrepancies[::4]).all()  # within each sampling step
    plain = flow.sample([0, 0, 1, 2], None, seeds=range(4), **{**DRAWN, "guidance_scale": 2.0})
    assert not torch.equal(plain.images, output.images)


def test_without_noise_there_is_nothing_to_move(flow, flow_targets):
    still = flow.sample([0, 1], flow_targets, seeds=[1, 2], eta=0.0, **DRAWN)
    assert torch.equal(still.images, flow.sample([0, 1], seeds=[1, 2], eta=0.0, **DRAWN).images)
    call = flow.start_call([0], None, Sampling(5, 1.0))
    assert [call.sigma(i) > 0 for i in range(5)] == [True] * 4 + [False]
    half = flow.start_call([0], None, Sampling(5, 1.0, eta=0.5))
    assert half.sigma(1) == pytest.approx(call.sigma(1) / 2)


def test_data_free_targets(flow):
    free = MatchingTargets.from_generator(
        flow, list(NAMES), samples_per_class=4, features={}, embedding_dim=32, progress=False, **DRAWN
    )
    assert free.class_names == list(NAMES) and free.embeddings.isfinite().all()


@pytest.mark.slow
def test_everything_from_a_set_to_its_card_and_back(flow, flow_targets, tmp_path):
    sampling = Sampling(5, 1.0, batch_size=4, method=NOpt(start=0.0))
    flow.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    pipe = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    small = concentrate(pipe, flow_targets, 2, method=sampling, **RUN)
    assert same_pixels(small, concentrate(flow, flow_targets, 2, method=sampling, **RUN))
    assert not same_pixels(small, concentrate(pipe, flow_targets, 2, method="plain", num_inference_steps=5, **RUN))
    concentrate_to_folder(pipe, flow_targets, 1, tmp_path / "run", method=sampling, **RUN)
    grown = concentrate_to_folder(pipe, flow_targets, 2, tmp_path / "run", method=sampling, **RUN)
    assert grown.session["images"] == 3 and same_pixels(grown.dataset(), small)
    sizes = {"block_size": 1, "images_per_call": 4}
    counted = calls(sum((passes for _, passes in Rehearsal(pipe, sampling, {}).run(3, 2, **sizes)), Counter()))
    assert {name: getattr(grown.report, name) for name in counted} == counted
    save_dataset_folder(small, tmp_path / "set", targets=flow_targets)
    again, targets, record = load_recorded(tmp_path / "set")
    again.set_progress_bar_config(disable=True)
    parameters = record_parameters(json.loads(json.dumps(record)))
    assert same_pixels(concentrate(again, targets, seed=3, progress=False, **parameters), small)
    assert read_concentration(tmp_path / "set")["method"] == "nopt"


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on(flow, flow_targets, tmp_path, monkeypatch):
    options = {**RUN, **DRAWN, "images_per_call": 1, "method": NOpt(start=0.0)}
    expected, draw, seen = concentrate(flow, flow_targets, 2, **options), type(flow).sample, []

    def cut_off(*arguments, **given):
        seen.append(given["seeds"])
        if len(seen) % 3 == 0:
            raise KeyboardInterrupt
        return draw(*arguments, **given)

    monkeypatch.setattr(type(flow), "sample", cut_off)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            concentrate_to_folder(flow, flow_targets, 2, tmp_path, **options)
    assert same_pixels(concentrate_to_folder(flow, flow_targets, 2, tmp_path, **options).dataset(), expected)


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(flow, flow_targets, tmp_path):
    flow.save_pretrained(tmp_path / "pipe")
    flow_targets.save_pretrained(tmp_path / "targets")
    drawn = {}
    for processes in (1, 2):
        options = {"generator": "pipe", "targets": "targets", "images_per_class": 2, "block_size": 1,
                   "images_per_call": 1, "num_inference_steps": 4, "guidance_scale": 1.0, "optimize_from": 0.0,
                   "output_dir": f"out{processes}"}  # fmt: skip
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        done = run(launch_command("concentrate", *given, processes=processes), cwd=tmp_path, env=launch_environment())
        assert done.returncode == 0, done.stderr
        rows = load_dataset(f"{tmp_path}/out{processes}/dataset", split="train", cache_dir=f"{tmp_path}/cache")
        drawn[processes] = [np.asarray(image).tobytes() for image in rows["image"]]
    assert len(drawn[1]) == 6 and drawn[1] == drawn[2]


def test_peers_and_the_released_objective(flow, real_images):
    influence = IGD(checkpoints=2, epochs=1, architecture="convnet-1", start=0)
    for method in (D4M(), D3HR(groups=3), UAG(scale=0.5), influence):
        given, counted = real_images if method.name != "uag" else None, {"images_per_class": 1}
        targets = (
            None if given is None else method.make_targets(flow, given, Sampling(5, 1.0), progress=False, **counted)
        )
        drawn = flow.sample([0, 1], targets, seeds=[1, 2], method=method, **DRAWN)
        assert drawn.images.isfinite().all() and drawn.images.std() > 0.01
    targets = QuantileTargets.from_dataset(real_images, flow, draws=2, progress=False)
    drawn = flow.sample([0, 1], targets, seeds=[1, 2], method=Released(iterations=2), **DRAWN)
    assert drawn.images.isfinite().all()


def follow(pipe, message, scheduler):
    """Draws after the scheduler was set to one that the error names."""
    with pytest.raises(ValueError, match=message):
        pipe.sample([0], seeds=[0], **DRAWN)
    pipe.scheduler = scheduler(pipe.scheduler)
    assert pipe.sample([0], seeds=[0], **DRAWN).images.isfinite().all()


def test_schedulers_that_do_not_fit(flow, pipe):
    flow.scheduler = DDIMScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    told = r"a DDIMScheduler, is of a flow \(\['shift'\]\).*set `pipe.scheduler = FlowMatchEulerDiscreteScheduler"
    follow(flow, told + r"\(shift=3.0\)`", lambda _: FlowMatchEulerDiscreteScheduler(shift=3.0))
    flow.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    told = r"UniPC.*prediction_type='flow_prediction'.*`pipe.scheduler = FlowMatchEulerDiscreteScheduler\(shift=2.0\)`"
    follow(flow, told, lambda _: FlowMatchEulerDiscreteScheduler(shift=2.0))
    flow.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    told = "levels end at σ = 1, pure noise.*leave `invert_sigmas=True` out"
    follow(flow, told, lambda _: FlowMatchEulerDiscreteScheduler())
    cosine = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(cosine.config)
    told = r"was made of one of diffusion \(\['beta_schedule'\]\).*set `pipe.scheduler = DDIMScheduler.from_config"
    follow(pipe, told, lambda made: DDIMScheduler.from_config(made.config))
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    pipe.scheduler = DDIMScheduler(prediction_type="x0")
    told = "`prediction_type` must be one of .'epsilon', 'sample', 'v_prediction'., got 'x0'"
    follow(pipe, told, lambda _: DDIMScheduler(prediction_type="sample"))
