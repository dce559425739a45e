"""Bars that are rare off a terminal, what a run says at its beginning, and loading without the bars of others."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from dsco_hf.utils import progress
from dsco_hf.utils.progress import Bar, introduce, weights_in_silence


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns, for our bars and those of tqdm."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    return now


def lines(seconds, clock, *, total=None, write=False):
    """What a bar over as many steps as seconds writes to a file."""
    file = io.StringIO()
    with Bar(total=total or seconds, desc="Work", unit="img", file=file) as bar:
        for second in range(seconds):
            clock[0] += 1
            bar.update()
            if write and second % 7 == 0:
                bar.set_postfix(loss=second)
                Bar.write("beside", file=io.StringIO())
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()
    return file.getvalue().splitlines()


@pytest.mark.parametrize("write", [False, True])
def test_off_a_terminal_a_line_a_minute_and_one_at_the_end(clock, write):
    found = lines(150, clock, write=write)
    assert [line.split("|")[2].split()[0] for line in found] == ["60/150", "120/150", "150/150"]
    assert all(line.startswith("Work: ") and "1.00img/s" in line for line in found)
    assert len(lines(3, clock)) == 1 and lines(1, clock) == []  # what was short needs no line
    assert len(lines(5, clock, total=9)) == 1  # cut off


def test_a_bar_inside_of_another_draws_over_nothing(clock):
    file = io.StringIO()
    for _ in Bar(range(2), desc="outer", file=file):
        for _ in Bar(range(40), desc="inner", file=file):
            clock[0] += 1
    assert [line.split(":")[0] for line in file.getvalue().splitlines()] == ["inner", "inner", "outer"]
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_on_a_terminal_it_is_drawn_at_once(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar(total=2, file=(file := io.StringIO())) as bar:
        bar.update(2)
    assert file.getvalue().count("\r") >= 2 and "2/2" in file.getvalue()


def test_a_bar_that_is_not_shown_says_nothing(clock):
    with Bar(range(500), disable=True, file=(file := io.StringIO())) as bar:
        for _ in bar:
            clock[0] += 1
    assert file.getvalue() == ""


def test_a_run_begins_with_one_line(capsys):
    introduce(Accelerator(cpu=True), "photos", images=1437, classes=1000, size=64)
    introduce(None, "set", classes=2)
    several = SimpleNamespace(is_main_process=True, num_processes=4, device=torch.device("cpu", 0))
    introduce(several, "photos", images=1, classes=1)
    introduce(SimpleNamespace(is_main_process=False), "photos", classes=2)
    assert capsys.readouterr().out.splitlines() == [
        "photos: 1,437 images of 1,000 classes, 64 px, on cpu.",
        "set: 2 classes.",
        "photos: 1 images of 1 classes, on cpu (4 processes).",
    ]


def test_weights_are_loaded_and_saved_without_bars(make, tmp_path, capfd):
    """Those of transformers, which come back afterwards, also after an error."""
    make.resnet().save_pretrained(tmp_path)
    kind = type(make.resnet())
    capfd.readouterr()
    with weights_in_silence():
        kind.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError), weights_in_silence():
        kind.from_pretrained(tmp_path / "nothing")
    assert transformers_logging.is_progress_bar_enabled()
