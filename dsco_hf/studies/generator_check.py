"""What a generator is trained from, and how good its samples are: what a classifier makes of them and of real ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, ModelMixin
from transformers import PreTrainedModel

from ..data.datasets import load_pixels, present_classes
from ..data.images import to_signed
from ..data.labels import class_mapping
from ..data.pixels import class_places
from ..data.schema import class_names, find_columns, image_seed
from ..generators.base import FAMILIES, check_lora, denoiser_of
from ..generators.denoisers import (
    ENCODERS,
    GeneratorTrainingConfig,
    build_denoiser,
    build_scheduler,
    read_class_mapping,
    with_schedule_of,
)
from ..generators.prompts import Prompts, TextConditioned, class_prompts
from ..generators.training import GeneratorTrainingResult
from ..matching.features import observe
from ..matching.kernels import frechet_distance
from ..sampling.hosts import is_host
from ..sampling.models import load_model
from ..sampling.pipeline import DsCoPipeline
from .figures.accuracy import sample_grid


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """What a generator is trained from.

    Attributes:
        vae, vae_revision: an `AutoencoderKL` (folder or Hub id) to train in its latents; none for pixel space.
        finetune_from, finetune_revision: a pipeline (folder or Hub id) to train further: its denoiser with new class
            embeddings or prompts, its noise schedule, its autoencoder and its image size (a UNet takes another
            `image_size` too). A learned variance stays as it is, and so do text encoders.
        class_mapping: a YAML file with `dataset class: class of that pipeline`, index or name, or a list of them, for
            classes that should start from others than the mean of all.
        prompts: of a denoiser that is conditioned on them: a template, in which {} stands for the class, or a YAML
            file with several, or with a prompt for each class; "a photo of a {}" if none.
        negative_prompt: what dropped labels become, and guidance leads away from.
        drop_text_encoders: leave the text encoders out of the folder; the encoded prompts are there in any case.
    """

    vae: str | None = None
    vae_revision: str | None = None
    finetune_from: str | None = None
    finetune_revision: str | None = None
    class_mapping: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    drop_text_encoders: bool = False

    @property
    def asked(self) -> dict[str, str]:
        """What is asked of the prompts."""
        given = {"prompts": self.prompts, "negative_prompt": self.negative_prompt}
        return {name: text for name, text in given.items() if text is not None}

    def load_base(self, names: Sequence[str] | None = None) -> DsCoPipeline | None:
        """The pipeline to train further, if one was named; with prompts of the classes `names`, if it takes them.

        Raises:
            ValueError: for options that belong to one, or exclude it.
        """
        if self.finetune_from is None:
            if self.class_mapping is not None:
                raise ValueError("`class_mapping` maps to classes of `finetune_from`, which is missing.")
            return None
        if self.vae is not None:
            raise ValueError("`finetune_from` brings its own autoencoder: leave `vae` out.")
        place, revision, asked = self.finetune_from, self.finetune_revision, self.asked
        if is_host(place, revision):
            return DsCoPipeline.from_pretrained(place, revision=revision, class_names=names, **asked)
        pipe = DsCoPipeline.from_pretrained(place, revision=revision)
        known = pipe.prompts
        if asked or (known is not None and names is not None and list(names) != known.config.class_names):
            negative = {} if known is None else {"negative_prompt": known.config.negative_prompt}
            pipe.encode_prompts(class_names=names, **negative | asked)
        return pipe

    def check_new(self, config: GeneratorTrainingConfig, names: Sequence[str]) -> None:
        """Raises ValueError for prompts that a new network cannot have, or for one that does not learn all weights."""
        architecture = config.architecture
        if config.trainable != "all":
            raise ValueError(f"`trainable={config.trainable!r}` is for fine-tuning: a new model learns all weights.")
        if issubclass(FAMILIES[architecture], TextConditioned):
            class_prompts(self.prompts, names)
        elif self.asked:
            raise ValueError(
                f"A new {architecture!r} knows its classes by itself and takes no prompts: leave "
                f"{' and '.join(f'`{name}`' for name in self.asked)} out, or choose `architecture='stable-diffusion'`."
            )

    def new_base(
        self, config: GeneratorTrainingConfig, names: Sequence[str], shape: Sequence[int]
    ) -> DsCoPipeline | None:
        """A new pipeline of prompts, for an architecture that is conditioned on them; None for another.

        Args:
            config ([`GeneratorTrainingConfig`]): of network and noise levels.
            names (sequence of `str`): the classes.
            shape (sequence of `int`): channels and height of the images.

        Raises:
            ValueError: for a size that it cannot take, or a family that cannot be built.
        """
        family = FAMILIES[config.architecture]
        if not issubclass(family, TextConditioned):
            return None
        vae, (channels, side) = self.load_vae(), shape
        if vae is not None:
            channels, side = vae.config.latent_channels, side // 2 ** (len(vae.config.block_out_channels) - 1)
        network = build_denoiser(config, num_classes=len(names), sample_size=side, num_channels=channels)
        scheduler = build_scheduler(config, latents=vae is not None)
        encoders = family.build_encoders(config.seed)
        return DsCoPipeline(network, scheduler, vae, class_names=names, **encoders, **self.asked)

    def take_over(
        self, base: DsCoPipeline, config: GeneratorTrainingConfig, names: Sequence[str], image_size: int | None
    ) -> tuple[GeneratorTrainingConfig, ModelMixin, dict[str, Any]]:
        """What is taken over from the pipeline that is trained further, for the classes `names`.

        Returns:
            `tuple`: the config with its noise levels, its network for `image_size` (its own if None), and its prompts
            and the text encoders that stay, by component.
        """
        family = denoiser_of(base.denoiser, prompts=base.prompts)
        mapping = read_class_mapping(self.class_mapping, names, base.get_label_ids)
        side = (image_size or base.drawn_size) // base.vae_scale_factor
        network = family.adapt(len(names), mapping=mapping, sample_size=side)
        if config.trainable == "lora":
            check_lora(network)
        config = with_schedule_of(config, base.scheduler)
        if base.prompts is None:
            return config, network, {}
        if network.config.sample_size != base.denoiser.config.sample_size:  # which encoded prompts may tell
            base.register_modules(**{family.component: network})
            base.encode_prompts(base.prompts.as_record())
        kept = () if self.drop_text_encoders else ENCODERS
        return config, network, {"prompts": base.prompts} | {name: getattr(base, name) for name in kept}

    def load_vae(self) -> AutoencoderKL | None:
        """The autoencoder, if one was named."""
        return None if self.vae is None else load_model(AutoencoderKL, self.vae, revision=self.vae_revision)


def save_lora(folder: Path, result: GeneratorTrainingResult, prompts: Prompts) -> None:
    """Writes what LoRA learnt beside the pipeline, as `load_lora_weights` of diffusers' pipelines reads it."""
    (component,) = result.components
    host = getattr(diffusers, prompts.config.host)
    host.save_lora_weights(folder, **{f"{component}_lora_layers": result.lora})


@torch.no_grad()
def feature_moments(
    pixels: torch.Tensor, classifier: PreTrainedModel, *, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(d,)` and covariance `(d, d)` of a classifier's pooled features, in float64 on the CPU.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, range [-1, 1]): at least two images.
        classifier (`PreTrainedModel`): in eval mode.
        batch_size (`int`): images per pass.
    """
    if len(pixels) < 2:
        raise ValueError(f"A covariance needs at least 2 images, got {len(pixels)}.")
    device = next(classifier.parameters()).device
    parts = [observe(classifier, part.to(device)).features.double().cpu() for part in pixels.split(batch_size)]
    features = torch.cat(parts)
    return features.mean(dim=0), torch.cov(features.T)


@dataclass(frozen=True)
class GeneratorScore:
    """Scores samples of a generator against the real images it learned from, at a fixed cost per score.

    Attributes:
        mean (`torch.Tensor` of shape `(d,)`), cov (`torch.Tensor` of shape `(d, d)`): moments of the real features.
        num_samples (`int`): samples per score, shared evenly by the classes. The distance is biased upwards by few
            samples; only scores of the same number can be compared.
        num_inference_steps (`int`), guidance_scale (`float`), batch_size (`int`): of sampling.
        seed (`int`): the samples of every score start from the same noise.
    """

    mean: torch.Tensor
    cov: torch.Tensor
    num_samples: int = 1000
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    batch_size: int = 250
    seed: int = 0

    @classmethod
    def of_images(cls, pixels: torch.Tensor, classifier: PreTrainedModel, **options: int | float) -> GeneratorScore:
        """The score against `pixels`, `(N, C, H, W)` in [-1, 1], in the features of `classifier`."""
        mean, cov = feature_moments(pixels, classifier)
        return cls(mean, cov, **options)  # type: ignore[arg-type]

    def __call__(self, pipe: DsCoPipeline) -> dict[str, float]:
        """`{"frechet_distance", "samples"}` of plain samples of `pipe`, whose classifier is used."""
        labels = [index % pipe.num_classes for index in range(self.num_samples)]
        parts = []
        for start in range(0, len(labels), self.batch_size):
            chosen = labels[start : start + self.batch_size]
            seeds = range(self.seed + start, self.seed + start + len(chosen))
            output = pipe.sample(
                chosen,
                seeds=list(seeds),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
            )
            parts.append(to_signed(output.images.float().cpu()))
        mean, cov = feature_moments(torch.cat(parts), pipe.classifier)
        distance = frechet_distance(self.mean, self.cov, mean, cov)
        return {"frechet_distance": float(distance), "samples": float(len(labels))}


@dataclass(frozen=True)
class GeneratorCheck:
    """What a classifier makes of plain samples of a generator.

    Attributes:
        accuracy (`float`): share of the samples that it takes for the class they were drawn for.
        accuracy_real (`float`, *optional*): the same of real images, where there are any.
        shares (`dict[str, float]`): by class, the mean probability of the class for its samples: what counts of them
            in data-free targets.
        frechet_distance (`float`, *optional*): of the samples from the real images, in its features. It is biased
            upwards by few images: only distances of the same numbers can be compared.
        samples, chance (`int`, `float`): their number; the accuracy of guessing.
    """

    accuracy: float
    accuracy_real: float | None
    shares: dict[str, float]
    frechet_distance: float | None
    samples: int
    chance: float

    @property
    def level(self) -> float:
        """The accuracy below which they are hardly better than noise: half of the way from chance to real images."""
        best = 1.0 if self.accuracy_real is None else max(self.accuracy_real, self.chance)
        return self.chance + LEAST_SHARE * (best - self.chance)

    @property
    def doubtful(self) -> bool:
        """Whether the accuracy is below the level."""
        return self.accuracy < self.level

    def warn(self) -> None:
        """Logs a warning if the samples are hardly better than noise."""
        if self.doubtful:
            logger.warning(
                "%s That is hardly better than noise (below %.1f %%, half of the way from chance, %.1f %%, to real "
                "images): train the generator for longer, or choose one that knows these classes. Discrepancies of "
                "what it draws mean nothing.",
                self,
                100 * self.level,
                100 * self.chance,
            )

    def record(self) -> dict[str, Any]:
        """What the card of a set says of it, for `generator_check` of a record; plain JSON values."""
        return {**dataclasses.asdict(self), "level": self.level, "hardly_better_than_noise": self.doubtful}

    def __str__(self) -> str:
        """One line, as it is told before a set is drawn."""
        real = "" if self.accuracy_real is None else f", of real images {100 * self.accuracy_real:.1f} %"
        distance = "" if self.frechet_distance is None else f"; Fréchet distance {self.frechet_distance:.4g}"
        least = min(self.shares.items(), key=lambda item: item[1], default=None)
        share = "" if least is None else f"; the least share of a class counts for {least[0]}, {100 * least[1]:.1f} %"
        known = f"The classifier knows {100 * self.accuracy:.1f} % of {self.samples} plain samples"
        return f"{known}{real}{distance}{share}."


LEAST_SHARE = 0.5


@torch.no_grad()
def check_generator(
    pipe: DsCoPipeline,
    real: Dataset | None = None,
    *,
    class_labels: Sequence[int | str] | None = None,
    images_per_class: int = 4,
    most: int = 64,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> GeneratorCheck | None:
    """Asks the pipeline's classifier about plain samples, and about as many real images; warns if they are noise.

    A generator that was trained for too short draws noise whose features can still be moved to any target: the
    discrepancy of a set looks excellent then, and says nothing.

    Args:
        pipe (`DsCoPipeline`): with the classifier.
        real (`Dataset`, *optional*): to compare with; classes by name.
        class_labels (sequence of `int` or `str`, *optional*): the generator's classes; all if None.
        images_per_class (`int`): samples of each class, and real images at most.
        most (`int`): samples at most; of more classes, evenly spread ones are asked about.
        num_inference_steps (`int`): of sampling.
        guidance_scale (`float`): of sampling.
        seed (`int`): of the samples and of the choice of real images.
        image_column (`str`, *optional*): of `real`.
        label_column (`str`, *optional*): of `real`.

    Returns:
        [`GeneratorCheck`]; None if there is no classifier, or one that was trained on other classes.
    """
    if pipe.classifier is None:
        return None
    ids = pipe.get_label_ids(range(pipe.num_classes) if class_labels is None else class_labels)
    ids = [ids[place] for place in np.unique(np.linspace(0, len(ids) - 1, min(len(ids), most)).astype(int))]
    images_per_class = max(min(images_per_class, most // len(ids)), 1)
    try:
        known = pipe.classifier_labels(ids)
    except ValueError:  # its features can be matched, but it cannot say what the samples are
        return None
    drawn = [(row, index) for row in range(len(ids)) for index in range(images_per_class)]
    features, logits = [], []
    for start in range(0, len(drawn), 128):
        part = drawn[start : start + 128]
        seeds = [image_seed(seed, ids[row], index, "check") for row, index in part]
        images = pipe.sample(
            [ids[row] for row, _ in part],
            seeds=seeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ).images
        seen = observe(pipe.classifier, to_signed(images))
        features.append(seen.features.double().cpu())
        logits.append(seen.logits.cpu())
    rows = torch.tensor([row for row, _ in drawn])
    labels, answers = torch.tensor(known)[rows], torch.cat(logits)
    own = answers.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    names = [pipe.id2label.get(label, str(label)) for label in ids]
    shares = {name: float(own[rows == row].mean()) for row, name in enumerate(names)}
    found, distance = (
        (None, None)
        if real is None
        else _of_real(pipe, real, torch.cat(features), images_per_class, seed, image_column, label_column)
    )
    right = float((answers.argmax(dim=1) == labels).float().mean())
    check = GeneratorCheck(right, found, shares, distance, len(drawn), 1 / pipe.classifier.config.num_labels)
    check.warn()
    return check


def _of_real(
    pipe: DsCoPipeline,
    real: Dataset,
    samples: torch.Tensor,
    images_per_class: int,
    seed: int,
    image_column: str | None,
    label_column: str | None,
) -> tuple[float | None, float | None]:
    """The classifier's accuracy on real images, and the Fréchet distance from the features `(N, d)` of samples."""
    names, config = present_classes(real, label_column=label_column), pipe.classifier.config
    try:
        known = torch.tensor(class_mapping(names, config.id2label, config.num_labels, owner="classifier"))
    except ValueError:
        return None, None
    shown = real.with_format(None)
    places = class_places(class_names(real, label_column=label_column), names)
    column = find_columns(real, image_column=image_column, label_column=label_column)[1]
    found = np.array([-1 if isinstance(place, str) else place for place in (places[i] for i in shown[column][:])])
    rows = [
        row
        for place in range(len(names))
        for row in np.random.default_rng([seed, place]).permutation(np.flatnonzero(found == place))[:images_per_class]
    ]
    pixels, labels, _ = load_pixels(
        shown.select(rows), image_size=pipe.image_size, num_channels=pipe.num_channels, image_column=image_column,
        label_column=label_column, classes=names, on_error="skip",
    )  # fmt: skip
    seen = [observe(pipe.classifier, part.to(pipe.device)) for part in pixels.split(128)]
    answers = torch.cat([one.logits.cpu() for one in seen]).argmax(dim=1)
    features = torch.cat([one.features.double().cpu() for one in seen])
    distance = None
    if len(features) > 1 and len(samples) > 1:
        moments = [(part.mean(dim=0), torch.cov(part.T)) for part in (features, samples)]
        distance = float(frechet_distance(*moments[0], *moments[1]))
    return float((answers == known[labels]).float().mean()), distance


def draw_plain_samples(
    pipe: DsCoPipeline,
    path: str | Path,
    *,
    images_per_class: int = 8,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Path:
    """A picture with plain samples of up to ten classes.

    Args:
        pipe (`DsCoPipeline`): the generator.
        path (`str` or `Path`): the PNG file to write.
        images_per_class (`int`): of every class.
        seed (`int`): of their noise.
        num_inference_steps (`int`, *optional*): of the sampling, like the next one; see `Sampling`.
        guidance_scale (`float`, *optional*): likewise.
    """
    shown = sorted(pipe.id2label)[:10]
    drawn: Any = pipe(
        class_labels=[label for label in shown for _ in range(images_per_class)],
        generator=torch.Generator().manual_seed(seed), output_type="pt", num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )  # fmt: skip
    rows = to_signed(drawn.images.float().cpu()).unflatten(0, (len(shown), images_per_class))
    return sample_grid({"generated": rows}, [pipe.id2label[label] for label in shown], path)
