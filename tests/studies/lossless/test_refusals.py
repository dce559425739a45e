"""What a search refuses, and that what its errors say to do helps."""

import dataclasses

import numpy as np
import pytest
import torch

from dsco_hf import build_evaluator
from dsco_hf.concentration.selection import Herding
from dsco_hf.data.datasets import load_digits_dataset
from dsco_hf.evaluators import get_protocol, load_image_set
from dsco_hf.studies.lossless.checks import check_plan, check_reference, rising
from dsco_hf.studies.lossless.find import find_lossless_budget
from dsco_hf.studies.lossless.noninferiority import compare
from dsco_hf.studies.lossless.report import claim
from dsco_hf.studies.lossless.search import SearchPlan


PROTOCOL = get_protocol("quick", steps=12, batch_size=64, learning_rate=0.01)
PLAN = SearchPlan(margin=0.2, trainings=5, reference_seeds=2, looks=1)


@pytest.fixture(scope="module")
def digits():
    data = load_digits_dataset()
    train = load_image_set(data["train"].select(range(200)), protocol=PROTOCOL, num_channels=1)
    return train, load_image_set(data["test"], protocol=PROTOCOL, num_channels=1, test_for=train)


def search(digits, folder, **options):
    given = {"protocol": PROTOCOL, "plan": PLAN, "architecture": "convnet-2", "overrides": {"width": 8}}
    return find_lossless_budget(*digits, folder, **given | options)


def network(names):
    return build_evaluator("convnet-2", class_names=names, num_channels=1, image_size=8, width=8)


def test_plans_that_cannot_be():
    for changes, said in (
        ({"reference_seeds": 1}, "`reference_seeds` must be a whole number of at least 2|reference_seeds"),
        ({"trainings": 4}, "trainings"),
        ({"looks": 3}, "looks"),
        ({"margin": 0}, "margin"),
        ({"confidence": 0.3}, "confidence"),
    ):
        with pytest.raises(ValueError, match=said):
            check_plan(SearchPlan(**changes), 0, 100)
    assert check_plan(SearchPlan(), 30, 100).smallest == 30


def test_a_reference_that_tells_nothing():
    labels = torch.arange(400) % 10
    chance = np.random.default_rng(0).random((3, 400)) < 0.1
    with pytest.raises(ValueError, match="nothing can be lost. Train longer"):
        check_reference(chance, labels, SearchPlan(margin=0.1))
    good = np.random.default_rng(0).random((3, 400)) < 0.8
    check_reference(good, labels, SearchPlan(margin=0.1))
    with pytest.raises(ValueError, match=r"margin of 0.5 points cannot be resolved with 400 test images: about 3\d,"):
        check_reference(good, labels, SearchPlan())
    assert rising(good, good[:1] & False) == pytest.approx(good.mean())


@pytest.mark.slow
def test_a_reference_that_is_still_rising_is_said(digits, tmp_path, capsys):
    few = get_protocol("quick", steps=24, batch_size=64, learning_rate=0.003)
    found = search(digits, tmp_path / "short", protocol=few)
    assert found["gain_of_second_half"] > 0.2 and "all images are still rising" in capsys.readouterr().out
    assert "a longer training may need more images" in claim(found)
    longer = search(digits, tmp_path / "long", protocol=dataclasses.replace(few, steps=48, learning_rate=0.01))
    assert longer["gain_of_second_half"] < 0.2 and "still rising" not in capsys.readouterr().out + claim(longer)


@pytest.mark.parametrize(
    ("refused", "said", "followed"),
    [
        (
            {"protocol": dataclasses.replace(PROTOCOL, label_type="stored")},
            "no stored soft labels: set the protocol's label_type='hard'",
            {},
        ),
        ({"small": 200}, "There are 200 synthetic images and 200 real ones.*so give fewer", {"small": 20}),
        ({"small": "large"}, r"synthetic images are \(1, 16, 16\).*read both with the same", {"small": 20}),
        ({"plan": dataclasses.replace(PLAN, margin=1e-5)}, "cannot be resolved with.*Use a wider margin", {}),
        ({"strategy": "herding"}, r"such as `Herding\(features='pixels'\)`", {"strategy": Herding(features="pixels")}),
        ({"strategy": "aum"}, "goes by a logged training, and has none", {}),
        ({"overrides": {"width": 8, "num_labels": 5}}, "network has 5 classes.*leave `num_labels` out", {}),
        ({"teacher": "ten"}, "has label_type='hard', but `teacher` is given. Leave it out", {}),
        (
            {"protocol": dataclasses.replace(PROTOCOL, label_type="teacher")},
            "`teacher` is missing. Pass it",
            {"teacher": "ten", "protocol": dataclasses.replace(PROTOCOL, label_type="teacher")},
        ),
        (
            {"protocol": dataclasses.replace(PROTOCOL, label_type="teacher"), "teacher": "five"},
            "the teacher has 5 without",
            {},
        ),
        ({"length": "same epoch"}, "Nearest: 'same epochs'", {}),
        ({"test": "other names"}, "the test set has 10 without", {}),
        ({"test": "no labels"}, "360 of 360 test images have no label.*take a split that is labelled", {}),
    ],
)
def test_what_errors_say_to_do_is_done(refused, said, followed, digits, tmp_path):
    train, test = digits

    def given(options):
        options = dict(options)
        sets = {
            "other names": dataclasses.replace(test, names=("a", *test.names[1:])),
            "no labels": dataclasses.replace(test, labels=torch.full_like(test.labels, -1)),
            None: test,
        }
        images = (train, sets[options.pop("test", None)])
        size = options.pop("small", None)
        if size is not None:
            small = train.select(torch.arange(20 if size == "large" else size))
            larger = torch.nn.functional.interpolate(small.pixels, size=16)
            options["small"] = dataclasses.replace(small, pixels=larger) if size == "large" else small
        teachers = {"ten": train.names, "five": tuple("abcde")}
        if "teacher" in options:
            options["teacher"] = network(teachers[options["teacher"]])
        return images, options

    images, options = given(refused)
    with pytest.raises(ValueError, match=said):
        search(images, tmp_path / "refused", **options)
    if followed:
        images, options = given(followed)
        try:
            search(images, tmp_path / "followed", **options)
        except ValueError as error:  # an untrained teacher teaches nothing
            assert "teacher" in options and "nothing can be lost" in str(error)


def test_other_test_images_cannot_be_compared():
    right = np.ones((3, 10), dtype=bool)
    with pytest.raises(ValueError, match="10 and 9 images: use the same"):
        compare(right, right[:, :9], level=0.05)
    compare(right, right, level=0.05)
