"""Your own data, from folder to table: concentrated sets of every size, what they train, and the dataset to publish.

    accelerate launch recipes/train_classifier.py --dataset path/to/images --output_dir outputs/classifier
    accelerate launch recipes/train_generator.py --dataset path/to/images --output_dir outputs/generator
    accelerate launch recipes/experiment.py --dataset path/to/images
    accelerate launch recipes/experiment.py --config recipes/configs/experiment_cifar10_cpu.yaml
    accelerate launch --multi_gpu --num_processes 2 recipes/experiment.py --config ...     (also without a GPU)

Takes a generator (recipes/train_generator.py) and a classifier (recipes/train_classifier.py); computes targets, draws
the sets, mixes real images in, trains evaluators on all of them with random and herded real images beside, and writes
results.json, table.md, samples.png, accuracy.png and dataset/, which recipes/publish.py sends.
Whatever is finished is kept: a run that was stopped, or that met `--max_minutes`, goes on when it is started again.
Sets do not depend on how evaluators are trained: give two runs the same `--sets_dir`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from datasets import Dataset
from transformers import PreTrainedModel

from dsco_hf.concentrate import concentrate_and_report, measure_discrepancy
from dsco_hf.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.data import check_classes, dataset_fingerprint, load_pixels, load_splits, select_per_class
from dsco_hf.doping import STRATEGIES, clearest, dope
from dsco_hf.evaluators import (
    ImageSet,
    build_evaluator,
    get_protocol,
    herd_per_class,
    load_image_set,
    run_job,
    summarise,
    train_job,
)
from dsco_hf.evaluators.checkpoints import content_hash, settings_of
from dsco_hf.evaluators.evaluation import read_job, run_environment
from dsco_hf.figures import accuracy_figure, sample_grid
from dsco_hf.files import read_json, reading, whole, write_atomically
from dsco_hf.folder import save_dataset_folder
from dsco_hf.generator_training import weights_fingerprint
from dsco_hf.model_loading import load_classifier
from dsco_hf.objectives import MATCHING
from dsco_hf.pipeline import DsCoPipeline
from dsco_hf.quantile import QuantileTargets
from dsco_hf.report import results_table
from dsco_hf.schema import nearest
from dsco_hf.set_records import read_set, write_set
from dsco_hf.shards import file_sha256
from dsco_hf.targets import MatchingTargets
from dsco_hf.values import check_choice


DRAW_AGAIN = "Delete it, and run the same command again: it is made anew."
METHODS = ("plain", "nopt", "nopt-data-free", "nopt-quantile")
FEATURES: dict[str, Any] = {
    "trained": {},
    "untrained": {"network": "classifier_2"},
    "both": [{}, {"network": "classifier_2"}],
}
DEFAULT_BUDGETS = (1, 10, 50)
PUBLISHED = ("nopt", "nopt-data-free", "nopt-quantile", "plain")  # the first that was drawn becomes the dataset
FEATURE_SEED = 1000  # of the untrained network: no evaluator's


@dataclass(frozen=True)
class ExperimentRecipe:
    """Options of this recipe.

    Attributes:
        generator, generator_revision: a pipeline, by folder or Hub id; its classes are named as the dataset's.
        classifier, classifier_revision: the trained classifier: herds real images, is the teacher of soft labels.
        features: what is matched: those of the "trained" classifier; of an "untrained" network of the evaluators'
            architecture, whose seed no evaluator has (as in distribution matching, https://arxiv.org/abs/2110.04181);
            or of "both".
        feature_architecture, feature_options: of the untrained network, if it should not be the evaluators'; options
            as JSON. With both of them, sets do not depend on the evaluators' architecture.
        dataset, dataset_name, revision, train_split: the real images.
        test_split, holdout: what evaluators are tested on, see recipes/train_classifier.py.
        image_column, label_column: for datasets with several of them.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        methods: of "plain", "nopt", "nopt-data-free" and "nopt-quantile" (the released objective, which takes long).
        budgets: images per class; if none, those of 1, 10 and 50 that every class has.
        synthesis_seeds, training_seeds: repetitions of the sets, and of the trainings on each. "nopt-quantile", whose
            cost is many times that of the others, has one synthesis seed.
        num_inference_steps, guidance_scale: of sampling.
        clearest_share: "nopt" matches this share of every class, the images that the classifier is surest of; one
            value, or one for each of the budgets. Fewer images can only show clearer ones.
        step_size, optimize_from, optimize_until: of NOpt. With a weak generator, steps of less than 1 stay closer to
            the images it knows.
        objective: of NOpt, "rkhs" or "ridge"; one, or one for each of the budgets.
        contrast, regularization: of NOpt with "rkhs" and with "ridge"; one value, or one for each of the budgets.
        block_size: images of a class that are optimised jointly.
        images_per_call: images of several classes drawn in one call, at most.
        samples_per_class: generator samples behind the data-free targets.
        template_guidance_scale, template_steps: of those samples, in place of `guidance_scale` and
            `num_inference_steps`: less guidance and more steps bring them nearer to the real images.
        weighting: of those samples by what the classifier says of them, see `MatchingTargets.from_generator`.
        doping_budgets: images per class of sets whose first part is the largest set of "nopt" below it, and whose rest
            are chosen real images; if neither these nor `budgets` are given, half of the smallest class.
        doping_strategy: how they are chosen, see `dsco_hf.dope`; "clarity" takes four students.
        quantile_iterations: of the released objective, per sampling step; its authors use 200.
        protocol: how evaluators are trained: a name or a YAML file.
        steps, epochs, batch_size, learning_rate: changes to it.
        architecture, model_options: the evaluator, see `dsco_hf.evaluators.build_evaluator`; options as JSON.
        full: also train on all real images.
        mixed_precision: "no", "fp16" or "bf16", of evaluator training; else what `accelerate launch` was told.
        max_minutes: start nothing new after this time; run again to go on.
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        sets_dir: where targets and sets are kept; `<output_dir>/work` if None.
        output_dir: where the results go.
    """

    dataset: str
    generator: str = "outputs/generator"
    classifier: str = "outputs/classifier"
    generator_revision: str | None = None
    classifier_revision: str | None = None
    features: str = "trained"
    feature_architecture: str | None = None
    feature_options: str | None = None
    dataset_name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "auto"
    holdout: float = 0.2
    image_column: str | None = None
    label_column: str | None = None
    on_error: str = "skip"
    methods: list[str] = field(default_factory=lambda: ["plain", "nopt", "nopt-data-free"])
    budgets: list[int] = field(default_factory=list)
    synthesis_seeds: int = 2
    training_seeds: int = 3
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    clearest_share: list[float] = field(default_factory=lambda: [1.0])
    step_size: float = 1.0
    optimize_from: float = 0.6
    optimize_until: float = 1.0
    objective: list[str] = field(default_factory=lambda: ["rkhs"])
    contrast: list[float] = field(default_factory=lambda: [0.0])
    regularization: list[float] = field(default_factory=lambda: [2.0])
    block_size: int = 10
    images_per_call: int = 128
    samples_per_class: int = 200
    template_guidance_scale: float | None = None
    template_steps: int | None = None
    weighting: str = "confidence"
    doping_budgets: list[int] = field(default_factory=list)
    doping_strategy: str = "herding"
    quantile_iterations: int = 200
    protocol: str = "quick"
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    architecture: str = "convnet-3"
    model_options: str = "{}"
    full: bool = False
    mixed_precision: str | None = None
    max_minutes: float | None = None
    resume: bool = True
    sets_dir: str | None = None
    output_dir: str = "outputs/experiment"

    def __post_init__(self) -> None:
        """Refuses methods and features that do not exist."""
        if self.features not in FEATURES:
            raise ValueError(
                f"`features` must be one of {list(FEATURES)}, got {self.features!r}.{nearest(self.features, FEATURES)}"
            )
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"`methods` may hold {list(METHODS)}, got {method!r}.{nearest(method, METHODS)}")
        check_choice("doping_strategy", self.doping_strategy, STRATEGIES)
        for budget in self.doping_budgets:
            if "nopt" not in self.methods:
                raise ValueError(f"Real images are added to sets of 'nopt', which `methods` {self.methods} lacks.")
            if self.budgets and min(self.budgets) >= budget:
                raise ValueError(
                    f"`doping_budgets` must exceed the smallest of `budgets` {self.budgets}, got {budget}."
                )
        for objective in self.objective:
            if objective not in MATCHING:
                raise ValueError(
                    f"`objective` may hold {list(MATCHING)}, got {objective!r}.{nearest(objective, MATCHING)}"
                )
        for name in ("clearest_share", "objective", "contrast", "regularization"):
            if len(values := getattr(self, name)) > 1 and not self.budgets:
                raise ValueError(f"Several values of `{name}` belong to as many `budgets`: give these, too.")
            if len(values) not in (1, len(self.budgets) or 1):
                raise ValueError(
                    f"`{name}` must be one value or one for each of the {len(self.budgets)} budgets {self.budgets}, "
                    f"got {values}."
                )

    def for_classes(self, smallest: int) -> ExperimentRecipe:
        """With the budgets that this number of images in the smallest class allows, where none were given."""
        if self.budgets:
            return self
        budgets = [budget for budget in DEFAULT_BUDGETS if budget <= smallest] or [1]
        doping = self.doping_budgets
        if not doping and "nopt" in self.methods and smallest // 2 > budgets[0]:
            doping = [smallest // 2]
        return dataclasses.replace(self, budgets=budgets, doping_budgets=doping)

    def at_budget(self, name: str, budget: int) -> Any:
        """The value of an option that may differ between budgets."""
        values: list[Any] = getattr(self, name)
        return values[self.budgets.index(budget) if len(values) > 1 else 0]


# What all sets depend on beside the models; the rest is about single sets, about evaluators or about folders.
_SETS = (
    "dataset", "dataset_name", "revision", "image_column", "label_column", "num_inference_steps",
    "guidance_scale", "block_size", "images_per_call", "samples_per_class", "template_guidance_scale",
    "template_steps", "weighting", "quantile_iterations", "features", "step_size", "optimize_from", "optimize_until",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages; every process works, the main one writes."""
    recipe = parse_config(ExperimentRecipe, arguments, description=__doc__)
    check_made(Path(__file__).parent, {"generator": recipe.generator, "classifier": recipe.classifier})
    datasets.disable_progress_bars()
    accelerator = make_accelerator(
        recipe.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))]
    )
    work = Path(recipe.sets_dir or Path(recipe.output_dir) / "work")
    check_anew(recipe.resume, accelerator, [work, Path(recipe.output_dir) / "evaluators"])
    run = Experiment(recipe, accelerator)
    run.make_targets()
    run.draw_sets()
    run.dope_sets()
    run.train_evaluators()
    if run.stopped():
        run.say("stopped by `max_minutes`; run the same command again to go on")
    elif accelerator.is_main_process:
        results = run.collect()
        write_atomically(run.output / "results.json", (json.dumps(results, indent=2) + "\n").encode())
        write_atomically(run.output / "table.md", (results_table(results) + "\n").encode())
        accuracy_figure(results, run.output / "accuracy.png")
        run.draw_samples(run.output / "samples.png")
        run.write_dataset(results)
        run.say(f"done: {run.output}")
        print(f"\n{results_table(results)}")
    accelerator.end_training()


def clear_name(share: float) -> str:
    """Name of the targets of the clearest images."""
    return f"clearest-{share:g}"


class Experiment:
    """What all stages share: models, data, folders and the clock."""

    def __init__(self, recipe: ExperimentRecipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.start = recipe, accelerator, time.monotonic()
        self.output = Path(recipe.output_dir)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        classifier = load_classifier(recipe.classifier, revision=recipe.classifier_revision)
        self.classifier = classifier.requires_grad_(False)
        self.pipe = DsCoPipeline.from_pretrained(
            recipe.generator, revision=recipe.generator_revision, classifier=self.classifier
        ).to(accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        settings = {name: getattr(recipe, name) for name in _SETS}
        if recipe.features != "trained":
            untrained = {"architecture": recipe.feature_architecture or recipe.architecture}
            untrained["model_options"] = recipe.feature_options or recipe.model_options
            self.pipe.register_modules(classifier_2=self.untrained_network(**untrained))
            settings |= untrained
        settings |= {"second_moment": "ridge" in recipe.objective}
        self.output.mkdir(parents=True, exist_ok=True)
        changes = {
            name: value
            for name in ("steps", "epochs", "batch_size", "learning_rate")
            if (value := getattr(recipe, name)) is not None
        }
        self.protocol = get_protocol(recipe.protocol, image_size=self.pipe.image_size, **changes)
        with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
            self.real, test, self.splits = load_splits(
                recipe.dataset,
                recipe.dataset_name,
                train_split=recipe.train_split,
                test_split=recipe.test_split,
                holdout=recipe.holdout,
                label_column=recipe.label_column,
                revision=recipe.revision,
            )
        if test is None:
            raise ValueError("Evaluators are tested: `test_split` is a split or 'auto' here, not 'none'.")
        columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
        self.train = self.images(self.real, on_error=recipe.on_error, **columns)
        self.test = self.images(test, test_for=self.train, on_error=recipe.on_error, **columns)
        if len(self.train.labels) < len(self.real):  # some cannot be decoded: nobody is to meet them again
            readable = load_pixels(self.real, num_channels=self.pipe.num_channels, image_size=self.pipe.image_size,
                                   on_error="skip", **columns)[2]  # fmt: skip
            self.real = self.real.select(readable.tolist())
        self.recipe = recipe = recipe.for_classes(int(self.train.labels.bincount().min()))
        most = max(*recipe.budgets, *recipe.doping_budgets, 1)
        check_classes(self.train.labels, self.train.names, images_per_class=most)
        self.say(f"{len(self.real)} training images, {len(self.test.labels)} test images: {self.splits['test_split']}")
        self.work = Path(recipe.sets_dir or self.output / "work") / self.identity(settings)
        (self.work / "sets").mkdir(parents=True, exist_ok=True)
        self.targets: dict[str, MatchingTargets] = {}
        self.unfinished = False
        self._sets: dict[str, ImageSet] = {}

    def identity(self, settings: dict[str, Any]) -> str:
        """Names the folder of the sets by all that decides them: settings, images and models."""
        settings |= {"fingerprint": dataset_fingerprint(
            self.real, image_column=self.recipe.image_column, label_column=self.recipe.label_column
        )}  # fmt: skip
        chosen = {name: self.splits[name] for name in self.splits if name != "test_split"}
        weights = [weights_fingerprint(part) for part in (self.pipe.denoiser, self.pipe.vae) if part is not None]
        schedule = dict(self.pipe.scheduler.config)
        return content_hash(settings, chosen, weights, schedule, self.classifier)[:8]

    def untrained_network(self, architecture: str, model_options: str) -> PreTrainedModel:
        """A network as evaluators are before their training, with a seed of its own."""
        network = build_evaluator(
            architecture,
            class_names=[self.classifier.config.id2label[i] for i in range(self.classifier.config.num_labels)],
            image_size=self.pipe.image_size,
            num_channels=self.pipe.num_channels,
            seed=FEATURE_SEED,
            **json.loads(model_options),
        )
        return network.eval().requires_grad_(False).to(self.accelerator.device)

    def images(self, rows: Dataset, **options: Any) -> ImageSet:
        """A dataset's images as evaluators get them."""
        return load_image_set(rows, protocol=self.protocol, num_channels=self.pipe.num_channels, **options)

    def say(self, text: str) -> None:
        """Prints a stage with the time since the start."""
        if self.accelerator.is_main_process:
            seconds = int(time.monotonic() - self.start)
            print(f"[{seconds // 60}:{seconds % 60:02d}] {text}", flush=True)

    def out_of_time(self) -> bool:
        """Whether nothing new may be started by this process; it is remembered."""
        limit = self.recipe.max_minutes
        self.unfinished |= limit is not None and time.monotonic() - self.start >= 60 * limit
        return self.unfinished

    def stopped(self) -> bool:
        """Whether any process left something undone."""
        mine = torch.tensor([int(self.unfinished)], device=self.accelerator.device)
        return bool(self.accelerator.gather(mine).max())

    def make_targets(self) -> None:
        """Targets with the data and without it; by all processes together."""
        recipe = self.recipe
        guidance = recipe.guidance_scale if recipe.template_guidance_scale is None else recipe.template_guidance_scale
        templates = {
            "num_inference_steps": recipe.template_steps or recipe.num_inference_steps,
            "guidance_scale": guidance,
            "samples_per_class": recipe.samples_per_class,
            "weighting": recipe.weighting,
        }
        columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
        matched = {"features": FEATURES[recipe.features], "second_moment": "ridge" in recipe.objective}

        def of_images(share: float = 1.0, **shared: Any) -> MatchingTargets:
            chosen = self.real
            if share < 1:
                chosen = clearest(self.real, self.pipe, share=share, progress=False, **columns)
            return MatchingTargets.from_dataset(chosen, self.pipe, **matched, **columns, **shared)

        # the discrepancy of all sets is measured by the first
        makers: dict[str, Callable[..., MatchingTargets]] = {"real": of_images}
        if "nopt" in recipe.methods:
            shares = sorted(set(recipe.clearest_share) - {1})
            makers |= {clear_name(share): functools.partial(of_images, share) for share in shares}
        if "nopt-data-free" in recipe.methods:
            makers["nopt-data-free"] = lambda **shared: MatchingTargets.from_generator(
                self.pipe, **templates, **matched, **shared
            )
        for method, make in makers.items():
            folder = self.work / f"targets-{method}"
            if not folder.is_dir():
                self.say(f"targets: {method}")
                start = time.perf_counter()
                targets = make(accelerator=self.accelerator, work_dir=self.work / f"{method}-pass", progress=False)
                targets.provenance["seconds"] = round(time.perf_counter() - start, 2)
                if self.accelerator.is_main_process:
                    with whole(folder) as partial:
                        targets.save_pretrained(partial)
            self.accelerator.wait_for_everyone()
            self.targets[method] = MatchingTargets.from_pretrained(folder)

    def set_names(self) -> dict[str, tuple[str, int, int]]:
        """Names of all synthetic sets, the slow ones first, with method, budget and seed."""
        return {
            f"{method}-ipc{budget}-seed{seed}": (method, budget, seed)
            for budget in sorted(self.recipe.budgets, reverse=True)
            for method in reversed(METHODS)
            if method in self.recipe.methods
            for seed in range(1 if method == "nopt-quantile" else self.recipe.synthesis_seeds)
        }

    def matching(self, method: str, budget: int) -> dict[str, Any]:
        """What may differ between the budgets of a method; kept with each set."""
        if method not in ("nopt", "nopt-data-free"):
            return {}
        objective = self.recipe.at_budget("objective", budget)
        names = ["contrast" if objective == "rkhs" else "regularization", *(["clearest_share"] * (method == "nopt"))]
        return {"objective": objective} | {name: self.recipe.at_budget(name, budget) for name in names}

    def draw_sets(self) -> None:
        """Draws the synthetic sets; every process its share."""
        recipe, quantile = self.recipe, None
        self.say(f"synthesis: {', '.join(recipe.methods)}")
        for name in list(self.set_names())[self.rank :: self.world]:
            method, budget, seed = self.set_names()[name]
            path = self.work / "sets" / f"{name}.parquet"
            matching = self.matching(method, budget)
            if (path.is_file() and self.cost(name).get("matching", matching) == matching) or self.out_of_time():
                continue
            path.unlink(missing_ok=True)  # of other settings
            options: dict[str, Any] = {"targets": self.targets.get(self.population(method, budget))}
            options |= {name: value for name, value in matching.items() if name != "clearest_share"}
            options |= {name: getattr(recipe, name) for name in ("step_size", "optimize_from", "optimize_until")}
            if method == "nopt-quantile":
                counts = {min(number, recipe.block_size) for number in recipe.budgets}
                quantile = quantile or QuantileTargets.from_dataset(
                    self.real,
                    self.pipe,
                    draws=1,
                    counts=sorted(counts),
                    progress=False,
                    image_column=recipe.image_column,
                    label_column=recipe.label_column,
                )
                options = {"targets": quantile, "objective": "quantile", "optimize_from": 0.0}
                options["optimization_steps"] = recipe.quantile_iterations
            rows, report = concentrate_and_report(
                self.pipe,
                **options,
                images_per_class=budget,
                seed=seed,
                block_size=recipe.block_size,
                images_per_call=recipe.images_per_call,
                measure_by=self.targets["real"],
                progress=False,
                num_inference_steps=recipe.num_inference_steps,
                guidance_scale=recipe.guidance_scale,
            )
            cost = json.dumps(dataclasses.asdict(report) | {"matching": matching}).encode()
            write_atomically(path.with_suffix(".json"), cost)
            write_set(rows, path)
        self.accelerator.wait_for_everyone()

    def doped_names(self) -> dict[str, tuple[str, int, int]]:
        """Names of the sets with real images in them, with the set they begin with, the budget and the seed."""
        smaller = {budget: [b for b in self.recipe.budgets if b < budget] for budget in self.recipe.doping_budgets}
        return {
            f"nopt+doping-ipc{budget}-seed{seed}": (f"nopt-ipc{max(smaller[budget])}-seed{seed}", budget, seed)
            for budget in self.recipe.doping_budgets
            for seed in range(self.recipe.synthesis_seeds)
        }

    def dope_sets(self) -> None:
        """Mixes chosen real images into the sets of "nopt"; every process its share."""
        recipe = self.recipe
        for name in list(self.doped_names())[self.rank :: self.world]:
            base, budget, seed = self.doped_names()[name]
            path, begun = self.work / "sets" / f"{name}.parquet", self.work / "sets" / f"{base}.parquet"
            if not begun.is_file() or self.out_of_time():
                self.unfinished = True
                continue
            doping = {"strategy": recipe.doping_strategy, "images_per_class": budget}
            doping |= {"num_students": 4} if recipe.doping_strategy == "clarity" else {}
            matching = {"base": file_sha256(begun), "protocol": repr(self.protocol), "doping": doping}
            matching |= {"architecture": recipe.architecture}
            if path.is_file() and self.cost(name).get("matching") == matching:
                continue
            path.unlink(missing_ok=True)
            self.say(f"doping: {name}")
            start = time.perf_counter()
            rows = dope(
                self.rows(base), self.real, self.pipe, **doping, protocol=self.protocol, seed=seed, progress=False,
                architecture=recipe.architecture, image_column=recipe.image_column, label_column=recipe.label_column,
                targets=self.targets["real"] if recipe.doping_strategy == "herding" else None,
            )  # fmt: skip
            cost = {"seconds": time.perf_counter() - start, "matching": matching}
            write_atomically(path.with_suffix(".json"), json.dumps(cost).encode())
            write_set(rows, path)
        self.accelerator.wait_for_everyone()

    def rows(self, name: str) -> Dataset:
        """A finished set as it is kept."""
        path = self.work / "sets" / f"{name}.parquet"
        with reading(path, DRAW_AGAIN):
            return read_set(path)

    def write_dataset(self, results: dict[str, Any]) -> None:
        """dataset/: the sets of the first seed with their card and records, as they are published."""
        recipe = self.recipe
        method = next((name for name in PUBLISHED if name in recipe.methods), None)
        if method is None:
            return
        chosen = {f"ipc{budget}": f"{method}-ipc{budget}-seed0" for budget in recipe.budgets}
        matched = {f"ipc{budget}": self.population(method, budget) for budget in recipe.budgets}
        for name, (base, budget, seed) in self.doped_names().items():
            if seed == 0:
                chosen[f"doped{budget}"], matched[f"doped{budget}"] = name, matched[base.split("-")[1]]
        source = {"dataset": recipe.dataset, "config": recipe.dataset_name, "revision": recipe.revision,
                  "split": self.splits["train_split"]}  # fmt: skip
        save_dataset_folder(
            {config: self.rows(name) for config, name in chosen.items()},
            self.output / "dataset",
            results=results,
            concentration={"source": {key: value for key, value in source.items() if value is not None}},
            targets={config: self.targets[name] for config, name in matched.items() if name in self.targets} or None,
            figures=[self.output / "samples.png", self.output / "accuracy.png"],
        )

    def population(self, method: str, budget: int) -> str:
        """Name of the targets that the sets of a method match."""
        share = self.matching(method, budget).get("clearest_share", 1)
        return {"nopt": "real" if share == 1 else clear_name(share)}.get(method, method)

    def sets(self) -> dict[str, ImageSet]:
        """All sets that can be trained on now: real ones, and the synthetic ones that are finished."""
        if not self._sets:
            budgets = sorted({*self.recipe.budgets, *self.recipe.doping_budgets})
            most = max(budgets)
            herded = herd_per_class(self.train, most, classifier=self.classifier).view(-1, most)  # (K, most)
            for budget in budgets:
                self._sets[f"herding-ipc{budget}-seed0"] = self.train.select(herded[:, :budget].flatten())
                for seed in range(self.recipe.synthesis_seeds):
                    rows = select_per_class(self.train.labels, budget, seed=seed)
                    self._sets[f"random-ipc{budget}-seed{seed}"] = self.train.select(rows)
        for name in (*self.set_names(), *self.doped_names()):
            if name not in self._sets and (self.work / "sets" / f"{name}.parquet").is_file():
                self._sets[name] = self.images(self.rows(name))
        return self._sets

    def jobs(self) -> dict[str, tuple[str, int]]:
        """All trainings: by name the set and the seed; those on large sets first."""
        sets = self.sets() | ({"full": self.train} if self.recipe.full else {})
        order = sorted(sets, key=lambda name: (-len(sets[name].labels), name))
        return {f"{name}-run{seed}": (name, seed) for name in order for seed in range(self.recipe.training_seeds)}

    def train_evaluators(self) -> None:
        """Trains evaluators from scratch on every set; every process does its share of the jobs."""
        self.say("training evaluators")
        jobs, sets = self.jobs(), self.sets() | {"full": self.train}
        options = {"architecture": self.recipe.architecture, "overrides": json.loads(self.recipe.model_options)}
        teacher = self.classifier if self.protocol.label_type == "teacher" else None

        def train(key: str, checkpoint: Path) -> dict[str, Any]:
            name, seed = jobs[key]
            return train_job(
                sets[name], self.test, seed=seed, protocol=self.protocol, teacher=teacher,
                accelerator=self.accelerator, checkpoint=checkpoint, **options,
            )  # fmt: skip

        def settings(key: str) -> dict[str, Any]:
            name, seed = jobs[key]
            return settings_of(
                protocol=self.protocol, options=options, images=sets[name].digest, test_images=self.test.digest,
                seed=seed, teacher=teacher, mixed_precision=self.accelerator.mixed_precision,
            )  # fmt: skip

        for key in list(jobs)[self.rank :: self.world]:
            if not self.out_of_time():
                run_job(key, train, settings=settings, folder=self.output / "evaluators")
        self.accelerator.wait_for_everyone()

    def collect(self) -> dict[str, Any]:
        """The content of results.json: one row per method and budget."""
        sets, jobs = self.sets(), self.jobs()
        folder = self.output / "evaluators"
        done: dict[str, list[dict[str, Any]]] = {}
        for key, (name, _) in jobs.items():
            done.setdefault(name, []).append(read_job(folder / f"{key}.json"))
        groups: dict[tuple[int, str], list[str]] = {}
        for name in sets:
            method, size, _ = name.rsplit("-", 2)
            groups.setdefault((int(size.removeprefix("ipc")), method), []).append(name)
        rows = []
        for (budget, method), names in sorted(groups.items()):
            costs = [self.cost(name) for name in names]
            summary = summarise([job for name in names for job in done[name]])
            rows.append(
                {"method": method, "images_per_class": budget, "images": len(sets[names[0]].labels)}
                | {key: summary[key] for key in ("accuracy_mean", "accuracy_std", "accuracies")}
                | {"synthesis_seeds": len(names), "training_seeds": self.recipe.training_seeds}
                | {"discrepancy": statistics.fmean(self.discrepancy(sets[name]) for name in names)}
                | {"seconds": statistics.fmean(cost.get("seconds", 0.0) for cost in costs)}
                | {key: costs[0].get(key, 0) for key in ("denoiser_calls", "decoder_calls", "classifier_calls")}
            )
        results: dict[str, Any] = {
            "dataset": self.recipe.dataset,
            "classes": len(self.train.names),
            "config": dataclasses.asdict(self.recipe) | {"image_size": self.pipe.image_size},
            "splits": self.splits,
            "rows": rows,
            "environment": run_environment(self.accelerator),
        }
        if "full" in done:
            full = summarise(done["full"])
            results["full"] = {key: full[key] for key in ("accuracy_mean", "accuracy_std", "accuracies")}
            results["full"] |= {"seeds": self.recipe.training_seeds, "images": len(self.train.labels)}
        return results

    def cost(self, name: str) -> dict[str, Any]:
        """What a set cost; nothing for real images."""
        path = self.work / "sets" / f"{name}.json"
        return read_json(path, DRAW_AGAIN) if path.is_file() else {}

    def discrepancy(self, images: ImageSet) -> float:
        """MMD² of a set from the real classes, mean over classes."""
        return statistics.fmean(
            measure_discrepancy(images.pixels, images.labels, self.pipe, self.targets["real"]).values()
        )

    def draw_samples(self, path: Path) -> None:
        """Real, plain, concentrated and data-free images of up to ten classes, side by side."""
        sets, budget = self.sets(), max(self.recipe.budgets)
        shown = range(min(len(self.train.names), 10))
        grid = {}
        for method in ("random", "plain", "nopt", "nopt-data-free"):
            if (images := sets.get(f"{method}-ipc{budget}-seed0")) is not None:
                name = "real" if method == "random" else method
                grid[name] = torch.stack([images.pixels[images.labels == label][:4] for label in shown])
        sample_grid(grid, [self.train.names[label] for label in shown], path)


if __name__ == "__main__":
    main()
