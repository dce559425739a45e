"""Kills a run of two processes at random moments, and compares what it ends with to an undisturbed run, bit by bit.

    python recipes/benchmarks/fault_sweep.py --kills 30 --out fault_sweep.json
    python recipes/benchmarks/fault_sweep.py --pipeline outputs/generator_digits --classifier outputs/classifier_digits

`recipes/concentrate.py` draws digits with `accelerate launch`; the launcher and its processes get SIGKILL at once, a
random time after they started to draw, or while they start. The same command is run again until it ends by itself.
Generator and classifier have random weights unless they are given: their images mean nothing, and here only their bits
count. Then, where file systems can be mounted (by the superuser), the run is made on one that fills up and on one
that is read-only.

Prints one JSON object as its last line. `kills`: how many were made; `identical`: 1 if every image of every run is
the undisturbed one, else 0; `units_drawn_twice`: finished units that were drawn again; `disk_full` and `read_only`: 1
if the error says so and no finished unit is lost, 0 if not, null if nothing could be mounted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, DiTTransformer2DModel
from transformers import AutoModelForImageClassification

from dsco_hf.concentration.run_folder import RunFolder
from dsco_hf.data.datasets import load_digits_dataset
from dsco_hf.evaluators import build_evaluator
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.pipeline import DsCoPipeline


RECIPE = Path(__file__).parents[1] / "concentrate.py"
NAMES = [str(digit) for digit in range(10)]
SAMPLING = {"guidance_scale": "1.0", "num_inference_steps": "10", "block_size": "2", "images_per_call": "2"}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs undisturbed, then with kills, then on full and read-only disks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--images_per_class", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pipeline", help="pipeline folder; random weights if left out")
    parser.add_argument("--classifier", help="classifier folder; that of the pipeline, or random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--skip_disk", action="store_true", help="leave out the full and the read-only disk")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fault sweep ") as scratch:
        work = Path(scratch)
        make_models(options, work)
        begin = time.monotonic()
        finished = run(options, work, work / "undisturbed")
        if finished.returncode:
            raise RuntimeError(f"The undisturbed run failed: {finished.stderr[-2000:]}")
        seconds, expected = drawing_seconds(work / "undisturbed"), images(work / "undisturbed", work)
        figures = sweep(options, work, seconds, expected)
        figures |= {"disk_full": None, "read_only": None} if options.skip_disk else full_and_read_only(options, work)
    figures |= {
        "images": len(expected),
        "undisturbed_seconds": round(seconds, 2),
        "seconds": round(time.monotonic() - begin, 1),
        "weights": "random" if options.pipeline is None else "given",
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key in ("images_per_class", "processes", "seed")},
    }
    text = json.dumps({"kills": figures.pop("kills"), **figures})
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return json.loads(text)


def make_models(options: argparse.Namespace, work: Path) -> None:
    """The pipeline and the targets of the digits, saved in the folder."""
    if options.pipeline is not None:
        parts = {}
        if options.classifier is not None:
            parts["classifier"] = AutoModelForImageClassification.from_pretrained(options.classifier).eval()
        pipe = DsCoPipeline.from_pretrained(options.pipeline, **parts)
    else:
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=3, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
        ).eval()  # fmt: skip
        classifier = build_evaluator("convnet-2", class_names=NAMES, image_size=8, num_channels=1, width=32).eval()
        scheduler = DDIMScheduler(clip_sample=True)
        pipe = DsCoPipeline(transformer, scheduler, classifier=classifier, id2label=dict(enumerate(NAMES)))
    pipe.save_pretrained(work / "pipe")
    targets = MatchingTargets.from_dataset(load_digits_dataset()["train"], pipe, progress=False)
    targets.save_pretrained(work / "targets")


def command(options: argparse.Namespace, work: Path, output: Path) -> list[str]:
    """What a user would type."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--multi_gpu", "--num_processes", str(options.processes)] if options.processes > 1 else ["--cpu"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    fields = {**SAMPLING, "generator": str(work / "pipe"), "targets": str(work / "targets")}
    fields |= {"images_per_class": str(options.images_per_class), "output_dir": str(output)}
    return [*launcher, str(RECIPE), *(part for name, value in fields.items() for part in (f"--{name}", value))]


def environment() -> dict[str, str]:
    """One thread a process, no GPU, no network."""
    paths = os.pathsep.join([str(RECIPE.parents[1]), os.environ.get("PYTHONPATH", "")])
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, "PYTHONPATH": paths}


def run(options: argparse.Namespace, work: Path, output: Path) -> subprocess.CompletedProcess:
    """Runs to the end."""
    return subprocess.run(
        command(options, work, output), env=environment(), capture_output=True, text=True, check=False
    )


def events(output: Path) -> list[dict[str, Any]]:
    """All log lines of a run; a line that a kill cut off is left out."""
    lines = []
    for log in sorted((output / "run" / "log").glob("*.jsonl")):
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def drawing_seconds(output: Path) -> float:
    """Time from the beginning of the first unit to the end of the last."""
    units = [event for event in events(output) if event["event"] == "unit"]
    return max(event["clock"] for event in units) - min(event["begin"] for event in units)


def images(output: Path, work: Path) -> list[bytes]:
    """The pixels of the finished dataset."""
    rows = load_dataset(str(output / "dataset"), split="train", cache_dir=str(work / "cache" / output.name))
    return [np.asarray(image).tobytes() for image in rows["image"]]


def sweep(options: argparse.Namespace, work: Path, seconds: float, expected: list[bytes]) -> dict[str, Any]:
    """Kills and continues; when a run ends before all kills are made, another one begins."""
    rng = random.Random(options.seed)
    kills, identical, twice, runs = 0, True, 0, 0
    while kills < options.kills or not runs:
        output, runs = work / f"run {runs}", runs + 1
        while True:
            delay = rng.uniform(0, min(2 * seconds / max(1, options.kills), seconds))
            if kills < options.kills and run_and_kill(options, work, output, delay, early=rng.random() < 0.1):
                kills += 1
                continue
            done = run(options, work, output)
            if done.returncode:
                raise RuntimeError(f"The run did not go on after {kills} kills: {done.stderr[-2000:]}")
            break
        identical &= images(output, work) == expected
        drawn = [event["unit"] for event in events(output) if event["event"] == "unit"]
        twice += len(drawn) - len(set(drawn))
        shutil.rmtree(output)
    return {"kills": kills, "identical": int(identical), "units_drawn_twice": twice, "runs": runs}


def run_and_kill(options: argparse.Namespace, work: Path, output: Path, delay: float, *, early: bool) -> bool:
    """Kills a run `delay` seconds after it began to draw, or to start if `early`; False if it had ended by itself."""
    before = len(starts(output))
    process = subprocess.Popen(
        command(options, work, output), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not early and process.poll() is None and len(starts(output)) == before:
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
        return False
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family)
    process.wait()
    return True


def starts(output: Path) -> list[dict[str, Any]]:
    """The log lines of processes that started to draw."""
    return [event for event in events(output) if event["event"] == "started"]


def full_and_read_only(options: argparse.Namespace, work: Path) -> dict[str, int | None]:
    """The run on a disk that is too small, then read-only: a clear error, and all that was finished is whole."""
    disk = work / "disk"
    disk.mkdir()
    with mounted(disk, "128k") as possible:
        if not possible:
            return {"disk_full": None, "read_only": None}
        folder = RunFolder(disk / "out" / "run")
        done = run(options, work, disk / "out")
        kept = folder.finished()
        whole = bool(kept) and not folder.verify(sorted(kept))
        full = done.returncode != 0 and "the disk is full" in done.stderr and whole
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = run(options, work, disk / "out")
        read_only = done.returncode != 0 and "read-only" in done.stderr and folder.finished() == kept
    return {"disk_full": int(full), "read_only": int(read_only)}


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[bool]:
    """A file system in memory at a folder; False if it cannot be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    possible = shutil.which("mount") is not None and not subprocess.run(mount, check=False).returncode
    try:
        yield possible
    finally:
        if possible:
            subprocess.run(["umount", str(folder)], check=True)


if __name__ == "__main__":
    main()
