"""Trains a class-conditional generator on any image-classification dataset and saves it as a pipeline folder.

    accelerate launch recipes/train_generator.py --config recipes/configs/generator_digits.yaml
    accelerate launch recipes/train_generator.py --dataset user/pets --image_size 32 --output_dir outputs/pets --resume
    accelerate launch --multi_gpu --num_processes 2 recipes/train_generator.py --config ...     (also without a GPU)

The folder is read by `DsCoPipeline.from_pretrained(output_dir)`. It also holds `results.json` and `samples.png`.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import AutoencoderKL
from transformers import AutoModelForImageClassification

from dsco_hf.configs import make_accelerator, parse_config
from dsco_hf.data import class_names, dataset_fingerprint, load_image_dataset, load_pixels
from dsco_hf.generator_training import GeneratorTrainingResult, train_generator
from dsco_hf.generators import GeneratorTrainingConfig, build_scheduler
from dsco_hf.pipeline import DsCoPipeline
from dsco_hf.report import sample_grid


@dataclass(frozen=True)
class GeneratorRecipe(GeneratorTrainingConfig):
    """Options of this recipe; those of the training itself are inherited.

    Attributes:
        dataset, dataset_name, split, revision: what to train on; see `dsco_hf.data.load_image_dataset`.
        image_column, label_column: for datasets with several of them.
        image_size, num_channels: what images are brought to.
        on_error: "raise" or "skip" images that cannot be decoded.
        vae, vae_revision: an `AutoencoderKL` (folder or Hub id) to train in its latents; none for pixel space.
        classifier, classifier_revision: an image classifier to store with the pipeline.
        output_dir: the pipeline folder.
        checkpoint_every: steps between checkpoints (kept in `<output_dir>-checkpoints`).
        resume: continue from the last checkpoint, or start if there is none.
        log_every: steps between looks at the loss and the clock.
        max_minutes: stop with a checkpoint after this time.
        mixed_precision: "no", "fp16" or "bf16"; without it, what `accelerate launch` was told.
        num_samples_per_class, num_inference_steps: of samples.png.
    """

    dataset: str = "digits"
    dataset_name: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    num_channels: int = 3
    on_error: str = "raise"
    vae: str | None = None
    vae_revision: str | None = None
    classifier: str | None = None
    classifier_revision: str | None = None
    output_dir: str = "outputs/generator"
    checkpoint_every: int = 1000
    resume: bool = False
    max_minutes: float | None = None
    log_every: int = 20
    mixed_precision: str | None = None
    num_samples_per_class: int = 8
    num_inference_steps: int = 20


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains, and saves the pipeline, the samples and the results."""
    recipe = parse_config(GeneratorRecipe, arguments, description=__doc__)
    config = GeneratorTrainingConfig(
        **{field.name: getattr(recipe, field.name) for field in dataclasses.fields(GeneratorTrainingConfig)}
    )
    accelerator = make_accelerator(recipe.mixed_precision)
    output = Path(recipe.output_dir)
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        dataset = load_image_dataset(recipe.dataset, recipe.dataset_name, split=recipe.split, revision=recipe.revision)
    names = class_names(dataset, label_column=recipe.label_column)
    pixels, labels, _ = load_pixels(
        dataset,
        image_size=recipe.image_size,
        num_channels=recipe.num_channels,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        on_error=recipe.on_error,
        progress=accelerator.is_local_main_process,
    )
    vae = None
    if recipe.vae is not None:
        vae = AutoencoderKL.from_pretrained(recipe.vae, revision=recipe.vae_revision).to(accelerator.device)
    result = train_generator(
        pixels,
        labels,
        config,
        num_classes=len(names),
        accelerator=accelerator,
        vae=vae,
        checkpoint_dir=output.with_name(f"{output.name}-checkpoints"),  # beside, so that they are never published
        checkpoint_every=recipe.checkpoint_every,
        resume=recipe.resume,
        max_minutes=recipe.max_minutes,
        log_every=recipe.log_every,
    )
    if accelerator.is_main_process:
        if result.finished:
            save_everything(recipe, config, result, dataset, vae, accelerator)
        else:
            print(f"Stopped at step {result.step} of {config.train_steps}; run again with --resume to continue.")
    accelerator.end_training()


def save_everything(
    recipe: GeneratorRecipe,
    config: GeneratorTrainingConfig,
    result: GeneratorTrainingResult,
    dataset: Dataset,
    vae: AutoencoderKL | None,
    accelerator: Accelerator,
) -> None:
    """Writes the pipeline folder, `results.json` and `samples.png`."""
    output, names = Path(recipe.output_dir), class_names(dataset, label_column=recipe.label_column)
    pipeline = DsCoPipeline(
        transformer=result.transformer,
        scheduler=build_scheduler(config, latents=vae is not None),
        vae=vae,
        classifier=load_classifier(recipe),
        id2label=dict(enumerate(names)),
    )
    pipeline.save_pretrained(output)
    save_results(recipe, result, dataset, accelerator, output / "results.json")
    draw_samples(pipeline.to(accelerator.device), recipe, names, output / "samples.png")
    print(f"Saved the pipeline to {output}, loss {result.losses[-1]['loss']:.4f} after {result.step} steps.")


def load_classifier(recipe: GeneratorRecipe) -> torch.nn.Module | None:
    """The classifier to store beside the generator, if one was named."""
    if recipe.classifier is None:
        return None
    import dsco_hf.evaluators  # noqa: F401  registers the package's own architectures

    return AutoModelForImageClassification.from_pretrained(recipe.classifier, revision=recipe.classifier_revision)


def draw_samples(pipeline: DsCoPipeline, recipe: GeneratorRecipe, names: list[str], path: Path) -> None:
    """A picture with plain samples of up to ten classes."""
    shown = list(range(min(len(names), 10)))
    labels = [label for label in shown for _ in range(recipe.num_samples_per_class)]
    images = pipeline(
        class_labels=labels,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(recipe.seed),
        output_type="pt",
    ).images
    rows = images.float().cpu().mul(2).sub(1).unflatten(0, (len(shown), recipe.num_samples_per_class))
    sample_grid({"generated": rows}, [names[label] for label in shown], path)


def save_results(
    recipe: GeneratorRecipe, result: GeneratorTrainingResult, dataset: Dataset, accelerator: Accelerator, path: Path
) -> None:
    """Writes what was trained, on what, for how long and with what loss."""
    results = {
        "config": dataclasses.asdict(recipe),
        "dataset_fingerprint": dataset_fingerprint(
            dataset, image_column=recipe.image_column, label_column=recipe.label_column
        ),
        "images": len(dataset),
        "steps": result.step,
        "seconds": round(result.seconds, 2),
        "loss": result.losses[-1]["loss"],
        "losses": result.losses,
        "parameters": sum(parameter.numel() for parameter in result.transformer.parameters()),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate", "datasets")}
        | {"python": platform.python_version()},
    }
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
