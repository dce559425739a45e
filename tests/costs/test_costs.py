import dataclasses
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderTiny

from conftest import IMAGENET_NAMES, tiny_resnet
from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    NOpt,
    Plain,
    QuantileTargets,
    Released,
    Sampling,
    concentrate_and_report,
)
from dsco_hf.concentration.concentrate import plan_units
from dsco_hf.costs.passes import Rehearsal, assumed_seconds, predict, stand_in_targets
from dsco_hf.costs.probe import imagenet_pipeline, probe_seconds, rates
from dsco_hf.costs.tracing import PassCost, TensorMemory, largest_batch, pass_costs, predict_memory, weight_bytes
from dsco_hf.matching.features import observe
from dsco_hf.sampling.call import calls


LABELS = [0, 0, 1, 2, 2]
SETTINGS = [
    {},
    {"num_inference_steps": 7, "guidance_scale": 1.0},
    {"method": NOpt(start=0.0, lookahead="guided")},
    {"method": NOpt(lookahead="guided"), "guidance_scale": 1.0},
    {"method": NOpt(lookahead="none", stop=0.8)},
    {"batch_size": 2},
    {"batch_size": 5, "method": NOpt(iterations=3)},
    {"eta": 0.0},
    {"method": NOpt(start=1.0)},
    {"method": NOpt("classifier")},
    {"method": NOpt("classifier", start=0.0), "batch_size": 3},
    {"method": Plain()},
    {"method": Plain(), "guidance_scale": 1.0, "batch_size": 2},
    {"output_type": "latent"},
]


def measured(output):
    names = ("denoiser_calls", "decoder_calls", "classifier_calls")
    return {name: getattr(output, name) for name in names}


@pytest.fixture
def preview_pipe(latent_pipe):
    torch.manual_seed(5)
    preview = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    latent_pipe.register_modules(preview_vae=preview.eval())
    return latent_pipe


@pytest.mark.slow
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("space", ["pipe", "latent_pipe", "preview_pipe"])
def test_calls_are_those_that_the_pipeline_counts(request, make, space, options):
    pipe = request.getfixturevalue(space)
    given = {"output_type": "pt", "num_inference_steps": 5, **options}
    kind = given.pop("output_type")
    sampling = Sampling.of(**given)
    targets = stand_in_targets(pipe, sampling.method, embedding_dim=16)
    output = pipe(LABELS, targets, generator=make.generators(range(5)), output_type=kind, method=sampling)
    assert calls(Rehearsal(pipe, sampling).passes(5, classes=3, output_type=kind)) == measured(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "features, networks, decodes",
    [
        ([{"layers": ["pooled"]}, {"network": "random"}], 2, True),
        ({"network": "random", "space": "latents"}, 1, False),
        ([{"layers": ["hidden_1"]}, {"network": "random", "space": "latents"}], 2, True),
    ],
)
def test_calls_and_work_follow_the_features(make, features, networks, decodes):
    pipe = imagenet_pipeline(device="cpu", dtype=torch.float32, tiny=True)
    images = make.images((2, 2, 2, 2), names=["0", "1", "2", "3"])
    targets = MatchingTargets.from_dataset(images, pipe, features=features, embedding_dim=16, progress=False)
    options = {"num_inference_steps": 4, "batch_size": 2}
    output = pipe([0, 1, 1], targets, generator=make.generators(range(3)), output_type="pt", **options)
    rehearsal = Rehearsal(pipe, Sampling(**options), features)
    passes = rehearsal.passes(3, classes=2)
    assert calls(passes) == measured(output)
    assert output.classifier_calls == 2 * networks * output.discrepancies.shape[0] * 3
    assert (passes["preview_backward"] > 0) == decodes
    costs, seconds = pass_costs(pipe, features=features), probe_seconds(rehearsal, 3, repeats=1)
    assert (costs["preview_backward"].flops > 0) == decodes
    assert costs["classifier_backward"].flops > costs["classifier"].flops > 0
    assert set(passes) - {"decoder"} <= set(seconds)  # decoding is part of "call"


@pytest.mark.slow
def test_calls_of_the_released_objective(pipe, real_images, make):
    targets = QuantileTargets.from_dataset(real_images, pipe, progress=False)
    sampling = Sampling(5, method=Released(iterations=3))
    output = pipe(LABELS, targets, generator=make.generators(range(5)), method=sampling)
    rehearsal = Rehearsal(pipe, sampling)
    assert calls(rehearsal.passes(5, classes=3)) == measured(output)
    assert output.classifier_calls == 5 * 3 * 4
    first, second = plan_units(3, 4, block_size=2)
    assert rehearsal.unit(first, last=False, population=9)["extractor"] == 3 * 9 * 5 * 4
    assert rehearsal.unit(second, last=True, population=9)["extractor"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("images_per_class", [2, 5])
def test_calls_of_a_run_are_those_of_its_report(pipe, targets, images_per_class):
    sizes, sampling = {"block_size": 2, "images_per_call": 4}, Sampling(4, batch_size=3)
    _, report = concentrate_and_report(pipe, targets, images_per_class, progress=False, method=sampling, **sizes)
    passes = of_run(Rehearsal(pipe, sampling, {}), images_per_class, **sizes)
    assert calls(passes) == measured(report)
    assert passes["embedding"] == 3 * {2: 0, 5: 4}[images_per_class]
    plain = of_run(Rehearsal(pipe, Sampling(4, method="plain")), images_per_class, **sizes)
    ahead = passes["classifier_backward"]  # the conditional look-ahead of each update
    assert plain["denoiser"] == passes["denoiser"] - ahead and set(plain) == {"denoiser", "call"}


def of_run(rehearsal, images_per_class, **sizes):
    return sum((passes for _, passes in rehearsal.run(3, images_per_class, **sizes)), Counter())


@pytest.fixture(scope="module")
def latent_costs(dit_folder):
    pipe = DsCoPipeline.from_pretrained(dit_folder, classifier=tiny_resnet(names=IMAGENET_NAMES))
    return pipe, pass_costs(pipe)


def test_flops_are_those_of_the_layers(pipe):
    """Every layer's own input and weights, seen by hooks in a real forward pass."""
    counted = 0

    def linear(module, inputs, output):
        nonlocal counted
        counted += 2 * inputs[0].numel() * module.out_features

    def convolution(module, inputs, output):
        nonlocal counted
        counted += 2 * output.numel() * module.weight[0].numel()

    for model in (pipe.denoiser, pipe.classifier):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(linear)
            elif isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(convolution)
    zeros = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        pipe.denoiser(torch.zeros(1, 1, 8, 8), timestep=zeros, class_labels=zeros)
        denoiser, counted = counted, 0
        observe(pipe.classifier, torch.zeros(1, 1, 8, 8))
    classifier, tokens, width = counted, 16, 16
    costs = pass_costs(pipe, features={}, extractor=True)
    assert costs["denoiser"].flops == denoiser + 4 * tokens**2 * width  # attention
    assert costs["classifier"].flops == costs["embedding"].flops == classifier
    assert 1.9 < costs["classifier_backward"].flops / classifier <= 2
    assert 1.5 < costs["extractor_backward"].flops / costs["extractor"].flops <= 2
    assert costs["preview_backward"].flops == 0 and "decoder" not in costs


@pytest.mark.slow
def test_the_reference_shapes_need_no_memory():
    """FLOPs of the tiny pipeline on "meta" are those of its real weights; only the attention's gradient differs."""
    meta, real = (imagenet_pipeline(device=device, tiny=True) for device in ("meta", "cpu"))
    assert weight_bytes(meta) == weight_bytes(real) > 0
    counted, expected = pass_costs(meta), pass_costs(real)
    assert counted.keys() == expected.keys()
    for kind, cost in counted.items():
        assert cost.flops == pytest.approx(expected[kind].flops, rel=0.02)
    assert counted["decoder"].flops > counted["preview"].flops > 0


@pytest.mark.slow
def test_memory_is_that_of_weights_activations_and_images(latent_costs):
    pipe, costs = latent_costs
    assert costs["preview"] == costs["decoder"]
    assert costs["preview_backward"].memory > 2 * costs["preview"].memory > 0  # the gradient needs what was computed
    one, four = (predict_memory(pipe, 4, costs, batch_size=size) for size in (1, 4))
    assert four - one == 3 * costs["preview_backward"].memory
    assert predict_memory(pipe, 8, costs, batch_size=1) > one > weight_bytes(pipe)
    assert predict_memory(pipe, 4, costs, optimised=False, guidance_scale=1.0) < four


def test_activation_memory_of_a_convolution_is_exact():
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 1))
    with torch.no_grad(), TensorMemory(layers.parameters()) as memory:
        layers(torch.zeros(1, 2, 4, 4))
    # input 2, first result 3, after ReLU 3 (the input is still held by the caller), each of 16 numbers of 4 bytes
    assert memory.peak == (2 + 3 + 3) * 16 * 4
    assert memory.alive == 0


@pytest.mark.slow
def test_the_largest_batch_just_fits(latent_costs):
    pipe, costs = latent_costs
    limit = predict_memory(pipe, 20, costs, batch_size=7)
    assert largest_batch(pipe, 20, costs, limit) == 7
    assert largest_batch(pipe, 20, costs, limit - 1) == 6
    assert largest_batch(pipe, 20, costs, weight_bytes(pipe)) == 0
    assert largest_batch(pipe, 20, costs, 1e12) == 20


def test_time_is_that_of_the_slowest_process(pipe):
    costs = {"denoiser": PassCost(10, 1), "preview_backward": PassCost(0, 1)}
    seconds = {"denoiser": 2.0}
    options = {"block_size": 2, "images_per_call": 2}
    rehearsal = Rehearsal(pipe, Sampling(3, 1.0, method=NOpt(start=0.6)))
    found = predict(rehearsal, 3, 4, costs=costs, seconds=seconds, num_processes=(1, 2, 3, 8), **options)
    # three groups of one class; 4 images of each, 3 steps and a look-ahead, a denoiser pass of 2 s
    assert found.images == 12 and found.calls["denoiser_calls"] == found.passes["denoiser"] == 48
    assert found.seconds == {1: 96.0, 2: 64.0, 3: 32.0, 8: 32.0}
    assert found.flops == 480


def test_assumed_seconds_are_flops_by_rate():
    costs = {"denoiser": PassCost(4 * 10**12, 0)}
    assert assumed_seconds(costs, peak_tflops=100, utilisation=0.4) == {"denoiser": 0.1}
    with pytest.raises(ValueError, match="utilisation"):
        assumed_seconds(costs, peak_tflops=100, utilisation=40)
    with pytest.raises(ValueError, match="peak_tflops"):
        assumed_seconds(costs, peak_tflops=0, utilisation=0.4)


def test_the_probe_measures_every_kind_that_a_run_has(preview_pipe):
    rehearsal = Rehearsal(preview_pipe, Sampling(10, 2.0, batch_size=3))
    found = probe_seconds(rehearsal, 4, repeats=1, embedding_dim=32)
    assert set(of_run(rehearsal, 5, block_size=2, images_per_call=4)) - {"decoder"} <= set(found)
    assert all(seconds > 0 for kind, seconds in found.items() if kind != "call") and found["call"] >= 0


def test_seconds_are_told_apart_by_steps():
    """A slow first step, plain and optimised steps of 1 s a pass and 2 s an update, and 6 s for what is left."""
    counts = [Counter(denoiser=2)]
    for more in (Counter(denoiser=4, classifier_backward=2), Counter(denoiser=2), Counter(denoiser=2)):
        counts.append(counts[-1] + more)
    run = [(9.0, counts[0]), (17.0, counts[1]), (19.0, counts[2]), (21.0, counts[3]), (22.0, counts[3])]
    found = rates([run], images=2)
    assert found == {"denoiser": 1.0, "classifier_backward": 2.0, "call": 4.0}


def test_stand_in_targets_are_targets(pipe, targets):
    found = stand_in_targets(pipe, features={}, embedding_dim=targets.embedding_dim)
    assert isinstance(found, MatchingTargets)
    for field in dataclasses.fields(MatchingTargets):
        mine, real = getattr(found, field.name), getattr(targets, field.name)
        assert type(mine) is type(real)
        if torch.is_tensor(real):
            assert mine.shape == real.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "parameters", "image_size"),
    [
        ("sd-1.5", 859_520_964, 512),
        ("sdxl", 2_567_463_684, 1024),
        ("pixart-512", 610_856_096, 512),
        ("sd3-medium", 2_028_328_000, 1024),
    ],
)
def test_shapes_of_text_to_image_models_are_those_that_are_published(shapes, parameters, image_size):
    pipe = imagenet_pipeline(shapes=shapes)
    assert sum(weight.numel() for weight in pipe.denoiser.parameters()) == parameters
    assert (pipe.image_size, pipe.num_classes, pipe.device.type) == (image_size, 1000, "meta")
    costs = pass_costs(pipe)
    assert costs["denoiser"].flops > 4e11 and costs["preview"].flops < costs["decoder"].flops
