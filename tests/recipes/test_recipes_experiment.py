import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from diffusers import DDIMScheduler
from transformers import AutoModelForImageClassification

from conftest import NAMES, striped_images
from dsco_hf import RKHS, DsCoPipeline, NOpt, Ridge, concentrate, measure_discrepancy
from dsco_hf.concentration.set_records import record_of
from dsco_hf.data.datasets import load_pixels
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.peers import PEERS
from dsco_hf.utils.configs import parse_config
from launches import launch_command, launch_environment, run
from recipes import concentrate as concentrate_recipe
from recipes import experiment


ROOT = Path(__file__).parents[2]
VARY = ("seconds", "training_seconds", "images_per_second", "peak_memory_bytes")  # from run to run


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def work(make, tmp_path):
    """A folder with a dataset, a generator and a classifier."""
    data = DatasetDict(train=striped_images((9, 7, 5)), test=striped_images((4, 4, 4), seed=1))
    data.save_to_disk(str(tmp_path / "data"))
    make.pipe().save_pretrained(tmp_path / "pipe")
    make.convnet().save_pretrained(tmp_path / "classifier")
    return tmp_path


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/configs/experiment_*.yaml")), ids=lambda path: path.stem)
def test_configs_load_and_say_how_they_are_launched(path):
    recipe = parse_config(experiment.ExperimentRecipe, ["--config", str(path)])
    assert recipe.output_dir.startswith("outputs/") and recipe.budgets
    assert "accelerate launch" in path.read_text() and f"configs/{path.name}" in path.read_text()


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="Nearest: 'nopt-data-free'"):
        experiment.ExperimentRecipe(dataset="a", methods=["nopt-datafree"])


def test_unknown_features_are_named():
    with pytest.raises(ValueError, match=r"`network` must be one of .*, got 'untraind'. Nearest: 'untrained'"):
        experiment.ExperimentRecipe(dataset="a", features='{"network": "untraind"}')


@pytest.mark.slow
def test_matched_features_are_of_the_chosen_networks(work):
    (work / "tiny.yaml").write_text(
        f"generator: {work / 'pipe'}\nclassifier: {work / 'classifier'}\ndataset: {work / 'data'}\nmethods: [nopt]\n"
        "budgets: [1]\nsynthesis_seeds: 1\ntraining_seeds: 1\nsteps: 2\nnum_inference_steps: 3\n"
        "architecture: convnet-2\nmodel_options: '{\"width\": 4}'\n"
    )
    options = ["--config", str(work / "tiny.yaml"), "--sets_dir", str(work / "sets")]
    networks, pixels = {}, {}
    narrow = '{"network": "untrained", "architecture": "convnet-2", "width": 4}'
    for name, features in {"trained": "{}", "untrained": narrow, "both": f"[{{}}, {narrow}]"}.items():
        experiment.main([*options, "--features", features, "--output_dir", str(work / name)])
        AcceleratorState._reset_state(), PartialState._reset_state()
        (new,) = set((work / "sets").iterdir()) - set(networks)  # sets of other features are kept apart
        networks[new] = [spec.network for spec in MatchingTargets.from_pretrained(new / "targets-real").features]
        rows = Dataset.from_parquet(str(new / "sets" / "nopt-ipc1-seed0.parquet"), keep_in_memory=True)
        pixels[name] = [image.tobytes() for image in rows["image"]]
    assert list(networks.values()) == [["classifier"], ["untrained"], ["classifier", "untrained"]]
    assert len({tuple(images) for images in pixels.values()}) == 3


def test_options_for_each_budget():
    recipe = experiment.ExperimentRecipe(dataset="a", budgets=[10, 1], contrast=[0.5, 8], clearest_share=[0.2])
    assert [recipe.at_budget("contrast", budget) for budget in (1, 10)] == [8, 0.5]
    assert [recipe.at_budget("clearest_share", budget) for budget in (1, 10)] == [0.2, 0.2]
    with pytest.raises(
        ValueError, match=r"`contrast` must be one value or one for each of the 3 budgets \[1, 10, 50\]"
    ):
        experiment.ExperimentRecipe(dataset="a", budgets=[1, 10, 50], contrast=[8, 0])
    with pytest.raises(ValueError, match="Several values of `contrast` belong to as many `budgets`"):
        experiment.ExperimentRecipe(dataset="a", contrast=[8, 0])


@pytest.mark.slow
def test_contrast_and_the_clearest_images_by_budget(work):
    (work / "tiny.yaml").write_text(
        f"generator: {work / 'pipe'}\nclassifier: {work / 'classifier'}\ndataset: {work / 'data'}\nmethods: [nopt]\n"
        "budgets: [1, 2]\nsynthesis_seeds: 1\ntraining_seeds: 1\nsteps: 2\nnum_inference_steps: 3\n"
        "objective: [rkhs]\ncontrast: [6, 3]\nclearest_share: [1, 0.5]\noptimize_from: 0.4\narchitecture: convnet-2\n"
        "model_options: '{\"width\": 4}'\n"
    )
    experiment.main(["--config", str(work / "tiny.yaml"), "--output_dir", str(work / "out")])
    (folder,) = (work / "out" / "work").iterdir()
    targets = MatchingTargets.from_pretrained(folder / "targets-clearest-0.5")
    real = MatchingTargets.from_pretrained(folder / "targets-real")
    assert (targets.counts.tolist(), real.counts.tolist()) == ([5, 4, 3], [9, 7, 5])
    classifier = AutoModelForImageClassification.from_pretrained(work / "classifier").eval()
    pipe = DsCoPipeline.from_pretrained(work / "pipe", classifier=classifier)
    pipe.set_progress_bar_config(disable=True)
    for budget in (1, 2):
        rows = Dataset.from_parquet(str(folder / "sets" / f"nopt-ipc{budget}-seed0.parquet"), keep_in_memory=True)
        matched, options = (real if budget == 1 else targets), {"guidance_scale": 1.0, "num_inference_steps": 3}
        options |= {"progress": False}
        drawn = [
            concentrate(pipe, matched, budget, method=NOpt(RKHS(contrast), 0.4), **options)
            for contrast in (6 / budget, 0)
        ]
        same, other = ([image.tobytes() for image in one["image"]] for one in drawn)
        assert [image.tobytes() for image in rows["image"]] == same != other
    sets = {path.stem: path.read_bytes() for path in (folder / "sets").glob("*.parquet")}
    again = ["--sets_dir", str(folder.parent), "--contrast", "0", "3", "--output_dir", str(work / "again")]
    experiment.main(["--config", str(work / "tiny.yaml"), *again])
    changed = {path.stem for path in (folder / "sets").glob("*.parquet") if path.read_bytes() != sets[path.stem]}
    assert changed == {"nopt-ipc1-seed0"} and len(sets) == 2
    (first, second) = (
        row for row in json.loads((work / "out" / "results.json").read_text())["rows"] if row["method"] == "nopt"
    )
    measured = measure_discrepancy(*load_pixels(rows, num_channels=1)[:2], pipe, real)
    assert second["discrepancy"] == pytest.approx(statistics.fmean(measured.values()), rel=1e-4)
    assert first["images_per_class"] == 1


@pytest.mark.slow
def test_objectives_by_budget(work):
    (work / "tiny.yaml").write_text(
        f"generator: {work / 'pipe'}\nclassifier: {work / 'classifier'}\ndataset: {work / 'data'}\n"
        "methods: [nopt, nopt-data-free]\nbudgets: [1, 2]\nsynthesis_seeds: 1\ntraining_seeds: 1\nsteps: 2\n"
        "num_inference_steps: 3\nsamples_per_class: 3\nobjective: [ridge, rkhs]\nregularization: [0.5]\n"
        "optimize_from: 0.4\narchitecture: convnet-2\nmodel_options: '{\"width\": 4}'\n"
    )
    experiment.main(["--config", str(work / "tiny.yaml"), "--output_dir", str(work / "out")])
    (folder,) = (work / "out" / "work").iterdir()
    classifier = AutoModelForImageClassification.from_pretrained(work / "classifier").eval()
    pipe = DsCoPipeline.from_pretrained(work / "pipe", classifier=classifier)
    options = {"guidance_scale": 1.0, "num_inference_steps": 3, "progress": False}
    for method, population in (("nopt", "real"), ("nopt-data-free", "nopt-data-free")):
        targets = MatchingTargets.from_pretrained(folder / f"targets-{population}")
        for budget, chosen in ((1, Ridge(0.5)), (2, RKHS())):
            name = f"{method}-ipc{budget}-seed0"
            rows = Dataset.from_parquet(str(folder / "sets" / f"{name}.parquet"), keep_in_memory=True)
            expected = concentrate(pipe, targets, budget, method=NOpt(chosen, 0.4), **options)
            assert [image.tobytes() for image in rows["image"]] == [image.tobytes() for image in expected["image"]]
            told = json.loads((folder / "sets" / f"{name}.json").read_text())
            assert told["made_with"]["set"]["method"] == NOpt(chosen, 0.4).as_record()
            assert told["population"] == population
    with pytest.raises(ValueError, match="must be one of .*, got 'ridg'. Nearest: 'ridge'"):
        experiment.ExperimentRecipe(dataset="a", objective=["ridg"])


@pytest.mark.slow
def test_the_table_comes_in_slices_and_is_that_of_one_run(work, capsys):
    (work / "tiny.yaml").write_text(
        f"generator: {work / 'pipe'}\nclassifier: {work / 'classifier'}\ndataset: {work / 'data'}\n"
        "methods: [plain, nopt, nopt-data-free, nopt-quantile]\nobjective: [rkhs]\n"
        "budgets: [1, 2]\nsynthesis_seeds: 2\ntraining_seeds: 1\nnum_inference_steps: 3\nsamples_per_class: 6\n"
        "quantile_iterations: 2\nsteps: 3\narchitecture: convnet-2\nmodel_options: '{\"width\": 4}'\nfull: true\n"
    )
    common = ["--config", str(work / "tiny.yaml"), "--sets_dir", str(work / "sets")]
    experiment.main([*common, "--output_dir", str(work / "sliced"), "--max_minutes", "0"])
    assert "run the same command again" in capsys.readouterr().out
    assert not (work / "sliced" / "results.json").exists() and not list(work.rglob("*.parquet"))
    assert len(list((work / "sets").glob("*/targets-*"))) == 2  # what was begun is finished
    AcceleratorState._reset_state(), PartialState._reset_state()
    experiment.main([*common, "--output_dir", str(work / "sliced")])
    results = json.loads((work / "sliced" / "results.json").read_text())
    rows = {(row["method"], row["images_per_class"]): row for row in results["rows"]}
    methods = {"random", "herding", "plain", "nopt", "nopt-data-free", "nopt-quantile"}
    assert set(rows) == {(method, budget) for method in methods for budget in (1, 2)}
    assert rows["nopt", 2]["synthesis_seeds"] == 2 and len(rows["nopt", 2]["accuracies"]) == 2
    assert rows["nopt-quantile", 2]["synthesis_seeds"] == 1 and rows["herding", 2]["synthesis_seeds"] == 1
    assert (
        rows["nopt", 2]["images"] == 6
        and rows["nopt", 2]["classifier_calls"] > 0 == rows["plain", 2]["classifier_calls"]
    )
    assert rows["nopt", 2]["discrepancy"] < rows["plain", 2]["discrepancy"]
    assert results["full"]["images"] == 21 and results["config"]["image_size"] == 8
    assert "DsCo" in (work / "sliced" / "table.md").read_text()
    assert all(
        (work / "sliced" / name).stat().st_size > 1000 for name in ("samples.png", "accuracy.png", "features.png")
    )
    # the sets are kept apart from the evaluators: another evaluator takes them as they are
    drawn = {path: path.stat().st_mtime_ns for path in (work / "sets").rglob("*.parquet")}
    assert len(drawn) == 2 * (3 * 2 + 1)
    AcceleratorState._reset_state(), PartialState._reset_state()
    experiment.main([*common, "--output_dir", str(work / "other"), "--steps", "2", "--methods", "nopt"])
    assert drawn == {path: path.stat().st_mtime_ns for path in (work / "sets").rglob("*.parquet")}
    other = json.loads((work / "other" / "results.json").read_text())
    assert {row["method"] for row in other["rows"]} == {"random", "herding", "nopt"}
    assert torch.tensor([row["discrepancy"] for row in other["rows"] if row["method"] == "nopt"]).isfinite().all()


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(work):
    (work / "tiny.yaml").write_text(
        "generator: pipe\nclassifier: classifier\ndataset: data\n"
        "methods: [plain, nopt, nopt-data-free, nopt-quantile]\nbudgets: [1, 2]\ntraining_seeds: 2\nsteps: 3\n"
        "num_inference_steps: 3\nsamples_per_class: 5\nquantile_iterations: 2\narchitecture: convnet-2\n"
        "model_options: '{\"width\": 4}'\n"
    )
    tables = []
    for processes in (1, 2):
        command = launch_command("experiment", "--config", "tiny.yaml", "--output_dir", processes, processes=processes)
        done = run(command, cwd=work, env=launch_environment())
        assert done.returncode == 0, done.stderr[-4000:]
        rows = json.loads((work / str(processes) / "results.json").read_text())["rows"]
        tables.append([{key: value for key, value in row.items() if key not in VARY} for row in rows])
    assert len(tables[0]) == 2 * 6
    for one, two in zip(*tables, strict=True):
        assert one.pop("discrepancy") == pytest.approx(two.pop("discrepancy"), rel=1e-4)
        assert one == two


@pytest.mark.slow
def test_a_folder_of_photographs_needs_no_other_option(make, tmp_path, monkeypatch, capsys):
    """Several sizes, no test split, one damaged file: budgets, test images and doping follow from what is there."""
    monkeypatch.chdir(tmp_path)
    for index, row in enumerate(striped_images((9, 7, 6), size=12)):
        path = tmp_path / "photos" / NAMES[row["label"]] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].resize((12 + index, 30 - index)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    make.pipe().save_pretrained("outputs/generator")
    make.convnet().save_pretrained("outputs/classifier")
    small = ["--steps", "2", "--num_inference_steps", "2", "--samples_per_class", "3", "--training_seeds", "1"]
    small += ["--architecture", "convnet-2", "--model_options", '{"width": 4}']
    experiment.main(["--dataset", "photos", *small])
    results = json.loads(Path("outputs/experiment/results.json").read_text())
    # 20 % of 9, 7 and 6 are 2, 1 and 1 test images; the damaged one is the last of the first class
    assert results["splits"]["test_split"] == "train, held out: 20 % of every class, seed 0"
    rows = {(row["method"], row["images_per_class"]): row["images"] for row in results["rows"]}
    drawn = ("random", "herding", "plain", "nopt", "nopt-data-free")
    assert rows == {(method, 1): 3 for method in drawn} | {
        (method, 2): 6 for method in ("random", "herding", "nopt+doping")
    }
    doped = load_dataset("outputs/experiment/dataset", "doped2", split="train")
    assert sorted(doped["source"]) == [0] * 3 + [1] * 3 and {image.size for image in doped["image"]} == {(8, 8)}
    record = Path("outputs/experiment/dataset/concentration.json").read_text()
    assert str(tmp_path) not in record and json.loads(record)["configs"]["doped2"]["doping"]["images_per_class"] == 2
    told = record_of(doped)
    assert told["generator"]["folder"] == "generator" and told["classifier"]["folder"] == "classifier"
    assert told["source"]["dataset"] == "photos" and "less 20 %" in told["source"]["split"]
    assert (told["seed"], told["parameters"]["num_inference_steps"], told["cost"]["images"]) == (0, 2, 3)
    # the check of the generator, and random real images beside every discrepancy, also on the card
    check = results["generator_check"]
    assert set(check["shares"]) == set(NAMES) and check["accuracy_real"] is not None and check["samples"] == 12
    configs, card = json.loads(record)["configs"], Path("outputs/experiment/dataset/README.md").read_text()
    assert (configs["doped2"] | json.loads(record))["generator_check"] == check
    assert "plain samples: accuracy" in card and "as many random real images" in card
    by_row = {(row["method"], row["images_per_class"]): row for row in results["rows"]}
    for (_, budget), row in by_row.items():
        assert row["random_discrepancy"] == by_row["random", budget]["discrepancy"]
    assert configs["ipc1"]["discrepancy"]["as many random real images"] == by_row["random", 1]["discrepancy"]
    by_class = configs["ipc1"]["discrepancy"]["by class"], configs["ipc1"]["discrepancy"]["random by class"]
    for values, mean in zip(by_class, ("set", "as many random real images"), strict=True):
        assert set(values) == set(NAMES)
        assert sum(values.values()) / 3 == pytest.approx(configs["ipc1"]["discrepancy"][mean])
    AcceleratorState._reset_state(), PartialState._reset_state()
    again = ["--from", "outputs/experiment/dataset", "--from_config", "doped2", "--output_dir", "again"]
    concentrate_recipe.main(again)
    assert "All synthetic rows are identical to those of outputs/experiment/dataset" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in Path("outputs/experiment").rglob("*.parquet")}
    AcceleratorState._reset_state(), PartialState._reset_state()
    experiment.main(["--dataset", "photos", *small])
    assert "doping:" not in capsys.readouterr().out.split("done:")[1]
    kept = [path for path in before if "work" in path.parts]
    assert len(kept) == 2 * 4 and all(path.stat().st_mtime_ns == before[path] for path in kept)


def test_budgets_that_the_smallest_class_allows():
    assert experiment.ExperimentRecipe(dataset="x").for_classes(60).budgets == [1, 10, 50]
    assert experiment.ExperimentRecipe(dataset="x").for_classes(60).doping_budgets == [30]
    assert experiment.ExperimentRecipe(dataset="x").for_classes(3).budgets == [1]
    assert (
        experiment.ExperimentRecipe(dataset="x").for_classes(3).doping_budgets == []
    )  # 1 is no more than the smallest budget
    given = experiment.ExperimentRecipe(dataset="x", budgets=[5])
    assert given.for_classes(60) is given
    with pytest.raises(ValueError, match=r"`doping_budgets` must exceed the smallest of `budgets` \[5\], got 5"):
        experiment.ExperimentRecipe(dataset="x", budgets=[5], doping_budgets=[5])


def test_missing_models_are_told_with_their_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"outputs/generator(?s:.)*train_generator\.py .*--dataset path/to/images"
    ):
        experiment.main(["--dataset", "photos"])


@pytest.mark.parametrize(
    "changed",
    ["nothing", "test images", "evaluators", "image", "split", "holdout", "denoiser", "scheduler", "classifier",
     "preprocessing", "features", "steps", "regularised", "versions"],
)  # fmt: skip
def test_the_folder_of_targets_and_sets_is_named_by_all_that_decides_them(changed, work, make, monkeypatch):
    """Of single sets the options of their budget decide, too: see the tests above."""

    def folder(**options):
        given = {"dataset": str(work / "data"), "generator": str(work / "pipe"), "budgets": [1], "steps": 2}
        given |= {"classifier": str(work / "classifier"), "sets_dir": str(work / "sets"), "architecture": "convnet-2"}
        return experiment.Experiment(experiment.ExperimentRecipe(**{**given, **options}), Accelerator()).made.folder

    base, options = folder(), {}
    if changed == "test images":
        options = {"test_split": "train[:10]"}
    elif changed == "evaluators":
        options = {"steps": 3, "architecture": "convnet-3", "training_seeds": 1}
    elif changed == "image":
        rows = load_from_disk(str(work / "data"))
        first = rows["train"].map(lambda one, row: {"image": one["image"].rotate(90 * (row == 3))}, with_indices=True)
        DatasetDict(train=first, test=rows["test"]).save_to_disk(str(work / "other"))
        shutil.rmtree(work / "data")
        (work / "other").rename(work / "data")
    elif changed == "split":
        options = {"train_split": "train[:20]"}
    elif changed == "holdout":
        rows = load_from_disk(str(work / "data"))["train"]
        shutil.rmtree(work / "data")
        rows.save_to_disk(str(work / "data"))
        base, options = folder(), {"holdout": 0.3}
    elif changed == "denoiser":
        make.pipe(seed=4).save_pretrained(work / "pipe")
    elif changed == "scheduler":
        DDIMScheduler(clip_sample=False).save_pretrained(work / "pipe" / "scheduler")
    elif changed == "classifier":
        make.convnet(seed=4).save_pretrained(work / "classifier")
    elif changed == "preprocessing":
        model = make.convnet()
        model.config.image_mean = [0.3]
        model.save_pretrained(work / "classifier")
    elif changed == "versions":
        monkeypatch.setattr("dsco_hf.matching.kept.versions", lambda: {"torch": "0.0"})
    elif changed != "nothing":
        options = {
            "features": {"features": "{}"}, "steps": {"num_inference_steps": 3},
            "regularised": {"objective": ["rkhs"]},
        }[changed]  # fmt: skip
    assert (folder(**options) == base) == (changed in ("nothing", "test images", "evaluators"))


@pytest.mark.slow
def test_all_peers_are_rows_of_one_table(work):
    peers = list(PEERS)
    data = DatasetDict(train=striped_images((10, 10, 11)), test=striped_images((4, 4, 4), seed=1))
    data.save_to_disk(str(work / "more"))
    (work / "tiny.yaml").write_text(
        f"generator: {work / 'pipe'}\nclassifier: {work / 'classifier'}\ndataset: {work / 'more'}\n"
        "budgets: [1, 2]\nsynthesis_seeds: 1\ntraining_seeds: 1\nsteps: 2\nnum_inference_steps: 3\n"
        "samples_per_class: 2\narchitecture: convnet-2\nmodel_options: '{\"width\": 4}'\ncheck_images: 0\n"
    )
    options = ["--config", str(work / "tiny.yaml"), "--output_dir", str(work / "out")]
    experiment.main([*options, "--methods", ",".join(["plain", "nopt-data-free", *peers])])
    rows = {(row["method"], row["images_per_class"]): row for row in json.loads(
        (work / "out" / "results.json").read_text())["rows"]}  # fmt: skip
    assert {name for name, _ in rows} == {"random", "herding", "plain", "nopt-data-free", *peers}
    plain = rows["plain", 2]["denoiser_calls"]
    assert rows["best-of-n", 2]["denoiser_calls"] == 4 * plain and rows["best-of-n", 2]["classifier_calls"] == 24
    for name in ("flops", "flops_dit_xl_2"):
        assert rows["best-of-n", 2][name] > 3.9 * rows["plain", 2][name] > 2 * 3.9 * rows["d4m", 1][name] > 0
    assert rows["plain", 2]["data_pass_flops"] == 0 and "flops" not in rows["random", 1]
    assert rows["s3", 1]["data_pass"] == {"images": 31, "classifier": 31}
    assert rows["mgd3", 2]["denoiser_calls"] == plain > rows["d4m", 2]["denoiser_calls"]
    read = {name: rows[name, 1]["data_pass"]["images"] for name in ("plain", "best-of-n", "uag", "mgd3", "ddoq")}
    assert read == {"plain": 0, "best-of-n": 0, "uag": 0, "mgd3": 31, "ddoq": 31}
    assert rows["igd", 2]["data_pass"] == {"images": 31, "surrogate": 31 * 40 + 31 * 4}
    assert rows["igd", 2]["classifier_calls"] == 6 * 4 and rows["igd", 2]["flops"] > rows["plain", 2]["flops"]
    assert (
        rows["igd", 1]["data_pass_flops"] > 0 and rows["igd", 2]["flops_dit_xl_2"] > rows["plain", 2]["flops_dit_xl_2"]
    )
    assert rows["nopt-data-free", 1]["data_pass"] == {"images": 0, "denoiser": 18, "decoder": 0, "classifier": 12}
    (folder,) = (work / "out" / "work").iterdir()
    assert {path.name for path in folder.glob("targets-*")} >= {"targets-centroids-1", "targets-centroids-2"}
    ddoq = Dataset.from_parquet(str(folder / "sets" / "ddoq-ipc2-seed0.parquet"), keep_in_memory=True)
    assert sum(ddoq["weight"][:]) == pytest.approx(6)
    table = (work / "out" / "table.md").read_text()
    assert "| IGD |" in table and "| MGD3 |" in table and "| best of N |" in table
