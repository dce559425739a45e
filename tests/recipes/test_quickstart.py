"""The main job at its small setting, launched as `make demo` does."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from datasets import load_dataset

import launches
from dsco_hf import DsCoPipeline, MatchingTargets, read_concentration, verify
from dsco_hf.concentration.records import config_record
from dsco_hf.concentration.set_records import record_of
from dsco_hf.utils.configs import make_accelerator
from recipes import concentrate, quickstart


pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.py"
METHODS = {"random", "herding", "plain", "nopt", "nopt-data-free", "nopt-classifier-only", "nopt-quantile"}


def launch(output: Path, run: Callable) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", str(RECIPE), "--small", "--output_dir", str(output)]
    done = run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "with space"
    run = functools.partial(subprocess.run, capture_output=True, text=True)
    told = launch(folder, run)
    assert "| **DsCo** |" in told  # the table at the end
    assert told.index(f"the first images: {folder / 'samples.png'}") < told.index("training the classifiers")
    return folder


def test_results_have_a_row_per_method_and_budget(output):
    results = json.loads((output / "results.json").read_text())
    rows = {(row["method"], row["images_per_class"]): row for row in results["rows"]}
    assert {(method, budget) for method in METHODS for budget in (1, 3, 10)} <= set(rows)
    assert {("random", 43), ("herding", 43), ("nopt+doping", 43)} <= set(rows)
    assert len(rows) == len(results["rows"]) == 7 * 3 + 3
    for (_, budget), row in rows.items():
        assert row["images"] == 10 * budget
        assert row["accuracy_mean"] == pytest.approx(sum(row["accuracies"]) / len(row["accuracies"]))
        assert len(row["accuracies"]) == row["synthesis_seeds"] * row["training_seeds"]
        assert 0 < row["discrepancy"] < 2
    assert results["full"]["images"] == 1437
    # 10 steps an image, of which 4 look ahead
    assert rows["plain", 10]["denoiser_calls"] == 100 * 10
    assert rows["nopt", 10]["denoiser_calls"] == 100 * (10 + 4)
    assert rows["nopt", 10]["discrepancy"] < rows["plain", 10]["discrepancy"]


def test_plain_datasets_code_reads_the_dataset(output):
    for config, rows in (("ipc1", 10), ("ipc3", 30), ("ipc10", 100), ("doped", 430)):
        dataset = load_dataset(str(output / "dataset"), config, split="train")
        assert len(dataset) == rows
        assert set(dataset.column_names) == {"image", "label", "source", "seed", "block", "real_index"}
        assert dataset.features["label"].names == [str(digit) for digit in range(10)]
        assert sorted(set(dataset["label"])) == list(range(10))
        assert dataset[0]["image"].size == (8, 8)
    real = [index for index in dataset["real_index"] if index >= 0]
    assert len(real) == len(set(real)) == 330
    assert len(load_dataset(str(output / "dataset"), split="train")) == 100  # ipc10 is the default
    assert verify(output / "dataset")


def test_the_dataset_says_how_it_was_drawn_and_is_drawn_again(output, capsys):
    record = read_concentration(output / "dataset")
    assert record["generator"]["id"] == "digits" and record["source"]["dataset"] == "scikit-learn digits"
    for name, contrast in (("ipc1", 2.0), ("ipc10", 0.0), ("doped", 0.0)):
        told = config_record(record, name)["parameters"]
        assert told["method"]["objective"] == {"name": "rkhs", "contrast": contrast}
        assert (told["method"]["start"], told["num_inference_steps"]) == (0.5, 10)
    rule = config_record(record, "doped")["doping"]["strategy"]
    assert (rule["name"], rule["num_students"]) == ("clarity", 4) and rule["protocol"]["name"].startswith("digits")
    assert record_of(load_dataset(str(output / "dataset"), "ipc3", split="train"))["cost"]["images"] == 30
    again = ["--from", str(output / "dataset"), "--from_config", "ipc1", "--output_dir", str(output / "again")]
    concentrate.main(again)
    assert "All rows are identical" in capsys.readouterr().out


def test_figures_are_pictures(output):
    assert all((output / f"{name}.safetensors").stat().st_size < 300_000 for name in ("samples", "features"))
    for name in ("samples.png", "accuracy.png", "features.png"):
        with PIL.Image.open(output / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("L").getcolors(maxcolors=256)) > 8  # something is drawn


def test_a_second_run_uses_what_is_there(output):
    work = next((output / "work").iterdir())
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.parquet")}
    results = (output / "results.json").read_text()
    assert len(before) == 15 + 1
    launch(output, launches.run)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.parquet")} == before
    assert (output / "results.json").read_text() == results


def test_targets_are_left_to_be_used(output):
    work = next((output / "work").iterdir())
    with_data = MatchingTargets.from_pretrained(next(work.glob("*/targets-real")))
    without = MatchingTargets.from_pretrained(next(work.glob("*/targets-nopt-data-free")))
    assert with_data.class_names == without.class_names == [str(digit) for digit in range(10)]
    assert with_data.counts.sum() == 1437
    assert without.provenance["population"] == "generator"


def test_herded_sets_are_those_of_several_classifiers(output):
    rows = {
        (row["method"], row["images_per_class"]): row
        for row in json.loads((output / "results.json").read_text())["rows"]
    }
    assert [rows["herding", budget]["synthesis_seeds"] for budget in (1, 3, 10, 43)] == [2, 2, 2, 1]
    jobs = [json.loads(path.read_text()) for path in (output / "work").glob("*/jobs/herding-ipc10-*-run0.json")]
    assert len({job["settings"]["images"] for job in jobs}) == len(jobs) == 2  # each classifier herds its own


def test_a_generator_is_trained_where_that_is_asked_for(tmp_path):
    """With the settings of the pipeline that the package brings, but for the number of steps."""
    recipe = quickstart.Quickstart(
        output_dir=str(tmp_path), small=True, train=True, generator_steps=2, herding_seeds=1
    )
    run = quickstart.Run(recipe, make_accelerator())
    pipe, embedded = run.pipeline(), DsCoPipeline.from_pretrained("digits")
    assert run.generator.train_steps == 2
    for name in ("transformer", "scheduler", "classifier"):
        mine, theirs = (json.loads(getattr(each, name).config.to_json_string()) if name == "classifier" else
                        dict(getattr(each, name).config) for each in (pipe, embedded))  # fmt: skip
        assert {key for key in mine if not key.startswith("_") and mine[key] != theirs[key]} == set()
    again = quickstart.Run(recipe, run.accelerator).pipeline()
    assert torch.equal(pipe.transformer.pos_embed.proj.weight, again.transformer.pos_embed.proj.weight)
