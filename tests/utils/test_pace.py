from datetime import datetime

import pytest
import torch
from accelerate import Accelerator

from dsco_hf.utils import progress as pace
from dsco_hf.utils.progress import Pace, remaining


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def network():
    return torch.nn.Linear(4, 3)  # 15 parameters


def test_says_device_size_steps_and_after_ten_of_them_the_pace_and_the_end(clock, capsys):
    meter = Pace(network(), total=1000, done=200, accelerator=Accelerator(cpu=True))
    assert capsys.readouterr().out == "Training 15 parameters on cpu (float32), 800 of 1,000 steps to go.\n"
    known = []
    for step in range(201, 213):
        clock[0] += 30.0 if step == 201 else 0.5  # the first one warms up
        known.append(meter(step))
    assert known == [False] * 9 + [True, False, False] and meter.seconds_per_step == 0.5
    assert capsys.readouterr().out.startswith("0.5 s a step: 7 min left, until ")  # 790 x 0.5 s = 395 s
    assert meter.steps_in(60) == 120 and meter.steps_in(0.1) == 1


def test_a_training_of_fewer_than_ten_steps_has_no_pace(clock, capsys):
    meter = Pace(network(), total=9, done=0, accelerator=Accelerator(cpu=True), shown=False)
    assert not any(meter(step) for step in range(1, 10)) and meter.seconds_per_step is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59, "59 s left, until 22:00"), (3600, "60 min left, until 22:59"), (9000, "2.5 h left, until Fri 27 Nov 00:29")],
)
def test_the_end_as_a_length_and_a_time(seconds, text):
    assert remaining(seconds, datetime(2026, 11, 26, 21, 59, 1)) == text
