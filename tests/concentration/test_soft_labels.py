"""Labels that are made: by a teacher, by a regression; they go with the rows, and networks learn from them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, List, Value, concatenate_datasets

from dsco_hf import (
    MatchingTargets,
    add_learned_labels,
    add_soft_labels,
    dope,
    get_protocol,
    load_image_set,
    save_dataset_folder,
    train_evaluator,
)
from dsco_hf.concentration.set_records import record_of
from dsco_hf.data.datasets import load_pixels
from dsco_hf.data.shards import HALF_LEAST
from dsco_hf.evaluators import build_evaluator, predict_logits
from dsco_hf.evaluators.augmentation import CutMix, HorizontalFlip, RandomShift
from dsco_hf.evaluators.evaluation import read_soft_labels
from dsco_hf.hub.folder import read_folder
from dsco_hf.matching.discrepancy import embed_pixels
from dsco_hf.matching.kernels import regression_errors
from dsco_hf.utils.origins import model_sha256


NAMES = ["circle", "square", "triangle"]
STORED = get_protocol("quick", steps=4, label_type="stored")
FLIPPED = [HorizontalFlip(probability=1.0)]


def soft(dataset, teacher, **options):
    return add_soft_labels(dataset, teacher, progress=False, **options)


def values(dataset):
    return read_soft_labels(dataset, "soft_label", num_classes=len(dataset.features["label"].names))


def asked(dataset, teacher, flip=False):
    pixels, _, _ = load_pixels(dataset, num_channels=1)
    return predict_logits(teacher, pixels.flip(3) if flip else pixels)


def test_one_view_is_what_the_teacher_says_of_the_image_itself(real_images, make):
    teacher, order = make.convnet(), [20, 3, 3, 11]
    found = soft(real_images.select(order), teacher, temperature=2.0)
    assert found.features["soft_label"] == List(Value("float16"), length=3)
    expected = (asked(real_images, teacher) / 2).softmax(1)[order]
    torch.testing.assert_close(values(found), expected, rtol=6e-4, atol=0)
    assert found["label"][:] == [real_images["label"][row] for row in order]
    assert [np.array(image).tolist() for image in found["image"][:]] == [
        np.array(real_images[row]["image"]).tolist() for row in order
    ]
    assert real_images.column_names == ["image", "label"] and record_of(real_images) is None
    assert record_of(found)["soft_labels"] == {"sha256": model_sha256(teacher), "views": 1, "temperature": 2.0}


def test_views_are_augmented_averaged_and_repeated_by_their_seed(real_images, make):
    teacher = make.convnet()
    twice = soft(real_images, teacher, views=2, augmentation=[*FLIPPED, CutMix()])  # both views the same
    torch.testing.assert_close(values(twice), asked(real_images, teacher, flip=True).softmax(1), rtol=6e-4, atol=0)
    assert [one["name"] for one in record_of(twice)["soft_labels"]["augmentation"]] == ["HorizontalFlip"]
    options = {"views": 3, "augmentation": [RandomShift(2)]}
    first, other = (values(soft(real_images, teacher, seed=seed, **options)) for seed in (0, 1))
    torch.testing.assert_close(
        values(soft(real_images, teacher, batch_size=5, **options)), first, rtol=2e-3, atol=1e-4
    )
    assert (first - other).abs().max() > 0.005


def test_the_most_probable_classes_are_kept_and_the_rest_is_spread(real_images, make):
    teacher = make.convnet()
    found = soft(real_images, teacher, top_k=1)
    probabilities = asked(real_images, teacher).softmax(1)
    assert [row["indices"] for row in found["soft_label"][:]] == probabilities.argmax(1)[:, None].tolist()
    best = probabilities.max(1, keepdim=True).values
    expected = ((1 - best) / 2).expand(-1, 3).scatter(1, probabilities.argmax(1, keepdim=True), best)
    torch.testing.assert_close(values(found), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("top_k", [None, 2])
def test_no_probability_is_lost_to_half_precision(real_images, make, top_k):
    """A protocol that softens stored labels takes their logarithm."""
    teacher = make.convnet()
    teacher.classifier.weight.data *= 1e4
    found = values(soft(real_images, teacher, top_k=top_k))
    assert found.min() >= HALF_LEAST and found.max() == 1


def test_classes_go_by_name_and_the_teacher_may_know_more(real_images, make):
    teacher = make.convnet(names=("star", "triangle, three sides", "Square", "circle"))
    expected = asked(real_images, teacher)[:, [3, 2, 1]].softmax(1)
    torch.testing.assert_close(values(soft(real_images, teacher)), expected, rtol=6e-4, atol=0)
    fewer = make.convnet(names=NAMES[:2])
    with pytest.raises(
        ValueError, match="1 of 3 dataset classes have no certain match among the 2 classes of the teacher"
    ):
        soft(real_images, fewer)
    two = real_images.filter(lambda row: row["label"] < 2)  # it keeps the name of a class without images
    assert not values(soft(two, fewer))[:, 2].any()


def test_a_folder_of_a_teacher_and_images_of_several_sizes(world, tmp_path):
    world.make.convnet().save_pretrained(tmp_path / "teacher")
    found = soft(world.mixed, tmp_path / "teacher", dtype=torch.float32)
    record = record_of(found)["soft_labels"]
    assert record["folder"] == "teacher" and record["image_size"] == 8 and len(found) == 22
    torch.testing.assert_close(values(found.select([21])), values(found.select([0])), rtol=0, atol=0.05)
    assert (
        record_of(soft(world.real.select([4]), str(tmp_path / "teacher"), image_size=16))["soft_labels"]["image_size"]
        == 16
    )


@pytest.mark.parametrize("top_k", [None, 2])
def test_made_labels_are_published_read_and_trained_on(real_images, make, tmp_path, top_k):
    teacher = make.convnet()
    folder = save_dataset_folder(soft(real_images, teacher, views=2, top_k=top_k), tmp_path / "set")
    stored = read_folder(folder)["configs"]["default"]["train"]
    images = load_image_set(stored, protocol=STORED, num_channels=1)
    torch.testing.assert_close(images.soft_labels, values(soft(real_images, teacher, views=2, top_k=top_k)))
    assert train_evaluator(make.convnet(width=4), images, protocol=STORED, test=images).accuracy is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    said = (
        "The teacher is a network without a name, at temperature 1, mean over 2 views of each image (RandomResizedCrop"
    )
    assert said in card and ("; 2 classes are kept." in card) == (top_k == 2)
    lost = save_dataset_folder(
        stored.remove_columns("soft_label"), tmp_path / "lost", concentration=read_folder(folder)["concentration"]
    )
    assert "teacher" not in (lost / "README.md").read_text(encoding="utf-8")


def test_a_doped_set_says_nothing_of_labels_that_it_lost(real_images, make):
    small = soft(real_images.select(range(3)), make.convnet())
    assert "soft_labels" not in record_of(
        dope(small, real_images, strategy="random", images_per_class=2, progress=False)
    )


def learned(dataset, pipe, targets, **options):
    return add_learned_labels(dataset, pipe, targets, progress=False, **options)


def errors(dataset, labels, pipe, targets, regularization):
    """On each class, in the population of the targets, of a regression that learns these labels."""
    psi = embed_pixels(load_pixels(dataset, num_channels=1)[0], pipe, targets).double()
    means = targets.embeddings.double()
    cross = (means - means.mean(0)).T / 3
    return regression_errors(psi, labels.double() - 1 / 3, targets.second_moment.double(), cross, regularization)


@pytest.mark.parametrize("rows", [range(3), range(9), [0]], ids=["one a class", "three a class", "one image"])
def test_learned_labels_teach_a_regression_more_than_hard_ones(rows, real_images, pipe, targets):
    few = real_images.select(rows)
    found = torch.tensor(learned(few, pipe, targets)["learned_label"][:])
    hard = F.one_hot(torch.tensor(few["label"][:]), 3)
    assert (errors(few, found, pipe, targets, 0.1).sum() < errors(few, hard, pipe, targets, 0.1).sum() - 1e-3).all()
    torch.testing.assert_close(found.sum(1), torch.ones(len(few)))
    shifted = found + 0.05 * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    assert errors(few, found, pipe, targets, 0.1).sum() < errors(few, shifted, pipe, targets, 0.1).sum()


def test_learned_labels_of_classes_in_another_order(real_images, pipe, targets):
    names = ["triangle", "nothing", "circle", "square"]  # one without images, which the targets do not know
    labels = [names.index(NAMES[label]) for label in real_images["label"]]
    other = (
        real_images.remove_columns("label").add_column("label", labels).cast_column("label", ClassLabel(names=names))
    )
    found, expected = (
        np.array(learned(one.select(range(6)), pipe, targets)["learned_label"][:]) for one in (other, real_images)
    )
    np.testing.assert_allclose(found[:, [2, 3, 0]], expected, rtol=1e-6)
    assert not found[:, 1].any()


def test_networks_learn_learned_labels_by_their_squared_error(real_images, pipe, targets, tmp_path):
    """Wrong labels in `label` are not looked at; the set is published, and read by its name for this kind."""
    few = learned(soft(real_images.select(range(6)), pipe.classifier), pipe, targets)
    assert set(record_of(few)) == {"soft_labels", "learned_labels"}
    folder = save_dataset_folder(few, tmp_path / "set")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "(λ = 0.1)" in card and "Subtract 1 / 3 and train by the squared error" in card
    stored = read_folder(folder)["configs"]["default"]["train"]
    protocol = get_protocol("quick", steps=150, learning_rate=0.01, label_type="learned")
    images = load_image_set(stored, protocol=protocol, num_channels=1)
    test = load_image_set(real_images, protocol=protocol, test_for=images, num_channels=1)
    blind = dataclasses.replace(images, labels=images.labels.roll(1))

    def build():
        return build_evaluator("convnet-2", class_names=NAMES, image_size=8, num_channels=1, width=8)

    assert train_evaluator(build, blind, protocol=protocol, test=test).accuracy >= 0.9


def test_labels_are_refused_where_they_cannot_be_made(real_images, pipe, targets, make):
    teacher = make.convnet()
    with pytest.raises(ValueError, match="top_k must be between 1 and the number of classes, 3, but is 4"):
        soft(real_images, teacher, top_k=4)
    with pytest.raises(ValueError, match="`temperature` must be a finite number above 0"):
        soft(real_images, teacher, temperature=0)
    with pytest.raises(ValueError, match="`views` must be"):
        soft(real_images, teacher, views=0)
    with pytest.raises(ValueError, match="empty"):
        soft(real_images.select([]), teacher)
    with pytest.raises(ValueError, match="MatchingTargets, got NoneType"):
        learned(real_images, pipe, None)
    with pytest.raises(ValueError, match=r"3 classes, and the targets has 3 without \['blob'\]"):
        names = ["circle", "square", "blob"]
        learned(real_images.cast_column("label", ClassLabel(names=names)), pipe, targets)
    two = MatchingTargets.from_dataset(
        real_images.filter(lambda row: row["label"] < 2), pipe, features={}, progress=False
    )
    with pytest.raises(ValueError, match=r"the targets has 2 without \['triangle'\]"):
        learned(real_images, pipe, two)
    both = concatenate_datasets([real_images, real_images])
    assert len(learned(both, pipe, targets)) == 42  # images twice: their embeddings depend on each other
