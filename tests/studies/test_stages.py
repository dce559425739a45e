"""Sets by name, what evaluators reach on them, and the rows of results.json."""

import pytest
import torch
from accelerate import Accelerator

from conftest import NAMES, striped_images
from dsco_hf import Herding, Pool, get_protocol
from dsco_hf.concentration.doping import selected_rows
from dsco_hf.evaluators import load_image_set
from dsco_hf.studies.plans import StudyPlan, set_name, set_parts
from dsco_hf.studies.stages import (
    Clock,
    draw_study_samples,
    evaluate_sets,
    full_row,
    load_study_images,
    random_beside,
    read_results,
    real_baselines,
    result_rows,
    study_discrepancies,
    untrained_network,
)


QUICK = get_protocol("quick", steps=2, image_size=8)


@pytest.fixture
def train():
    return load_image_set(striped_images(), protocol=QUICK, num_channels=1)


def test_names_of_sets():
    assert set_name("nopt+doping", 20, 3) == "nopt+doping-ipc20-seed3"
    assert set_parts("nopt-data-free-ipc1-seed0") == ("nopt-data-free", 1, 0)


def test_a_plan_says_what_is_drawn_of_what():
    plan = StudyPlan(budgets=[1, 10], objective=["ridge", "rkhs"], clearest_share=[0.2, 1], contrast=[3],
                     step_size=0.5, methods=["nopt", "plain", "nopt-quantile"], doping_budgets=[12],
                     guidance_scale=2)  # fmt: skip
    assert plan.set_names()[:3] == ["nopt-quantile-ipc10-seed0", "nopt-ipc10-seed0", "nopt-ipc10-seed1"]
    assert plan.doped_names() == {f"nopt+doping-ipc12-seed{seed}": f"nopt-ipc10-seed{seed}" for seed in (0, 1)}
    population, options = plan.drawing("nopt", 1)
    assert population == "clearest-0.2" and options["objective"] == "ridge" and options["regularization"] == 2.0
    assert "contrast" not in options and (options["step_size"], options["guidance_scale"]) == (0.5, 2)
    assert plan.drawing("nopt", 10)[0] == "real" and plan.drawing("nopt", 10)[1]["contrast"] == 3
    assert plan.drawing("plain", 1)[0] is None and plan.drawing("plain", 1)[1]["optimization_steps"] == 0
    assert plan.drawing("nopt-quantile", 1)[1]["optimization_steps"] == 200
    assert plan.pivots == {"draws": 1, "counts": [1, 10]} and plan.sizes == [1, 10, 12]
    assert plan.matched == {"features": {}, "second_moment": True} and plan.templates["guidance_scale"] == 2


def test_real_baselines_are_nested_and_of_as_many_images(train, make):
    found = real_baselines(train, [1, 3], random_seeds=2, classifier=make.convnet())
    assert list(found) == [
        f"{method}-ipc{budget}-seed{seed}"
        for budget in (1, 3)
        for method, seed in (("herding", 0), ("random", 0), ("random", 1))
    ]
    rows = selected_rows(Pool(train), Herding(features=make.convnet()), images_per_class=3).view(3, 3)
    assert torch.equal(found["herding-ipc1-seed0"].pixels, train.pixels[rows[:, 0]])
    assert found["random-ipc3-seed1"].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_rows_have_random_real_images_beside_them():
    job = {"accuracy": 0.5, "accuracy_best": None, "seconds": 1.0, "images_per_second": 1.0}
    sizes = {"random-ipc1-seed0": 3, "random-ipc1-seed1": 3, "nopt-ipc1-seed0": 3, "nopt-ipc2-seed0": 6}
    discrepancies = dict(zip(sizes, (0.4, 0.6, 0.1, 0.05), strict=True))
    assert random_beside(discrepancies) == dict.fromkeys(list(sizes)[:3], 0.5)
    jobs = {name: [{**job, "seed": seed} for seed in (0, 1)] for name in sizes}
    rows = result_rows(sizes, jobs, discrepancies, {"nopt-ipc1-seed0": {"seconds": 2.0, "denoiser_calls": 7}})
    assert [(row["method"], row["images_per_class"]) for row in rows] == [("nopt", 1), ("random", 1), ("nopt", 2)]
    assert [row["random_discrepancy"] for row in rows] == [0.5, 0.5, None]
    assert (rows[0]["discrepancy"], rows[1]["discrepancy"]) == (0.1, 0.5)
    assert (rows[0]["seconds"], rows[0]["denoiser_calls"], rows[1]["seconds"]) == (2.0, 7, 0.0)
    assert (rows[1]["synthesis_seeds"], rows[1]["training_seeds"]) == (2, 2) and len(rows[1]["accuracies"]) == 4
    full = full_row(jobs["nopt-ipc1-seed0"], 21)
    assert (full["seeds"], full["images"], full["accuracy_mean"]) == (2, 21, 0.5)


def test_sets_are_evaluated_once_by_all_processes_and_not_after_the_end(train, tmp_path):
    accelerator, sets = Accelerator(), {"a": train, "b": train.select(torch.arange(12))}
    shared = {"training_seeds": 2, "folder": tmp_path, "accelerator": accelerator, "architecture": "convnet-1",
              "protocol": QUICK, "overrides": {"width": 2}}  # fmt: skip
    over = evaluate_sets(sets, train, clock=Clock(accelerator, 0.0), rank=0, world=1, **shared)
    assert not list(tmp_path.iterdir()) and [path.name for path in over["a"]] == ["a-run0.json", "a-run1.json"]
    for rank in (0, 1):
        files = evaluate_sets(sets, train, clock=Clock(accelerator), rank=rank, world=2, **shared)
        assert len(list(tmp_path.iterdir())) == 2 * (rank + 1)
    found = read_results(files)
    assert [job["seed"] for job in found["b"]] == [0, 1] and files == over
    with pytest.raises(ValueError, match=r"a-run0.json was made with other settings or data \(options.width: 2 there"):
        evaluate_sets(sets, train, clock=Clock(accelerator), rank=0, world=1, **{**shared, "overrides": {"width": 3}})


def test_the_clock_remembers(capsys):
    clock = Clock(Accelerator(), 0.0)
    assert not clock.any_unfinished() and clock.is_over() and clock.any_unfinished()
    clock.say("targets")
    assert capsys.readouterr().out == "[0:00] targets\n" and not Clock(Accelerator()).is_over()


def test_images_network_and_samples_of_a_study(pipe, targets, train, tmp_path):
    striped_images((5, 5, 5)).save_to_disk(str(tmp_path / "data"))
    real, images, tested, taken = load_study_images(str(tmp_path / "data"), pipe=pipe, protocol=QUICK)
    assert (len(real), len(images.labels), len(tested.labels)) == (12, 12, 3) and "held out" in taken["test_split"]
    with pytest.raises(ValueError, match="`test_split` is a split or 'auto' here, not 'none'"):
        load_study_images(str(tmp_path / "data"), pipe=pipe, protocol=QUICK, test_split="none")
    one, two = (untrained_network(pipe, NAMES, "convnet-1", seed=5, width=3) for _ in range(2))
    assert torch.equal(next(one.parameters()), next(two.parameters())) and not one.training
    found = study_discrepancies({"all": train, "few": train.select(torch.tensor([0, 9, 16]))}, pipe, targets)
    assert found["all"] < 1e-6 < found["few"]
    assert draw_study_samples({"random-ipc2-seed0": train}, 2, tmp_path / "samples.png").stat().st_size > 1000
