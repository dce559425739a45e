"""Sets by name, what evaluators reach on them, and the rows of results.json."""

import PIL.Image
import pytest
import torch
from accelerate import Accelerator

from conftest import striped_images
from dsco_hf import RKHS, Herding, NOpt, Plain, Pool, Released, Ridge, concentrate, get_protocol
from dsco_hf.concentration.additions.doping import select, selected_rows
from dsco_hf.concentration.set_records import record_of
from dsco_hf.evaluators import load_image_set
from dsco_hf.matching.discrepancy import SetMeasures
from dsco_hf.matching.objectives import ClassifierEvidence
from dsco_hf.sampling.methods import JointTargets
from dsco_hf.studies.figures.accuracy import draw_study_samples
from dsco_hf.studies.kept import passes_of
from dsco_hf.studies.options import RealOptions
from dsco_hf.studies.plans import PlannedSets, StudyPlan, set_name, set_parts
from dsco_hf.studies.study import FULL, Study, measures_of_row, random_beside, real_baselines
from dsco_hf.studies.tables import against_baselines, results_table, write_comparison
from dsco_hf.utils.progress import Clock


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
    assert population == "clearest-0.2" and options["method"] == NOpt(Ridge(2.0), step_size=0.5)
    assert options["guidance_scale"] == 2
    assert plan.drawing("nopt", 10)[0] == "real" and plan.drawing("nopt", 10)[1]["method"].objective == RKHS(3.0)
    assert plan.drawing("plain", 1)[0] is None and plan.drawing("plain", 1)[1]["method"] == Plain()
    assert plan.drawing("nopt-quantile", 1)[1]["method"] == Released(200)
    alone = plan.drawing("nopt-classifier-only", 1)[1]["method"]  # as the recorded table of the digits has it
    assert alone == NOpt(ClassifierEvidence(), start=0.6)
    assert plan.pivots == {"draws": 1, "counts": [1, 10]} and plan.sizes == [1, 10, 12]
    assert plan.matched == {"features": None, "second_moment": True} and plan.templates["guidance_scale"] == 2


def test_real_baselines_are_nested_and_of_as_many_images(train, make):
    found = real_baselines(train, [1, 3], random_seeds=2, classifiers=[make.convnet()])
    assert list(found) == [
        f"{method}-ipc{budget}-seed{seed}"
        for budget in (1, 3)
        for method, seed in (("herding", 0), ("random", 0), ("random", 1))
    ]
    rows = selected_rows(Pool(train), Herding(features=make.convnet()), images_per_class=3).view(3, 3)
    assert torch.equal(found["herding-ipc1-seed0"].pixels, train.pixels[rows[:, 0]])
    assert found["random-ipc3-seed1"].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


TINY = {"protocol": QUICK, "architectures": ["convnet-1"], "overrides": {"width": 2}}


def test_a_study_in_ten_lines(train, tmp_path, monkeypatch):
    """As the docstring shows it; every training is done once."""
    test = load_image_set(striped_images((4, 4, 4), seed=1), protocol=QUICK, num_channels=1, test_for=train)
    sets = real_baselines(train, [1, 2], random_seeds=2)
    sets["mine-ipc2-seed0"] = train.select(torch.tensor([0, 1, 2, 3, 4, 5]))
    results = Study(sets, test, tmp_path, seeds=2, **TINY).run(dataset="stripes")
    assert [(row["method"], row["images_per_class"]) for row in results["rows"]] == [
        ("random", 1), ("herding", 1), ("random", 2), ("herding", 2), ("mine", 2),
    ]  # fmt: skip
    assert [row["images"] for row in results["rows"]] == [3, 3, 6, 6, 6]
    assert [(row["synthesis_seeds"], len(row["accuracies"])) for row in results["rows"][:2]] == [(2, 4), (1, 2)]
    assert "| mine | – |" in results_table(results) and "full" not in results
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()}
    assert len(before) == 7 * 2
    monkeypatch.setattr("dsco_hf.studies.study.train_job", None)  # nothing is left to train
    again = Study(sets, test, tmp_path, seeds=2, **TINY).run(dataset="stripes")
    assert again["rows"] == results["rows"] and (tmp_path / "results.json").is_file()


def test_processes_share_a_study_and_none_begins_after_the_end(train, tmp_path):
    accelerator, sets = Accelerator(), {"a": train, "b": train.select(torch.arange(12))}

    def study(**options):
        return Study(sets, train, tmp_path, **{"seeds": [0, 3], "accelerator": accelerator, **TINY, **options})

    late = study(clock=Clock(accelerator, 0.0))
    assert late.run() is None and not list(tmp_path.iterdir())
    assert list(late.jobs()) == ["a-convnet-1-run0", "a-convnet-1-run3", "b-convnet-1-run0", "b-convnet-1-run3"]
    for rank in (0, 1):
        study().train(rank=rank, world=2)
        assert len(list((tmp_path / "jobs").iterdir())) == 2 * (rank + 1)
    rows = study().results()["rows"]
    assert [(row["method"], row["images_per_class"], row["seeds"]) for row in rows] == [
        ("b", 4, [0, 3]), ("a", 7, [0, 3]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"run0.json was made with other settings or data \(options.width: 2 there"):
        study(overrides={"width": 3}).run()


@pytest.mark.slow
def test_sets_of_each_training_networks_and_all_data(train, tmp_path):
    """A set that depends on the seed, as compare.py has it, and differences training by training."""

    def choose(seed):
        return select(train, "random", images_per_class=1, seed=seed)

    sets = {"random-ipc1": choose, "ours-ipc1": choose(5), FULL: train}
    study = Study(sets, train, tmp_path, seeds=2, **{**TINY, "architectures": ["convnet-1", "convnet-2"]})
    results = study.run(dataset="stripes", title=None)
    cells = [(row["architecture"], row["method"]) for row in results["rows"]]
    assert cells == [(net, method) for net in ("convnet-1", "convnet-2") for method in ("random", "ours")]
    assert (results["full"]["images"], results["full"]["seeds"], results["full"]["architecture"]) == (
        21,
        2,
        "convnet-1",
    )
    digests = {key: study.images("random-ipc1", seed).digest for key, seed in (("a", 0), ("b", 1), ("c", 0))}
    assert digests["a"] == digests["c"] != digests["b"] and list(study.fixed) == ["ours-ipc1"]
    against_baselines(results["rows"])
    ours, random = (results["rows"][i]["accuracies"] for i in (1, 0))
    found = results["rows"][1]["against_random"]["mean"]
    assert found == pytest.approx(sum(a - b for a, b in zip(ours, random, strict=True)) / 2)
    assert "against_random" not in results["rows"][0] and "| ours | ConvNet-2 |" in write_comparison(results, tmp_path)


@pytest.mark.slow
def test_planned_sets_are_drawn_once_and_rows_have_random_real_images_beside_them(pipe, train, tmp_path):
    plan = StudyPlan(methods=["plain", "nopt"], budgets=[1], synthesis_seeds=1, num_inference_steps=5, check_images=0,
                     doping_budgets=[2])  # fmt: skip
    made = PlannedSets(plan, pipe, striped_images(), tmp_path, clock=Clock(Accelerator()))
    made.make()
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*.parquet")}
    assert {path.stem for path in before} == set(made.rows()) == {
        "plain-ipc1-seed0", "nopt-ipc1-seed0", "nopt+doping-ipc2-seed0"
    }  # fmt: skip
    again = PlannedSets(plan, pipe, striped_images(), tmp_path, clock=Clock(Accelerator()))
    again.make()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert (
        made.targets_of("nopt+doping-ipc2-seed0") is made.targets["real"]
        and made.targets_of("plain-ipc1-seed0") is None
    )
    sets = real_baselines(train, [1], random_seeds=2)
    sets |= {name: load_image_set(rows, protocol=QUICK, num_channels=1) for name, rows in made.rows().items()}
    study = Study(sets, train, tmp_path / "study", seeds=1, **TINY)
    study.train()
    rows = {(row["method"], row["images_per_class"]): row for row in study.results(made)["rows"]}
    assert rows["nopt", 1]["denoiser_calls"] > rows["plain", 1]["denoiser_calls"] == 3 * 5
    assert rows["nopt", 1]["flops"] > rows["plain", 1]["flops"] > 0 < rows["nopt", 1]["peak_memory_bytes"]
    assert rows["nopt", 1]["data_pass_flops"] > 0 and "flops" not in rows["nopt+doping", 2]
    assert rows["random", 1]["seconds"] == 0.0 < rows["nopt", 1]["seconds"]
    random = study.discrepancies["random-ipc1-seed0"], study.discrepancies["random-ipc1-seed1"]
    assert rows["nopt", 1]["random_discrepancy"] == rows["random", 1]["discrepancy"] == sum(random) / 2
    assert rows["nopt+doping", 2]["random_discrepancy"] is None
    assert rows["random", 1]["discrepancies"] == list(random)
    assert all(len(row["unexplained"]) == row["synthesis_seeds"] for row in rows.values())
    assert all("redundancy" not in row for row in rows.values())  # none has a second block


def test_redundancy_of_a_row_is_the_mean_over_its_sets():
    sets = [
        SetMeasures({"a": 0.1, "b": 0.3}, 0.5, [[None, 0.2], [0.4, None]]),
        SetMeasures({"a": 0.2}, 0.7, [[None, 0.4, 9.0], [None, None, 9.0], [9.0, 9.0, None]]),  # a block more
    ]
    assert measures_of_row(sets) == {
        "discrepancies": [0.2, 0.2], "unexplained": [0.5, 0.7],
        "redundancy": [[None, pytest.approx(0.3)], [None, None]],
    }  # fmt: skip
    assert measures_of_row([SetMeasures({"a": 0.1})]) == {"discrepancies": [0.1]}


@pytest.mark.slow
def test_methods_that_go_together_are_rows_and_share_the_targets_of_others(pipe, train, tmp_path):
    methods = ["nopt", "d4m+nopt", "nopt-data-free+best-of-n", "s3+ddoq"]
    plan = StudyPlan(methods=methods, budgets=[1, 2], synthesis_seeds=1, num_inference_steps=5, check_images=0,
                     clearest_share=[0.5, 1.0], samples_per_class=2, step_size=0.5)  # fmt: skip
    population, options = plan.drawing("d4m+nopt", 1)
    assert population == "centroids-1+clearest-0.5" and options["method"].parts[1].step_size == 0.5
    assert plan.drawing("s3+ddoq", 2)[0] == "centroids-2+features"
    assert plan.drawing("nopt-data-free+best-of-n", 2)[0] == "nopt-data-free"
    made = PlannedSets(plan, pipe, striped_images(), tmp_path, clock=Clock(Accelerator()))
    made.make()
    rows = made.rows()
    assert {set_parts(name)[0] for name in rows} == set(methods) and len(rows) == 8
    assert set(made.targets) == {
        "real", "clearest-0.5", "nopt-data-free", "centroids-1", "centroids-2", "features"
    }  # fmt: skip
    assert record_of(rows["d4m+nopt-ipc2-seed0"])["targets"]["kind"] == "JointTargets"
    assert record_of(rows["nopt-data-free+best-of-n-ipc1-seed0"])["method"] == "nopt-data-free+best-of-n"
    assert "weight" in rows["s3+ddoq-ipc2-seed0"].features
    told = made.kept.told("d4m+nopt-ipc2-seed0")
    assert told["flops"] > 0 < told["data_pass_flops"]
    assert made.targets_of("d4m+nopt-ipc2-seed0") is None
    population, options = plan.drawing("d4m+nopt", 2)
    targets = JointTargets({"d4m": made.targets["centroids-2"], "nopt": made.targets["real"]})
    assert passes_of(targets, pipe) == {"images": 42, "classifier": 42}
    assert made.drawn_for("d4m+nopt-ipc2-seed0") == targets and made.drawn_for("random-ipc2-seed0") is None
    alone = concentrate(pipe, targets, 2, progress=False, **options)
    pairs = zip(alone["image"], rows["d4m+nopt-ipc2-seed0"]["image"], strict=True)
    assert population == "centroids-2+real" and all(one.tobytes() == other.tobytes() for one, other in pairs)
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*.parquet")}
    PlannedSets(plan, pipe, striped_images(), tmp_path, clock=Clock(Accelerator())).make()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}


def test_methods_that_do_not_go_together_are_refused_before_anything_is_made():
    with pytest.raises(ValueError, match="'mgd3' and 'nopt' both move the noise"):
        StudyPlan(methods=["mgd3+nopt"])
    with pytest.raises(ValueError, match="`methods` may hold .* got 'd4m.nopd'. Nearest: 'nopt'"):
        StudyPlan(methods=["d4m+nopd"])
    with pytest.raises(ValueError, match="but not 'nopt-quantile', joined by '.', got 'd4m.nopt-quantile'"):
        StudyPlan(methods=["d4m+nopt-quantile"])


def test_random_real_images_beside_sets_of_their_size():
    found = {"random-ipc1-seed0": 0.4, "random-ipc1-seed1": 0.6, "nopt-ipc1-seed0": 0.1, "nopt-ipc2-seed0": 0.05}
    assert random_beside(found) == dict.fromkeys(list(found)[:3], 0.5)


def test_the_clock_remembers(capsys):
    clock = Clock(Accelerator(), 0.0)
    assert not clock.any_unfinished() and clock.is_over() and clock.any_unfinished()
    clock.say("targets")
    assert capsys.readouterr().out == "[0:00] targets\n" and not Clock(Accelerator()).is_over()


def test_images_network_and_samples_of_a_study(pipe, train, tmp_path):
    striped_images((5, 5, 5)).save_to_disk(str(tmp_path / "data"))
    options = RealOptions(dataset=str(tmp_path / "data"))
    real, test, taken = options.splits(tested=True)
    images, tested = options.images(real, test, protocol=QUICK, num_channels=1)
    assert (len(real), len(images.labels), len(tested.labels)) == (12, 12, 3) and "held out" in taken["test_split"]
    assert options.readable(real, images) is real
    with pytest.raises(ValueError, match="`test_split` is a split or 'auto' here, not 'none'"):
        RealOptions(dataset=str(tmp_path / "data"), test_split="none").splits(tested=True)
    assert draw_study_samples({"random-ipc2-seed0": train}, 2, tmp_path / "samples.png").stat().st_size > 1000
    height = {}
    for name in ("mine", "mgd3"):  # two images of a class where there are peers, four where there are none
        sets = {"random-ipc2-seed0": train, f"{name}-ipc2-seed0": train}
        with PIL.Image.open(draw_study_samples(sets, 2, tmp_path / f"{name}.png")) as drawn:
            height[name] = drawn.size[1]
    assert height["mgd3"] < 1.5 * height["mine"]
