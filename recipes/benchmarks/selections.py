"""Which real images teach most: every selection at several budgets, alone or on top of a synthetic set.

    python recipes/benchmarks/selections.py --out selections_digits.json
    python recipes/benchmarks/selections.py --on_top outputs/quickstart/dataset --folder outputs/selections
    python recipes/benchmarks/selections.py --dataset path/to/parquet --image_size 16 --images 16500
    python recipes/benchmarks/selections.py --dataset path/to/parquet --protocol protocol.yaml --length "same steps"

Every class gives the same number of images. All scores of training dynamics are of one logged training, all features
of one network of its architecture; both, and every training, are kept in `--folder`, where a run that was killed goes
on. Networks are tested on a validation part of the training images and on the test images at once. Only what they
reach on the first decides what goes on: a selection whose accuracy, over all evaluators, lies below that of random
images by more than two standard errors at two budgets is not trained at larger ones. Test accuracies are looked at in
the table alone. Where a choice is random (random, CCS, DUAL) each training has one of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import multiprocessing as mp
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from numpy.typing import NDArray
from transformers import AutoModelForImageClassification, PreTrainedModel

from dsco_hf import DsCoPipeline, get_protocol, load_image_dataset, train_evaluator
from dsco_hf.concentration.additions.doping import choose
from dsco_hf.concentration.selection import Clarity, Clearest, Selection, TrainingLog, log_training
from dsco_hf.data.datasets import Pool
from dsco_hf.data.splits import stratified_indices
from dsco_hf.evaluators import ImageSet, Protocol, load_image_set, protocol_to_dict
from dsco_hf.evaluators.augmentation import HorizontalFlip, RandomShift
from dsco_hf.evaluators.evaluation import evaluator_builder, read_job, run_environment, save_network, unpacked
from dsco_hf.evaluators.training import Execution
from dsco_hf.studies.lossless.find import LENGTHS, with_length
from dsco_hf.studies.study import Study
from dsco_hf.utils.configs import make_accelerator
from dsco_hf.utils.files import write_atomically, write_json
from dsco_hf.utils.origins import fingerprint


DYNAMICS = ("el2n", "forgetting", "aum", "dyn_unc", "dual", "ccs", "d2")
FEATURES = ("herding", "moderate", "k_center", "d2", "ridge_rule")
SEEDED = ("random", "ccs", "dual")
SELECTIONS = list(dict.fromkeys(["random", "ridge_rule", "clarity", "clearest", *FEATURES, *DYNAMICS]))
BEHIND = 2.0  # standard errors
PLACES = ("out", "folder", "on_top", "processes", "protocol")  # no figures
# The second has no part in the choice of images: it is another architecture than the one that is asked.
EVALUATORS = {"convnet-2": {"width": 32}, "resnetap-10": {"width": 16, "depths": [1, 1]}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints a table and, last, one line of JSON."""
    options, start = read_options(arguments), time.perf_counter()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Benchmark(options, Path(options.folder or temporary))
        bench.run()
        results = bench.results()
    results |= {"seconds": round(time.perf_counter() - start, 1), "environment": run_environment(bench.accelerator)}
    table = results_table(results)
    if options.out is not None:
        write_json(options.out, results)
        write_atomically(options.out.with_suffix(".md"), table.encode())
    print(table)
    print(json.dumps(results))
    return results


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="with the splits train and test")
    parser.add_argument("--image_size", type=int, help="px; that of the images by default")
    parser.add_argument("--images", type=int, help="of the training split, with the validation part; all by default")
    parser.add_argument("--validation", type=float, default=0.2, help="its share")
    parser.add_argument("--test_images", type=int, help="all by default")
    parser.add_argument("--on_top", help="a synthetic set that chosen images are added to: folder or Hub id")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=SELECTIONS)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2], help="of all images")
    parser.add_argument("--observer", default="convnet-2", help="architecture of the log and of the features")
    parser.add_argument("--log_epochs", type=int, help="30, or those of --protocol")
    parser.add_argument("--evaluators", type=json.loads, default=EVALUATORS, help="values of each architecture, JSON")
    parser.add_argument("--steps", type=int, default=60, help="up to 10 images per class; twice that above")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument(
        "--protocol", help="a YAML file, in place of these two: how all networks are trained, the observer too"
    )
    parser.add_argument("--length", default=LENGTHS[1], choices=LENGTHS, help="as all images by that protocol")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of an evaluator on a set")
    parser.add_argument("--processes", type=int, default=mp.cpu_count(), help="trainings at a time")
    parser.add_argument("--folder", type=Path, help="keeps all that was made")
    parser.add_argument("--out", type=Path, help="a JSON file; the table lies beside it")
    return parser.parse_args(arguments)


class Benchmark:
    """Images, rules, sets and their trainings."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        changes = (RandomShift(1),) if options.dataset == "digits" else (HorizontalFlip(), RandomShift(2))
        shared: dict[str, Any] = {"augmentation": changes, "image_size": options.image_size}
        steps, logged = ((10, options.steps), (None, 2 * options.steps)), {"epochs": options.log_epochs or 30}
        if options.protocol is None:
            self.protocol = get_protocol("quick", steps=steps, learning_rate=options.learning_rate, **shared)
            self.observing = get_protocol("quick", **logged, **shared)
        else:
            self.protocol = get_protocol(options.protocol)
            self.observing = get_protocol(options.protocol, **(logged if options.log_epochs else {}))
        self.accelerator = make_accelerator(options.mixed_precision)
        self.execution = Execution(self.accelerator, compiled=options.compile)
        train, validation, test = load_parts(options, self.protocol)
        if options.protocol is not None:
            self.protocol = with_length(self.protocol, options.length, train)
        self.validated, self.train = len(validation.labels), train
        judged = [torch.cat([getattr(one, name) for one in (validation, test)]) for name in ("pixels", "labels")]
        self.judged = ImageSet(*judged, train.names)
        self.pool, self.small = Pool(train, progress=False), None
        if options.on_top is not None:
            rows = load_image_dataset(options.on_top, split="train")
            size, channels = train.pixels.shape[-1], train.pixels.shape[1]
            protocol = get_protocol("quick", image_size=size)
            images = load_image_set(rows, protocol=protocol, classes=train.names, num_channels=channels)
            self.small = Pool(images, progress=False)
        per_class = len(train.labels) / len(train.names)
        self.budgets = sorted({max(1, round(share * per_class)) for share in options.shares})
        self.dropped: dict[str, list[int]] = {}
        self.choosing: dict[str, float] = {}  # seconds

    def run(self) -> None:
        """Chooses images and trains, from the smallest budget on."""
        rules = self.rules()
        chosen = {name: self.chosen(name, rule) for name, rule in rules.items()}
        behind: dict[str, list[int]] = {name: [] for name in rules}
        for budget in self.budgets:
            sets = {f"{name}-ipc{budget}": own[budget] for name, own in chosen.items() if name not in self.dropped}
            if self.small is not None and budget == self.budgets[0]:
                sets["nothing-ipc0"] = self.small.real
            for evaluator in self.options.evaluators:
                self.train_all(sets, evaluator)
                say(f"{budget} per class: {len(sets)} sets, {evaluator}")
            found = {name: self.judge(name, budget, validation=True) for name in rules if name not in self.dropped}
            for name, figures in found.items():
                if "random" in found and below(figures, found["random"]):
                    behind[name].append(budget)
                    if len(behind[name]) == 2:
                        self.dropped[name] = behind[name]

    def rules(self) -> dict[str, Selection]:
        """The selections, with the log and the network that they need."""
        options, names = self.options, self.options.selections
        needs: dict[str, Any] = {}
        if set(names) & set(DYNAMICS):
            needs["training"] = self.logged()
        if set(names) & {*FEATURES, "clarity", "clearest"}:
            needs["features"] = self.network()
        found: dict[str, Selection] = {}
        for name in names:
            known = {"training": name in DYNAMICS, "features": name in FEATURES}
            found[name] = Selection.of({"name": name, **{key: needs[key] for key, has in known.items() if has}})
        if "clearest" in found:
            found["clearest"] = Clearest(share=1.0)
        if "clarity" in found:
            teaching = {"protocol": self.protocol, "architecture": options.observer, "num_students": 4}
            found["clarity"] = Clarity(student=needs["features"]) if self.small is None else Clarity(**teaching)
        self.pipe = asked(needs["features"], self.train) if "clearest" in found else None
        return found

    def logged(self) -> TrainingLog:
        """One training, from which all scores of dynamics are computed."""
        start = time.perf_counter()
        log = log_training(
            self.pool, self.folder / "log", architecture=self.options.observer, protocol=self.observing,
            execution=self.execution, progress=False,
        )  # fmt: skip
        say(f"logged training: {time.perf_counter() - start:.0f} s")
        return log

    def network(self) -> PreTrainedModel:
        """A network trained on all images, in whose features images are compared."""
        made_with = (self.train.digest, self.options.observer, protocol_to_dict(self.observing))
        folder, start = self.folder / f"network-{fingerprint(*made_with)[:8]}", time.perf_counter()
        if not (folder / "config.json").exists():
            build = evaluator_builder(self.options.observer, self.train, self.observing)
            how: dict[str, Any] = {"protocol": self.observing, "seed": 1, "execution": self.execution}
            save_network(train_evaluator(build, self.train, **how).model, folder)
        say(f"network: {time.perf_counter() - start:.0f} s")
        return AutoModelForImageClassification.from_pretrained(folder).eval()

    def chosen(self, name: str, rule: Selection) -> dict[int, Any]:
        """The sets of a rule by images per class (chosen ones): images, or a function of the training's seed."""
        start, most, classes = time.perf_counter(), max(self.budgets), len(self.train.names)
        choice = functools.partial(choose, rule, self.pool, self.small, pipe=self.pipe)
        before = None if self.small is None else self.small.real
        sets: dict[int, Any] = {}
        if name in SEEDED:
            for budget in self.budgets:
                own = [joined(before, self.train.select(choice([budget] * classes, seed=seed)))
                       for seed in range(self.options.seeds)]  # fmt: skip
                sets[budget] = own.__getitem__
        else:
            places = choice([most] * classes, seed=0).view(classes, most)
            for budget in self.budgets:
                sets[budget] = joined(before, self.train.select(places[:, :budget].flatten()))
        self.choosing[name] = round(time.perf_counter() - start, 2)
        say(f"{name}: chosen in {self.choosing[name]:.0f} s")
        return sets

    def train_all(self, sets: Mapping[str, Any], evaluator: str) -> None:
        """Trains an evaluator on every set, unless that was done before."""
        told = {"protocol": self.protocol, "architectures": [evaluator], "seeds": self.options.seeds,
                "overrides": self.options.evaluators[evaluator], "compiled": self.options.compile}  # fmt: skip
        share = functools.partial(train_share, dict(sets), self.judged, self.folder / evaluator, told,
                                  self.options.mixed_precision)  # fmt: skip
        world = self.options.processes
        if world == 1:
            share(0, 1)
            return
        with ProcessPoolExecutor(world, mp_context=mp.get_context("spawn")) as processes:
            list(processes.map(share, range(world), [world] * world))

    def judge(self, name: str, budget: int, *, validation: bool, evaluator: str | None = None) -> NDArray[np.bool_]:
        """Which images `(M,)` each training on a set is right on, `(T, M)`: of one evaluator or of all."""
        found = []
        for own in [evaluator] if evaluator else list(self.options.evaluators):
            for seed in range(self.options.seeds):
                job = read_job(self.folder / own / "jobs" / f"{name}-ipc{budget}-{own}-run{seed}.json")
                found.append(unpacked(job["correct"], len(self.judged.labels)))
        right = np.stack(found)
        return right[:, : self.validated] if validation else right[:, self.validated :]

    def results(self) -> dict[str, Any]:
        """All figures as JSON values; accuracies in percent."""
        options = self.options
        last = {name: self.dropped.get(name, self.budgets)[-1] for name in options.selections}
        chosen = [(name, budget) for budget in self.budgets for name in last if budget <= last[name]]
        if self.small is not None:
            chosen.insert(0, ("nothing", 0))
        rows = [self.row(name, budget, evaluator) for name, budget in chosen for evaluator in options.evaluators]
        ranks = mean_ranks([row for row in rows if row["images_per_class"]], set(self.dropped))
        by_validation = {name: own["validation"] for name, own in ranks.items() if own["validation"] is not None}
        return {
            "rows": rows,
            "mean_rank": ranks,
            "best_by_validation": min(by_validation, key=lambda name: by_validation[name], default=None),
            "dropped": self.dropped,
            "ridge_rule_minus": self.differences("ridge_rule", ["herding", "clarity", "random"]),
            "seconds_choosing": self.choosing,
            "budgets": self.budgets,
            "classes": len(self.train.names),
            "counts": {"choice": len(self.train.labels), "validation": self.validated,
                       "test": len(self.judged.labels) - self.validated,
                       "on_top": 0 if self.small is None else len(self.small.labels)},
            "protocol": protocol_to_dict(self.protocol),
            **{key: value for key, value in vars(options).items() if key not in PLACES},
            "dataset": Path(options.dataset).name,
        }  # fmt: skip

    def row(self, name: str, budget: int, evaluator: str) -> dict[str, Any]:
        """What an evaluator reaches on the sets of a rule at one size."""
        parts = {part: 100 * self.judge(name, budget, validation=part == "validation", evaluator=evaluator).mean(1)
                 for part in ("validation", "test")}  # fmt: skip
        return {
            "selection": name,
            "images_per_class": budget,
            "evaluator": evaluator,
            "accuracy": round(float(parts["test"].mean()), 2),
            "accuracy_std": round(float(parts["test"].std(ddof=1)), 2) if self.options.seeds > 1 else None,
            "accuracies": [round(float(value), 2) for value in parts["test"]],
            "validation": round(float(parts["validation"].mean()), 2),
        }

    def differences(self, name: str, others: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Points that a rule is ahead of others on the test images, with standard errors, by budget."""
        told: dict[str, dict[str, list[float]]] = {}
        for other in others:
            if {name, other} <= set(self.options.selections):
                last = min(self.dropped.get(one, self.budgets)[-1] for one in (name, other))
                told[other] = {
                    str(budget): difference(*(self.judge(one, budget, validation=False) for one in (name, other)))
                    for budget in self.budgets
                    if budget <= last
                }
        return told


def load_parts(options: argparse.Namespace, protocol: Protocol) -> tuple[ImageSet, ImageSet, ImageSet]:
    """The images to choose from, the validation part, and the test images."""
    splits = {name: load_image_dataset(options.dataset, split=name) for name in ("train", "test")}
    channels = 1 if options.dataset == "digits" else 3
    whole = load_image_set(splits["train"], protocol=protocol, num_channels=channels)
    test = load_image_set(splits["test"], protocol=protocol, test_for=whole, num_channels=channels)
    if options.images is not None and options.images < len(whole.labels):
        whole = whole.select(torch.from_numpy(stratified_indices(whole.labels.numpy(), options.images, 0)[1]))
    if options.test_images is not None and options.test_images < len(test.labels):
        test = test.select(torch.from_numpy(stratified_indices(test.labels.numpy(), options.test_images, 0)[1]))
    train, validation = stratified_indices(whole.labels.numpy(), options.validation, 1)
    return whole.select(torch.from_numpy(train)), whole.select(torch.from_numpy(validation)), test


def asked(network: PreTrainedModel, images: ImageSet) -> DsCoPipeline:
    """A pipeline for a rule that asks the classifier of one; its generator is never used."""
    size, channels = images.pixels.shape[-1], images.pixels.shape[1]
    tiny: dict[str, Any] = {
        "sample_size": size, "in_channels": channels, "out_channels": channels, "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1,
        "norm_num_groups": 1, "num_class_embeds": len(images.names) + 1,
    }  # fmt: skip
    names = dict(enumerate(images.names))
    return DsCoPipeline(unet=UNet2DModel(**tiny), scheduler=DDIMScheduler(), classifier=network, id2label=names)


def joined(before: ImageSet | None, chosen: ImageSet) -> ImageSet:
    """Chosen images after those of the synthetic set, if there is one."""
    if before is None:
        return chosen
    pixels, labels = (torch.cat([getattr(one, name) for one in (before, chosen)]) for name in ("pixels", "labels"))
    return ImageSet(pixels, labels, chosen.names)


def train_share(
    sets: dict[str, Any], judged: ImageSet, folder: Path, told: dict[str, Any], precision: str | None, rank: int,
    world: int,
) -> None:  # fmt: skip
    """One process's share of the trainings."""
    if world > 1:
        torch.set_num_threads(1)
    Study(sets, judged, folder, accelerator=make_accelerator(precision), **told).train(rank=rank, world=world)


def below(right: NDArray[np.bool_], of_random: NDArray[np.bool_]) -> bool:
    """Whether trainings are clearly behind those on random images, see [`difference`]."""
    mean, error = difference(right, of_random)
    return mean < -BEHIND * error


def difference(right: NDArray[np.bool_], other: NDArray[np.bool_]) -> list[float]:
    """Points ahead and their standard error: over trainings `(T, M)` or over images, whichever is wider."""
    gap = right.mean(0) - other.mean(0)  # (M,)
    trainings = sum(one.mean(1).var(ddof=1) / len(one) for one in (right, other)) if len(right) > 1 else 0.0
    error = math.sqrt(max(float(trainings), float(gap.var(ddof=1)) / len(gap)))
    return [round(100 * float(gap.mean()), 2), round(100 * error, 2)]


def mean_ranks(rows: Sequence[Mapping[str, Any]], dropped: set[str]) -> dict[str, dict[str, float | None]]:
    """The mean over budgets and evaluators of the place by accuracy, 1 the best; None for what was dropped."""
    places: dict[str, dict[str, list[int]]] = {}
    for key in ("accuracy", "validation"):
        for group in sorted({(row["images_per_class"], row["evaluator"]) for row in rows}):
            own = [row for row in rows if (row["images_per_class"], row["evaluator"]) == group]
            for place, row in enumerate(sorted(own, key=lambda row: -row[key]), start=1):
                places.setdefault(row["selection"], {}).setdefault(key, []).append(place)
    return {
        name: {("test" if key == "accuracy" else key): None if name in dropped else round(statistics.fmean(own), 2)
               for key, own in found.items()}
        for name, found in places.items()
    }  # fmt: skip


def results_table(results: Mapping[str, Any]) -> str:
    """Test accuracies by evaluator, in Markdown, the best mean rank first."""
    ranks, lines = results["mean_rank"], []
    order = sorted(ranks, key=lambda name: (ranks[name]["test"] is None, ranks[name]["test"] or 0, name))
    for evaluator in results["evaluators"]:
        found = {
            (row["selection"], row["images_per_class"]): row
            for row in results["rows"]
            if row["evaluator"] == evaluator
        }
        lines += [f"{evaluator}, test accuracy (%) by chosen images per class:", ""]
        lines += ["| selection | " + " | ".join(f"{budget}" for budget in results["budgets"]) + " | mean rank, all |"]
        lines += ["| --- |" + " ---: |" * (len(results["budgets"]) + 1)]
        for name in order:
            cells = [told(found[name, budget]) if (name, budget) in found else "" for budget in results["budgets"]]
            rank = "dropped" if ranks[name]["test"] is None else f"{ranks[name]['test']:.1f}"
            lines += [f"| {name} | {' | '.join(cells)} | {rank} |"]
        if ("nothing", 0) in found:
            lines += ["", f"The synthetic set alone: {told(found['nothing', 0])}."]
        lines += [""]
    return "\n".join(lines)


def told(row: Mapping[str, Any]) -> str:
    """An accuracy with its deviation."""
    return f"{row['accuracy']:.1f}" + (f" ± {row['accuracy_std']:.1f}" if row["accuracy_std"] is not None else "")


def say(text: str) -> None:
    """Tells how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.getLogger("dsco_hf.concentration.selection").setLevel(logging.ERROR)
    main()
