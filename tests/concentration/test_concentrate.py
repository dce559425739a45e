import dataclasses
import itertools
import statistics

import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, Image

from dsco_hf import (
    MatchingTargets,
    NOpt,
    QuantileTargets,
    Released,
    concentrate,
    concentrate_and_report,
    concentrate_to_folder,
    measure_discrepancy,
)
from dsco_hf.concentration.concentrate import plan_units
from dsco_hf.data.datasets import images_from_pixels, load_pixels
from dsco_hf.data.images import pixels_from_images
from dsco_hf.data.schema import image_seed
from dsco_hf.matching.discrepancy import PreviousBlocks, embed_pixels, random_discrepancy
from dsco_hf.matching.feature_spec import FeatureSource
from dsco_hf.matching.kernels import mmd2
from dsco_hf.matching.objectives import ridge


NOPT = NOpt("rkhs", step_size=0.1, start=0.5)
OPTIONS = {"num_inference_steps": 5, "guidance_scale": 1.0, "method": NOPT, "progress": False}


def pixels_of(dataset):
    return pixels_from_images(list(dataset["image"]))


def rows_of(dataset, **wanted):
    return [i for i, row in enumerate(dataset.remove_columns("image")) if all(row[k] == v for k, v in wanted.items())]


def test_rows_and_features(pipe, targets):
    small = concentrate(pipe, targets, 3, seed=7, **OPTIONS)
    assert small.column_names == ["image", "label", "source", "seed", "block", "real_index"]
    assert small.features["label"] == ClassLabel(names=["circle", "square", "triangle"])
    assert small.features["source"] == ClassLabel(names=["synthetic", "real"])
    assert isinstance(small.features["image"], Image)
    assert list(small["label"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert set(small["source"]) == {0} and set(small["real_index"]) == {-1} and set(small["block"]) == {0}
    assert list(small["seed"]) == [image_seed(7, label, index) for label in range(3) for index in range(3)]
    assert small[0]["image"].size == (8, 8) and small[0]["image"].mode == "L"
    assert len({image.tobytes() for image in small["image"]}) == 9


def test_images_are_those_of_the_pipeline(pipe, targets):
    small = concentrate(pipe, targets, 2, seed=1, **OPTIONS)
    options = {key: value for key, value in OPTIONS.items() if key != "progress"}
    labels = [0, 0, 1, 1, 2, 2]
    direct = pipe.sample(labels, targets, seeds=list(small["seed"]), **options)
    expected = images_from_pixels(direct.images * 2 - 1)
    assert all(np.array_equal(a, b) for a, b in zip(small["image"], expected, strict=True))


@pytest.mark.slow
def test_seed_and_repetition(pipe, targets):
    first, again, other = (concentrate(pipe, targets, 2, seed=seed, **OPTIONS) for seed in (0, 0, 1))
    assert torch.equal(pixels_of(first), pixels_of(again))
    assert (pixels_of(first) - pixels_of(other)).flatten(1).norm(dim=1).min() > 0.1
    assert not set(first["seed"]) & set(other["seed"])


@pytest.mark.slow
def test_a_dataset_or_classes_in_place_of_targets(pipe, real_images):
    made = MatchingTargets.from_dataset(real_images, pipe, progress=False)
    assert torch.equal(
        pixels_of(concentrate(pipe, real_images, 2, **OPTIONS)), pixels_of(concentrate(pipe, made, 2, **OPTIONS))
    )
    ridge_options = {**OPTIONS, "objective": "ridge"}
    made = MatchingTargets.from_dataset(real_images, pipe, second_moment=True, progress=False)
    first, again = (concentrate(pipe, given, 2, **ridge_options) for given in (real_images, made))
    assert torch.equal(pixels_of(first), pixels_of(again))
    sampling = {"num_inference_steps": 5, "guidance_scale": 1.0}
    made = MatchingTargets.from_generator(pipe, ["square", "circle"], seed=3, progress=False, **sampling)
    first, again = (concentrate(pipe, given, 2, seed=3, **OPTIONS) for given in (["square", "circle"], made))
    assert torch.equal(pixels_of(first), pixels_of(again)) and first.features["label"].names == ["square", "circle"]
    few = concentrate(pipe, real_images, 1, **{**OPTIONS, "method": Released(iterations=1)})
    assert list(few["label"]) == [0, 1, 2]


@pytest.mark.parametrize(("given", "objective", "message"), [
    (7, "rkhs", "`targets` must be targets or None, got int. Make them of real images with"),
    ("imagenet", "rkhs", "There is no label set 'imagenet'"),
    (["circel"], "rkhs", "circel.*Nearest: 'circle'"),
    (["circle"], None, "'released' matches real images: pass a dataset"),
    (["circle"], "classifier", "pass None, and classes as `class_labels=`"),
])  # fmt: skip
def test_what_cannot_stand_for_targets(pipe, given, objective, message):
    with pytest.raises((TypeError, ValueError), match=message):
        concentrate(pipe, given, 1, **{**OPTIONS, "method": NOpt(objective) if objective else Released()})


def test_all_splits_and_targets_of_a_run(pipe, real_images, tmp_path):
    with pytest.raises(TypeError, match=r"Got all splits, \['train'\]; choose one, for example `dataset\['train'\]`"):
        concentrate(pipe, DatasetDict(train=real_images), 1, **OPTIONS)
    with pytest.raises(TypeError, match="must be targets or None, got dict. Make them of real images with"):
        concentrate_to_folder(pipe, {}, 1, tmp_path / "run", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("images_per_call", [1, 2, 4, 100])
def test_calls_of_any_size_give_the_same_images(pipe, targets, images_per_call):
    whole = concentrate(pipe, targets, 2, **OPTIONS)
    parts = concentrate(pipe, targets, 2, images_per_call=images_per_call, **OPTIONS)
    assert list(parts["label"]) == [0, 0, 1, 1, 2, 2]
    assert (pixels_of(parts) - pixels_of(whole)).abs().max() <= 1.01 * 2 / 255  # one gray level by rounding


def test_first_blocks_of_a_larger_run_are_the_smaller_run(pipe, targets):
    small, large = (concentrate(pipe, targets, n, block_size=2, **OPTIONS) for n in (2, 5))
    assert list(large["block"]) == [0, 0, 1, 1, 2] * 3  # 5 is no multiple of 2
    rows = rows_of(large, block=0)
    assert torch.equal(pixels_of(large.select(rows)), pixels_of(small))
    assert [large["seed"][row] for row in rows] == list(small["seed"])
    four = concentrate(pipe, targets, 4, block_size=2, **OPTIONS)
    rows = [row for row in range(15) if large["block"][row] < 2]
    assert torch.equal(pixels_of(large.select(rows)), pixels_of(four))


def test_a_block_matches_what_the_finished_ones_leave(pipe, targets):
    small = concentrate(pipe, targets, 4, block_size=2, **OPTIONS)
    first, second = (small.select(rows_of(small, block=block)) for block in (0, 1))
    options = {key: value for key, value in OPTIONS.items() if key != "progress"}
    labels, seeds = list(second["label"]), list(second["seed"])
    previous = PreviousBlocks(targets)
    previous.add(pixels_of(first), list(first["label"]), pipe)
    joint = pipe.sample(labels, targets, seeds=seeds, previous=previous.statistics(range(3)), **options)
    alone = pipe.sample(labels, targets, seeds=seeds, **options)
    expected, otherwise = (pixels_from_images(images_from_pixels(o.images * 2 - 1)) for o in (joint, alone))
    assert torch.equal(pixels_of(second), expected)
    assert not torch.equal(pixels_of(second), otherwise)


def test_previous_blocks_add_up(pipe, targets, real_images):
    previous = PreviousBlocks(targets)
    images, labels = pixels_of(real_images), list(real_images["label"])
    previous.add(images[:8], labels[:8], pipe)
    sums, counts = previous.statistics(range(3))
    previous.add(images[8:], labels[8:], pipe)
    assert counts.sum() == 8 and previous.counts.tolist() == [9, 7, 5]  # the statistics are a copy
    torch.testing.assert_close(previous.sums / previous.counts[:, None], targets.embeddings, atol=1e-3, rtol=0)
    assert not torch.equal(sums, previous.sums)


def test_optimised_images_are_nearer_than_plain_ones(pipe, targets):
    options = {**OPTIONS, "num_inference_steps": 10}
    _, plain = concentrate_and_report(pipe, None, 3, measure_by=targets, **options)
    _, optimised = concentrate_and_report(
        pipe,
        targets,
        3,
        measure_by=None,
        **{**options, "method": NOpt("rkhs", step_size=0.1, start=0.0, iterations=3)},
    )
    assert set(plain.discrepancy_by_class) == set(optimised.discrepancy_by_class) == {"circle", "square", "triangle"}
    assert all(optimised.discrepancy_by_class[k] < plain.discrepancy_by_class[k] for k in plain.discrepancy_by_class)


def test_report(pipe, targets):
    small, report = concentrate_and_report(pipe, targets, 3, block_size=2, **OPTIONS)
    assert report.images == len(small) == 9
    # 5 steps, of which 2 and 3 are optimised (the last is not): one look-ahead each
    assert (report.denoiser_calls, report.decoder_calls, report.classifier_calls) == (9 * 7, 0, 9 * 2)
    assert report.seconds > 0
    assert report.discrepancy == pytest.approx(statistics.fmean(report.discrepancy_by_class.values()))
    measured = measure_discrepancy(pixels_of(small), torch.tensor(list(small["label"])), pipe, targets)
    assert measured == pytest.approx(report.discrepancy_by_class)


def test_discrepancy_by_the_formula(pipe, targets, real_images):
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    half = torch.arange(12)
    found = measure_discrepancy(pixels[half], labels[half], pipe, targets)
    psi = embed_pixels(pixels[half], pipe, targets)
    for row, name in enumerate(targets.class_names):
        expected = mmd2(psi[labels[half] == row].mean(0), targets.embeddings[row]).item()
        assert found[name] == pytest.approx(expected, rel=1e-5) and expected > 1e-4
    only = measure_discrepancy(pixels[labels == 2], labels[labels == 2], pipe, targets)
    assert list(only) == ["triangle"] and only["triangle"] < 1e-4  # the population itself


def test_discrepancy_needs_the_classifier_of_the_targets(targets, make):
    pipe = make.pipe(classifier=make.convnet(seed=9))
    with pytest.raises(ValueError, match="is not the one"):
        measure_discrepancy(torch.zeros(1, 1, 8, 8), torch.tensor([0]), pipe, targets)


@pytest.mark.parametrize("blocks", [1, 2])
def test_one_image_of_one_class(pipe, make, blocks):
    targets = MatchingTargets.from_dataset(
        make.images((3,), names=("triangle",)), pipe, embedding_dim=32, progress=False
    )
    small, report = concentrate_and_report(pipe, targets, blocks, block_size=1, **OPTIONS)
    assert len(small) == blocks and small.features["label"].names == ["triangle"] and set(small["label"]) == {0}
    assert list(small["seed"]) == [image_seed(0, 2, index) for index in range(blocks)]  # the generator's class is 2
    assert list(report.discrepancy_by_class) == ["triangle"]


def test_plain_samples_of_chosen_classes(pipe):
    small, report = concentrate_and_report(pipe, None, 2, class_labels=["triangle", 0], **OPTIONS)
    assert small.features["label"].names == ["triangle", "circle"] and list(small["label"]) == [0, 0, 1, 1]
    assert report.discrepancy is None and report.discrepancy_by_class == {} and report.classifier_calls == 0
    assert concentrate(pipe, None, 1, **OPTIONS).features["label"].names == ["circle", "square", "triangle"]


def test_other_objectives(pipe, real_images):
    targets = QuantileTargets.from_dataset(real_images, pipe, draws=1, progress=False)
    small, report = concentrate_and_report(
        pipe, targets, 2, block_size=1, **{**OPTIONS, "method": Released(iterations=2, start=0.5)}
    )
    assert len(small) == 6 and report.classifier_calls == 6 * 2 * 2 and report.discrepancy is None
    alone = concentrate(pipe, None, 2, objective="classifier", **OPTIONS)
    assert not torch.equal(pixels_of(alone), pixels_of(concentrate(pipe, None, 2, **OPTIONS)))


@pytest.fixture
def ridge_targets(pipe, real_images):
    return MatchingTargets.from_dataset(real_images, pipe, embedding_dim=64, second_moment=True, progress=False)


@pytest.mark.slow
def test_ridge_lowers_the_error_of_a_regression(pipe, ridge_targets):
    options = {"guidance_scale": 1.0, "num_inference_steps": 10, "seeds": range(6)}
    labels = [0, 0, 1, 1, 2, 2]

    def error(method):
        images = pipe.sample(labels, ridge_targets, **options, method=method).images
        observed = FeatureSource(pipe, ridge_targets.features).of_pixels(images * 2 - 1)
        return ridge(observed, torch.tensor(labels), ridge_targets).sum()

    plain = error("plain")
    matched, optimised = (error(NOpt(objective, start=0.0, iterations=2)) for objective in ("rkhs", "ridge"))
    assert optimised < matched < plain


def test_ridge_learns_from_finished_blocks(pipe, ridge_targets):
    options = {**OPTIONS, "objective": "ridge"}
    small = concentrate(pipe, ridge_targets, 3, block_size=2, **options)
    first, second = (small.select(rows_of(small, block=block)) for block in (0, 1))
    assert len(second) == 3  # the last block has one image of each class
    previous = PreviousBlocks(ridge_targets, each=True)
    previous.add(pixels_of(first), list(first["label"]), pipe)
    psi, rows = previous.statistics(range(1, 3))
    assert rows.tolist() == [1, 1, 2, 2] and psi.shape == (4, 64)
    labels, seeds = list(second["label"]), list(second["seed"])
    options = {key: value for key, value in options.items() if key != "progress"}
    drawn = [
        pipe.sample(labels, ridge_targets, seeds=seeds, previous=given, **options).images
        for given in (previous.statistics(range(3)), None)
    ]
    joint, alone = (pixels_from_images(images_from_pixels(images * 2 - 1)) for images in drawn)
    assert torch.equal(pixels_of(second), joint) and not torch.equal(joint, alone)


def test_latent_generator(latent_pipe, make):
    images = make.images((3, 3, 3), names=("tench", "goldfish", "chainsaw"))
    targets = MatchingTargets.from_dataset(images, latent_pipe, embedding_dim=64, progress=False)
    small, report = concentrate_and_report(latent_pipe, targets, 2, **{**OPTIONS, "guidance_scale": 2.0})
    assert small[0]["image"].mode == "RGB" and small.features["label"].names == ["tench", "goldfish", "chainsaw"]
    assert report.denoiser_calls == 6 * (2 * 5 + 2) and report.decoder_calls == 6 * (1 + 2)


@pytest.mark.parametrize("name", ["images_per_class", "block_size", "images_per_call"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_numbers_below_one(pipe, targets, name, value):
    options = {"images_per_class": 1, name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got {value}"):
        concentrate(pipe, targets, **options, **OPTIONS)


def test_more_images_than_a_set_can_have_are_refused_before_memory_is_asked_for(pipe, targets):
    with pytest.raises(ValueError, match="are 3,000,000,000,000 images, .* ask for at most 33333333 per class"):
        concentrate(pipe, targets, 10**12, **OPTIONS)
    assert len(plan_units(3, 33333333, block_size=33333333, images_per_call=10**8)) == 1  # as it says
    with pytest.raises(ValueError, match="`samples_per_class` must be a whole number from 1 to 33333333"):
        MatchingTargets.from_generator(pipe, samples_per_class=10**12, progress=False)


def test_bad_input(pipe, targets, make):
    with pytest.raises(ValueError, match="The targets name the classes: leave `class_labels` out"):
        concentrate(pipe, targets, 1, class_labels=[0], **OPTIONS)
    with pytest.raises(ValueError, match="no class 'squar'. Nearest: 'square'"):
        concentrate(pipe, None, 1, class_labels=["squar"], **OPTIONS)
    with pytest.raises(ValueError, match="`num_inference_steps` must be"):
        concentrate(pipe, targets, 1, **{**OPTIONS, "num_inference_steps": 0})
    with pytest.raises(ValueError, match="the pipeline has none"):
        concentrate(make.pipe(), targets, 1, **OPTIONS)
    next(pipe.transformer.parameters()).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        concentrate(pipe, None, 1, **OPTIONS)


def test_pixels_from_images_is_the_inverse(make):
    for channels in (1, 3):
        values = torch.randint(0, 256, (3, channels, 4, 4), generator=torch.Generator().manual_seed(0))
        pixels = values / 127.5 - 1
        torch.testing.assert_close(pixels_from_images(images_from_pixels(pixels)), pixels)


def test_progress_bar_counts_images(pipe, targets, monkeypatch, capsys):
    monkeypatch.setattr("dsco_hf.utils.progress.SHORT", 0.0)
    concentrate(pipe, targets, 3, block_size=2, **{**OPTIONS, "progress": True})
    shown = capsys.readouterr().err
    assert "Concentrating" in shown and "9/9" in shown
    concentrate(pipe, targets, 1, **OPTIONS)
    assert capsys.readouterr().err == ""


def test_two_classes_cannot_share_one_of_the_generator(pipe, targets):
    shared = dataclasses.replace(targets, class_labels=[0, 0, 2])
    with pytest.raises(ValueError, match=r"drawn from the same class\(es\) \[0\] of the generator"):
        concentrate(pipe, shared, 1, **OPTIONS)


def test_what_random_real_images_have_on_average(pipe, targets, real_images):
    """The closed form is the mean over all choices of two images of a class, measured with the same function."""
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    found = random_discrepancy(targets, {"circle": 2, "square": 7, "triangle": 9})
    circles = pixels[labels == 0]
    pairs = list(itertools.combinations(range(len(circles)), 2))
    measured = [
        measure_discrepancy(circles[list(pair)], torch.zeros(2, dtype=torch.int64), pipe, targets)["circle"]
        for pair in pairs
    ]
    assert len(pairs) == 36 and found["circle"] == pytest.approx(sum(measured) / 36, rel=1e-3)
    assert found["square"] == found["triangle"] == 0  # all there are
    samples = dataclasses.replace(targets, provenance={"population": "generator"})
    assert random_discrepancy(samples, {"circle": 2}) == {}
    report = concentrate_and_report(pipe, targets, 2, num_inference_steps=2, guidance_scale=1.0, progress=False)[1]
    assert report.random_discrepancy_by_class["circle"] == pytest.approx(found["circle"])
    assert report.random_discrepancy == pytest.approx(sum(report.random_discrepancy_by_class.values()) / 3)
