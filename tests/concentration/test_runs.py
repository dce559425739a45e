import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    NOpt,
    QuantileTargets,
    Released,
    Ridge,
    Sampling,
    concentrate,
    concentrate_and_report,
)
from dsco_hf.concentration.concentrate import Unit, divide, plan_units
from dsco_hf.concentration.run_folder import RunFolder, RunSession
from dsco_hf.concentration.runs import concentrate_to_folder
from dsco_hf.utils.origins import model_sha256, targets_sha256
from dsco_hf.utils.processes import RunError
from launches import run


ROOT = Path(__file__).parents[2]
SAMPLING = {"num_inference_steps": 4, "guidance_scale": 1.0, "method": NOpt(start=0.0)}
SIZES = {"block_size": 2, "images_per_call": 2}  # one class a unit
OPTIONS = {**SAMPLING, **SIZES, "progress": False}


def same_rows(one, other):
    """Whether all columns are equal, images bit by bit."""
    values = [dataset.remove_columns("image").to_dict() for dataset in (one, other)]
    pixels = [[np.asarray(image).tobytes() for image in dataset["image"]] for dataset in (one, other)]
    return values[0] == values[1] and pixels[0] == pixels[1]


@pytest.mark.slow
def test_targets_are_made_once_and_kept_in_the_folder(pipe, real_images, make, tmp_path, monkeypatch):
    options = {**OPTIONS, "images_per_call": 6, "seed": 3}
    kept = concentrate_to_folder(pipe, real_images, 2, tmp_path / "run", **options)
    targets = MatchingTargets.from_pretrained(tmp_path / "run" / "targets")
    assert targets.second_moment is not None and not list((tmp_path / "run").glob("targets-work*"))
    assert same_rows(kept.dataset(), concentrate(pipe, real_images, 2, **options))
    classes = ["square", "circle"]
    free = {**options, "method": NOpt("rkhs")}
    drawn = concentrate_to_folder(pipe, classes, 1, tmp_path / "free", **free)
    assert drawn.class_names == classes and drawn.record["method"] == "nopt-data-free"
    for name in ("from_dataset", "from_generator"):
        monkeypatch.setattr(MatchingTargets, name, None)  # nothing is made again
    more = concentrate_to_folder(pipe, real_images, 4, tmp_path / "run", **options)
    assert more.session["images"] == 6 and more.settings["targets"] == kept.settings["targets"]
    assert concentrate_to_folder(pipe, classes, 1, tmp_path / "free", **free).session["images"] == 0
    for other, what in ((make.images((5, 7, 9)), "real"), (classes, "population")):
        with pytest.raises(ValueError, match=f"holds targets that were made otherwise.*{what}.*Remove it, or choose"):
            concentrate_to_folder(pipe, other, 2, tmp_path / "run", **options)


def log_of(folder, event, process=0):
    lines = [json.loads(line) for line in (folder / "log" / f"process-{process:05d}.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.slow
def test_a_run_gives_what_concentrate_gives(pipe, targets, tmp_path):
    expected, report = concentrate_and_report(pipe, targets, 5, seed=3, **OPTIONS)
    result = concentrate_to_folder(pipe, targets, 5, tmp_path, seed=3, **OPTIONS)
    assert result.finished and result.units == result.finished_units == 9 and not result.failures
    assert same_rows(result.dataset(), expected)
    assert same_rows(result.dataset(cache_file=tmp_path / "rows.arrow"), expected)
    for name in ("images", "denoiser_calls", "decoder_calls", "classifier_calls"):
        assert getattr(result.report, name) == getattr(report, name)
    assert result.report.discrepancy_by_class == pytest.approx(report.discrepancy_by_class, rel=1e-4)
    assert result.report.discrepancy == pytest.approx(report.discrepancy, rel=1e-4)
    assert result.report.seconds > 0 and result.report.peak_memory_bytes > 50e6
    assert result.session["images"] == 15 and result.session["images_per_second"] > 0
    assert "9 of 9 units are finished: 15 images" in result.message


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again(pipe, targets, tmp_path, monkeypatch):
    expected = concentrate(pipe, targets, 5, **OPTIONS)
    draw, calls = type(pipe).sample, []

    def cut_off(*arguments, **options):  # as a signal would: between any two calls of the pipeline
        calls.append(options["seeds"])
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(type(pipe), "sample", cut_off)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            concentrate_to_folder(pipe, targets, 5, tmp_path, **OPTIONS)
    result = concentrate_to_folder(pipe, targets, 5, tmp_path, **OPTIONS)
    assert same_rows(result.dataset(), expected)
    completed = [tuple(seeds) for number, seeds in enumerate(calls, 1) if number % 3]
    assert len(completed) == len(set(completed)) == 9  # no finished unit is drawn twice
    again = concentrate_to_folder(pipe, targets, 5, tmp_path, **OPTIONS)
    assert again.session["images"] == 0 and len(calls) == 13 and same_rows(again.dataset(), expected)
    assert again.report == result.report  # the cost of all sessions, and the discrepancy


@pytest.mark.slow
def test_damaged_and_lost_units_are_drawn_again(pipe, targets, tmp_path):
    first = concentrate_to_folder(pipe, targets, 5, tmp_path, **OPTIONS)
    expected = first.dataset()
    shards = sorted((tmp_path / "units").glob("*.parquet"))
    shards[0].write_bytes(shards[0].read_bytes()[:100])  # a first block, on which others were built
    shards[4].unlink()
    sorted((tmp_path / "units").glob("*.json"))[8].unlink()
    second = concentrate_to_folder(pipe, targets, 5, tmp_path, **OPTIONS)
    assert second.session["images"] == 2 + 2 + 1 and same_rows(second.dataset(), expected)
    assert second.report.discrepancy_by_class == first.report.discrepancy_by_class


@pytest.mark.slow
def test_the_clock_does_not_matter(pipe, targets, tmp_path):
    concentrate_to_folder(pipe, targets, 2, tmp_path, **OPTIONS)
    for number, path in enumerate(sorted(tmp_path.rglob("*.*"))):  # from 1970 and from 2096, in turns
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    again = concentrate_to_folder(pipe, targets, 4, tmp_path, **OPTIONS)
    assert again.session["images"] == 6 and same_rows(again.dataset(), concentrate(pipe, targets, 4, **OPTIONS))


@pytest.mark.slow
def test_a_run_grows_and_keeps_its_first_blocks(pipe, targets, tmp_path):
    small = concentrate_to_folder(pipe, targets, 2, tmp_path, **OPTIONS).dataset()
    grown = concentrate_to_folder(pipe, targets, 6, tmp_path, **OPTIONS)
    assert grown.session["images"] == 12 and grown.report.images == 18
    assert same_rows(grown.dataset(), concentrate(pipe, targets, 6, **OPTIONS))
    first = grown.dataset().filter(lambda block: block == 0, input_columns="block")
    assert same_rows(first, small)
    again = concentrate_to_folder(pipe, targets, 2, tmp_path, **OPTIONS)
    assert again.session["images"] == 0 and same_rows(again.dataset(), small)
    with pytest.raises(ValueError, match="multiple of 2"):
        concentrate_to_folder(pipe, targets, 3, tmp_path, **OPTIONS)


@pytest.mark.slow
def test_a_grown_run_of_the_ridge_objective_remembers_every_image(pipe, real_images, tmp_path):
    targets = MatchingTargets.from_dataset(real_images, pipe, embedding_dim=64, second_moment=True, progress=False)
    options = {**OPTIONS, "objective": "ridge", "images_per_call": 4}  # two groups: of one class, and of two
    concentrate_to_folder(pipe, targets, 2, tmp_path, **options)
    grown = concentrate_to_folder(pipe, targets, 5, tmp_path, **options)
    expected, report = concentrate_and_report(pipe, targets, 5, **options)
    assert grown.session["images"] == 9 and same_rows(grown.dataset(), expected)
    assert grown.report.discrepancy_by_class == pytest.approx(report.discrepancy_by_class, rel=1e-4)
    with pytest.raises(ValueError, match="options.method.objective.regularization: 2.0 there, 1.0 now"):
        concentrate_to_folder(pipe, targets, 5, tmp_path, **{**options, "objective": Ridge(1.0)})


def test_other_settings_are_refused_by_name(pipe, targets, make, tmp_path):
    concentrate_to_folder(pipe, targets, 2, tmp_path, **OPTIONS)
    for change, named in (
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"method": NOpt(start=0.0, step_size=0.5)}, "options.method.step_size: 1.0 there, 0.5 now"),
        ({"images_per_call": 4}, "images_per_call: 2 there, 4 now"),
        ({"session": RunSession(cpu_threads=2)}, "cpu_threads: 1 there, 2 now"),
    ):
        with pytest.raises(ValueError, match=named):
            concentrate_to_folder(pipe, targets, 2, tmp_path, **{**OPTIONS, **change})
    other = MatchingTargets.from_dataset(make.images((4, 4, 4), seed=5), pipe, embedding_dim=256, progress=False)
    with pytest.raises(ValueError, match="with other settings .targets: "):
        concentrate_to_folder(pipe, other, 2, tmp_path, **OPTIONS)
    with torch.no_grad():
        next(pipe.transformer.parameters()).mul_(1.001)
    with pytest.raises(ValueError, match=r"with other settings .models.transformer: .*accept_changed=\['models.tr"):
        concentrate_to_folder(pipe, targets, 2, tmp_path, **OPTIONS)


def test_options_that_say_the_same_are_the_same(pipe, targets, tmp_path):
    concentrate_to_folder(pipe, targets, 2, tmp_path, **OPTIONS)
    spelled_out = {**OPTIONS, "method": NOpt(Ridge(2), 0.0, lookahead="conditional"), "eta": 1.0, "objective": "ridge"}
    assert concentrate_to_folder(pipe, targets, 2, tmp_path, **spelled_out).session["images"] == 0


@pytest.mark.slow
def test_values_that_are_not_finite_fail_their_unit_only(pipe, targets, tmp_path):
    expected = concentrate(pipe, targets, 4, **OPTIONS)
    table = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    sound = table.detach().clone()
    with torch.no_grad():
        table[1] = float("nan")
    result = concentrate_to_folder(pipe, targets, 4, tmp_path, **OPTIONS)
    assert (
        not result.finished
        and result.finished_units == 4
        and [f["unit"] for f in result.failures] == ["group-00001-block-00000"]
    )
    assert "Class(es) ['square'], block 0, step 0: " in result.message
    assert "4 of 6 units are finished" in result.message and "accept_changed" in result.message
    (line,) = log_of(tmp_path, "failed")
    assert (line["classes"], line["block"], line["step"]) == (["square"], 0, 0)
    with pytest.raises(RunError, match="1 unit.s. failed"):
        result.dataset()
    with torch.no_grad():
        table.copy_(sound)
    with pytest.raises(ValueError, match="models.transformer"):
        concentrate_to_folder(pipe, targets, 4, tmp_path, **OPTIONS)
    session = RunSession(accept_changed=["models"])
    repaired = concentrate_to_folder(pipe, targets, 4, tmp_path, session=session, **OPTIONS)
    assert repaired.finished and repaired.session["images"] == 4 and same_rows(repaired.dataset(), expected)
    assert repaired.changes[0]["finished_units"] == 4 and list(repaired.changes[0]["settings"]) == [
        "models.transformer"
    ]


def test_one_bad_class_is_named_among_those_of_its_unit(pipe, targets, tmp_path):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight[2] = float("nan")
    result = concentrate_to_folder(pipe, targets, 2, tmp_path, **SAMPLING, progress=False)  # one unit
    assert result.units == 1 and "Class(es) ['triangle'], block 0" in result.failures[0]["error"]


def test_the_time_limit(pipe, targets, tmp_path):
    result = concentrate_to_folder(pipe, targets, 4, tmp_path, session=RunSession(max_hours=0), **OPTIONS)
    assert result.stopped and result.finished_units == 0 and not result.finished
    assert "Stopped by the time limit: 0 of 6 units are finished. Run the same command again" in result.message
    assert log_of(tmp_path, "stopped")
    result = concentrate_to_folder(pipe, targets, 4, tmp_path, session=RunSession(max_hours=1.0), **OPTIONS)
    assert result.finished and not result.stopped
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="`max_hours` must be"):
            RunSession(max_hours=wrong)


def test_work_is_divided_by_cost():
    units = [Unit(group, block, range(group, group + 1), range(10)) for group in range(5) for block in range(2)]
    shares = divide(units, 2)
    assert sorted(len(share) for share in shares) == [2, 3] and set().union(*shares) == set(range(5))
    units += [Unit(9, block, range(9, 10), range(10)) for block in range(6)]  # one group has much left to do
    shares = divide(units, 2)
    loads = [sum(unit.images for unit in units if unit.group in share) for share in shares]
    assert loads == [80, 80]
    assert divide(units[:2], 4) == [{0}, set(), set(), set()] and divide([], 2) == [set(), set()]


def test_what_a_unit_holds_does_not_depend_on_the_number_of_processes():
    units = plan_units(1000, 10, images_per_call=128)
    for processes in (1, 2, 4, 7, 64):
        shares = divide(units, processes)
        assert sum(len(share) for share in shares) == len({unit.group for unit in units}) == 84
        loads = [sum(unit.images for unit in units if unit.group in share) for share in shares]
        assert max(loads) - min(loads) <= 120  # one unit


@pytest.mark.slow
def test_plain_samples_and_other_objectives(pipe, targets, real_images, tmp_path):
    plain = concentrate_to_folder(
        pipe, None, 2, tmp_path / "a", class_labels=["triangle", 0], measure_by=targets, **OPTIONS
    )
    expected, report = concentrate_and_report(pipe, None, 2, class_labels=["triangle", 0], **OPTIONS)
    assert same_rows(plain.dataset(), expected) and plain.class_names == ["triangle", "circle"]
    assert set(plain.report.discrepancy_by_class) == {"triangle", "circle"} and report.discrepancy is None
    alone = concentrate_to_folder(pipe, None, 2, tmp_path / "b", objective="classifier", **OPTIONS)
    assert same_rows(alone.dataset(), concentrate(pipe, None, 2, objective="classifier", **OPTIONS))
    assert alone.settings["options"]["method"]["objective"]["margin"] == 8.0
    quantile = QuantileTargets.from_dataset(real_images, pipe, draws=1, progress=False)
    options = {**OPTIONS, "method": Released(iterations=1)}
    released = concentrate_to_folder(pipe, quantile, 2, tmp_path / "c", **options)
    assert same_rows(released.dataset(), concentrate(pipe, quantile, 2, **options))


def test_every_option_is_recorded_and_gives_the_same_images(pipe, targets, tmp_path):
    result = concentrate_to_folder(pipe, targets, 2, tmp_path, **OPTIONS)
    recorded = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert recorded == result.settings and recorded["options"]["method"]["iterations"] == 1
    assert set(recorded["options"]) == {"eta", "num_inference_steps", "guidance_scale", "batch_size", "method"}
    rows = concentrate(
        pipe, targets, recorded["images_per_class"], seed=recorded["seed"], block_size=recorded["block_size"],
        images_per_call=recorded["images_per_call"], progress=False,
        method=Sampling(**recorded["options"]),
    )  # fmt: skip
    assert same_rows(rows, result.dataset())


def test_options_are_checked_before_any_work(pipe, targets, tmp_path):
    with pytest.raises(TypeError, match="There is no option `batchsize`. Nearest: 'batch_size'"):
        concentrate_to_folder(pipe, targets, 2, tmp_path / "run", batchsize=1)
    with pytest.raises(TypeError, match="no option `callback_on_step_end`"):
        concentrate_to_folder(pipe, targets, 2, tmp_path / "run", callback_on_step_end=print)
    with pytest.raises(ValueError, match="`cpu_threads` must be a whole number of at least 1, got 0"):
        RunSession(cpu_threads=0)
    with pytest.raises(ValueError, match="`images_per_class` must be"):
        concentrate_to_folder(pipe, targets, 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_number_of_threads_is_the_callers_again(pipe, targets, tmp_path, monkeypatch):
    before, draw, seen = torch.get_num_threads(), type(pipe).sample, set()

    def look(*arguments, **options):
        seen.add(torch.get_num_threads())
        return draw(*arguments, **options)

    monkeypatch.setattr(type(pipe), "sample", look)
    torch.set_num_threads(before + 2)
    try:
        concentrate_to_folder(pipe, targets, 1, tmp_path, **OPTIONS)
        assert seen == {1} and torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_progress_over_what_is_there(pipe, targets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown = {**OPTIONS, "progress": True}
    concentrate_to_folder(pipe, targets, 2, tmp_path, **shown)
    assert "6/6" in capsys.readouterr().err
    concentrate_to_folder(pipe, targets, 4, tmp_path, **shown)
    text = capsys.readouterr().err
    assert " 6/12" in text and "12/12" in text and "img/s" in text


def test_content_hashes(pipe, targets, make):

    assert (
        model_sha256(make.transformer()) == model_sha256(make.transformer()) != model_sha256(make.transformer(seed=1))
    )
    assert model_sha256(make.convnet()) != model_sha256(make.convnet(seed=4))
    classifier = make.convnet()
    before = model_sha256(classifier)
    classifier.config.image_mean = [0.25]
    assert model_sha256(classifier) != before  # other input, other features
    renamed = dataclasses.replace(targets, provenance={"dataset": "elsewhere"})
    moved = dataclasses.replace(targets, embeddings=targets.embeddings + 1e-6)
    assert targets_sha256(renamed) == targets_sha256(targets) != targets_sha256(moved)


def test_models_are_known_by_content_after_saving(pipe, targets, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    targets.save_pretrained(tmp_path / "targets")
    loaded = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    for name in ("transformer", "scheduler", "classifier"):
        assert model_sha256(getattr(loaded, name)) == model_sha256(getattr(pipe, name)), name
    assert targets_sha256(MatchingTargets.from_pretrained(tmp_path / "targets")) == targets_sha256(targets)


FAIL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from conftest import pixel_pipeline, striped_images, tiny_convnet
from dsco_hf import MatchingTargets, NOpt
from dsco_hf.concentration.runs import concentrate_to_folder
from dsco_hf.utils.processes import RunError

pipe = pixel_pipeline(classifier=tiny_convnet())
targets = MatchingTargets.from_dataset(striped_images(), pipe, features={}, embedding_dim=256, progress=False)
if sys.argv[3] != "none":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    concentrate_to_folder(
        pipe, targets, 4, sys.argv[1], num_inference_steps=4, guidance_scale=1.0, method=NOpt(start=0.0),
        block_size=2, images_per_call=2, progress=False,
    )
except RunError as error:  # a whole traceback is longer than a file may be
    sys.exit(f"RunError: {error}")
"""


def run_apart(folder, limit="none"):
    return run([sys.executable, "-c", FAIL, str(folder), str(ROOT / "tests"), str(limit)])


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of its own; only possible for the superuser."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
        if done.returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts need root")
def test_a_full_disk_and_a_read_only_one(small_disk, pipe, targets, tmp_path):
    disk = small_disk("40k")  # run.json, the log and a few units
    done = run_apart(disk / "run")
    assert done.returncode and "RunError: Cannot write to" in done.stderr and "the disk is full" in done.stderr
    folder = RunFolder(disk / "run")
    kept = folder.finished()
    assert 0 < len(kept) < 6 and not list(folder.units.glob(".*")) and folder.verify(sorted(kept)) == []
    subprocess.run(["mount", "-o", "remount,ro,size=1m", str(disk)], check=True)
    done = run_apart(disk / "run")
    assert done.returncode and "read-only" in done.stderr and folder.finished() == kept
    subprocess.run(["mount", "-o", "remount,rw,size=1m", str(disk)], check=True)
    shutil.copytree(disk / "run", tmp_path / "saved")
    result = concentrate_to_folder(pipe, targets, 4, tmp_path / "saved", **OPTIONS)
    assert result.finished and result.session["images"] == 12 - 2 * len(kept)
    assert same_rows(result.dataset(), concentrate(pipe, targets, 4, **OPTIONS))


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(pipe, targets, tmp_path):
    done = run_apart(tmp_path / "run", limit=2500)  # run.json fits, shards do not
    assert done.returncode and "RunError: Cannot write to" in done.stderr and "ulimit -f" in done.stderr
    assert not RunFolder(tmp_path / "run").finished()
    result = concentrate_to_folder(pipe, targets, 4, tmp_path / "run", **OPTIONS)
    assert same_rows(result.dataset(), concentrate(pipe, targets, 4, **OPTIONS))
