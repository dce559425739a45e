"""What a small dataset has to match: class-mean embeddings of a population, made once and kept in two small files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from ..data.datasets import class_names, dataset_fingerprint, present_classes
from ..data.images import to_signed
from ..data.labels import Mapped, class_mapping, label_set_classes, label_set_named
from ..data.pixels import default_threads
from ..data.schema import image_seed
from ..utils.origins import components_of, fingerprint, versions
from ..utils.progress import Bar
from ..utils.values import plain_arguments
from .feature_spec import (
    POOLED,
    Features,
    FeatureSource,
    FeatureSpec,
    feature_specs,
    features_of,
    name_of,
)
from .features import check_finite, check_probe, features_and_logits
from .files import check_shapes, find_targets, read_config, read_tensors, write_targets
from .kernels import fourier_embedding
from .population import Population, Weighting, rows_of_labels, shared_batches, template_units


logger = logging.getLogger(__name__)

_TENSORS = ("embeddings", "counts", "feature_mean", "feature_std", "frequencies", "probe")
_OPTIONAL_TENSORS = ("second_moment",)


@dataclasses.dataclass
class MatchingTargets:
    """Mean embeddings μ_c of every class of a population, and all that is needed to embed other images the same way.

    Made by [`MatchingTargets.from_dataset`] (with the data) or [`MatchingTargets.from_generator`] (data-free).
    Embedding: ψ(φ(x)) with φ the networks' features, standardised per dimension over the whole population, and ψ
    random Fourier features of a Gaussian kernel; see `dsco_hf.matching.kernels`.

    Attributes:
        class_names (`list[str]`): names of the C classes; row c of `embeddings` belongs to `class_names[c]`.
        class_labels (`list[int]`): the generator's class for each of them.
        embeddings (`torch.Tensor` of shape `(C, D)`): μ_c.
        counts (`torch.Tensor` of shape `(C,)`): number of images (or sum of their weights) behind each mean.
        feature_mean, feature_std (`torch.Tensor` of shape `(d,)`): standardisation of φ.
        frequencies (`torch.Tensor` of shape `(d, D / 2)`): of the random Fourier features.
        bandwidth (`float`): of the kernel, in units of standardised features.
        probe (`torch.Tensor` of shape `(2, d)`): what the classifier sees in two fixed noise images, by which it is
            known.
        provenance (`dict`): how the targets were made; plain JSON values.
        features (`tuple[FeatureSpec, ...]`): what φ consists of. Several layers are concatenated, and weighted so that
            each counts alike ([`layer_weights`]; the weights are part of `feature_std`).
        second_moment (`torch.Tensor` of shape `(D, D)`, *optional*): E ψψᵀ over the population, every class of equal
            weight, for objectives that need it (`Ridge`).
    """

    class_names: list[str]
    class_labels: list[int]
    embeddings: torch.Tensor
    counts: torch.Tensor
    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    frequencies: torch.Tensor
    bandwidth: float
    probe: torch.Tensor
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    features: tuple[FeatureSpec, ...] = POOLED
    second_moment: torch.Tensor | None = None

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    @property
    def feature_dim(self) -> int:
        """d, the dimension of the classifier's features."""
        return self.feature_mean.shape[0]

    @property
    def embedding_dim(self) -> int:
        """D, the dimension of the embedding."""
        return self.embeddings.shape[1]

    def to(self, device: str | torch.device) -> MatchingTargets:
        """The same targets with their tensors on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **moved)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, those that are optional only if they are there."""
        optional = {name: getattr(self, name) for name in _OPTIONAL_TENSORS if getattr(self, name) is not None}
        return {name: getattr(self, name) for name in _TENSORS} | optional

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """ψ of features: `(n, d)` → `(n, D)`, float32; gradients reach the features."""
        if features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"These targets are for features of dimension {self.feature_dim}, got {features.shape[-1]}. Use the "
                f"classifier they were made with ({self.provenance.get('classifier') or 'not recorded'}) or make new "
                "ones."
            )
        standardised = (features.float() - self.feature_mean) / self.feature_std
        return fourier_embedding(standardised, self.frequencies)

    def rows_of(self, generator_labels: Sequence[int]) -> torch.Tensor:
        """Row of the targets for each of n classes of the generator, `(n,)`.

        Raises:
            ValueError: for a class that has no target.
        """
        return rows_of_labels(self.class_labels, generator_labels).to(self.embeddings.device)

    def check_pipeline(self, pipe: DiffusionPipeline) -> FeatureSource:
        """The networks of a pipeline that see what these targets match; refuses others than they were made with.

        Raises:
            ValueError: if the pipeline lacks one, or it sees other features in the probe images.
        """
        made_with = self.provenance.get("classifier") or "networks whose names were not recorded"
        if pipe.classifier is None and any(spec.network == "classifier" for spec in self.features):
            raise ValueError(
                "Matching needs the classifier that the targets were made with, and the pipeline has none: pass "
                f"`classifier=` to `DsCoPipeline.from_pretrained`. They were made with {made_with}."
            )
        source = FeatureSource(pipe, self.features)
        check_probe(source.probe(), self.probe, made_with)
        return source

    @classmethod
    @plain_arguments(embedding_dim=2, batch_size=1, decode_threads=0)
    def from_dataset(
        cls,
        dataset: Dataset | IterableDataset,
        pipe: DiffusionPipeline,
        *,
        mapping: Mapped = None,
        features: Features = None,
        image_column: str | None = None,
        label_column: str | None = None,
        embedding_dim: int = 2048,
        bandwidth: float | None = None,
        second_moment: bool = True,
        batch_size: int = 256,
        seed: int = 0,
        on_error: str = "raise",
        accelerator: Accelerator | PartialState | None = None,
        work_dir: str | Path | None = None,
        decode_threads: int | None = None,
        progress: bool = True,
    ) -> MatchingTargets:
        """Targets of a real dataset, in one pass over its images.

        The features wait on disk (4·d bytes an image) until their mean, spread and bandwidth are known, so memory does
        not grow with the dataset. Means and variances come from one stable pass in float64 (Chan, Golub & LeVeque
        1983), embeddings from a second one over the stored features, summed in float64: any number of processes gives
        the same targets within 1e-6. See `dsco_hf.matching.population`.

        Args:
            dataset (`Dataset` or `IterableDataset`): one split with an `Image` and a `ClassLabel` column.
            pipe (`DsCoPipeline`): gives the classifier, the image size and the generator's classes.
            mapping (*optional*): where names do not settle it: a `dict` from dataset class name to generator class,
                the name of a label set ("imagenette"), or a YAML file; see [`~dsco_hf.data.labels.class_mapping`].
            features ([`FeatureSpec`], `dict` or list of them, *optional*): what to match; what the
                classifier's head reads and what an untrained network sees if None. See
                [`~dsco_hf.matching.feature_spec.features_of`].
            image_column (`str`, *optional*): where there are several of the kind.
            label_column (`str`, *optional*): where there are several of the kind.
            embedding_dim (`int`): D.
            bandwidth (`float`, *optional*): of the kernel; the median distance of up to 2,000 images if None.
            second_moment (`bool`): also keep E ψψᵀ, `(D, D)`, for objectives that need it (`Ridge`): 4·D² bytes.
            batch_size (`int`): images per pass through the classifier.
            seed (`int`): of the random Fourier features and of the sample behind the bandwidth.
            on_error (`str`): "raise" or "skip" images that cannot be decoded (counted in `provenance`).
            accelerator (`Accelerator` or `PartialState`, *optional*): the processes that share the work; all of them
                call this with the same arguments and get the same targets. One alone if None. Streams are divided by
                `datasets.distributed.split_dataset_by_node`.
            work_dir (`str` or `Path`, *optional*): keeps the features, in files that are whole or absent, on a file
                system that all processes share. A killed pass that is run again continues there; so does one with
                another `embedding_dim`, `bandwidth` or `seed`. Remove it afterwards. A temporary file if None. A
                stream is read again from its beginning, without decoding, by the same number of processes; one that
                is shuffled needs a fixed seed.
            decode_threads (`int`, *optional*): threads that decode images while the classifier works; as many as the
                process has cores to spare if None, none if 0.
            progress (`bool`): show a progress bar.

        Raises:
            ValueError: for a dataset without image or label column, a class without image, a class the generator does
                not know, an unreadable image or features that are not finite; for a `work_dir` of another pass.
            RunError: if another run is at work on `work_dir`, or it cannot be written to.
        """
        specs = features_of(pipe, features)
        source = FeatureSource(pipe, specs)
        names = present_classes(dataset, label_column=label_column)
        known = class_names(dataset, label_column=label_column)
        labels = class_mapping(known, pipe.id2label, pipe.num_classes, mapping=mapping, present=names)
        source.warn_of_other_classes(names)
        probe = source.probe()
        columns = {"image_column": image_column, "label_column": label_column}
        options = {"image_size": pipe.image_size, "num_channels": pipe.num_channels, **columns, "on_error": on_error}
        mapped = isinstance(dataset, Dataset)
        fingerprint = dataset_fingerprint(dataset, **columns) if mapped or work_dir is not None else None
        identity = {
            "population": "data",
            "dataset_fingerprint": fingerprint,
            **options,
            "batch_size": batch_size,
            "processes": None if mapped or accelerator is None else accelerator.num_processes,
        }
        population = _population(source, names, identity, source.parts(), work_dir, seed, accelerator)
        options["threads"] = default_threads() if decode_threads is None else decode_threads
        options["classes"] = names
        options["progress"] = progress and (accelerator is None or accelerator.is_main_process)
        with population:
            for unit, batch in shared_batches(dataset, population, batch_size=batch_size, **options):
                seen = source.of_pixels(batch.pixels).features
                check_finite(seen, f"image {int(batch.indices[0])} and following")
                population.add(seen, batch.labels, keys=batch.keys, unit=unit)
            sizes = [block.shape[1] for block in probe]
            statistics = population.embed(
                embedding_dim=embedding_dim, bandwidth=bandwidth, layer_sizes=sizes, second_moment=second_moment
            )
        images = statistics.pop("images")
        provenance = {
            "population": "data",
            "dataset": source_of(dataset),
            "fingerprint": fingerprint if mapped else None,
            "images": images,
            "skipped": len(dataset) - images if mapped else None,
            **source.classifiers(),
            "seed": seed,
        }
        return cls(names, labels, **statistics, probe=torch.cat(probe, dim=1), provenance=provenance, features=specs)

    @classmethod
    @plain_arguments(samples_per_class=1, num_inference_steps=1, embedding_dim=2, batch_size=1)
    @torch.no_grad()
    def from_generator(
        cls,
        pipe: DiffusionPipeline,
        class_labels: Sequence[int | str] | str | None = None,
        *,
        features: Features = None,
        samples_per_class: int = 200,
        weighting: str = "confidence",
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        eta: float = 1.0,
        embedding_dim: int = 2048,
        bandwidth: float | None = None,
        second_moment: bool = True,
        batch_size: int = 200,
        seed: int = 0,
        accelerator: Accelerator | PartialState | None = None,
        work_dir: str | Path | None = None,
        progress: bool = True,
    ) -> MatchingTargets:
        """Data-free targets: the population is plain samples of the generator, weighted by what the classifier says.

        No real image is read.

        Args:
            pipe (`DsCoPipeline`): the generator and the classifier.
            class_labels (sequence of `int` or `str`, or a `str`, *optional*): the generator's classes, by index or
                name, or those of a label set ("imagenette", see [`~dsco_hf.data.labels.label_set`]); all if None.
            features (*optional*): what to match, see [`MatchingTargets.from_dataset`].
            samples_per_class (`int`): plain samples drawn per class.
            weighting (`str`): "confidence" weighs a sample by the probability that the classifier gives its class,
                "agreement" drops samples that the classifier takes for another class, "none" weighs all alike.
                "posterior" lets a sample count for every class by its probability, whatever class it was drawn for:
                the population is then labelled by the classifier alone. All but "none" need a classifier of the same
                classes.
            num_inference_steps (`int`): of the sampling, see [`DsCoPipeline.__call__`]; use that of the synthesis.
            guidance_scale (`float`): of the sampling, likewise.
            eta (`float`): of the sampling, likewise.
            embedding_dim (`int`): see [`MatchingTargets.from_dataset`].
            bandwidth (`float`, *optional*): see [`MatchingTargets.from_dataset`].
            second_moment (`bool`): see [`MatchingTargets.from_dataset`].
            seed (`int`): of the samples, the random Fourier features and the sample behind the bandwidth.
            batch_size (`int`): samples drawn at a time.
            accelerator (`Accelerator` or `PartialState`, *optional*): the processes that share the work, see
                [`MatchingTargets.from_dataset`]. A sample's noise depends on its class and index only.
            work_dir (`str` or `Path`, *optional*): keeps the features, so that a killed pass continues, likewise.
            progress (`bool`): show a progress bar.

        Raises:
            ValueError: for an unknown class, fewer than one sample, a classifier of other classes, no usable sample,
                or a `work_dir` of another pass.
            RunError: if another run is at work on `work_dir`, or it cannot be written to.
        """
        specs = features_of(pipe, features)
        source = FeatureSource(pipe, specs)
        if preset := label_set_named(class_labels):
            names, labels = label_set_classes(preset, pipe.id2label, pipe.num_classes)
        else:
            labels = pipe.get_label_ids(range(pipe.num_classes) if class_labels is None else class_labels)
            names = [pipe.id2label.get(label, str(label)) for label in labels]
        weigh = Weighting(
            weighting, pipe.classifier, [pipe.id2label.get(label, str(label)) for label in labels], labels
        )
        probe = source.probe()
        sampling = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
        drawing = {"samples_per_class": samples_per_class, "weighting": weighting, **sampling}
        identity = {
            "population": "generator",
            "class_labels": labels,
            **drawing,
            "seed": seed,
            "batch_size": batch_size,
        }
        parts = components_of(pipe) | source.parts()
        population = _population(source, names, identity, parts, work_dir, seed, accelerator)
        units = template_units(len(labels), samples_per_class, batch_size)
        with population:
            population.resume(population.finished)
            mine = {unit: units[unit] for unit in population.share(list(units))}
            total = sum(len(indices) for _, indices in mine.values())
            shown = progress and (accelerator is None or accelerator.is_main_process)
            with Bar(total=total, desc="Template samples", unit="img", disable=not shown) as bar:
                for unit, (row, indices) in mine.items():
                    seeds = [image_seed(seed, labels[row], index, "template") for index in indices]
                    drawn = pipe.sample([labels[row]] * len(seeds), seeds=seeds, **sampling)
                    _add_templates(population, source, weigh, to_signed(drawn.images), row, seeds, unit)
                    bar.update(len(seeds))
            sizes = [block.shape[1] for block in probe]
            statistics = population.embed(
                embedding_dim=embedding_dim, bandwidth=bandwidth, layer_sizes=sizes, second_moment=second_moment
            )
        del statistics["images"]
        provenance = {
            "population": "generator",
            **drawing,
            "generator": name_of(pipe),
            **source.classifiers(),
            "seed": seed,
        }
        return cls(names, labels, **statistics, probe=torch.cat(probe, dim=1), provenance=provenance, features=specs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `targets.safetensors` and `targets.json` into a folder, which is made if it is not there."""
        config = {
            "class_names": self.class_names,
            "class_labels": self.class_labels,
            "bandwidth": self.bandwidth,
            "provenance": self.provenance,
            "features": [spec.as_record() for spec in self.features],
        }
        write_targets(Path(folder), config, self._tensors())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> MatchingTargets:
        """Loads targets from a folder, or from a model repository on the Hub.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is truncated or does not hold targets, or the two do not belong together.
        """
        config, weights = find_targets(
            name_or_path, revision=revision, subfolder=subfolder, token=token, cache_dir=cache_dir
        )
        fields = read_config(config, ("class_names", "class_labels", "bandwidth", "provenance"))
        tensors = read_tensors(weights, _TENSORS, _OPTIONAL_TENSORS)
        check_shapes(fields, tensors, config.parent)
        features = read_config(config, ("features",), optional=True).get("features")
        return cls(**fields, **tensors, features=POOLED if features is None else feature_specs(features))


def _population(
    source: FeatureSource,
    names: Sequence[str],
    identity: Mapping[str, Any],
    parts: Mapping[str, Any],
    work_dir: str | Path | None,
    seed: int,
    accelerator: Accelerator | PartialState | None,
) -> Population:
    """The features of one pass; a pass that goes on in `work_dir` knows itself by all that decides them."""
    known = {
        **identity,
        "class_names": list(names),
        "features": [spec.as_record() for spec in source.specs],
        "networks": {} if work_dir is None else _digests(parts),
        "versions": versions(),
    }
    return Population(
        names, work_dir=work_dir, identity=known, device=source.device, seed=seed, accelerator=accelerator
    )


def _add_templates(
    population: Population,
    source: FeatureSource,
    weigh: Weighting,
    pixels: torch.Tensor,
    row: int,
    seeds: Sequence[int],
    unit: str,
) -> None:
    """Adds samples `(B, C, H, W)` of a class, weighted by what the classifier makes of them."""
    seen = source.of_pixels(pixels)
    check_finite(seen.features, f"template samples of class {population.names[row]!r}")
    logits = seen.logits
    if weigh.kind != "none" and not source.predicts:
        logits = features_and_logits(source.pipe.classifier, pixels)[1]
    samples, rows, weights = (part.cpu() for part in weigh(logits, row))
    keys = torch.tensor(seeds)[samples]
    population.add(seen.features.cpu()[samples], rows, weights, keys=keys, unit=unit)


def _digests(parts: Mapping[str, Any]) -> dict[str, str]:
    """By which a pass knows its models again."""
    return {name: fingerprint(part)[:16] for name, part in parts.items() if part is not None}


def source_of(dataset: Dataset | IterableDataset) -> str | None:
    """The name that a dataset has of its own, if any."""
    info = getattr(dataset, "info", None)
    return getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
