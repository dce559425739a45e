"""Trains a denoiser of classes or prompts on the user's own images, in pixels or in the latents of an autoencoder.

The training follows DiT (Peebles and Xie, https://arxiv.org/abs/2212.09748): noise or velocity prediction, label
dropout for classifier-free guidance, averaged weights. A resumed run ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import AutoencoderKL, ModelMixin
from diffusers.training_utils import EMAModel

from ..utils.files import remove_partials
from ..utils.origins import fingerprint, versions
from ..utils.progress import Bar, Checkpoint, Pace
from ..utils.values import plain_arguments
from .base import Denoiser, add_lora, check_lora, denoiser_of, family_of, fuse_lora
from .data import TrainingData, check_training_inputs, draw_batch, prepare_data, seed_of
from .denoisers import (
    GeneratorTrainingConfig,
    build_denoiser,
    build_scheduler,
    denoising_loss,
    learning_rate_at,
)
from .prompts import Prompts


logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
FIRST_CHECKPOINT, CHECKPOINTS = 60.0, 600.0  # seconds until the first one, and between them


@dataclass
class Progress:
    """How far a training is, as a checkpoint keeps it."""

    step: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class GeneratorTrainingResult:
    """What [`train_generator`] gives back.

    Attributes:
        denoiser (`ModelMixin`): the averaged weights, in float32 and eval mode, on the CPU.
        finished (`bool`): False if the time limit came first; resume from the checkpoint then.
        step (`int`): optimiser steps taken, those before a resume included.
        seconds (`float`): training time, that before a resume included.
        losses (`list[dict]`): mean loss of every logging interval: `{"step", "loss", "learning_rate"}`.
        evaluations (`list[dict]`): `{"step", ...}` with what `evaluate` returned.
        lora (`dict[str, torch.Tensor]`): of `trainable="lora"`: what the denoiser's weights were changed by, see
            [`~dsco_hf.generators.base.fuse_lora`].
    """

    denoiser: ModelMixin
    finished: bool
    step: int
    seconds: float
    losses: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    lora: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def components(self) -> dict[str, ModelMixin]:
        """The denoiser under the name that a pipeline gives it: `DsCoPipeline(**result.components, scheduler=...)`."""
        return {family_of(self.denoiser).component: self.denoiser}


@plain_arguments(num_classes=1, checkpoint_every=1, log_every=1, evaluate_every=1, max_minutes=0)
def train_generator(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    config: GeneratorTrainingConfig | None = None,
    *,
    num_classes: int,
    accelerator: Accelerator | None = None,
    vae: AutoencoderKL | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    log_every: int = 20,
    distributed: bool = True,
    progress: bool = True,
    denoiser: ModelMixin | None = None,
    prompts: Prompts | None = None,
    evaluate: Callable[[int, ModelMixin], dict[str, Any]] | None = None,
    evaluate_every: int = 1000,
) -> GeneratorTrainingResult:
    """Trains a class-conditional denoiser on images; source: https://arxiv.org/abs/2212.09748.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, H)`, range [-1, 1]): the images, the same on every process.
        labels (`torch.Tensor` of shape `(N,)`, int64): classes in [0, num_classes).
        config (`GeneratorTrainingConfig`, *optional*): model and training; the defaults fit the digits.
        num_classes (`int`): number of classes; each needs at least one image.
        accelerator (`Accelerator`, *optional*): device, precision and processes. What is prepared with it is released
            at the end.
        vae (`AutoencoderKL`, *optional*): train in its latents instead of in pixels. Images are encoded once.
        checkpoint_dir (`str` or `Path`, *optional*): save checkpoints here: after about a minute, then every
            `checkpoint_every` steps, at the time limit and at the end.
        checkpoint_every (`int`, *optional*): steps between checkpoints; as many as take ten minutes if None.
        resume (`bool`): continue from the checkpoint in `checkpoint_dir`, if there is one.
        max_minutes (`float`, *optional*): stop after this time, for machines that are lent in slices.
        log_every (`int`): steps between looks at the loss and the clock.
        distributed (`bool`): all processes train this one model together; otherwise the calling process trains it
            alone, while others may do something else. No checkpoints then.
        progress (`bool`): show a progress bar, and say what is trained and when it will end.
        denoiser (`ModelMixin`, *optional*): what to train further, in place; a new one of the configured architecture
            otherwise. [`Denoiser.adapt`] fits one to new classes.
        prompts (`Prompts`, *optional*): of the classes, for a denoiser that is conditioned on prompts; of several for
            a class, each image of each step has one at random. Dropped labels become the negative prompt.
        evaluate (`Callable`, *optional*): called by the main process as `f(step, averaged)` with the averaged
            denoiser, on the device and in eval mode; what it returns is kept with the step.
        evaluate_every (`int`): steps between calls of `evaluate`, which is also called at the end.

    Raises:
        ValueError: for shapes, labels or batch sizes that do not fit, a class without images, or a checkpoint of
            another run.
        FileExistsError: if there is a checkpoint and `resume` is False.
        FloatingPointError: if the loss is not finite; the step is named.
    """
    config = config or GeneratorTrainingConfig()
    accelerator = accelerator or Accelerator()
    check_training_inputs(pixels, labels, num_classes, config, accelerator.num_processes if distributed else 1)
    if checkpoint_dir is not None and not distributed:
        raise ValueError("`distributed=False` keeps no checkpoints: leave `checkpoint_dir` out, or train together.")
    if max_minutes is not None and checkpoint_dir is None:
        raise ValueError(
            "`max_minutes` needs a `checkpoint_dir` to continue from; without one the work would be lost."
        )
    data = prepare_data(pixels, labels, config, vae, progress=progress and accelerator.is_local_main_process)
    identity = dataclasses.asdict(config) | {
        "data": data.fingerprint,
        "mixed_precision": accelerator.mixed_precision,
        "denoiser": None if denoiser is None else fingerprint(denoiser)[:16],
        "prompts": None if prompts is None else fingerprint(prompts)[:16],
        "versions": versions(),
    }
    if denoiser is None:
        if config.trainable != "all":
            raise ValueError(f"`trainable={config.trainable!r}` is for fine-tuning: a new model learns all weights.")
        denoiser = build_denoiser(
            config, num_classes=num_classes, sample_size=data.clean.shape[-1], num_channels=data.clean.shape[1]
        )
    family = denoiser_of(denoiser, prompts=None if prompts is None else prompts.to(accelerator.device))
    _check_denoiser(family, data, num_classes, config)
    if config.trainable == "lora":
        check_lora(denoiser)
    file = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT
    if file is not None:
        _check_checkpoint(file, resume)
    try:
        trainer = _Trainer(family, data, config, accelerator, latents=vae is not None, distributed=distributed)
        if file is not None:
            trainer.checkpoint = Checkpoint(
                file, identity, model=family.network, optimizer=trainer.optimizer, scaler=accelerator.scaler
            )
        trainer.evaluate, trainer.evaluate_every = evaluate, evaluate_every
        with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
            return trainer.run(
                checkpoint_every=checkpoint_every, max_minutes=max_minutes, log_every=log_every, progress=progress
            )
    finally:
        accelerator.free_memory()


def _check_checkpoint(path: Path, resume: bool) -> None:
    if path.exists() and not resume:
        raise FileExistsError(
            f"There is a checkpoint, {path}. Pass `resume=True` (`--resume`) to continue it, or delete it."
        )
    if older := sorted(path.parent.glob("step-*")):
        raise FileExistsError(
            f"{older[-1]} is a checkpoint of an earlier version, from which this one cannot go on: delete it to start "
            "anew, or finish that training with the version that began it."
        )


def _check_denoiser(family: Denoiser, data: TrainingData, num_classes: int, config: GeneratorTrainingConfig) -> None:
    expected = (data.clean.shape[1], data.clean.shape[2], num_classes)
    found = (*family.sample_shape[:2], family.num_classes)
    if found != expected:
        raise ValueError(
            f"The denoiser takes (channels, size, classes) = {found}, the data has {expected}. "
            "`denoiser_of(network).adapt` changes classes and size; or bring the images to the size with "
            "`image_size`, to the channels with `num_channels`."
        )
    if family.null_class is None and config.class_dropout_prob > 0:
        raise ValueError(
            f"The denoiser has no null class to drop labels to: set `class_dropout_prob=0`, got "
            f"{config.class_dropout_prob}."
        )


class _Trainer:
    """One training run: model, averaged weights, optimiser and the loop."""

    def __init__(
        self,
        family: Denoiser,
        data: TrainingData,
        config: GeneratorTrainingConfig,
        accelerator: Accelerator,
        *,
        latents: bool,
        distributed: bool,
    ) -> None:
        self.data, self.config, self.accelerator = data, config, accelerator
        self.checkpoint: Checkpoint | None = None
        self.distributed = distributed
        self.scheduler = build_scheduler(config, latents=latents)
        fast = family.channels_last and accelerator.device.type == "cuda"
        self.memory_format = torch.channels_last if fast else torch.contiguous_format
        family.set_trainable(config.trainable, lora_rank=config.lora_rank, seed=config.seed)
        denoiser = family.network.to(accelerator.device, memory_format=self.memory_format)
        family.begin_training()
        self.denoiser, self.null_class = denoiser, family.null_class
        trained = {name: own for name, own in denoiser.named_parameters() if own.requires_grad}
        self.names, self.trained = list(trained), list(trained.values())
        self.ema = EMAModel(
            self.trained,
            decay=config.ema_decay,
            use_ema_warmup=True,
            power=config.ema_power,
            foreach=True,
        )
        optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        # evaluation_mode keeps the precision but does not tie the processes together
        self.model = accelerator.prepare_model(denoiser, evaluation_mode=not distributed)
        self.wrapped = copy.copy(family)
        self.wrapped.network = self.model
        self.optimizer = accelerator.prepare(optimizer)
        self.progress = Progress()
        self.unlogged: list[torch.Tensor] = []
        self.evaluate: Callable[[int, ModelMixin], dict[str, Any]] | None = None
        self.evaluate_every = 1000

    def run(
        self, *, checkpoint_every: int | None, max_minutes: float | None, log_every: int, progress: bool
    ) -> GeneratorTrainingResult:
        self._resume()
        started, before = time.monotonic(), self.progress.seconds
        progress = progress and self.accelerator.is_local_main_process
        pace = Pace(
            self.denoiser, total=self.config.train_steps, done=self.progress.step, accelerator=self.accelerator,
            processes=self.accelerator.num_processes if self.distributed else 1, shown=progress,
        )  # fmt: skip
        early = 0  # the step of the first checkpoint, if it is not that of `checkpoint_every`
        bar = Bar(
            total=self.config.train_steps,
            initial=self.progress.step,
            desc="Training generator",
            unit="step",
            disable=not progress,
        )
        out_of_time = False
        with bar:
            while self.progress.step < self.config.train_steps and not out_of_time:
                self._step()
                bar.update()
                step = self.progress.step
                last = step == self.config.train_steps
                if pace(step) and self.checkpoint is not None:
                    early, regular = self._by_the_clock(pace, step, log_every)
                    checkpoint_every = checkpoint_every or regular
                due = self.checkpoint is not None and (
                    step == early or (checkpoint_every is not None and step % checkpoint_every == 0)
                )
                if step % log_every == 0 or last or due:
                    bar.set_postfix(loss=f"{self._log():.4f}")
                    self.progress.seconds = before + time.monotonic() - started
                    out_of_time = self._is_out_of_time(started, max_minutes) and not last
                if self.evaluate is not None and (last or step % self.evaluate_every == 0):
                    self._evaluate(self.evaluate)
                if self.checkpoint is not None and (due or last or out_of_time):
                    self._save(self.checkpoint)
        return self._result()

    def _by_the_clock(self, pace: Pace, step: int, log_every: int) -> tuple[int, int]:
        """The step of the first checkpoint and the steps between the later ones, at those that are logged anyway."""
        steps = [step + pace.steps_in(FIRST_CHECKPOINT), pace.steps_in(CHECKPOINTS)]
        rounded = torch.tensor([-(-count // log_every) * log_every for count in steps], device=self.accelerator.device)
        if self.distributed:
            rounded = broadcast(rounded)  # one clock decides for all processes
        first, between = rounded.tolist()
        return first, between

    def _step(self) -> None:
        step = self.progress.step
        batch = draw_batch(
            self.data, step, self.config, self.null_class, self.accelerator, distributed=self.distributed,
            conditions=self.wrapped.conditions,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.config)
        torch.manual_seed(seed_of(self.config.seed, "dropout", step, self.accelerator.process_index))
        loss = denoising_loss(
            self.wrapped.forward,
            self.scheduler,
            batch.clean.contiguous(memory_format=self.memory_format),
            batch.labels,
            batch.timesteps,
            batch.noise.contiguous(memory_format=self.memory_format),
            min_snr_gamma=self.config.min_snr_gamma,
        )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.trained)
        self.unlogged.append(loss.detach())
        self.progress.step += 1

    def _log(self) -> float:
        """Mean loss since the last log. Looking at it rarely keeps the device busy; no step is left unchecked."""
        if not self.unlogged:
            return self.progress.losses[-1]["loss"]
        losses = torch.stack(self.unlogged)
        if self.distributed:
            losses = self.accelerator.reduce(losses, reduction="mean")
        first = self.progress.step - len(self.unlogged)
        self.unlogged.clear()
        bad = torch.nonzero(~torch.isfinite(losses)).flatten()
        if len(bad):
            step = first + int(bad[0])
            raise FloatingPointError(
                f"The loss is {float(losses[bad[0]])} at step {step} (learning rate "
                f"{learning_rate_at(step, self.config):.2g}, precision {self.accelerator.mixed_precision!r}). Likely "
                "fixes: a smaller `learning_rate`, more `warmup_steps`, bf16 or no mixed precision instead of "
                "fp16; and check the images for NaN."
            )
        mean = float(losses.mean())
        rate = learning_rate_at(self.progress.step - 1, self.config)
        self.progress.losses.append({"step": self.progress.step, "loss": mean, "learning_rate": rate})
        return mean

    def _is_out_of_time(self, started: float, max_minutes: float | None) -> bool:
        if max_minutes is None:
            return False
        over = torch.tensor([time.monotonic() - started >= 60 * max_minutes], device=self.accelerator.device)
        return bool(broadcast(over.int()).item())  # one clock decides for all processes

    def _resume(self) -> None:
        if self.checkpoint is None:
            return
        if self.accelerator.is_main_process:
            remove_partials(self.checkpoint.path.parent)
        if self.checkpoint.path.exists():
            progress, averaged = self.checkpoint.load()
            self.progress = Progress(**progress)
            self.ema.shadow_params = [averaged[name].to(self.accelerator.device) for name in self.names]
            self.ema.optimization_step = self.progress.step
            logger.info("Resumed from %s, step %d", self.checkpoint.path, self.progress.step)
        self.accelerator.wait_for_everyone()

    def _save(self, checkpoint: Checkpoint) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(
                dataclasses.asdict(self.progress), dict(zip(self.names, self.ema.shadow_params, strict=True))
            )
        self.accelerator.wait_for_everyone()

    def _averaged(self) -> tuple[ModelMixin, dict[str, torch.Tensor]]:
        """The averaged weights as a network of their own, and what LoRA adds to them, see [`fuse_lora`]."""
        averaged = type(self.denoiser).from_config(self.denoiser.config)
        if self.config.trainable == "lora":
            add_lora(averaged, self.config.lora_rank)
        averaged.load_state_dict(
            self.denoiser.state_dict()
        )  # what is not trained: frozen weights, tables of positions
        self.ema.copy_to([averaged.get_parameter(name) for name in self.names])
        lora = fuse_lora(averaged)
        return averaged.eval(), lora

    def _evaluate(self, evaluate: Callable[[int, ModelMixin], dict[str, Any]]) -> None:
        step = self.progress.step
        if self.accelerator.is_main_process and all(entry["step"] != step for entry in self.progress.evaluations):
            averaged = self._averaged()[0].to(self.accelerator.device)
            self.progress.evaluations.append({"step": step, **evaluate(step, averaged)})

    def _result(self) -> GeneratorTrainingResult:
        denoiser, lora = self._averaged()
        return GeneratorTrainingResult(
            denoiser=denoiser,
            lora=lora,
            finished=self.progress.step >= self.config.train_steps,
            step=self.progress.step,
            seconds=self.progress.seconds,
            losses=self.progress.losses,
            evaluations=self.progress.evaluations,
        )
