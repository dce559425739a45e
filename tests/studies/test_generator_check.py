import json
import logging
from pathlib import Path

import pytest
import torch

from dsco_hf import DsCoPipeline, check_generator, concentrate, load_digits_dataset
from dsco_hf.studies.generator_check import GeneratorCheck


RECORDED = Path(__file__).parents[1] / "recorded" / "pipeline"


@pytest.fixture(scope="module")
def digits_pipe():
    """A small generator of the digits that was trained, and a classifier that knows them."""
    pipe = DsCoPipeline.from_pretrained(RECORDED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_is_found_of_samples_and_of_real_images(digits_pipe):
    real = load_digits_dataset()["test"]
    check = check_generator(digits_pipe, real, num_inference_steps=10)
    assert check.samples == 40 and list(check.shares) == [str(digit) for digit in range(10)]
    assert check.accuracy_real > check.accuracy > check.chance == 0.1 and check.frechet_distance > 0
    assert check == check_generator(digits_pipe, real, num_inference_steps=10)
    assert "plain samples, of real images" in str(check)
    assert GeneratorCheck(**json.loads(json.dumps(vars(check)))) == check


LEVELS = [(0.9, 0.97, False), (0.6, 0.97, False), (0.5, 0.97, True), (0.5, None, True), (0.6, None, False)]


@pytest.mark.parametrize(("accuracy", "real", "doubtful"), LEVELS)
def test_the_level_is_half_of_the_way_from_chance_to_real_images(accuracy, real, doubtful):
    assert GeneratorCheck(accuracy, real, {}, None, 40, 0.1).doubtful == doubtful


def test_noise_is_warned_of(digits_pipe, caplog):
    pipe = DsCoPipeline.from_pretrained(RECORDED)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.copy_(0.02 * torch.randn_like(parameter))
    check = check_generator(pipe, num_inference_steps=10)
    assert check.doubtful and check.accuracy < 0.4 and check.accuracy_real is None and check.frechet_distance is None
    assert "hardly better than noise" in caplog.text


def test_a_classifier_that_cannot_say_is_not_asked(digits_pipe, pipe, make):
    assert check_generator(make.pipe()) is None
    pipe.register_modules(classifier=make.convnet(names=("cat", "dog", "cow")))
    assert check_generator(pipe) is None
    one = check_generator(digits_pipe, class_labels=[3], images_per_class=1, num_inference_steps=2)
    assert one.samples == 1 and list(one.shares) == ["3"]
    few = check_generator(digits_pipe, most=3, num_inference_steps=2)
    assert few.samples == 3 and list(few.shares) == ["0", "4", "9"]


@pytest.mark.parametrize(
    ("options", "said"), [({}, True), ({"method": "plain"}, False), ({"objective": "classifier"}, False)]
)
def test_plain_samples_are_not_drawn_silently(options, said, pipe, caplog):
    caplog.set_level(logging.WARNING)
    concentrate(pipe, None, 1, num_inference_steps=2, guidance_scale=1.0, progress=False, **options)
    assert ("plain samples are drawn" in caplog.text) == said
