"""How far a run is: its stages and its time, how fast a training goes, and when it will end."""

from __future__ import annotations

import math
import sys
import time
from datetime import datetime, timedelta

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm


MEASURED_STEPS = 10


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
        parameters = sum(parameter.numel() for parameter in network.parameters())
        precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        together = f", {processes} processes" if processes > 1 else ""
        self._say(
            f"Training {parameters:,} parameters on {self.device} ({precision}{together}), "
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
        if step < self.total:
            self._say(
                f"{self.seconds_per_step:.3g} s a step: {remaining(self.seconds_per_step * (self.total - step))}."
            )
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
