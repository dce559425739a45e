"""The main job, end to end, on the digits: train generator and classifier, concentrate, dope, evaluate, report.

    accelerate launch recipes/quickstart.py
    accelerate launch recipes/quickstart.py --small --fresh

Writes results.json, table.md, samples.png, accuracy.png, features.png, dataset/ and pipeline/ to outputs/quickstart.
What is there already is used again; --fresh starts anew, --small is a setting for tests of the software, whose numbers
mean nothing. `recipes/concentrate.py --from outputs/quickstart/dataset` draws the dataset again.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from transformers import PreTrainedModel

from dsco_hf import DsCoPipeline, build_evaluator, get_protocol, load_digits_dataset, load_image_set
from dsco_hf.evaluators.augmentation import RandomShift
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_scheduler
from dsco_hf.generators.training import train_generator
from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.hub.folder import save_study_folder
from dsco_hf.studies.figures.features import draw_study_features
from dsco_hf.studies.kept import kept_classifiers
from dsco_hf.studies.plans import METHODS, PlannedSets, StudyPlan, set_name
from dsco_hf.studies.study import FULL, Study, real_baselines
from dsco_hf.studies.tables import write_results
from dsco_hf.utils.configs import make_accelerator, parse_config
from dsco_hf.utils.files import remove_partials, whole
from dsco_hf.utils.origins import fingerprint, versions
from dsco_hf.utils.progress import Clock


EVALUATOR: dict[str, Any] = {"architectures": ["convnet-2"], "overrides": {"width": 64}}
# A step with linear-silu takes less time than with GELU; linear noise spends half of its steps on nearly pure noise.
GENERATOR = GeneratorTrainingConfig(
    batch_size=64, num_attention_heads=3, activation_fn="linear-silu", beta_schedule="squaredcos_cap_v2"
)
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
        doped_share: size of the doped dataset, as a share of the training set.
        generator_steps: training steps of the generator.
        training_seeds: repetitions of the trainings.
        random_seeds: choices of random real images at one image per class, and beside the doped dataset.
        herding_seeds: herded sets at each budget, by as many classifiers: which images are herded depends on the
            classifier, and accuracy with it.
    """

    output_dir: str = "outputs/quickstart"
    small: bool = False
    fresh: bool = False
    doped_share: float = 0.3
    generator_steps: int = 6250
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
    "generator_steps": 60, "num_inference_steps": 10, "samples_per_class": 20, "quantile_iterations": 3,
    "synthesis_seeds": 1, "single_seeds": 1, "random_seeds": 1, "herding_seeds": 2, "training_seeds": 2,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages; every process works, the main one writes."""
    recipe = parse_config(Quickstart, arguments, description=__doc__)
    recipe = dataclasses.replace(recipe, **(SMALL if recipe.small else {}))
    accelerator = make_accelerator()
    datasets.disable_progress_bars()
    run = Run(recipe, accelerator)
    made = PlannedSets(
        run.recipe, run.train_models().to(accelerator.device), run.real, run.work, clock=run.clock,
        students={"protocol": run.study.protocol, "architecture": EVALUATOR["architectures"][0]},
    )  # fmt: skip
    run.study.train_planned(made, num_channels=1)
    if accelerator.is_main_process:
        table = run.write(made)
        run.clock.say(f"done: {run.output}")
        print(f"\n{table}")
    accelerator.end_training()


class Run:
    """What all stages share: the data, the study, the folders and the clock."""

    def __init__(self, recipe: Quickstart, accelerator: Accelerator) -> None:
        self.accelerator, self.clock, self.output = accelerator, Clock(accelerator), Path(recipe.output_dir)
        steps = ((10, 30), (None, 60)) if recipe.small else ((10, 400), (None, 1500))
        self.protocol = protocol = get_protocol("quick", steps=steps, augmentation=(RandomShift(1),))
        digits, reading = load_digits_dataset(), {"protocol": protocol, "num_channels": 1}
        self.real, self.train = digits["train"], load_image_set(digits["train"], **reading)
        test = load_image_set(digits["test"], test_for=self.train, **reading)
        self.clock.say(f"digits: {len(self.real):,} training and {len(test.labels)} test images of 8x8 pixels")
        doping = [round(recipe.doped_share * self.train.images_per_class)]
        self.recipe = dataclasses.replace(recipe, doping_budgets=doping)
        decisive = [recipe.small, recipe.generator_steps, GENERATOR, NETWORK, protocol, versions()]
        decisive += [self.train.digest, accelerator.mixed_precision]
        self.work = self.output / "work" / fingerprint(*decisive)[:8]  # where the models are
        if accelerator.is_main_process:
            if recipe.fresh:
                shutil.rmtree(self.output, ignore_errors=True)
            remove_partials(self.work)  # of a run that was cut off
            self.work.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        self.study = Study(
            {FULL: self.train}, test, self.work, protocol=protocol, seeds=recipe.training_seeds, clock=self.clock,
            accelerator=accelerator, **EVALUATOR,
        )  # fmt: skip

    def train_models(self) -> DsCoPipeline:
        """The pipeline with the first of the classifiers that herd real images, on which others train meanwhile."""
        self.clock.say("training the classifiers")
        recipe, rank, world = self.recipe, self.accelerator.process_index, self.accelerator.num_processes
        herding = kept_classifiers(
            self.work, self.new_classifier, self.train, recipe.herding_seeds, accelerator=self.accelerator,
            protocol=dataclasses.replace(self.protocol, steps=100 if recipe.small else 800, learning_rate=2e-3),
        )  # fmt: skip
        for sizes, seeds, classifiers in (
            (recipe.budgets[:1], recipe.random_seeds, herding),
            (recipe.budgets[1:], recipe.synthesis_seeds, herding),
            (recipe.doping_budgets, recipe.random_seeds, herding[:1]),
        ):
            self.study.sets |= real_baselines(self.train, sizes, random_seeds=seeds, classifiers=classifiers)
        folder = self.work / "pipeline"
        if not folder.is_dir() and self.accelerator.is_main_process:
            self.clock.say("training the generator" + "; real baselines meanwhile" * (world > 1))
            with whole(folder) as partial:
                self.new_pipeline(herding[0]).save_pretrained(partial)
        elif not folder.is_dir():
            self.study.train(rank=rank - 1, world=world - 1)
        self.accelerator.wait_for_everyone()
        return DsCoPipeline.from_pretrained(folder)

    def new_classifier(self, seed: int) -> PreTrainedModel:
        """A classifier before its training."""
        return build_evaluator(class_names=self.train.names, seed=seed, norm="batch", **NETWORK)

    def new_pipeline(self, classifier: PreTrainedModel) -> DsCoPipeline:
        """The generator, with the network that says what it drew."""
        config, names = dataclasses.replace(GENERATOR, train_steps=self.recipe.generator_steps), self.train.names
        images, options = (self.train.pixels, self.train.labels), {"num_classes": 10, "distributed": False}
        trained = train_generator(*images, config, accelerator=self.accelerator, **options)
        return DsCoPipeline(
            **trained.components, scheduler=build_scheduler(config, latents=False), classifier=classifier,
            id2label=dict(enumerate(names)),
        )  # fmt: skip

    def write(self, made: PlannedSets) -> str:
        """results.json, the table, the figures, dataset/, whose default config is the largest, and pipeline/."""
        config, seconds = dataclasses.asdict(self.recipe), made.seconds(self.clock)
        results = self.study.results(made, dataset="digits", total_seconds=seconds, config=config | EVALUATOR)
        sets, largest = self.study.fixed, max(self.recipe.budgets)
        table = write_results(results, self.output, sets=sets)
        figures = [self.output / name for name in ("samples.png", "accuracy.png", "features.png")]
        shown = {method: sets[set_name(method, largest, 0)] for method in ("plain", "nopt")}
        draw_study_features(self.train, shown, made.pipe, made.targets["real"], figures[-1])
        save_study_folder(
            self.study, made, self.output / "dataset", results=results, card=CARD, figures=figures, doped="doped",
            source={"dataset": "scikit-learn digits", "split": "train"}, default_config=f"ipc{largest}",
        )  # fmt: skip
        shutil.rmtree(self.output / "pipeline", ignore_errors=True)  # of other settings
        shutil.copytree(self.work / "pipeline", self.output / "pipeline")  # where `concentrate.py --from` finds it
        return table


if __name__ == "__main__":
    main()
