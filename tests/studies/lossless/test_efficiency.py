from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsco_hf.studies.figures.efficiency import draw_cost, draw_efficiency, pareto_front
from dsco_hf.studies.lossless.efficiency import (
    crossing,
    doping_moment,
    efficiency,
    floor,
    needed_images,
    rank_correlations,
)
from recipes import figures


RECORDED = Path(__file__).parents[3] / "recipes" / "results"


def row(method, budget, *accuracies, **more):
    mean = float(np.mean(accuracies))
    return {
        "method": method, "images_per_class": budget, "images": 10 * budget, "accuracies": list(accuracies),
        "accuracy_mean": mean, **more,
    }  # fmt: skip


def study(*rows, **more):
    return {"dataset": "tiny", "rows": list(rows), **more}


REAL = (row("random", 1, 0.2), row("random", 10, 0.4), row("random", 100, 0.6))


def test_as_many_real_images_are_needed_as_lie_between_the_budgets():
    sizes, real = np.array([1.0, 10, 100]), np.array([[0.2, 0.4, 0.6]])
    for accuracy, images, outside in (
        (0.4, 10, False),
        (0.3, 10**0.5, False),
        (0.7, 10**2.5, True),
        (0.1, 10**-0.5, True),
    ):
        needed, beyond = needed_images(np.array([accuracy]), sizes, real)
        assert needed == pytest.approx(images) and beyond == outside


def test_accuracy_that_falls_by_chance_does_not_confuse_what_is_needed():
    needed, _ = needed_images(np.array([0.45]), np.array([1.0, 10, 100]), np.array([[0.4, 0.39, 0.5]]))
    assert 10 < needed < 100


def test_a_rate_is_the_real_images_by_the_synthetic_ones():
    own = efficiency(study(*REAL, row("nopt", 1, 0.4), row("nopt", 10, 0.5), row("nopt", 100, 0.6)))["methods"]["nopt"]
    assert [rate["rate"] for rate in own["rates"]] == pytest.approx([10, 10**0.5, 1], rel=1e-3)
    assert own["crossing"]["images_per_class"] == pytest.approx(100, rel=1e-3)
    assert own["doping"]["images_per_class"] < own["crossing"]["images_per_class"]
    assert not any(rate["extrapolated"] for rate in own["rates"])


def test_doping_begins_where_the_next_image_is_worth_one_real_one():
    # N(n) = 16 √n: N' = 8 / √n is 1 at n = 64, where 64 images are worth 128
    budgets = np.array([1.0, 16, 256])
    rates = 16 * budgets[None] ** -0.5
    assert doping_moment(budgets, rates) == pytest.approx(64)
    assert crossing(budgets, rates) == pytest.approx(256)


def test_what_never_pays_and_what_always_pays():
    budgets = np.array([1.0, 10])
    assert crossing(budgets, np.array([[0.5, 0.4]])) == 0
    assert np.isinf(crossing(budgets, np.array([[2.0, 3.0]])))
    assert np.isinf(doping_moment(budgets, np.array([[2.0, 3.0]])))
    own = efficiency(study(*REAL, row("nopt", 1, 0.4), row("nopt", 10, 0.62)))["methods"]["nopt"]
    assert own["crossing"] is None and own["doping"] is None


def test_intervals_cover_the_true_rate():
    random, hits = np.random.default_rng(0), 0
    for _ in range(60):
        drawn = [row(*name, *(random.normal(mean, 0.01, 6))) for name, mean in (
            (("random", 1), 0.2), (("random", 10), 0.4), (("random", 100), 0.6), (("nopt", 5), 0.5))]  # fmt: skip
        rate = efficiency(study(*drawn), draws=300)["methods"]["nopt"]["rates"][0]
        hits += rate["low"] <= 10**1.5 / 5 <= rate["high"]
    assert 48 <= hits  # of 60, at 95 %: with 6 trainings the deviation itself is known roughly


def test_the_floor_is_what_images_do_not_remove():
    n = np.array([1.0, 10, 50])
    found = floor(1 / n, 0.03 + 0.4 / n)
    assert found == {"discrepancy": pytest.approx(0.03), "per_image": pytest.approx(0.4)}
    assert floor(1 / n, 0.4 / n)["discrepancy"] == pytest.approx(0, abs=1e-9)


def test_each_set_counts_where_rows_tell_of_each():
    # two trainings of each set; of one seed together: sets reach 0.3, 0.5 and 0.2, 0.4
    first = row("nopt", 1, 0.2, 0.4, 0.4, 0.6, training_seeds=2, discrepancies=[0.4, 0.2], unexplained=[0.1, 0.3])
    second = row("plain", 1, 0.1, 0.3, 0.3, 0.5, training_seeds=2, discrepancies=[0.5, 0.3], unexplained=[0.2, 0.4])
    found = rank_correlations([first, second])
    assert found["discrepancy"]["1"]["rho"] == pytest.approx(-1) and found["discrepancy"]["1"]["sets"] == 4
    # ranks of what is unexplained 1, 3, 2, 4 against 2, 4, 1, 3 of accuracy: 1 - 6 · 4 / (4 · 15)
    assert found["unexplained"]["1"]["rho"] == pytest.approx(0.6)


def test_rows_that_tell_means_only_are_sets_of_their_own():
    rows = [row(f"m{i}", 10, 0.1 * i, discrepancy=0.5 - 0.1 * i) for i in range(1, 5)]
    found = rank_correlations([*rows, row("other", 10, 0.9)])
    assert found == {"discrepancy": {"10": {"rho": pytest.approx(-1), "p": pytest.approx(0, abs=1e-6), "sets": 4}}}
    assert rank_correlations([]) == rank_correlations(rows[:2]) == {}


def test_redundancy_is_that_of_the_largest_budget():
    square = [[None, 0.2], [0.4, None]]
    rows = [row("nopt", n, 0.4 + n / 100, unexplained=[0.5] * 2) for n in (1, 10)]
    own = efficiency(study(*REAL, rows[0], {**rows[1], "redundancy": square}))["methods"]["nopt"]
    assert own["redundancy"] == pytest.approx(0.3) and own["floor"] is None
    assert efficiency(study(*REAL, *rows))["methods"]["nopt"]["redundancy"] is None


def test_all_data_extend_the_real_curve():
    rows = (*REAL[:2], row("nopt", 10, 0.55))
    far = efficiency(study(*rows))["methods"]["nopt"]["rates"][0]
    near = efficiency(study(*rows, full={"accuracies": [0.6], "images": 1000}))["methods"]["nopt"]["rates"][0]
    assert far["extrapolated"] and not near["extrapolated"]


def test_an_exchange_needs_real_images_at_two_budgets():
    with pytest.raises(ValueError, match="two budgets or more, got 1"):
        efficiency(study(REAL[0], row("nopt", 1, 0.4)))


def test_recorded_studies_have_the_rates_that_the_documents_name():
    results = json.loads((RECORDED / "cifar10_16px" / "results.json").read_text(encoding="utf-8"))
    report = efficiency(results)
    rates = [rate["rate"] for rate in report["methods"]["nopt"]["rates"]]
    assert rates == pytest.approx([9.8, 6.0, 2.5], rel=0.03)
    assert draw_efficiency(report, results).axes and draw_cost(results).axes
    rows = [row | {"unexplained": [0.9]} for row in results["rows"]]
    assert len(draw_efficiency(report, results).axes) == 2
    assert len(draw_efficiency(report, {**results, "rows": rows}).axes) == 3
    with pytest.raises(ValueError, match="'gigawatts'"):
        draw_cost(results, cost="gigawatts")


@pytest.mark.slow
def test_all_figures_from_one_command(tmp_path, capsys):
    figures.main([str(RECORDED / "quickstart"), "--output_dir", str(tmp_path)])
    for name in ("accuracy", "cost", "efficiency"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    figures.main([str(RECORDED / "quickstart"), "--output_dir", str(tmp_path)])
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    figures.main([str(RECORDED / "cifar10_convnet"), "--output_dir", str(tmp_path / "other")])
    told = capsys.readouterr().out
    assert "cost: not drawn. No row of the results has 'seconds'" in told
    assert all(f"{name}: not drawn" in told and f"{name}.safetensors is not there" in told
               for name in ("features", "samples"))  # fmt: skip
    with pytest.raises(FileNotFoundError, match="results.json"):
        figures.main(["--study", str(tmp_path / "nothing")])


def test_the_front_is_of_what_nothing_cheaper_reaches():
    assert pareto_front([(2, 0.5), (1, 0.4), (3, 0.5), (2, 0.6), (4, 0.7)]) == [(1, 0.4), (2, 0.6), (4, 0.7)]
    assert pareto_front([(1, 0.3)]) == [(1, 0.3)] and pareto_front([]) == []
