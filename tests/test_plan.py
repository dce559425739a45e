"""The plan of a call: which steps are optimised, and how far each moves the noise."""

import pytest

from dsco_hf.objectives import ClassifierObjective
from dsco_hf.plan import NoisePlan, optimized_steps


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((20, 0.6, 1.0), range(12, 19)),
        ((20, 0.0, 1.0), range(19)),
        ((20, 0.0, 0.5), range(10)),
        ((1, 0.0, 1.0), range(0)),
    ],
)
def test_the_last_step_is_never_optimised(arguments, expected):
    assert optimized_steps(*arguments) == expected


def test_updates_fall_evenly_from_coarse_to_fine():
    plan = NoisePlan("rkhs", None, 1, 2.0, "conditional", ClassifierObjective(), step_decay=0.25)
    assert plan.step_size_at(7) == 2.0  # no steps are known yet
    plan.steps = range(12, 17)
    assert [plan.step_size_at(i) for i in plan.steps] == pytest.approx([2.0, 1.625, 1.25, 0.875, 0.5])
    plan.steps = range(3, 4)
    assert plan.step_size_at(3) == 2.0
