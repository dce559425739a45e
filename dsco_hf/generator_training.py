"""Trains a class-conditional DiT on the user's own images, in pixels or in the latents of an autoencoder.

The training follows DiT (Peebles and Xie, https://arxiv.org/abs/2212.09748): noise prediction, label dropout for
classifier-free guidance, averaged weights. A resumed run ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import AutoencoderKL, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .data import check_classes
from .generators import (
    GeneratorTrainingConfig,
    TrainingData,
    build_scheduler,
    build_transformer,
    draw_batch,
    encode_latents,
    learning_rate_at,
    noise_prediction_loss,
)


logger = logging.getLogger(__name__)


@dataclass
class GeneratorTrainingResult:
    """What [`train_generator`] gives back.

    Attributes:
        transformer (`DiTTransformer2DModel`): the averaged weights, in float32 and eval mode, on the CPU.
        finished (`bool`): False if the time limit came first; resume from the checkpoint then.
        step (`int`): optimiser steps taken, those before a resume included.
        seconds (`float`): training time, that before a resume included.
        losses (`list[dict]`): mean loss of every logging interval: `{"step", "loss", "learning_rate"}`.
    """

    transformer: DiTTransformer2DModel
    finished: bool
    step: int
    seconds: float
    losses: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _Progress:
    """What a checkpoint holds beside weights and optimiser."""

    step: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)


class _Checkpoints:
    """Checkpoints of one run: `<folder>/step-00001000`, whole or absent; the newest replaces the older ones."""

    def __init__(self, folder: Path, accelerator: Accelerator, identity: dict[str, Any]) -> None:
        self.folder, self.accelerator, self.identity = folder, accelerator, identity

    def newest(self) -> Path | None:
        complete = sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")
        return complete[-1] if complete else None

    def save(self, progress: _Progress, ema: dict[str, torch.Tensor]) -> None:
        final = self.folder / f"step-{progress.step:08d}"
        if final.exists():
            return
        partial = final.with_suffix(".partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_file(ema, partial / "ema.safetensors")
            state = {"progress": dataclasses.asdict(progress), "identity": self.identity}
            (partial / "progress.json").write_text(json.dumps(state, indent=1))
            older = [path for path in self.folder.glob("step-*") if path != partial]
            partial.rename(final)
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> tuple[_Progress, dict[str, torch.Tensor]]:
        """Restores model and optimiser in place; returns the rest.

        Raises:
            ValueError: if the checkpoint belongs to another configuration or other data.
        """
        state = json.loads((path / "progress.json").read_text())
        theirs = state["identity"]
        changed = [
            f"{name} (checkpoint {theirs.get(name)!r}, now {value!r})"
            for name, value in self.identity.items()
            if theirs.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"The checkpoint {path} belongs to another run: {', '.join(changed)}. Resume with the same settings "
                "and data, or start anew in another folder."
            )
        self.accelerator.load_state(str(path))
        return _Progress(**state["progress"]), load_file(path / "ema.safetensors")


def train_generator(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    config: GeneratorTrainingConfig | None = None,
    *,
    num_classes: int,
    accelerator: Accelerator | None = None,
    vae: AutoencoderKL | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 1000,
    resume: bool = False,
    max_minutes: float | None = None,
    log_every: int = 20,
    distributed: bool = True,
    progress: bool = True,
) -> GeneratorTrainingResult:
    """Trains a class-conditional `DiTTransformer2DModel` on images; source: https://arxiv.org/abs/2212.09748.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, H)`, range [-1, 1]): the images, the same on every process.
        labels (`torch.Tensor` of shape `(N,)`, int64): classes in [0, num_classes).
        config (`GeneratorTrainingConfig`, *optional*): model and training; the defaults fit the digits.
        num_classes (`int`): number of classes; each needs at least one image.
        accelerator (`Accelerator`, *optional*): device, precision and processes. What is prepared with it is released
            at the end.
        vae (`AutoencoderKL`, *optional*): train in its latents instead of in pixels. Images are encoded once.
        checkpoint_dir (`str` or `Path`, *optional*): save checkpoints here, every `checkpoint_every` steps, at the
            time limit and at the end.
        checkpoint_every (`int`): steps between checkpoints.
        resume (`bool`): continue from the checkpoint in `checkpoint_dir`, if there is one.
        max_minutes (`float`, *optional*): stop after this time, for machines that are lent in slices.
        log_every (`int`): steps between looks at the loss and the clock.
        distributed (`bool`): all processes train this one model together; otherwise the calling process trains it
            alone, while others may do something else. No checkpoints then.
        progress (`bool`): show a progress bar.

    Raises:
        ValueError: for shapes, labels or batch sizes that do not fit, a class without images, or a checkpoint of
            another run.
        FileExistsError: if there is a checkpoint and `resume` is False.
        FloatingPointError: if the loss is not finite; the step is named.
    """
    config = config or GeneratorTrainingConfig()
    accelerator = accelerator or Accelerator()
    _check_training_inputs(pixels, labels, num_classes, config, accelerator.num_processes if distributed else 1)
    if checkpoint_dir is not None and not distributed:
        raise ValueError("`distributed=False` keeps no checkpoints: leave `checkpoint_dir` out, or train together.")
    if max_minutes is not None and checkpoint_dir is None:
        raise ValueError(
            "`max_minutes` needs a `checkpoint_dir` to continue from; without one the work would be lost."
        )
    data = _prepare_data(pixels, labels, config, vae, progress=progress and accelerator.is_local_main_process)
    transformer = build_transformer(
        config, num_classes=num_classes, sample_size=data.clean.shape[-1], num_channels=data.clean.shape[1]
    )
    checkpoints = None
    if checkpoint_dir is not None:
        identity = dataclasses.asdict(config) | {
            "data": data.fingerprint,
            "mixed_precision": accelerator.mixed_precision,
        }
        checkpoints = _Checkpoints(Path(checkpoint_dir), accelerator, identity)
        if not resume and (found := checkpoints.newest()) is not None:
            raise FileExistsError(
                f"There is a checkpoint, {found}. Pass `resume=True` (`--resume`) to continue it, or delete it."
            )
    try:
        return _Trainer(
            transformer, data, config, accelerator, checkpoints, latents=vae is not None, distributed=distributed
        ).run(checkpoint_every=checkpoint_every, max_minutes=max_minutes, log_every=log_every, progress=progress)
    finally:
        accelerator.free_memory()


def _check_training_inputs(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    config: GeneratorTrainingConfig,
    num_processes: int,
) -> None:
    if pixels.ndim != 4 or pixels.shape[-1] != pixels.shape[-2]:
        raise ValueError(
            f"Expected square images of shape (N, C, H, H), got {tuple(pixels.shape)}. `load_pixels(image_size=...)` "
            "crops them."
        )
    if labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"Got {len(pixels)} images but labels of shape {tuple(labels.shape)}; one per image is needed."
        )
    if len(labels) == 0:
        raise ValueError("There are no images to train on.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels must be in 0..{num_classes - 1} (`num_classes={num_classes}`), got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    check_classes(labels, [str(label) for label in range(num_classes)])
    bad = torch.nonzero(~torch.isfinite(pixels).flatten(1).all(dim=1)).flatten()
    if len(bad):
        raise ValueError(f"The pixels of image {int(bad[0])} are not finite ({len(bad)} such images).")
    if config.batch_size % num_processes:
        raise ValueError(
            f"`batch_size={config.batch_size}` cannot be split evenly over {num_processes} processes. "
            "It is the size over all processes; choose a multiple of their number."
        )


def _prepare_data(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    config: GeneratorTrainingConfig,
    vae: AutoencoderKL | None,
    *,
    progress: bool,
) -> TrainingData:
    pixels, labels = pixels.detach().cpu().float(), labels.detach().cpu()
    if vae is None:
        return TrainingData(pixels, labels)
    vae.eval()
    mean, std = encode_latents(pixels, vae, progress=progress)
    mirrored = None
    if config.horizontal_flip:  # the latents of a mirrored image are not the mirrored latents
        mirrored_mean, mirrored_std = encode_latents(pixels.flip(-1), vae, progress=progress)
        mirrored = TrainingData(mirrored_mean, labels, mirrored_std)
    return TrainingData(mean, labels, std, mirrored)


class _Trainer:
    """One training run: model, averaged weights, optimiser and the loop."""

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        data: TrainingData,
        config: GeneratorTrainingConfig,
        accelerator: Accelerator,
        checkpoints: _Checkpoints | None,
        *,
        latents: bool,
        distributed: bool,
    ) -> None:
        self.data, self.config, self.accelerator, self.checkpoints = data, config, accelerator, checkpoints
        self.distributed = distributed
        self.scheduler = build_scheduler(config, latents=latents)
        transformer.to(accelerator.device).train()
        for module in transformer.modules():
            # In train mode every block of diffusers' DiT drops labels on its own, so that hardly ever the whole model
            # is unconditional. We drop them for all blocks at once instead, as DiT does.
            if isinstance(module, LabelEmbedding):
                module.eval()
        self.transformer = transformer
        self.names = [name for name, _ in transformer.named_parameters()]
        self.ema = EMAModel(
            transformer.parameters(),
            decay=config.ema_decay,
            use_ema_warmup=True,
            power=config.ema_power,
            foreach=True,
        )
        optimizer = torch.optim.AdamW(
            transformer.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        # evaluation_mode keeps the precision but does not tie the processes together
        self.model = accelerator.prepare_model(transformer, evaluation_mode=not distributed)
        self.optimizer = accelerator.prepare(optimizer)
        self.progress = _Progress()
        self.unlogged: list[torch.Tensor] = []

    def run(
        self, *, checkpoint_every: int, max_minutes: float | None, log_every: int, progress: bool
    ) -> GeneratorTrainingResult:
        self._resume()
        started, before = time.monotonic(), self.progress.seconds
        bar = tqdm(
            total=self.config.train_steps,
            initial=self.progress.step,
            desc="Training generator",
            unit="step",
            disable=not (progress and self.accelerator.is_local_main_process),
        )
        out_of_time = False
        with bar:
            while self.progress.step < self.config.train_steps and not out_of_time:
                self._step()
                bar.update()
                step = self.progress.step
                last = step == self.config.train_steps
                due = self.checkpoints is not None and step % checkpoint_every == 0
                if step % log_every == 0 or last or due:
                    bar.set_postfix(loss=f"{self._log():.4f}")
                    self.progress.seconds = before + time.monotonic() - started
                    out_of_time = self._is_out_of_time(started, max_minutes) and not last
                if self.checkpoints is not None and (due or last or out_of_time):
                    self.checkpoints.save(self.progress, self._ema_state())
        return self._result()

    def _step(self) -> None:
        step = self.progress.step
        null_class = self.transformer.config.num_embeds_ada_norm
        batch = draw_batch(self.data, step, self.config, null_class, self.accelerator, distributed=self.distributed)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.config)
        loss = noise_prediction_loss(
            self.model,
            self.scheduler,
            batch.clean,
            batch.labels,
            batch.timesteps,
            batch.noise,
            min_snr_gamma=self.config.min_snr_gamma,
        )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.transformer.parameters())
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
        if self.checkpoints is None or (newest := self.checkpoints.newest()) is None:
            return
        self.progress, averaged = self.checkpoints.load(newest)
        self.ema.shadow_params = [averaged[name].to(self.accelerator.device) for name in self.names]
        self.ema.optimization_step = self.progress.step
        logger.info("Resumed from %s", newest)

    def _ema_state(self) -> dict[str, torch.Tensor]:
        return {name: value.cpu().contiguous() for name, value in zip(self.names, self.ema.shadow_params, strict=True)}

    def _result(self) -> GeneratorTrainingResult:
        averaged = DiTTransformer2DModel.from_config(self.transformer.config)
        self.ema.copy_to(averaged.parameters())
        return GeneratorTrainingResult(
            transformer=averaged.eval(),
            finished=self.progress.step >= self.config.train_steps,
            step=self.progress.step,
            seconds=self.progress.seconds,
            losses=self.progress.losses,
        )
