"""What runs write to a file, as somebody reads it afterwards: what it was of, how it ended, and nothing of no use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsco_hf.sampling.loading import embedded_folder
from launches import ROOT, launch_environment, run


pytestmark = pytest.mark.slow
START = "digits: 1,437 images of 10 classes, 8 px, on cpu."
SHORT = ("--steps", "12", "--batch_size", "16")
DIGITS = embedded_folder("digits")
CONFIGS = ROOT / "recipes" / "configs"
# recipe, options, and its first and last line
RUNS = {
    "concentrate": (
        "--generator digits --dataset digits --images_per_class 1 --num_inference_steps 2 --check_images 1",
        START, r"1 of 1 units are finished: 10 images. The dataset is in out/concentrate/dataset.",
    ),
    "compute_targets": (
        "--generator digits --data_free --samples_per_class 2 --num_inference_steps 2",
        "generator digits: 10 classes, 8 px, on cpu.", r"Saved targets of 10 classes to .*compute_targets after .* s.",
    ),
    "train_evaluator": (
        "--protocol quick --num_channels 1 --steps 12 --batch_size 16 --seeds 1 --architectures convnet-2",
        START, r"Saved 1 result\(s\) in out/train_evaluator/results.json.",
    ),
    "train_classifier": (
        "--protocol quick --num_channels 1 --steps 12 --batch_size 16 --architecture convnet-2",
        START, r"Saved the classifier to out/train_classifier, test accuracy .*, loss .* after 12 steps.",
    ),
    "train_generator": (
        f"--config {CONFIGS / 'generator_digits.yaml'} --train_steps 2 --num_samples_per_class 1 "
        "--num_inference_steps 2",
        START, r"Saved the pipeline to out/train_generator, loss .* after 2 steps.",
    ),
    "compare": (
        "--num_channels 1 --protocol quick --steps 12 --batch_size 16 --seeds 1 --budgets 1 --architectures convnet-2",
        START, r"Saved \d rows, tables and figures in out/compare.",
    ),
    "experiment": (
        f"--dataset digits --generator digits --classifier {DIGITS / 'classifier'} --protocol quick --steps 12 "
        "--batch_size 16 --methods plain --budgets 1 --synthesis_seeds 1 --training_seeds 1 --num_inference_steps 2 "
        "--check_images 0",
        START, r"\[0:\d\d\] done: out/experiment",
    ),
    "lossless": (
        f"--config {CONFIGS / 'lossless_digits.yaml'} --steps 12 --batch_size 16 --margin 0.4 --trainings 6 "
        "--reference_seeds 2",
        START, r"Saved what was found \(.*\) in out/lossless.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_begins_and_ends_with_a_line(name, tmp_path):
    options, first, last = RUNS[name]
    words = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *options.split(), "--output_dir", f"out/{name}"]
    done = run(words, cwd=tmp_path, env=launch_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout.splitlines()
    assert told[0] == first and re.fullmatch(last, told[-1]), done.stdout
    assert not re.search(r"warning|deprecat|shards|Loading weights|Evaluators|Reading", done.stderr, re.IGNORECASE)


def test_a_log_has_nothing_but_lines_of_its_own(tmp_path):
    """A run and the look at its set, each in a process of its own: no bar of any library, and no warning."""
    environment = {name: value for name, value in launch_environment().items() if not name.startswith("TQDM")}
    outputs = []
    for name, options in (("concentrate", RUNS["concentrate"][0].split()), ("look", ["out/dataset", "--measure"])):
        words = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *options]
        words += [] if name == "look" else ["--output_dir", "out"]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:]
        outputs.append(done.stdout.splitlines())
    drawn, looked = outputs
    assert drawn[:3] == [
        "concentrate: loading PyTorch and its libraries", START, "Asking the classifier about plain samples."
    ]  # fmt: skip
    assert drawn[3].startswith("The classifier knows ") and drawn[4].startswith("Writing the dataset")
    assert len(drawn) == 6 and drawn[5].endswith("The dataset is in out/dataset.")
    assert looked[:2] == ["look: loading PyTorch and its libraries", "out/dataset: 10 images of 10 classes, 8 px."]
    assert looked[2:] == [line for line in looked[2:] if line.startswith("10 images, 0.0 MB: open file://")]
    assert Path(tmp_path / "look.html").is_file() and os.linesep.join(drawn).count("\r") == 0
