"""What 5276f27 wrote and drew (`recorded/make.py`): later versions read it, and draw the same."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset

from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    QuantileTargets,
    concentrate_and_report,
    concentrate_to_folder,
    load_digits_dataset,
    load_recorded,
    read_concentration,
)
from dsco_hf.concentration.records import record_parameters
from dsco_hf.hub.verification import verify_folder
from dsco_hf.sampling.flat import from_flat


RECORDED = Path(__file__).parents[1] / "recorded"
FACTS = json.loads((RECORDED / "facts.json").read_text())
RUN = {"num_inference_steps": 6, "guidance_scale": 1.0, "seed": 3, "optimize_from": 0.0, "block_size": 2}


def pixels(dataset):
    return np.stack([np.asarray(image) for image in dataset["image"]])


@pytest.fixture(scope="module")
def pipe():
    pipe = DsCoPipeline.from_pretrained(RECORDED / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def targets(pipe):
    return {
        "rkhs": MatchingTargets.from_pretrained(RECORDED / "targets"),
        "data-free": MatchingTargets.from_pretrained(RECORDED / "targets_data_free"),
        "quantile": QuantileTargets.from_dataset(load_digits_dataset()["train"], pipe, progress=False),
        "none": None,
    }


SETS = [pytest.param(name, marks=[pytest.mark.slow] * (name == "quantile")) for name in FACTS["sets"]]


@pytest.mark.parametrize("name", SETS)
def test_images_calls_and_discrepancies_are_those_of_then(name, pipe, targets):
    facts = FACTS["sets"][name]
    matched = {"plain": "none", "classifier": "none", "rkhs-contrast": "rkhs", "ridge": "rkhs"}.get(name, name)
    rows, report = concentrate_and_report(pipe, targets[matched], 3, **from_flat(facts["options"]))
    drawn, expected = pixels(rows), np.load(RECORDED / "images.npz")[name]
    assert np.abs(drawn.astype(int) - expected).max() <= 2  # of 255: other processors round otherwise
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    if here == {key: FACTS["environment"][key] for key in here}:
        assert hashlib.sha256(drawn.tobytes()).hexdigest() == facts["sha256"]
    assert [report.denoiser_calls, report.decoder_calls, report.classifier_calls] == facts["calls"]
    if facts["discrepancy"] is not None:
        assert report.discrepancy == pytest.approx(facts["discrepancy"], rel=1e-3)


def test_a_run_of_then_is_finished_and_grows(pipe, targets, tmp_path):
    shutil.copytree(RECORDED / "run", tmp_path / "run")
    options = from_flat({**RUN, "images_per_call": 10, "progress": False})
    finished = concentrate_to_folder(pipe, targets["rkhs"], 2, tmp_path / "run", **options)
    assert finished.finished and finished.session["images"] == 0
    grown = concentrate_to_folder(pipe, targets["rkhs"], 4, tmp_path / "run", **options)
    assert grown.session["images"] == 20
    first = grown.dataset().filter(lambda block: block == 0, input_columns="block")
    assert np.array_equal(pixels(first), pixels(finished.dataset()))


def test_a_dataset_of_then_is_verified_and_read():
    record = verify_folder(RECORDED / "dataset")
    assert read_concentration(RECORDED / "dataset") == record
    rows = load_dataset(str(RECORDED / "dataset"), "ipc2", split="train")
    assert rows.num_rows == 20 and rows.features["label"].names == [str(digit) for digit in range(10)]
    assert np.abs(pixels(rows)[::2].astype(int) - np.load(RECORDED / "images.npz")["rkhs"][::3]).max() <= 2


def test_a_set_of_then_is_drawn_again_from_its_record(monkeypatch):
    monkeypatch.chdir(RECORDED.parent)  # the record names the pipeline by a path relative to it
    pipe, targets, record = load_recorded("recorded/dataset", "ipc2")
    pipe.set_progress_bar_config(disable=True)
    again, _ = concentrate_and_report(pipe, targets, seed=record["seed"], **record_parameters(record), progress=False)
    published = load_dataset("recorded/dataset", "ipc2", split="train")
    assert np.abs(pixels(again).astype(int) - pixels(published)).max() <= 2
