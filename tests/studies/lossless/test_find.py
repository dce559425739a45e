"""The search on real trainings: small digits, killed and resumed, and its two lengths and labels."""

import dataclasses
import itertools
import json

import pytest
import torch

from dsco_hf import build_evaluator
from dsco_hf.concentration.selection import Random, Selection
from dsco_hf.data.datasets import Pool, load_digits_dataset
from dsco_hf.evaluators import get_protocol, load_image_set, train_evaluator
from dsco_hf.studies.lossless import find
from dsco_hf.studies.lossless.find import find_lossless_budget, half_as_long, nested_order, with_length
from dsco_hf.studies.lossless.report import claim, write_lossless
from dsco_hf.studies.lossless.search import SearchPlan


PROTOCOL = get_protocol("quick", steps=60, batch_size=32)
PLAN = SearchPlan(margin=0.1, trainings=8, reference_seeds=3, looks=1)
SHORT = get_protocol("quick", steps=12, batch_size=64, learning_rate=0.01)
FEW = SearchPlan(margin=0.2, trainings=5, reference_seeds=2, looks=1)


@pytest.fixture(scope="module")
def digits():
    data = load_digits_dataset()
    rows = data["train"].select(range(400))
    train = load_image_set(rows, protocol=PROTOCOL, num_channels=1)
    return train, load_image_set(data["test"], protocol=PROTOCOL, num_channels=1, test_for=train)


def search(digits, folder, **options):
    given = {"protocol": PROTOCOL, "plan": PLAN, "architecture": "convnet-2", "overrides": {"width": 8}}
    return find_lossless_budget(*digits, folder, **given | options)


def short(digits, folder, **options):
    return search(digits, folder, **{"protocol": SHORT, "plan": FEW} | options)


@pytest.mark.slow
def test_a_search_from_nothing_to_its_files_and_again(digits, tmp_path, capsys):
    found = search(digits, tmp_path)
    assert found["status"] == "accepted" and 0 < found["share"] < 1 and found["trainings"] <= 8
    assert (found["labels"], found["length"], found["selection"]["name"]) == ("hard", "same steps", "random")
    assert len(found["rows"]) == found["images"] == found["bracket"][1]
    assert len(found["every_training"]) == found["trainings"] + 3
    told = capsys.readouterr().out
    assert "up to 11 trainings, 3 on all 400 images and 8 on fewer, with the same number of steps (60 steps)" in told
    assert "3 trainings on 40, 120, 240 images; at most" in told and "left, until" in told
    next(iter((tmp_path / "jobs").glob("lossless-*run0.json"))).unlink()  # killed before the end
    again = search(digits, tmp_path)
    assert again["every_training"] == found["every_training"] and again["images"] == found["images"]
    table = write_lossless(found, tmp_path)
    assert claim(found) in table and "accepted" in table and (tmp_path / "lossless.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "lossless.json").read_text(encoding="utf-8"))["images"] == found["images"]
    for other in (
        {"protocol": dataclasses.replace(PROTOCOL, learning_rate=0.5)},
        {"plan": dataclasses.replace(PLAN, margin=0.15)},  # not after the results are known
        {"length": "same epochs"},
    ):
        with pytest.raises(ValueError, match="was begun otherwise .*set the options as they were"):
            search(digits, tmp_path, **other)
    with pytest.raises(ValueError, match="was made with other settings or data"):
        search((digits[0].select(torch.arange(400).flip(0)), digits[1]), tmp_path)


@pytest.mark.slow
def test_a_teachers_labels_are_another_answer(digits, tmp_path):
    shape = {"num_channels": 1, "image_size": 8, "width": 8}
    network = build_evaluator("convnet-2", class_names=digits[0].names, seed=0, **shape)
    longer = get_protocol("quick", steps=150, batch_size=64, learning_rate=0.01)
    teacher = train_evaluator(network, digits[0], protocol=longer).model
    protocol = dataclasses.replace(SHORT, label_type="teacher", temperature=1.0)
    soft, hard = short(digits, tmp_path / "soft", protocol=protocol, teacher=teacher), short(digits, tmp_path / "hard")
    assert (soft["labels"], hard["labels"]) == ("teacher", "hard")
    assert soft["teacher"]["name"] == "ConvNetForImageClassification" and hard["teacher"] is None
    assert soft["reference"] != hard["reference"]  # which has the teacher's labels, too
    assert "Labels are soft" in claim(soft) and "Labels are hard" in claim(hard)


@pytest.mark.slow
def test_same_epochs_are_fewer_steps_and_nothing_else(digits, tmp_path):
    found = short(digits, tmp_path, length="same epochs")
    assert found["length"] == "same epochs" and found["protocol"]["steps"] is None
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "jobs").iterdir()]
    epochs = found["protocol"]["epochs"]  # 12 steps are 2 epochs of 7 batches
    assert epochs == 2 and {job["steps"] for job in jobs} == {2 * 7, 7, 2 * 1, 2 * 2, 2 * 4} | {
        2 * -(-row["images"] // 64) for row in found["looks"]
    }
    with pytest.raises(ValueError, match="was begun otherwise .*length"):
        short(digits, tmp_path, length="same steps")
    jobs = short(digits, tmp_path / "steps")
    steps = [json.loads(path.read_text(encoding="utf-8"))["steps"] for path in (tmp_path / "steps/jobs").iterdir()]
    assert sorted(set(steps)) == [6, 12] and jobs["length"] == "same steps"


def test_every_set_begins_with_the_synthetic_images(digits, tmp_path):
    train, test = digits
    small = train.select(torch.arange(30))
    small = dataclasses.replace(small, pixels=-small.pixels)
    seen = {}

    class Seen(find._Trainer):
        def images(self, count):
            seen[count] = super().images(count)
            return seen[count]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find, "_Trainer", Seen)
        found = short(digits, tmp_path, small=small)
    fewer = sorted(seen)[:-1]
    assert seen[400] is train and found["synthetic_images"] == 30 and fewer[0] == 40
    for count in fewer:
        assert len(seen[count].labels) == count and torch.equal(seen[count].pixels[:30], small.pixels)
    for less, more in itertools.pairwise(fewer):
        assert torch.equal(seen[more].pixels[:less], seen[less].pixels)
    if found["status"] == "accepted":
        assert len(found["rows"]) == found["images"] - 30


@dataclasses.dataclass(frozen=True)
class Restless(Selection):
    """Chooses otherwise for every number of images."""

    def rank(self, pool, small, wanted, pipe, seed):
        return torch.arange(len(pool.labels)).roll(sum(wanted))


@dataclasses.dataclass(frozen=True)
class Lazy(Selection):
    """Ranks half of the images, and no more."""

    def rank(self, pool, small, wanted, pipe, seed):
        return torch.arange(len(pool.labels) // 2)


def test_sets_nest_and_keep_the_shares_of_classes(digits):
    pool = Pool(digits[0], progress=False)
    order = nested_order(pool, None, Random(), None)
    assert order.sort().values.tolist() == list(range(400))
    few = torch.bincount(pool.labels[order[:100]], minlength=10)
    assert (few - torch.tensor(pool.counts) / 4).abs().max() <= 1
    with pytest.raises(ValueError, match="sets do not nest"):
        nested_order(pool, None, Restless(), None)
    with pytest.raises(ValueError, match="needs a rule that ranks all of them"):
        nested_order(pool, None, Lazy(), None)


def test_lengths_are_those_of_all_data(digits):
    train = digits[0]
    by_steps, by_epochs = (with_length(PROTOCOL, length, train) for length in ("same steps", "same epochs"))
    assert (by_steps.steps, by_steps.epochs) == (60, None)
    assert (by_epochs.steps, by_epochs.epochs) == (None, 5)  # 13 batches of 32
    again = with_length(get_protocol("quick", epochs=3, batch_size=32), "same steps", train)
    assert again.steps == 39
    assert half_as_long(again).steps == 19 and half_as_long(by_epochs).epochs == 2
    assert half_as_long(get_protocol("quick", steps=1)).steps == 1
