"""Runs everything that wants a GPU, in slices of under ten minutes: CIFAR-10 and ImageNette at 64 pixels.

    python recipes/run_all_gpu.py --minutes 9           # one slice; run it again until it says that all is done
    python recipes/run_all_gpu.py --list                # the commands, and which are done
    python recipes/run_all_gpu.py --only cifar10 --cifar10 PATH --imagenette PATH       # datasets from elsewhere

Every step resumes where it was stopped; one that is done is not started again. A step that fails ends the slice.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dsco_hf.utils.files import read_json, write_json


RECIPES = Path(__file__).parent
CONFIGS = RECIPES / "configs"


@dataclass(frozen=True)
class Step:
    """One command, and the file that it leaves when it is done."""

    name: str
    recipe: str
    options: tuple[str, ...]
    result: Path
    sliced: bool = True  # whether it takes --max_minutes; the others keep checkpoints and are stopped from outside

    def command(self, minutes: float) -> list[str]:
        """The command line of one slice; started directly, so that ending it ends all of it."""
        limit = ["--max_minutes", f"{minutes:.1f}"] if self.sliced else []
        return [sys.executable, str(RECIPES / self.recipe), *self.options, *limit]


def steps(outputs: Path, data: dict[str, list[str]], mixed_precision: str) -> list[Step]:
    """All steps in order."""
    found = []
    data = {name: [*dataset, "--mixed_precision", mixed_precision] for name, dataset in data.items()}
    images = {"cifar10": [], "imagenette64": ["--image_size", "64"]}
    for name, dataset in data.items():
        full = str(CONFIGS / "protocols" / "full_data.yaml")
        classifier, generator = outputs / f"classifier_{name}", outputs / f"generator_{name}"
        table, soft = outputs / f"experiment_{name}", outputs / f"experiment_{name}_soft"
        test = ["--test_split", "test" if name == "cifar10" else "validation"]
        found.append(
            Step(
                f"{name}: classifier",
                "train_classifier.py",
                (*dataset, *test, *images[name], "--architecture", "resnet-18", "--protocol", full,
                 "--checkpoint_seconds", "30", "--output_dir", str(classifier)),
                classifier / "config.json",
                sliced=False,
            )
        )  # fmt: skip
        config = ("--config", str(CONFIGS / f"generator_{name}.yaml"))
        found.append(
            Step(
                f"{name}: generator",
                "train_generator.py",
                (*config, *dataset, "--classifier", str(classifier), "--output_dir", str(generator)),
                generator / "results.json",
            )
        )
        experiment = (
            "--config", str(CONFIGS / f"experiment_{name}.yaml"), *dataset, *test, "--generator", str(generator),
            "--classifier", str(classifier), "--sets_dir", str(outputs / f"sets_{name}"),
        )  # fmt: skip
        found.append(
            Step(
                f"{name}: table, hard labels",
                "experiment.py",
                (*experiment, "--output_dir", str(table)),
                table / "results.json",
            )
        )
        found.append(
            Step(
                f"{name}: table, soft labels",
                "experiment.py",
                (*experiment, "--protocol", "rded-soft-small",
                 "--architecture", "resnet-18", "--output_dir", str(soft)),
                soft / "results.json",
            )
        )  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs steps until the time is up; 0 when all is done, 3 when there is more to do, otherwise what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="length of a slice")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where everything goes")
    parser.add_argument("--cifar10", default="uoft-cs/cifar10", help="Hub id or folder")
    parser.add_argument("--imagenette", default="frgfm/imagenette", help="Hub id or folder")
    parser.add_argument(
        "--imagenette_name", default=None, help="its configuration; 160px on the Hub, default of a folder"
    )
    parser.add_argument("--only", choices=["cifar10", "imagenette64"], help="one of the two datasets")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    parser.add_argument("--mixed_precision", default="bf16")
    options = parser.parse_args(arguments)
    name = options.imagenette_name or ("default" if Path(options.imagenette).exists() else "160px")
    data = {
        "cifar10": ["--dataset", options.cifar10],
        "imagenette64": ["--dataset", options.imagenette, "--dataset_name", name],
    }
    if options.only:
        data = {options.only: data[options.only]}
    end = time.monotonic() + 60 * options.minutes
    stamped = options.outputs / "run_all_gpu.json"  # the options of every step that was begun
    stamps = read_json(stamped, "Delete it.") if stamped.is_file() else {}
    for step in steps(options.outputs, data, options.mixed_precision):
        done, asked = step.result.is_file(), list(step.options)
        if done and (before := stamps.get(step.name, asked)) != asked:  # of earlier versions nothing is known
            differing = [word for word in (*before, *asked) if (word in before) != (word in asked)]
            print(f"{step.name}: {step.result} was made with other options ({shlex.join(differing)}). Remove it, or "
                  "choose other `--outputs`.")  # fmt: skip
            return 1
        left = (end - time.monotonic()) / 60
        command = step.command(max(left - 1.5, 0.1))  # the rest is to read the data, to save and to end
        if options.list:
            print(f"[{'done' if done else 'to do'}] {step.name}: {shlex.join(command)}")
            continue
        if done:
            continue
        if left < 1:
            print(f"The slice is over; next: {step.name}. Run the same command again.")
            return 3
        print(f"{step.name}: {shlex.join(command)}", flush=True)
        stamps[step.name] = asked
        options.outputs.mkdir(parents=True, exist_ok=True)
        write_json(stamped, stamps)
        try:
            code = subprocess.run(command, check=False, timeout=60 * left).returncode
        except subprocess.TimeoutExpired:
            code = 0  # killed at the end of the slice; its checkpoint is there
        if code:
            return code
        if not step.result.is_file():
            print(f"The slice is over; {step.name} goes on next time. Run the same command again.")
            return 3
    if not options.list:
        print("All is done.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
