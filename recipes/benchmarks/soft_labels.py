"""What labels are worth that tell more than a class: made beforehand by a teacher or a regression, or while training.

    python recipes/benchmarks/soft_labels.py --out soft_labels.json
    python recipes/benchmarks/soft_labels.py --dataset FOLDER --image_size 16 --images 10000 --test_images 5000

Random real images, of the digits or of a dataset that is given; one set for each seed, with which the networks are
trained, too, so that all labels are compared on the same images and first weights. The teacher is a ConvNet-3 that is
trained on all `--images`, unless one is given. Networks are trained by the same number of steps and augmentation
(shifts, and flips of what are no digits), which is also that of the views; the last epoch counts.

Labels: "hard"; "1 view" and "views", what `add_soft_labels` stores; "views, softened", the same with temperature 4;
"learned", those of `add_learned_labels` from targets of all `--images`; "teacher" and "teacher, softened", asked for
every augmented batch.

Prints one JSON object as its last line. `rows`: by network, images per class and labels the accuracies (%) by seed,
their mean and deviation, and `gain` over hard labels, paired by seed, with its standard error; `teacher`: accuracy of
the teacher (%); `regression`: error on the population (1 is that of answering always the same) and accuracy (%) of the
ridge regression that learns hard and learned labels, mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch.nn import functional as F
from transformers import PreTrainedModel

from dsco_hf import (
    DsCoPipeline,
    ImageSet,
    MatchingTargets,
    add_learned_labels,
    add_soft_labels,
    build_evaluator,
    get_protocol,
    load_digits_dataset,
    load_image_dataset,
    load_image_set,
    select,
    train_evaluator,
)
from dsco_hf.data.datasets import class_names
from dsco_hf.evaluators import Execution, TrainingJob, predict_logits, train_job
from dsco_hf.evaluators.augmentation import HorizontalFlip, RandomShift
from dsco_hf.evaluators.protocols import Protocol
from dsco_hf.matching.discrepancy import embed_pixels
from dsco_hf.matching.kernels import regression_errors
from dsco_hf.sampling.models import load_classifier
from dsco_hf.utils.origins import versions


SOFTENED = 4.0
LABELS: dict[str, dict[str, Any]] = {
    "hard": {},
    "1 view": {"label_type": "stored"},
    "views": {"label_type": "stored"},
    "views, softened": {"label_type": "stored", "temperature": SOFTENED},
    "learned": {"label_type": "learned"},
    "teacher": {"label_type": "teacher"},
    "teacher, softened": {"label_type": "teacher", "temperature": SOFTENED},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "convnet-3": {"width": 32},
    "resnet-18": {"width": 8, "norm": "instance"},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Makes teacher and targets, labels every set in every way, and trains the networks."""
    options = read_options(arguments)
    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    train, test = open_data(options)
    channels = 1 if options.dataset is None else 3
    augmentation = (RandomShift(max(1, options.image_size // 8)), *([HorizontalFlip()] if options.dataset else []))
    protocol = get_protocol("quick", steps=options.steps, augmentation=augmentation, image_size=options.image_size)
    whole = load_image_set(train, protocol=protocol, num_channels=channels)
    tested = load_image_set(test, protocol=protocol, test_for=whole, num_channels=channels)
    teacher = make_teacher(options, whole, protocol)
    pipe = looking_pipeline(teacher, options.image_size, channels, class_names(train))
    targets = MatchingTargets.from_dataset(train, pipe, progress=False)
    results: dict[str, Any] = {
        "rows": [],
        "regression": [],
        "teacher": percent(predict_logits(teacher, tested.pixels), tested.labels),
        "images": len(train),
        "test_images": len(test),
        **{
            key: value
            for key, value in vars(options).items()
            if key not in ("out", "dataset", "teacher", "test_images")
        },
        "dataset": "digits" if options.dataset is None else options.dataset.name,
        "widths": {name: values["width"] for name, values in NETWORKS.items()},
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": versions(),
    }
    for budget in options.budgets:
        sets, regressions = {}, []
        for seed in range(options.seeds):
            few = select(train, "random", images_per_class=budget, seed=seed, progress=False)
            sets[seed] = labelled(few, teacher, pipe, targets, options, augmentation)
            regressions.append(regression(sets[seed]["learned"], pipe, targets, tested))
        results["regression"] += [summed(budget, regressions)]
        results["rows"] += rows_of(sets, budget, options, protocol, tested, teacher)
        results["seconds"] = round(time.perf_counter() - start, 1)
        if options.out is not None:  # also what is finished before all is
            options.out.write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(json.dumps(results))
    return results


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="a dataset with the splits train and test; digits if left out")
    parser.add_argument("--image_size", type=int, default=8)
    parser.add_argument("--images", type=int, help="the first of the training split; all if left out")
    parser.add_argument("--test_images", type=int, help="the last of the test split; all if left out")
    parser.add_argument("--teacher", type=Path, help="folder of a classifier; one is trained if left out")
    parser.add_argument("--teacher_epochs", type=int, default=30)
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 50], metavar="IMAGES_PER_CLASS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def open_data(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The images that may be chosen from, and those to test on."""
    if options.dataset is None:
        digits = load_digits_dataset()
        train, test = digits["train"], digits["test"]
    else:
        train, test = (load_image_dataset(str(options.dataset), split=split) for split in ("train", "test"))
    first, last = options.images or len(train), options.test_images or len(test)
    return train.select(range(min(first, len(train)))), test.select(range(max(0, len(test) - last), len(test)))


def make_teacher(options: argparse.Namespace, whole: ImageSet, protocol: Protocol) -> PreTrainedModel:
    """The teacher that was given, or one that is trained on all images."""
    if options.teacher is not None:
        return load_classifier(str(options.teacher))
    torch.manual_seed(0)
    model = build_evaluator(
        "convnet-3", class_names=whole.names, num_channels=whole.pixels.shape[1], image_size=options.image_size,
        width=64, norm="batch",
    )  # fmt: skip
    longer = get_protocol(
        "quick", epochs=options.teacher_epochs, batch_size=128, learning_rate=2e-3, augmentation=protocol.augmentation
    )
    return train_evaluator(model, whole, protocol=longer).model


def looking_pipeline(teacher: PreTrainedModel, size: int, channels: int, names: list[str]) -> DsCoPipeline:
    """A pipeline whose classifier is the teacher; its generator is never asked."""
    network = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=channels, out_channels=channels, num_layers=1,
        sample_size=size, patch_size=2, num_embeds_ada_norm=len(names), norm_num_groups=1,
    )  # fmt: skip
    return DsCoPipeline(network, DDIMScheduler(), classifier=teacher, id2label=dict(enumerate(names)))


def labelled(
    few: Dataset,
    teacher: PreTrainedModel,
    pipe: DsCoPipeline,
    targets: MatchingTargets,
    options: argparse.Namespace,
    augmentation: tuple[Any, ...],
) -> dict[str, Dataset]:
    """A set with the labels of every kind, by their name."""
    shared: dict[str, Any] = {"augmentation": augmentation, "image_size": options.image_size, "progress": False}
    views = add_soft_labels(few, teacher, views=options.views, **shared)
    return {
        **dict.fromkeys(LABELS, few),
        "1 view": add_soft_labels(few, teacher, **shared),
        "views": views,
        "views, softened": views,
        "learned": add_learned_labels(few, pipe, targets, progress=False),
    }


def rows_of(
    sets: Mapping[int, Mapping[str, Dataset]],
    budget: int,
    options: argparse.Namespace,
    protocol: Protocol,
    tested: ImageSet,
    teacher: PreTrainedModel,
) -> list[dict[str, Any]]:
    """A row for every network and kind of labels."""
    rows, execution = [], Execution()
    for network in options.networks:
        found: dict[str, list[float]] = {}
        for name, changes in LABELS.items():
            own = get_protocol("quick", **{**kept(protocol), **changes})
            for seed, ways in sets.items():
                images = load_image_set(ways[name], protocol=own, num_channels=tested.pixels.shape[1])
                asked = teacher if own.label_type == "teacher" else None
                job = TrainingJob(network, own, seed, asked, execution, NETWORKS[network])
                found.setdefault(name, []).append(100 * train_job(job, images, tested)["accuracy"])
            rows.append(row_of(network, budget, name, found))
    return rows


def kept(protocol: Protocol) -> dict[str, Any]:
    """What all labels share of a protocol."""
    return {name: getattr(protocol, name) for name in ("steps", "augmentation", "image_size")}


def row_of(network: str, budget: int, name: str, found: Mapping[str, list[float]]) -> dict[str, Any]:
    """Accuracies of one kind of labels, and what they gain over hard ones."""
    values, gains = found[name], [a - b for a, b in zip(found[name], found["hard"], strict=True)]
    several = len(values) > 1
    return {
        "network": network,
        "images_per_class": budget,
        "labels": name,
        "accuracy": round(statistics.fmean(values), 2),
        "accuracy_std": round(statistics.stdev(values), 2) if several else None,
        "gain": round(statistics.fmean(gains), 2),
        "gain_error": round(statistics.stdev(gains) / len(gains) ** 0.5, 2) if several else None,
        "accuracies": [round(value, 2) for value in values],
    }


def regression(
    few: Dataset, pipe: DsCoPipeline, targets: MatchingTargets, tested: ImageSet
) -> dict[str, tuple[float, float]]:
    """Error on the population and accuracy (%) of the regression itself, with λ = 0.1, by its labels."""
    count = targets.num_classes
    reading: dict[str, Any] = {
        "protocol": get_protocol("quick", image_size=pipe.image_size),
        "num_channels": pipe.num_channels,
    }
    images = load_image_set(few, **reading)
    psi = embed_pixels(images.pixels, pipe, targets).double()
    seen = embed_pixels(tested.pixels, pipe, targets).double()
    means, moment = targets.embeddings.double(), targets.second_moment
    assert moment is not None
    cross = (means - means.mean(0)).T / count
    gram = psi @ psi.T
    solver = torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    ways = {"hard": F.one_hot(images.labels, count), "learned": torch.tensor(few["learned_label"][:])}
    found = {}
    for name, labels in ways.items():
        wanted = labels.double() - 1 / count
        error = float(regression_errors(psi, wanted, moment.double(), cross, 0.1).sum()) / (1 - 1 / count) + 1
        found[name] = (error, percent(seen @ (psi.T @ (solver @ wanted)), tested.labels))
    return found


def summed(budget: int, found: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """The mean over seeds."""
    return {
        "images_per_class": budget,
        **{
            name: {
                what: round(statistics.fmean(one[name][place] for one in found), 3)
                for place, what in enumerate(("error", "accuracy"))
            }
            for name in found[0]
        },
    }


def percent(answers: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy (%) of answers `(N, K)` to labels `(N,)`."""
    return round(100 * float((answers.argmax(1) == labels).double().mean()), 2)


if __name__ == "__main__":
    main()
