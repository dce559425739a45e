import inspect

import pytest

from dsco_hf import ClassifierObjective
from dsco_hf.concentration import records
from dsco_hf.concentration.concentrate import concentrate_and_report
from dsco_hf.sampling.pipeline import DsCoPipeline


def test_every_parameter_is_recorded_with_its_default():
    found = records.resolve_parameters(images_per_class=3, guidance_scale=1.0, progress=False)
    call = inspect.signature(DsCoPipeline.__call__).parameters
    for name in (
        "step_size",
        "step_decay",
        "optimize_from",
        "optimize_until",
        "lookahead",
        "eta",
        "num_inference_steps",
    ):
        assert found[name] == call[name].default
    assert found["block_size"] == inspect.signature(concentrate_and_report).parameters["block_size"].default
    assert found["images_per_class"] == 3 and found["guidance_scale"] == 1.0 and found["optimization_steps"] == 1
    assert not {"progress", "generator", "latents", "targets", "pipe", "seed"} & set(found)


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


def test_the_objective_of_the_classifier_survives_json():
    found = records.resolve_parameters(images_per_class=1, objective="classifier", optimization_steps=2)
    assert records.record_parameters({"parameters": found})["classifier_objective"] == ClassifierObjective()


def test_the_regularization_is_recorded_where_it_counts():
    assert "regularization" not in records.resolve_parameters(images_per_class=1)
    found = records.resolve_parameters(images_per_class=1, objective="ridge", regularization=0.5)
    assert records.record_parameters({"parameters": found})["regularization"] == 0.5


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError, match="step_sise.*step_size"):
        records.resolve_parameters(images_per_class=1, step_sise=0.1)
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
