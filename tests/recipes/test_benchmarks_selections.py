"""The benchmarks of selections, at their smallest; their numbers mean nothing."""

import json

import numpy as np
import pytest

from dsco_hf import load_image_dataset
from dsco_hf.concentration.additions.doping import select
from dsco_hf.hub.folder import save_dataset_folder
from recipes.benchmarks import ridge_rule, selections


SMALL = ["--steps", "1", "--seeds", "2", "--log_epochs", "2", "--processes", "1", "--evaluators"]
SMALL += ['{"convnet-1": {"width": 2}}', "--observer", "convnet-1", "--images", "300", "--test_images", "60"]


@pytest.mark.slow
def test_a_row_for_every_selection_and_budget(tmp_path, capsys):
    rules = ["--selections", "random", "ridge_rule", "clarity", "el2n", "--shares", "0.05", "0.1"]
    options = [*SMALL, *rules, "--folder", str(tmp_path / "work"), "--out", str(tmp_path / "found.json")]
    found = selections.main(options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads((tmp_path / "found.json").read_text())
    assert {(row["selection"], row["images_per_class"]) for row in found["rows"]} == {
        (name, budget) for name in rules[1:5] for budget in (1, 2)
    }
    assert found["counts"] == {"choice": 240, "validation": 60, "test": 60, "on_top": 0}
    assert set(found["ridge_rule_minus"]) == {"clarity", "random"}
    assert "| ridge_rule |" in (tmp_path / "found.md").read_text()
    again = selections.main(options)  # goes on with all that is there
    assert again["rows"] == found["rows"]


@pytest.mark.slow
def test_on_top_of_a_set_by_a_protocol_of_a_file(tmp_path):
    small = select(load_image_dataset("digits", split="train"), "random", images_per_class=1, progress=False)
    save_dataset_folder(small, tmp_path / "set")
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text("name: mine\nsource: mine\nepochs: 2\nbatch_size: 32\n")
    options = [
        *SMALL,
        "--selections",
        "random",
        "clarity",
        "dyn_unc",
        "herding",
        "--shares",
        "0.05",
        "--log_epochs",
        "10",
    ]
    options += ["--on_top", str(tmp_path / "set"), "--protocol", str(protocol), "--length", "same steps"]
    options += ["--log_epochs", "10"]
    found = selections.main([*options, "--folder", str(tmp_path / "work")])
    assert {(row["selection"], row["images_per_class"]) for row in found["rows"]} == {
        ("nothing", 0), ("random", 1), ("clarity", 1), ("dyn_unc", 1), ("herding", 1)
    }  # fmt: skip
    assert found["protocol"]["steps"] == 16 and found["counts"]["on_top"] == 10  # 240 images, 2 epochs


def test_clearly_behind():
    generator = np.random.default_rng(0)
    good, bad = (generator.random((3, 400)) < share for share in (0.8, 0.6))
    assert selections.below(bad, good) and not selections.below(good, bad) and not selections.below(good, good)
    mean, error = selections.difference(good, bad)
    assert mean == pytest.approx(100 * (good.mean() - bad.mean()), abs=0.01) and 1 < error < 5


def test_ranks_leave_out_what_was_dropped():
    rows = [
        {"selection": name, "images_per_class": 1, "evaluator": "a", "accuracy": value, "validation": -value}
        for name, value in (("x", 3.0), ("y", 2.0), ("z", 1.0))
    ]
    assert selections.mean_ranks(rows, {"y"}) == {
        "x": {"test": 1, "validation": 3}, "y": {"test": None, "validation": None}, "z": {"test": 3, "validation": 1},
    }  # fmt: skip


def test_cost_of_the_ridge_rule():
    found = ridge_rule.measure(40, 3, 8)
    assert found["images"] == 40 and found["pick_ms"] > -1000 and found["memory"] >= 0
