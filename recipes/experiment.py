"""Your own data, from folder to table: concentrated sets of every size, what they train, and the dataset to publish.

    accelerate launch recipes/train_classifier.py --dataset path/to/images --output_dir outputs/classifier
    accelerate launch recipes/train_generator.py --dataset path/to/images --output_dir outputs/generator
    accelerate launch recipes/experiment.py --dataset path/to/images
    accelerate launch recipes/experiment.py --config recipes/configs/experiment_cifar10_cpu.yaml
    accelerate launch --multi_gpu --num_processes 2 recipes/experiment.py --config ...     (also without a GPU)

Takes a generator (recipes/train_generator.py) and a classifier (recipes/train_classifier.py); computes targets, draws
the sets, mixes real images in, trains evaluators on all of them with random and herded real images beside, and writes
results.json, table.md, samples.png, accuracy.png, features.png and dataset/, which recipes/publish.py sends.
Whatever is finished is kept: a run that was stopped, or that met `--max_minutes`, goes on when it is started again.
Sets do not depend on how evaluators are trained: give two runs the same `--sets_dir`.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from accelerate import Accelerator

from dsco_hf.data.datasets import check_classes
from dsco_hf.hub.folder import save_study_folder
from dsco_hf.studies.figures.features import draw_study_features
from dsco_hf.studies.options import PipelineOptions, RealOptions, TrainingOptions
from dsco_hf.studies.plans import METHODS, PlannedSets, StudyPlan, set_name
from dsco_hf.studies.study import FULL, Study, real_baselines
from dsco_hf.studies.tables import write_results
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.progress import Clock, introduce


@dataclass(frozen=True, kw_only=True)
class ExperimentRecipe(StudyPlan, RealOptions, PipelineOptions, TrainingOptions):
    """Options of this recipe; those of the sets, the data, the models and the trainings are inherited.

    Attributes:
        classifier, classifier_revision: herds real images, and is the teacher of soft labels.
        training_seeds: repetitions of the trainings on each set.
        architecture: the evaluator, see `dsco_hf.evaluators.build_evaluator`.
        full: also train on all real images.
        max_minutes: start nothing new after this time; run again to go on.
        sets_dir: where targets and sets are kept; `<output_dir>/work` if None.
    """

    dataset: str = field()
    generator: str = "outputs/generator"
    classifier: str = "outputs/classifier"
    training_seeds: int = 3
    architecture: str = "convnet-3"
    full: bool = False
    max_minutes: float | None = None
    sets_dir: str | None = None
    output_dir: str = "outputs/experiment"


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages; every process works, the main one writes."""
    recipe = parse_config(ExperimentRecipe, arguments, description=__doc__)
    check_made(Path(__file__).parent, {"generator": recipe.generator, "classifier": recipe.classifier})
    datasets.disable_progress_bars()
    accelerator = make_accelerator(recipe.mixed_precision)
    output = Path(recipe.output_dir)
    check_anew(recipe.resume, accelerator, [Path(recipe.sets_dir or output / "work"), output / "jobs"])
    run = Experiment(recipe, accelerator)
    if not run.study.train_planned(run.made, num_channels=run.pipe.num_channels):
        run.clock.say("stopped by `max_minutes`; run the same command again to go on")
    elif accelerator.is_main_process:
        run.clock.say("writing results, figures and the dataset")
        table = run.write()
        print(f"\n{table}")
        run.clock.say(f"done: {output}")
    accelerator.end_training()


class Experiment:
    """What the options describe: models, images, the sets and the study of them."""

    def __init__(self, recipe: ExperimentRecipe, accelerator: Accelerator) -> None:
        self.clock, self.output = Clock(accelerator, recipe.max_minutes), Path(recipe.output_dir)
        self.pipe = pipe = recipe.load_pipeline().to(accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        protocol = recipe.get_protocol(image_size=pipe.image_size)
        with accelerator.main_process_first():
            real, test, self.splits = recipe.splits(tested=True)
            train, test = recipe.images(real, test, protocol=protocol, num_channels=pipe.num_channels)
            real = recipe.readable(real, train, num_channels=pipe.num_channels, image_size=pipe.image_size)
        self.train = train
        introduce(accelerator, recipe.dataset, images=len(real), classes=len(train.names), size=pipe.image_size)
        self.clock.say(f"tested on {len(test.labels):,} images: {self.splits['test_split']}")
        self.recipe = recipe = recipe.for_classes(int(train.labels.bincount().min()))
        check_classes(train.labels, train.names, images_per_class=max(recipe.sizes))
        self.made = PlannedSets(
            recipe, pipe, real, recipe.sets_dir or self.output / "work", clock=self.clock, columns=recipe.columns,
            students={"protocol": protocol, "architecture": recipe.architecture}, images=train.digest,
            splits={name: self.splits[name] for name in self.splits if name != "test_split"},
            **{name: getattr(recipe, name) for name in ("dataset", "dataset_name", "revision")},
        )  # fmt: skip
        baselines = real_baselines(
            train, recipe.sizes, random_seeds=recipe.synthesis_seeds, classifiers=[pipe.classifier]
        )
        self.study = Study(
            baselines | ({FULL: train} if recipe.full else {}), test, self.output, protocol=protocol,
            architectures=[recipe.architecture], seeds=recipe.training_seeds, overrides=recipe.overrides,
            teacher=pipe.classifier if protocol.label_type == "teacher" else None, clock=self.clock,
        )  # fmt: skip

    def write(self) -> str:
        """results.json, the table, the figures, and dataset/: the sets of the first seed as they are published."""
        recipe, output, check = self.recipe, self.output, self.made.check
        results = self.study.results(
            self.made, dataset=recipe.dataset, splits=self.splits, generator_check=check and check.record(),
            config=dataclasses.asdict(recipe) | {"image_size": self.pipe.image_size},
        )  # fmt: skip
        table = write_results(results, output, sets=self.study.fixed)
        if "real" in self.made.targets:
            names = {method: set_name(method, max(recipe.budgets), 0) for method in METHODS}
            shown = {method: self.study.fixed[name] for method, name in names.items() if name in self.study.fixed}
            draw_study_features(self.train, shown, self.pipe, self.made.targets["real"], output / "features.png")
        save_study_folder(
            self.study, self.made, output / "dataset", results=results,
            source={"dataset": recipe.dataset, "config": recipe.dataset_name, "revision": recipe.revision,
                    "split": self.splits["train_split"]},
            figures=[output / "samples.png", output / "accuracy.png"],
        )  # fmt: skip
        return table


if __name__ == "__main__":
    main()
