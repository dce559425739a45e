"""How far a run is: its stages and its time, how fast a training goes, when it will end, and where it can go on."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .files import DamagedFileError, explained, reading, whole
from .origins import differences, fingerprint, in_words
from .values import plain


MEASURED_STEPS = 10
RARELY, SHORT = 60.0, 2.0  # seconds between two lines of a bar off a terminal, and before it has one at its end


class Bar(tqdm):
    """A progress bar of tqdm, which off a terminal prints a line a minute, and one at its end if that took a while."""

    def __init__(self, iterable: Iterable[object] | None = None, **options: Any) -> None:
        self.plain = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.said, self.told = time.time(), -1.0  # when it had its last line, and of how much
        super().__init__(iterable, **options)

    def refresh(self, nolock: bool = False, lock_args: tuple[bool | None] | None = None) -> None:  # type: ignore[override]
        """Draws the bar; off a terminal only if it has not for a minute."""
        if not self.plain:
            super().refresh(nolock, lock_args)
        elif not self.disable and time.time() - self.said >= RARELY:
            self._say()

    def clear(self, nolock: bool = False) -> None:
        """Makes room for a line; off a terminal there is."""
        if not self.plain:
            super().clear(nolock)

    def close(self) -> None:
        """Draws it for the last time."""
        if getattr(self, "plain", False) and not getattr(self, "disable", True):
            if time.time() - self.start_t >= SHORT and self.n != self.told:
                self._say()
            self.delay = math.inf  # tqdm then has nothing to draw
        super().close()

    def _say(self) -> None:
        self.said, self.told = time.time(), self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()


def _name(device: torch.device) -> str:
    """A device as people call it: processors have no number."""
    return device.type if device.type == "cpu" else str(device)


@contextmanager
def weights_in_silence() -> Iterator[None]:
    """Without the bars of transformers over the tensors of a file, "Loading weights" and "Writing model shards"."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def introduce(
    accelerator: Accelerator | None, data: str, *, images: int | None = None, classes: int, size: int | None = None
) -> None:
    """Prints the first line of a run, by the main process: the data, how many images and classes, px, the device."""
    if accelerator is not None and not accelerator.is_main_process:
        return
    counted = f"{images:,} images of {classes:,} classes" if images is not None else f"{classes:,} classes"
    told = [f"{data}: {counted}", *([f"{size} px"] if size is not None else [])]
    if accelerator is not None:
        together = f" ({accelerator.num_processes} processes)" if accelerator.num_processes > 1 else ""
        told.append(f"on {_name(accelerator.device)}{together}")
    tqdm.write(f"{', '.join(told)}.")
    sys.stdout.flush()


class Pace:
    """Measures the steps of a training up to the tenth of this session; the first one, which warms up, is left out.

    Args:
        network (`torch.nn.Module`): what is trained; its size is told.
        total (`int`): steps of the whole training.
        done (`int`): those of earlier sessions.
        accelerator (`Accelerator`): its device and precision are told.
        processes (`int`): how many train the network together.
        shown (`bool`): whether anything is printed; measured it is in any case.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        total: int,
        done: int,
        accelerator: Accelerator,
        processes: int = 1,
        shown: bool = True,
    ) -> None:
        self.total, self.first, self.device, self.shown = total, done, accelerator.device, shown
        self.seconds_per_step: float | None = None
        self._began = 0.0
        parameters = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        together = f", {processes} processes" if processes > 1 else ""
        self._say(
            f"Training {parameters:,} parameters on {_name(self.device)} ({precision}{together}), "
            f"{total - done:,} of {total:,} steps to go."
        )

    def __call__(self, step: int) -> bool:
        """Takes note of a finished step; whether it is the one at which the pace has become known."""
        taken = step - self.first
        if taken not in (1, MEASURED_STEPS):
            return False
        if self.device.type != "cpu":  # otherwise the queue would be timed, not the work
            torch.accelerator.synchronize()
        if taken == 1:
            self._began = time.monotonic()
            return False
        self.seconds_per_step = (time.monotonic() - self._began) / (MEASURED_STEPS - 1)
        if (left := self.seconds_per_step * (self.total - step)) >= RARELY / 6:
            self._say(f"{self.seconds_per_step:.3g} s a step: {remaining(left)}.")
        return True

    def steps_in(self, seconds: float) -> int:
        """How many steps take this time; at least one."""
        return max(1, math.ceil(seconds / max(self.seconds_per_step or 0.0, 1e-9)))

    def _say(self, text: str) -> None:
        if self.shown:
            tqdm.write(text)


class Clock:
    """Tells the stages of a run with the time since its start, and when nothing new may be begun.

    Args:
        accelerator (`Accelerator`): the main process speaks.
        max_minutes (`float`, *optional*): time in which something may be begun; without an end if None.
    """

    def __init__(self, accelerator: Accelerator, max_minutes: float | None = None) -> None:
        self.accelerator, self.max_minutes, self.start = accelerator, max_minutes, time.monotonic()
        self.unfinished = False

    def say(self, text: str) -> None:
        """Prints a stage."""
        if self.accelerator.is_main_process:
            seconds = int(time.monotonic() - self.start)
            tqdm.write(f"[{seconds // 60}:{seconds % 60:02d}] {text}")
            sys.stdout.flush()

    def is_over(self) -> bool:
        """Whether this process may begin nothing new; it is remembered."""
        limit = self.max_minutes
        self.unfinished |= limit is not None and time.monotonic() - self.start >= 60 * limit
        return self.unfinished

    def any_unfinished(self) -> bool:
        """Whether any process left something undone; all of them call this."""
        mine = torch.tensor([int(self.unfinished)], device=self.accelerator.device)
        return bool(self.accelerator.gather(mine).max())


class Checkpoint:
    """Where a training stands, in one safetensors file that is whole or absent.

    Frozen parameters are those that the training began with, which the settings tell, and are not kept.

    Args:
        path (`Path`): the file; its folder is made.
        settings (`Mapping`): all that the weights at the end depend on, as of [`~dsco_hf.utils.origins.identity`].
        model (`torch.nn.Module`): what is trained, not wrapped for several processes.
        optimizer (`torch.optim.Optimizer`): of its parameters, or of some of them.
        scaler (`torch.amp.GradScaler`, *optional*): of a training in half precision.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.path, self.settings = path, settings
        self.model, self.optimizer, self.scaler = model, optimizer, scaler

    def save(self, progress: Mapping[str, Any], others: Mapping[str, torch.Tensor]) -> None:
        """Writes weights and optimiser with `progress`, JSON values, and further tensors by name, of any shape.

        Raises:
            RunError: if it cannot be written.
        """
        frozen = self._frozen()
        tensors = {f"model.{name}": own for name, own in self.model.state_dict().items() if name not in frozen}
        tensors |= {f"other.{name}": value for name, value in others.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
        # clone: safetensors refuses tensors that share memory, such as tied weights
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        metadata = {"settings": self.settings, "progress": progress, "scaler": scaler, "sha256": fingerprint(tensors)}
        with explained(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole(self.path) as partial:
                save_file(tensors, partial, {name: json.dumps(plain(value)) for name, value in metadata.items()})

    def load(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Restores weights and optimiser in place; gives `progress` and the others, shaped as saved, on the CPU.

        Raises:
            ValueError: if it is of a training with other settings.
            DamagedFileError: if it is truncated, or something else.
        """
        remedy = "No training can go on from it: delete it to start anew, or write to another file."
        with reading(self.path, remedy), safe_open(self.path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            metadata = {name: json.loads(texts[name]) for name in ("settings", "progress", "scaler", "sha256")}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        if fingerprint(tensors) != metadata["sha256"]:
            raise DamagedFileError(f"{self.path} is damaged: its checksum differs. {remedy}")
        if changed := differences(metadata["settings"], self.settings):
            raise ValueError(
                f"The checkpoint {self.path} belongs to another run ({in_words(changed)}). Set them as they were to "
                "go on, delete it to start anew, or write to another folder."
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "other": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        state = self.model.state_dict()
        self.model.load_state_dict({name: state[name] for name in self._frozen()} | parts["model"])
        self._load_optimizer(parts["optimizer"])
        if metadata["scaler"] and self.scaler is not None:
            self.scaler.load_state_dict(metadata["scaler"])
        return metadata["progress"], parts["other"]

    def _frozen(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]

    def _load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            like = parameters[int(index)]
            if value.shape == like.shape:  # fused optimisers need the layout of the parameter
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            states.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})


def remaining(seconds: float, now: datetime | None = None) -> str:
    """When work of this length ends, as in "8 min left, until 14:32" or "9.2 h left, until Fri 02:10"."""
    now = now or datetime.now()
    end = now + timedelta(seconds=seconds)
    if seconds < 90:
        length = f"{seconds:.0f} s"
    elif seconds < 5400:
        length = f"{seconds / 60:.0f} min"
    else:
        length = f"{seconds / 3600:.1f} h"
    return (
        f"{length} left, until {end:%H:%M}"
        if end.date() == now.date()
        else f"{length} left, until {end:%a %d %b %H:%M}"
    )


try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


def peak_bytes() -> int:
    """The most memory that this process has held so far; where the system does not tell, what it holds now."""
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes
    held = psutil.Process().memory_info()
    return int(getattr(held, "peak_wset", held.rss))
