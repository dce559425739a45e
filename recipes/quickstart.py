"""The main job, end to end, on the digits: train generator and classifier, concentrate, dope, evaluate, report.

    accelerate launch recipes/quickstart.py
    accelerate launch recipes/quickstart.py --small --fresh

Writes results.json, samples.png, accuracy.png, features.png, dataset/ and pipeline/ to outputs/quickstart. What is
there already is used again; --fresh starts anew, --small is a setting for tests of the software, whose numbers mean
nothing. `recipes/concentrate.py --from outputs/quickstart/dataset` draws the dataset again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    QuantileTargets,
    build_evaluator,
    concentrate_and_report,
    dope,
    get_protocol,
    load_digits_dataset,
    train_evaluator,
)
from dsco_hf.concentration.concentrate import embed_pixels
from dsco_hf.concentration.doping import select, selected_rows
from dsco_hf.concentration.selection import Herding, find_selection
from dsco_hf.data.datasets import Pool
from dsco_hf.data.shards import file_sha256
from dsco_hf.evaluators import Execution, load_image_set
from dsco_hf.evaluators.augmentation import RandomShift
from dsco_hf.evaluators.evaluation import run_environment
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_scheduler
from dsco_hf.generators.training import train_generator
from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.sampling.models import load_classifier
from dsco_hf.studies.feature_figures import feature_figure
from dsco_hf.studies.figures import accuracy_figure
from dsco_hf.studies.kept import DRAW_AGAIN, KeptSets, kept_targets, pipeline_identity
from dsco_hf.studies.stages import (
    Clock,
    draw_study_samples,
    evaluate_sets,
    full_row,
    read_results,
    result_rows,
    study_discrepancies,
)
from dsco_hf.studies.tables import results_table
from dsco_hf.utils.configs import make_accelerator, parse_config
from dsco_hf.utils.files import read_json, whole, write_atomically, write_json
from dsco_hf.utils.origins import fingerprint, identity, versions


METHODS = ("plain", "nopt", "nopt-data-free", "nopt-classifier-only", "nopt-quantile")
BUDGETS = (1, 3, 10)
GUIDANCE = 1.0
# With the generator's cosine noise, images are decided between these steps; chosen on a part of the training images.
INTERVAL: dict[str, Any] = {"optimize_from": 0.5, "optimize_until": 0.9}
# One image cannot resemble a class: it aims at what sets the class apart. With three it no longer helped, there.
CONTRAST = {1: 2.0}
DOPING: dict[str, Any] = {"strategy": "clarity", "num_students": 4}
EVALUATOR: dict[str, Any] = {"architecture": "convnet-2", "overrides": {"width": 64}}
# What is matched: an untrained network of the evaluators' kind (as in distribution matching, arXiv 2110.04181), which
# led to better sets than the trained classifier's features (README). Its weights are of a seed that no evaluator has.
FEATURES: dict[str, Any] = {"network": "classifier_2"}
FEATURE_SEED = 1000
GENERATOR: dict[str, Any] = {
    "batch_size": 64,
    "num_attention_heads": 3,
    "activation_fn": "linear-silu",  # a step takes less time than with the usual GELU
    "beta_schedule": "squaredcos_cap_v2",  # the linear one spends half of its steps on nearly pure noise
}
CLASSIFIER: dict[str, Any] = {"architecture": "convnet-2", "image_size": 8, "num_channels": 1, "width": 64}


@dataclass(frozen=True)
class Quickstart:
    """Settings.

    Attributes:
        output_dir: where the results go.
        small: a run of under two minutes that only shows that everything works.
        fresh: remove what an earlier run left.
        doped_share: size of the doped dataset, as a share of the training set.
        generator_steps: training steps of the generator.
        num_inference_steps: of all sampling. Few steps of ancestral sampling draw images that are too much alike.
        templates_per_class: generator samples behind the data-free targets.
        synthesis_seeds, training_seeds: repetitions; the quantile rows have one synthesis seed.
        single_seeds: synthesis seeds at one image per class, where sets differ most.
        random_seeds: choices of random real images there, and where the doped dataset is compared with them.
        herding_seeds: herded sets at each budget, by as many classifiers: which images are herded depends on the
            classifier, and accuracy with it.
        quantile_iterations: of the released objective, per sampling step; its authors use 200.
    """

    output_dir: str = "outputs/quickstart"
    small: bool = False
    fresh: bool = False
    doped_share: float = 0.3
    generator_steps: int = 6250
    num_inference_steps: int = 40
    templates_per_class: int = 200
    synthesis_seeds: int = 2
    single_seeds: int = 4
    random_seeds: int = 6
    herding_seeds: int = 4
    training_seeds: int = 3
    quantile_iterations: int = 10

    def at_size(self) -> Quickstart:
        """The settings that are run: those of `--small` if it was asked for."""
        if not self.small:
            return self
        return dataclasses.replace(
            self,
            generator_steps=300,
            num_inference_steps=10,
            templates_per_class=20,
            synthesis_seeds=1,
            single_seeds=1,
            random_seeds=1,
            herding_seeds=2,
            training_seeds=2,
            quantile_iterations=3,
        )


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages; every process works, the main one writes."""
    recipe = parse_config(Quickstart, arguments, description=__doc__).at_size()
    accelerator = make_accelerator()
    datasets.disable_progress_bars()
    run = Run(recipe, accelerator)
    run.clock.say("digits: 1,437 training and 360 test images of 8x8 pixels")
    pipe = train_models(run)
    targets = make_targets(run, pipe)
    sets = synthesise(run, pipe, targets)
    sets |= doped_sets(run, pipe, sets) | real_sets(run)
    run.clock.say("training evaluators")
    jobs = train_evaluators(run, sets, rank=accelerator.process_index, world=accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        results = collect(run, pipe, targets["nopt"], sets, jobs)
        write_results(run, results)
        draw(run, pipe, targets["nopt"], sets, results)
        write_dataset(run, targets, sets, results)
        run.clock.say(f"done: {run.output}")
        print(f"\n{results_table(results)}")
    accelerator.end_training()


class Run:
    """What all stages share: the data, the folders and the clock."""

    def __init__(self, recipe: Quickstart, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.clock = recipe, accelerator, Clock(accelerator)
        self.output = Path(recipe.output_dir)
        steps = ((10, 100), (None, 200)) if recipe.small else ((10, 400), (None, 1500))
        self.protocol = get_protocol("quick", steps=steps, augmentation=(RandomShift(1),))
        digits = load_digits_dataset()
        self.real = digits["train"]
        self.train = load_image_set(digits["train"], protocol=self.protocol, num_channels=1)
        self.test = load_image_set(digits["test"], protocol=self.protocol, test_for=self.train, num_channels=1)
        settings = dataclasses.asdict(recipe) | {"output_dir": "", "fresh": False}
        constants = [GUIDANCE, INTERVAL, CONTRAST, DOPING, EVALUATOR, FEATURES, FEATURE_SEED, GENERATOR, CLASSIFIER]
        self.identity = fingerprint(
            settings, constants, self.protocol, self.train.digest, accelerator.mixed_precision, versions()
        )[:8]
        self.work = self.output / "work" / self.identity
        if recipe.fresh and accelerator.is_main_process:
            shutil.rmtree(self.output, ignore_errors=True)
        accelerator.wait_for_everyone()
        self.work.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            for partial in self.work.glob("**/*.partial"):  # of a run that was cut off
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        accelerator.wait_for_everyone()
        self.kept = KeptSets(self.work / "sets")

    @property
    def sampling(self) -> dict[str, Any]:
        """How every image is drawn."""
        return {"guidance_scale": GUIDANCE, "num_inference_steps": self.recipe.num_inference_steps}

    def seeds(self, budget: int) -> range:
        """Synthesis seeds at so many images per class."""
        return range(self.recipe.single_seeds if budget == 1 else self.recipe.synthesis_seeds)

    @property
    def doped_per_class(self) -> int:
        """Size of the doped dataset and of its baselines, per class."""
        return round(self.recipe.doped_share * len(self.real) / len(self.train.names))

    def herded(self, seed: int) -> Path:
        """The rows herded by the features of a classifier, by budget."""
        return self.work / f"herded-seed{seed}.json"

    @property
    def evaluators(self) -> Path:
        """Where the evaluators' results lie."""
        return self.work / "evaluators"


def train_models(run: Run) -> DsCoPipeline:
    """The classifiers, and then the generator by the main process.

    Meanwhile the other processes train the evaluators that need no generator: real baselines and all data.
    """
    folder, recipe, accelerator = run.work / "pipeline", run.recipe, run.accelerator
    train_classifiers(run)
    if not folder.is_dir():
        if accelerator.is_main_process:
            run.clock.say("training the generator" + "; real baselines meanwhile" * (accelerator.num_processes > 1))
            config = GeneratorTrainingConfig(train_steps=recipe.generator_steps, **GENERATOR)
            trained = train_generator(
                run.train.pixels, run.train.labels, config, num_classes=10, accelerator=accelerator, distributed=False
            )
            scheduler = build_scheduler(config, latents=False)
            names = dict(enumerate(run.train.names))
            pipe = DsCoPipeline(
                **trained.components,
                scheduler=scheduler,
                classifier=load_classifier(str(run.work / "classifier")),
                classifier_2=untrained_network(run.train.names),
                id2label=names,
            )
            with whole(folder) as partial:
                pipe.save_pretrained(partial)
        else:
            others = {"rank": accelerator.process_index - 1, "world": accelerator.num_processes - 1}
            train_evaluators(run, real_sets(run), **others)
    accelerator.wait_for_everyone()
    return DsCoPipeline.from_pretrained(folder).to(accelerator.device)


def train_classifiers(run: Run) -> None:
    """Trains the pipeline's classifier and others, each of which herds real images; every process does its share."""
    run.clock.say("training the classifiers")
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    protocol = dataclasses.replace(run.protocol, steps=100 if run.recipe.small else 800, learning_rate=2e-3)
    for seed in range(run.recipe.herding_seeds)[rank::world]:
        if run.herded(seed).is_file():
            continue
        classifier = new_classifier(run.train.names, seed)
        train_evaluator(classifier, run.train, protocol=protocol, seed=seed, execution=Execution(run.accelerator))
        if seed == 0:
            classifier.save_pretrained(run.work / "classifier")
        budgets = (*BUDGETS, run.doped_per_class)
        pool, rule = Pool(run.train), Herding(features=classifier.eval())
        rows = {budget: selected_rows(pool, rule, images_per_class=budget).tolist() for budget in budgets}
        write_atomically(run.herded(seed), json.dumps(rows).encode())
    run.accelerator.wait_for_everyone()


def new_classifier(names: list[str], seed: int) -> PreTrainedModel:
    """A classifier before its training."""
    return build_evaluator(class_names=names, norm="batch", seed=seed, **CLASSIFIER)


def untrained_network(names: list[str]) -> PreTrainedModel:
    """The network whose features are matched."""
    return build_evaluator(class_names=names, seed=FEATURE_SEED, **CLASSIFIER).eval()


def make_targets(run: Run, pipe: DsCoPipeline) -> dict[str, MatchingTargets]:
    """Targets with the data and without it, by method."""
    makers: dict[str, Callable[..., MatchingTargets]] = {
        "nopt": lambda **shared: MatchingTargets.from_dataset(run.real, pipe, features=FEATURES, **shared),
        "nopt-data-free": lambda **shared: MatchingTargets.from_generator(
            pipe, samples_per_class=run.recipe.templates_per_class, features=FEATURES, **run.sampling, **shared
        ),
    }

    def timed(method: str, **shared: Any) -> MatchingTargets:
        run.clock.say(f"targets of {method}")
        start = time.perf_counter()
        targets = makers[method](**shared)
        targets.provenance["seconds"] = round(time.perf_counter() - start, 2)
        return targets

    made_with = pipeline_identity(pipe, run.real, templates=run.recipe.templates_per_class, **run.sampling)
    return {
        method: kept_targets(
            run.work / f"targets-{method}",
            {**made_with, "population": method},
            functools.partial(timed, method),
            accelerator=run.accelerator,
            renew=True,
        )  # fmt: skip
        for method in makers
    }


def synthesise(run: Run, pipe: DsCoPipeline, targets: dict[str, MatchingTargets]) -> dict[str, Dataset]:
    """All synthetic sets by name; one process draws all that are compared in time."""
    slow = [("nopt-quantile", budget, 0) for budget in BUDGETS]
    others = [(method, budget, seed) for budget in BUDGETS for seed in run.seeds(budget) for method in METHODS[:-1]]
    units: list[list[tuple[str, int, int]]] = [[slow[-1], slow[0]], slow[1:-1] + others]
    run.clock.say("synthesis: " + ", ".join(METHODS))
    quantile = QuantileTargets.from_dataset(run.real, pipe, draws=1, counts=BUDGETS, progress=False)
    options: dict[str, dict[str, Any]] = {
        "plain": {"targets": None, "optimization_steps": 0},
        "nopt": {"targets": targets["nopt"], **INTERVAL},
        "nopt-data-free": {"targets": targets["nopt-data-free"], **INTERVAL},
        "nopt-classifier-only": {"targets": None, "objective": "classifier"},
        "nopt-quantile": {
            "targets": quantile,
            "objective": "quantile",
            "optimization_steps": run.recipe.quantile_iterations,
            "optimize_from": 0.0,
        },
    }
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    models = pipeline_identity(pipe)
    mine = [key for unit in units[rank::world] for key in unit]
    for method, budget, seed in tqdm(mine, desc="Sets", disable=rank > 0):
        name = f"{method}-ipc{budget}-seed{seed}"
        choice: dict[str, Any] = {"images_per_class": budget, "seed": seed, **options[method], **run.sampling}
        if method in targets:
            choice["contrast"] = CONTRAST.get(budget, 0.0)
        made_with = {**models, "set": identity(**choice)}
        if not run.kept.is_made(name, made_with):
            rows, report = concentrate_and_report(pipe, progress=False, **choice)
            run.kept.save(name, rows, made_with, **dataclasses.asdict(report))
    run.accelerator.wait_for_everyone()
    names = [f"{method}-ipc{budget}-seed{seed}" for unit in units for method, budget, seed in unit]
    return {name: run.kept.rows(name) for name in names}


def real_sets(run: Run) -> dict[str, Dataset]:
    """The baselines that need no generator: random and herded real images at every budget."""
    found: dict[str, Dataset] = {}
    for budget in (*BUDGETS, run.doped_per_class):
        for seed in range(run.recipe.herding_seeds if budget in BUDGETS else 1):
            herded = read_json(run.herded(seed), DRAW_AGAIN)
            found[f"herding-ipc{budget}-seed{seed}"] = run.real.select(herded[str(budget)])
        many = budget in (1, run.doped_per_class)
        for seed in range(run.recipe.random_seeds if many else run.recipe.synthesis_seeds):
            found[f"random-ipc{budget}-seed{seed}"] = select(run.real, "random", images_per_class=budget, seed=seed)
    return found


def doped_sets(run: Run, pipe: DsCoPipeline, sets: dict[str, Dataset]) -> dict[str, Dataset]:
    """The largest synthetic sets with the real images of lowest clarity, by seed."""
    run.clock.say("doping")
    names = {seed: f"nopt+doping-ipc{run.doped_per_class}-seed{seed}" for seed in run.seeds(run.doped_per_class)}
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    for seed in list(names)[rank::world]:
        base = f"nopt-ipc{BUDGETS[-1]}-seed{seed}"
        rule = find_selection(**DOPING, protocol=run.protocol, architecture=EVALUATOR["architecture"])
        options = {"total": run.doped_per_class * len(run.train.names), "strategy": rule, "seed": seed}
        made_with = pipeline_identity(pipe, run.real, base=file_sha256(run.kept.file(base)), **options)
        if not run.kept.is_made(names[seed], made_with):
            start = time.perf_counter()
            doped = dope(sets[base], run.real, pipe, progress=False, **options)
            run.kept.save(names[seed], doped, made_with, seconds=time.perf_counter() - start)
    run.accelerator.wait_for_everyone()
    return {name: run.kept.rows(name) for name in names.values()}


def train_evaluators(run: Run, sets: dict[str, Dataset], *, rank: int, world: int) -> dict[str, list[Path]]:
    """Trains evaluators from scratch on every set and on all data; this process does its share of the jobs.

    Returns:
        `dict`: files of the results by set.
    """
    images = {name: load_image_set(rows, protocol=run.protocol, num_channels=1) for name, rows in sets.items()}
    return evaluate_sets(
        images | {"full": run.train}, run.test, training_seeds=run.recipe.training_seeds, folder=run.evaluators,
        clock=run.clock, rank=rank, world=world, protocol=run.protocol, accelerator=run.accelerator,
        **EVALUATOR,
    )  # fmt: skip


def collect(
    run: Run, pipe: DsCoPipeline, targets: MatchingTargets, sets: dict[str, Dataset], jobs: dict[str, list[Path]]
) -> dict[str, Any]:
    """The content of results.json: one row per method and budget."""
    done = read_results(jobs)
    images = {name: load_image_set(rows, protocol=run.protocol, num_channels=1) for name, rows in sets.items()}
    discrepancies = study_discrepancies(images, pipe, targets)
    sizes, costs = {name: len(rows) for name, rows in sets.items()}, {name: run.kept.told(name) for name in sets}
    return {
        "dataset": "digits",
        "classes": len(run.train.names),
        "config": {
            **dataclasses.asdict(run.recipe),
            "sampling": run.sampling,
            "interval": INTERVAL,
            "contrast": CONTRAST,
            "doping": DOPING,
            "features": FEATURES,
            "protocol": run.protocol.name,
            **EVALUATOR,
        },
        "full": full_row(done["full"], len(run.real)),
        "rows": result_rows(sizes, done, discrepancies, costs),
        "environment": run_environment(run.accelerator),
        "total_seconds": round(time.monotonic() - run.clock.start, 1),
    }


def write_results(run: Run, results: dict[str, Any]) -> None:
    """results.json; a run that found everything done keeps the time of the run that did it."""
    path = run.output / "results.json"
    stamp = run.work / "seconds.json"
    if stamp.is_file():
        results["total_seconds"] = json.loads(stamp.read_text(encoding="utf-8"))
    write_atomically(stamp, json.dumps(results["total_seconds"]).encode())
    write_json(path, results)


def draw(
    run: Run,
    pipe: DsCoPipeline,
    targets: MatchingTargets,
    sets: dict[str, Dataset],
    results: dict[str, Any],
) -> None:
    """samples.png, accuracy.png and features.png."""
    largest = f"ipc{BUDGETS[-1]}-seed0"
    shown = {
        name: load_image_set(rows, protocol=run.protocol, num_channels=1)
        for name, rows in sets.items()
        if name.endswith(largest)
    }
    draw_study_samples(shown, BUDGETS[-1], run.output / "samples.png")
    points = {
        method: (embed_pixels(images.pixels, pipe, targets), images.labels)
        for method in ("plain", "nopt")
        for images in [shown[f"{method}-{largest}"]]
    }
    accuracy_figure(results, run.output / "accuracy.png")
    real = (embed_pixels(run.train.pixels, pipe, targets), run.train.labels)
    feature_figure(real=real, sets=points, class_names=run.train.names, path=run.output / "features.png")


def write_dataset(
    run: Run,
    targets: dict[str, MatchingTargets],
    sets: dict[str, Dataset],
    results: dict[str, Any],
) -> None:
    """dataset/: parquet and card, with the configs ipc1, ipc3, ipc10 (default) and doped; pipeline/: what drew it."""
    keys = {f"ipc{budget}": f"nopt-ipc{budget}-seed0" for budget in BUDGETS}
    keys["doped"] = f"nopt+doping-ipc{run.doped_per_class}-seed0"
    save_dataset_folder(
        {name: sets[key] for name, key in keys.items()},
        run.output / "dataset",
        default_config=f"ipc{BUDGETS[-1]}",
        card=DatasetCardFields(
            pretty_name="Digits, concentrated", source_license="cc-by-4.0", generator_license="cc-by-4.0"
        ),
        results=results,
        concentration={"source": {"dataset": "scikit-learn digits", "split": "train"}},
        targets=targets["nopt"],
        figures=[run.output / name for name in ("samples.png", "accuracy.png", "features.png")],
    )
    with whole(run.output / "pipeline") as partial:  # where `concentrate.py --from` finds it by its name
        shutil.copytree(run.work / "pipeline", partial)
        shutil.rmtree(run.output / "pipeline", ignore_errors=True)  # of other settings


if __name__ == "__main__":
    main()
