"""What the options of a search load, the accepted set with its synthetic images, and the planned cost."""

import pytest
from accelerate import Accelerator
from datasets import ClassLabel

from dsco_hf.concentration.additions.doping import select
from dsco_hf.data.datasets import load_digits_dataset
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.studies.lossless.options import SearchOptions, accepted_rows
from dsco_hf.studies.lossless.planned import plan_search, planned_table
from dsco_hf.studies.lossless.search import SearchPlan
from dsco_hf.utils.configs import parse_config
from recipes import plan


GIVEN = {"num_channels": 1, "train_split": "train[:64]", "steps": 20, "batch_size": 32, "architecture": "convnet-2",
         "model_options": '{"width": 8}'}  # fmt: skip


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A folder with two images of every class, which it numbers the other way round."""
    digits = load_digits_dataset()["train"]
    few = select(digits, "random", images_per_class=2, progress=False)
    features = few.features.copy()
    features["label"] = ClassLabel(names=digits.features["label"].names[::-1])
    folder = tmp_path_factory.mktemp("synthetic")
    return save_dataset_folder(few.map(lambda row: {"label": 9 - row["label"]}).cast(features), folder / "set")


def test_a_synthetic_set_at_the_head_of_the_accepted_one(synthetic):
    given = SearchOptions(**GIVEN, synthetic=str(synthetic), strategy="k_center").load()
    assert given.rule.name == "k_center" and given.rule.features == "pixels"
    assert given.small is not None and sorted(given.small.labels.tolist()) == sorted(list(range(10)) * 2)
    rows = accepted_rows(given, [5, 3])
    assert len(rows) == 22 and rows["source"] == [0] * 20 + [1] * 2 and rows["real_index"] == [-1] * 20 + [5, 3]
    assert rows["label"][:20] == given.small.labels.tolist()  # by name
    assert rows["label"][20:] == given.real.labels[[5, 3]].tolist()
    alone = accepted_rows(SearchOptions(**GIVEN).load(), [5, 3])
    assert alone["source"] == [1, 1] and alone["real_index"] == [5, 3]


@pytest.mark.slow
def test_a_rule_that_goes_by_a_logged_training_logs_one(tmp_path):
    options = SearchOptions(**GIVEN, strategy="aum", image_size=4, output_dir=str(tmp_path))
    given = options.load()  # 20 steps are 10 epochs of 64 images
    assert given.real.pixels.shape[-1] == 4
    assert given.rule.training.margins.shape == (10, 64) and (tmp_path / "log").is_dir()
    assert options.load().rule.training.sha256 == given.rule.training.sha256  # it is read again


def test_the_defaults_are_those_that_were_calibrated():
    assert SearchOptions().plan == SearchPlan()


def test_the_planned_cost_of_a_search():
    options = SearchOptions(**GIVEN, reference_seeds=4, trainings=8)
    found = plan_search(options, [1, 2], Accelerator(cpu=True))
    assert found["trainings"] == {"reference": 4, "half as long": 2, "fewer images": 8} and found["steps"] == 20
    each = found["seconds_per_training"]
    assert found["seconds"][1] == pytest.approx((4 + 1 + 3 + 5) * each)
    assert found["seconds"][2] == pytest.approx((2 + 0.5 + 2 + 4) * each)
    assert "Up to 12 trainings: 4 on all 64 images" in planned_table(found) and "| 2 |" in planned_table(found)


def test_a_search_is_planned_alone(tmp_path):
    config = tmp_path / "search.yaml"
    config.write_text("".join(f"{name}: {value!r}\n" for name, value in GIVEN.items()), encoding="utf-8")
    with pytest.raises(ValueError, match="plans trainings on this machine: leave `--preset`"):
        plan.main(["--search_config", str(config), "--preset", "imagenet1k"])
    assert plan.main(["--search_config", str(config)])["steps"] == 20
    assert parse_config(SearchOptions, ["--config", str(config)]).plan.looks == 2
