"""The whole story: train tiny, concentrate, publish; somebody else loads it, trains on it and makes it again."""

from hub import Client, LoopbackHub
from hub.samples import TOKEN


MAKE = """
from dsco_hf.concentrate import concentrate_and_report
from dsco_hf.folder import concentration_record
from dsco_hf.hub import publish, publish_pipeline
from hub.tiny import tiny_targets, train_tiny_pipeline

pipe = train_tiny_pipeline()
targets = tiny_targets(pipe)
options = {"num_inference_steps": 4, "guidance_scale": 1.0}
publish_pipeline(pipe, "ann/story-pipe", targets=targets)
pipe.register_to_config(_name_or_path="ann/story-pipe")
small, records = {}, {}
for n in (1, 2):
    small[f"ipc{n}"], report = concentrate_and_report(pipe, targets, images_per_class=n, seed=3, **options)
    parameters = {"images_per_class": n, **options}
    record = concentration_record(pipe, targets, report, method="nopt", seed=3, parameters=parameters)
    records[f"ipc{n}"] = {key: record[key] for key in ("parameters", "cost")}
result = publish(small, "ann/story", default_config="ipc2", concentration={**record, "configs": records})
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

TRAIN = """
import torch
from dsco_hf.data import load_image_dataset, load_pixels
from dsco_hf.evaluators import build_evaluator, get_protocol, train_evaluator
from dsco_hf.hub import publish_evaluator

dataset = load_image_dataset("ann/story", "ipc2", split="train")
pixels, labels, _ = load_pixels(dataset, num_channels=1)
build = lambda: build_evaluator("convnet", class_names=["cat", "dog"], image_size=8, num_channels=1, width=4)
protocol = get_protocol("quick", steps=4)
result = train_evaluator(build, pixels, labels, protocol=protocol, test_pixels=pixels, test_labels=labels)
return result.accuracy
"""

REMAKE = """
from dsco_hf.concentrate import concentrate
from dsco_hf.hub import read_concentration, verify
from dsco_hf.pipeline import DsCoPipeline
from dsco_hf.targets import MatchingTargets

assert list(verify("ann/story")["configs"]) == ["ipc1", "ipc2"]
record = read_concentration("ann/story")
generator = record["generator"]["id"]
pipe, targets = DsCoPipeline.from_pretrained(generator), MatchingTargets.from_pretrained(generator)
small = concentrate(pipe, targets, seed=record["seed"], **record["configs"]["ipc2"]["parameters"])
return [row["image"].tobytes().hex() for row in small]
"""


def test_concentrate_publish_load_train_and_make_again(tmp_path):
    with LoopbackHub(tmp_path / "server") as hub:
        hub.add_user("ann", TOKEN)
        with Client(hub.url, tmp_path / "ann", token=TOKEN) as ann:
            commit = ann.run(MAKE)
            assert TOKEN not in ann.output()
        with Client(hub.url, tmp_path / "stranger") as stranger:
            loaded = stranger.run(LOAD, revision=commit)
            assert loaded["rows"] == 4 and loaded["streamed"] == 2 and loaded["names"] == ["cat", "dog"]
            assert loaded["columns"][:6] == ["image", "label", "source", "seed", "block", "real_index"]
            assert not stranger.run("import sys\nreturn [name for name in sys.modules if name.startswith('dsco_hf')]")
            assert 0 <= stranger.run(TRAIN) <= 1
            assert stranger.run(REMAKE) == loaded["pixels"]
