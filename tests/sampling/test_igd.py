"""IGD: its gradients by hand, what moves an image and by how much, the network that it trains and what it costs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dsco_hf import Sampling, concentrate
from dsco_hf.costs.passes import Rehearsal, synthesis_flops
from dsco_hf.costs.tracing import pass_costs
from dsco_hf.data.datasets import load_pixels
from dsco_hf.evaluators import ImageSet, build_evaluator
from dsco_hf.sampling.peers import IGD, ClassStatistics
from dsco_hf.sampling.peers.igd import (
    convnet_of,
    epochs_kept,
    mean_gradient,
    mismatch,
    parameter_gradient,
    sample_pixels,
    towards_closest,
    train_and_keep,
    weights_of,
    with_plain_norms,
)


SMALL = IGD(checkpoints=2, epochs=2, architecture="convnet-1")


class Linear(torch.nn.Linear):
    def forward(self, inputs):
        return SimpleNamespace(logits=super().forward(inputs))


@pytest.fixture
def gradients(pipe, real_images):
    return SMALL.make_targets(pipe, real_images, Sampling(), progress=False)


def started(pipe, targets, labels, method=SMALL, *, eta=1.0):
    generators = [torch.Generator().manual_seed(7 + number) for number in range(len(labels))]
    sampling = Sampling(10, 1.0, eta=eta, batch_size=2, method=method)
    call = pipe.start_call(labels, targets, sampling, generator=generators)
    method.prepare(call)
    latents, first = method.begin(call)
    assert first == 0
    return call, latents


def test_the_gradient_and_its_mismatch_on_a_linear_network_by_hand():
    network, x, label = Linear(3, 2), torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True), torch.tensor([1])
    state = {"weight": torch.tensor([[0.2, 0.1, -0.3], [-0.1, 0.4, 0.2]]), "bias": torch.tensor([0.1, -0.2])}
    error = (x @ state["weight"].T + state["bias"]).softmax(dim=1) - torch.tensor([[0.0, 1.0]])  # p - e_y
    by_hand = torch.cat([(error.T @ x).flatten(), error.flatten()])
    torch.testing.assert_close(parameter_gradient(network, state, x, label), by_hand)
    wanted = torch.tensor([0.3, 0.1, -0.2, 0.5, -0.4, 0.2, 0.1, 0.7])
    expected = 1 - by_hand @ wanted / (by_hand.norm() * wanted.norm())
    loss = mismatch(network, state, x, label, wanted)
    assert loss.item() == pytest.approx(expected.item()) and 0.1 < loss < 2
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])
    assert mismatch(network, state, x, label, by_hand.detach()).item() == pytest.approx(0, abs=1e-6)
    assert network.weight.grad is None


def test_the_mean_gradient_is_that_of_all_images_in_parts(monkeypatch):
    monkeypatch.setattr("dsco_hf.sampling.peers.igd.AT_ONCE", 3)
    network = with_plain_norms(
        build_evaluator("convnet-1", class_names=["a", "b"], image_size=8, num_channels=1, seed=0)
    )
    state, pixels = weights_of(network), torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    each = [parameter_gradient(network, state, one[None], torch.tensor([1])) for one in pixels]
    torch.testing.assert_close(mean_gradient(network, state, pixels, 1), torch.stack(each).mean(dim=0))


def test_the_deviation_by_hand():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 1.0]])[:, :, None, None]
    m = torch.tensor([[0.0, 2.0], [9.0, 9.0], [1.0, 1.0], [5.0, 0.0], [1.0, 0.0]])[:, :, None, None]
    found = towards_closest(x, m, torch.tensor([0, 1, 0, 0, 1])).flatten(1)
    assert found[:2].abs().max() == 0  # nothing is before the first of each class
    torch.testing.assert_close(found[2], torch.zeros(2))  # x is parallel to m: the cosine is at its highest
    half = 0.5**0.5  # image 3 is closest to image 2, at 45 degrees: (m/|m| - cos x/|x|) / |x|
    torch.testing.assert_close(found[3], torch.tensor([0.0, half / 2]))
    torch.testing.assert_close(found[4], torch.tensor([half, 0.0]))
    leaf = x[3].clone().requires_grad_()
    cosine = torch.cosine_similarity(leaf.flatten(), m[2].flatten(), dim=0)
    torch.testing.assert_close(found[3], torch.autograd.grad(cosine, leaf)[0].flatten())
    many = torch.zeros(70, 2, 1, 1)
    many[:, 1], many[0, 0], many[69] = 1, 1, torch.tensor([1.0, 0.1])[:, None, None]
    later = towards_closest(many[1:], many[1:], torch.zeros(69, dtype=torch.int64))[-1]
    forgotten = towards_closest(many, many, torch.zeros(70, dtype=torch.int64))[-1]
    torch.testing.assert_close(forgotten, later)  # only 64 are remembered


def test_an_image_moves_by_the_published_length_towards_the_gradient_of_its_class(pipe, gradients):
    call, latents = started(pipe, gradients, [2, 0, 1])
    prediction, noise = 0.3 * latents, call.draw_noise(latents)
    moved = SMALL.noise(call, 2, latents, prediction, noise)
    alpha = pipe.scheduler.alphas_cumprod[call.timesteps[2]]
    ratio = 5 * 0.0015 * (1 - alpha).sqrt() / call.sigma(2)
    length = (moved - noise).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, ratio * prediction.flatten(1).norm(dim=1), atol=1e-6, rtol=1e-3)
    rows, network, states = call.state
    assert rows.tolist() == [2, 0, 1] and call.counts["surrogate_backward"] == 6 == 3 * len(states)

    def losses(x):
        pixels = call.clean(2, x, prediction)
        pairs = list(zip(rows, pixels, gradients.tensors["gradients"][rows.cpu()], strict=True))
        return torch.stack([
            sum(mismatch(network, state, one[None], row[None], g) for state, g in zip(states, wanted, strict=True))
            for row, one, wanted in pairs
        ])  # fmt: skip

    leaf = latents.clone().requires_grad_(True)
    before = losses(leaf)
    (slope,) = torch.autograd.grad(before.sum(), leaf)
    step = moved - noise
    torch.testing.assert_close(torch.cosine_similarity(step.flatten(1), -slope.flatten(1)), torch.ones(3))
    assert (losses(latents + step * 0.3) < before).all()
    for same in (0, 4):  # of ten steps 1, 2 and 3
        assert SMALL.noise(call, same, latents, prediction, noise) is noise
    assert list(range(round(IGD().start * 50), round(IGD().stop * 50))) == [49 - k for k in range(45, 29, -1)]


def test_the_deviation_moves_later_images_of_a_class_alone_and_without_noise_nothing_does(pipe, gradients):
    method = dataclasses.replace(SMALL, scale=0)
    call, latents = started(pipe, gradients, [0, 2, 0], method)
    noise = call.draw_noise(latents)
    step = method.noise(call, 2, latents, latents, noise) - noise
    assert step[:2].abs().max() == 0 < step[2].abs().max() and not call.counts["surrogate_backward"]
    clean = call.clean(2, latents, latents)
    expected = -120 * 64 / 4096 / call.sigma(2) * towards_closest(latents, clean, call.labels)
    torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-4)
    cosine = [
        torch.cosine_similarity(x.flatten(), clean[0].flatten(), dim=0) for x in (latents[2], (latents + step)[2])
    ]
    assert cosine[1] < cosine[0]
    call, latents = started(pipe, gradients, [0, 2, 0], eta=0.0)
    assert SMALL.noise(call, 2, latents, latents, noise) is noise


def test_a_network_is_kept_at_a_few_epochs_of_one_seeded_training(pipe, real_images):
    assert epochs_kept(4, 40) == [0, 4, 18, 40] and epochs_kept(1, 40) == [0]
    expected = {8: "convnet-3", 32: "convnet-3", 64: "convnet-4", 224: "convnet-5", 256: "convnet-6"}
    assert {size: convnet_of(size) for size in expected} == expected
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    images = ImageSet(pixels, labels)
    networks = [SMALL.network(pipe, ["a", "b", "c"], seed=3) for _ in range(2)]
    before = weights_of(networks[0])
    one, other = (train_and_keep(network, images, [0, 1, 3], seed=5) for network in networks)
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(one[name][0], value) and torch.equal(one[name][2], networks[0].state_dict()[name])
    weight = one["classifier.weight"]
    assert not torch.equal(weight[0], weight[1]) and not torch.equal(weight[1], weight[2])


def test_a_class_has_as_many_images_as_there_are_and_order_is_that_of_keys(pipe, real_images):
    found, images, read = sample_pixels(real_images, pipe, 6, seed=1, batch_size=5, progress=False)
    streamed = sample_pixels(real_images.to_iterable_dataset(), pipe, 6, seed=1, batch_size=7, progress=False)[1]
    assert [len(one) for one in images] == [6, 6, 5] and read == 21 and found.class_labels == [0, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(images, streamed, strict=True))
    with pytest.raises(ValueError, match="at least two classes"):
        SMALL.make_targets(pipe, real_images.filter(lambda row: row["label"] == 1), Sampling(), progress=False)


@pytest.mark.slow
def test_targets_keep_the_network_and_tell_another_one(pipe, real_images, gradients, tmp_path):
    gradients.save_pretrained(tmp_path)
    kept = ClassStatistics.from_pretrained(tmp_path)
    assert kept.shared.keys() == gradients.shared.keys() and kept.provenance["epochs"] == [0, 2]
    assert all(torch.equal(kept.shared[name], value) for name, value in gradients.shared.items())
    assert torch.equal(kept.tensors["gradients"], gradients.tensors["gradients"])
    other = SMALL.make_targets(pipe, real_images, Sampling(), progress=False, seed=1)
    assert not torch.equal(other.tensors["gradients"], gradients.tensors["gradients"])
    few = dataclasses.replace(SMALL, images=1).make_targets(pipe, real_images, Sampling(), progress=False)
    assert few.provenance["passes"] == {"surrogate": 21 * 2 + 2 * 3}
    assert torch.equal(few.shared["classifier.weight"], gradients.shared["classifier.weight"])
    one = concentrate(pipe, kept, 2, method=Sampling(4, 1.0, method=SMALL), progress=False)
    assert one["image"][:] == concentrate(pipe, gradients, 2, method=Sampling(4, 1.0, method=SMALL), progress=False)[
        "image"][:]  # fmt: skip


@pytest.mark.slow
def test_its_network_is_counted_and_costed_with_the_decoder(pipe, latent_pipe):
    sampling = Sampling(10, 1.0, method=SMALL)
    passes = Rehearsal(pipe, sampling).passes(4, classes=2)
    assert passes["surrogate_backward"] == 3 * 4 * 2 and "classifier_backward" not in passes
    costs = pass_costs(pipe, method=SMALL)
    assert "surrogate" not in pass_costs(pipe)
    assert 1.5 < costs["surrogate_backward"].flops / costs["surrogate"].flops < 4
    forward = 2 * 64 * 9 * 128 + 2 * 128 * 16 * 3  # a convolution of 8 x 8 maps and the head
    assert 1.9 * forward < costs["surrogate"].flops <= 3 * forward
    drawn = synthesis_flops(pipe, sampling, 3, 2, costs=costs)
    plain = synthesis_flops(pipe, Sampling(10, 1.0, method="plain"), 3, 2, costs=costs)
    assert drawn - plain == 3 * 6 * 2 * costs["surrogate_backward"].flops
    latent_pipe.classifier = None
    decoding = pass_costs(latent_pipe, method=SMALL)
    assert decoding["preview_backward"].flops > decoding["preview"].flops > 0
    assert decoding["surrogate_backward"].memory > decoding["surrogate"].memory > 0


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"scale": -1}, {"deviation": -1}, {"checkpoints": 0}, {"epochs": 0}, {"images": 0}, {"stop": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            IGD(**wrong)
    with pytest.raises(ValueError, match="Unknown architecture 'convnet3'"):
        IGD(architecture="convnet3")
