"""Two processes on two cores against one process with one thread: the same images, drawn with `accelerate launch`.

    python recipes/benchmarks/two_processes.py --out two_processes.json
    python recipes/benchmarks/two_processes.py --pipeline outputs/generator_digits --processes 4

Every process computes with one thread (BLAS and OpenMP threads fixed). Both runs are made in turns, `--rounds` times.
The time of a run goes from the beginning of its first unit to the end of its last, by the log; loading, which happens
once however long the run is, is reported beside it. Generator and classifier have random weights unless a pipeline is
given, which makes no difference to their speed. Give the machine nothing else to do.

Prints one JSON object as its last line. `speedup`: median of the ratios of one process's time to that of several,
round by round; `speedup_with_startup`: of the whole commands; `identical`: 1 if both drew the same images bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dsco_hf.data.datasets import load_digits_dataset
from dsco_hf.evaluators import build_evaluator
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.pipeline import DsCoPipeline


RECIPE = Path(__file__).parents[1] / "concentrate.py"
NAMES = [str(digit) for digit in range(10)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images_per_class", type=int, default=40)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--pipeline", type=Path, help="pipeline folder with a classifier; random weights if left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    measured: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_models(options.pipeline, work)
        for _ in range(options.rounds):
            one, several = (draw(options, work, processes) for processes in (1, options.processes))
            identical = one.pop("pixels") == several.pop("pixels")
            measured.append({f"{name}_1": value for name, value in one.items()} | several | {"identical": identical})
    ratios = [times["drawing_1"] / times["drawing"] for times in measured]
    results = {
        "speedup": round(statistics.median(ratios), 3),
        "speedup_with_startup": round(statistics.median(t["command_1"] / t["command"] for t in measured), 3),
        "identical": int(all(times["identical"] for times in measured)),
        "measured": [{name: round(float(value), 3) for name, value in times.items()} for times in measured],
        "weights": "random" if options.pipeline is None else "given",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key not in ("out", "pipeline")},
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def make_models(pipeline: Path | None, work: Path) -> None:
    """The pipeline and the targets of the digits, saved in the folder."""
    if pipeline is not None:
        pipe = DsCoPipeline.from_pretrained(pipeline)
    else:
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=4, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
        ).eval()  # fmt: skip
        classifier = build_evaluator("convnet-2", class_names=NAMES, image_size=8, num_channels=1, width=64).eval()
        scheduler = DDIMScheduler(clip_sample=True)
        pipe = DsCoPipeline(transformer, scheduler, classifier=classifier, id2label=dict(enumerate(NAMES)))
    pipe.save_pretrained(work / "pipe")
    targets = MatchingTargets.from_dataset(load_digits_dataset()["train"], pipe, progress=False)
    targets.save_pretrained(work / "targets")


def draw(options: argparse.Namespace, work: Path, processes: int) -> dict[str, Any]:
    """One run: seconds of drawing and of the whole command, and the pixels."""
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--cpu"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    fields = {
        "generator": work / "pipe", "targets": work / "targets", "output_dir": output, "guidance_scale": 1.0,
        "images_per_call": 10, "images_per_class": options.images_per_class,
        "num_inference_steps": options.num_inference_steps,
    }  # fmt: skip
    arguments = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    paths = os.pathsep.join([str(RECIPE.parents[1]), os.environ.get("PYTHONPATH", "")])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    begin = time.monotonic()
    subprocess.run(
        [*launcher, str(RECIPE), *arguments], env={**os.environ, **threads, **offline}, check=True, capture_output=True
    )
    command = time.monotonic() - begin
    with contextlib.ExitStack() as opened:
        logs = [
            opened.enter_context(path.open(encoding="utf-8"))
            for path in sorted((output / "run" / "log").glob("*.jsonl"))
        ]
        units = [event for log in logs for event in map(json.loads, log) if event["event"] == "unit"]
    rows = load_dataset(str(output / "dataset"), split="train", cache_dir=str(work / f"cache{time.monotonic_ns()}"))
    drawing = max(unit["clock"] for unit in units) - min(unit["begin"] for unit in units)
    pixels = b"".join(np.asarray(image).tobytes() for image in rows["image"])
    return {"drawing": drawing, "command": command, "pixels": pixels}


if __name__ == "__main__":
    main()
