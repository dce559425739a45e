"""Datasets at the size a protocol asks for, stored soft labels, jobs that survive, rows of results."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

from dsco_hf.data.datasets import images_from_pixels
from dsco_hf.evaluators import (
    TrainingJob,
    get_protocol,
    load_image_set,
    run_job,
    summarise,
    train_job,
)
from dsco_hf.evaluators.evaluation import evaluator_builder, read_job, read_soft_labels


QUICK = get_protocol("quick", steps=8)


def dataset(count=12, size=8, channels=1, seed=0, **columns):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, channels, size, size, generator=generator) * 2 - 1
    features = {"image": Image(), "label": ClassLabel(names=["a", "b", "c"])}
    rows = {"image": images_from_pixels(pixels), "label": [i % 3 for i in range(count)]}
    for name, (values, kind) in columns.items():
        rows[name], features[name] = values, kind
    return Dataset.from_dict(rows, features=Features(features))


def test_images_come_at_the_protocols_sizes():
    protocol = dataclasses.replace(QUICK, image_size=8, load_size=12, test_size=10)
    train = load_image_set(dataset(size=16), protocol=protocol, num_channels=1)
    test = load_image_set(dataset(size=16), protocol=protocol, test_for=train, num_channels=1)
    assert train.pixels.shape == (12, 1, 12, 12)
    assert test.pixels.shape == (12, 1, 8, 8)
    whole = load_image_set(dataset(size=16), protocol=dataclasses.replace(QUICK, image_size=10), num_channels=1)
    assert torch.equal(test.pixels, whole.pixels[:, :, 1:9, 1:9])


def test_without_a_size_the_test_images_follow_the_training_images():
    train = load_image_set(dataset(size=8), protocol=QUICK, num_channels=1)
    test = load_image_set(dataset(size=16), protocol=QUICK, test_for=train, num_channels=1)
    assert train.pixels.shape[-1] == test.pixels.shape[-1] == 8
    assert train.names == ("a", "b", "c") and train.images_per_class == 4
    assert train.fingerprint and train.fingerprint != test.fingerprint


def test_sizes_that_vary_are_brought_to_one_that_is_said(caplog):
    rows = [dataset(size=8)[0], dataset(size=9)[1]]
    mixed = Dataset.from_list(rows, features=dataset().features)
    train = load_image_set(mixed, protocol=QUICK)
    assert train.pixels.shape == (2, 3, 32, 32)
    assert "sides of 8 to 9 pixels" in caplog.text and "get_protocol(name, image_size=64)" in caplog.text
    protocol = get_protocol("quick", image_size=64)  # as the warning says
    assert load_image_set(mixed, protocol=protocol).pixels.shape == (2, 3, 64, 64)


def test_stored_soft_labels():
    soft = np.random.default_rng(0).dirichlet(np.ones(3), 12).astype(np.float32)
    data = dataset(soft_label=(soft.tolist(), Sequence(Value("float32"))))
    stored = dataclasses.replace(QUICK, label_type="stored")
    train = load_image_set(data, protocol=stored, num_channels=1)
    assert torch.allclose(train.soft_labels, torch.from_numpy(soft))
    assert load_image_set(data, protocol=QUICK, num_channels=1).soft_labels is None
    job = train_job(TrainingJob("convnet-2", stored), train, train)
    assert 0 <= job["accuracy"] <= 1
    with pytest.raises(ValueError, match="no soft labels in a column 'soft_label'.*'image', 'label'"):
        load_image_set(dataset(), protocol=stored, num_channels=1)


def test_soft_labels_of_the_most_probable_classes_get_their_rest_back():
    compact = [{"indices": [2, 0], "probabilities": [0.6, 0.3]}] * 12
    kind = {"indices": Sequence(Value("int32")), "probabilities": Sequence(Value("float32"))}
    data = dataset(soft_label=(compact, kind))
    assert read_soft_labels(data, "soft_label", num_classes=3)[0].tolist() == pytest.approx([0.3, 0.1, 0.6])
    with pytest.raises(ValueError, match="class 2, but there are 2"):
        read_soft_labels(data, "soft_label", num_classes=2)
    wrong = dataset(soft_label=([[0.5, 0.5]] * 12, Sequence(Value("float32"))))
    with pytest.raises(ValueError, match=r"\[2\] entries, but the dataset has 3"):
        read_soft_labels(wrong, "soft_label", num_classes=3)


def test_networks_are_built_as_the_protocol_says():
    train = load_image_set(dataset(channels=3), protocol=QUICK)
    protocol = get_protocol("rded-soft", image_size=16)
    config = evaluator_builder("convnet-2", train, protocol, width=4)().config
    assert (config.norm, config.image_size, config.width) == ("batch", 16, 4)
    assert config.image_mean == [0.485, 0.456, 0.406]
    gray = load_image_set(dataset(), protocol=QUICK, num_channels=1)
    assert evaluator_builder("convnet-2", gray, protocol)().config.image_mean == [pytest.approx(0.449)]


def test_jobs_are_done_once_and_bound_to_their_settings(tmp_path):
    done = []

    def run(key, checkpoint):
        done.append(key)
        checkpoint.write_text("on the way")
        if key == "b" and done.count("b") == 1:
            raise KeyboardInterrupt
        return {"value": key.upper()}

    options = {"folder": tmp_path, "settings": lambda key: {"seed": key, "steps": 5}}
    run_job("a", run, **options)
    with pytest.raises(KeyboardInterrupt):
        run_job("b", run, **options)
    for key in "abc":
        run_job(key, run, **options)
    assert done == ["a", "b", "b", "c"]
    assert [read_job(tmp_path / f"{key}.json")["value"] for key in "abc"] == ["A", "B", "C"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]
    with pytest.raises(ValueError, match=r"other settings or data \(steps: 5 there, 7 now\)\. Set them as they were"):
        run_job("a", run, **{**options, "settings": lambda key: {"seed": key, "steps": 7}})


def job(seed, accuracy, best=None):
    return {"seed": seed, "accuracy": accuracy, "accuracy_best": best, "seconds": 1.0, "images_per_second": 10.0}


def test_summary():
    row = summarise([job(1, 0.7, 0.9), job(0, 0.5, 0.6)])
    assert row["accuracies"] == [0.5, 0.7] and row["seeds"] == [0, 1]
    assert row["accuracy_mean"] == pytest.approx(0.6)
    assert row["accuracy_std"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert row["accuracy_best_mean"] == pytest.approx(0.75)
    single = summarise([job(0, 0.5)])
    assert single["accuracy_std"] is None and "accuracy_best_mean" not in single
    json.dumps(row)
