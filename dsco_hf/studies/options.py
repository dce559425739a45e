"""Options that recipes share: groups for their dataclasses to inherit, each with what it loads."""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import AutoencoderTiny
from transformers import PreTrainedModel

from ..concentration.concentrate import targets_in
from ..data.datasets import AnyDataset, load_pixels, load_splits
from ..evaluators import ImageSet, Protocol, get_protocol, load_image_set
from ..matching.kept import kept_targets, pipeline_identity
from ..matching.targets import MatchingTargets
from ..sampling.call import Targets
from ..sampling.flat import SamplingOptions
from ..sampling.methods import NOpt, QuantileTargets, Released
from ..sampling.models import load_classifier, load_model
from ..sampling.pipeline import DsCoPipeline
from ..utils.configs import ImportOptions
from ..utils.values import check_choice


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where a run writes, and whether it goes on.

    Attributes:
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        output_dir: where the results go.
    """

    resume: bool = True
    output_dir: str = "outputs"


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How images of a dataset are read, and which of them test.

    Attributes:
        revision: branch, tag or commit of the dataset on the Hub.
        test_split: what to test on: a split, "none", or "auto": the test split, else the validation split, else the
            share `holdout` of every class of the training images, the same ones in every recipe. Nothing of it is
            trained on or matched.
        holdout: see `test_split`.
        image_column, label_column: for datasets with several of them.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
    """

    revision: str | None = None
    test_split: str = "auto"
    holdout: float = 0.2
    image_column: str | None = None
    label_column: str | None = None
    on_error: str = "skip"

    @property
    def columns(self) -> dict[str, Any]:
        """The columns, as options of all that reads rows."""
        return {"image_column": self.image_column, "label_column": self.label_column}

    def open_splits(
        self, path: str, name: str | None, split: str, *, tested: bool = False, streaming: bool = False
    ) -> tuple[AnyDataset, AnyDataset | None, dict[str, Any]]:
        """Training images, test images or None, and what was taken; see [`~dsco_hf.data.opening.load_splits`].

        Raises:
            ValueError: where there are no test images but `tested` asks for some.
        """
        train, test, taken = load_splits(
            path, name, train_split=split, test_split=self.test_split, holdout=self.holdout, revision=self.revision,
            label_column=self.label_column, streaming=streaming,
        )  # fmt: skip
        if tested and test is None:
            raise ValueError("Networks are tested: `test_split` is a split or 'auto' here, not 'none'.")
        return train, test, taken

    def images(self, train: AnyDataset, test: AnyDataset | None, **options: Any) -> tuple[ImageSet, ImageSet | None]:
        """Both in memory; `options` are those of [`~dsco_hf.evaluators.load_image_set`], `protocol` among them."""
        options |= {"on_error": self.on_error, **self.columns}
        images = load_image_set(train, **options)
        return images, None if test is None else load_image_set(test, test_for=images, **options)

    def readable(
        self, rows: Dataset, images: ImageSet, *, num_channels: int = 3, image_size: int | None = None
    ) -> Dataset:
        """The rows that became `images`: the others cannot be decoded, and nobody is to meet them again."""
        if len(images.labels) == len(rows):
            return rows
        options = {"num_channels": num_channels, "image_size": image_size, "on_error": self.on_error, **self.columns}
        return rows.select(load_pixels(rows, **options)[2].tolist())


@dataclass(frozen=True, kw_only=True)
class RealOptions(ReadOptions):
    """A real dataset.

    Attributes:
        dataset, dataset_name: its path or Hub id, and its configuration; see
            `dsco_hf.data.datasets.load_image_dataset`.
        train_split: a split, slice or sum of splits.
    """

    dataset: str = "digits"
    dataset_name: str | None = None
    train_split: str = "train"

    def splits(
        self, *, tested: bool = False, streaming: bool = False
    ) -> tuple[AnyDataset, AnyDataset | None, dict[str, Any]]:
        """As of [`ReadOptions.open_splits`]."""
        return self.open_splits(self.dataset, self.dataset_name, self.train_split, tested=tested, streaming=streaming)


@dataclass(frozen=True, kw_only=True)
class MatchOptions(ReadOptions):
    """What targets are made of.

    Attributes:
        dataset, dataset_name, split: real images to match; see `dsco_hf.data.datasets.load_image_dataset`.
        mapping: of their classes to the generator's: a label set or a YAML file, see `MatchingTargets.from_dataset`.
        data_free: match samples of the generator instead, and read no real image.
        class_labels: the generator's classes, where no real images say which; all if none.
        samples_per_class, weighting: see `MatchingTargets.from_generator`.
        features: what to match, as YAML or JSON; see `dsco_hf.matching.feature_spec`.
    """

    dataset: str | None = None
    dataset_name: str | None = None
    split: str = "train"
    mapping: str | None = None
    data_free: bool = False
    class_labels: list[str] = field(default_factory=list)
    samples_per_class: int = 200
    weighting: str = "confidence"
    features: str | None = None

    def splits(self, *, streaming: bool = False) -> tuple[AnyDataset | None, AnyDataset | None, dict[str, Any]]:
        """As of [`ReadOptions.open_splits`]; nothing where there is no dataset."""
        if not self.dataset:
            return None, None, {}
        return self.open_splits(self.dataset, self.dataset_name, self.split, streaming=streaming)

    def classes(self, pipe: DsCoPipeline) -> list[int | str]:
        """The generator's classes, by index or name; a number is an index unless its classes are named by numbers."""
        return [pipe.get_label_ids([label])[0] if label.isdecimal() else label for label in self.class_labels]

    def targets_options(self, pipe: DsCoPipeline, **drawing: object) -> dict[str, Any]:
        """Options of `MatchingTargets.from_dataset`, or of `from_generator`, which takes `drawing`, too."""
        shared: dict[str, Any] = {"features": self.features}
        with contextlib.suppress(TypeError, json.JSONDecodeError):  # none; or YAML, which is read where it is used
            shared["features"] = json.loads(self.features)  # type: ignore[arg-type]
        if not self.data_free:
            return shared | self.columns | {"on_error": self.on_error, "mapping": self.mapping}
        samples = {"samples_per_class": self.samples_per_class, "weighting": self.weighting}
        return shared | samples | drawing | {"class_labels": self.classes(pipe) or None}

    def make_targets(self, pipe: DsCoPipeline, real: AnyDataset | None, **options: Any) -> MatchingTargets:
        """Targets of real images, or of the generator's own where there are none."""
        if self.data_free:
            return MatchingTargets.from_generator(pipe, **options)
        return MatchingTargets.from_dataset(real, pipe, **options)

    @property
    def asked(self) -> dict[str, Any]:
        """What is matched, as it decides targets: a mapping by what is in its file."""
        names = ("dataset", "dataset_name", "split", "test_split", "holdout", "revision", "data_free")
        text, file = self.mapping, Path(self.mapping or "")
        text = file.read_text(encoding="utf-8") if text and file.is_file() else text
        return {name: getattr(self, name) for name in names} | {"mapping": text}


@dataclass(frozen=True, kw_only=True)
class TargetsOptions(MatchOptions, SamplingOptions):
    """What images are drawn to match, and how.

    Attributes:
        targets, targets_revision: folder or Hub repository of finished targets, in place of `dataset` or `data_free`.
        draws: of objective "quantile".
        images_per_class: more of them, by whole blocks, extend a finished run.
        seed: with class and index it fixes an image.
    """

    targets: str | None = None
    targets_revision: str | None = None
    draws: int = 5
    images_per_class: int = 10
    seed: int = 0

    def check_matched(self) -> None:
        """Raises ValueError for several things to match, or something else than the method takes."""
        sources = [name for name in ("targets", "dataset", "data_free") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{sources} were given: images can match one of them only.")
        method = self.sampling.method
        if sources and isinstance(method, NOpt) and method.objective.needs is None:
            raise ValueError(f"The {method.objective.name!r} objective matches nothing: leave {sources[0]!r} out.")
        if any(isinstance(part, Released) for part in method.takers.values()) and sources != ["dataset"]:
            raise ValueError("The 'quantile' objective matches real images: give `dataset`.")
        if not sources and method.without_targets() != method:
            raise ValueError("Nothing to match: give `dataset`, `targets` or `data_free`, or `optimization_steps: 0`.")

    def matched(
        self, pipe: DsCoPipeline, real: Dataset | None, folder: Path, *, accelerator: Accelerator, **decisive: Any
    ) -> Targets | None:
        """Targets: loaded, or made by all processes together and kept in a folder; see `kept_targets` for errors.

        Args:
            pipe (`DsCoPipeline`): draws, and gives the features.
            real (`Dataset`, *optional*): the images of `dataset`.
            folder (`Path`): where targets that are made are kept.
            accelerator (`Accelerator`): of the launch.
            decisive: what else decides them, such as the models' precision.
        """
        if self.targets is not None:
            with accelerator.main_process_first():
                return MatchingTargets.from_pretrained(self.targets, revision=self.targets_revision)
        if self.dataset is None and not self.data_free:
            return None
        method, shown = self.sampling.method, accelerator.is_main_process
        if isinstance(method, Released):
            own = {name: getattr(self, name) for name in ("on_error", "mapping", "draws", "seed")}
            return QuantileTargets.from_dataset(real, pipe, progress=shown, **self.columns, **own)
        if method.targets_class is not MatchingTargets:
            given = self.classes(pipe) or list(range(pipe.num_classes)) if real is None else real
            told = {} if real is None else self.targets_options(pipe)
            wanted: dict[str, Any] = {name: value for name, value in told.items() if value not in (None, "raise")}
            wanted |= {"seed": self.seed, "images_per_class": self.images_per_class, "progress": shown}
            return targets_in(pipe, given, self.sampling, folder, accelerator=accelerator, **wanted)
        drawing = {name: getattr(self.sampling, name) for name in ("num_inference_steps", "guidance_scale", "eta")}
        options = self.targets_options(pipe, **drawing) | {"seed": self.seed}
        options |= {"second_moment": True} if method.second_moment else {}
        made_with = pipeline_identity(pipe, real, draws=real is None, **{**options, **self.asked, **decisive})
        make = functools.partial(self.make_targets, pipe, real, progress=shown, **options)
        return kept_targets(folder, made_with, make, accelerator=accelerator)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """A classifier.

    Attributes:
        classifier, classifier_revision: folder or Hub id.
    """

    classifier: str | None = None
    classifier_revision: str | None = None

    def load_classifier(self, dtype: torch.dtype | None = None) -> PreTrainedModel | None:
        """The classifier, frozen, if one was named."""
        return frozen(self.classifier, self.classifier_revision, dtype)


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(ClassifierOptions, ImportOptions):
    """A pipeline, with a classifier in place of its own.

    Attributes:
        generator, generator_revision: a pipeline's folder or Hub id; it gives the image size and the classes.
        classifier, classifier_revision: folder or Hub id; that of the pipeline if none.
    """

    generator: str | None = None
    generator_revision: str | None = None

    def load_pipeline(self, **parts: object) -> DsCoPipeline:
        """The pipeline, on the CPU; `parts` take the place of its own."""
        named = {"classifier": self.classifier, "classifier_revision": self.classifier_revision}
        parts = {**(named if self.classifier else {}), **parts}
        return DsCoPipeline.from_pretrained(
            str(self.generator), revision=self.generator_revision, dtype=self.torch_dtype, **parts
        )

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Of all models; None is the stored one."""
        return None


@dataclass(frozen=True, kw_only=True)
class DtypeOptions(PipelineOptions):
    """A pipeline in a precision.

    Attributes:
        dtype: "float32", "bfloat16" or "float16".
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses another precision."""
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of all models."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(DtypeOptions):
    """A pipeline with a preview decoder in place of its own.

    Attributes:
        preview_vae, preview_vae_revision: an `AutoencoderTiny` for the look-ahead; that of the pipeline if none.
    """

    preview_vae: str | None = None
    preview_vae_revision: str | None = None

    def load_pipeline(self, **parts: object) -> DsCoPipeline:
        """The pipeline, on the CPU; `parts` take the place of its own."""
        if self.preview_vae is not None:
            options: dict[str, Any] = {"revision": self.preview_vae_revision, "dtype": self.torch_dtype}
            parts = {"preview_vae": load_model(AutoencoderTiny, self.preview_vae, **options), **parts}
        return super().load_pipeline(**parts)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OutputOptions):
    """How networks are trained.

    Attributes:
        protocol: a name (quick, minimax-hard, rded-soft, rded-soft-small, released-dsco, cifar-convnet) or YAML file.
        epochs, steps, batch_size, learning_rate: in place of the protocol's own; `steps` drops its epochs, and
            `epochs` its steps.
        model_options: values of the networks' configurations, as JSON, e.g. '{"width": 32}'.
        mixed_precision: "no", "fp16" or "bf16"; without it, what `accelerate launch` was told.
    """

    protocol: str = "quick"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    model_options: str = "{}"
    mixed_precision: str | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """`model_options`, read."""
        values: dict[str, Any] = json.loads(self.model_options)
        return values

    def get_protocol(self, *names: str, **changes: object) -> Protocol:
        """The protocol with these changes, and those of the options, also of `names`, that were given."""
        names = ("epochs", "steps", "batch_size", "learning_rate", *names)
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return get_protocol(self.protocol, **given, **changes)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(TrainingOptions):
    """How single networks are trained.

    Attributes:
        num_channels: 1 or 3.
        compile: pass the networks through `torch.compile`; pays from about a minute of training on.
        checkpoint_seconds: time between checkpoints; 0 writes one after every epoch.
    """

    num_channels: int = 3
    compile: bool = False
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class StudyOptions(NetworkOptions):
    """How networks are trained on the sets of a study.

    Attributes:
        architectures: names or model types, see `dsco_hf.evaluators.build_evaluator`.
        seeds: trainings of each network.
        label_type: "hard", "teacher", "stored" or "learned"; the protocol's own by default.
        image_size: what all images are brought to (shorter side, then the centre); the protocol's by default, or else
            that of the small sets' images, or 32 if they have several sizes.
        teacher, teacher_revision: a classifier (folder or Hub id); soft labels are then made by it on each batch.
    """

    architectures: list[str] = field(default_factory=lambda: ["convnet-3"])
    seeds: int = 3
    label_type: str | None = None
    image_size: int | None = None
    teacher: str | None = None
    teacher_revision: str | None = None

    def load_teacher(self) -> PreTrainedModel | None:
        """The teacher, frozen, if one was named."""
        return frozen(self.teacher, self.teacher_revision)

    @property
    def training(self) -> dict[str, Any]:
        """As options of [`~dsco_hf.studies.study.Study`]."""
        return {"architectures": self.architectures, "overrides": self.overrides, "compiled": self.compile,
                "checkpoint_seconds": self.checkpoint_seconds}  # fmt: skip


def frozen(path: str | None, revision: str | None, dtype: torch.dtype | None = None) -> PreTrainedModel | None:
    """A classifier that is only asked; None where none is named."""
    if path is None:
        return None
    return load_classifier(path, revision=revision, dtype=dtype).requires_grad_(False)
