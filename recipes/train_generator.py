"""Trains a class-conditional generator on any image-classification dataset and saves it as a pipeline folder.

    accelerate launch recipes/train_generator.py --config recipes/configs/generator_digits.yaml
    accelerate launch recipes/train_generator.py --dataset user/pets --image_size 32 --output_dir outputs/pets
    accelerate launch --multi_gpu --num_processes 2 recipes/train_generator.py --config ...     (also without a GPU)
    accelerate launch recipes/train_generator.py --dataset user/pets --finetune_from facebook/DiT-XL-2-256 \
        --trainable bias_and_norm --learning_rate 1e-4 --output_dir outputs/pets

The folder is read by `DsCoPipeline.from_pretrained(output_dir)`. It also holds `results.json`, `samples.png` and, with
`--evaluate_every`, `samples-<step>.png`.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from diffusers import AutoencoderKL, ModelMixin

from dsco_hf.data.datasets import dataset_fingerprint, load_pixels, load_splits, present_classes
from dsco_hf.data.pixels import default_image_size
from dsco_hf.data.schema import nearest
from dsco_hf.generators.base import denoiser_of
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_scheduler, with_schedule_of
from dsco_hf.generators.training import GeneratorTrainingResult, train_generator
from dsco_hf.sampling.models import load_classifier, load_model
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.studies.figures import sample_grid
from dsco_hf.studies.generator_check import GeneratorScore
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config


@dataclass(frozen=True)
class GeneratorRecipe(GeneratorTrainingConfig):
    """Options of this recipe; those of the training itself are inherited.

    Attributes:
        dataset, dataset_name, train_split, revision: what to train on; see `dsco_hf.data.datasets.load_image_dataset`.
        test_split, holdout: what is not trained on, as in recipes/train_classifier.py: without a test split, the share
            `holdout` of every class.
        image_column, label_column: for datasets with several of them.
        image_size, num_channels: what images are brought to; by default their own size, or 32 px if they have several.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        vae, vae_revision: an `AutoencoderKL` (folder or Hub id) to train in its latents; none for pixel space.
        finetune_from, finetune_revision: a pipeline (folder or Hub id) to train further: its denoiser with new class
            embeddings, its noise schedule, its autoencoder and its image size (a UNet takes another `image_size`
            too). A learned variance stays as it is.
        class_mapping: a YAML file with `dataset class: class of that pipeline`, index or name, or a list of them, for
            classes that should start from others than the mean of all.
        classifier, classifier_revision: an image classifier to store with the pipeline, and to score samples with.
        output_dir: the pipeline folder.
        checkpoint_every: steps between checkpoints (kept in `<output_dir>-checkpoints`); if None, as many as take ten
            minutes. The first one comes after a minute.
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        log_every: steps between looks at the loss and the clock.
        max_minutes: stop with a checkpoint after this time.
        mixed_precision: "no", "fp16" or "bf16"; without it, what `accelerate launch` was told.
        num_samples_per_class, num_inference_steps, guidance_scale: of samples.png, and the latter two of scores.
        evaluate_every: steps between sample grids and, with a classifier, the Fréchet distance of samples from the
            training images in its features; never if None.
        num_evaluation_samples: samples per Fréchet distance.
    """

    dataset: str = "digits"
    dataset_name: str | None = None
    train_split: str = "train"
    test_split: str = "auto"
    holdout: float = 0.2
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    num_channels: int = 3
    on_error: str = "skip"
    vae: str | None = None
    vae_revision: str | None = None
    finetune_from: str | None = None
    finetune_revision: str | None = None
    class_mapping: str | None = None
    classifier: str | None = None
    classifier_revision: str | None = None
    output_dir: str = "outputs/generator"
    checkpoint_every: int | None = None
    resume: bool = True
    max_minutes: float | None = None
    log_every: int = 20
    mixed_precision: str | None = None
    num_samples_per_class: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    evaluate_every: int | None = None
    num_evaluation_samples: int = 1000


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains, and saves the pipeline, the samples and the results."""
    recipe = parse_config(GeneratorRecipe, arguments, description=__doc__)
    check_made(Path(__file__).parent, {"finetune_from": recipe.finetune_from, "classifier": recipe.classifier})
    accelerator = make_accelerator(recipe.mixed_precision)
    check_anew(recipe.resume, accelerator, sorted(checkpoints_of(recipe).glob("step-*")))
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        dataset, _, splits = load_splits(
            recipe.dataset,
            recipe.dataset_name,
            train_split=recipe.train_split,
            test_split=recipe.test_split,
            holdout=recipe.holdout,
            label_column=recipe.label_column,
            revision=recipe.revision,
        )
        base = load_base(recipe)
    run = GeneratorRun(recipe, accelerator, dataset, base, splits)
    result = run.train()
    if accelerator.is_main_process:
        if result.finished:
            run.save(result)
        else:
            print(f"Stopped at step {result.step} of {run.config.train_steps}; run the same command again to go on.")
    accelerator.end_training()


def checkpoints_of(recipe: GeneratorRecipe) -> Path:
    """The folder of the checkpoints: beside the pipeline, so that they are never published."""
    output = Path(recipe.output_dir)
    return output.with_name(f"{output.name}-checkpoints")


class GeneratorRun:
    """One run of this recipe: the images, the models, and what is written of them."""

    def __init__(
        self,
        recipe: GeneratorRecipe,
        accelerator: Accelerator,
        dataset: Dataset,
        base: DsCoPipeline | None,
        splits: dict[str, Any],
    ) -> None:
        self.recipe, self.accelerator, self.dataset, self.splits = recipe, accelerator, dataset, splits
        self.output = Path(recipe.output_dir)
        self.names = present_classes(dataset, label_column=recipe.label_column)
        self.config = GeneratorTrainingConfig(
            **{field.name: getattr(recipe, field.name) for field in dataclasses.fields(GeneratorTrainingConfig)}
        )
        self.vae = None
        self.denoiser: ModelMixin | None = None
        if base is not None:
            self.config = with_schedule_of(self.config, base.scheduler)
            self.vae = base.vae
            self.denoiser = denoiser_of(base.denoiser).adapt(
                len(self.names),
                mapping=read_mapping(recipe, self.names, base),
                sample_size=(recipe.image_size or base.image_size) // base.vae_scale_factor,
            )
        elif recipe.vae is not None:
            self.vae = load_model(AutoencoderKL, recipe.vae, revision=recipe.vae_revision)
        if self.vae is not None:
            self.vae.to(accelerator.device)
        self.scheduler = base.scheduler if base else build_scheduler(self.config, latents=self.vae is not None)
        self.classifier = classifier_of(recipe)
        columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
        self.pixels, self.labels, _ = load_pixels(
            dataset,
            image_size=recipe.image_size or (base.image_size if base else default_image_size(dataset, **columns)),
            num_channels=base.num_channels if base else recipe.num_channels,
            **columns,
            on_error=recipe.on_error,
            classes=self.names,
            progress=accelerator.is_local_main_process,
        )
        self.score: GeneratorScore | None = None

    def train(self) -> GeneratorTrainingResult:
        """Trains until done or out of time."""
        recipe = self.recipe
        return train_generator(
            self.pixels,
            self.labels,
            self.config,
            num_classes=len(self.names),
            accelerator=self.accelerator,
            vae=self.vae,
            denoiser=self.denoiser,
            checkpoint_dir=checkpoints_of(recipe),
            checkpoint_every=recipe.checkpoint_every,
            resume=True,  # what is there was looked at
            max_minutes=recipe.max_minutes,
            log_every=recipe.log_every,
            evaluate=self.evaluate if recipe.evaluate_every else None,
            evaluate_every=recipe.evaluate_every or 1,
        )

    def pipeline(self, denoiser: ModelMixin) -> DsCoPipeline:
        """A pipeline around a denoiser; the other components are shared by all of them."""
        pipe = DsCoPipeline(
            denoiser,
            scheduler=self.scheduler,
            vae=self.vae,
            classifier=self.classifier,
            id2label=dict(enumerate(self.names)),
        ).to(self.accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def evaluate(self, step: int, denoiser: ModelMixin) -> dict[str, float]:
        """Draws a sample grid and, with a classifier, scores the samples."""
        pipe = self.pipeline(denoiser)
        self.output.mkdir(parents=True, exist_ok=True)
        draw_samples(pipe, self.recipe, self.names, self.output / f"samples-{step:06d}.png")
        if self.classifier is None:
            return {}
        self.score = self.score or GeneratorScore.of_images(
            self.pixels,
            self.classifier,
            num_samples=self.recipe.num_evaluation_samples,
            num_inference_steps=self.recipe.num_inference_steps,
            guidance_scale=self.recipe.guidance_scale,
        )
        found = self.score(pipe)
        print(f"Step {step}: Fréchet distance {found['frechet_distance']:.3f} ({found['samples']:.0f} samples)")
        return found

    def save(self, result: GeneratorTrainingResult) -> None:
        """Writes the pipeline folder, `results.json` and `samples.png`."""
        pipe = self.pipeline(result.denoiser)
        pipe.save_pretrained(self.output)
        save_results(self, result, self.output / "results.json")
        draw_samples(pipe, self.recipe, self.names, self.output / "samples.png")
        print(f"Saved the pipeline to {self.output}, loss {result.losses[-1]['loss']:.4f} after {result.step} steps.")


def load_base(recipe: GeneratorRecipe) -> DsCoPipeline | None:
    """The pipeline to fine-tune, if one was named."""
    if recipe.finetune_from is None:
        if recipe.class_mapping is not None:
            raise ValueError("`class_mapping` maps to classes of `finetune_from`, which is missing.")
        return None
    if recipe.vae is not None:
        raise ValueError("`finetune_from` brings its own autoencoder: leave `vae` out.")
    return DsCoPipeline.from_pretrained(recipe.finetune_from, revision=recipe.finetune_revision)


def read_mapping(recipe: GeneratorRecipe, names: list[str], base: DsCoPipeline) -> dict[int, list[int]]:
    """The file `class_mapping` as new label to old classes."""
    if recipe.class_mapping is None:
        return {}
    chosen = yaml.safe_load(Path(recipe.class_mapping).read_text(encoding="utf-8")) or {}
    unknown = [name for name in chosen if str(name) not in names]
    if unknown:
        raise ValueError(
            f"{recipe.class_mapping} names {unknown[0]!r}, no class of the dataset.{nearest(str(unknown[0]), names)}"
        )
    return {
        names.index(str(name)): base.get_label_ids(old if isinstance(old, list) else [old])
        for name, old in chosen.items()
    }


def classifier_of(recipe: GeneratorRecipe) -> torch.nn.Module | None:
    """The classifier to store beside the generator, if one was named."""
    if recipe.classifier is None:
        return None
    return load_classifier(recipe.classifier, revision=recipe.classifier_revision)


def draw_samples(pipeline: DsCoPipeline, recipe: GeneratorRecipe, names: list[str], path: Path) -> None:
    """A picture with plain samples of up to ten classes."""
    shown = list(range(min(len(names), 10)))
    labels = [label for label in shown for _ in range(recipe.num_samples_per_class)]
    images = pipeline(
        class_labels=labels,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
        generator=torch.Generator().manual_seed(recipe.seed),
        output_type="pt",
    ).images
    rows = images.float().cpu().mul(2).sub(1).unflatten(0, (len(shown), recipe.num_samples_per_class))
    sample_grid({"generated": rows}, [names[label] for label in shown], path)


def save_results(run: GeneratorRun, result: GeneratorTrainingResult, path: Path) -> None:
    """Writes what was trained, on what, for how long and with what loss."""
    recipe, dataset, accelerator = run.recipe, run.dataset, run.accelerator
    results = {
        "config": dataclasses.asdict(recipe) | dataclasses.asdict(run.config),
        "splits": run.splits,
        "dataset_fingerprint": dataset_fingerprint(
            dataset, image_column=recipe.image_column, label_column=recipe.label_column
        ),
        "images": len(run.labels),
        "steps": result.step,
        "seconds": round(result.seconds, 2),
        "loss": result.losses[-1]["loss"],
        "losses": result.losses,
        "evaluations": result.evaluations,
        "parameters": sum(parameter.numel() for parameter in result.denoiser.parameters()),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate", "datasets")}
        | {"python": platform.python_version()},
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
