"""What to match: features, objective, contrast, all images or clear ones, by what the small set trains.

    python recipes/benchmarks/feature_choices.py --out feature_choices.json
    python recipes/benchmarks/feature_choices.py --pipeline FOLDER --synthesis_seeds 2 --training_seeds 3

Digits; nothing here sees their test split: models are trained on 80 % of the training split, accuracies are of the
other 20 %. The first classifier is a ConvNet of two blocks, the second a small ResNet of transformers, fed at 32 px. A
pipeline that is given must have been trained on the same 80 % (`train_test_split(0.2, seed=1)`, stratified); without
one a short training makes a weaker generator, which shifts all accuracies alike.

Prints one JSON object as its last line. `rows`: per choice of features and images per class, mean and standard
deviation of the accuracy (%) of a ConvNet-2 over synthesis and training seeds, and the discrepancy in the pooled
features, which is the same measure for all; `features`: the specs behind the names; `best`: name of the best choice
by images per class; `classifiers`: the accuracies of the two. Two rows weigh the layers otherwise than the package,
where each counts alike: "by size" leaves every dimension its weight, "kernel each" gives every layer a kernel of its
own bandwidth and as many of the random features. Rows "pooled (default), contrast ..." and "..., clearest fifth" match
the default features with `contrast`, and targets of the clearest images. Rows "ridge, ..." have that objective: with
the default features, those of an untrained ConvNet-2 of another seed than the evaluators', or of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel

from dsco_hf import RKHS, DsCoPipeline, MatchingTargets, build_evaluator, concentrate, load_digits_dataset, select
from dsco_hf.data.datasets import load_pixels
from dsco_hf.evaluators import (
    Execution,
    TrainingJob,
    get_protocol,
    load_image_set,
    predict_logits,
    train_evaluator,
    train_job,
)
from dsco_hf.evaluators.augmentation import RandomShift
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_scheduler
from dsco_hf.generators.training import train_generator
from dsco_hf.matching.discrepancy import measure_discrepancy
from dsco_hf.matching.feature_spec import FeatureSource, FeatureSpec, feature_specs, layer_weights
from dsco_hf.matching.kernels import draw_frequencies, fourier_embedding, median_bandwidth


FIRST, LAST = "convnet.blocks.3", "convnet.blocks.7"  # what leaves the two blocks: 4x4 and 2x2 positions
DEFAULT = "pooled (default)"  # of versions before ridge with both
CHOICES: dict[str, Any] = {
    DEFAULT: {},
    "last block, average": {"layers": [LAST]},
    "last block, mean and std": {"layers": [LAST], "pooling": "mean_std"},
    "first block, grid": {"layers": [FIRST], "pooling": "grid2"},
    "logits": {"layers": ["logits"]},
    "pooled + first block, average": {"layers": ["pooled", FIRST]},
    "pooled + first block, grid": {"layers": ["pooled", FIRST], "pooling": "grid2"},
    "pooled + logits": {"layers": ["pooled", "logits"]},
    "second classifier, pooled": {"network": "classifier_2"},
    "second classifier, middle stage, grid": {"layers": ["hidden_2"], "pooling": "grid2", "network": "classifier_2"},
    "second classifier, pooled + middle stage, grid": {
        "layers": ["pooled", "hidden_2"], "pooling": "grid2", "network": "classifier_2"
    },
    "both classifiers, pooled": [{}, {"network": "classifier_2"}],
    "random network": {"network": "random"},
    "pooled + random network": [{}, {"network": "random"}],
}  # fmt: skip
WEIGHED = "pooled + first block, grid"
CONTRASTS = {
    f"{DEFAULT}, contrast {contrast:g}": {"objective": RKHS(contrast)} for contrast in (0.5, 1.0, 2.0, 4.0, 8.0)
}
CLEAR = {f"{DEFAULT}, clearest fifth": {}, f"{DEFAULT}, clearest fifth, contrast 2": {"objective": RKHS(2.0)}}
UNTRAINED = FeatureSpec(network="untrained", architecture="convnet-2", width=256, seed=1000)  # no evaluator's seed
RIDGE: dict[str, Any] = {
    "ridge, pooled": {},
    "ridge, untrained": UNTRAINED,
    "ridge, pooled + untrained": [{}, UNTRAINED],
}
OTHERWISE = (f"{WEIGHED}, by size", f"{WEIGHED}, kernel each")
SAMPLING = {"guidance_scale": 1.0, "num_inference_steps": 20, "progress": False}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains what is missing, draws a small set for every choice, and trains evaluators on each."""
    options = read_options(arguments)
    start = time.perf_counter()
    torch.set_num_threads(options.processes)
    datasets.disable_progress_bars()
    choices = {name: spec for name, spec in CHOICES.items() if options.choices is None or name in options.choices}
    train, held_out = split_digits()
    pipe, accuracies = make_pipeline(options)
    targets = {
        name: MatchingTargets.from_dataset(train, pipe, features=spec, progress=False)
        for name, spec in choices.items()
    }
    if WEIGHED in targets:
        targets |= {name: weighed_otherwise(targets[WEIGHED], train, pipe, name) for name in OTHERWISE}
    judge = MatchingTargets.from_dataset(train, pipe, features={}, progress=False)
    matched: dict[str, Any] = {"objective": RKHS()}
    variants: dict[str, tuple[MatchingTargets | None, dict[str, Any]]] = {"plain": (None, {"method": "plain"})}
    variants |= {name: (value, matched) for name, value in targets.items()}
    if DEFAULT in targets:
        chosen = select(train, "clearest", pipe=pipe, progress=False)
        clear = MatchingTargets.from_dataset(chosen, pipe, features={}, progress=False)
        variants |= {name: (targets[DEFAULT], changes) for name, changes in CONTRASTS.items()}
        variants |= {name: (clear, matched | changes) for name, changes in CLEAR.items()}
        for name, spec in RIDGE.items():
            variants[name] = (MatchingTargets.from_dataset(train, pipe, features=spec, progress=False), {})
    sets: dict[tuple[str, int, int], Dataset] = {}
    for budget in options.budgets:
        for seed in range(options.synthesis_seeds):
            sets["random real", budget, seed] = select(train, "random", images_per_class=budget, seed=seed)
            for name, (chosen, changes) in variants.items():
                sets[name, budget, seed] = concentrate(pipe, chosen, budget, seed=seed, **changes, **SAMPLING)
    rows = evaluate(sets, options)
    for row in rows:
        row["discrepancy"] = round(mean_discrepancy(sets, row, pipe, judge), 5)
    results = {
        "rows": rows,
        "best": {
            str(budget): max(
                (row for row in rows if row["images_per_class"] == budget), key=lambda row: row["accuracy"]
            )["features"]
            for budget in options.budgets
        },
        "features": {name: [spec.as_record() for spec in feature_specs(value)] for name, value in choices.items()},
        "feature_dims": {name: value.feature_dim for name, value in targets.items()},
        "classifiers": accuracies,
        "held_out_images": len(held_out),
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key not in ("out", "pipeline", "choices")},
        "pipeline": None if options.pipeline is None else options.pipeline.name,
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="pipeline folder; a generator is trained if left out")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 10], metavar="IMAGES_PER_CLASS")
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), help="all if left out")
    parser.add_argument("--synthesis_seeds", type=int, default=1)
    parser.add_argument("--training_seeds", type=int, default=2)
    parser.add_argument("--generator_steps", type=int, default=1200)
    parser.add_argument("--classifier_steps", type=int, default=600)
    parser.add_argument("--evaluator_steps", type=int, default=400, help="for 1 image per class; twice that for more")
    parser.add_argument("--processes", type=int, default=mp.cpu_count(), help="evaluators that are trained at a time")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


@functools.cache
def split_digits() -> tuple[Dataset, Dataset]:
    """The part of the training split that is used, and the part that is held out for accuracies."""
    parts = load_digits_dataset()["train"].train_test_split(0.2, seed=1, stratify_by_column="label")
    return parts["train"], parts["test"]


def make_pipeline(options: argparse.Namespace) -> tuple[DsCoPipeline, dict[str, float]]:
    """Generator and two classifiers, and the classifiers' accuracies (%)."""
    accelerator = Accelerator()
    protocol = get_protocol(
        "quick", steps=options.classifier_steps, augmentation=(RandomShift(1),), learning_rate=2e-3
    )
    train, held_out = split_digits()
    images = load_image_set(train, protocol=protocol, num_channels=1)
    kept = load_image_set(held_out, protocol=protocol, test_for=images, num_channels=1)

    def classifier(architecture: str, **overrides: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        model = build_evaluator(architecture, class_names=images.names, num_channels=1, **overrides)
        train_evaluator(model, images, protocol=protocol, execution=Execution(accelerator))
        return model.eval()

    second = classifier("resnet-small", image_size=32)
    if options.pipeline is not None:
        pipe = DsCoPipeline.from_pretrained(options.pipeline, classifier_2=second)
        if pipe.classifier is None:
            pipe.register_modules(classifier=classifier("convnet-2", image_size=8, width=64, norm="batch"))
    else:
        config = GeneratorTrainingConfig(
            train_steps=options.generator_steps, batch_size=64, num_attention_heads=3, timestep_spacing="leading"
        )
        trained = train_generator(
            images.pixels, images.labels, config, num_classes=10, accelerator=accelerator, distributed=False
        )
        pipe = DsCoPipeline(
            **trained.components,
            scheduler=build_scheduler(config, latents=False),
            classifier=classifier("convnet-2", image_size=8, width=64, norm="batch"),
            id2label=dict(enumerate(images.names)),
            classifier_2=second,
        )
    pipe.set_progress_bar_config(disable=True)
    accuracies = {
        name: round(100 * float((predict_logits(model, kept.pixels).argmax(dim=1) == kept.labels).float().mean()), 2)
        for name, model in (("classifier", pipe.classifier), ("classifier_2", pipe.classifier_2))
    }
    return pipe, accuracies


def weighed_otherwise(targets: MatchingTargets, train: Dataset, pipe: DsCoPipeline, name: str) -> MatchingTargets:
    """The same layers with the weights of `name`, one of `OTHERWISE`."""
    pixels, labels, _ = load_pixels(train, num_channels=pipe.num_channels)
    source = FeatureSource(pipe, targets.features)
    features, sizes = source.of_pixels(pixels).features, [block.shape[1] for block in source.probe()]
    std = targets.feature_std * layer_weights(sizes)
    x = (features - targets.feature_mean) / std
    generator = torch.Generator().manual_seed(0)
    if name == OTHERWISE[0]:
        frequencies = draw_frequencies(len(std), targets.embedding_dim, median_bandwidth(x), generator=generator)
    else:
        share = 2 * (targets.embedding_dim // (2 * len(sizes)))
        blocks = [
            draw_frequencies(part.shape[1], share, median_bandwidth(part), generator=generator)
            for part in x.split(sizes, dim=1)
        ]
        frequencies = torch.block_diag(*blocks)
    psi = fourier_embedding(x, frequencies)
    embeddings = torch.stack([psi[labels == row].mean(dim=0) for row in range(targets.num_classes)])
    return dataclasses.replace(targets, feature_std=std, frequencies=frequencies, embeddings=embeddings)


def evaluate(sets: Mapping[tuple[str, int, int], Dataset], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per choice and budget: accuracies (%) over synthesis and training seeds."""
    jobs = [(key, seed) for key in sets for seed in range(options.training_seeds)]
    jobs.sort(key=lambda job: -job[0][1])  # the long ones first
    tasks = [(sets[key], seed, options.evaluator_steps * (1 + (key[1] > 1))) for key, seed in jobs]
    if options.processes == 1:
        found = [train_one(task) for task in tasks]
    else:
        with ProcessPoolExecutor(options.processes, mp_context=mp.get_context("spawn")) as pool:
            found = list(pool.map(train_one, tasks))
    by_row: dict[tuple[int, str], list[float]] = {}
    for ((name, budget, _), _), accuracy in zip(jobs, found, strict=True):
        by_row.setdefault((budget, name), []).append(100 * accuracy)
    names = list(dict.fromkeys(name for name, *_ in sets))
    return [
        {
            "features": name,
            "images_per_class": budget,
            "accuracy": round(statistics.fmean(by_row[budget, name]), 2),
            "accuracy_std": round(statistics.pstdev(by_row[budget, name]), 2),
            "accuracies": [round(value, 2) for value in by_row[budget, name]],
        }
        for budget in options.budgets
        for name in names
    ]


def train_one(task: tuple[Dataset, int, int]) -> float:
    """Accuracy on the held-out images of an evaluator trained on a small set."""
    rows, seed, steps = task
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    protocol = get_protocol("quick", steps=steps, augmentation=(RandomShift(1),))
    images = load_image_set(rows, protocol=protocol, num_channels=1)
    kept = load_image_set(split_digits()[1], protocol=protocol, test_for=images, num_channels=1)
    job = TrainingJob("convnet-2", protocol, seed, overrides={"width": 64})
    return train_job(job, images, kept)["accuracy"]


def mean_discrepancy(
    sets: Mapping[tuple[str, int, int], Dataset], row: Mapping[str, Any], pipe: DsCoPipeline, judge: MatchingTargets
) -> float:
    """MMD² in the default features, mean over classes and synthesis seeds."""
    protocol = get_protocol("quick")
    values = []
    for (name, budget, _), rows in sets.items():
        if (name, budget) == (row["features"], row["images_per_class"]):
            images = load_image_set(rows, protocol=protocol, num_channels=1)
            values += measure_discrepancy(images.pixels, images.labels, pipe, judge).values()
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
