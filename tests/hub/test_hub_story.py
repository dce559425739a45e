"""The whole story: train tiny, concentrate, publish; somebody else loads it, trains on it and makes it again."""

import json

import pytest

from hub import Client, LoopbackHub
from hub.samples import TOKEN


pytestmark = pytest.mark.slow  # clients are processes, and each imports what it needs
MAKE = """
from dsco_hf import concentrate_and_report
from dsco_hf.hub import publish, publish_pipeline
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.concentration.records import concentration_record
from hub.tiny import tiny_targets, train_tiny_pipeline

trained = train_tiny_pipeline()
publish_pipeline(trained, "ann/story-pipe", targets=tiny_targets(trained))
pipe = DsCoPipeline.from_pretrained("ann/story-pipe")
targets = tiny_targets(pipe)
options = {"num_inference_steps": 4, "guidance_scale": 1.0}
small, records = {}, {}
for n in (1, 2):
    small[f"ipc{n}"], report = concentrate_and_report(pipe, targets, images_per_class=n, seed=3, **options)
    parameters = {"images_per_class": n, **options}
    record = concentration_record(
        pipe, targets, report, method="nopt", seed=3, parameters=parameters, source={"dataset": "ann/source"}
    )
    records[f"ipc{n}"] = {key: record.pop(key) for key in ("parameters", "cost")}
result = publish(
    small, "ann/story", default_config="ipc2", concentration={**record, "configs": records}, targets=targets
)
return result.commit
"""

LOAD = """
import datasets
dataset = datasets.load_dataset("ann/story", split="train", revision=revision)
stream = datasets.load_dataset("ann/story", "ipc1", split="train", streaming=True)
return {
    "rows": len(dataset),
    "streamed": sum(1 for _ in stream),
    "names": dataset.features["label"].names,
    "columns": dataset.column_names,
    "pixels": [row["image"].tobytes().hex() for row in dataset],
}
"""

# A recipe, as `python recipes/NAME.py ...` would run it; returns what it printed.
RECIPE = """
import contextlib, importlib, io, sys
from hub.client import ROOT
sys.path.insert(0, str(ROOT / "recipes"))
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    importlib.import_module(name).main(arguments)
return printed.getvalue()
"""

REMADE = """
import datasets
dataset = datasets.load_dataset("again/dataset", split="train")
return [row["image"].tobytes().hex() for row in dataset]
"""

VERIFY = "from dsco_hf import verify\nreturn list(verify('ann/story')['configs'])"

TRAIN = [
    *["--dataset", "ann/story", "--dataset_name", "ipc2", "--test_dataset", "ann/story", "--test_name", "ipc1"],
    *["--test_split", "train", "--num_channels", "1", "--architectures", "convnet-2", "--model_options"],
    *['{"width": 4}', "--seeds", "1", "--steps", "4", "--output_dir", "trained"],
]


def test_concentrate_publish_load_train_and_make_again(tmp_path):
    with LoopbackHub(tmp_path / "server") as hub:
        hub.add_user("ann", TOKEN)
        with Client(hub.url, tmp_path / "ann", token=TOKEN) as ann:
            commit = ann.run(MAKE)
            assert TOKEN not in ann.output()
        check_record(json.loads(hub.files("ann/story")["concentration.json"]), hub)
        with Client(hub.url, tmp_path / "stranger") as stranger:
            loaded = stranger.run(LOAD, revision=commit)
            assert loaded["rows"] == 4 and loaded["streamed"] == 2 and loaded["names"] == ["cat", "dog"]
            assert loaded["columns"][:6] == ["image", "label", "source", "seed", "block", "real_index"]
            assert not stranger.run("import sys\nreturn [name for name in sys.modules if name.startswith('dsco_hf')]")
            assert stranger.run(VERIFY) == ["ipc1", "ipc2"]
            arguments = ["--from", "ann/story", "--from_revision", commit, "--output_dir", "again"]
            told = stranger.run(RECIPE, name="concentrate", arguments=arguments)
            assert "All rows are identical to those of ann/story" in told
            assert stranger.run(REMADE) == loaded["pixels"]
            told = stranger.run(RECIPE, name="train_evaluator", arguments=[*TRAIN, "--revision", commit])
            results = json.loads((tmp_path / "stranger" / "trained" / "results.json").read_text())
            assert "convnet-2" in told and 0 <= results["rows"][0]["accuracy_mean"] <= 1
            assert results["config"]["revision"] == commit and results["images"] == 4
        assert not [entry for entry in hub.log if entry.user is None and entry.authorized]


def check_record(record, hub):
    """All that another needs: every parameter, and models and targets by commit and content."""
    pipe_commit = hub.store.resolve(hub.store.load("models", "ann/story-pipe"), "main")
    for part in ("generator", "classifier"):
        assert (record[part]["id"], record[part]["revision"]) == ("ann/story-pipe", pipe_commit)
        assert len(record[part]["sha256"]) == 64
    parameters = record["configs"]["ipc2"]["parameters"]
    assert parameters["images_per_class"] == 2 and parameters["num_inference_steps"] == 4
    assert set(parameters["method"]) == {
        *("name", "objective", "start", "stop", "iterations", "step_size", "step_decay", "lookahead")
    }
    assert parameters["method"]["objective"] == {"name": "ridge", "regularization": 2.0} and parameters["eta"] == 1.0
    assert {"block_size", "images_per_call"} < set(parameters) and record["seed"] == 3
    assert record["source"]["dataset"] == "ann/source" and record["source"]["fingerprint"]
    assert f"{record['targets']['path']}/targets.safetensors" in hub.files("ann/story")
    assert {"torch", "diffusers", "dsco_hf"} < set(record["versions"]) and record["configs"]["ipc1"]["cost"][
        "images"
    ] == 2
