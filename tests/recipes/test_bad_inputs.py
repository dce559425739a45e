import logging
import warnings

import pytest
from huggingface_hub import constants

from recipes.benchmarks import bad_inputs


SLOW = ("damaged", "doors", "dtypes", "folders", "kept_names", "numbers", "others", "state")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in bad_inputs.KINDS]
)
def test_inputs_have_their_right_value_or_a_clear_error(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with warnings.catch_warnings(action="ignore"):
        judged = {item.name: bad_inputs.judge(item) for item in bad_inputs.KINDS[kind](tmp_path)}
    assert judged
    assert {name: said for name, said in judged.items() if said[0] not in ("right", "clear_error")} == {}


def test_the_figures_count_all(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    try:
        figures = bad_inputs.main(["--kinds", "settings", "published"])
    finally:
        logging.disable(logging.NOTSET)
    assert figures["silent"] == figures["unclear"] == 0, figures["failures"]
    assert figures["inputs"] == figures["right"] + figures["clear_error"] >= 60
