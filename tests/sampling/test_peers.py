"""Peers: each formula by hand, and all of them drawn, resumed, divided, counted and drawn again from their records."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import save_file

from dsco_hf import (
    DsCoPipeline,
    Sampling,
    SamplingMethod,
    concentrate,
    concentrate_and_report,
    concentrate_to_folder,
    dope,
    get_protocol,
    load_image_set,
    load_recorded,
    save_dataset_folder,
)
from dsco_hf.concentration.concentrate import UnitSampler, divide, plan_units
from dsco_hf.concentration.records import record_parameters
from dsco_hf.concentration.set_records import changed_since, record_of
from dsco_hf.costs.passes import Rehearsal
from dsco_hf.data.datasets import load_pixels
from dsco_hf.data.labels import counted_in_class
from dsco_hf.matching.features import features_and_logits
from dsco_hf.sampling.call import calls
from dsco_hf.sampling.peers import D3HR, D4M, DDOQ, DMGD, IGD, MGD3, S3, UAG, BestOfN, ClassStatistics
from dsco_hf.sampling.peers.best_of_n import surest
from dsco_hf.sampling.peers.d3hr import best_group, group_scores, invert
from dsco_hf.sampling.peers.dmgd import class_costs, transport_cost
from dsco_hf.sampling.peers.s3 import coordinate_ascent, distances
from dsco_hf.sampling.peers.statistics import Sample, centroids, sample_classes
from dsco_hf.sampling.peers.uag import entropy


PEERS = {
    "best-of-n": BestOfN(candidates=2),
    "mgd3": MGD3(scale=0.5),
    "d4m": D4M(),
    "ddoq": DDOQ(strength=0.5),
    "uag": UAG(),
    "s3": S3(candidates=2),
    "dmgd": DMGD(clusters=2, start=0),
    "d3hr": D3HR(groups=20),
    "igd": IGD(checkpoints=2, epochs=2, architecture="convnet-1"),
}
PASSED = {"s3": {"classifier": 7}, "igd": {"surrogate": 7 * 2 + 2 * 7}}
OF_IMAGES = [name for name in PEERS if name not in ("best-of-n", "uag")]
SIZES = {"block_size": 1, "images_per_call": 2}


def drawn_with(method):
    return Sampling(4, 1.0, batch_size=3, method=method)


def pixels_of(dataset):
    return [np.asarray(image).tobytes() for image in dataset["image"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_drawn_resumed_divided_counted_and_drawn_again(pipe, real_images, tmp_path, name):
    method, options = PEERS[name], {**SIZES, "seed": 3, "progress": False}
    assert SamplingMethod.of({"name": name}).name == method.name == name
    small, report = concentrate_and_report(pipe, real_images, 2, method=drawn_with(method), **options)
    assert pixels_of(small) != pixels_of(
        concentrate(pipe, None, 2, method=Sampling(4, 1.0, batch_size=3, method="plain"), **options)
    )
    run = concentrate_to_folder(pipe, real_images, 2, tmp_path, method=drawn_with(method), **options)
    lost = sorted((tmp_path / "units").glob("*.json"))[-1]
    lost.unlink()
    again = concentrate_to_folder(pipe, real_images, 2, tmp_path, method=drawn_with(method), **options)
    assert again.session["images"] < run.session["images"] == 6
    assert pixels_of(run.dataset()) == pixels_of(again.dataset()) == pixels_of(small)
    assert again.dataset().features == small.features
    counted = calls(sum((passes for _, passes in Rehearsal(pipe, drawn_with(method)).run(3, 2, **SIZES)), Counter()))
    assert counted == {kind: getattr(report, kind) for kind in counted}
    record = record_of(small)
    assert record["method"] == name and record["targets"]["kind"] == "ClassStatistics"
    parameters = record_parameters(record)
    assert parameters["method"] == drawn_with(method)
    assert pixels_of(concentrate(pipe, real_images, seed=3, progress=False, **parameters)) == pixels_of(small)
    targets = drawn_with(method).make_targets(pipe, real_images, seed=3, progress=False, images_per_class=2)
    targets.save_pretrained(tmp_path / "kept")
    kept = ClassStatistics.from_pretrained(tmp_path / "kept")
    units = plan_units(3, 2, **SIZES)
    found = {}
    for share in divide(units, 2):  # as two processes would
        sampler = UnitSampler(pipe, kept, drawn_with(method), seed=3)
        for unit in [unit for unit in units if unit.group in share]:
            rows, *_ = sampler.draw(unit)
            found |= {(row["label"], unit.block): np.asarray(row["image"]).tobytes() for row in rows}
    assert [found[key] for key in sorted(found)] == pixels_of(small)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_works_in_latents(latent_pipe, make, name):
    names = [latent_pipe.id2label[index] for index in range(3)]
    real = make.images((3, 2, 2), names=names)
    small, report = concentrate_and_report(
        latent_pipe, real, 1, method=Sampling(3, 2.0, method=PEERS[name]), progress=False
    )
    assert small["image"][0].size == (8, 8) and small["image"][0].mode == "RGB"
    assert report.decoder_calls >= 3
    if name in OF_IMAGES:
        targets = PEERS[name].make_targets(latent_pipe, real, Sampling(), progress=False, images_per_class=1)
        passes = targets.provenance["passes"]
        assert ("denoiser" in passes) == (name == "d3hr")
        passes = {kind: count for kind, count in passes.items() if kind != "denoiser"}
        assert targets.provenance["images"] == 7 and passes == PASSED.get(name, {"encoder": 7})
        assert next(iter(targets.tensors.values())).shape[0] == 3


def test_slots_count_within_their_class_whatever_else_is_drawn(pipe):
    assert counted_in_class([4, 2, 4, 4, 2]) == [0, 0, 1, 2, 1]
    call = pipe.start_call([0, 1, 0], None, Sampling(2, 1.0, method=BestOfN(2)), indices=[5, 5, 6])
    assert call.indices == [5, 5, 6, 5, 5, 6] and call.ids == [0, 1, 0, 0, 1, 0]


def test_centroids_by_hand_largest_cell_first():
    one = torch.tensor([[0.0], [10.0], [10.2], [0.2], [9.8]])[:, :, None, None]
    found = centroids([one, one + 1], ["a", "b"], 2, seed=0)
    torch.testing.assert_close(found["centroids"].flatten(), torch.tensor([10.0, 0.1, 11.0, 1.1]))
    torch.testing.assert_close(found["shares"], torch.tensor([[0.6, 0.4]] * 2))
    single = centroids([one], ["a"], 1, seed=0)
    torch.testing.assert_close(single["centroids"].flatten(), one.mean().view(1))
    with pytest.raises(ValueError, match="5 centroids need as many images of every class, but 'b' has 4: ask for few"):
        centroids([one, one[:4]], ["a", "b"], 5, seed=0)


def test_a_sample_does_not_depend_on_batches_and_is_bounded(pipe, real_images):
    keys, values = torch.arange(20) * 977, torch.arange(20.0)[:, None]
    labels = torch.arange(20) % 2
    whole, parts = Sample(3, 4, seed=1), Sample(3, 4, seed=1)
    whole.add(values, labels, keys)
    for rows in torch.randperm(20, generator=torch.Generator().manual_seed(0)).split(3):
        rows = rows[parts.may_stay(labels[rows], keys[rows])]
        parts.add(values[rows], labels[rows], keys[rows])
    for one, other in zip(whole.values, parts.values, strict=True):
        assert torch.equal(one, other) and len(one) in (0, 4)
    few = sample_classes(real_images, pipe, most=2, batch_size=5, progress=False)
    streamed = sample_classes(real_images.to_iterable_dataset(), pipe, most=2, batch_size=7, progress=False)
    assert [len(one) for one in few[1]] == [2, 2, 2] and few[0].provenance["images"] == 21
    assert all(torch.equal(one, other) for one, other in zip(few[1], streamed[1], strict=True))


def started(pipe, method, targets, labels, *, indices=None, steps=10):
    generators = [torch.Generator().manual_seed(7 + number) for number in range(len(labels))]
    sampling = Sampling(steps, 1.0, method=method)
    return pipe.start_call(labels, targets, sampling, generator=generators, indices=indices)


def of_centroids(pipe, values):
    """Statistics of one pixel value for each centroid of each class."""
    made = torch.tensor(values)[:, :, None, None, None].expand(-1, -1, *pipe.latent_shape).clone()
    shares = torch.tensor([[0.75, 0.25]] * len(values))
    return ClassStatistics("centroids", ["a", "b"], [0, 2], {"centroids": made, "shares": shares})


def test_mode_guidance_moves_each_step_by_the_published_amount(pipe):
    call = started(pipe, MGD3(scale=0.2), of_centroids(pipe, [[0.5, -0.5], [0.1, 0.9]]), [2, 0, 0], indices=[1, 0, 3])
    call.method.prepare(call)
    latents, first = call.method.begin(call)
    prediction, noise = torch.zeros_like(latents), call.draw_noise(latents)
    assert first == 0 and call.state[:, 0, 0, 0].tolist() == pytest.approx([0.9, 0.5, -0.5])
    moved = call.step(2, latents, prediction, call.method.noise(call, 2, latents, prediction, noise))
    plain = call.step(2, latents, prediction, noise)
    expected = 0.2 * call.sigma(2) * (call.state - call.clean(2, latents, prediction))
    torch.testing.assert_close(moved - plain, expected, atol=1e-6, rtol=1e-5)
    assert call.method.noise(call, 5, latents, prediction, noise) is noise  # 0.48 of ten steps are five


def test_the_published_steps_of_mode_guidance_are_the_first_24_of_50():
    assert [i for i in range(50) if 49 - i > 25] == list(range(round(MGD3().stop * 50)))


def test_d4m_begins_at_the_noised_centroid(pipe):
    targets = of_centroids(pipe, [[0.5, -0.5], [0.1, 0.9]])
    call = started(pipe, D4M(strength=0.75), targets, [0, 2], indices=[1, 0])
    latents, first = call.method.begin(call)
    again = started(pipe, D4M(strength=0.75), targets, [0, 2])
    alpha = pipe.scheduler.alphas_cumprod[call.timesteps[first]]
    centres, noise = torch.tensor([-0.5, 0.1])[:, None, None, None], again.first_latents()
    expected = alpha.sqrt() * centres + (1 - alpha).sqrt() * noise
    assert first == 3  # int(7.5) of ten steps are left
    torch.testing.assert_close(latents, expected)
    assert started(pipe, D4M(strength=1), targets, [0]).method.begin(call)[1] == 0
    assert D4M(strength=0.01).begin(call)[1] == 9


def test_weights_are_the_shares_of_the_cells(pipe, real_images):
    targets = of_centroids(pipe, [[0.5, -0.5], [0.1, 0.9]])
    call = started(pipe, DDOQ(), targets, [0, 0, 2], indices=[0, 1, 1])
    assert DDOQ().weights(call).tolist() == [1.5, 0.5, 0.5]
    small = concentrate(pipe, real_images, 2, method=Sampling(2, 1.0, method="ddoq"), progress=False)
    weights = np.asarray(small["weight"]).reshape(3, 2)
    assert weights.mean(axis=1) == pytest.approx([1, 1, 1]) and (weights[:, 0] >= weights[:, 1]).all()
    plain = concentrate(pipe, real_images, 1, method=Sampling(2, 1.0, method="d4m"), progress=False)
    assert "weight" not in plain.column_names


def test_weights_are_kept_doped_published_and_read(pipe, real_images, tmp_path):
    small = concentrate(pipe, real_images, 2, method=Sampling(2, 1.0, method="ddoq"), progress=False)
    protocol = get_protocol("quick", steps=1)
    read = load_image_set(small, protocol=protocol, num_channels=1)
    assert read.weights.tolist() == small["weight"][:]
    assert load_image_set(small, protocol=protocol, num_channels=1, test_for=read).weights is None
    assert load_image_set(small.remove_columns("real_index"), protocol=protocol).weights is None  # not known as ours
    save_dataset_folder(small, tmp_path / "set")
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "how much the image counts in the training loss" in card
    stored = load_dataset("parquet", data_dir=str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert stored["weight"][:] == small["weight"][:]
    mixed = dope(small, real_images, strategy="random", images_per_class=3, progress=False)
    assert mixed["weight"][:6] == small["weight"][:] and mixed["weight"][6:] == [1, 1, 1]
    lacking = small.map(lambda row, index: {"weight": row["weight"] if index else None}, with_indices=True)
    with pytest.raises(ValueError, match="Row 0 has no weight, but None: give each row one, or remove the column"):
        load_image_set(lacking, protocol=protocol)
    assert load_image_set(lacking.remove_columns("weight"), protocol=protocol).weights is None
    changed = small.map(lambda row: {"weight": 1.0})
    record = record_of(small)
    assert changed_since(record, small) is None and "columns" in changed_since(record, changed)


def test_the_surest_of_each_class_stay_right_ones_first():
    logits = torch.tensor([[2.0, 0, 0], [3, 0, 0], [0, 0, 5], [1, 1.1, 0], [9, 0, 0], [0, 0, 1]])
    labels, ids = torch.tensor([0, 0, 2, 1, 1, 2]), torch.tensor([7, 7, 5, 8, 8, 5])
    found = surest(logits, labels, ids, torch.tensor([5, 7, 8]))
    assert found.tolist() == [2, 1, 3]  # 3 is right of class 8
    wrong = surest(torch.tensor([[0.0, 1], [0, 3], [1, 0]]), torch.zeros(3).long(), *torch.ones(2, 3).long())
    assert wrong.tolist() == [2, 0, 1]


def test_best_of_n_keeps_surer_images_than_plain_samples(pipe, make):
    def probability(images):
        with torch.no_grad():
            return pipe.classifier((images - 0.5) / 0.5).logits.softmax(1)

    options = {"seeds": [1, 2, 3, 4], "num_inference_steps": 3, "guidance_scale": 1.0}
    labels = [0, 1, 2, 2]
    best = pipe.sample(labels, method=BestOfN(6), **options)
    plain = pipe.sample(labels, method="plain", **options)
    assert best.denoiser_calls == 6 * plain.denoiser_calls and best.classifier_calls == 24
    own = torch.tensor(labels)[:, None]
    one, other = (probability(output.images).gather(1, own).mean() for output in (best, plain))
    assert one > other


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = [math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    torch.testing.assert_close(entropy(logits), torch.tensor(expected))


def test_uncertainty_moves_the_prediction_along_its_gradient_and_raises_it(pipe):
    method = UAG(scale=0.5)
    call = started(pipe, method, None, [0, 1, 2])
    latents, prediction = torch.randn(3, *pipe.latent_shape, generator=torch.Generator().manual_seed(0)), None
    prediction = 0.3 * latents
    moved = method.guide(call, 6, latents, prediction)
    alpha = pipe.scheduler.alphas_cumprod[call.timesteps[6]]
    x = latents.clone().requires_grad_()
    clean = ((x - (1 - alpha).sqrt() * prediction) / alpha.sqrt()).clamp(-1, 1)
    total = entropy(pipe.classifier(clean).logits).sum()
    (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(moved, prediction - 0.5 * (1 - alpha).sqrt() * gradient, atol=1e-5, rtol=1e-4)
    after = entropy(pipe.classifier(call.clean(6, latents, moved)).logits).sum()
    assert after > total
    assert method.guide(call, 0, latents, prediction) is prediction  # t = 900 is above 795
    assert call.counts["classifier_backward"] == 3


def test_the_choice_of_sets_by_hand():
    real = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    means = torch.tensor([[[1.0, 1.0], [0.2, 1.0]], [[1.0, 0.1], [1.0, 1.0]]])  # (G, C, d)
    torch.testing.assert_close(distances(means[0, 0], real[0]), torch.tensor(1 - 0.5**0.5))
    assert coordinate_ascent(means, real, 1.0, 0.0).tolist() == [1, 0]  # each the most like its class
    scores = {
        (a, b): -0.4 * (distances(means[a, 0], real[0]).log() + distances(means[b, 1], real[1]).log())
        + 0.9 * distances(means[a, 0], means[b, 1]).log()
        for a in (0, 1)
        for b in (0, 1)
    }
    found = coordinate_ascent(means, real, 0.4, 0.9)
    assert scores[tuple(found.tolist())] == max(scores.values())
    assert coordinate_ascent(means[:, :1], real[:1], 0.4, 0.9).tolist() == [1]  # one class


def test_s3_leaves_whole_sets_and_means_are_those_of_all_images(pipe, real_images):
    targets = S3().make_targets(pipe, real_images, Sampling(), progress=False)
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    features = features_and_logits(pipe.classifier, pixels)[0].detach()
    expected = torch.stack([features[labels == row].mean(dim=0) for row in range(3)])
    torch.testing.assert_close(targets.tensors["means"], expected)
    call = started(pipe, S3(candidates=3), targets, [0, 1, 1, 0, 2])
    call.method.prepare(call)
    drawn = torch.rand(15, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        sets = call.method.choose(call, drawn, drawn) // 5
    assert sets[0] == sets[3] and sets[1] == sets[2] and call.counts["classifier"] == 15
    with pytest.raises(ValueError, match="means of these targets have shape"):
        wide = dataclasses.replace(targets, tensors={"means": torch.ones(3, 7)})
        pipe.sample([0], wide, seeds=[1], method="s3")


def test_the_best_group_by_hand():
    noise = torch.tensor([[[1.0, -3.0], [1.0, 1.0]], [[2.0, 0.0], [-1.0, 0.5]]])  # (m, n, d)
    sigma = torch.tensor([2.0, 1.0])
    first = (4 + 1) ** 0.5 + ((2 * -1) ** 2 + (2 - 1) ** 2) ** 0.5  # means 1 and -1, deviations 0 and 2
    second = (1 + 0.25**2) ** 0.5 + ((2 * 0.5) ** 2 + 0.75**2) ** 0.5
    torch.testing.assert_close(group_scores(noise, sigma, 0.0), torch.tensor([first, second]))
    skewed = torch.tensor([[[0.0, 0.0, 3.0]]])  # moments 2 and 2 about the mean 1
    torch.testing.assert_close(
        group_scores(skewed, torch.ones(3), 0.5) - group_scores(skewed, torch.ones(3), 0.0),
        torch.tensor([0.5 * 2 / 2**1.5]),
    )
    one, many = (best_group(3, sigma, groups, 0.1, torch.Generator().manual_seed(0)) for groups in (1, 500))
    assert group_scores(many[None], sigma, 0.1) < 0.5 * group_scores(one[None], sigma, 0.1)


def test_inversion_by_hand_and_what_is_known_of_inverted_classes(pipe, real_images):
    sampling, scheduler = Sampling(50, 1.0, method=D3HR(groups=5)), pipe.scheduler
    scheduler.set_timesteps(50)
    levels = scheduler.timesteps[18:].flip(0).tolist()
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    alphas = scheduler.alphas_cumprod
    noise = pipe.predict_noise(pixels, levels[0], labels)
    once = alphas[levels[0]].sqrt() * pixels + (1 - alphas[levels[0]]).sqrt() * noise
    torch.testing.assert_close(invert(pixels, labels, pipe, levels[:1], 1.0), once)
    noise = pipe.predict_noise(once, levels[1], labels)
    clean = (once - (1 - alphas[levels[0]]).sqrt() * noise) / alphas[levels[0]].sqrt()
    twice = alphas[levels[1]].sqrt() * clean + (1 - alphas[levels[1]]).sqrt() * noise
    torch.testing.assert_close(invert(pixels, labels, pipe, levels[:2], 1.0), twice)
    found = invert(pixels, labels, pipe, levels, 1.0)
    targets = sampling.make_targets(pipe, real_images, progress=False)
    mean = torch.stack([found[labels == row].mean(dim=0) for row in range(3)])
    spread = torch.stack([found[labels == row].std(dim=0, unbiased=False) for row in range(3)])
    torch.testing.assert_close(targets.tensors["means"], mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(targets.tensors["deviations"], spread, atol=1e-4, rtol=1e-3)
    assert targets.provenance["passes"]["denoiser"] == 21 * 32 and targets.provenance["timestep"] == levels[-1]
    call = started(pipe, sampling.method, targets, [2, 0, 2], steps=50)
    _, first = call.method.begin(call)
    assert first == 18 and call.eta == 0


def test_transport_by_hand():
    plan = torch.tensor([[0.1, 0.4], [0.4, 0.1]])  # of two points on two equal masses: exp(-C / ε), scaled
    costs = torch.tensor([[math.log(4), 0.0], [0.0, math.log(4)]])
    found = transport_cost(costs, torch.tensor([0.5, 0.5]), 1.0, 5)
    assert found.item() == pytest.approx((plan * costs).sum().item())
    assert transport_cost(torch.tensor([[3.0, 1.0]]), torch.tensor([0.25, 0.75]), 0.1, 5).item() == pytest.approx(1.5)


def test_transport_guidance_brings_images_nearer_to_their_class(pipe):
    targets = of_centroids(pipe, [[0.5, -0.5], [0.1, 0.9]])
    targets.tensors["centroids"] += 0.3 * torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    method = DMGD(scale=0.3, clusters=2)
    call = started(pipe, method, targets, [0, 2, 0])
    method.prepare(call)
    latents, _ = method.begin(call)
    noise = call.draw_noise(latents)
    moved = method.noise(call, 2, latents, latents, noise) - noise
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((3,), 0.3 * 8))  # √64 is the noise's norm
    index, centres, shares = call.state
    options = {"index": index, "centres": centres, "shares": shares, "blur": 0.1, "iterations": 5}
    assert (class_costs(latents + moved, **options) < class_costs(latents, **options)).all()
    assert method.noise(call, 4, latents, latents, noise) is noise  # of ten steps 1, 2 and 3
    assert list(range(round(0.08 * 50), round(0.4 * 50))) == [49 - k for k in range(45, 29, -1)]


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_peer_that_reads_images_refuses_a_data_free_run(pipe, name):
    with pytest.raises(ValueError, match=f"method='{name}' reads real images, and .*names classes only: pass a datas"):
        concentrate(pipe, ["circle", "square"], 1, method=name, progress=False)
    with pytest.raises(ValueError, match=f"method='{name}' takes real images: pass a dataset"):
        concentrate(pipe, None, 1, method=name, progress=False)


@pytest.mark.parametrize("name", ["best-of-n", "uag"])
def test_a_data_free_peer_reads_no_image_and_needs_a_classifier(pipe, real_images, make, name):
    method = drawn_with(PEERS[name])
    unreadable = real_images.cast_column("image", type(real_images.features["image"])(decode=False)).map(
        lambda row: {"image": {"bytes": b"no image", "path": None}}
    )
    unreadable = unreadable.cast(real_images.features)
    of_data = concentrate(pipe, unreadable, 1, method=method, progress=False)
    of_names = concentrate(pipe, ["circle", "square", "triangle"], 1, method=method, progress=False)
    assert pixels_of(of_data) == pixels_of(of_names)
    with pytest.raises(ValueError, match="and the pipeline has none: pass `classifier=`"):
        concentrate(make.pipe(), None, 1, method=method, progress=False)


def test_what_errors_of_peers_say_to_do_is_done(pipe, real_images, targets):
    def drawn(given, method, images=1):
        return len(concentrate(pipe, given, images, method=Sampling(2, 1.0, method=method), progress=False))

    with pytest.raises(ValueError, match="takes real images: pass a dataset"):
        drawn(None, "mgd3")
    assert drawn(real_images, "mgd3") == drawn(None, "best-of-n") == drawn(None, "uag") == drawn(None, "plain") == 3
    with pytest.raises(ValueError, match="15 centroids need as many images of every class, but 'circle' has 9, 'squa"):
        drawn(real_images, "mgd3", 15)
    assert drawn(real_images, MGD3(clusters=5), 15) == 45
    with pytest.raises(ValueError, match="How many centroids"):
        MGD3().make_targets(pipe, real_images, Sampling(), progress=False)
    for method, more in ((MGD3(clusters=2), {}), (MGD3(), {"images_per_class": 2})):
        made = method.make_targets(pipe, real_images, Sampling(), progress=False, **more)
        assert made.tensors["shares"].shape == (3, 2)
    with pytest.raises(ValueError, match="method='mgd3'"):
        drawn(targets, "mgd3")
    other = of_centroids(pipe, [[0.5, 0.5], [0.1, 0.1]])
    other.tensors["centroids"] = other.tensors["centroids"][..., :4]
    with pytest.raises(ValueError, match=r"have shape \(2, 1, 8, 4\) a class, and the generator needs \('any', 1, 8,"):
        drawn(other, "d4m")
    with pytest.raises(ValueError, match="takes centroids of real images, and these targets are names"):
        drawn(ClassStatistics("names", ["a"], [0]), "d4m")
    inverted = D3HR(groups=2).make_targets(pipe, real_images, Sampling(4, 1.0), progress=False)
    with pytest.raises(ValueError, match="inverted to t = 500, and 2 steps begin at t = 0: make them for as many"):
        drawn(inverted, D3HR(groups=2))
    assert drawn(real_images, D3HR(groups=2)) == 3
    gradients = PEERS["igd"].make_targets(pipe, real_images, Sampling(), progress=False)
    told = (
        r"of 2 checkpoints to \S+ parameters, and 3 to \S+ are needed, those of a convnet-2 for 3 classes and images"
    )
    with pytest.raises(ValueError, match=f"{told} of 8 pixels: make them with this pipeline and method"):
        drawn(gradients, IGD(checkpoints=3, epochs=2, architecture="convnet-2"))
    with pytest.raises(ValueError, match="2 checkpoints to .* 2 to .* of 8 pixels: make them with this pipeline and"):
        drawn(dataclasses.replace(gradients, shared=None), PEERS["igd"])
    assert drawn(gradients, PEERS["igd"]) == drawn(real_images, PEERS["igd"]) == 3
    assert drawn(made, "d4m") == drawn(real_images, "d4m") == 3


@pytest.mark.parametrize("name", ["best-of-n", "uag"])
def test_a_data_free_set_is_made_again_from_its_folder_alone(pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    small = concentrate(pipe, ["square", "circle"], 2, method=drawn_with(PEERS[name]), seed=3, progress=False)
    save_dataset_folder(small, tmp_path / "set")
    again, targets, record = load_recorded(tmp_path / "set")
    again.set_progress_bar_config(disable=True)
    assert targets.class_labels == [1, 0]
    found = concentrate(again, targets, seed=3, progress=False, **record_parameters(record))
    assert pixels_of(found) == pixels_of(small) and found.features["label"].names == ["square", "circle"]


def test_what_was_read_is_recorded_and_others_need_the_images(pipe, real_images, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    small = concentrate(pipe, real_images, 1, method=drawn_with(PEERS["mgd3"]), progress=False)
    told = record_of(small)["targets"]
    assert told["statistics"] == "centroids" and told["images"] == 21 and len(told["sha256"]) == 64
    save_dataset_folder(small, tmp_path / "set")
    with pytest.raises(ValueError, match="was drawn for real images themselves .ClassStatistics.: only with them"):
        load_recorded(tmp_path / "set")


def test_files_and_settings_that_cannot_be_are_refused(pipe, tmp_path):
    other = of_centroids(pipe, [[0.5, 0.5], [0.1, 0.1]])
    other.save_pretrained(tmp_path)
    half = {name: part[:1].contiguous() for name, part in other.tensors.items()}
    save_file(half, tmp_path / "targets.safetensors")
    with pytest.raises(ValueError, match="are not of 2 classes"):
        ClassStatistics.from_pretrained(tmp_path)
    for wrong in ({"scale": -1}, {"stop": 2}, {"clusters": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MGD3(**wrong)
    with pytest.raises(ValueError, match="strength"):
        D4M(strength=0)
    with pytest.raises(ValueError, match="below"):
        UAG(below=2)
    with pytest.raises(ValueError, match="candidates"):
        BestOfN(0)
