"""The steps of a call: which steps are optimised, and how far each moves the noise."""

import pytest
from diffusers import DDIMScheduler

from dsco_hf import NOpt
from dsco_hf.sampling.methods.nopt import optimized_steps


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
    method = NOpt(start=0.6, stop=0.85, step_size=2.0, step_decay=0.25)
    assert method.steps(20) == range(12, 17)
    assert [method.step_size_at(i, 20) for i in range(12, 17)] == pytest.approx([2.0, 1.625, 1.25, 0.875, 0.5])
    assert NOpt(start=0.6, stop=0.8, step_size=2.0).steps(5) == range(3, 4)
    assert NOpt(start=0.6, stop=0.8, step_size=2.0).step_size_at(3, 5) == 2.0


def test_a_cosine_schedule_draws_finite_images_with_few_steps(pipe):
    pipe.scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type="v_prediction"
    )
    images = pipe.sample([0], seeds=[0], num_inference_steps=5, guidance_scale=1.0).images
    assert images.isfinite().all()
