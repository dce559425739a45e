"""One logged training, from which all scores of training dynamics are computed: kept in a folder and found again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ...data.datasets import Pool
from ...evaluators.batches import ImageSet, class_columns, predict_logits
from ...evaluators.evaluation import evaluator_builder
from ...evaluators.protocols import Protocol, get_protocol
from ...evaluators.training import Execution, train_evaluator
from ...utils.files import locked, reading, remove_partials, whole
from ...utils.origins import differences, fingerprint, identity, in_words, versions
from ...utils.processes import Team
from ...utils.values import plain_arguments


FILE = "training_log.safetensors"
TENSORS = ("probabilities", "margins", "errors")


@dataclass(frozen=True, eq=False)
class TrainingLog:
    """What a network said of every real image after each epoch of its training; see [`log_training`].

    Attributes:
        probabilities (`torch.Tensor` of shape `(E, N)`): p[y], of the image's own class.
        margins (`torch.Tensor` of shape `(E, N)`): p[y] - max p[other], in [-1, 1]; > 0 where the network is right.
        errors (`torch.Tensor` of shape `(E, N)`): ‖p - onehot(y)‖₂, in [0, √2].
        dataset (`str`): fingerprint of the images.
        settings (mapping): of the training, as plain values.
    """

    probabilities: torch.Tensor
    margins: torch.Tensor
    errors: torch.Tensor
    dataset: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """E."""
        return len(self.probabilities)

    @cached_property
    def sha256(self) -> str:
        """Of the content, by which records know it."""
        return fingerprint(self.dataset, self.probabilities, self.margins, self.errors)

    def of(self, pool: Pool, rule: str) -> TrainingLog:
        """The columns of a pool's images, float32.

        Args:
            pool ([`Pool`]): images of the dataset that was logged, of all its classes or of some.
            rule (`str`): which asks, for errors.

        Raises:
            ValueError: for other images, or values that are no finite numbers.
        """
        if pool.fingerprint != self.dataset:
            raise ValueError(
                f"{rule!r} was given the log of a training on other images ({self.dataset[:12]}…) than those to "
                f"choose from ({pool.fingerprint[:12]}…): log one on these, `log_training(real, folder)`."
            )
        chosen: dict[str, torch.Tensor] = {}
        for name in TENSORS:
            values = getattr(self, name)[:, pool.rows].float()
            if not (finite := values.isfinite().all(0)).all():
                raise ValueError(
                    f"{rule!r} needs finite numbers, and the log has other {name} of {int((~finite).sum())} images, "
                    f"the first in row {int(pool.rows[int((~finite).int().argmax())])}: log a training again, in "
                    "another folder or at a lower learning rate."
                )
            chosen[name] = values
        return TrainingLog(**chosen, dataset=self.dataset, settings=self.settings)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or absent."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        texts = {"dataset": self.dataset, "settings": json.dumps(dict(self.settings))}
        with whole(path) as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, texts)

    @classmethod
    def load(cls, folder: str | Path) -> TrainingLog:
        """The log that [`log_training`] kept in a folder.

        Raises:
            FileNotFoundError: if there is none.
            DamagedFileError: if it is truncated, or something else.
        """
        path = Path(folder) / FILE
        remedy = "Log a training there: `log_training(real, folder)`; a damaged log is to be deleted first."
        with reading(path, remedy), safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in TENSORS}
            return cls(**tensors, dataset=texts["dataset"], settings=json.loads(texts["settings"]))


@plain_arguments()
def log_training(
    real: Dataset | ImageSet | Pool,
    folder: str | Path,
    *,
    small: Dataset | ImageSet | Pool | None = None,
    architecture: str = "convnet",
    overrides: Mapping[str, Any] | None = None,
    protocol: Protocol | None = None,
    teacher: PreTrainedModel | None = None,
    execution: Execution | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingLog:
    """Trains a network on the real images and logs after every epoch what it says of each: scores need no more.

    The log is of the network in eval mode and of images without augmentation, so that it depends on nothing but the
    weights. Of the scores, EL2N and DUAL are defined so; forgetting (Toneva et al. 2019), AUM (Pleiss et al. 2020) and
    Dyn-Unc (He et al. 2024) log each batch as it is trained on, which saves the passes and lags by half an epoch.

    A finished log of the same images and settings is read, a killed one goes on. Several processes may call this
    together with `Execution(accelerator, distributed=True)`: they train one network and share the passes.

    Args:
        real (`Dataset`, `ImageSet` or [`Pool`]): the images that are to be chosen from.
        folder (`str` or `Path`): keeps the log, 12 bytes an image and epoch.
        small (likewise, *optional*): what is trained on in place of `real`, such as a synthetic set: the scores are
            then those of its students, and a training costs little.
        architecture (`str`): of the network, see `build_evaluator`.
        overrides (mapping, *optional*): values of its configuration.
        protocol (`Protocol`, *optional*): how it is trained; its epochs are those of the log. By default 30 epochs of
            "quick".
        teacher (`PreTrainedModel`, *optional*): for a protocol with `label_type="teacher"`.
        execution (`Execution`, *optional*): device, precision and processes.
        image_column (`str`, *optional*): where there are several of the kind.
        label_column (`str`, *optional*): likewise.
        seed (`int`): of the training.
        progress (`bool`): show progress bars.

    Raises:
        ValueError: for one class, no image, or another training's log in the folder.
        RunError: if another run is at work on the folder.
    """
    pool = Pool.of(real, image_column=image_column, label_column=label_column, progress=progress)
    trained = pool if small is None else Pool.of(small, progress=progress)
    protocol, execution = protocol or get_protocol("quick", epochs=30), execution or Execution()
    accelerator, folder = execution.accelerator, Path(folder)
    settings = identity(
        images=pool.fingerprint,
        trained_on=trained.fingerprint,
        architecture=architecture,
        **({"options": dict(overrides)} if overrides else {}),
        protocol=protocol,
        teacher=teacher,
        seed=seed,
        processes=accelerator.num_processes if execution.distributed else 1,
        mixed_precision=accelerator.mixed_precision,
        versions=versions(),
    )
    with Team(accelerator if execution.distributed else None) as team, contextlib.ExitStack() as stack:
        team.from_main(lambda: stack.enter_context(locked(folder)), f"taking {folder}")
        if (found := team.everywhere(lambda: _find(folder, settings), f"reading {folder}")[team.rank]) is not None:
            return found
        columns = torch.tensor(class_columns(pool.names, trained.names, what="the set to train on"))
        pixels = trained.pixels(protocol.image_size)
        images = ImageSet(pixels, trained.labels, tuple(trained.names))
        seen = pool.pixels(pixels.shape[-1], pixels.shape[1])
        logged = _Logged(seen, columns[pool.labels], folder, team, accelerator)
        build = evaluator_builder(architecture, images, protocol, **(overrides or {}))
        options: dict[str, Any] = {"teacher": teacher, "execution": execution, "progress": progress}
        checkpoint = folder / "training.safetensors"
        team.from_main(lambda: logged.check(checkpoint), f"reading {folder}")
        train_evaluator(
            lambda: logged.follow(build()), images, protocol=protocol, seed=seed, checkpoint=checkpoint,
            on_epoch=logged.add, **options,
        )  # fmt: skip
        log = team.from_main(lambda: logged.finish(pool.fingerprint, settings), f"writing {folder}")
        if team.rank == 0:
            checkpoint.unlink(missing_ok=True)
        return log


def _find(folder: Path, settings: Mapping[str, Any]) -> TrainingLog | None:
    """The finished log of a folder; None if there is none yet.

    Raises:
        ValueError: if it is that of another training.
    """
    if not (folder / FILE).exists():
        return None
    log = TrainingLog.load(folder)
    if differing := differences(log.settings, settings):
        raise ValueError(
            f"{folder} holds the log of another training ({in_words(differing)}). Set them as they were, remove the "
            "folder, or log to another one."
        )
    return log


class _Logged:
    """The log of a training that goes on: a file for every epoch, until all are one."""

    def __init__(
        self, pixels: torch.Tensor, labels: torch.Tensor, folder: Path, team: Team, accelerator: Accelerator
    ) -> None:
        self.pixels, self.labels, self.folder, self.team = pixels, labels, folder, team
        self.accelerator = accelerator
        self.model: PreTrainedModel | None = None
        self.epochs = 0
        if team.rank == 0:
            remove_partials(folder)

    def follow(self, model: PreTrainedModel) -> PreTrainedModel:
        """Takes the network that is trained, in place."""
        self.model = model
        return model

    def add(self, metrics: Mapping[str, float]) -> None:
        """Asks the network after an epoch; each process has a part of the images."""
        assert self.model is not None
        self.epochs = int(metrics["epoch"])
        mine = torch.arange(len(self.labels)).tensor_split(self.team.world)[self.team.rank]
        values = torch.zeros(3, len(self.labels))
        if len(mine):
            with self.accelerator.autocast():
                logits = predict_logits(self.model, self.pixels[mine])
            values[:, mine] = dynamics(logits.cpu(), self.labels[mine])
        values = self.team.sum(values)
        if self.team.rank == 0:
            with whole(self.path(self.epochs)) as partial:
                save_file({"values": values}, partial)

    def check(self, checkpoint: Path) -> None:
        """Lets a training begin anew that was killed between a checkpoint and the log of its epoch."""
        if checkpoint.exists():
            with reading(checkpoint, "Delete it to start anew."), safe_open(checkpoint, framework="pt") as file:
                epochs = json.loads(file.metadata()["progress"])["epoch"]
            if not all(self.path(epoch).exists() for epoch in range(1, epochs + 1)):
                checkpoint.unlink()

    def path(self, epoch: int) -> Path:
        """Of an epoch's part, counted from 1."""
        return self.folder / f"epoch-{epoch:05d}.safetensors"

    def finish(self, dataset: str, settings: Mapping[str, Any]) -> TrainingLog:
        """All epochs as one file, in place of theirs."""
        paths = [self.path(epoch) for epoch in range(1, self.epochs + 1)]
        parts = []
        for path in paths:
            with reading(path, f"Remove {self.folder}, and log the training again."):
                parts.append(load_file(path)["values"])
        probabilities, margins, errors = torch.stack(parts, dim=1)  # (E, N) each
        log = TrainingLog(probabilities, margins, errors, dataset, settings)
        log.save(self.folder / FILE)
        for path in paths:
            path.unlink()
        return log


def dynamics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p[y], p[y] - max p[other] and ‖p - onehot(y)‖₂: logits `(N, K)` and classes `(N,)` → `(3, N)`."""
    p = logits.double().softmax(1)
    own = p.gather(1, labels[:, None])[:, 0]
    others = p.scatter(1, labels[:, None], 0.0)
    return torch.stack([own, own - others.max(1).values, ((1 - own).square() + others.square().sum(1)).sqrt()]).float()
