import json

import pytest

from dsco_hf.matching.feature_spec import feature_specs
from recipes.benchmarks import feature_choices, soft_labels


def test_choices_are_specs():
    assert all(feature_specs(value) for value in feature_choices.CHOICES.values())
    train, held_out = feature_choices.split_digits()
    assert (len(train), len(held_out)) == (1149, 288)


@pytest.mark.slow
def test_a_row_for_every_choice_and_budget(tmp_path, monkeypatch):
    monkeypatch.setitem(feature_choices.SAMPLING, "num_inference_steps", 3)
    choices = [feature_choices.DEFAULT, "pooled + first block, grid", "both classifiers, pooled", "random network"]
    arguments = ["--generator_steps", "2", "--classifier_steps", "10", "--evaluator_steps", "3", "--budgets", "1"]
    arguments += ["--training_seeds", "1", "--processes", "1", "--out", str(tmp_path / "out.json"), "--choices"]
    results = feature_choices.main([*arguments, *choices])
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(results))
    names = [row["features"] for row in results["rows"]]
    matched = [*choices, *feature_choices.OTHERWISE]
    others = [*feature_choices.CONTRASTS, *feature_choices.CLEAR, *feature_choices.RIDGE]
    assert names == ["random real", "plain", *matched, *others]
    assert all(0 <= row["accuracy"] <= 100 and row["discrepancy"] > 0 for row in results["rows"])
    assert results["feature_dims"] == dict.fromkeys([choices[1], *feature_choices.OTHERWISE], 512) | {
        choices[0]: 256, choices[2]: 384, choices[3]: 2048
    }  # fmt: skip
    assert results["best"]["1"] in names


@pytest.mark.slow
def test_labels_of_every_kind_are_compared_on_the_same_sets(tmp_path, capsys):
    arguments = ["--images", "60", "--teacher_epochs", "1", "--steps", "2", "--seeds", "1", "--networks", "convnet-3"]
    found = soft_labels.main([*arguments, "--budgets", "2", "--threads", "1", "--out", str(tmp_path / "out.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads((tmp_path / "out.json").read_text())
    assert [row["labels"] for row in found["rows"]] == list(soft_labels.LABELS) and found["rows"][0]["gain"] == 0
    assert found["regression"][0]["learned"]["error"] < found["regression"][0]["hard"]["error"] < 1
