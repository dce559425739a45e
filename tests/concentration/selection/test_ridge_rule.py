"""The ridge rule: against solving the regression anew for every candidate."""

import pytest
import torch

from dsco_hf import Pool, RidgeRule, dope, select
from dsco_hf.concentration.selection import ridge_rule
from dsco_hf.concentration.selection.ridge_rule import RidgeGreedy
from dsco_hf.matching.kernels import regression_errors


@pytest.fixture
def problem():
    """Embeddings and labels of 40 candidates of 3 classes, and of 4 images that are in the set."""
    generator = torch.Generator().manual_seed(0)
    psi, start = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator)) for n in (40, 4))
    return psi, torch.randint(0, 3, (40,), generator=generator), start, torch.tensor([0, 1, 2, 0])


def error_of(psi, labels, few, few_labels, classes=3):
    """What `Ridge` calls the error, with the population of all candidates."""
    present = labels.unique().tolist()
    parts = [psi[labels == label].double() for label in present]
    moment = sum(part.T @ part / len(part) for part in parts) / len(present)
    means = torch.stack([part.mean(0) for part in parts])
    answers = (few_labels[:, None] == torch.tensor(present)).double() - 1 / len(present)
    cross = (means - means.mean(0)).T / len(present)
    return float(regression_errors(few.double(), answers, moment, cross, 2.0).sum())


@pytest.mark.parametrize("begun", [True, False])
def test_each_pick_is_the_one_that_lowers_the_error_most(problem, begun):
    psi, labels, start, start_labels = problem
    start, start_labels = (start, start_labels) if begun else (start[:0], start_labels[:0])

    def error(places):
        return error_of(psi, labels, torch.cat([start, psi[places]]), torch.cat([start_labels, labels[places]]))

    expected = []
    for _ in range(10):
        expected.append(min((error([*expected, i]), i) for i in range(40) if i not in expected)[1])
    greedy = RidgeGreedy(psi, labels, 3, 2.0)
    if begun:
        greedy.start(start, start_labels)
    assert greedy.pick(10).tolist() == expected
    assert greedy.error() == pytest.approx(error(expected), abs=1e-7)


def test_rank_one_updates_stay_what_solving_anew_gives(problem, monkeypatch):
    psi, labels, start, start_labels = problem
    greedy, anew = (RidgeGreedy(psi, labels, 3, 2.0) for _ in range(2))
    chosen = greedy.pick(30)
    kept = [tensor.clone() for tensor in (greedy.spread, greedy.gain, greedy.residual, greedy.slope)]
    greedy.refresh()
    for before, after in zip(kept, (greedy.spread, greedy.gain, greedy.residual, greedy.slope), strict=True):
        torch.testing.assert_close(before, after, atol=1e-6, rtol=0)
    monkeypatch.setattr(ridge_rule, "REFRESH", 1)
    monkeypatch.setattr(ridge_rule, "CHUNK", 7)
    assert torch.equal(anew.pick(30), chosen)


def test_of_each_class_as_many_as_are_wanted(problem):
    psi, labels, *_ = problem
    chosen = RidgeGreedy(psi, labels, 3, 2.0).pick([3, 0, 100])
    counts = torch.bincount(labels, minlength=3).tolist()
    assert torch.bincount(labels[chosen], minlength=3).tolist() == [3, 0, counts[2]]
    assert len(RidgeGreedy(psi, labels, 3, 2.0).pick(100).unique()) == 40


def test_a_small_choice_is_part_of_a_large_one(problem):
    psi, labels, *_ = problem

    def chosen(*wanted):
        found = RidgeGreedy(psi, labels, 3, 2.0).pick(wanted)
        return [found[labels[found] == label].tolist() for label in range(3)]

    many = chosen(9, 6, 8)
    for few in ((2, 2, 2), (1, 5, 3), (4, 0, 1)):
        assert chosen(*few) == [own[:count] for own, count in zip(many, few, strict=True)]


def test_half_precision_in_chunks_is_what_one_product_in_memory_gives(problem, monkeypatch):
    psi, labels, start, start_labels = problem
    half = psi.half()
    whole, chunked = (RidgeGreedy(kept, labels, 3, 2.0) for kept in (half.double(), half))
    monkeypatch.setattr(ridge_rule, "CHUNK", 9)
    for greedy in (whole, chunked):
        greedy.start(start, start_labels)
    assert chunked.psi.dtype == torch.float16
    assert torch.equal(whole.pick([5, 5, 5]), chunked.pick([5, 5, 5]))
    assert chunked.error() == pytest.approx(whole.error(), abs=1e-9)


def test_a_class_without_image_is_no_class(problem):
    psi, labels, *_ = problem
    labels = labels * 2  # classes 0, 2 and 4 of 6
    chosen = RidgeGreedy(psi, labels, 6, 2.0).pick(8)
    assert torch.equal(chosen, RidgeGreedy(psi, labels // 2, 3, 2.0).pick(8))


def test_alone_and_on_top_of_a_set(real_images, make, pipe):
    small, rule = make.images((1, 1, 1), seed=3), RidgeRule(features="pixels", embedding_dim=64)
    pool = Pool(real_images, progress=False)
    few = select(pool, rule, images_per_class=2)
    assert list(few["label"]) == [0, 0, 1, 1, 2, 2]
    assert len(select(pool, rule, total=5)) == 5
    mixed = dope(small, pool, images_per_class=3, strategy=rule, progress=False)
    assert [list(mixed["label"]).count(label) for label in range(3)] == [3, 3, 3]
    assert len(dope(small, pool, total=7, strategy=rule, progress=False)) == 7
    asked = dope(small, pool, pipe, total=7, strategy="ridge_rule", progress=False)  # of the pipeline's classifier
    assert len(asked) == 7


def test_bad_input(real_images, make):
    with pytest.raises(
        ValueError, match="'ridge_rule' goes by what a classifier sees, and there is none: pass a pipel"
    ):
        select(real_images, "ridge_rule", images_per_class=1, progress=False)
    one = real_images.filter(lambda row: row["label"] == 1)
    with pytest.raises(ValueError, match="tells classes apart, and the pool has one: choose another rule"):
        select(one, RidgeRule(features="pixels"), images_per_class=1, progress=False)
    with pytest.raises(ValueError, match="`embedding_dim` must be even"):
        RidgeRule(embedding_dim=3)
    with pytest.raises(ValueError, match="`regularization` must be a finite number above 0, got 0"):
        RidgeRule(regularization=0)
    with pytest.raises(ValueError, match="`features` must be one of"):
        RidgeRule(features="pixel")
    broken = make.convnet()
    torch.nn.init.constant_(next(broken.parameters()), float("nan"))
    with pytest.raises(ValueError, match="needs finite features, and 21 of 21 images have others, the first in row 0"):
        select(real_images, RidgeRule(features=broken), images_per_class=1, progress=False)
