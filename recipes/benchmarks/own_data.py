"""A new user's folder of photographs, from the first command to a published set, by the commands of the README.

    python recipes/benchmarks/own_data.py --out own_data.json

180 crops of scikit-learn's two photographs in three classes, 40 to 300 pixels, JPEG and PNG, without a test split, one
file truncated. Only steps and networks are made small, so that all of it takes minutes. `experiment.py` and the run
folder of `concentrate.py` are killed once and started again; the set and its generator are published to a Hub on
loopback (that of the tests: this benchmark needs a checkout), drawn again from what was published, and verified.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import load_dataset
from sklearn.datasets import load_sample_image


RECIPES = Path(__file__).parents[1]
TESTS = RECIPES.parent / "tests"
TOKEN = "hf_" + "OwnDataOnLoopback" * 2
# class: photograph, and the rows of it that show the class
CLASSES = {"petals": ("flower.jpg", 80, 400), "sky": ("china.jpg", 0, 140), "temple": ("china.jpg", 200, 420)}
QUICK = [
    "--steps", "20", "--num_inference_steps", "5", "--samples_per_class", "10", "--training_seeds", "2",
    "--architecture", "convnet-2", "--model_options", '{"width": 32}',
]  # fmt: skip


def draw_photographs(folder: Path, images_per_class: int = 60) -> None:
    """Writes crops of several sizes and formats, one of them cut short."""
    rng = np.random.default_rng(0)
    for label, (name, top, bottom) in CLASSES.items():
        photograph = PIL.Image.fromarray(load_sample_image(name)[top:bottom])
        (folder / label).mkdir(parents=True)
        for index in range(images_per_class):
            side = int(rng.integers(60, 130))
            x, y = (int(rng.integers(0, length - side)) for length in photograph.size)
            size = tuple(int(length) for length in rng.integers(40, 301, 2))
            ending = "jpg" if index % 2 else "png"
            photograph.crop((x, y, x + side, y + side)).resize(size).save(folder / label / f"{index:03d}.{ending}")
    damaged = folder / "sky" / "001.jpg"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])


def command(name: str, *options: str) -> list[str]:
    """A recipe's command line."""
    return [sys.executable, str(RECIPES / f"{name}.py"), *options]


class Session:
    """A user's terminal in a folder of its own: recipes are run there one after the other, and timed."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.seconds: dict[str, float] = {}

    def run(self, recipe: str, *options: str) -> None:
        """Runs a recipe to its end; raises if it fails."""
        begun = time.monotonic()
        subprocess.run(command(recipe, *options), cwd=self.folder, env=self.environment, check=True)
        self.seconds[recipe] = round(self.seconds.get(recipe, 0) + time.monotonic() - begun, 1)

    def kill(self, files: str, recipe: str, *options: str) -> bool:
        """Starts a recipe and kills it as soon as a file like `files` is there; whether it was still running then."""
        process = subprocess.Popen(command(recipe, *options), cwd=self.folder, env=self.environment)
        while process.poll() is None and not list(self.folder.glob(files)):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def go(work: Path, environment: dict[str, str]) -> dict[str, object]:
    """All commands; the figures that show what they did."""
    session = Session(work, environment)
    session.run("train_classifier", "--dataset", "photographs", "--steps", "60")
    config = str(RECIPES / "configs" / "generator_32px_cpu.yaml")
    session.run("train_generator", "--config", config, "--dataset", "photographs", "--train_steps", "40",
                "--classifier", "outputs/classifier")  # fmt: skip
    experiment = ["--dataset", "photographs", *QUICK]
    killed = {"experiment": session.kill("outputs/experiment/work/*/sets/*", "experiment", *experiment)}
    session.run("experiment", *experiment)
    session.run("compare", "--real", "photographs", "--datasets", "DsCo=outputs/experiment/dataset@ipc{budget}",
                "--budgets", "1", "10", "--seeds", "2", *QUICK[:2], *QUICK[-2:])  # fmt: skip
    drawing = ["--dataset", "photographs", "--num_inference_steps", "5", "--block_size", "2"]
    killed["concentrate"] = session.kill("outputs/concentrated/run/units/*.json", "concentrate", *drawing)
    session.run("concentrate", *drawing)
    session.run("publish", "--folder", "outputs/concentrated/dataset", "--repo_id", "ann/photographs-dsco")
    session.run("train_evaluator", "--dataset", "ann/photographs-dsco", "--test_dataset", "photographs",
                "--seeds", "1", *QUICK[:2], *QUICK[-2:])  # fmt: skip
    session.run("concentrate", "--from", "ann/photographs-dsco", "--generator", "outputs/generator",
                "--output_dir", "outputs/again")  # fmt: skip
    outputs = work / "outputs"
    results = json.loads((outputs / "experiment" / "results.json").read_text(encoding="utf-8"))
    again = json.loads((outputs / "again" / "results.json").read_text(encoding="utf-8"))
    return {
        "killed_and_resumed": killed,
        "splits": results["splits"],
        "sets": {f"{row['method']} {row['images_per_class']}": row["images"] for row in results["rows"]},
        "rows_read_back": len(load_dataset(str(outputs / "experiment" / "dataset"), "ipc10", split="train")),
        "drawn_again_identical": again["from"]["identical"],
        "seconds_by_command": session.seconds,
    }


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Goes through all commands; raises where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the outcome")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(TESTS))
    from hub import LoopbackHub
    from hub.client import environment

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, LoopbackHub(Path(name) / "hub") as hub:
        hub.add_user("ann", TOKEN)
        work = Path(name) / "work"
        draw_photographs(work / "photographs")
        outcome = go(work, environment(hub.url, Path(name) / "home", token=TOKEN))
    outcome["seconds"] = round(time.monotonic() - start, 1)
    if options.out is not None:
        options.out.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(outcome))
    return outcome


if __name__ == "__main__":
    main()
