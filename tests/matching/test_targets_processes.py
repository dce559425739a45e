"""Targets in several processes, and passes that are killed and continued."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset

from dsco_hf import MatchingTargets
from dsco_hf.matching.files import PASS_NAME
from dsco_hf.utils.files import locked
from dsco_hf.utils.processes import RunError
from launches import LAUNCHER, launch_environment
from launches import run as run_command
from targets_worker import CASES, DRAWN, SMALL, made_from_dataset, sorted_images


TESTS = Path(__file__).parents[1]
TENSORS = ("embeddings", "counts", "feature_mean", "feature_std", "frequencies", "second_moment")


def assert_same(a, b, tolerance=1e-6):
    assert (a.class_names, a.class_labels) == (b.class_names, b.class_labels)
    assert a.bandwidth == pytest.approx(b.bandwidth, rel=tolerance)
    for name in TENSORS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=tolerance, rtol=tolerance)


def run(*arguments, processes=1):
    """Runs the worker as a process of its own, or as several of them that `accelerate launch` connects."""
    command = [*LAUNCHER, "--multi_gpu", "--num_processes", str(processes)] if processes > 1 else [sys.executable]
    command += [str(TESTS / "targets_worker.py"), *map(str, arguments)]
    return run_command(command, env=launch_environment())


class CountedCalls:
    """Images that pass through a classifier."""

    def __init__(self, classifier):
        self.images = 0
        classifier.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.images += len(inputs[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Targets of all cases, made by two processes; one of them from a pass that a single process was killed in."""
    folder = tmp_path_factory.mktemp("targets")
    killed = run(folder / "work", "--die_after", 4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = sorted(path.name.split(".")[0] for path in (folder / "work").glob("features-*"))
    done = run(folder, processes=2)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_targets_of_one(folder, pipe, case):
    both = [MatchingTargets.from_pretrained(folder[0] / f"{case}-{process}") for process in range(2)]
    assert_same(both[0], both[1], tolerance=0)
    # streams are divided into other batches there, and the untrained network normalises flat images: 1e-7 grows
    assert_same(both[0], CASES[case](pipe), tolerance=1e-5)
    assert both[0].counts.sum() > 0 and both[0].embeddings.norm(dim=1).min() > 0.1


@pytest.mark.slow
def test_a_pass_that_was_killed_goes_on_in_two_processes(folder):
    work, found = folder[0] / "work", folder[1]
    # four batches reach the classifier after its probe; each is a unit, stored when the next one begins
    assert 1 <= len(found) <= 4
    names = {path.name.split(".")[0] for path in work.glob("features-*")}
    assert set(found) < names and len(names) == 11 and not list(work.glob(".*.partial"))


def test_units_that_are_there_are_not_made_again(pipe, tmp_path):
    first = made_from_dataset(pipe, work_dir=tmp_path)
    files = sorted(tmp_path.glob("features-*"))
    assert len(files) == 11
    files[3].unlink()
    files[5].write_bytes(files[5].read_bytes()[:-1] + b"x")
    (tmp_path / ".features-x.partial").write_bytes(b"half")
    counted = CountedCalls(pipe.classifier)
    again = made_from_dataset(pipe, work_dir=tmp_path)
    assert counted.images == 2 + 2 * 2  # the probe and the two units
    assert_same(first, again, tolerance=0)
    assert sorted(tmp_path.glob("features-*")) == files and not list(tmp_path.glob(".*.partial"))
    other = made_from_dataset(pipe, work_dir=tmp_path, seed=1)
    assert counted.images == 6 + 2 and not torch.equal(other.frequencies, first.frequencies)


@pytest.mark.slow
def test_a_stream_that_breaks_off_is_continued_where_it_was(pipe, tmp_path):
    rows, broken = sorted_images(), []

    def produce():
        for number, row in enumerate(rows):
            if broken and number == broken[0]:
                raise ConnectionError("the line is dead")
            yield row

    stream = IterableDataset.from_generator(produce, features=rows.features)
    options = {"batch_size": 250, "work_dir": tmp_path, **SMALL}  # units of two batches
    rows = rows.select([index for index in range(len(rows)) for _ in range(50)])  # 900 rows
    broken.append(800)
    with pytest.raises(ConnectionError):
        MatchingTargets.from_dataset(stream, pipe, **options)
    assert len(list(tmp_path.glob("features-*"))) == 1
    broken.clear()
    counted = CountedCalls(pipe.classifier)
    targets = MatchingTargets.from_dataset(stream, pipe, **options)
    assert counted.images == 2 + 900 - 500
    assert_same(targets, MatchingTargets.from_dataset(rows, pipe, batch_size=250, **SMALL))


def test_a_generator_pass_continues(pipe, tmp_path):
    first = MatchingTargets.from_generator(pipe, ["square", 0], work_dir=tmp_path, **DRAWN)
    files = sorted(tmp_path.glob("features-*"))
    assert len(files) == 6  # five samples of two classes, two at a time
    files[4].unlink()
    drawn, sample = [], pipe.sample
    pipe.sample = lambda labels, **options: drawn.append(labels) or sample(labels, **options)
    again = MatchingTargets.from_generator(pipe, ["square", 0], work_dir=tmp_path, **DRAWN)
    assert drawn == [[0, 0]]
    assert_same(first, again, tolerance=0)


def test_a_folder_of_another_pass_is_refused_and_the_difference_named(pipe, make, tmp_path):
    made_from_dataset(pipe, work_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"another pass; these differ: dataset_fingerprint: .*Choose another `work_dir`"
    ):
        MatchingTargets.from_dataset(make.images((3, 3, 3)), pipe, batch_size=2, work_dir=tmp_path, **SMALL)
    other = make.pipe(classifier=make.convnet(seed=5))
    with pytest.raises(ValueError, match=r"differ: networks.0: .* there, .* now\."):
        made_from_dataset(other, work_dir=tmp_path)
    with pytest.raises(ValueError, match="differ: population: .*batch_size: 2 there, 3 now"):
        MatchingTargets.from_generator(pipe, work_dir=tmp_path, **{**DRAWN, "batch_size": 3})
    (tmp_path / PASS_NAME).write_text("{")
    with pytest.raises(ValueError, match=f"{PASS_NAME} is damaged"):
        made_from_dataset(pipe, work_dir=tmp_path)
    (tmp_path / PASS_NAME).unlink()
    with pytest.raises(ValueError, match=f"holds features but no {PASS_NAME}"):
        made_from_dataset(pipe, work_dir=tmp_path)


def test_one_pass_at_a_time_in_a_folder(pipe, tmp_path):
    with locked(tmp_path), pytest.raises(RunError, match="Another run is at work on"):
        made_from_dataset(pipe, work_dir=tmp_path)
    made_from_dataset(pipe, work_dir=tmp_path)


def test_a_folder_that_cannot_be_written_to_is_explained(pipe, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsco_hf.utils.files.os.fsync", full)
    with pytest.raises(RunError, match="the disk is full; free some space, and run the same command again"):
        made_from_dataset(pipe, work_dir=tmp_path)
    assert not list(tmp_path.glob("features-*")) and not list(tmp_path.glob(".*.partial"))
