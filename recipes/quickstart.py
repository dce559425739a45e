"""The main job, end to end, on the digits: concentrate, dope, evaluate, report.

    accelerate launch recipes/quickstart.py
    accelerate launch recipes/quickstart.py --train

Draws with the pipeline that the package brings, or trains one like it first. Writes results.json, table.md, figures
(samples.png as soon as there are images) and dataset/, which `recipes/concentrate.py --from` draws again. What is
there already is used again; --small is for tests of the software, its numbers mean nothing.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
import functools
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from transformers import PreTrainedModel

from dsco_hf import DsCoPipeline, build_evaluator, get_protocol, load_digits_dataset, load_image_set
from dsco_hf.generators.denoisers import GeneratorTrainingConfig
from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.hub.folder import save_study_folder
from dsco_hf.studies.figures.accuracy import draw_study_samples
from dsco_hf.studies.figures.features import draw_study_features
from dsco_hf.studies.kept import kept_classifiers, kept_pipeline
from dsco_hf.studies.plans import METHODS, PlannedSets, StudyPlan, set_name
from dsco_hf.studies.study import FULL, Study, first_sets, real_baselines
from dsco_hf.studies.tables import write_results
from dsco_hf.utils.configs import make_accelerator, parse_config, read_config
from dsco_hf.utils.files import remove_partials
from dsco_hf.utils.origins import fingerprint, versions
from dsco_hf.utils.progress import Clock, introduce


EVALUATOR: dict[str, Any] = {"architectures": ["convnet-2"], "overrides": {"width": 64}}
CONFIGS = Path(__file__).parent / "configs"
CARD = DatasetCardFields(pretty_name="Digits, concentrated", source_license="cc-by-4.0", generator_license="cc-by-4.0")
NETWORK: dict[str, Any] = {"architecture": "convnet-2", "image_size": 8, "num_channels": 1, "width": 64}
# What an untrained network of the evaluators' architecture sees led to better sets than what the classifier sees.
FEATURES = '{"network": "untrained", "architecture": "convnet-2", "width": 64, "seed": 1000}'


@dataclass(frozen=True, kw_only=True)
class Quickstart(StudyPlan):
    """Settings; those of the sets are inherited. Some were chosen on a part of the training images.

    Attributes:
        output_dir: where the results go.
        small: a run of under two minutes that only shows that everything works.
        fresh: remove what an earlier run left.
        train: train generator and classifier first, in place of the pipeline "digits" that the package brings.
        doped_share: size of the doped dataset, as a share of the training set.
        generator_steps: with `train`, in place of those of recipes/configs/generator_digits.yaml.
        training_seeds: repetitions of the trainings.
        random_seeds: choices of random real images at one image per class, and beside the doped dataset.
        herding_seeds: herded sets at each budget, by as many classifiers, on which herded images and accuracy depend.
    """

    output_dir: str = "outputs/quickstart"
    small: bool = False
    fresh: bool = False
    train: bool = False
    doped_share: float = 0.3
    generator_steps: int | None = None
    training_seeds: int = 3
    random_seeds: int = 6
    herding_seeds: int = 4
    single_seeds: int = 4
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    budgets: list[int] = field(default_factory=lambda: [1, 3, 10])
    features: str = FEATURES
    objective: list[str] = field(default_factory=lambda: ["rkhs"])  # level with "ridge" on classes as simple as these
    num_inference_steps: int = 40  # few steps of ancestral sampling draw images that are too much alike
    optimize_from: float = 0.5  # with the generator's cosine noise, images are decided between these
    optimize_until: float = 0.9
    # One image cannot resemble a class: it aims at what sets the class apart. With three it no longer helped.
    contrast: list[float] = field(default_factory=lambda: [2.0, 0.0, 0.0])
    doping_strategy: str = "clarity"
    doping_class_wise: bool = False
    quantile_iterations: int = 10
    check_images: int = 0


SMALL: dict[str, Any] = {
    "num_inference_steps": 10, "samples_per_class": 20, "quantile_iterations": 3,
    "synthesis_seeds": 1, "single_seeds": 1, "random_seeds": 1, "herding_seeds": 2, "training_seeds": 2,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages; every process works, the main one writes."""
    recipe = parse_config(Quickstart, arguments, description=__doc__)
    recipe = dataclasses.replace(recipe, **(SMALL if recipe.small else {}))
    accelerator = make_accelerator()
    datasets.disable_progress_bars()
    run = Run(recipe, accelerator)
    pipe = run.pipeline().to(accelerator.device)
    run.draw_first(pipe)
    run.add_baselines()
    students = {"protocol": run.study.protocol, "architecture": EVALUATOR["architectures"][0]}
    made = PlannedSets(run.recipe, pipe, run.real, run.work, clock=run.clock, students=students)
    run.study.train_planned(made, num_channels=1)
    if accelerator.is_main_process:
        run.clock.say("writing results, figures and the dataset")
        table = run.write(made)
        print(f"\n{table}")
        run.clock.say(f"done: {run.output}")
    accelerator.end_training()


class Run:
    """What all stages share: the data, the study, the folders and the clock."""

    def __init__(self, recipe: Quickstart, accelerator: Accelerator) -> None:
        self.accelerator, self.clock, self.output = accelerator, Clock(accelerator), Path(recipe.output_dir)
        steps = {"steps": ((10, 30), (None, 60))} if recipe.small else {}
        self.protocol = protocol = get_protocol(CONFIGS / "protocols" / "digits.yaml", **steps)
        digits, self.reading = load_digits_dataset(), {"protocol": protocol, "num_channels": 1}
        self.real, self.train = digits["train"], load_image_set(digits["train"], **self.reading)
        test = load_image_set(digits["test"], test_for=self.train, **self.reading)
        introduce(accelerator, "digits", images=len(self.real), classes=len(self.train.names), size=8)
        doped = round(recipe.doped_share * self.train.images_per_class)
        self.recipe = dataclasses.replace(recipe, doping_budgets=[doped])
        values = read_config(CONFIGS / "generator_digits.yaml", GeneratorTrainingConfig, others=True)
        values |= {} if recipe.generator_steps is None else {"train_steps": recipe.generator_steps}
        self.generator = GeneratorTrainingConfig(**values)
        decisive = [recipe.small, recipe.train and self.generator, NETWORK, protocol, versions(), self.train.digest]
        self.work = self.output / "work" / fingerprint(*decisive, accelerator.mixed_precision)[:8]  # of the models
        if accelerator.is_main_process:
            if recipe.fresh:
                shutil.rmtree(self.output, ignore_errors=True)
            remove_partials(self.work)  # of a run that was cut off
            self.work.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        options: dict[str, Any] = {"seeds": recipe.training_seeds, "clock": self.clock, **EVALUATOR}
        self.study = Study({FULL: self.train}, test, self.work, protocol=protocol, **options)

    @functools.cached_property
    def classifiers(self) -> list[PreTrainedModel]:
        """By the features of each, real images are herded; they differ in their seed."""
        build = functools.partial(build_evaluator, class_names=self.train.names, norm="batch", **NETWORK)
        protocol = dataclasses.replace(self.protocol, steps=30 if self.recipe.small else 800, learning_rate=2e-3)
        seeds = self.recipe.herding_seeds
        return kept_classifiers(self.work, build, self.train, seeds, protocol=protocol, clock=self.clock)

    def pipeline(self) -> DsCoPipeline:
        """That of the package, or one that is trained here, with the first of the classifiers."""
        if not self.recipe.train:
            return DsCoPipeline.from_pretrained("digits")
        models = {"classifier": self.classifiers[0], "clock": self.clock}
        return kept_pipeline(self.work / "pipeline", self.train, self.generator, **models)

    def draw_first(self, pipe: DsCoPipeline) -> None:
        """The first sets of the largest size, for samples.png: minutes before all is done."""
        plan, largest = first_sets(self.recipe, ["plain", "nopt"]), max(self.recipe.budgets)  # these take least
        first = PlannedSets(plan, pipe, self.real, self.work, clock=self.clock)
        first.make()
        if self.accelerator.is_main_process:
            sets = real_baselines(self.train, [largest], classifiers=())
            sets |= {name: load_image_set(rows, **self.reading) for name, rows in first.rows().items()}
            self.clock.say(f"the first images: {draw_study_samples(sets, largest, self.output / 'samples.png')}")

    def add_baselines(self) -> None:
        """Random and herded real images."""
        for size in self.recipe.sizes:
            seeds = self.recipe.synthesis_seeds if size in self.recipe.budgets[1:] else self.recipe.random_seeds
            networks = self.classifiers[: 1 if size in self.recipe.doping_budgets else None]
            self.study.sets |= real_baselines(self.train, [size], random_seeds=seeds, classifiers=networks)

    def write(self, made: PlannedSets) -> str:
        """results.json, the table, the figures, and dataset/, whose default config is the largest."""
        told = {"config": dataclasses.asdict(self.recipe) | EVALUATOR, "total_seconds": made.seconds(self.clock)}
        sets, largest = self.study.fixed, max(self.recipe.budgets)
        results = self.study.results(made, dataset="digits", **told)
        table = write_results(results, self.output, sets=sets)
        figures = [self.output / name for name in ("samples.png", "accuracy.png", "features.png")]
        shown = {method: sets[set_name(method, largest, 0)] for method in ("plain", "nopt")}
        draw_study_features(self.train, shown, made.pipe, made.targets["real"], figures[-1])
        save_study_folder(
            self.study, made, self.output / "dataset", results=results, card=CARD, figures=figures, doped="doped",
            source={"dataset": "scikit-learn digits", "split": "train"}, default_config=f"ipc{largest}",
        )  # fmt: skip
        shutil.rmtree(place := self.output / "pipeline", ignore_errors=True)  # of other settings
        if self.recipe.train:
            shutil.copytree(self.work / "pipeline", place)  # `concentrate.py --from` finds it there
        return table


if __name__ == "__main__":
    main()
