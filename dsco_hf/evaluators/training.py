"""The training loop of the package: a classifier from scratch on images that fit in memory.

Evaluators and the generator's feature extractor are trained by the same function. Images are decoded once and stay on
the device; a step is an index, a batched augmentation, forward, backward and the optimiser, with nothing read back to
the host. Each epoch draws from generators seeded with `(seed, epoch)` alone: a run that was killed and resumed, or one
of many that ran side by side, gives the same accuracy to the last digit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..utils.files import remove_partials
from ..utils.origins import identity, versions
from ..utils.progress import Bar, Checkpoint, Pace
from ..utils.values import plain_arguments
from .augmentation import Augmented, augment
from .batches import (
    ImageSet,
    check_images,
    check_label_source,
    check_weights,
    class_columns,
    counts_of,
    epoch_seed,
    hard_label_loss,
    learned_label_loss,
    model_classes,
    part_size,
    predict_logits,
    soft_label_loss,
)
from .batches import epoch_batches as epoch_batches
from .batches import fast_layout as fast_layout
from .preprocessing import preprocess
from .protocol_fields import COLUMNS
from .protocols import Protocol, by_budget, learning_rate_factor


# What a checkpoint stores of `_Run` beside its tensors.
PROGRESS = ("steps", "epoch", "images", "seconds", "accuracy_best")
# The losses are read from the device at least this often, in optimiser steps.
CHECK_STEPS = 50


@dataclass
class TrainingResult:
    """What `train_evaluator` returns.

    Attributes:
        model (`PreTrainedModel`): after the last step, in eval mode.
        accuracy (`float`, *optional*): of the last epoch on the test images, in [0, 1]; None without test images.
        accuracy_best (`float`, *optional*): highest of all evaluations, which *chooses the epoch on the test set*:
            only for comparison with tables that do so. None unless `track_best`.
        loss (`float`): mean training loss of the last epoch.
        steps (`int`): optimiser steps taken, those before a resume included.
        seconds (`float`): time spent training, before a resume included; evaluation and checkpoints are not.
        images_per_second (`float`): training images by `seconds`.
        correct (`torch.Tensor` of shape `(M,)`, *optional*): which test images are right, for tests by image.
    """

    model: PreTrainedModel
    accuracy: float | None
    accuracy_best: float | None
    loss: float
    steps: int
    seconds: float
    images_per_second: float
    correct: torch.Tensor | None = None


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the checkpoint that is still good."""


def make_optimizer(model: torch.nn.Module, protocol: Protocol) -> torch.optim.Optimizer:
    """The protocol's optimiser, fused: the step of a small network is otherwise mostly launches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not protocol.decay_vectors:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    options: dict[str, Any] = {"lr": protocol.learning_rate, "weight_decay": protocol.weight_decay, "fused": True}
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=protocol.momentum, **options)
    return torch.optim.AdamW(groups, **options)


@dataclass(frozen=True)
class Execution:
    """Where and how a training is computed.

    Attributes:
        accelerator (`Accelerator`): gives device and precision.
        distributed (`bool`): all processes train one model together; otherwise each trains one of its own.
        compiled (`bool`): pass the network through `torch.compile`; pays from about a minute of training on.
    """

    accelerator: Accelerator = field(default_factory=Accelerator)
    distributed: bool = False
    compiled: bool = False


class _Run:
    """One training: its data, its networks and where it stands."""

    def __init__(
        self,
        model: PreTrainedModel,
        images: ImageSet,
        protocol: Protocol,
        seed: int,
        teacher: PreTrainedModel | None,
        execution: Execution,
    ) -> None:
        accelerator = execution.accelerator
        self.accelerator, self.device, self.protocol, self.seed = accelerator, accelerator.device, protocol, seed
        self.world: int = accelerator.num_processes if execution.distributed else 1
        self.rank: int = accelerator.process_index if execution.distributed else 0
        self.layout = fast_layout(model, self.device)
        self.model = model.to(self.device, memory_format=self.layout).train()
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.columns: list[int] | None = None  # the student's classes among the teacher's, where their order differs
        if teacher is not None:
            columns = class_columns(model_classes(model), model_classes(teacher), what="the teacher")
            self.columns = None if columns == list(range(teacher.config.num_labels)) else columns
        self.pixels, self.labels = images.pixels.to(self.device), images.labels.to(self.device)
        # Logarithms of probabilities are logits: softening them is softening the teacher's own.
        given, learned = stored_labels(images, protocol), protocol.label_type == "learned"
        given = None if given is None else given.to(self.device).float()
        self.given = given if given is None else given - 1 / given.shape[1] if learned else given.log()
        self.weights = images.weights if images.weights is None else images.weights.to(self.device)
        self.optimizer = make_optimizer(self.model, protocol)
        self.network = accelerator.prepare_model(self.model) if self.world > 1 else self.model
        self.plain, self.compiled = self.network, execution.compiled
        if self.compiled:  # static shapes: which sizes came first must not decide the arithmetic
            self.network = torch.compile(self.network, dynamic=False)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=accelerator.mixed_precision == "fp16")
        # Gradients of parts of a batch add up to that of the batch; DDP and batch norm have to see it whole.
        whole = self.world > 1 or any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
        whole = whole or self.device.type != "cpu"
        self.part_size = len(self.pixels) if whole else part_size(model.config.image_size, accelerator.mixed_precision)
        self.order, self.draws = torch.Generator(), torch.Generator()
        per_class = images.images_per_class
        self.batch_size = by_budget(protocol.batch_size, per_class)
        # What most passes have is compiled; others, such as an epoch's last batch, would each cost as much again.
        self.usual = min(self.part_size, self.batch_size // self.world, len(self.pixels))
        self.batches_per_epoch = len(self.batches())
        if protocol.steps is None:
            self.epochs = by_budget(protocol.epochs or 1, per_class)
            self.total_steps = self.epochs * self.batches_per_epoch
        else:
            self.total_steps = by_budget(protocol.steps, per_class)
            self.epochs = math.ceil(self.total_steps / self.batches_per_epoch)
        self.losses = torch.zeros(self.total_steps, device=self.device)
        self.steps, self.epoch, self.images, self.seconds = 0, 0, 0, 0.0
        self.accuracy_best: float | None = None
        self.pace: Pace | None = None

    def batches(self) -> list[torch.Tensor]:
        """The batches of an epoch; every process gets at least two images of each."""
        smallest = 2 * self.world
        return epoch_batches(
            len(self.pixels), self.batch_size, generator=self.order, device=self.device, smallest=smallest
        )

    def train_epoch(self) -> None:
        """One pass over the images, or what is left of it until the last step."""
        start = time.perf_counter()
        seed = epoch_seed(self.seed, self.epoch + 1)
        self.order.manual_seed(seed)  # the same on all processes
        self.draws.manual_seed(seed ^ (self.rank + 1))
        # Dropout; the caller's state is restored. `torch.manual_seed` notes the stack for every kind of device: slow.
        torch.default_generator.manual_seed(seed ^ (self.rank + 1))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed ^ (self.rank + 1))
        by_epoch = self.protocol.steps is None
        for indices in self.batches()[: self.total_steps - self.steps]:
            position = (self.epoch, self.epochs) if by_epoch else (self.steps, self.total_steps)
            rate = self.protocol.learning_rate * learning_rate_factor(self.protocol, *position)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.step(indices)
            if self.pace is not None:
                self.pace(self.steps)
        self.epoch += 1
        self.seconds += time.perf_counter() - start

    def step(self, indices: torch.Tensor) -> None:
        """One optimiser step on the images at `indices`; nothing is read back from the device."""
        self.images += len(indices)
        share = 1.0
        if self.world > 1:
            mine = indices.tensor_split(self.world)[self.rank]
            share = len(mine) * self.world / len(indices)  # DDP takes the plain mean of unequal slices
            indices = mine
        mixed = augment(self.protocol.augmentation, self.pixels[indices], generator=self.draws)
        labels, layout = self.labels[indices], self.layout
        others = labels if mixed.partner is None else labels[mixed.partner]
        soft = None if self.protocol.label_type == "hard" else self.soft_targets(indices, mixed)
        counts = None if self.weights is None else counts_of(self.weights, indices, mixed.partner, mixed.weight)
        total = torch.zeros((), device=self.device)
        for start in range(0, len(indices), self.part_size):
            rows = slice(start, start + self.part_size)
            with self.accelerator.autocast():
                inputs = preprocess(mixed.pixels[rows], self.model).contiguous(memory_format=layout)
                network = self.network if len(inputs) == self.usual else self.plain
                logits = network(inputs).logits.float()
            own = None if counts is None else counts[rows]
            if soft is None:
                loss = hard_label_loss(logits, labels[rows], others[rows], weight=mixed.weight, counts=own)
            elif self.protocol.label_type == "learned":
                loss = learned_label_loss(logits, soft[rows], counts=own)
            else:
                loss = soft_label_loss(logits, soft[rows], temperature=self.protocol.temperature, counts=own)
            loss = loss * (len(logits) / len(indices))
            self.scaler.scale(loss * share).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses[self.steps] = total
        self.steps += 1

    @torch.no_grad()
    def soft_targets(self, indices: torch.Tensor, mixed: Augmented) -> torch.Tensor:
        """Softened probabilities of shape `(B, K)` for an augmented batch; learned labels as they are."""
        temperature = self.protocol.temperature
        if self.teacher is not None:
            with self.accelerator.autocast():
                logits = predict_logits(self.teacher, mixed.pixels, batch_size=len(mixed.pixels))
            logits = logits if self.columns is None else logits[:, self.columns]
            return (logits / temperature).softmax(1)
        assert self.given is not None  # checked by check_label_source
        stored = self.given[indices]
        stored = stored if self.protocol.label_type == "learned" else (stored / temperature).softmax(1)
        return stored if mixed.partner is None else mixed.weight * stored + (1 - mixed.weight) * stored[mixed.partner]

    def check_losses(self, since: int, checkpoint: Path | None) -> None:
        """Stops a training whose loss is no number any more; reads from the device, so it is not for every step."""
        finite = self.losses[since : self.steps].isfinite()
        if finite.all():
            return
        step = since + int((~finite).int().argmax())
        kept = f" The checkpoint {checkpoint} is older and kept." if checkpoint and checkpoint.exists() else ""
        raise TrainingDivergedError(
            f"The loss became {self.losses[step].item()} at step {step + 1} of {self.total_steps} (seed {self.seed}, "
            f"protocol {self.protocol.name!r}, learning rate {self.protocol.learning_rate}).{kept} Lower the learning "
            "rate, or check the images and soft labels for NaN."
        )

    def check_weights(self, checkpoint: Path) -> None:
        """Stops before weights that are no numbers replace a good checkpoint: the loss tells of them a step later."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            kept = f" The checkpoint {checkpoint} is older and kept." if checkpoint.exists() else ""
            raise TrainingDivergedError(
                f"The weights are no finite numbers after step {self.steps} of {self.total_steps} (seed {self.seed}, "
                f"protocol {self.protocol.name!r}, learning rate {self.protocol.learning_rate}).{kept} Lower the "
                "learning rate."
            )

    def evaluate(self, test: ImageSet) -> torch.Tensor:
        """Which test images are right `(M,)`, shared out over the processes where they train one model together."""
        correct = torch.zeros(len(test.labels), device=self.device)
        rows = torch.arange(len(correct)).tensor_split(self.world)[self.rank]
        if len(rows):
            with self.accelerator.autocast():
                found = predict_logits(self.model, test.pixels[rows].to(self.device)).argmax(1)
            correct[rows.to(self.device)] = (found == test.labels[rows].to(self.device)).float()
        if self.world > 1:
            correct = self.accelerator.reduce(correct, reduction="sum")
        return correct.cpu() > 0

    def evaluation_due(self) -> bool:
        """Whether a source that chooses its best epoch looks at the test set after this one."""
        every = self.protocol.best_every
        every = max(1, int(every * self.epochs) if every < 1 else int(every))
        return self.epoch >= self.protocol.best_from * self.epochs and self.epoch % every == 0

    def settings(self, test: ImageSet | None = None) -> dict[str, Any]:
        """All that the weights at the end depend on, to be asked for before the training begins.

        `test` counts where the best epoch is looked for on the way.
        """
        return identity(
            protocol=self.protocol,
            seed=self.seed,
            network=self.model.config.to_diff_dict(),
            weights=self.model,
            images=self.pixels,
            labels=self.labels,
            soft_labels=self.given,
            teacher=self.teacher,
            teacher_classes=self.columns,
            test_images=None if test is None else (test.pixels, test.labels),
            mixed_precision=self.accelerator.mixed_precision,
            compiled=self.compiled,
            processes=self.world,
            versions=versions(),
            **({} if self.weights is None else {"weights_of_images": self.weights}),
        )

    def checkpoint(self, path: Path, test: ImageSet | None = None) -> Checkpoint:
        """The file where this run is kept; arguments as of `settings`."""
        settings = self.settings(test)
        return Checkpoint(path, settings, model=self.model, optimizer=self.optimizer, scaler=self.scaler)

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes all that a resume needs."""
        checkpoint.save({name: getattr(self, name) for name in PROGRESS}, {"losses": self.losses[: self.steps]})

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes up what `save` wrote."""
        progress, others = checkpoint.load()
        for name, value in progress.items():
            setattr(self, name, value)
        self.losses[: self.steps] = others["losses"].to(self.device)


@plain_arguments()
def train_evaluator(
    model: PreTrainedModel | Callable[[], PreTrainedModel],
    images: ImageSet,
    *,
    protocol: Protocol,
    seed: int = 0,
    test: ImageSet | None = None,
    teacher: PreTrainedModel | None = None,
    execution: Execution | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    track_best: bool = False,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Trains a classifier under a protocol and reports the accuracy of the last epoch.

    Args:
        model (`PreTrainedModel` or a function that builds one): a function is called with PyTorch's generator seeded
            with `seed`, so that the initial weights follow from it; a model is trained from where it is, in place.
        images (`ImageSet`): the whole training set, of at least two classes; its soft labels are used where the
            protocol has `label_type="stored"` or "learned".
        protocol (`Protocol`): see `get_protocol`.
        seed (`int`): decides initial weights, order, augmentation and dropout; at least 0.
        test (`ImageSet`, *optional*): images to test on.
        teacher (`PreTrainedModel`, *optional*): for `label_type="teacher"`; with the same class names.
        execution ([`Execution`], *optional*): device and precision, processes, compilation.
        checkpoint (`str` or `Path`, *optional*): a safetensors file. If it exists, training resumes from it.
        checkpoint_seconds (`float`): shortest time between two checkpoints; 0 writes one after every epoch.
        track_best (`bool`): also evaluate on the way, for `accuracy_best`.
        on_epoch (`Callable`, *optional*): called after every epoch with epoch, loss and, if evaluated, accuracy.
        progress (`bool`): show a progress bar, and say what is trained and when it will end.

    Returns:
        `TrainingResult`: with the trained model.

    Raises:
        ValueError: for bad images, labels, soft labels or teacher, or a checkpoint of another run.
        TrainingDivergedError: when the loss becomes NaN or infinite.
    """
    execution = execution or Execution()
    accelerator = execution.accelerator
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.manual_seed(epoch_seed(seed, 0))
        model = model if isinstance(model, PreTrainedModel) else model()
        for what, each in (("training", images), ("test", test)):
            if each is not None:
                check_images(each.pixels, each.labels, model.config.num_labels, what=what)
        protocol = protocol.for_model(model.config.num_labels, model.config.model_type)
        check_label_source(model, protocol, len(images.pixels), teacher, stored_labels(images, protocol))
        check_weights(images.weights, len(images.pixels))
        run = _Run(model, images, protocol, seed, teacher, execution)
        path = None if checkpoint is None else Path(checkpoint)
        loss = _train(run, test if track_best else None, path, checkpoint_seconds, on_epoch, progress)
    if run.world > 1:
        accelerator.unwrap_model(run.network, keep_fp32_wrapper=False)
    correct = None if test is None else run.evaluate(test)
    final = None if correct is None else share_of(correct)
    best = max(final, run.accuracy_best or 0.0) if final is not None and track_best else None
    model.to(memory_format=torch.contiguous_format)
    speed = run.images / max(run.seconds, 1e-9)
    return TrainingResult(model.eval(), final, best, loss, run.steps, run.seconds, speed, correct)


def share_of(correct: torch.Tensor) -> float:
    """Accuracy, of which images `(M,)` are right."""
    return int(correct.sum()) / len(correct)


def stored_labels(images: ImageSet, protocol: Protocol) -> torch.Tensor | None:
    """The labels `(N, K)` that a protocol trains on; None where it asks for other labels, or there are none."""
    return images.soft_labels if protocol.label_type in COLUMNS else None


def _train(
    run: _Run,
    test: ImageSet | None,
    checkpoint: Path | None,
    checkpoint_seconds: float,
    on_epoch: Callable[[dict[str, float]], None] | None,
    progress: bool,
) -> float:
    """Runs the epochs that are left, looking at `test` on the way if it is given; the mean loss of the last epoch."""
    file = None
    if checkpoint is not None:
        file = run.checkpoint(checkpoint, test)
        remove_partials(checkpoint.parent, checkpoint.name)
        if checkpoint.exists():
            run.load(file)
    checked, saved = run.steps, time.perf_counter()
    if progress:
        run.pace = Pace(
            run.model, total=run.total_steps, done=run.steps, accelerator=run.accelerator, processes=run.world
        )
    bar = Bar(total=run.total_steps, initial=run.steps, desc=f"seed {run.seed}", disable=not progress, unit="step")
    while run.steps < run.total_steps:
        start = run.steps
        run.train_epoch()
        last = run.steps == run.total_steps
        due = checkpoint is not None and not last and time.perf_counter() - saved >= checkpoint_seconds
        if last or due or on_epoch is not None or run.steps - checked >= CHECK_STEPS:
            run.check_losses(checked, checkpoint)
            checked = run.steps
        metrics: dict[str, float] = {"epoch": run.epoch}
        if test is not None and not last and run.evaluation_due():
            metrics["accuracy"] = share_of(run.evaluate(test))
            run.accuracy_best = max(metrics["accuracy"], run.accuracy_best or 0.0)
        if file is not None and due:
            run.check_weights(file.path)
            if run.world == 1 or run.accelerator.is_main_process:
                run.save(file)
            saved = time.perf_counter()
        if on_epoch is not None:
            on_epoch({**metrics, "loss": run.losses[start : run.steps].mean().item()})
        bar.update(run.steps - start)
    bar.close()
    last_epoch = (run.total_steps - 1) // run.batches_per_epoch * run.batches_per_epoch
    return run.losses[last_epoch : run.total_steps].mean().item()
