"""Names that YAML, JSON or Markdown could read as something else, through everything that is written and read back."""

import unicodedata

import pytest
from test_names import TRICKY
from transformers import AutoModelForImageClassification

from dsco_hf import DsCoPipeline, MatchingTargets, build_evaluator, load_image_dataset, save_dataset_folder
from dsco_hf.concentration.concentrate import to_dataset


NAMES = [*TRICKY, "<b>", "a | b", "{{ a }}", "A", "a", "1", "日本", unicodedata.normalize("NFD", "é")]


def test_a_folder_with_its_card_and_record_keeps_every_name(tmp_path, make):
    image = make.images((1, 0, 0))[0]["image"]
    rows = [{"image": image, "label": label, "seed": 0, "block": 0} for label in range(len(NAMES))]
    save_dataset_folder(to_dataset(rows, NAMES), tmp_path / "set")
    found = load_image_dataset(tmp_path / "set", split="train")
    assert found.features["label"].names == NAMES
    assert found["label"][:] == list(range(len(NAMES)))


def test_a_classifier_and_a_generator_keep_every_name(tmp_path, make):
    network = build_evaluator("convnet-2", class_names=NAMES, image_size=8, num_channels=1, seed=0, width=4)
    network.save_pretrained(tmp_path / "classifier")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    assert [again.config.id2label[label] for label in range(len(NAMES))] == NAMES
    pipe = make.pipe()
    for first in range(0, len(NAMES) - 2, 3):
        names = NAMES[first : first + 3]
        named = DsCoPipeline(pipe.transformer, pipe.scheduler, id2label=dict(enumerate(names)))
        assert named.get_label_ids(names) == [0, 1, 2]
    named.save_pretrained(tmp_path / "pipe")
    assert DsCoPipeline.from_pretrained(tmp_path / "pipe").id2label == dict(enumerate(names))


def test_targets_keep_every_name(tmp_path, make):
    pipe = make.pipe(classifier=make.convnet())
    for names in (("yes", "1:30", "012"), ("a", "A", "null"), (" a", "a\nb", "{{ a }}")):
        images = make.images((2, 2, 2), names=names)
        targets = MatchingTargets.from_dataset(images, pipe, mapping=[0, 1, 2], embedding_dim=16, progress=False)
        targets.save_pretrained(tmp_path / "targets")
        assert MatchingTargets.from_pretrained(tmp_path / "targets").class_names == list(names)


@pytest.mark.parametrize("names", [["a", "a"], ["a"]])
def test_classes_that_cannot_be_told_apart_are_refused(names):
    with pytest.raises(ValueError, match="more than once|at least two classes"):
        build_evaluator("convnet-2", class_names=names, image_size=8)
