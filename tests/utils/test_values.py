import dataclasses
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from dsco_hf import MatchingTargets, build_evaluator, get_protocol
from dsco_hf.utils.values import Limits, check_choice, check_real, check_whole, plain, plain_arguments, plain_fields


INTEGERS = [np.int8, np.uint8, np.int32, np.int64, np.array, torch.tensor, int]
REALS = [np.float64, np.array, lambda x: torch.tensor(x, dtype=torch.float64), float]
NO_NUMBERS = [True, np.bool_(True), torch.tensor(True), "3", None, [3], np.array([3]), torch.tensor([3]), 2 + 0j]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(number=st.integers(0, 127), kind=st.sampled_from(INTEGERS))
def test_whole_numbers_of_every_library(number, kind):
    found = check_whole("n", kind(number))
    assert type(found) is int and found == number


@settings(max_examples=30, deadline=None, derandomize=True)
@given(number=st.floats(-1e9, 1e9), kind=st.sampled_from(REALS))
def test_real_numbers_of_every_library(number, kind):
    found = check_real("x", kind(number))
    assert type(found) is float and found == number


def test_what_stays_as_it_is():
    assert type(check_real("x", 4)) is int  # a record of today says 4, not 4.0
    assert check_real("x", Fraction(1, 4)) == 0.25
    assert check_whole("n", 10**30) == 10**30


@pytest.mark.parametrize("value", [*NO_NUMBERS, 2.5, math.nan, math.inf, np.float32(2.5), Decimal(2)])
def test_no_whole_numbers(value):
    with pytest.raises(ValueError, match="^`n` must be a whole number of at least 1, got "):
        check_whole("n", value, 1)


@pytest.mark.parametrize(
    "value", [*NO_NUMBERS, math.nan, -math.inf, np.float32("nan"), torch.tensor(math.inf), 10**400]
)
def test_no_real_numbers(value):
    with pytest.raises(ValueError, match="^`x` must be a finite number, got "):
        check_real("x", value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: check_whole("n", "3"),
            "`n` must be a whole number, got '3', which is text: write the number without",
        ),
        (lambda: check_whole("n", True), "`n` must be a whole number, got True, which is no number."),
        (lambda: check_whole("n", 10.0, 1), "`n` must be a whole number of at least 1, got 10.0: write 10."),
        (lambda: check_whole("n", -1, 0, 5), "`n` must be a whole number from 0 to 5, got -1."),
        (lambda: check_whole("n", [1]), "`n` must be a whole number, got [1]: one number is needed."),
        (lambda: check_real("x", 1.5, 0, 1), "`x` must be a number from 0 to 1, got 1.5."),
        (lambda: check_real("x", 0, 0, open_low=True), "`x` must be a finite number above 0, got 0."),
        (lambda: check_choice("c", 3, ["a", "b"]), "`c` must be one of ['a', 'b'], got 3."),
    ],
)
def test_the_error_says_what_to_write(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)


def test_plain_values_are_those_of_json():
    values = {
        np.int64(3): np.float64(0.5), "list": (np.int32(1), torch.tensor(2)), "array": np.arange(2),
        "flag": np.bool_(True), "name": "a", "none": None, "numpy name": np.str_("b"),
    }  # fmt: skip
    expected = {"3": 0.5, "list": [1, 2], "array": [0, 1], "flag": True, "name": "a", "none": None, "numpy name": "b"}
    assert json.loads(json.dumps(plain(values))) == expected


@plain_arguments(count=1)
def function(count: "int", *, share: "float | None" = None, seed: "int" = 0, flag: "bool" = False, **rest: "int"):
    return count, share, seed, flag, rest


def test_arguments_are_plain():
    found = function(np.int64(2), share=torch.tensor(0.5), seed=np.uint8(7), flag=np.bool_(True), other=np.int64(1))
    assert found == (2, 0.5, 7, True, {"other": 1})
    assert [type(value) for value in found[:4]] == [int, float, int, bool]
    assert function(1, share=None)[1] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "`count` must be a whole number of at least 1, got 0"),
        ({"count": 1, "seed": -1}, "`seed` must be a whole number from 0 to 9223372036854775807, got -1"),
        ({"count": 1, "share": math.nan}, "`share` must be a finite number, got nan"),
        ({"count": 1, "flag": "false"}, "`flag` must be True or False, got 'false'"),
        ({"count": 1, "flag": None}, "`flag` must be True or False, got None"),
    ],
)
def test_arguments_that_are_no_numbers(given, message):
    with pytest.raises(ValueError, match=message):
        function(**given)


def test_fields_are_plain():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        steps: int
        rate: "float | None"
        names: "tuple[int, ...]" = ()
        field_limits = {"steps": 1, "rate": Limits(0, 1, open_low=True)}

        def __post_init__(self):
            plain_fields(self)

    found = Settings(np.int64(2), np.float64(0.5), (1,))
    assert json.dumps(dataclasses.asdict(found)) == '{"steps": 2, "rate": 0.5, "names": [1]}'
    with pytest.raises(ValueError, match="`steps` must be a whole number of at least 1, got True"):
        Settings(True, None)
    with pytest.raises(ValueError, match="`rate` must be a finite number above 0 and at most 1, got 0"):
        Settings(1, 0.0)


def test_fields_that_a_command_line_parser_has_read():
    @dataclasses.dataclass
    class Settings:
        size: int | None = None

        def __post_init__(self):
            plain_fields(self)

    HfArgumentParser(Settings)  # which changes the types of the fields
    assert Settings().size is None and Settings(np.int64(3)).size == 3


def test_numbers_of_numpy_in_everything_that_is_saved(pipe, targets, tmp_path):
    model = build_evaluator(
        "convnet-2", class_names=["a", "b"], image_size=np.int64(8), num_channels=np.int32(1), width=np.int64(4),
        seed=np.uint8(3),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["width"] == 4
    targets.provenance["seconds"], targets.bandwidth = np.float32(0.5), torch.tensor(2.0)
    targets.save_pretrained(tmp_path / "targets")
    loaded = MatchingTargets.from_pretrained(tmp_path / "targets")
    assert loaded.provenance["seconds"] == 0.5 and loaded.bandwidth == 2.0
    protocol = get_protocol("quick", steps=np.array([[10, 3]])[0, 1], learning_rate=np.float64(0.1))
    assert (type(protocol.steps), type(protocol.learning_rate)) == (int, float)
    plain_run = pipe([0, 1], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt")
    same_run = pipe(
        np.array([0, 1]), generator=torch.Generator().manual_seed(0), num_inference_steps=np.int64(2),
        guidance_scale=np.float64(4.0), eta=torch.tensor(1.0), output_type="pt",
    )  # fmt: skip
    assert torch.equal(plain_run.images, same_run.images)


@pytest.mark.parametrize("label", [True, 1.5, math.nan, None])
def test_what_is_no_class(pipe, label):
    with pytest.raises(ValueError, match="must be a whole number, got"):
        pipe.get_label_ids([label])
