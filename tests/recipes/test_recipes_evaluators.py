"""The evaluation recipes, run as a user runs them, at toy size."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Image, load_dataset
from transformers import AutoModelForImageClassification

from dsco_hf.data.datasets import load_image_dataset
from dsco_hf.studies.metrics import paired_difference
from dsco_hf.studies.tables import comparison_table, latex_table
from dsco_hf.utils.configs import parse_config
from launches import Launch, launch_command, launch_environment
from recipes import compare, train_classifier, train_evaluator


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
TINY = ["--num_channels", "1", "--model_options", '{"width": 4}', "--steps", "6", "--mixed_precision", "no"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each recipe makes an accelerator of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def small(tmp_path):
    """A small dataset of 2 real digits per class, as parquet files with two budgets."""
    digits = load_image_dataset("digits", split="train")
    labels = torch.tensor(digits["label"])
    for budget in (1, 2):
        rows = [int(row) for label in range(10) for row in (labels == label).nonzero()[:budget, 0]]
        digits.select(rows).to_parquet(tmp_path / f"small{budget}.parquet")
    return tmp_path


def launch(script, *options, processes=1, wait=True):
    """Runs a recipe through accelerate on CPUs."""
    environment = launch_environment()
    if not torch.accelerator.is_available():  # then the recipes connect their processes by themselves
        del environment["ACCELERATE_USE_CPU"]
    process = Launch(launch_command(script, *options, processes=processes), env=environment)
    if not wait:
        return process
    status = process.wait(300)
    output = "".join(process.output())
    assert status == 0, output
    return output


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


@pytest.mark.parametrize(
    ("prefix", "recipe"),
    [
        ("classifier", train_classifier.ClassifierRecipe),
        ("evaluator", train_evaluator.EvaluatorRecipe),
        ("compare", compare.ComparisonRecipe),
    ],
)
def test_configs_load_and_say_how_they_are_launched(prefix, recipe):
    paths = sorted(CONFIGS.glob(f"{prefix}_*.yaml"))
    assert paths
    for path in paths:
        assert parse_config(recipe, ["--config", str(path)]).output_dir.startswith("outputs/")
        assert "accelerate launch" in path.read_text() and f"configs/{path.name}" in path.read_text()


def test_classifier_loads_as_any_other(tmp_path):
    out = tmp_path / "out"
    options = '{"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}'
    train_classifier.main(
        ["--output_dir", str(out), "--num_channels", "1", "--steps", "5", "--model_options", options]
    )
    model = AutoModelForImageClassification.from_pretrained(out)
    assert type(model).__name__ == "ResNetForImageClassification"
    assert model.config.image_size == 32 and model.config.num_channels == 1
    assert model.config.id2label == {i: str(i) for i in range(10)}
    written = results(out)
    assert written["steps"] == 5 and 0 <= written["accuracy"] <= 1 and written["protocol"]["name"] == "quick (changed)"
    assert not (out / "checkpoint.safetensors").exists()


def test_classifier_without_a_test_split(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("architecture: convnet-2\ntest_split: none\n")
    train_classifier.main(["--config", str(path), "--output_dir", str(tmp_path / "out"), *TINY])
    assert results(tmp_path / "out")["accuracy"] is None


@pytest.mark.slow
def test_evaluator_with_teacher_and_several_networks(small, tmp_path, capsys):
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    train_classifier.main(["--architecture", "convnet-2", "--output_dir", str(teacher), *TINY])
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--dataset", str(small / "small2.parquet"), "--test_dataset", "digits", "--teacher", str(teacher)]
    arguments += ["--architectures", "convnet-2", "resnetap-10", "--seeds", "2", "--best", "--save_models", *TINY]
    train_evaluator.main([*arguments, "--output_dir", str(out)])
    written = results(out)
    assert [row["architecture"] for row in written["rows"]] == ["convnet-2", "resnetap-10"]
    assert all(len(row["accuracies"]) == len(row["accuracies_best"]) == 2 for row in written["rows"])
    assert written["images"] == 20 and written["images_per_class"] == 2 and written["test_images"] == 360
    assert written["protocol"]["label_type"] == "teacher"
    assert {"config", "dataset_fingerprint", "test_fingerprint"} <= set(written)
    assert {"versions", "processes"} <= set(written["environment"])
    model = AutoModelForImageClassification.from_pretrained(out / "models" / "small-resnetap-10-run1")
    assert model.config.average_pool
    assert "% over 2 seeds, best epoch" in capsys.readouterr().out


def test_evaluator_reads_the_columns_that_are_named_for_training_and_testing(small, tmp_path):
    digits = load_dataset("parquet", data_files=str(small / "small1.parquet"), split="train")
    parity = ClassLabel(names=["even", "odd"])
    two = digits.add_column("parity", [label % 2 for label in digits["label"]]).cast_column("parity", parity)
    stored = digits.cast_column("image", Image(decode=False))["image"][:]
    two = two.add_column("preview", stored).cast_column("preview", Image())
    two.to_parquet(tmp_path / "two.parquet")
    data, out = str(tmp_path / "two.parquet"), tmp_path / "out"
    same = ["--dataset", data, "--test_split", "train", "--label_column", "parity", "--image_column", "preview"]
    common = ["--architectures", "convnet-2", "--seeds", "1", *TINY]
    train_evaluator.main([*same, *common, "--output_dir", str(out)])
    assert (results(out)["classes"], results(out)["test_images"]) == (2, 10)
    AcceleratorState._reset_state(reset_partial_state=True)
    other = ["--test_dataset", data, "--test_label_column", "parity", "--test_image_column", "preview"]
    train_evaluator.main([*same, *other, *common, "--output_dir", str(tmp_path / "other")])
    assert results(tmp_path / "other")["classes"] == 2


def test_evaluator_tests_on_what_other_recipes_held_out(small, tmp_path):
    data = str(small / "small2.parquet")
    given = ["--dataset", data, "--architectures", "convnet-2", "--seeds", "1", *TINY]
    train_evaluator.main([*given, "--output_dir", str(tmp_path / "own")])
    found = results(tmp_path / "own")
    assert (found["images"], found["test_images"], found["splits"]["holdout"]) == (10, 10, 0.2)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_evaluator.main([*given, "--test_dataset", data, "--output_dir", str(tmp_path / "other")])
    other = results(tmp_path / "other")
    assert (other["images"], other["test_fingerprint"]) == (20, found["test_fingerprint"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="is a split or 'auto' here, not 'none'"):
        train_evaluator.main([*given, "--test_split", "none"])
    AcceleratorState._reset_state(reset_partial_state=True)
    drawn = load_dataset("parquet", data_files=data, split="train").add_column("source", ["synthetic"] * 20)
    drawn.to_parquet(tmp_path / "drawn.parquet")
    given[1] = str(tmp_path / "drawn.parquet")
    with pytest.raises(ValueError, match="is a small dataset without a test split.*with --test_dataset"):
        train_evaluator.main([*given, "--output_dir", str(tmp_path / "drawn")])
    AcceleratorState._reset_state(reset_partial_state=True)
    train_evaluator.main([*given, "--test_dataset", "digits", "--output_dir", str(tmp_path / "drawn")])  # as it says
    assert results(tmp_path / "drawn")["splits"] == {"train_split": "train", "test_split": "test"}


def test_evaluator_reports_every_epoch_to_tensorboard(small, tmp_path):
    out = tmp_path / "out"
    train_evaluator.main(
        [
            "--dataset",
            str(small / "small1.parquet"),
            "--test_dataset",
            "digits",
            "--architectures",
            "convnet-2",
            "--seeds",
            "2",
        ]
        + ["--report_to", "tensorboard", "--output_dir", str(out), *TINY]
    )
    content = b"".join(path.read_bytes() for path in out.rglob("events.out.tfevents.*"))
    for curve in ("small-convnet-2-run0/loss", "small-convnet-2-run1/loss", "convnet-2/accuracy_mean"):
        assert curve.encode() in content  # names are plain text in the records


def test_evaluator_refuses_what_does_not_fit(small, tmp_path):
    out = ["--output_dir", str(tmp_path / "out"), *TINY]
    with pytest.raises(ValueError, match="Unknown protocol 'rded'.*'rded-soft'"):
        train_evaluator.main(["--protocol", "rded", *out])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="`report_to` must be one of .'tensorboard', 'trackio', 'none'., got"):
        train_evaluator.main(["--report_to", "paper", *out])
    AcceleratorState._reset_state(reset_partial_state=True)
    if importlib.util.find_spec("trackio") is None:
        with pytest.raises(ValueError, match="trackio needs that package: pip install trackio"):
            train_evaluator.main(["--report_to", "trackio", *out])
    AcceleratorState._reset_state(reset_partial_state=True)
    letters = load_dataset("parquet", data_files=str(small / "small1.parquet"), split="train")
    features = letters.features.copy()
    features["label"].names = list("abcdefghij")
    letters.cast(features).to_parquet(tmp_path / "letters.parquet")
    with pytest.raises(ValueError, match="of class '1' .label 1., which is not one of the classes wanted"):
        train_evaluator.main(["--dataset", str(tmp_path / "letters.parquet"), "--test_dataset", "digits", *out])


@pytest.mark.slow
def test_compare_writes_tables_and_figure(small, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "--datasets",
        f"ours={small}/small{{budget}}.parquet",
        "--budgets",
        "1",
        "2",
        "--seeds",
        "2",
        "--full",
    ]
    arguments += ["--architectures", "convnet-2", "--output_dir", str(out), *TINY]
    compare.main(arguments)
    written = results(out)
    cells = [(row["method"], row["images_per_class"], row["images"]) for row in written["rows"]]
    assert cells == [(method, n, 10 * n) for n in (1, 2) for method in ("random", "herding", "ours")]
    assert set(written["rows"][2]["against_random"]) == {"mean", "low", "high", "p"}
    assert written["full"]["images"] == 1437
    table = (out / "table.md").read_text()
    assert "| random real | ConvNet-2 |" in table and "| ours | ConvNet-2 |" in table and "quick (changed)" in table
    assert "*" not in table and "not tested with fewer than 3 seeds" in table and "all images at 8 px" in table
    latex = (out / "table.tex").read_text()
    assert latex.count(r"\\") == 4 and r"\begin{tabular}{llrr}" in latex
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert table in capsys.readouterr().out


def compared(*accuracies, seeds=3):
    """Results of compare.py for random real images and one dataset, with these accuracies by seed."""
    random, ours = ([one[i] for one in accuracies][:seeds] for i in (0, 1))
    rows = [
        {"method": method, "architecture": "convnet-3", "images_per_class": 1, "accuracy_mean": sum(own) / seeds}
        | {"accuracies": own, "accuracy_std": 0.01, "training_seeds": seeds, "images": 4}
        for method, own in (("random", random), ("ours", ours))
    ]
    rows[1]["against_random"] = paired_difference(ours, random)
    return {"dataset": "data/flowers_4", "protocol": {"name": "quick (changed)", "image_size": 8}, "rows": rows}


def test_the_mark_of_a_table_has_one_meaning_which_stands_below_it():
    clear, close = [(0.30, 0.40), (0.31, 0.42), (0.32, 0.41)], [(0.30, 0.40), (0.31, 0.32), (0.42, 0.31)]
    marked, unmarked = (comparison_table(compared(*pairs)) for pairs in (clear, close))
    assert "| ours | ConvNet-3 | 41.0 ± 1.0* |" in marked and "| random real | ConvNet-3 | 31.0 ± 1.0 |" in marked
    assert marked.count("*") == 2 and "* differs from random real: p < 0.05, paired t-test over seeds" in marked
    assert "*" not in unmarked and "No difference from random real is significant" in unmarked
    two = compared(*clear, seeds=2)
    two["rows"][1]["against_random"]["p"] = 0.001  # as an earlier version wrote it
    assert "*" not in comparison_table(two) and "not tested with fewer than 3 seeds" in comparison_table(two)
    assert "percent on flowers_4," in marked and "Chance: 25." in marked
    latex = latex_table(compared(*clear))
    below = latex.split(r"\end{tabular}")[1]
    assert r"flowers\_4" in below and "* differs from random real: p $<$ 0.05" in below


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datasets", "ours={folder}/small2.parquet", "--budgets", "1"], "has 20 images, but 1 per class are 10"),
        (["--datasets", "random=digits"], "name of its own, got 'random=digits'"),
        (["--datasets", "digits"], "takes name=path"),
        (["--label_type", "stored"], "label_type is 'stored'"),
    ],
)
def test_compare_refuses_what_is_no_comparison(small, tmp_path, options, message):
    options = [option.replace("{folder}", str(small)) for option in options]
    with pytest.raises(ValueError, match=message):
        compare.main([*options, "--output_dir", str(tmp_path / "out"), "--architectures", "convnet-2", *TINY])


@pytest.mark.slow
def test_compare_reads_the_columns_sizes_and_splits_of_every_set(small, tmp_path, monkeypatch):
    """Two sets of other people: one with two of each column, one in a split of its own."""
    theirs = load_dataset("parquet", data_files=str(small / "small1.parquet"), split="train")
    stored = theirs.cast_column("image", Image(decode=False))["image"][::-1]  # others
    both = theirs.add_column("preview", stored).cast_column("preview", Image())
    both = both.add_column("parity", [label % 2 for label in both["label"]])
    both = both.cast_column("parity", ClassLabel(names=["even", "odd"]))
    both = both.rename_columns({"image": "front", "label": "digit"})
    both.to_parquet(tmp_path / "both" / "train.parquet")
    theirs.to_parquet(tmp_path / "plain" / "validation.parquet")
    given = ["--datasets", f"both={tmp_path}/both", f"plain={tmp_path}/plain@@validation", "--budgets", "1"]
    given += ["--seeds", "2", "--architectures", "convnet-2", "--output_dir", str(tmp_path / "out"), *TINY]
    with pytest.raises(ValueError, match="'both': Several columns .* --datasets_image_column and"):
        compare.main(given)
    AcceleratorState._reset_state(reset_partial_state=True)
    columns = ["--datasets_image_column", "both=front", "--datasets_label_column", "plain=label", "both=digit"]
    compare.main([*given, *columns])
    rows = {row["method"]: row["accuracies"] for row in results(tmp_path / "out")["rows"]}
    assert rows["both"] == rows["plain"] and results(tmp_path / "out")["splits"]["test_split"] == "test"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="takes one value for all datasets, or name=value for some of"):
        compare.main([*given, "--datasets_label_column", "ours=label"])
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = {}

    def recorded(path, name=None, **options):
        seen[path] = (name, options)
        raise FileNotFoundError(path)

    monkeypatch.setattr("dsco_hf.studies.study.load_image_dataset", recorded)
    with pytest.raises(FileNotFoundError):
        compare.main([*given[:1], "peer=user/peer@ipc{budget}@@abc", *given[3:]])
    assert seen == {"user/peer": ("ipc1", {"split": "train", "revision": "abc"})}


@pytest.mark.slow
def test_compare_refuses_sets_of_several_sizes(small, tmp_path):
    digits = load_dataset("parquet", data_files=str(small / "small1.parquet"), split="train")
    large = digits.map(lambda row: {"image": row["image"].resize((16, 16))})
    large.to_parquet(tmp_path / "large.parquet")
    given = ["--datasets", f"ours={small}/small1.parquet", f"peer={tmp_path}/large.parquet", "--budgets", "1"]
    given += ["--seeds", "2", "--architectures", "convnet-2", "--output_dir", str(tmp_path / "out"), *TINY]
    with pytest.raises(ValueError, match=r"ours \(1 per class\) 8x8; peer .* 16x16.*with --image_size, such as 8\."):
        compare.main(given)
    AcceleratorState._reset_state(reset_partial_state=True)
    compare.main([*given, "--image_size", "8"])  # as it says
    assert "all images at 8 px" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_two_processes_share_the_seeds_and_change_nothing(small, tmp_path):
    options = ["--dataset", str(small / "small2.parquet"), "--test_dataset", "digits", "--seeds", "2"]
    options += ["--architectures", "convnet-2", *TINY]
    launch("train_evaluator", *options, "--output_dir", str(tmp_path / "one"))
    launch("train_evaluator", *options, "--output_dir", str(tmp_path / "two"), processes=2)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert one["rows"][0]["accuracies"] == two["rows"][0]["accuracies"]


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_accuracies(small, tmp_path):
    options = ["--dataset", str(small / "small2.parquet"), "--test_dataset", "digits", "--seeds", "2", *TINY]
    options += ["--architectures", "convnet-2", "--steps", "150", "--checkpoint_seconds", "0"]
    train_evaluator.main([*options, "--output_dir", str(tmp_path / "whole")])
    process = launch("train_evaluator", *options, "--output_dir", str(tmp_path / "killed"), wait=False)
    checkpoint = tmp_path / "killed" / "jobs" / "small-convnet-2-run1.safetensors"  # the first seed has ended
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert checkpoint.exists() and not (tmp_path / "killed" / "results.json").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    train_evaluator.main([*options, "--output_dir", str(tmp_path / "killed")])
    whole, killed = results(tmp_path / "whole")["rows"][0], results(tmp_path / "killed")["rows"][0]
    assert whole["accuracies"] == killed["accuracies"] and len(whole["accuracies"]) == 2


@pytest.mark.slow
def test_two_processes_train_one_classifier(tmp_path):
    out = tmp_path / "out"
    output = launch("train_classifier", "--architecture", "convnet-2", "--output_dir", str(out), *TINY, processes=2)
    assert output.count("Saved the classifier") == 1
    assert results(out)["processes"] == 2
    AutoModelForImageClassification.from_pretrained(out)


@pytest.mark.slow
def test_a_killed_classifier_resumes_to_the_same_weights(tmp_path):
    options = ["--architecture", "convnet-2", "--num_channels", "1", "--model_options", '{"width": 4}']
    options += ["--epochs", "20", "--checkpoint_seconds", "0"]
    launch("train_classifier", *options, "--output_dir", str(tmp_path / "whole"))
    process = launch("train_classifier", *options, "--output_dir", str(tmp_path / "killed"), wait=False)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert checkpoint.exists() and not (tmp_path / "killed" / "results.json").exists()
    launch("train_classifier", *options, "--output_dir", str(tmp_path / "killed"), "--resume")
    whole, killed = (AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), killed.parameters(), strict=True))
    assert results(tmp_path / "whole")["accuracy"] == results(tmp_path / "killed")["accuracy"]
