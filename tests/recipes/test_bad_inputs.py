import pytest
from huggingface_hub import constants

from recipes.benchmarks import bad_inputs


@pytest.mark.slow
def test_nothing_is_silently_wrong():
    figures = bad_inputs.main([])
    assert figures["silent"] == figures["unclear"] == 0, figures["failures"]
    assert figures["inputs"] == figures["right"] + figures["clear_error"] >= 150


@pytest.mark.parametrize("kind", ["settings", "published"])
def test_settings_and_records_have_their_right_value_or_a_clear_error(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    judged = {item.name: bad_inputs.judge(item) for item in bad_inputs.KINDS[kind](tmp_path)}
    assert len(judged) >= 30
    assert {name: said for name, said in judged.items() if said[0] not in ("right", "clear_error")} == {}
