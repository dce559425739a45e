"""A new user's folder of photographs, from the first command to a dataset folder, by the commands of the README.

    python recipes/benchmarks/own_data.py --out own_data.json

180 crops of scikit-learn's two photographs in three classes, 40 to 300 pixels, JPEG and PNG, without a test split, one
file truncated. Only steps and networks are made small, so that all of it takes minutes. `experiment.py` is killed once
and started again.
"""

from __future__ import annotations

import argparse
import json
import os
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


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Goes through all commands; raises where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the outcome")
    options = parser.parse_args(arguments)
    start, seconds = time.monotonic(), {}
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(RECIPES.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        draw_photographs(work / "photographs")

        def run(recipe: str, *given: str) -> None:
            begun = time.monotonic()
            subprocess.run(command(recipe, *given), cwd=work, env=environment, check=True)
            seconds[recipe] = round(time.monotonic() - begun, 1)

        run("train_classifier", "--dataset", "photographs", "--steps", "60")
        config = str(RECIPES / "configs" / "generator_32px_cpu.yaml")
        run("train_generator", "--config", config, "--dataset", "photographs", "--train_steps", "40",
            "--classifier", "outputs/classifier")  # fmt: skip
        experiment = ["--dataset", "photographs", *QUICK]
        process = subprocess.Popen(command("experiment", *experiment), cwd=work, env=environment)
        while process.poll() is None and not list(work.glob("outputs/experiment/work/*/sets/*.parquet")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        run("experiment", *experiment)
        dataset = "outputs/experiment/dataset"
        run("compare", "--real", "photographs", "--datasets", f"DsCo={dataset}@ipc{{budget}}", "--budgets", "1", "10",
            "--seeds", "2", *QUICK[:2], *QUICK[-2:])  # fmt: skip
        results = json.loads((work / "outputs" / "experiment" / "results.json").read_text(encoding="utf-8"))
        outcome = {
            "killed_and_resumed": killed,
            "splits": results["splits"],
            "sets": {f"{row['method']} {row['images_per_class']}": row["images"] for row in results["rows"]},
            "rows_read_back": len(load_dataset(str(work / dataset), "ipc10", split="train")),
            "seconds_by_command": seconds,
            "seconds": round(time.monotonic() - start, 1),
        }
    if options.out is not None:
        options.out.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(outcome))
    return outcome


if __name__ == "__main__":
    main()
