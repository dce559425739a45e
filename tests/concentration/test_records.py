import json

import pytest

from dsco_hf import RKHS, ClassifierEvidence, NOpt, Plain, Released, Ridge, Sampling
from dsco_hf.concentration import records
from dsco_hf.concentration.concentrate import concentrate_and_report


def test_every_parameter_is_recorded_with_its_default():
    found = records.resolve_parameters(images_per_class=3, guidance_scale=1.0, progress=False)
    assert found == {
        "images_per_class": 3, "class_labels": None, "block_size": 10, "images_per_call": 128,
        "num_inference_steps": 16, "guidance_scale": 1.0, "eta": 1.0, "batch_size": None,
        "method": {"name": "nopt", "objective": {"name": "ridge", "regularization": 2.0}, "start": 0.0, "stop": 1.0,
                   "iterations": 1, "step_size": 1.0, "step_decay": 0.25, "lookahead": "conditional"},
    }  # fmt: skip


def test_recorded_parameters_run_again(pipe, targets):
    options = {"images_per_class": 2, "num_inference_steps": 3, "guidance_scale": 1.0}
    first, report = concentrate_and_report(pipe, targets, seed=5, progress=False, **options)
    record = records.concentration_record(pipe, targets, report, method="nopt", seed=5, parameters=options)
    again, _ = concentrate_and_report(
        pipe, targets, seed=record["seed"], progress=False, **records.record_parameters(record)
    )
    assert [row["image"].tobytes() for row in first] == [row["image"].tobytes() for row in again]
    assert record["cost"]["images"] == 6 and len(record["targets"]["sha256"]) == 64
    assert record["versions"]["torch"] and record["environment"]["device"] == "cpu"
    assert set(record["classifier"]) >= {"sha256"} and set(record["generator"]) >= {"sha256"}


@pytest.mark.parametrize("method", [
    NOpt(ClassifierEvidence(margin=5.0), iterations=2), NOpt(Ridge(0.5)), Released(start=0.2), Plain(),
])  # fmt: skip
def test_methods_survive_json(method):
    found = records.resolve_parameters(images_per_class=1, method=method, eta=0.5)
    found = records.record_parameters({"parameters": json.loads(json.dumps(found))})["method"]
    assert found == Sampling(eta=0.5, method=method)


@pytest.mark.parametrize(("recorded", "method"), [
    ({"objective": "rkhs", "optimization_steps": 1, "step_size": 0.5, "step_decay": 0.25, "optimize_from": 0.0,
      "optimize_until": 0.9, "lookahead": "none", "contrast": 2.0},
     NOpt(RKHS(2.0), 0.0, 0.9, 1, 0.5, 0.25, "none")),
    ({"objective": "ridge", "optimization_steps": 2, "contrast": 0.0, "regularization": 0.5},
     NOpt(Ridge(0.5), start=0.6, iterations=2)),
    ({"objective": "classifier", "contrast": 0.0, "classifier_objective": {"evidence": 1.0, "margin": 3.0}},
     NOpt(ClassifierEvidence(margin=3.0), start=0.6)),
    ({"objective": "quantile", "optimization_steps": 200, "optimize_from": 0.0}, Released()),
    ({"objective": "ridge", "optimization_steps": 0}, Plain()),
])  # fmt: skip
def test_flat_parameters_of_earlier_records_are_read(recorded, method):
    parameters = {"images_per_class": 2, "block_size": 2, "guidance_scale": 1.0, "batch_size": None, **recorded}
    found = records.record_parameters({"parameters": parameters})
    assert found == {"images_per_class": 2, "block_size": 2, "method": Sampling(50, guidance_scale=1.0, method=method)}


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError, match="num_inference_step`.*Nearest: 'num_inference_steps'"):
        records.resolve_parameters(images_per_class=1, num_inference_step=5)
    with pytest.raises(TypeError, match="images_per_class"):
        records.resolve_parameters()
    with pytest.raises(ValueError, match="has no parameters"):
        records.record_parameters({})
    record = {"parameters": {"images_per_class": 1, "new": 3}, "versions": {"dsco_hf": "9.0"}}
    with pytest.raises(ValueError, match="does not know: 'new'.*dsco_hf 9.0"):
        records.record_parameters(record)


def test_a_config_s_own_records_win():
    record = {
        "seed": 1, "method": "nopt", "default_config": "b", "card": {},
        "configs": {"a": {"features": {}, "splits": {}}, "b": {"seed": 2, "features": {}, "splits": {}}},
    }  # fmt: skip
    assert records.config_record(record, "a") == {"seed": 1, "method": "nopt", "config": "a"}
    assert records.config_record(record) == {"seed": 2, "method": "nopt", "config": "b"}
    with pytest.raises(ValueError, match="no config 'c'"):
        records.config_record(record, "c")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            f"/x/models--ann--pipe/snapshots/{'a' * 40}/vae",
            {"id": "ann/pipe", "revision": "a" * 40, "subfolder": "vae"},
        ),
        (f"C:\\x\\models--gpt2\\snapshots\\{'b' * 40}", {"id": "gpt2", "revision": "b" * 40}),
        ("/x/pipe/vae", None),
        ("ann/pipe", None),
    ],
)
def test_the_origin_of_cached_models_is_told_from_their_path(path, expected):
    assert records.cached_origin(path) == expected
