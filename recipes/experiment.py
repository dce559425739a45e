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
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator, InitProcessGroupKwargs
from datasets import Dataset

from dsco_hf.concentration.concentrate import concentrate_and_report
from dsco_hf.concentration.doping import dope, select
from dsco_hf.concentration.selection import Clearest, find_selection
from dsco_hf.data.datasets import Pool, check_classes
from dsco_hf.data.shards import file_sha256
from dsco_hf.evaluators import ImageSet, get_protocol, load_image_set
from dsco_hf.evaluators.evaluation import run_environment
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.models import load_classifier
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.sampling.released import QuantileTargets
from dsco_hf.studies.figures import accuracy_figure
from dsco_hf.studies.kept import KeptSets, kept_check, kept_targets, pipeline_identity
from dsco_hf.studies.plans import StudyPlan, clear_name, set_name, set_parts
from dsco_hf.studies.stages import (
    Clock,
    draw_study_samples,
    evaluate_sets,
    full_row,
    load_study_images,
    random_beside,
    read_results,
    real_baselines,
    result_rows,
    study_discrepancies,
    untrained_network,
)
from dsco_hf.studies.tables import results_table
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.files import write_atomically, write_json
from dsco_hf.utils.origins import fingerprint, identity


PUBLISHED = ("nopt", "nopt-data-free", "nopt-quantile", "plain")  # the first that was drawn becomes the dataset
FEATURE_SEED = 1000  # of the untrained network: no evaluator's


@dataclass(frozen=True)
class ExperimentRecipe(StudyPlan):
    """Options of this recipe; those of the sets are inherited.

    Attributes:
        generator, generator_revision: a pipeline, by folder or Hub id; its classes are named as the dataset's.
        classifier, classifier_revision: the trained classifier: herds real images, is the teacher of soft labels.
        feature_architecture, feature_options: of the untrained network, if it should not be the evaluators'; options
            as JSON. With both of them, sets do not depend on the evaluators' architecture.
        dataset, dataset_name, revision, train_split: the real images.
        test_split, holdout: what evaluators are tested on, see recipes/train_classifier.py.
        image_column, label_column: for datasets with several of them.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        training_seeds: repetitions of the trainings on each set.
        check_images: plain samples of a class that the classifier is asked about before anything is drawn, 64 at most;
            0 asks nothing.
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
    training_seeds: int = 3
    check_images: int = 4
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
    run.check_generator()
    run.draw_sets()
    run.dope_sets()
    run.train_evaluators()
    if run.clock.any_unfinished():
        run.clock.say("stopped by `max_minutes`; run the same command again to go on")
    elif accelerator.is_main_process:
        results = run.collect()
        write_json(run.output / "results.json", results)
        write_atomically(run.output / "table.md", (results_table(results) + "\n").encode())
        accuracy_figure(results, run.output / "accuracy.png")
        draw_study_samples(run.sets(), max(run.recipe.budgets), run.output / "samples.png")
        run.write_dataset(results)
        run.clock.say(f"done: {run.output}")
        print(f"\n{results_table(results)}")
    accelerator.end_training()


class Experiment:
    """What all stages share: models, data and folders."""

    def __init__(self, recipe: ExperimentRecipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.clock = Clock(accelerator, recipe.max_minutes)
        self.output = Path(recipe.output_dir)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
        classifier = load_classifier(recipe.classifier, revision=recipe.classifier_revision)
        self.classifier = classifier.requires_grad_(False)
        self.pipe = DsCoPipeline.from_pretrained(
            recipe.generator, revision=recipe.generator_revision, classifier=self.classifier
        ).to(accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.output.mkdir(parents=True, exist_ok=True)
        changes = {
            name: value
            for name in ("steps", "epochs", "batch_size", "learning_rate")
            if (value := getattr(recipe, name)) is not None
        }
        self.protocol = get_protocol(recipe.protocol, image_size=self.pipe.image_size, **changes)
        with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
            self.real, self.train, self.test, self.splits = load_study_images(
                recipe.dataset, recipe.dataset_name, pipe=self.pipe, protocol=self.protocol, on_error=recipe.on_error,
                train_split=recipe.train_split, test_split=recipe.test_split, holdout=recipe.holdout,
                revision=recipe.revision, **self.columns,
            )  # fmt: skip
        tested = f"{len(self.test.labels)} test images: {self.splits['test_split']}"
        self.clock.say(f"{len(self.real)} training images, {tested}")
        self.pool = Pool(self.real, progress=False, **self.columns)
        self.recipe = recipe = recipe.for_classes(int(self.train.labels.bincount().min()))
        check_classes(self.train.labels, self.train.names, images_per_class=max(recipe.sizes))
        if recipe.features != "trained":
            self.pipe.register_modules(classifier_2=untrained_network(
                self.pipe, list(self.classifier.config.id2label.values()),
                recipe.feature_architecture or recipe.architecture, seed=FEATURE_SEED,
                **json.loads(recipe.feature_options or recipe.model_options),
            ))  # fmt: skip
        origin = {name: getattr(recipe, name) for name in ("dataset", "dataset_name", "revision")}
        taken = {name: self.splits[name] for name in self.splits if name != "test_split"}
        settings = {**recipe.shared, **origin, **self.columns, "splits": taken, "images": self.train.digest}
        self.made_with = pipeline_identity(self.pipe, self.real, **settings)
        self.work = Path(recipe.sets_dir or self.output / "work") / fingerprint(self.made_with)[:8]
        self.kept = KeptSets(self.work / "sets")
        self.targets: dict[str, MatchingTargets] = {}
        self.check: dict[str, Any] | None = None
        self.results: dict[str, list[Path]] = {}
        self.discrepancies: dict[str, float] = {}
        self._sets: dict[str, ImageSet] = {}

    def images(self, rows: Dataset, **options: Any) -> ImageSet:
        """A dataset's images as evaluators get them."""
        return load_image_set(rows, protocol=self.protocol, num_channels=self.pipe.num_channels, **options)

    def make_targets(self) -> None:
        """Targets with the data and without it; by all processes together."""
        recipe = self.recipe

        def of_images(share: float = 1.0, **shared: Any) -> MatchingTargets:
            chosen = self.real
            if share < 1:
                chosen = select(self.pool, Clearest(share), pipe=self.pipe)
            return MatchingTargets.from_dataset(chosen, self.pipe, **recipe.matched, **self.columns, **shared)

        # the discrepancy of all sets is measured by the first
        makers: dict[str, Callable[..., MatchingTargets]] = {"real": of_images}
        if "nopt" in recipe.methods:
            shares = sorted(set(recipe.clearest_share) - {1})
            makers |= {clear_name(share): functools.partial(of_images, share) for share in shares}
        if "nopt-data-free" in recipe.methods:
            makers["nopt-data-free"] = lambda **shared: MatchingTargets.from_generator(
                self.pipe, **recipe.templates, **recipe.matched, **shared
            )

        def timed(name: str, **shared: Any) -> MatchingTargets:
            self.clock.say(f"targets: {name}")
            start = time.perf_counter()
            targets = makers[name](progress=False, **shared)
            targets.provenance["seconds"] = round(time.perf_counter() - start, 2)
            return targets

        for name in makers:
            self.targets[name] = kept_targets(
                self.work / f"targets-{name}", {**self.made_with, "population": name}, functools.partial(timed, name),
                accelerator=self.accelerator, renew=True,
            )  # fmt: skip

    def check_generator(self) -> None:
        """Says what the classifier makes of plain samples, beside real images, before anything is drawn."""
        recipe = self.recipe
        if not recipe.check_images or not self.accelerator.is_main_process:
            return
        found = kept_check(
            self.work / "generator_check.json", self.pipe, self.real, **self.columns,
            class_labels=self.targets["real"].class_labels, images_per_class=recipe.check_images,
            num_inference_steps=recipe.num_inference_steps, guidance_scale=recipe.guidance_scale,
        )  # fmt: skip
        if found is not None:
            self.check = found.record()
            self.clock.say(str(found))

    def draw_sets(self) -> None:
        """Draws the synthetic sets; every process its share."""
        recipe, quantile = self.recipe, None
        self.clock.say(f"synthesis: {', '.join(recipe.methods)}")
        for name in recipe.set_names()[self.rank :: self.world]:
            method, budget, seed = set_parts(name)
            population, options = recipe.drawing(method, budget)
            targets: Any = self.targets.get(population or "")
            matched = recipe.pivots if method == "nopt-quantile" else targets
            made_with = {**self.made_with, "set": identity(seed=seed, budget=budget, targets=matched, **options)}
            if self.kept.is_made(name, made_with) or self.clock.is_over():
                continue
            if method == "nopt-quantile":
                quantile = quantile or QuantileTargets.from_dataset(
                    self.real, self.pipe, progress=False, **recipe.pivots, **self.columns
                )
                targets = quantile
            rows, report = concentrate_and_report(
                self.pipe, targets, budget, seed=seed, measure_by=self.targets["real"], progress=False, **options
            )
            self.kept.save(name, rows, made_with, population=population, **dataclasses.asdict(report))
        self.accelerator.wait_for_everyone()

    def dope_sets(self) -> None:
        """Mixes chosen real images into the sets of "nopt"; every process its share."""
        recipe, bases = self.recipe, self.recipe.doped_names()
        for name in list(bases)[self.rank :: self.world]:
            _, budget, seed = set_parts(name)
            if bases[name] not in self.kept or self.clock.is_over():
                self.clock.unfinished = True
                continue
            rule = find_selection(
                recipe.doping_strategy, targets=self.targets["real"], num_students=4, protocol=self.protocol,
                architecture=recipe.architecture,
            )  # fmt: skip
            doping: dict[str, Any] = {"strategy": rule, "images_per_class": budget, "seed": seed}
            base, precision = file_sha256(self.kept.file(bases[name])), self.accelerator.mixed_precision
            made_with = {**self.made_with, "set": identity(base=base, mixed_precision=precision, **doping)}
            if self.kept.is_made(name, made_with):
                continue
            self.clock.say(f"doping: {name}")
            start = time.perf_counter()
            rows = dope(self.kept.rows(bases[name]), self.pool, self.pipe, progress=False, **doping)
            self.kept.save(name, rows, made_with, population="real", seconds=time.perf_counter() - start)
        self.accelerator.wait_for_everyone()

    def sets(self) -> dict[str, ImageSet]:
        """All sets that can be trained on now: real ones, and the synthetic ones that are finished."""
        recipe = self.recipe
        if not self._sets:
            seeds = recipe.synthesis_seeds
            self._sets = real_baselines(self.train, recipe.sizes, random_seeds=seeds, classifier=self.classifier)
        for name in (*recipe.set_names(), *recipe.doped_names()):
            if name not in self._sets and name in self.kept:
                self._sets[name] = self.images(self.kept.rows(name))
        return self._sets

    def train_evaluators(self) -> None:
        """Trains evaluators from scratch on every set; every process does its share."""
        self.clock.say("training evaluators")
        self.results = evaluate_sets(
            self.sets() | ({"full": self.train} if self.recipe.full else {}),
            self.test,
            training_seeds=self.recipe.training_seeds,
            folder=self.output / "evaluators",
            clock=self.clock,
            rank=self.rank,
            world=self.world,
            architecture=self.recipe.architecture,
            overrides=json.loads(self.recipe.model_options),
            protocol=self.protocol,
            teacher=self.classifier if self.protocol.label_type == "teacher" else None,
            accelerator=self.accelerator,
        )
        self.accelerator.wait_for_everyone()

    def collect(self) -> dict[str, Any]:
        """The content of results.json: one row per method and budget."""
        sets, done = self.sets(), read_results(self.results)
        self.discrepancies = study_discrepancies(sets, self.pipe, self.targets["real"])
        sizes = {name: len(images.labels) for name, images in sets.items()}
        results: dict[str, Any] = {
            "dataset": self.recipe.dataset,
            "classes": len(self.train.names),
            "config": dataclasses.asdict(self.recipe) | {"image_size": self.pipe.image_size},
            "splits": self.splits,
            "rows": result_rows(sizes, done, self.discrepancies, {name: self.kept.told(name) for name in sets}),
            "generator_check": self.check,
            "environment": run_environment(self.accelerator),
        }
        if "full" in done:
            results["full"] = full_row(done["full"], len(self.train.labels))
        return results

    def write_dataset(self, results: dict[str, Any]) -> None:
        """dataset/: the sets of the first seed with their card and records, as they are published."""
        method = next((name for name in PUBLISHED if name in self.recipe.methods), None)
        if method is None:
            return
        recipe, doped = self.recipe, self.recipe.doped_names()
        chosen = {f"ipc{budget}": set_name(method, budget, 0) for budget in recipe.budgets}
        drawn = dict(chosen)  # the set that was drawn, of doped ones, too
        for budget in recipe.doping_budgets:
            chosen[f"doped{budget}"] = set_name("nopt+doping", budget, 0)
            drawn[f"doped{budget}"] = doped[chosen[f"doped{budget}"]]
        matched = {config: self.kept.told(name).get("population") for config, name in drawn.items()}
        source = {"dataset": recipe.dataset, "config": recipe.dataset_name, "revision": recipe.revision,
                  "split": self.splits["train_split"]}  # fmt: skip
        record: dict[str, Any] = {"source": {key: value for key, value in source.items() if value is not None}}
        if self.check is not None:
            record["generator_check"] = self.check
        beside = random_beside(self.discrepancies)
        record["configs"] = {
            config: {"discrepancy": {"set": self.discrepancies[name], "as many random real images": beside[name]}}
            for config, name in chosen.items()
        }
        save_dataset_folder(
            {config: self.kept.rows(name) for config, name in chosen.items()},
            self.output / "dataset",
            results=results,
            concentration=record,
            targets={config: self.targets[name] for config, name in matched.items() if name in self.targets} or None,
            figures=[self.output / "samples.png", self.output / "accuracy.png"],
        )


if __name__ == "__main__":
    main()
