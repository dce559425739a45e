"""Trains a generator of classes or prompts on any image-classification dataset and saves it as a pipeline folder.

    accelerate launch recipes/train_generator.py --config recipes/configs/generator_digits.yaml
    accelerate launch recipes/train_generator.py --dataset user/pets --image_size 32 --output_dir outputs/pets
    accelerate launch --multi_gpu --num_processes 2 recipes/train_generator.py --config ...     (also without a GPU)
    accelerate launch recipes/train_generator.py --dataset user/pets --finetune_from facebook/DiT-XL-2-256 \
        --trainable bias_and_norm --learning_rate 1e-4 --output_dir outputs/pets
    accelerate launch recipes/train_generator.py --dataset user/pets --prompts "a photo of a {}, a pet" \
        --finetune_from stable-diffusion-v1-5/stable-diffusion-v1-5 --trainable lora --learning_rate 1e-4 \
        --batch_size 8 --output_dir outputs/pets

The folder is read by `DsCoPipeline.from_pretrained(output_dir)`. It also holds `results.json`, `samples.png`, with
`--evaluate_every` `samples-<step>.png`, and with `--trainable lora` `pytorch_lora_weights.safetensors`.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from diffusers import ModelMixin

from dsco_hf.data.datasets import dataset_fingerprint, load_pixels, present_classes
from dsco_hf.data.pixels import default_image_size
from dsco_hf.evaluators.evaluation import run_environment
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_scheduler
from dsco_hf.generators.training import CHECKPOINT, GeneratorTrainingResult, train_generator
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.studies.generator_check import FineTuneOptions, GeneratorScore, draw_plain_samples, save_lora
from dsco_hf.studies.options import ClassifierOptions, OutputOptions, RealOptions
from dsco_hf.utils.configs import ImportOptions, check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.files import write_json
from dsco_hf.utils.progress import introduce


@dataclass(frozen=True, kw_only=True)
class GeneratorRecipe(
    GeneratorTrainingConfig, RealOptions, FineTuneOptions, ClassifierOptions, OutputOptions, ImportOptions
):
    """Options of this recipe; those of the training itself and of the data are inherited.

    Attributes:
        image_size, num_channels: what images are brought to; by default their own size, or 32 px if they have several.
        classifier, classifier_revision: an image classifier to store with the pipeline, and to score samples with.
        output_dir: the pipeline folder.
        checkpoint_every: steps between checkpoints (kept in `<output_dir>-checkpoints`); if None, as many as take ten
            minutes. The first one comes after a minute.
        log_every: steps between looks at the loss and the clock.
        max_minutes: stop with a checkpoint after this time.
        mixed_precision: "no", "fp16" or "bf16"; without it, what `accelerate launch` was told.
        num_samples_per_class, num_inference_steps, guidance_scale: of samples.png, and the latter two of scores.
        evaluate_every: steps between sample grids and, with a classifier, the Fréchet distance of samples from the
            training images in its features; never if None.
        num_evaluation_samples: samples per Fréchet distance.
    """

    image_size: int | None = None
    num_channels: int = 3
    output_dir: str = "outputs/generator"
    checkpoint_every: int | None = None
    max_minutes: float | None = None
    log_every: int = 20
    mixed_precision: str | None = None
    num_samples_per_class: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    evaluate_every: int | None = None
    num_evaluation_samples: int = 1000

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints: beside the pipeline, so that they are never published."""
        return Path(self.output_dir).with_name(f"{Path(self.output_dir).name}-checkpoints")

    @property
    def sampling(self) -> dict[str, Any]:
        """How samples are drawn."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains, and saves the pipeline, the samples and the results."""
    recipe = parse_config(GeneratorRecipe, arguments, description=__doc__)
    check_made(Path(__file__).parent, {"finetune_from": recipe.finetune_from, "classifier": recipe.classifier})
    accelerator = make_accelerator(recipe.mixed_precision)
    check_anew(recipe.resume, accelerator, [recipe.checkpoints / CHECKPOINT])
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        dataset, _, splits = recipe.splits()
        run = GeneratorRun(recipe, accelerator, dataset)
    result = run.train()
    if accelerator.is_main_process:
        if result.finished:
            run.save(result, splits=splits)
        else:
            print(f"Stopped at step {result.step} of {run.config.train_steps}; run the same command again to go on.")
    accelerator.end_training()


class GeneratorRun:
    """One run of this recipe: the images, the models, and what is written of them."""

    def __init__(self, recipe: GeneratorRecipe, accelerator: Accelerator, dataset: Dataset) -> None:
        self.recipe, self.accelerator, self.dataset = recipe, accelerator, dataset
        self.output = Path(recipe.output_dir)
        self.names = present_classes(dataset, label_column=recipe.label_column)
        fields = dataclasses.fields(GeneratorTrainingConfig)
        self.config = GeneratorTrainingConfig(**{field.name: getattr(recipe, field.name) for field in fields})
        self.denoiser: ModelMixin | None = None
        self.text: dict[str, Any] = {}
        if (base := recipe.load_base(self.names)) is not None:
            self.take_over(base)
        else:
            recipe.check_new(self.config, self.names)
        size = recipe.image_size or (base.drawn_size if base else default_image_size(dataset, **recipe.columns))
        self.pixels, self.labels, _ = load_pixels(
            dataset, image_size=size, num_channels=base.num_channels if base else recipe.num_channels,
            on_error=recipe.on_error, classes=self.names, progress=accelerator.is_local_main_process, **recipe.columns,
        )  # fmt: skip
        if base is None and (base := recipe.new_base(self.config, self.names, self.pixels.shape[1:3])) is not None:
            self.take_over(base)
        self.vae = recipe.load_vae() if base is None else base.vae
        if self.vae is not None:
            self.vae.to(accelerator.device)
        self.scheduler = base.scheduler if base else build_scheduler(self.config, latents=self.vae is not None)
        self.classifier = recipe.load_classifier()
        images, *_, size = self.pixels.shape
        introduce(accelerator, recipe.dataset, images=images, classes=len(self.names), size=size)
        self.score: GeneratorScore | None = None

    def take_over(self, base: DsCoPipeline) -> None:
        """Levels, network, prompts and text encoders of the pipeline that is trained further."""
        found = self.recipe.take_over(base, self.config, self.names, self.recipe.image_size)
        self.config, self.denoiser, self.text = found

    def train(self) -> GeneratorTrainingResult:
        """Trains until done or out of time."""
        recipe = self.recipe
        return train_generator(
            self.pixels, self.labels, self.config, num_classes=len(self.names), accelerator=self.accelerator,
            vae=self.vae, denoiser=self.denoiser, prompts=self.text.get("prompts"), resume=True,
            checkpoint_dir=recipe.checkpoints,
            checkpoint_every=recipe.checkpoint_every, max_minutes=recipe.max_minutes, log_every=recipe.log_every,
            evaluate=self.evaluate if recipe.evaluate_every else None, evaluate_every=recipe.evaluate_every or 1,
        )  # fmt: skip

    def pipeline(self, denoiser: ModelMixin, picture: Path) -> DsCoPipeline:
        """A pipeline around a denoiser, with a picture of its samples; the other components are shared by all."""
        pipe = DsCoPipeline(
            denoiser, scheduler=self.scheduler, vae=self.vae, classifier=self.classifier,
            id2label=dict(enumerate(self.names)), **self.text,
        ).to(self.accelerator.device)  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        count = self.recipe.num_samples_per_class
        draw_plain_samples(pipe, picture, images_per_class=count, seed=self.recipe.seed, **self.recipe.sampling)
        return pipe

    def evaluate(self, step: int, denoiser: ModelMixin) -> dict[str, float]:
        """Draws a sample grid and, with a classifier, scores the samples."""
        pipe = self.pipeline(denoiser, self.output / f"samples-{step:06d}.png")
        if self.classifier is None:
            return {}
        self.score = self.score or GeneratorScore.of_images(
            self.pixels, self.classifier, num_samples=self.recipe.num_evaluation_samples, **self.recipe.sampling
        )
        found = self.score(pipe)
        print(f"Step {step}: Fréchet distance {found['frechet_distance']:.3f} ({found['samples']:.0f} samples)")
        return found

    def save(self, result: GeneratorTrainingResult, **told: Any) -> None:
        """Writes the pipeline folder, `samples.png` and `results.json`: what was trained, on what, with what loss."""
        print("Drawing samples.", flush=True)
        self.pipeline(result.denoiser, self.output / "samples.png").save_pretrained(self.output)
        results = {
            "config": dataclasses.asdict(self.recipe) | dataclasses.asdict(self.config), **told,
            "dataset_fingerprint": dataset_fingerprint(self.dataset, **self.recipe.columns),
            "images": len(self.labels), "steps": result.step, "seconds": round(result.seconds, 2),
            "loss": result.losses[-1]["loss"], "losses": result.losses, "evaluations": result.evaluations,
            "parameters": sum(parameter.numel() for parameter in result.denoiser.parameters()),
            **run_environment(self.accelerator),
        }  # fmt: skip
        if result.lora:
            save_lora(self.output, result, self.text["prompts"])
            results["lora_parameters"] = sum(value.numel() for value in result.lora.values())
        if self.text:
            results["prompts"] = self.text["prompts"].as_record()
        write_json(self.output / "results.json", results)
        print(f"Saved the pipeline to {self.output}, loss {result.losses[-1]['loss']:.4f} after {result.step} steps.")


if __name__ == "__main__":
    main()
