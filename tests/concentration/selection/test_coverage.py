"""Rules that cover the data, against cases computed by hand."""

import math

import pytest
import torch

from dsco_hf import CCS, D2, KCenter, Moderate, Pool, TrainingLog, dope, select
from dsco_hf.concentration.selection.coverage import farthest_first, neighbours, spread_evenly, strata_of
from dsco_hf.concentration.selection.features import image_features


def rules(training):
    return (
        CCS(training, strata=3),
        Moderate(features="pixels"),
        KCenter(features="pixels"),
        D2(features="pixels", training=training, neighbours=3),
    )


def test_strata_of_equal_width_and_their_budgets():
    assert strata_of(torch.tensor([0.0, 0.24, 0.26, 0.5, 1.0, 0.76]), 4).tolist() == [0, 0, 1, 2, 3, 3]
    assert strata_of(torch.full((3,), 0.2), 4).tolist() == [0, 0, 0]
    assert spread_evenly(10, [2, 10, 0, 7]) == [2, 4, 0, 4]
    assert spread_evenly(6, [1, 1, 9]) == [1, 1, 4]
    assert spread_evenly(5, [3, 3]) == [2, 3]


def test_ccs_leaves_the_hardest_out_and_takes_of_all_strata(pool):
    margins = torch.linspace(-1, 1, 21)[torch.randperm(21, generator=torch.Generator().manual_seed(2))]
    training = TrainingLog(margins[None], margins[None], margins[None], pool.fingerprint)
    order = margins.argsort()
    chosen = rule_rows(pool, CCS(training, left_out=0.2, strata=4), 8)
    assert len(chosen) == 8 and not set(chosen) & set(order[:4].tolist())
    kept = order[4:].tolist()
    strata = strata_of(margins[torch.tensor(kept)], 4)
    taken = [int(strata[kept.index(row)]) for row in chosen]
    assert [taken.count(stratum) for stratum in range(4)] == [2, 2, 2, 2]
    assert len(rule_rows(pool, CCS(training, left_out=0.9), 21)) == 21  # as all are wanted none is left out
    assert chosen != rule_rows(pool, CCS(training, left_out=0.2, strata=4), 8, seed=5)


def rule_rows(pool, rule, total, seed=0):
    numbered = pool.real.add_column("row", range(len(pool.real))) if "row" not in pool.real.column_names else pool.real
    whole = Pool(numbered, progress=False)
    if getattr(rule, "training", None) is not None:
        object.__setattr__(rule.training, "dataset", whole.fingerprint)
    return select(whole, rule, total=total, seed=seed)["row"][:]


def test_moderate_takes_the_middle_band_of_distances_from_the_class_median(pool):
    pixels, distances = pool.pixels().flatten(1), torch.empty(21)
    for label in range(3):
        mine = pixels[pool.labels == label]
        distances[pool.labels == label] = (mine - mine.quantile(0.5, dim=0)).norm(dim=1)
    order = distances.argsort().tolist()
    assert set(rule_rows(pool, Moderate(features="pixels"), 7)) == set(order[7:14])
    per_class = select(pool.real.add_column("row", range(21)), Moderate("pixels"), images_per_class=3, progress=False)
    for label in range(3):
        ranked = [row for row in order if pool.labels[row] == label]
        margin = (len(ranked) - 3) // 2
        assert set(per_class.filter(lambda row, label=label: row["label"] == label)["row"]) == set(
            ranked[margin : margin + 3]
        )


def test_the_farthest_first_by_hand():
    x = torch.tensor([[0.0], [1.0], [4.0], [10.0], [5.2]])
    assert farthest_first(x, 4).tolist() == [2, 3, 0, 4]  # 4.0 is nearest to the mean of 4.04
    assert farthest_first(x, 2, torch.tensor([[9.0]])).tolist() == [0, 2]
    assert farthest_first(x, 9).tolist()[:3] == [2, 3, 0] and len(farthest_first(x, 9).unique()) == 5
    assert farthest_first(x, 0).tolist() == [] == farthest_first(x[:0], 3).tolist()
    same = farthest_first(torch.zeros(3, 2), 3)
    assert same.tolist() == [0, 1, 2]


def test_d2_by_hand():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    index, squares = neighbours(x, 1)
    assert index.tolist() == [[1], [0], [1]]
    torch.testing.assert_close(squares, torch.tensor([[0.5], [0.5], [2.0]]))  # d² of 1, 1, 4, the mean is 2
    # scores: 4 + e^-.5 · 2, 2 + e^-.5 · 4, 1 + e^-2 · 2; the first is taken, and e^-.5 of its score from the second
    hard = torch.tensor([4.0, 2.0, 1.0])
    first, second, third = 4 + 2 * math.exp(-0.5), 2 + 4 * math.exp(-0.5), 1 + 2 * math.exp(-2)
    assert first > second > third > second - math.exp(-0.5) * first
    assert D2().order(hard, index, squares, 3).tolist() == [0, 2, 1]
    assert D2(reduce=50.0).order(hard, index, squares, 2).tolist() == [0, 1]


def test_few_images_have_fewer_neighbours():
    index, squares = neighbours(torch.randn(3, 2), 10)
    assert index.shape == squares.shape == (3, 2)
    assert D2().order(torch.ones(1), *neighbours(torch.zeros(1, 2), 10), 1).tolist() == [0]
    assert neighbours(torch.zeros(3, 2), 1)[1].tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("place", range(4))
def test_alone_and_on_top_of_a_set_per_class_and_over_all(make, pool, training, place):
    rule, small = rules(training)[place], make.images((1, 1, 1), seed=3)
    assert list(select(pool, rule, images_per_class=2)["label"]) == [0, 0, 1, 1, 2, 2]
    assert len(select(pool, rule, total=8)) == 8
    mixed = dope(small, pool, images_per_class=4, strategy=rule, progress=False)
    assert [list(mixed["label"]).count(label) for label in range(3)] == [4, 4, 4]
    over_all = dope(small, pool, total=9, strategy=rule, progress=False)
    assert len(set(over_all["real_index"][3:])) == 6
    again = dope(small, pool, total=9, strategy=rule, progress=False)
    assert again["real_index"][:] == over_all["real_index"][:]


def test_k_center_keeps_away_from_what_is_in_the_set(make, real_images, pool):
    small = make.images((1, 1, 1), seed=3)
    mixed = dope(small, pool, images_per_class=2, strategy=KCenter("pixels"), progress=False)
    have = Pool(small, progress=False).pixels().flatten(1)
    for label, row in enumerate(mixed["real_index"][3:]):
        members = (pool.labels == label).nonzero()[:, 0]
        away = (pool.pixels().flatten(1)[members] - have[label]).norm(dim=1)
        assert row == int(members[away.argmax()])


def test_features_of_more_images_than_are_kept_are_the_same(pool, make, monkeypatch):
    network, counted = make.convnet().eval(), []
    for least in (0, 2**32):
        monkeypatch.setattr("dsco_hf.data.datasets.KEPT", least)
        counted.append((image_features(pool, network), len(pool._pixels)))
    (streamed, none), (kept, some) = counted
    assert torch.equal(streamed, kept) and (none, some) == (0, 1)
    monkeypatch.setattr("dsco_hf.data.datasets.KEPT", 0)
    assert torch.equal(torch.cat([*pool.batches(5, 8, 1)]), pool.pixels(8, 1))


def test_bad_input(pool, make, training, pipe):
    for name in ("moderate", "k_center"):
        with pytest.raises(ValueError, match=f"'{name}' goes by what a classifier sees, and there is none"):
            select(pool, name, images_per_class=1)
        assert len(select(pool, name, images_per_class=1, pipe=pipe)) == 3
    for name in ("ccs", "d2"):
        with pytest.raises(ValueError, match=f"'{name}' goes by a logged training, and has none"):
            select(pool, name, images_per_class=1, pipe=pipe)
    broken = make.convnet()
    torch.nn.init.constant_(next(broken.parameters()), math.nan)
    for rule in (Moderate(broken), KCenter(broken), D2(broken, training)):
        with pytest.raises(ValueError, match="needs finite features, and 21 of 21 images have others"):
            select(pool, rule, images_per_class=1)
    with pytest.raises(ValueError, match="`left_out` must be below 1"):
        CCS(left_out=1)
    with pytest.raises(ValueError, match="`neighbours` must be a whole number of at least 1, got 0"):
        D2(neighbours=0)
    with pytest.raises(ValueError, match="`reduce` must be a finite number of at least 0"):
        D2(reduce=-1.0)
