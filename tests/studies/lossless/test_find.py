"""The search on real trainings: small digits, killed and resumed, and what it refuses."""

import dataclasses
import json

import pytest
import torch

from dsco_hf.concentration.selection import Random, Selection
from dsco_hf.data.datasets import Pool, load_digits_dataset
from dsco_hf.evaluators import get_protocol, load_image_set
from dsco_hf.studies.lossless.find import find_lossless_budget, nested_order, with_length
from dsco_hf.studies.lossless.noninferiority import compare
from dsco_hf.studies.lossless.report import claim, write_lossless
from dsco_hf.studies.lossless.search import SearchPlan


PROTOCOL = get_protocol("quick", steps=60, batch_size=32)
PLAN = SearchPlan(margin=0.1, trainings=8, reference_seeds=3, looks=1)


@pytest.fixture(scope="module")
def digits():
    data = load_digits_dataset()
    rows = data["train"].select(range(400))
    train = load_image_set(rows, protocol=PROTOCOL, num_channels=1)
    return train, load_image_set(data["test"], protocol=PROTOCOL, num_channels=1, test_for=train)


def search(digits, folder, **options):
    given = {"protocol": PROTOCOL, "plan": PLAN, "architecture": "convnet-2", "overrides": {"width": 8}}
    return find_lossless_budget(*digits, folder, **given | options)


def test_a_search_from_nothing_to_its_files_and_again(digits, tmp_path):
    found = search(digits, tmp_path)
    assert found["status"] == "accepted" and 0 < found["share"] < 1 and found["trainings"] <= 8
    assert (found["labels"], found["length"], found["selection"]["name"]) == ("hard", "same steps", "random")
    assert len(found["rows"]) == found["images"] == found["bracket"][1]
    assert len(found["every_training"]) == found["trainings"] + 3
    next(iter((tmp_path / "jobs").glob("lossless-*run0.json"))).unlink()  # killed before the end
    again = search(digits, tmp_path)
    assert again["every_training"] == found["every_training"] and again["images"] == found["images"]
    table = write_lossless(found, tmp_path)
    assert claim(found) in table and "accepted" in table and (tmp_path / "lossless.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "lossless.json").read_text(encoding="utf-8"))["images"] == found["images"]
    with pytest.raises(ValueError, match="was made with other settings or data"):
        search(digits, tmp_path, protocol=dataclasses.replace(PROTOCOL, learning_rate=0.5))


def test_what_cannot_be_found(digits, tmp_path):
    with pytest.raises(ValueError, match="nothing can be lost. Train longer"):
        search(digits, tmp_path / "a", protocol=get_protocol("quick", steps=1))
    with pytest.raises(ValueError, match=r"margin of 0.001 points cannot be resolved with 360 test images: about"):
        search(digits, tmp_path / "b", plan=dataclasses.replace(PLAN, margin=1e-5))
    with pytest.raises(ValueError, match="reference_seeds"):
        search(digits, tmp_path, plan=dataclasses.replace(PLAN, reference_seeds=1))
    with pytest.raises(ValueError, match="synthetic images and 400 real ones"):
        search(digits, tmp_path, small=digits[0])
    with pytest.raises(ValueError, match="no stored soft labels"):
        search(digits, tmp_path, protocol=dataclasses.replace(PROTOCOL, label_type="stored"))
    with pytest.raises(ValueError, match="Nearest: 'same epochs'"):
        search(digits, tmp_path, length="same epoch")
    train, test = digits
    with pytest.raises(ValueError, match="without"):
        search((train, dataclasses.replace(test, names=("a", *test.names[1:]))), tmp_path)


@dataclasses.dataclass(frozen=True)
class Restless(Selection):
    """Chooses otherwise for every number of images."""

    def rank(self, pool, small, wanted, pipe, seed):
        return torch.arange(len(pool.labels)).roll(sum(wanted))


@dataclasses.dataclass(frozen=True)
class Lazy(Selection):
    """Ranks as many as are wanted at first, and no more."""

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


def test_what_errors_say_to_do_is_done(digits, tmp_path):
    few = digits[0].select(torch.arange(20))
    for refused, followed in (
        ({"protocol": dataclasses.replace(PROTOCOL, label_type="stored")}, {"protocol": PROTOCOL}),
        ({"small": digits[0]}, {"small": few}),
        ({"plan": dataclasses.replace(PLAN, margin=1e-5)}, {"plan": PLAN}),
        ({"strategy": Restless()}, {"strategy": "random"}),
    ):
        with pytest.raises(ValueError, match="set the protocol's|so give fewer|Use a wider|Use a rule whose"):
            search(digits, tmp_path / "refused", **refused)
        found = search(digits, tmp_path / ("small" if "small" in followed else "followed"), **followed)
        assert found["status"] in ("accepted", "not shown")
    right = torch.ones(3, 10, dtype=torch.bool).numpy()
    with pytest.raises(ValueError, match="10 and 9 images: use the same"):
        compare(right, right[:, :9], level=0.05)
    compare(right, right, level=0.05)
