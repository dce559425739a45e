import pytest

from recipes.benchmarks import bad_inputs


@pytest.mark.slow
def test_nothing_is_silently_wrong():
    figures = bad_inputs.main([])
    assert figures["silent"] == figures["unclear"] == 0, figures["failures"]
    assert figures["inputs"] == figures["right"] + figures["clear_error"] >= 150
