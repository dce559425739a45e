"""From a dataset to a row of a table: images at the size a protocol asks for, trainings spread over processes.

Every training is a job with a file of its own. A killed evaluation that is run again reads the finished jobs, takes up
those that had begun at their last checkpoint, and ends with the same numbers.
"""

from __future__ import annotations

import base64
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.datasets import AnyDataset, class_names, dataset_fingerprint, load_pixels, present_classes
from ..data.pixels import default_image_size
from ..data.shards import HALF_LEAST
from ..utils.files import DamagedFileError, read_json, write_json
from ..utils.origins import differences, identity, in_words, versions
from ..utils.progress import weights_in_silence
from ..utils.values import plain, plain_arguments, plain_fields
from .batches import ImageSet as ImageSet
from .batches import class_columns
from .models import build_evaluator, is_own_architecture
from .protocol_fields import COLUMNS
from .protocols import Protocol
from .training import Execution, train_evaluator


PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "evaluate")


logger = logging.getLogger(__name__)


@plain_arguments()
def load_image_set(
    dataset: AnyDataset,
    *,
    protocol: Protocol,
    test_for: ImageSet | None = None,
    classes: Sequence[str] | None = None,
    num_channels: int = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    soft_label_column: str | None = None,
    on_error: str = "raise",
    progress: bool = False,
) -> ImageSet:
    """Reads a dataset at the size that a protocol trains or tests on.

    Where the protocol has no `image_size`, training images keep their own; are they of several sizes, or no squares,
    they are brought to 32 pixels, as the log then says (a stream must have one size). Test images follow them. The
    column `weight` of a concentrated dataset says how much each training image counts.

    Args:
        dataset (`Dataset` or `IterableDataset`): one split.
        protocol (`Protocol`): its sizes are read; soft labels are read where it uses stored ones.
        test_for (`ImageSet`, *optional*): the training set that this is the test set of, by whose classes the labels
            are numbered.
        classes (sequence of `str`, *optional*): number the labels by these names, such as those of another set; by the
            dataset's own if None, less those without an image (unless it has stored soft labels).
        num_channels (`int`): 1 or 3.
        image_column (`str`, *optional*): see `data.find_columns`.
        label_column (`str`, *optional*): likewise.
        soft_label_column (`str`, *optional*): probabilities per class, or their most probable classes as `indices` and
            `probabilities`; "soft_label" by default, and "learned_label" where learned labels are trained on.
        on_error (`str`): `"raise"` or `"skip"` images that cannot be decoded.
        progress (`bool`): show a progress bar.

    Returns:
        `ImageSet`: on the CPU.

    Raises:
        ValueError: where the images of a stream have different sizes and the protocol names none, or soft labels are
            missing.
    """
    if not isinstance(protocol, Protocol):
        raise TypeError(f"`protocol` must be a Protocol, got {protocol!r}; `get_protocol(name)` finds one.")
    if not isinstance(test_for, ImageSet | None):
        raise TypeError(
            f"`test_for` must be the training set that `load_image_set` read, got a {type(test_for).__name__}."
        )
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    if test_for is None:
        size = protocol.load_size or protocol.image_size
        if size is None and isinstance(dataset, Dataset):
            size = default_image_size(dataset, **columns)
    else:
        size = protocol.test_size or protocol.image_size or test_for.pixels.shape[-1]
    stored = test_for is None and protocol.label_type in COLUMNS
    if test_for is not None:
        classes = test_for.names
    elif classes is None and not stored:
        classes = present_classes(dataset, label_column=label_column)
    pixels, labels, rows = load_pixels(
        dataset,
        image_size=size,
        num_channels=num_channels,
        on_error=on_error,
        classes=classes,
        progress=progress,
        **columns,
    )
    if test_for is not None and protocol.test_size and protocol.image_size:
        margin = (protocol.test_size - protocol.image_size) // 2
        end = margin + protocol.image_size
        pixels = pixels[:, :, margin:end, margin:end].contiguous()
    own = class_names(dataset, label_column=label_column)
    names, soft = tuple(classes or own), None
    if stored:
        column = soft_label_column or COLUMNS[protocol.label_type]
        soft = read_soft_labels(dataset, column, num_classes=len(own))[rows]
        soft = soft[:, class_columns(names, own, what="the soft labels' dataset")]
    weights = read_weights(dataset)[rows] if test_for is None and has_weights(dataset) else None
    return ImageSet(pixels, labels, names, soft, dataset_fingerprint(dataset, **columns), weights)


def has_weights(dataset: AnyDataset) -> bool:
    """Whether a dataset is a concentrated one whose images count unequally: others may weigh something else."""
    return isinstance(dataset, Dataset) and {"weight", "source", "real_index"} <= set(dataset.features or {})


def read_weights(dataset: Dataset) -> torch.Tensor:
    """How much each row counts in training, `(N,)`, as `dsco_hf.sampling.peers.d4m.DDOQ` says it.

    Raises:
        ValueError: for a row without a number.
    """
    values = dataset.with_format(None)["weight"][:]
    if missing := [row for row, value in enumerate(values) if not isinstance(value, int | float)]:
        raise ValueError(
            f"Row {missing[0]} has no weight, but {values[missing[0]]!r}: give each row one, or remove the column, "
            "`dataset.remove_columns('weight')`."
        )
    return torch.tensor(values, dtype=torch.float32)


def read_soft_labels(dataset: AnyDataset, column: str, *, num_classes: int) -> torch.Tensor:
    """A column of soft labels as a matrix.

    Args:
        dataset (`Dataset`): one split.
        column (`str`): a list of probabilities in each row, or `{"indices", "probabilities"}` of the most probable
            classes; what is missing to 1 is then spread evenly over the others, of which none gets less than half
            precision can hold: a protocol may soften it.
        num_classes (`int`): K.

    Returns:
        `torch.Tensor` of shape `(N, K)`: float32, checked by `check_soft_labels` before training.

    Raises:
        ValueError: where the column is missing or has another number of classes.
    """
    columns = list(dataset.features or {})
    if column not in columns:
        raise ValueError(f"The dataset has no soft labels in a column {column!r}; its columns are {columns}.")
    values = dataset.select_columns([column])[:][column]
    if values and isinstance(values[0], Mapping):
        soft = np.zeros((len(values), num_classes), dtype=np.float32)
        for row, entry in zip(soft, values, strict=True):
            indices, probabilities = np.asarray(entry["indices"]), np.asarray(entry["probabilities"], dtype=np.float32)
            if len(indices) and not 0 <= indices.min() <= indices.max() < num_classes:
                raise ValueError(f"Soft labels name class {indices.max()}, but there are {num_classes} classes.")
            if num_classes > len(indices):
                row[:] = max(HALF_LEAST, (1 - probabilities.sum()) / (num_classes - len(indices)))
            row[indices] = probabilities
        return torch.from_numpy(soft)
    lengths = {len(row) for row in values}
    if lengths != {num_classes}:
        raise ValueError(f"Soft labels have {sorted(lengths)} entries, but the dataset has {num_classes} classes.")
    return torch.tensor(np.asarray(values, dtype=np.float32))


def evaluator_builder(
    architecture: str, train: ImageSet, protocol: Protocol, **overrides: object
) -> Callable[[], PreTrainedModel]:
    """A function that builds an untrained network as a protocol wants it for a training set.

    Args:
        architecture (`str`): see `build_evaluator`.
        train (`ImageSet`): gives classes, channels and, unless the protocol does, the size.
        protocol (`Protocol`): gives input size, normalisation and, for our own networks, the norm.
        **overrides: values of the network's configuration.

    Returns:
        `Callable`: for `train_evaluator`.
    """
    channels = train.pixels.shape[1]
    statistics = {
        name: list(values) if len(values) == channels else [sum(values) / len(values)] * channels
        for name, values in (("image_mean", protocol.image_mean), ("image_std", protocol.image_std))
    }
    norm = {"norm": protocol.norm} if is_own_architecture(architecture) else {}
    size = protocol.image_size or train.pixels.shape[-1]
    values: dict[str, Any] = {"image_size": size, **statistics, **norm, **overrides}

    def build() -> PreTrainedModel:
        return build_evaluator(architecture, class_names=train.names, num_channels=channels, **values)

    return build


@dataclass(frozen=True)
class TrainingJob:
    """One training from scratch: all that decides its result, beside the images and the versions.

    Attributes:
        architecture (`str`): see `build_evaluator`.
        protocol (`Protocol`), seed (`int`), teacher (`PreTrainedModel`, *optional*), execution ([`Execution`]),
            track_best (`bool`): as for `train_evaluator`.
        overrides (mapping): values of the network's configuration.
    """

    architecture: str
    protocol: Protocol
    seed: int = 0
    teacher: PreTrainedModel | None = None
    execution: Execution = field(default_factory=Execution)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    track_best: bool = False

    def __post_init__(self) -> None:
        """Takes the numbers of NumPy and torch, too."""
        plain_fields(self)

    def identity(self, train: ImageSet, test: ImageSet) -> dict[str, Any]:
        """All that decides what [`train_job`] returns for these images, beside its times."""
        return identity(
            images=train.digest, test_images=test.digest, architecture=self.architecture, options=self.overrides,
            protocol=self.protocol, seed=self.seed, teacher=self.teacher, track_best=self.track_best,
            mixed_precision=self.execution.accelerator.mixed_precision, compiled=self.execution.compiled,
            versions=versions(),
        )  # fmt: skip


def train_job(
    job: TrainingJob,
    train: ImageSet,
    test: ImageSet,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    save_to: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains and tests one network.

    Args:
        job ([`TrainingJob`]): what is trained, and how.
        train (`ImageSet`): to train on.
        test (`ImageSet`): to test on.
        checkpoint (`Path`, *optional*): as for `train_evaluator`, like `checkpoint_seconds`, `on_epoch`, `progress`.
        checkpoint_seconds (`float`): see there.
        save_to (`Path`, *optional*): where to store the network.
        on_epoch (`Callable`, *optional*): see there.
        progress (`bool`): see there.

    Returns:
        `dict`: what `summarise` collects: accuracy (of the last epoch), accuracy_best, loss, seconds and speed;
        and which test images are right, see [`unpacked`].
    """
    result = train_evaluator(
        evaluator_builder(job.architecture, train, job.protocol, **job.overrides), train, protocol=job.protocol,
        seed=job.seed, test=test, teacher=job.teacher, execution=job.execution, track_best=job.track_best,
        checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, on_epoch=on_epoch, progress=progress,
    )  # fmt: skip
    if save_to is not None:
        save_network(result.model, save_to)
    return {
        "architecture": job.architecture,
        "seed": job.seed,
        "accuracy": result.accuracy,
        "accuracy_best": result.accuracy_best,
        "loss": result.loss,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "images_per_second": round(result.images_per_second, 1),
        "correct": None if result.correct is None else packed(result.correct.numpy()),
    }


def packed(correct: np.ndarray) -> str:
    """Which test images are right `(M,)`, as text: bits in base64."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")


def unpacked(text: str, images: int) -> np.ndarray:
    """What [`packed`] wrote for so many images."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=images).astype(bool)


def save_network(model: PreTrainedModel, folder: Path) -> None:
    """Saves a model of this process alone; transformers has only the first process write, as if all had the same."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        with weights_in_silence():
            model.save_pretrained(folder)
    finally:
        del model.should_save_on_this_rank


def run_job(
    key: str,
    run: Callable[[str, Path], dict[str, Any]],
    *,
    settings: Callable[[str], Mapping[str, Any]],
    folder: str | Path,
) -> None:
    """Does one job unless its result is there. Other processes may be at other jobs.

    Args:
        key (`str`): its name, fit for a file name.
        run (`Callable`): does the job of that name, with a path for its checkpoint.
        settings (`Callable`): all that decides the job's result, by name; see [`TrainingJob.identity`].
        folder (`str` or `Path`): shared by the processes; `<key>.json` is the result.

    Raises:
        ValueError: where a stored result belongs to other settings or data.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, checkpoint, wanted = folder / f"{key}.json", folder / f"{key}.safetensors", settings(key)
    if path.exists():
        try:
            stored = read_job(path)
        except DamagedFileError as error:
            logger.warning("%s It is done again.", error)
        else:
            if differing := differences(stored["settings"], wanted):
                raise ValueError(
                    f"{path} was made with other settings or data ({in_words(differing)}). Set them as they were, "
                    f"remove {folder}, or write to another folder."
                )
            return
    result = {**run(key, checkpoint), "settings": wanted}
    write_json(path, plain(result))
    checkpoint.unlink(missing_ok=True)


def read_job(path: Path) -> dict[str, Any]:
    """The stored result of a job; [`~dsco_hf.utils.files.DamagedFileError`] if it is damaged."""
    remedy = "Delete it, and run the same command again: that job is done again."
    result = read_json(path, remedy)
    if not isinstance(result.get("settings"), dict):
        raise DamagedFileError(f"{path} is no result of a job: it has no settings. {remedy}")
    return result


def summarise(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of one network on one dataset.

    Args:
        jobs (`Sequence` of results of `train_job`): at least one.

    Returns:
        `dict`: `accuracy_mean` and `accuracy_std` (of the sample; None for a single seed) of the last epoch, the
        accuracies by seed, times and speed.
    """
    jobs = sorted(jobs, key=lambda job: job["seed"])
    accuracies = [job["accuracy"] for job in jobs]
    best = [job["accuracy_best"] for job in jobs]
    row = {
        "accuracy_mean": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies, ddof=1)) if len(jobs) > 1 else None,
        "training_seeds": len(jobs),
        "seeds": [job["seed"] for job in jobs],
        "accuracies": accuracies,
        "training_seconds": round(sum(job["seconds"] for job in jobs), 3),
        "images_per_second": round(float(np.mean([job["images_per_second"] for job in jobs])), 1),
    }
    if None not in best:
        row |= {"accuracy_best_mean": float(np.mean(best)), "accuracies_best": best}
    return row


def run_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Date, versions, device and processes of a run, for its results.json."""
    cuda = accelerator.device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(accelerator.device) if cuda else None,
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }
