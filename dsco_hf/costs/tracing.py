"""FLOPs and memory of a pass through a network, counted without computing it (fake or meta tensors)."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..sampling.pipeline import DsCoPipeline


_ATEN = torch.ops.aten
# torch counts the attention of all devices but this one
_CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclasses.dataclass(frozen=True)
class PassCost:
    """One image's pass.

    Attributes:
        flops (`int`): floating-point operations of matrix multiplications and convolutions; a multiply-add is 2.
        memory (`int`): bytes of the tensors that are alive at once at the most, without weights; those of the
            optimised step (`preview_backward`) include the classifier's, as both wait for the gradient together.
    """

    flops: int = 0
    memory: int = 0


def modules_of(pipe: DsCoPipeline) -> list[nn.Module]:
    """The networks of a pipeline."""
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]


class Tracer:
    """Counts what a function of one tensor does, without doing it."""

    def __init__(self, pipe: DsCoPipeline, *modules: nn.Module) -> None:
        self.device, self.dtype = pipe.denoiser.device, pipe.denoiser.dtype
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        weights = (t for module in (*modules_of(pipe), *modules) for t in (*module.parameters(), *module.buffers()))
        self.weights = [self.fake.from_tensor(tensor) for tensor in weights]

    def __call__(
        self, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], *, backward: bool = False
    ) -> PassCost:
        """What a pass does with an input of a shape; `backward` also to its input."""
        flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        with self.fake:
            memory = TensorMemory(self.weights)
            leaf = torch.zeros(shape, device=self.device, dtype=self.dtype, requires_grad=backward)
            with flops, memory, torch.set_grad_enabled(backward):
                output = function(leaf.clone())
                if backward:
                    torch.autograd.grad(output.float().sum(), leaf)
        return PassCost(flops.get_total_flops(), memory.peak)


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive at once at the most, but for `known` ones.

    An allocator's rounding and the workspace of a kernel are not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = list(known)  # keeps their storages alive
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in self.known)
        self.alive = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, output)
        return output

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.alive -= size
