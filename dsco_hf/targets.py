"""What a small dataset has to match: class-mean embeddings of a population, made once and kept in two small files."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .data import dataset_fingerprint, iterate_pixels
from .features import features_and_logits, probe_features
from .kernels import fourier_embedding
from .population import Population
from .schema import class_mapping, class_names, nearest
from .seeds import image_seed


logger = logging.getLogger(__name__)

WEIGHTS_NAME, CONFIG_NAME = "targets.safetensors", "targets.json"
_TENSORS = ("embeddings", "counts", "feature_mean", "feature_std", "frequencies", "probe")


@dataclasses.dataclass
class MatchingTargets:
    """Mean embeddings μ_c of every class of a population, and all that is needed to embed other images the same way.

    Made by [`MatchingTargets.from_dataset`] (with the data) or [`MatchingTargets.from_generator`] (data-free).
    Embedding: ψ(φ(x)) with φ the classifier's pooled features, standardised per dimension over the whole population,
    and ψ random Fourier features of a Gaussian kernel; see `dsco_hf.kernels`.

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
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return dataclasses.replace(self, **moved)

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
        """Row of the targets for each of the generator's classes.

        Raises:
            ValueError: for a class that has no target.
        """
        return rows_of_labels(self.class_labels, generator_labels).to(self.embeddings.device)

    def check_classifier(self, classifier: PreTrainedModel | None) -> None:
        """Refuses a classifier other than the one the targets were made with.

        Raises:
            ValueError: if there is none, its feature size differs, or it sees other features in the probe images.
        """
        made_with = self.provenance.get("classifier") or "a classifier whose name was not recorded"
        if classifier is None:
            raise ValueError(
                "Matching needs the classifier that the targets were made with, and the pipeline has none: pass "
                f"`classifier=` to `DsCoPipeline.from_pretrained`. They were made with {made_with}."
            )
        probe = probe_features(classifier)
        if probe.shape != self.probe.shape:
            raise ValueError(
                f"The pipeline's classifier gives {probe.shape[1]} features, the targets are for {self.feature_dim}: "
                f"they were made with another classifier ({made_with}). Load that one or make new targets."
            )
        expected = self.probe.cpu()
        # bfloat16 features differ by about 1 %; another training of the same architecture by far more than 10 %
        if not (probe - expected).norm() <= 0.1 * expected.norm() + 1e-6:
            raise ValueError(
                "The pipeline's classifier is not the one that the targets were made with: it has the same feature "
                f"size but sees other features. They were made with {made_with}. Load that one or make new targets."
            )

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset | IterableDataset,
        pipe: DiffusionPipeline,
        *,
        mapping: Mapping[str, int | str] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        embedding_dim: int = 2048,
        bandwidth: float | None = None,
        batch_size: int = 256,
        seed: int = 0,
        on_error: str = "raise",
        progress: bool = True,
    ) -> MatchingTargets:
        """Targets of a real dataset, in one pass over its images.

        The features wait in a temporary file (4·d bytes an image) until their mean, spread and bandwidth are known, so
        memory does not grow with the dataset.

        Args:
            dataset (`Dataset` or `IterableDataset`): one split with an `Image` and a `ClassLabel` column.
            pipe (`DsCoPipeline`): gives the classifier, the image size and the generator's classes.
            mapping (`dict`, *optional*): dataset class name to generator class, where names do not settle it.
            image_column (`str`, *optional*): where there are several of the kind.
            label_column (`str`, *optional*): where there are several of the kind.
            embedding_dim (`int`): D.
            bandwidth (`float`, *optional*): of the kernel; the median distance of up to 2,000 images if None.
            batch_size (`int`): images per pass through the classifier.
            seed (`int`): of the random Fourier features and of the sample behind the bandwidth.
            on_error (`str`): "raise" or "skip" images that cannot be decoded (counted in `provenance`).
            progress (`bool`): show a progress bar.

        Raises:
            ValueError: for a dataset without image or label column, a class without image, a class the generator does
                not know, an unreadable image or features that are not finite.
        """
        classifier = _ready_classifier(pipe)
        names = class_names(dataset, label_column=label_column)
        labels = class_mapping(names, pipe.id2label, pipe.num_classes, mapping=mapping)
        batches = iterate_pixels(
            dataset,
            image_size=pipe.image_size,
            num_channels=pipe.num_channels,
            batch_size=batch_size,
            image_column=image_column,
            label_column=label_column,
            on_error=on_error,
            progress=progress,
        )
        with Population(names) as population:
            for batch in batches:
                features = _features(classifier, batch.pixels, where=f"image {int(batch.indices[0])} and following")
                population.add(features, batch.labels)
            statistics = population.embed(embedding_dim=embedding_dim, bandwidth=bandwidth, seed=seed)
        provenance = {
            "population": "data",
            "dataset": _source_of(dataset),
            "fingerprint": dataset_fingerprint(dataset) if isinstance(dataset, Dataset) else None,
            "images": population.images,
            "skipped": len(dataset) - population.images if isinstance(dataset, Dataset) else None,
            "classifier": _name_of(classifier),
            "seed": seed,
        }
        return cls(names, labels, **statistics, probe=probe_features(classifier), provenance=provenance)

    @classmethod
    @torch.no_grad()
    def from_generator(
        cls,
        pipe: DiffusionPipeline,
        class_labels: Sequence[int | str] | None = None,
        *,
        samples_per_class: int = 200,
        weighting: str = "confidence",
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        eta: float = 1.0,
        embedding_dim: int = 2048,
        bandwidth: float | None = None,
        batch_size: int = 200,
        seed: int = 0,
        progress: bool = True,
    ) -> MatchingTargets:
        """Data-free targets: the population is plain samples of the generator, weighted by what the classifier says.

        No real image is read.

        Args:
            pipe (`DsCoPipeline`): the generator and the classifier.
            class_labels (sequence of `int` or `str`, *optional*): the generator's classes, by index or name; all if
                None.
            samples_per_class (`int`): plain samples drawn per class.
            weighting (`str`): "confidence" weighs a sample by the probability that the classifier gives its class,
                "agreement" drops samples that the classifier takes for another class, "none" weighs all alike. The
                first two need a classifier of the same classes.
            num_inference_steps (`int`): of the sampling, see [`DsCoPipeline.__call__`]; use that of the synthesis.
            guidance_scale (`float`): of the sampling, likewise.
            eta (`float`): of the sampling, likewise.
            embedding_dim (`int`): see [`MatchingTargets.from_dataset`].
            bandwidth (`float`, *optional*): see [`MatchingTargets.from_dataset`].
            seed (`int`): of the samples, the random Fourier features and the sample behind the bandwidth.
            batch_size (`int`): samples drawn at a time.
            progress (`bool`): show a progress bar.

        Raises:
            ValueError: for an unknown class, fewer than one sample, a classifier of other classes, or no usable
                sample.
        """
        if samples_per_class < 1:
            raise ValueError(f"`samples_per_class` must be at least 1, got {samples_per_class}; 200 is usual.")
        classifier = _ready_classifier(pipe)
        labels = pipe.get_label_ids(range(pipe.num_classes) if class_labels is None else class_labels)
        names = [pipe.id2label.get(label, str(label)) for label in labels]
        weigh = _Weighting(weighting, classifier, names)
        bar = tqdm(total=samples_per_class * len(labels), desc="Template samples", unit="img", disable=not progress)
        with Population(names) as population, bar:
            for row, label in enumerate(labels):
                for first in range(0, samples_per_class, batch_size):
                    count = min(batch_size, samples_per_class - first)
                    drawn = pipe.sample(
                        [label] * count,
                        seeds=[image_seed(seed, label, first + i, "template") for i in range(count)],
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        eta=eta,
                    )
                    features, logits = features_and_logits(classifier, drawn.images * 2 - 1)
                    _check_finite(features, f"template samples of class {names[row]!r}")
                    rows = torch.full((count,), row)
                    population.add(features, rows, weigh(logits, row))
                    bar.update(count)
            statistics = population.embed(embedding_dim=embedding_dim, bandwidth=bandwidth, seed=seed)
        provenance = {
            "population": "generator",
            "samples_per_class": samples_per_class,
            "weighting": weighting,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "eta": eta,
            "generator": _name_of(pipe),
            "classifier": _name_of(classifier),
            "seed": seed,
        }
        return cls(names, labels, **statistics, probe=probe_features(classifier), provenance=provenance)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `targets.safetensors` and `targets.json` into a folder, which is made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "class_names": self.class_names,
            "class_labels": self.class_labels,
            "bandwidth": self.bandwidth,
            "provenance": self.provenance,
        }
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        for name, write in (
            (WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"})),
            (CONFIG_NAME, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")),
        ):
            partial = folder / f".{name}.partial"
            write(partial)
            partial.replace(folder / name)  # a file is whole or absent

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
            ValueError: if a file is truncated or does not hold targets.
        """
        text = str(name_or_path)
        looks_local = isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
        if looks_local and not Path(name_or_path).is_dir():
            raise FileNotFoundError(f"There is no folder {name_or_path}: give one written by `save_pretrained`.")
        paths = {}
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if Path(name_or_path).is_dir():
                paths[name] = Path(name_or_path) / (subfolder or "") / name
            else:
                try:
                    found = hf_hub_download(
                        str(name_or_path),
                        name,
                        revision=revision,
                        subfolder=subfolder,
                        token=token,
                        cache_dir=cache_dir,
                    )
                except EntryNotFoundError as error:
                    raise FileNotFoundError(
                        f"The repository {name_or_path} has no {name}: no targets are there."
                    ) from error
                paths[name] = Path(found)
            if not paths[name].is_file():
                raise FileNotFoundError(
                    f"{paths[name]} is missing: targets are the two files {CONFIG_NAME} and {WEIGHTS_NAME}, as "
                    "written by `MatchingTargets.save_pretrained`."
                )
        return cls(**_read_config(paths[CONFIG_NAME]), **_read_tensors(paths[WEIGHTS_NAME]))


def rows_of_labels(class_labels: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
    """Position in `class_labels` of each wanted class; ValueError names the classes that are not there."""
    rows = {label: row for row, label in reversed(list(enumerate(class_labels)))}
    missing = sorted({int(label) for label in wanted} - set(rows))
    if missing:
        raise ValueError(
            f"There are no targets for class(es) {missing[:10]} of the generator; there are for "
            f"{sorted(rows)[:20]}{' …' if len(rows) > 20 else ''}. Make targets that include them."
        )
    return torch.tensor([rows[int(label)] for label in wanted], dtype=torch.int64)


class _Weighting:
    """Weight of a template sample by what the classifier says of it."""

    def __init__(self, kind: str, classifier: PreTrainedModel, names: Sequence[str]) -> None:
        kinds = ("confidence", "agreement", "none")
        if kind not in kinds:
            raise ValueError(f"`weighting` must be one of {list(kinds)}, got {kind!r}.{nearest(kind, kinds)}")
        self.kind = kind
        self.labels: list[int] = []
        if kind != "none":
            try:
                self.labels = class_mapping(names, classifier.config.id2label, classifier.config.num_labels)
            except ValueError as error:
                raise ValueError(
                    f"`weighting={kind!r}` asks the classifier for the generator's classes, but it was trained on "
                    f"others: {error} Or pass `weighting='none'`, which uses its features only."
                ) from error

    def __call__(self, logits: torch.Tensor, row: int) -> torch.Tensor:
        if self.kind == "none":
            return torch.ones(len(logits))
        if self.kind == "agreement":
            return (logits.argmax(dim=1) == self.labels[row]).float()
        return logits.softmax(dim=1)[:, self.labels[row]]


def _ready_classifier(pipe: DiffusionPipeline) -> PreTrainedModel:
    classifier = pipe.classifier
    if classifier is None:
        raise ValueError(
            "Targets are made from a classifier's features, and the pipeline has none: pass `classifier=` to "
            "`DsCoPipeline.from_pretrained`, for example `AutoModelForImageClassification.from_pretrained(...)`."
        )
    if classifier.training:
        raise ValueError(
            "The pipeline's classifier is in train mode, where dropout and batch statistics change its features: call "
            "`pipe.classifier.eval()` first."
        )
    return classifier


@torch.no_grad()
def _features(classifier: PreTrainedModel, pixels: torch.Tensor, *, where: str) -> torch.Tensor:
    features, _ = features_and_logits(classifier, pixels.to(next(classifier.parameters()).device))
    _check_finite(features, where)
    return features


def _check_finite(features: torch.Tensor, where: str) -> None:
    bad = (~features.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"The classifier's features are not finite for {len(bad)} of {len(features)} images ({where}; the first "
            f"is number {int(bad[0])} of the batch). Check its weights, or load it with `dtype=torch.float32`."
        )


def _name_of(model: Any) -> str | None:
    """Hub id of a model; of a local folder only its last part, as targets are shared."""
    name = str(getattr(model, "name_or_path", "") or "")
    return (Path(name).name if Path(name).exists() or Path(name).is_absolute() else name) or None


def _source_of(dataset: Dataset | IterableDataset) -> str | None:
    info = getattr(dataset, "info", None)
    return getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)


def _read_config(path: Path) -> dict[str, Any]:
    fields = ("class_names", "class_labels", "bandwidth", "provenance")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): it may be truncated. Save the targets again."
        ) from error
    if not isinstance(config, dict) or (missing := [name for name in fields if name not in config]):
        raise ValueError(
            f"{path} does not describe targets{f': it lacks {missing}' if isinstance(config, dict) else ''}."
        )
    return {name: config[name] for name in fields}


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be truncated. Save the targets again.") from error
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {missing}: it does not hold targets, or those of another version.")
    return {name: tensors[name] for name in _TENSORS}
