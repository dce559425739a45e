"""Scores of a logged training, against cases computed by hand."""

import math
import statistics

import pytest
import torch
from scipy.stats import beta

from dsco_hf import AUM, DUAL, EL2N, DynUnc, Forgetting, Pool, TrainingLog, dope, recorded_doping, select
from dsco_hf.concentration.selection.difficulty import beta_weights, highest
from dsco_hf.concentration.selection.dynamics import dynamics
from dsco_hf.concentration.set_records import record_of


RULES = (EL2N, Forgetting, AUM, DynUnc, DUAL)


def log_of(probabilities, margins=None, errors=None, dataset="images"):
    """A log `(E, N)` of hand-made values."""
    values = [torch.tensor(probabilities if one is None else one) for one in (None, margins, errors)]
    return TrainingLog(*values, dataset)


def test_what_is_logged_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    own, margin, error = dynamics(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(own, torch.tensor([0.5, 0.3]))
    torch.testing.assert_close(margin, torch.tensor([0.2, -0.3]))
    hand = [math.sqrt(0.25 + 0.09 + 0.04), math.sqrt(0.01 + 0.36 + 0.49)]
    torch.testing.assert_close(error, torch.tensor(hand))


def test_el2n_is_the_mean_error_of_the_first_epochs():
    scores = EL2N(epochs=2).scores(log_of([[0.2, 1.0], [0.4, 0.0], [9.0, 9.0]]))
    torch.testing.assert_close(scores, torch.tensor([0.3, 0.5]))


def test_forgetting_counts_changes_from_right_to_wrong():
    margins = [[0.1, -0.1, 0.2, -1.0], [-0.1, 0.3, 0.2, -1.0], [0.4, 0.1, 0.2, -1.0], [-0.4, 0.1, 0.2, 0.0]]
    scores = Forgetting().scores(log_of(margins))
    assert scores.tolist() == [2.0, 0.0, 0.0, 4.0]  # the last is never right


def test_aum_takes_the_smallest_mean_margin_first():
    torch.testing.assert_close(AUM().scores(log_of([[0.5, -1.0], [0.1, 0.4]])), torch.tensor([-0.3, 0.3]))


def test_uncertainty_of_windows():
    p = [[0.1, 0.5], [0.3, 0.5], [0.8, 0.5], [0.6, 0.7]]
    columns = list(zip(*p, strict=True))
    spread = [[statistics.stdev(column[i : i + 3]) for i in range(2)] for column in columns]
    means = [[statistics.mean(column[i : i + 3]) for i in range(2)] for column in columns]
    torch.testing.assert_close(DynUnc(window=3).scores(log_of(p)), torch.tensor([sum(one) / 2 for one in spread]))
    dual = [sum(s * (1 - m) for s, m in zip(*one, strict=True)) / 2 for one in zip(spread, means, strict=True)]
    torch.testing.assert_close(DUAL(window=3).scores(log_of(p)), torch.tensor(dual))
    early = DUAL(window=3, epochs=3).scores(log_of(p))
    torch.testing.assert_close(early, torch.tensor([s[0] * (1 - m[0]) for s, m in zip(spread, means, strict=True)]))


def test_dual_draws_by_the_density_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    scores, mean = torch.rand(50, generator=generator), torch.rand(50, generator=generator).clamp(0.05, 0.95)
    found = beta_weights(scores, mean, 0.7, 4.0)
    b = 15 * (1 - float(mean[scores.argsort(descending=True)[:10]].mean())) * (1 - 0.7**4)
    hand = torch.from_numpy(beta.logpdf(mean.double().numpy(), 16 - b, b)) + scores.double().log()
    torch.testing.assert_close(found - found[0], hand - hand[0], atol=1e-5, rtol=1e-5)


def test_dual_takes_easier_images_where_fewer_are_wanted():
    generator = torch.Generator().manual_seed(3)
    mean = torch.rand(4000, generator=generator)
    scores = (1 - mean) * mean

    def drawn(left_out):
        noise = -torch.empty(4000).exponential_(generator=generator).log()
        keys = beta_weights(scores, mean, left_out, 4.0) + noise
        return float(mean[keys.topk(int(4000 * (1 - left_out))).indices].mean())

    assert drawn(0.9) > drawn(0.6) > drawn(0.3)


def test_equal_scores_are_ranked_by_the_seed():
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0, 1.0])
    ranked = [highest(scores, seed).tolist() for seed in range(8)]
    assert all(one[:2] == [4, 1] and sorted(one[2:]) == [0, 2, 3, 5] for one in ranked)
    assert len({tuple(one) for one in ranked}) > 1 and ranked[0] == highest(scores, 0).tolist()


@pytest.mark.parametrize("kind", RULES)
def test_alone_and_on_top_of_a_set_per_class_and_over_all(real_images, make, pool, training, kind):
    rule, small = kind(training), make.images((1, 1, 1), seed=3)
    numbered = Pool(real_images.add_column("row", range(21)), progress=False)
    object.__setattr__(training, "dataset", numbered.fingerprint)
    few = select(numbered, rule, images_per_class=3)
    assert list(few["label"]) == [0] * 3 + [1] * 3 + [2] * 3
    best = select(numbered, rule, total=8)["row"][:]
    assert len(set(best)) == 8
    object.__setattr__(training, "dataset", pool.fingerprint)
    mixed = dope(small, pool, total=11, strategy=rule, progress=False)
    assert mixed["real_index"][3:] == best
    each = dope(small, pool, images_per_class=4, strategy=rule, progress=False)
    assert each["real_index"][3:] == few["row"][:]
    if kind is not DUAL:
        scores = rule.scores(training)
        assert best == scores.argsort(descending=True)[:8].tolist() or kind is Forgetting
        assert rule.nested and select(numbered, rule, images_per_class=2)["row"][:2] == few["row"][:2]
    record = record_of(mixed)["doping"]
    assert record["strategy"]["training"] == {"sha256": training.sha256}
    again = dope(small, pool, progress=False, **recorded_doping(record, training=training))
    assert again["real_index"][:] == mixed["real_index"][:]


def test_dual_nests_where_the_share_that_is_left_out_is_said(pool, training):
    def ranked(wanted, **fields):
        return DUAL(training, window=2, **fields).rank(pool, None, wanted, None, 0).tolist()

    for left_out in (0.3, 0.9):
        few, many = (ranked([count] * 3, left_out=left_out) for count in (2, 4))
        assert [few[start : start + 2] for start in (0, 2, 4)] == [many[start : start + 2] for start in (0, 4, 8)]
    assert ranked(7) == ranked(7, left_out=1 - 7 / 21)


@pytest.mark.parametrize("kind", RULES)
def test_what_a_rule_needs(real_images, make, pool, training, kind):
    name = kind.name
    with pytest.raises(
        ValueError, match=f"'{name}' goes by a logged training, and has none: pass `training=log_train"
    ):
        select(pool, name, images_per_class=1)
    other = Pool(make.images((9, 7, 5), seed=9), progress=False)
    with pytest.raises(ValueError, match=f"'{name}' was given the log of a training on other images"):
        select(other, kind(training), images_per_class=1)
    for field in ("probabilities", "margins", "errors"):
        broken = TrainingLog(*(getattr(training, key).clone() for key in ("probabilities", "margins", "errors")),
                             training.dataset)  # fmt: skip
        getattr(broken, field)[3, 4] = math.nan
        with pytest.raises(
            ValueError, match=f"has other {field} of 1 images, the first in row 4: log a training again"
        ):
            select(pool, kind(broken), images_per_class=1)
    with pytest.raises(ValueError, match="at least 6 images, but 'triangle' has 5"):
        select(pool, kind(training), images_per_class=6)
    with pytest.raises(ValueError, match="`total` must be from 1 to 21, the images there are; got 22"):
        select(pool, kind(training), total=22)
    few = real_images.filter(lambda row: row["label"] != 1)  # a class of the names has no image
    own = TrainingLog(*(getattr(training, key)[:, :14] for key in ("probabilities", "margins", "errors")),
                      Pool(few, progress=False).fingerprint)  # fmt: skip
    assert list(select(few, kind(own), images_per_class=2, progress=False)["label"]) == [0, 0, 2, 2]


@pytest.mark.parametrize("kind", [DynUnc, DUAL])
def test_a_log_shorter_than_a_window(pool, training, kind):
    with pytest.raises(ValueError, match="needs 13 epochs, and the training was logged for 12: log a longer one"):
        select(pool, kind(training, window=13), images_per_class=1)
    assert len(select(pool, kind(training, window=12), images_per_class=1)) == 3


def test_fields_that_cannot_be():
    with pytest.raises(ValueError, match="`epochs` must be at least `window`, 10; got 5"):
        DUAL(epochs=5)
    with pytest.raises(ValueError, match="`window` must be a whole number of at least 2, got 1"):
        DynUnc(window=1)
    with pytest.raises(ValueError, match="`epochs` must be a whole number of at least 1, got 0"):
        EL2N(epochs=0)
    with pytest.raises(ValueError, match="`curve` must be a finite number above 0"):
        DUAL(curve=0)
