"""Datasets that were filtered to some of their classes, or number them in another order, wherever classes meet."""

import PIL.Image
import pytest
import torch
from datasets import Dataset

from dsco_hf import Clearest, Herding, MatchingTargets, concentrate, dope
from dsco_hf.concentration.additions.doping import select
from dsco_hf.data.datasets import class_names, load_pixels
from dsco_hf.data.labels import class_mapping
from dsco_hf.evaluators.batches import check_same_classes


OPTIONS = {"embedding_dim": 16, "progress": False}
ANIMALS = ("cat", "dog", "fox", "owl")


@pytest.mark.parametrize("mapping, found", [
    ("index", [1, 3]), ([3, 2, 1, 0], [2, 0]), ({"cat": 9, "dog": 0, "owl": 2}, [0, 2]), (None, [1, 3]),
])  # fmt: skip
def test_labels_and_places_are_those_among_all_names(mapping, found):
    generator = None if mapping is None else {0: "a", 1: "b", 2: "c", 3: "d"}
    assert class_mapping(ANIMALS, generator, 4, mapping=mapping, present=["dog", "owl"]) == found


def test_only_classes_that_are_wanted_must_be_known():
    assert class_mapping(ANIMALS, {7: "owl", 8: "dog"}, 10, present=["dog", "owl"]) == [8, 7]
    with pytest.raises(ValueError, match="1 of 2 dataset classes.*'fox'"):
        class_mapping(ANIMALS, {7: "owl", 8: "dog"}, 10, present=["fox", "owl"])
    names = ("tench", "my own", "church")
    assert class_mapping(names, {0: "fish", 1: "house"}, 2, mapping={"tench": 0, "church": 1}, present=names[::2]) == [
        0, 1
    ]  # fmt: skip
    assert class_mapping(["x", "3", "1"], {0: "a"}, 4, mapping="number", present=["3", "1"]) == [3, 1]
    nette = class_mapping(names, None, 1000, mapping="imagenette", present=names[::2])
    assert nette == [0, 497]


def test_a_filtered_dataset_is_matched_concentrated_and_doped_as_it_is(make):
    pipe = make.pipe(classifier=make.convnet())
    part = make.images((4, 3, 5)).filter(lambda label: label != 1, input_columns="label")
    for mapping in (None, "index", [0, 1, 2], {"square": 1, "circle": 0}):
        targets = MatchingTargets.from_dataset(part, pipe, mapping=mapping, **OPTIONS)
        assert (targets.class_names, targets.class_labels) == (["circle", "triangle"], [0, 2])
    sure = select(part, Clearest(0.5), pipe=pipe, progress=False)
    assert sorted(sure["label"]) == [0, 0, 2, 2, 2]
    small = concentrate(pipe, targets, images_per_class=1, num_inference_steps=2, method="plain", progress=False)
    assert small.features["label"].names == ["circle", "triangle"]
    mixed = dope(small, part, pipe, images_per_class=3, strategy=Herding(targets), progress=False)
    taken = [row for row in mixed if row["real_index"] >= 0]
    assert [row["label"] for row in taken] == [0, 0, 1, 1]
    assert [part[row["real_index"]]["label"] for row in taken] == [0, 0, 2, 2]


def test_the_same_classes_in_another_order_are_told_and_the_advice_aligns_them(make):
    names = ("circle", "square", "triangle")
    with pytest.raises(ValueError, match=r"number their classes differently.*classes=names"):
        check_same_classes(names, names[::-1], what="the test set")
    with pytest.raises(ValueError, match=r"has 2 without \['triangle'\]"):
        check_same_classes(names, names[:2], what="the test set")
    other = make.images((2, 1, 1), names=names[::-1])
    _, labels, _ = load_pixels(other, classes=names)
    assert torch.equal(labels, 2 - torch.tensor(other["label"][:]))


@pytest.mark.parametrize("columns, suggested", [
    ({"id": [1, 2], "width": [8, 8], "label": [0, 1]}, "label"),
    ({"filename": ["a", "b"], "label": ["cat", "dog"]}, "label"),
    ({"class_id": [0, 1], "file_name": ["a", "b"], "height": [8, 8]}, "class_id"),
    ({"Label": ["cat", "dog"], "image_id": [3, 4]}, "Label"),
    ({"y": [1, 0], "x": [0, 1]}, "y"),
])  # fmt: skip
def test_the_suggested_column_is_the_plausible_one_and_the_advice_works(columns, suggested):
    data = Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))] * 2, **columns})
    with pytest.raises(ValueError, match=f"Did you mean '{suggested}'.*class_encode_column\\('{suggested}'\\)"):
        class_names(data)
    assert class_names(data.class_encode_column(suggested)) == sorted(map(str, columns[suggested]))


def test_a_column_that_was_named_is_advised_on_whatever_its_name():
    data = Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))] * 2, "group": [7, 3], "score": [0.5, 1.0]})
    with pytest.raises(ValueError, match="'group' is int64, not ClassLabel. Make it one with"):
        class_names(data, label_column="group")
    assert class_names(data.class_encode_column("group"), label_column="group") == ["3", "7"]
    with pytest.raises(ValueError, match="'score' is float64, not ClassLabel.$"):
        class_names(data, label_column="score")
    with pytest.raises(ValueError, match=r"'score' is float64, not ClassLabel. Of type ClassLabel are: \['group'\]"):
        class_names(data.class_encode_column("group"), label_column="score")
    with pytest.raises(ValueError, match="No column is of type ClassLabel[^?]*$"):
        class_names(data)


def test_advice_for_a_classifier_that_knows_the_classes_by_other_names_works(make):
    pipe, real = make.pipe(classifier=make.convnet(names=("x", "y", "z"))), make.images((2, 2, 2))
    calls = (
        lambda: select(real, Clearest(), pipe=pipe, progress=False),
        lambda: MatchingTargets.from_generator(pipe, samples_per_class=2, num_inference_steps=2, **OPTIONS),
        lambda: pipe.classifier_labels([0, 1, 2]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="3 of 3 .* give it these: its `config.id2label`") as error:
            call()
        assert "`mapping=" not in str(error.value)  # which these do not take
    pipe.classifier.config.id2label = dict(enumerate(real.features["label"].names))
    select(real, Clearest(), pipe=pipe, progress=False)
    assert pipe.classifier_labels([2, 0]) == [2, 0]
    with pytest.raises(ValueError, match="no class 'circel'. Nearest: 'circle'"):
        pipe.get_label_ids(["circel"])


def test_a_typed_number_is_an_index_unless_classes_are_named_by_numbers(make):
    pipe = make.pipe()
    assert pipe.get_label_ids(["2", "circle", 1]) == [2, 0, 1]
    pipe.id2label = {0: "1", 1: "2", 2: "3"}
    assert pipe.get_label_ids(["1", "2", 2]) == [0, 1, 2]
    with pytest.raises(ValueError, match="no class '0'"):
        pipe.get_label_ids(["0"])
    pipe.id2label = {}
    assert pipe.get_label_ids(["2"]) == [2]
