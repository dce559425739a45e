"""FLOPs and memory of a pass through a network, counted without computing it (fake or meta tensors)."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..matching.feature_spec import Features, FeatureSource, features_of
from ..sampling.call import SamplingMethod
from ..sampling.methods.released import RandomExtractor
from ..sampling.pipeline import DsCoPipeline
from ..utils.values import plain_arguments


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
        flops (`float`): floating-point operations of matrix multiplications and convolutions; a multiply-add is 2.
        memory (`int`): bytes of the tensors that are alive at once at the most, without weights; those of the
            optimised step (`preview_backward`) include the classifier's, as both wait for the gradient together.
    """

    flops: float = 0
    memory: int = 0


def modules_of(pipe: DsCoPipeline) -> list[nn.Module]:
    """The networks of a pipeline."""
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]


class Tracer:
    """Counts what a function of one tensor does, without doing it."""

    def __init__(self, pipe: DsCoPipeline, *modules: nn.Module) -> None:
        self.device, self.dtype = pipe.denoiser.device, pipe.denoiser.dtype
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        weights = [t for module in (*modules_of(pipe), *modules) for t in (*module.parameters(), *module.buffers())]
        self.is_meta = all(tensor.is_meta for tensor in weights)  # then nothing has to be faked, which takes longer
        self.weights = weights if self.is_meta else [self.fake.from_tensor(tensor) for tensor in weights]

    def __call__(
        self, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], *, backward: bool = False
    ) -> PassCost:
        """What a pass does with an input of a shape; `backward` also to its input."""
        flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        with nullcontext() if self.is_meta else self.fake:
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

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
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


def pass_costs(
    pipe: DsCoPipeline, *, features: Features = None, extractor: bool = False, method: SamplingMethod | None = None
) -> dict[str, PassCost]:
    """FLOPs and memory of one image's pass of every kind, without computing it.

    Args:
        pipe (`DsCoPipeline`): on any device, also on "meta".
        features (*optional*): what the targets match, see [`dsco_hf.matching.feature_spec.features_of`].
        extractor (`bool`): also those of the random network of `Released`.
        method ([`SamplingMethod`], *optional*): also those of a network of its own.
    """
    denoiser, latent = pipe.denoiser, (1, *pipe.latent_shape)
    pixel = (1, pipe.num_channels, pipe.image_size, pipe.image_size)

    def denoise(x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return pipe.family.forward(x, zeros, zeros)

    trace = Tracer(pipe)
    costs = {"denoiser": trace(denoise, latent)}
    if pipe.vae is not None:
        costs["decoder"] = costs["preview"] = trace(pipe.decode_latents, latent)
    if pipe.preview_vae is not None:
        costs["preview"] = trace(lambda x: pipe.decode_latents(x, preview=True), latent)
    if pipe.classifier is not None:
        source = FeatureSource(pipe, features_of(pipe, features))
        look = looker(source)
        seen = pixel if source.needs_pixels else latent
        costs["embedding"], backward = trace(look, seen), trace(look, seen, backward=True)
        for kind, cost in (("classifier", costs["embedding"]), ("classifier_backward", backward)):
            costs[kind] = PassCost(cost.flops / len(source.networks), cost.memory)  # passes are counted by network
        costs["preview_backward"] = PassCost(0, backward.memory)
        if source.needs_pixels and "preview" in costs:
            both = trace(lambda x: look(pipe.decode_latents(x, preview=True)), latent, backward=True)
            costs["preview_backward"] = PassCost(both.flops - backward.flops, both.memory)
    if extractor:
        network = RandomExtractor(latent[1]).to(denoiser.device, denoiser.dtype)
        trace = Tracer(pipe, network)
        costs["extractor"] = trace(network, latent)
        costs["extractor_backward"] = trace(network, latent, backward=True)
    return costs | ({} if method is None else _own_costs(pipe, method, costs))


def _own_costs(pipe: DsCoPipeline, method: SamplingMethod, costs: Mapping[str, PassCost]) -> dict[str, PassCost]:
    """Of a network that a method has of its own, and of the decoder's gradient where no classifier has told it."""
    if (own := method.own_passes(pipe)) is None:
        return {}
    network, passes = own
    trace, found = Tracer(pipe, network), {}
    pixel = (1, pipe.num_channels, pipe.image_size, pipe.image_size)
    for kind, look in passes.items():
        backward = kind.endswith("_backward")
        found[kind] = alone = trace(look, pixel, backward=backward)
        if backward and "preview" in costs:
            through = functools.partial(_decoded, pipe, look)
            both = trace(through, (1, *pipe.latent_shape), backward=True)
            found[kind] = PassCost(alone.flops, both.memory)
            if not (known := costs.get("preview_backward")) or not known.flops:
                found["preview_backward"] = PassCost(both.flops - alone.flops, both.memory)
    return found


def _decoded(pipe: DsCoPipeline, look: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    return look(pipe.decode_latents(latents, preview=True))


def looker(source: FeatureSource) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sum, a scalar, of what networks see in pixels, or in latents if none takes pixels: to take a gradient of.

    Where both are needed, the latents are zeros: their network's work is counted, though not its part of the gradient.
    """

    def look(x: torch.Tensor) -> torch.Tensor:
        latents = None
        if source.needs_latents:
            latents = x.new_zeros(len(x), *source.latent_shape) if source.needs_pixels else x
        seen = source(x.clamp(-1, 1) if source.needs_pixels else None, latents)
        return seen.features.sum()

    return look


@plain_arguments()
def predict_memory(
    pipe: DsCoPipeline,
    images: int,
    costs: Mapping[str, PassCost],
    *,
    optimised: bool = True,
    guidance_scale: float = 4.0,
    batch_size: int | None = None,
) -> int:
    """Bytes of tensors at the most in one call: weights, activations of one micro-batch, and the call's own state.

    Args:
        pipe (`DsCoPipeline`): its weights count once each.
        images (`int`): drawn in the call.
        costs (`dict[str, PassCost]`): from [`pass_costs`].
        optimised (`bool`): whether gradients are taken.
        guidance_scale (`float`): with guidance, both branches pass through the denoiser together.
        batch_size (`int`, *optional*): images per pass; all at once if None.
    """
    batch = min(images, batch_size or images)
    branches = 2 if guidance_scale > 1 else 1
    kinds = {"denoiser": branches, "decoder": 1}
    kinds |= {"preview_backward": 1, "surrogate_backward": 1} if optimised else {}
    activations = max(costs[kind].memory * factor for kind, factor in kinds.items() if kind in costs)
    denoiser = pipe.denoiser
    latent = math.prod(pipe.latent_shape) * denoiser.dtype.itemsize
    # x_t, the noise, the prediction, the look-ahead, x_{t-1}, the gradient; images in their own type and in float32
    state = images * (6 * latent + pipe.num_channels * pipe.image_size**2 * (denoiser.dtype.itemsize + 8))
    return weight_bytes(pipe) + batch * activations + state


def largest_batch(
    pipe: DsCoPipeline,
    images: int,
    costs: Mapping[str, PassCost],
    memory_bytes: float,
    *,
    optimised: bool = True,
    guidance_scale: float = 4.0,
) -> int:
    """The largest `batch_size` with which a call of `images` fits into `memory_bytes`; 0 if none does.

    Other arguments as of [`predict_memory`].
    """
    known: dict[str, Any] = {"optimised": optimised, "guidance_scale": guidance_scale}
    one, two = (predict_memory(pipe, max(images, 2), costs, batch_size=size, **known) for size in (1, 2))
    rest = predict_memory(pipe, images, costs, batch_size=1, **known) - (two - one)
    return max(0, min(images, int((memory_bytes - rest) // (two - one))))  # memory grows evenly with the batch


def weight_bytes(pipe: DsCoPipeline) -> int:
    """Bytes of all components' parameters and buffers."""
    tensors = {id(t): t for module in modules_of(pipe) for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
