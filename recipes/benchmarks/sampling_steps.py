"""How many sampling steps, and which of them optimised: what sets train, by networks of several families.

    python recipes/benchmarks/sampling_steps.py --out sampling_steps.json
    python recipes/benchmarks/sampling_steps.py --pipeline outputs/generator_cifar10_cpu \
        --classifier outputs/classifier_cifar10_16px --dataset uoft-cs/cifar10 --guidance_scale 2.5

Accuracies are of images that are held out of the training split: nothing here sees a test split. ConvNet-3 is the
family whose untrained features NOpt matches; the two others have no part in the matching. Without arguments the
pipeline and the images are the digits that the package brings. A variant is METHOD:STEPS, or METHOD:STEPS:START with
NOpt's start; "d4m+nopt" begins at the noised centroids of the class, with 0.7 of the steps to go.

Prints one JSON object as its last line: `rows` with `denoiser_calls` per image, `of_field` (those by the 100 calls of
plain sampling in 50 steps with guidance), and by network the accuracies (%) of each set, their mean and the standard
deviation over sets and trainings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.multiprocessing as mp
from datasets import Dataset

from dsco_hf import DsCoPipeline, get_protocol, load_digits_dataset
from dsco_hf.concentration.concentrate import concentrate_and_report
from dsco_hf.data.datasets import find_columns, load_image_dataset
from dsco_hf.evaluators import TrainingJob, load_image_set, train_job
from dsco_hf.sampling.call import Sampling, SamplingMethod
from dsco_hf.sampling.methods import Combined, JointTargets, NOpt
from dsco_hf.utils.files import write_json
from dsco_hf.utils.origins import versions


NETWORKS: dict[str, dict[str, Any]] = {
    "convnet-3": {"width": 64},
    "resnetap-10": {"width": 16, "norm": "instance"},
    "vit": {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128, "patch_size": 4
    },
}  # fmt: skip
FIELD = 100  # denoiser calls of an image: 50 steps with guidance


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Draws the sets of every variant, and trains all networks on each."""
    options = read_options(arguments)
    start = time.perf_counter()
    torch.set_num_threads(options.processes)
    datasets.disable_progress_bars()
    pipe = load_pipeline(options)
    train, held_out = split(options)
    made: dict[str, Any] = {}
    drawn: dict[tuple[str, int], tuple[Dataset, float]] = {}
    for variant in options.variants:
        sampling = sampling_of(variant, options)
        targets = targets_of(sampling, pipe, train, options, made)
        for seed in range(options.synthesis_seeds):
            rows, report = concentrate_and_report(
                pipe, targets, options.images_per_class, seed=seed, method=sampling, progress=False
            )
            drawn[variant, seed] = rows, report.denoiser_calls / len(rows)
    results = {
        "rows": evaluate(drawn, held_out, pipe, options),
        "held_out_images": len(held_out),
        "networks": NETWORKS,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
        **{key: value for key, value in vars(options).items() if key not in ("out", "pipeline", "classifier")},
    }
    if options.out is not None:
        write_json(options.out, results)
    print(json.dumps(results))
    return results


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="digits", help="folder or Hub id; the digits of the package if left out")
    parser.add_argument("--classifier", help="folder or Hub id, in place of the pipeline's own")
    parser.add_argument("--dataset", default="digits", help="its training split is divided")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of every class")
    parser.add_argument("--variants", nargs="+", default=["nopt:50:0.6", "nopt:20", "nopt:16", "d4m+nopt:16"])
    parser.add_argument("--images_per_class", type=int, default=10)
    parser.add_argument("--synthesis_seeds", type=int, default=2)
    parser.add_argument("--training_seeds", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=500, help="of a training")
    parser.add_argument("--processes", type=int, default=mp.cpu_count(), help="networks that are trained at a time")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def load_pipeline(options: argparse.Namespace) -> DsCoPipeline:
    """The generator, and the classifier beside it."""
    given = {} if options.classifier is None else {"classifier": options.classifier}
    pipe = DsCoPipeline.from_pretrained(options.pipeline, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def split(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The images that are concentrated, and those held out of the same split."""
    embedded = options.dataset == "digits"
    rows = load_digits_dataset()["train"] if embedded else load_image_dataset(options.dataset, split="train")
    parts = rows.train_test_split(options.held_out, seed=0, stratify_by_column=find_columns(rows)[1])
    return parts["train"], parts["test"]


def sampling_of(variant: str, options: argparse.Namespace) -> Sampling:
    """How a variant is drawn."""
    name, steps, *start = variant.split(":")
    nopt = NOpt(**{"start": float(start[0])} if start else {})
    parts = [nopt if part == "nopt" else SamplingMethod.of(part) for part in name.split("+")]
    method = Combined(tuple(parts)) if len(parts) > 1 else parts[0]
    return Sampling(int(steps), options.guidance_scale, method=method)


def targets_of(
    sampling: Sampling, pipe: DsCoPipeline, train: Dataset, options: argparse.Namespace, made: dict[str, Any]
) -> Any:
    """What a method takes; that of each part is made once, and kept in `made`."""
    takers = {name: part for name, part in sampling.method.takers.items() if part.takes_targets}
    for name, part in takers.items():
        if name not in made:
            given = {"images_per_class": options.images_per_class, "progress": False}
            made[name] = part.make_targets(pipe, train, sampling, **given)
    own = {name: made[name] for name in takers}
    return JointTargets(own) if len(own) > 1 else next(iter(own.values()), None)


def evaluate(
    drawn: Mapping[tuple[str, int], tuple[Dataset, float]],
    held_out: Dataset,
    pipe: DsCoPipeline,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row per variant: accuracies (%) of all networks."""
    shared = (held_out, pipe.image_size, pipe.num_channels, options.steps)
    jobs = [(key, name, seed) for key in drawn for name in options.networks for seed in range(options.training_seeds)]
    tasks = [(drawn[key][0], name, seed, *shared) for key, name, seed in jobs]
    if options.processes == 1:
        found = [train_one(task) for task in tasks]
    else:
        with ProcessPoolExecutor(options.processes, mp_context=mp.get_context("spawn")) as pool:
            found = list(pool.map(train_one, tasks))
    reached: dict[tuple[str, str, int], list[float]] = {}
    for ((variant, set_seed), name, _), accuracy in zip(jobs, found, strict=True):
        reached.setdefault((variant, name, set_seed), []).append(round(100 * accuracy, 2))
    rows = []
    for variant in options.variants:
        calls = drawn[variant, 0][1]
        row: dict[str, Any] = {"variant": variant, "denoiser_calls": calls, "of_field": calls / FIELD}
        for name in options.networks:
            sets = [reached[variant, name, seed] for seed in range(options.synthesis_seeds)]
            flat = [value for one in sets for value in one]
            row[name] = {
                "mean": round(statistics.fmean(flat), 2),
                "std": round(statistics.pstdev(flat), 2),
                "accuracies": sets,
            }
        rows.append(row)
    return rows


def train_one(task: tuple[Dataset, str, int, Dataset, int, int, int]) -> float:
    """Accuracy on the held-out images of a network trained on a small set."""
    rows, name, seed, held_out, size, channels, steps = task
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    protocol = get_protocol("quick", steps=steps, image_size=size)
    images = load_image_set(rows, protocol=protocol, num_channels=channels)
    kept = load_image_set(held_out, protocol=protocol, test_for=images, num_channels=channels)
    return train_job(TrainingJob(name, protocol, seed, overrides=NETWORKS[name]), images, kept)["accuracy"]


if __name__ == "__main__":
    main()
