import importlib
import json
import runpy
from pathlib import Path

import pytest

from conftest import NAMES, pixel_pipeline, striped_images, tiny_convnet
from dsco_hf import MatchingTargets
from dsco_hf.data.datasets import load_splits
from dsco_hf.utils.configs import parse_config


ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "compute_targets.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A generator and a classifier, as users have them, and a few images."""
    folder = tmp_path_factory.mktemp("recipe")
    pixel_pipeline().save_pretrained(folder / "generator")
    tiny_convnet().save_pretrained(folder / "classifier")
    striped_images().to_parquet(folder / "data" / "train.parquet")
    return folder


def compute(folder, *options):
    arguments = ["--generator", str(folder / "generator"), "--classifier", str(folder / "classifier")]
    arguments += ["--embedding_dim", "32", "--output_dir", str(folder / "out"), *options]
    runpy.run_path(RECIPE)["main"](arguments)
    results = json.loads((folder / "out" / "results.json").read_text())
    return MatchingTargets.from_pretrained(folder / "out"), results


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/configs/targets_*.yaml")), ids=lambda path: path.stem)
def test_configs_load_and_say_how_they_are_launched(path):
    recipe = parse_config(runpy.run_path(RECIPE)["TargetsRecipe"], ["--config", str(path)])
    assert recipe.output_dir.startswith("outputs/") and recipe.dataset
    assert "accelerate launch" in path.read_text() and f"configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_targets_of_a_folder_of_parquet_files(folder, pipe, capsys, streaming):
    given = ["--dataset", str(folder / "data"), "--streaming", streaming]
    targets, results = compute(folder, *given, "--test_split", "none")
    expected = MatchingTargets.from_dataset(striped_images(), pipe, embedding_dim=32, progress=False)
    assert (targets.embeddings - expected.embeddings).abs().max() < 1e-6
    assert (results["images"], results["classes"], results["feature_dim"]) == (21, 3, targets.feature_dim)
    assert results["images_per_second"] > 0 and results["config"]["dataset"] == str(folder / "data")
    assert not (folder / "out-work").exists()
    assert "Saved targets of 3 classes" in capsys.readouterr().out
    targets, results = compute(folder, *given, "--holdout", "0.4")  # without a test split
    kept, _, splits = load_splits(folder / "data", holdout=0.4)
    expected = MatchingTargets.from_dataset(kept, pipe, embedding_dim=32, progress=False)
    assert (targets.embeddings - expected.embeddings).abs().max() < 1e-6
    assert results["images"] == 12 and results["splits"] == splits and splits["holdout"] == 0.4


def test_data_free_targets_and_another_bandwidth_without_a_new_pass(folder):
    options = ["--data_free", "--samples_per_class", "3", "--num_inference_steps", "2", "--guidance_scale", "1"]
    options += ["--class_labels", "triangle", "0", "--keep_work"]
    targets, results = compute(folder, *options)
    assert targets.class_names == [NAMES[2], NAMES[0]] and results["images"] == 6
    files = sorted((folder / "out-work").glob("features-*"))
    times = [path.stat().st_mtime_ns for path in files]
    other, results = compute(folder, *options, "--bandwidth", "2.5")
    assert other.bandwidth == 2.5 != targets.bandwidth and results["seconds"] is None
    assert [path.stat().st_mtime_ns for path in files] == times


def test_what_to_match_is_asked_for(folder):
    with pytest.raises(ValueError, match="Give either `dataset`.* or `data_free`"):
        compute(folder)
    with pytest.raises(ValueError, match="`dtype` must be one of .'float32'"):
        compute(folder, "--data_free", "--dtype", "fp16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "figures"),
    [
        (
            "nopt_memory",
            ["--few", "2", "--many", "4", "--batch_size", "2", "--block_size", "1", "--num_inference_steps", "3"],
            {"joint_ratio": (0.8, 1.5), "blocks_ratio": (0.8, 1.5)},
        ),
        (
            "targets_throughput",
            ["--seconds", "0.2", "--few", "40", "--many", "80", "--architectures", "convnet-3"],
            {"fraction": (0.0, float("inf")), "memory_ratio": (0.8, 1.5), "memory_ratio_mapped": (0.8, 1.5)},
        ),
    ],
)
def test_benchmarks_run_and_report(forked, tmp_path, capsys, script, options, figures):
    main = importlib.import_module(f"recipes.benchmarks.{script}").main
    main([*options, "--out", str(tmp_path / "out.json")])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == json.loads((tmp_path / "out.json").read_text())
    for name, (low, high) in figures.items():
        assert low < results[name] < high
