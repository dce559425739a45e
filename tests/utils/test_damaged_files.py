"""Any truncation of any file that is read gives an error that names it, or is mended; none is read as it is."""

import json

import pytest
import torch
from accelerate import Accelerator

from dsco_hf import MatchingTargets, build_evaluator, get_protocol, load_image_dataset, train_evaluator, verify
from dsco_hf.concentration.concentrate import plan_units, row_features, to_dataset
from dsco_hf.concentration.run_folder import RunFolder, unit_name
from dsco_hf.evaluators import Execution, ImageSet, run_job
from dsco_hf.evaluators.evaluation import read_job
from dsco_hf.hub.folder import read_folder, save_dataset_folder
from dsco_hf.matching.files import FeatureFolder
from dsco_hf.utils.files import DamagedFileError
from dsco_hf.utils.processes import Team
from hub.samples import tiny_dataset


NOISE = bytes(torch.randint(256, (300,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).tolist())


def damages(path, cuts=12):
    """Sets the file to each of its truncations (some of them, if it is large), to noise and to zeros of its length."""
    content = path.read_bytes()
    size = len(content.rstrip())  # without the last newline JSON is still whole
    for keep in sorted({*(size * i // cuts for i in range(cuts)), 1, 7, 8, 9, size - 1}):
        path.write_bytes(content[:keep])
        yield f"{keep} of {size} bytes"
    for other in (NOISE, bytes(size)):
        path.write_bytes(other)
        yield "noise"
    path.write_bytes(content)


def all_named(path, read, error=(DamagedFileError, FileNotFoundError)):
    for damage in damages(path):
        with pytest.raises(error, match=f"(?s){path.name}.*(again|Delete|delete|Put it back|another)"):
            read()
            raise AssertionError(f"{path}: {damage} was read")
    read()


@pytest.mark.parametrize("name", ["targets.json", "targets.safetensors"])
def test_targets(targets, tmp_path, name):
    targets.save_pretrained(tmp_path)
    all_named(tmp_path / name, lambda: MatchingTargets.from_pretrained(tmp_path))


def test_the_checkpoint_of_an_evaluator(tmp_path):
    images = ImageSet(torch.rand(8, 1, 8, 8) * 2 - 1, torch.tensor([0, 1] * 4))
    options = {"protocol": get_protocol("quick", epochs=3), "execution": Execution(Accelerator(cpu=True))}
    path = tmp_path / "evaluator.safetensors"

    def train(**more):
        network = build_evaluator("convnet-2", class_names=["a", "b"], image_size=8, num_channels=1, width=4, seed=0)
        return train_evaluator(network, images, checkpoint=path, checkpoint_seconds=0, **options, **more)

    train()
    all_named(path, train)
    build_evaluator("convnet-2", class_names=["a", "b"], image_size=8, num_channels=1, width=4).save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").replace(path)
    with pytest.raises(DamagedFileError, match=f"{path} is damaged: .*'settings'"):
        train()


@pytest.mark.parametrize("name", ["concentration.json", "results.json", "parquet"])
def test_a_published_folder(tmp_path, name):
    folder = tmp_path / "set"
    save_dataset_folder(tiny_dataset(2), folder, results={"rows": []})
    path = next(folder.rglob("*.parquet")) if name == "parquet" else folder / name
    all_named(path, lambda: read_folder(folder))
    if name != "results.json":
        all_named(path, lambda: verify(folder), error=ValueError)


def test_the_folder_of_a_run(tmp_path):
    run, unit = RunFolder(tmp_path), plan_units(2, 1)[0]
    settings = {
        "num_classes": 2, "images_per_class": 1, "block_size": 10, "images_per_call": 128, "seed": 0,
        "class_labels": [0, 1], "class_names": ["a", "b"],
    }  # fmt: skip
    images = tiny_dataset(1)["image"][:]
    rows = to_dataset([{"image": images[i], "label": i, "seed": i, "block": 0} for i in range(2)], ["a", "b"])
    with run.locked():
        run.begin(settings)
    all_named(tmp_path / "run.json", run.settings)
    run.write_unit(unit, rows, {})
    shard, entry = (tmp_path / "units" / f"{unit_name(unit)}.{suffix}" for suffix in ("parquet", "json"))
    all_named(shard, lambda: run.rows(unit, row_features(["a", "b"])))
    kept = entry.read_bytes()
    for path in (shard, entry):  # a damaged unit is found, and drawn again
        for _ in damages(path):
            assert run.verify([unit_name(unit)]) == [unit_name(unit)] and not run.finished()
            entry.write_bytes(kept)
    assert run.verify([unit_name(unit)]) == []


def test_features_that_wait_on_the_disk(tmp_path):
    def opened():
        folder = FeatureFolder(tmp_path, {"of": "x"}, Team(None))
        folder.close()
        return folder

    folder = opened()
    folder.write("unit", {"features": torch.ones(3)})
    (path,) = tmp_path.glob("features-*")
    content = path.read_bytes()
    all_named(path, lambda: folder.read("unit"))
    for _ in damages(path):  # found when the folder is opened, and made anew
        assert opened().names == () and not path.exists()
        path.write_bytes(content)
    assert opened().names == ("unit",)
    all_named(tmp_path / "pass.json", opened)


def test_results_of_jobs(tmp_path, caplog):
    def job(result):
        run_job("a", lambda key, checkpoint: {"accuracy": result}, settings=lambda key: {"seed": 1}, folder=tmp_path)

    job(0.5)
    all_named(tmp_path / "a.json", lambda: read_job(tmp_path / "a.json"))
    (tmp_path / "a.json").write_bytes(b'{"accuracy": 0.')
    job(0.75)
    assert read_job(tmp_path / "a.json")["accuracy"] == 0.75 and "a.json is damaged" in caplog.text
    job(1.0)
    assert json.loads((tmp_path / "a.json").read_text())["accuracy"] == 0.75  # a whole one is kept


def test_parquet_files_of_a_dataset(tmp_path):
    save_dataset_folder(tiny_dataset(2), tmp_path / "set")
    path = next((tmp_path / "set").rglob("*.parquet"))
    content = path.read_bytes()
    for keep in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        for given in (path, tmp_path / "set"):
            with pytest.raises(DamagedFileError, match=f"{path} is damaged: .*again"):
                load_image_dataset(given, split="train")


def test_a_dataset_saved_to_disk(tmp_path):
    tiny_dataset(2).save_to_disk(tmp_path / "saved")
    path = next((tmp_path / "saved").glob("*.arrow"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedFileError, match=f"{path} is damaged"):
        load_image_dataset(tmp_path / "saved")[:]


def test_a_dataset_that_is_a_script(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text("import datasets")
    with pytest.raises(ValueError, match=r"made by a script \(mine.py\), .*refs/convert/parquet.*save_to_disk"):
        load_image_dataset(folder)
