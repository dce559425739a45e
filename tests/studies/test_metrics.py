"""Metrics against hand-computed values, and as evaluate modules without a network."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from scipy import stats

import dsco_hf.studies.metrics
from dsco_hf.matching.kernels import median_bandwidth, mmd2_exact
from dsco_hf.studies.metrics import (
    METRICS,
    Accuracy,
    AugmentationRobustScore,
    Coverage,
    Discrepancy,
    LabelRobustScore,
    Retention,
    paired_difference,
)


def features(count, dim=4, seed=0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def discrepancy(small, real, **options):
    return Discrepancy().compute(predictions=np.asarray(small), real_features=real, **options)["discrepancy"]


def density_and_coverage(small, real, k=5):
    return tuple(Coverage().compute(predictions=np.asarray(small), real_features=real, k=k).values())


def label_score(predictions=0.5, random=0.1, hard=0.4, full=0.9, **options):
    given = {"predictions": [predictions], "random": [random], "hard": [hard], "full": [full]}
    return LabelRobustScore().compute(**given, **options)["lrs"]


def test_load_by_path_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path))
    path = str(Path(dsco_hf.studies.metrics.__file__))
    metric = evaluate.load(path, "retention")
    result = metric.compute(predictions=[0, 1, 1, 1], full_predictions=[0, 0, 1, 1], references=[0, 0, 1, 1])
    assert result == {"retention": 0.75, "accuracy": 0.75, "full_accuracy": 1.0}
    assert type(evaluate.load(path)).__name__ == "Accuracy"
    with pytest.raises(ValueError, match="'retension'.*'retention'"):
        evaluate.load(path, "retension")


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_describes_itself(name):
    metric = METRICS[name]()
    assert isinstance(metric, evaluate.Metric)
    assert "higher is better" in metric.description or "lower is better" in metric.description
    assert "predictions" in metric.inputs_description


def test_top_k():
    scores = [[0.1, 0.7, 0.2], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]]
    assert Accuracy().compute(predictions=scores, references=[1, 1, 0], k=2) == pytest.approx(
        {"accuracy": 1 / 3, "top_k": 2 / 3}
    )
    assert Accuracy().compute(predictions=scores, references=[0, 1, 2], k=3)["top_k"] == 1.0
    with pytest.raises(ValueError, match="between 1 and the 3 classes, got 5"):
        Accuracy().compute(predictions=scores, references=[1, 1, 0])


def test_retention():
    with pytest.raises(ValueError, match="above 0"):
        Retention().compute(predictions=[0], full_predictions=[1], references=[0])


def test_discrepancy_is_the_exact_one_within_the_error_of_fourier_features():
    small, real = features(40, seed=1, shift=0.5), features(300)
    mean, std = real.mean(0), real.std(0, correction=0)
    x, y = (small - mean) / std, (real - mean) / std
    exact = mmd2_exact(x, y, median_bandwidth(y)).item()
    assert discrepancy(small, real, embedding_dim=8192) == pytest.approx(exact, abs=0.01)
    assert discrepancy(real, real) == pytest.approx(0, abs=1e-6)
    assert discrepancy(features(40, seed=1), real) < discrepancy(small, real)


def test_discrepancy_streams_and_takes_classes():
    small, real = features(20, seed=1), features(100)
    metric = Discrepancy()
    for part in small.split(7):
        metric.add_batch(predictions=part.numpy())
    assert metric.compute(real_features=real)["discrepancy"] == pytest.approx(discrepancy(small, real), rel=1e-4)
    labels, real_labels = torch.arange(20) % 2, torch.arange(100) % 2
    found = discrepancy(small, real, labels=labels.tolist(), real_labels=real_labels.tolist(), embedding_dim=8192)
    mean, std = real.mean(0), real.std(0, correction=0)
    x, y = (small - mean) / std, (real - mean) / std
    exact = [mmd2_exact(x[labels == c], y[real_labels == c], median_bandwidth(y)).item() for c in (0, 1)]
    assert found == pytest.approx(sum(exact) / 2, abs=0.01)
    with pytest.raises(ValueError, match="Class 1 of the small dataset has no image"):
        discrepancy(small, real, labels=labels, real_labels=torch.zeros(100))


def test_density_and_coverage_of_a_hand_made_case():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii for k = 1: 1, 1, 1, 8
    small = torch.tensor([[0.5], [3.0]])
    # 0.5 lies in the balls of 0 and 1; 3 in that of 10 (and on the border of that of 2).
    assert density_and_coverage(small, real, k=1) == pytest.approx((3 / 2, 3 / 4))
    density, coverage = density_and_coverage(features(500, seed=3), features(500))
    assert density == pytest.approx(1, abs=0.15) and coverage > 0.9
    far = Coverage().compute(predictions=features(50, shift=9.0).numpy(), real_features=features(500))
    assert far == {"density": 0.0, "coverage": 0.0}
    with pytest.raises(ValueError, match="k < 5 real"):
        Coverage().compute(predictions=features(3).numpy(), real_features=features(5))


@pytest.mark.slow
def test_features_that_do_not_fit():
    with pytest.raises(ValueError, match="real_features"):
        Discrepancy().compute(predictions=features(3).numpy())
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        Discrepancy().compute(predictions=features(3).numpy(), real_features=features(9, dim=3))
    with pytest.raises(ValueError, match="NaN"):
        Discrepancy().compute(predictions=features(3).numpy(), real_features=features(9) * math.nan)


def test_lrs_is_the_formula_on_fractions():
    result = LabelRobustScore().compute(predictions=[0.6, 0.7], random=[0.5, 0.5], hard=[0.4, 0.5], full=[0.8, 0.9])
    alpha = 0.5 * 0.15 - 0.5 * 0.4
    assert result["lrs"] == pytest.approx((math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert result["improvement_over_random"] == pytest.approx(0.15)
    assert result["hard_label_recovery"] == pytest.approx(0.4)


def test_ars_is_the_formula_on_fractions():
    result = AugmentationRobustScore().compute(
        predictions=[0.6], random=[0.5], predictions_plain=[0.3], random_plain=[0.4], weight=0.25
    )
    beta = 0.25 * 0.1 + 0.75 * -0.1
    assert result["ars"] == pytest.approx((math.exp(beta) - math.exp(-1)) / (math.e - math.exp(-1)))


@pytest.mark.slow
def test_scores_stay_in_their_range():
    assert label_score(1.0, 0.0, hard=1.0, full=0.0) == pytest.approx(1)
    assert label_score(0.0, 1.0, hard=0.0, full=1.0) == pytest.approx(0)
    with pytest.raises(ValueError, match="not percent"):
        LabelRobustScore().compute(predictions=[60.0], random=[0.5], hard=[0.4], full=[0.8])
    with pytest.raises(ValueError, match="from 0 to 1"):
        label_score(weight=2)


def test_paired_difference():
    first, second = [0.9, 0.8, 0.85], [0.7, 0.75, 0.72]
    result = paired_difference(first, second)
    differences = np.subtract(first, second)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert result["mean"] == pytest.approx(differences.mean())
    assert result["p"] == pytest.approx(2 * stats.t.sf(abs(t), 2))
    assert result["low"] < result["mean"] < result["high"]
    assert paired_difference([0.5], [0.4])["p"] is None
    assert paired_difference([0.9, 0.8], [0.7, 0.75])["p"] is None  # two seeds say nothing about their spread
    assert paired_difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])["p"] is None
    with pytest.raises(ValueError, match="same seeds"):
        paired_difference([0.5], [])


@pytest.mark.slow
def test_numbers_of_every_library_and_no_bools():
    scores, labels = np.eye(3), [0, 1, 2]
    small, real = features(6), features(12, seed=1)
    for k in (np.int64(1), torch.tensor(1)):
        assert Accuracy().compute(predictions=scores, references=labels, k=k)["top_k"] == 1
    assert discrepancy(small, real, embedding_dim=np.int32(64), seed=torch.tensor(3)) == pytest.approx(
        discrepancy(small, real, embedding_dim=64, seed=3), abs=0
    )
    assert density_and_coverage(small, real, k=np.int16(2)) == density_and_coverage(small, real, k=2)
    assert label_score(weight=torch.tensor(0.5)) == label_score(weight=0.5)
    accuracies = [0.5, 0.625, 0.75]
    assert paired_difference(torch.tensor(accuracies), np.array(accuracies) - 0.25)["mean"] == 0.25
    for call in (
        lambda: Accuracy().compute(predictions=scores, references=labels, k=True),
        lambda: discrepancy(small, real, embedding_dim=True),
        lambda: discrepancy(small, real, seed=1.5),
        lambda: density_and_coverage(small, real, k=True),
        lambda: paired_difference([True, False], [0.1, 0.2]),
        lambda: paired_difference([0.1, math.nan], [0.1, 0.2]),
        lambda: label_score(weight=True),
        lambda: label_score(math.nan),
    ):
        with pytest.raises(ValueError, match="^`.*must be a"):
            call()
