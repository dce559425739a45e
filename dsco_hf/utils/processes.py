"""The processes of a launch: what they tell one another, and how the error of one reaches all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState


T = TypeVar("T")
_NO_LIMIT = timedelta(days=365)  # a process may be at work for longer than any default


class RunError(RuntimeError):
    """A run that cannot begin or go on; the message says what to do. Finished units are kept."""


def is_main_process() -> bool:
    """Whether this is the process of a launch that publishes; without a GPU, accelerate connects processes if told."""
    return bool(PartialState(cpu=not torch.accelerator.is_available()).is_main_process)


class Team:
    """Meetings of all processes without a time limit, whatever that of the accelerator is; a context manager.

    Args:
        accelerator (`Accelerator` or `PartialState`, *optional*): connects the processes, see
            `dsco_hf.utils.configs.make_accelerator`; this process is alone if None.

    Attributes:
        rank, world (`int`): index of this process, and their number.
    """

    def __init__(self, accelerator: Accelerator | PartialState | None) -> None:
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.world: int = 1 if accelerator is None else accelerator.num_processes
        self.group: dist.ProcessGroup | None = None

    def __enter__(self) -> Team:
        if self.world > 1:
            self.group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
        return self

    def __exit__(self, *_: object) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def gather(self, value: T) -> list[T]:
        """The value of every process, in every process."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes, of the same shape, on the CPU, in every process."""
        tensor = tensor.detach().cpu().clone()
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def everywhere(self, work: Callable[[], T], what: str) -> list[T]:
        """Lets all processes do something; an error of one is raised in all, once all are there.

        Raises:
            RunError: in the processes that had none; the others raise their own error.
        """
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if failed := [f"process {rank}: {text}" for rank, text in enumerate(texts) if text is not None]:
            raise RunError(f"Failed while {what}, {'; '.join(failed)}")
        return self.gather(value)  # type: ignore[arg-type]

    def from_main(self, work: Callable[[], T], what: str) -> T:
        """Lets the main process do something and gives all its result, or its error, as `everywhere` does."""
        return self.everywhere(lambda: work() if self.rank == 0 else None, what)[0]  # type: ignore[return-value]
