"""The recipe as users launch it: finished, extended, refused, failing, made again; alone and by two processes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset

from dsco_hf import DsCoPipeline, NOpt, Objective, Ridge, Sampling, SamplingMethod, Selection, concentrate, dope
from dsco_hf.concentration.run_folder import RunFolder
from dsco_hf.concentration.selection import find_selection
from dsco_hf.generators.base import FAMILIES
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.flat import FLAT
from dsco_hf.studies.plans import StudyPlan
from dsco_hf.utils.configs import import_modules, parse_config
from launches import launch_command, launch_environment, run
from recipes.concentrate import ConcentrateRecipe, check_recipe, main


ROOT = Path(__file__).parents[2]
CONFIG = """
generator: pipe
targets: targets
images_per_class: 4
block_size: 2
images_per_call: 2
num_inference_steps: 4
guidance_scale: 1.0
optimize_from: 0.0
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, _pixel_pipe, _targets):
    """A folder, with a name as people give them, that holds a generator, targets and a config."""
    folder = tmp_path_factory.mktemp("Läufe und mehr")
    _pixel_pipe.save_pretrained(folder / "pipe")
    _targets.save_pretrained(folder / "targets")
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def launch(folder, *options, processes=1, fails=False):
    command = launch_command("concentrate", "--config", "run.yaml", *options, processes=processes)
    done = run(command, cwd=folder, env=launch_environment())
    if bool(done.returncode) != fails:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def here(*options):
    """Runs the recipe in this process, alone."""
    main(["--config", "run.yaml", *options])


def pixels(folder):
    rows = load_dataset(str(folder / "dataset"), split="train", cache_dir=str(folder / "cache"))
    return [np.asarray(image).tobytes() for image in rows["image"]]


def read(path):
    return json.loads(path.read_text())


def test_fields_are_those_of_the_pipeline():
    assert ConcentrateRecipe().sampling == Sampling()
    assert ConcentrateRecipe(objective="ridge").sampling.method == NOpt(Ridge())
    assert {name for name in FLAT if not hasattr(ConcentrateRecipe(), name)} == {"classifier_objective"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/configs/concentrate_*.yaml")), ids=lambda path: path.stem)
def test_configs_load_and_say_how_they_are_launched(path):
    recipe = parse_config(ConcentrateRecipe, ["--config", str(path)])
    check_recipe(recipe)
    assert recipe.output_dir.startswith("outputs/")
    assert "accelerate launch" in path.read_text() and f"configs/{path.name}" in path.read_text()


@pytest.mark.parametrize(("options", "message"), [
    ([], "Nothing to match: give `dataset`, `targets` or `data_free`"),
    (["--generator", "g"], "Nothing to match: give `dataset`, `targets` or `data_free`"),
    (["--generator", "g", "--dataset", "d", "--data_free"], "can match one of them only"),
    (["--generator", "g", "--objective", "classifier", "--data_free"], "matches nothing: leave 'data_free' out"),
    (["--generator", "g", "--objective", "quantile", "--targets", "t"], "matches real images: give `dataset`"),
    (["--generator", "g", "--targets", "t", "--dtype", "int8"], "`dtype` must be one of .'float32'"),
    (["--from", "user/name", "--seed", "3"], r"leave \['seed'\] out"),
    (["--from=user/name", "--step_size", "2", "--max_hours", "3"], r"leave \['step_size'\] out"),
    (["--images_per_clas", "3"], "Unknown option '--images_per_clas'. Nearest: 'images_per_class'"),
    (["--images_per_class", "three"], "invalid int value"),
])  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        main(options)


def test_the_generator_is_by_default_the_one_that_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .outputs/generator.[\s\S]*train_generator.py --config"):
        main(["--data_free"])


@pytest.mark.slow
def test_a_run_its_files_and_the_same_from_its_record(work, pipe, targets, monkeypatch, capsys):
    monkeypatch.chdir(work)
    here("--output_dir", "out", "--max_hours", "0")
    assert "Stopped by the time limit: 0 of 6 units are finished. Run the same" in capsys.readouterr().out
    assert not (work / "out" / "dataset").exists()
    here("--output_dir", "out")
    told = capsys.readouterr()
    assert "6 of 6 units are finished: 12 images. The dataset is in out/dataset." in told.out
    assert told.out.startswith("targets: 3 classes, 8 px, on cpu.\n")
    options = {"block_size": 2, "images_per_call": 2, "num_inference_steps": 4, "guidance_scale": 1.0}
    small = concentrate(pipe, targets, 4, method=NOpt(start=0.0), progress=False, **options)
    expected = [np.asarray(image).tobytes() for image in small["image"]]
    assert pixels(work / "out") == expected
    results, record = read(work / "out" / "results.json"), read(work / "out" / "dataset" / "concentration.json")
    assert results["cost"]["images"] == record["cost"]["images"] == 12 and results["discrepancy"] > 0
    assert (
        record["discrepancy"]["by class"] == results["discrepancy_by_class"]
        and len(results["discrepancy_by_class"]) == 3
    )
    card = (work / "out" / "dataset" / "README.md").read_text("utf-8").partition("\n# ")[2]
    assert "by class" not in card and "as many random real images" in card
    assert record["cost"]["peak_memory_bytes"] > 50e6 and results["session"]["processes"] == 1
    assert record["method"] == "nopt" and record["seed"] == 0 and record["environment"]["threads"] == 1
    assert record["blocks"]["size"] == 2 and record["blocks"]["count"] == 2 and record["changes"] == []
    assert record["parameters"]["method"]["iterations"] == 1 and record["parameters"]["method"]["step_decay"] == 0.25
    main(["--from", "out/dataset", "--output_dir", "again"])
    assert "All rows are identical to those of out/dataset." in capsys.readouterr().out
    assert pixels(work / "again") == expected and read(work / "again" / "results.json")["from"]["identical"] is True


@pytest.mark.slow
def test_a_finished_run_is_extended_and_other_settings_are_refused(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    here("--output_dir", "grown", "--images_per_class", "2")
    first = pixels(work / "grown")
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        here("--output_dir", "grown", "--seed", "1")
    here("--output_dir", "grown", "--images_per_class", "6")
    assert "9 of 9 units" in capsys.readouterr().out
    grown = pixels(work / "grown")
    assert [grown[6 * row + index] for row in range(3) for index in range(2)] == first
    record = read(work / "grown" / "dataset" / "concentration.json")
    assert list(record["configs"]) == ["ipc2", "ipc6"] and record["default_config"] == "ipc6"
    assert [record["configs"][name]["blocks"]["count"] for name in ("ipc2", "ipc6")] == [1, 3]
    assert [record["configs"][name]["parameters"]["images_per_class"] for name in ("ipc2", "ipc6")] == [2, 6]
    assert len(load_dataset(str(work / "grown" / "dataset"), "ipc2", split="train")) == 6
    assert read(work / "grown" / "results.json")["session"]["images"] == 12


@pytest.mark.parametrize(("options", "method"), [
    (["--optimization_steps", "0", "--class_labels", "2", "circle"], "plain"),
    (["--objective", "classifier"], "nopt-classifier-only"),
    (["--objective", "ridge", "--dataset", "real", "--block_size", "1", "--regularization", "0.5"], "nopt"),
    (["--data_free", "--samples_per_class", "4", "--weighting", "none"], "nopt-data-free"),
    (["--objective", "quantile", "--dataset", "real", "--optimization_steps", "1", "--draws", "1"], "nopt-quantile"),
])  # fmt: skip
@pytest.mark.slow
def test_other_things_to_match(work, real_images, monkeypatch, options, method):
    monkeypatch.chdir(work)
    if not (work / "real").exists():
        real_images.save_to_disk(str(work / "real"))
    (work / "other.yaml").write_text(CONFIG.replace("targets: targets\n", ""))
    main(["--config", "other.yaml", "--output_dir", method, "--images_per_class", "2", *options])
    record = read(work / method / "dataset" / "concentration.json")
    rows = load_dataset(str(work / method / "dataset"), split="train", cache_dir=str(work / "cache"))
    assert record["method"] == method and len(rows) == (4 if method == "plain" else 6)
    if method == "plain":
        assert rows.features["label"].names == ["triangle", "circle"]
    if method == "nopt-quantile":
        with pytest.raises(ValueError, match="was drawn for real images themselves"):
            main(["--from", f"{method}/dataset", "--output_dir", "no"])
    else:
        main(["--from", f"{method}/dataset", "--output_dir", f"{method} again"])
        assert pixels(work / f"{method} again") == pixels(work / method)


OWN = """
from dataclasses import dataclass

import torch

from dsco_hf import Objective, SamplingMethod, Selection
from dsco_hf.matching.objectives import class_means


@dataclass(frozen=True)
class EachNearest(Objective):
    weight: float = 1.0
    contrast: float = 3.0  # of its own, whatever the option of that name says

    def losses(self, seen, bound):
        psi, means = bound.targets.embed(seen.features), bound.targets.embeddings[bound.rows]
        away = (psi - means).square().sum(dim=1, keepdim=True)
        present, index = bound.rows.unique(return_inverse=True)
        return self.weight * class_means(away, index, len(present))[:, 0]


@dataclass(frozen=True)
class Lightest(SamplingMethod):
    candidates: int = 2

    def choose(self, call, latents, pixels):
        light = pixels.mean(dim=(1, 2, 3)).view(self.candidates, len(call.wanted))
        return light.argmax(dim=0) * len(call.wanted) + torch.arange(len(call.wanted))


@dataclass(frozen=True)
class Darkest(Selection):
    sign: float = 1.0

    def rank(self, pool, small, wanted, pipe, seed):
        return (self.sign * pool.pixels(num_channels=1).mean((1, 2, 3))).argsort(stable=True)
"""


@pytest.fixture
def own(work, monkeypatch):
    """A module of the user's in the working folder, and what it leaves when it is imported."""
    monkeypatch.chdir(work)
    (work / "own_objects.py").write_text(OWN, encoding="utf-8")
    for family in (Objective, SamplingMethod, Selection):
        monkeypatch.setattr(family, "kinds", dict(family.kinds))
    yield
    sys.modules.pop("own_objects", None)


@pytest.mark.slow
def test_objects_of_ones_own_by_name(work, own, pipe, targets, real_images, capsys):
    small = CONFIG.replace("images_per_class: 4", "images_per_class: 1")
    told = "objective: {name: own_objects:EachNearest, weight: 1e-1}\n"
    (work / "own.yaml").write_text(small + told)
    with pytest.raises(ValueError, match="a name imports nothing; recipes do it for `--imports own_objects`"):
        main(["--config", "own.yaml", "--output_dir", "own"])
    assert "own_objects" not in sys.modules and str(work) not in sys.path
    main(["--config", "own.yaml", "--output_dir", "own", "--imports", "own_objects"])
    module = sys.modules["own_objects"]
    options = {"block_size": 2, "images_per_call": 2, "num_inference_steps": 4, "guidance_scale": 1.0}
    found = concentrate(
        pipe, targets, 1, method=NOpt(module.EachNearest(weight=0.1), start=0.0), progress=False, **options
    )
    assert pixels(work / "own") == [np.asarray(image).tobytes() for image in found["image"]]
    objective = read(work / "own" / "dataset" / "concentration.json")["parameters"]["method"]["objective"]
    assert objective == {"name": "own_objects:EachNearest", "weight": 0.1, "contrast": 3.0}
    main(["--from", "own/dataset", "--imports", "own_objects", "--output_dir", "own again"])
    assert "All rows are identical" in capsys.readouterr().out

    method = "imports: own_objects\nmethod: {name: own_objects:Lightest, candidates: 3}\n"
    (work / "method.yaml").write_text(small.replace("optimize_from: 0.0", "optimize_from: 0.5") + method)
    with pytest.raises(
        ValueError, match=r"\['optimize_from'\] are of 'nopt', .* leave them out, and give a method its"
    ):
        main(["--config", "method.yaml", "--output_dir", "method"])
    (work / "method.yaml").write_text(
        small.replace("optimize_from: 0.0\n", "").replace("targets: targets", "") + method
    )
    main(["--config", "method.yaml", "--output_dir", "method"])
    record = read(work / "method" / "dataset" / "concentration.json")
    assert record["parameters"]["method"] == {"name": "own_objects:Lightest", "candidates": 3}
    assert record["cost"]["denoiser_calls"] == 3 * 3 * 4

    (work / "plan.yaml").write_text("doping_strategy: {name: own_objects:Darkest, sign: -1}\nobjective: [ridge]\n")
    plan = parse_config(StudyPlan, ["--config", "plan.yaml", "--imports", "own_objects"])
    rule = find_selection(plan.doping_strategy, sign=1.0, targets=targets)
    assert rule == module.Darkest(sign=-1.0)
    mixed = dope(found, real_images, strategy=rule, images_per_class=2, progress=False)
    light = [np.asarray(image).mean() for image in real_images["image"]]
    for row, label in zip(mixed["real_index"][3:], mixed["label"][3:], strict=True):
        assert light[row] == max(value for value, own in zip(light, real_images["label"], strict=True) if own == label)


@pytest.mark.parametrize(("given", "message"), [
    (["--imports", "own_objects.py"], r"no module .own_objects.py. .*`own_objects` for a file own_objects.py"),
    (["--imports", "own_objects", "nothing.there"], "There is no module 'nothing.there'"),
    (["--objective", "antigravity:Fly"], "no class below Objective is there"),
    (["--method", '{"name": "antigravity:Fly"}'], "no class below SamplingMethod is there"),
    (["--objective", "{name: ridge, regularisation: 1}"], "Ridge has no field 'regularisation'. Nearest: 'reg"),
    (["--objective", "{name: ridge"], "`objective` is not valid YAML"),
    (["--objective", "{weight: 1}"], "`objective` must be one of '.*, or an object"),
])  # fmt: skip
def test_names_that_lead_nowhere(own, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        main([*given, "--generator", "pipe", "--dataset", "real"])
    assert "antigravity" not in sys.modules


NET = """
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from dsco_hf import Denoiser, register_denoiser


class PatchNet(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int = 8, labels: int = 4, width: int = 4) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, in_channels, 1)
        self.table, self.level = nn.Embedding(labels, width), nn.Linear(1, width)

    def forward(self, noisy, *, label, level):
        shift = self.table(label) + self.level(level[:, None] / 1000)
        return self.outward(torch.nn.functional.silu(self.inward(noisy) + shift[:, :, None, None]))


@register_denoiser
class Patches(Denoiser):
    name = "patches"
    kinds = (PatchNet,)
    classes_field = "labels"
    counts_null = True

    def forward(self, x, timesteps, classes):
        return self.network(x, label=classes, level=timesteps.to(x.dtype))
"""


@pytest.mark.slow
def test_a_denoiser_of_ones_own_draws_in_two_processes(work, own, pipe, targets):
    """Each process imports the module that `imports` names; what they draw is what one process draws."""
    (work / "own_net.py").write_text(NET, encoding="utf-8")
    try:
        import_modules(["own_net"])
        torch.manual_seed(0)
        network = sys.modules["own_net"].PatchNet().eval()
        mine = DsCoPipeline(network, pipe.scheduler, classifier=pipe.classifier, id2label=pipe.id2label)
        mine.save_pretrained(work / "own pipe")
        given = ("--generator", "own pipe", "--images_per_class", "3", "--output_dir", "own net")
        told = launch(work, *given, "--imports", "own_net", processes=2).stdout
        assert "6 of 6 units are finished: 9 images" in told
        logs = [path.read_text().splitlines() for path in sorted((work / "own net" / "run" / "log").iterdir())]
        assert len(logs) == 2 and all(any(json.loads(line).get("unit") for line in log) for log in logs)
        mine = DsCoPipeline.from_pretrained(work / "own pipe")
        mine.set_progress_bar_config(disable=True)
        options = {"block_size": 2, "images_per_call": 2, "num_inference_steps": 4, "guidance_scale": 1.0}
        alone = concentrate(mine, targets, 3, method=NOpt(start=0.0), progress=False, **options)
        assert pixels(work / "own net") == [np.asarray(image).tobytes() for image in alone["image"]]
        record = read(work / "own net" / "dataset" / "concentration.json")
        assert record["generator"]["family"] == "own_net.Patches"
    finally:
        FAMILIES.pop("patches", None)
        sys.modules.pop("own_net", None)


@pytest.mark.slow
def test_two_processes_that_are_refused_fail_and_go_on(work, real_images, monkeypatch):
    monkeypatch.chdir(work)
    pipe = DsCoPipeline.from_pretrained(work / "pipe")
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight[0] = float("nan")
    pipe.save_pretrained(work / "bad")
    if not (work / "real").exists():
        real_images.save_to_disk(str(work / "real"))
    (work / "run.yaml").write_text(CONFIG.replace("targets: targets\n", "dataset: real\n"))
    bad = ("--generator", "bad", "--output_dir", "failing")
    with RunFolder(work / "failing" / "run").locked():
        assert "Another run is at work on" in launch(work, *bad, processes=2, fails=True).stderr
    done = launch(work, *bad, processes=2, fails=True)
    assert "1 unit(s) failed, 4 of 6 units are finished." in done.stdout
    assert "Class(es) ['circle'], block 0, step 0" in done.stdout
    assert not (work / "failing" / "dataset").exists() and not (work / "failing" / "targets-work").exists()
    with pytest.raises(ValueError, match="models.transformer: .*accept_changed"):
        here("--output_dir", "failing")
    done = launch(work, "--output_dir", "failing", "--accept_changed", "models", processes=2)
    assert "6 of 6 units are finished" in done.stdout
    logs = sorted((work / "failing" / "run" / "log").iterdir())
    drawn = [{json.loads(line).get("unit") for line in log.read_text().splitlines()} - {None} for log in logs]
    assert len(logs) == 2 and all(drawn) and sum(map(len, drawn)) == 6
    record = read(work / "failing" / "dataset" / "concentration.json")
    assert list(record["changes"][0]["settings"]) == ["models.transformer"]
    assert (
        MatchingTargets.from_pretrained(work / "failing" / "targets").provenance["images"] == 17
    )  # of 21: a fifth of each class is held out
    with pytest.raises(ValueError, match="targets that were made otherwise .options.seed: 0 there, 2 now"):
        here("--output_dir", "failing", "--seed", "2")
    here("--output_dir", "alone")  # one process makes the same targets and images
    assert pixels(work / "alone") == pixels(work / "failing")
    (work / "run.yaml").write_text(CONFIG)
