"""The policy on simulated trainings: it stops, keeps to its means, and is right."""

import json

import numpy as np
import pytest

from dsco_hf.studies.lossless.search import Search, SearchPlan
from recipes.benchmarks.lossless_calibration import HARD, MEASURED, STDS, WHOLE, Truth, main


def searched(curve, std, seed, **plan):
    truth = Truth(*curve, std, np.random.default_rng(seed))
    search = Search(WHOLE, SearchPlan(**plan), truth.train)
    search.run()
    return truth, search


def test_a_search_is_right_and_keeps_to_its_trainings():
    for seed in range(3):
        truth, search = searched(MEASURED["ImageNet, Swin-T, Dyn-Unc"], 0.001, seed)
        assert search.accepted is not None and truth.smallest <= search.accepted < 1.5 * truth.smallest
        assert sum(len(own) for size, own in search.measured.items() if size != WHOLE) <= 20
        assert len(search.measured[WHOLE]) == SearchPlan().reference_seeds
        assert search.refuted is None or search.refuted < search.accepted


def test_the_level_is_divided_by_the_looks():
    _, search = searched(MEASURED["digits, random"], 0.002, 0)
    assert search.level == pytest.approx(0.05 / (2 if len(search.looks) == 2 else 1))
    assert all(len(search.measured[images]) >= 2 for images in search.looks)
    _, search = searched(MEASURED["digits, random"], 0.002, 0, looks=1)
    assert search.level == pytest.approx(0.05) and len(search.looks) == 1


def test_what_is_worse_everywhere_is_not_shown():
    _, search = searched((0.8, 0.5, 0.995), 0.003, 0)
    assert search.accepted is None and search.refuted in search.looks


def test_nothing_below_the_smallest_size_is_trained():
    _, search = searched(HARD["flat, 10 % do"], 0.001, 0, smallest=20_000)
    assert min(search.measured) >= 20_000


def test_simulated_trainings_have_the_accuracy_and_deviation_they_should(tmp_path):
    truth = Truth(*MEASURED["CIFAR-10, ResNet-18, random"], STDS[1], np.random.default_rng(0))
    right = truth.right(WHOLE, range(200))
    assert right.mean() == pytest.approx(truth.top, abs=0.007)
    assert right.mean(1).std() == pytest.approx(STDS[1], rel=0.2)
    assert truth.accuracy(truth.smallest) == pytest.approx(truth.top - 0.005, abs=1e-5)


@pytest.mark.slow
def test_the_calibration_prints_its_figures(capsys):
    main(["--runs", "36", "--hard_runs", "24"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["plan"]["reference_seeds"] == SearchPlan().reference_seeds
    assert found["wrong_share"] <= 0.05 and found["hard"]["wrong_share"] <= 0.1 and 1 < found["mean_excess"] < 1.5
