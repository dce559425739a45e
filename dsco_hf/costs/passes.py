"""What concentration costs, known before it runs: passes through each network, FLOPs, memory and time.

Passes are counted by a [`Rehearsal`]: the pipeline itself, with networks that cost nothing, so they are exact for any
method and objective. FLOPs and memory are counted by tracing one pass of each kind at its real shape without computing
it (`dsco_hf.costs.tracing`). Seconds are passes times the seconds of one pass, which are either those of a few real
steps ([`probe_seconds`]) or assumed from a device's peak rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderTiny
from torch.overrides import TorchFunctionMode

from ..concentration.concentrate import BLOCK_SIZE, IMAGES_PER_CALL, Unit, divide, plan_units
from ..evaluators.configurations import ConvNetConfig
from ..evaluators.models import ConvNetForImageClassification
from ..generators.denoisers import GeneratorTrainingConfig, build_denoiser
from ..matching.feature_spec import Features, FeatureSource, features_of
from ..matching.kernels import draw_frequencies
from ..matching.targets import MatchingTargets
from ..sampling.call import KINDS as CALL_KINDS
from ..sampling.call import Sampling, SamplingMethod, Targets, calls
from ..sampling.methods import JointTargets
from ..sampling.pipeline import DsCoPipeline
from ..utils.values import plain_arguments
from .tracing import PassCost, predict_memory


# Kinds of passes: those that a call counts, and what a run adds
KINDS = CALL_KINDS | {"embedding": "all networks of the features, of finished blocks", "call": "all else, of an image"}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a concentration will cost.

    Attributes:
        images_per_class, images (`int`): the budget, and images altogether.
        passes (`dict[str, int]`): images by kind of pass, see `KINDS`.
        flops (`float`): of all passes.
        memory_bytes (`int`): tensors of one process at the most: weights, activations of one micro-batch and the
            state of one call. On a CPU the process itself and the libraries' workspace come on top.
        seconds (`dict[int, float]`): wall time by number of processes.
    """

    images_per_class: int
    images: int
    passes: dict[str, int]
    flops: float
    memory_bytes: int
    seconds: dict[int, float]

    @property
    def calls(self) -> dict[str, int]:
        """The calls that a `ConcentrationReport` will show."""
        return calls(self.passes)


class Rehearsal:
    """A pipeline's calls on networks that cost nothing: what passes through which is counted, whatever the method.

    Args:
        pipe (`DsCoPipeline`): which components it has, and its scheduler, are taken over.
        sampling ([`Sampling`]): how images are drawn.
        features (*optional*): what the targets match, see [`dsco_hf.matching.feature_spec.features_of`].
    """

    def __init__(self, pipe: DsCoPipeline, sampling: Sampling, features: Features = None) -> None:
        self.pipe, self.sampling, self.features = pipe, sampling, features_of(pipe, features)
        # layers and poolings make no pass more or less
        bare = (dataclasses.replace(spec, layers=("pooled",), pooling="average") for spec in self.features)
        self._specs = list(dict.fromkeys(bare))
        self._known: dict[tuple[int, int, str], Counter[str]] = {}

    def passes(self, images: int, *, classes: int = 1, output_type: str = "pt") -> Counter[str]:
        """Images that pass through each network in one call.

        Args:
            images (`int`): that the call is asked for.
            classes (`int`): of which they are; "extractor" is counted for one real image of each.
            output_type (`str`): latents are not decoded.

        Returns:
            `Counter`: by kind, see `KINDS`.
        """
        key = (images, classes, output_type)
        if key not in self._known:
            self._known[key] = self._count(*key)
        return self._known[key]

    def _count(self, *key: *tuple[int, int, str]) -> Counter[str]:
        """One call; of its iterations, which all are alike, two are done."""
        method = self.sampling.method.rehearsed()
        iterations = getattr(method, "iterations", 1)
        few = [method.with_iterations(1), method.with_iterations(2)] if iterations > 1 else [method]
        one, *two = (self._counts_of(each, *key) for each in few)
        for kind, count in (two[0] - one if two else Counter()).items():
            one[kind] += count * (iterations - 1)
        return one + Counter(call=key[0])

    def _counts_of(self, method: SamplingMethod, images: int, classes: int, output_type: str) -> Counter[str]:
        pipe = stand_in_pipeline(self.pipe, max(2, classes))
        sampling = dataclasses.replace(self.sampling, method=method)
        labels = [index % classes for index in range(images)]
        with FreeConvolutions():
            targets = stand_in_targets(pipe, method, features=self._specs, embedding_dim=8)
            call = pipe.start_call(labels, targets, sampling, output_type=output_type)
            pipe.draw(call, output_type)
        return call.counts

    def unit(self, unit: Unit, *, last: bool, population: int = 0) -> Counter[str]:
        """Passes of one unit of a run, see [`dsco_hf.concentration.concentrate.plan_units`].

        Args:
            unit (`Unit`): a block of images of some classes.
            last (`bool`): whether it is the last block: the images of all others are embedded for those that follow.
            population (`int`): real images per class, which only some methods pass through a network.
        """
        passes = Counter(self.passes(unit.images, classes=len(unit.rows)))
        passes["extractor"] *= 0 if unit.block else population
        if self.sampling.method.memory is not None and not last:
            passes["embedding"] = unit.images
        return +passes

    @plain_arguments()
    def run(
        self,
        num_classes: int,
        images_per_class: int,
        *,
        block_size: int = BLOCK_SIZE,
        images_per_call: int = IMAGES_PER_CALL,
        population: int = 0,
    ) -> list[tuple[Unit, Counter[str]]]:
        """Units of a whole concentration and their passes; arguments as of `concentrate` and `unit`."""
        units = plan_units(num_classes, images_per_class, block_size=block_size, images_per_call=images_per_call)
        final = units[-1].block
        return [(unit, self.unit(unit, last=unit.block == final, population=population)) for unit in units]


class FreeConvolutions(TorchFunctionMode):
    """Convolutions give zeros of their shape; gradients, which are zeros too, pass."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is not torch.conv2d:
            return function(*args, **(kwargs or {}))
        meta = [part.detach().to("meta") if torch.is_tensor(part) else part for part in args]
        shape = cast(Callable, function)(*meta, **(kwargs or {})).shape
        return args[0].mul(0).sum().expand(shape)


def stand_in_pipeline(pipe: DsCoPipeline, classes: int) -> DsCoPipeline:
    """A pipeline with the components and the scheduler of another, whose networks are next to nothing, on the CPU."""
    small = GeneratorTrainingConfig(num_layers=1, num_attention_heads=1, attention_head_dim=8)
    denoiser = build_denoiser(small, num_classes=classes, sample_size=8, num_channels=1).eval()
    names = {index: str(index) for index in range(classes)}
    sizes = {f"{part}_block_out_channels": (4,) for part in ("encoder", "decoder")}
    sizes |= {f"num_{part}_blocks": (1,) for part in ("encoder", "decoder")}
    parts: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        if pipe.vae is not None:
            parts["vae"] = AutoencoderTiny(1, 1, latent_channels=1, **sizes).eval()
        if pipe.preview_vae is not None:
            parts["preview_vae"] = AutoencoderTiny(1, 1, latent_channels=1, **sizes).eval()
        for name in ("classifier", "classifier_2"):
            if getattr(pipe, name) is not None:
                config = ConvNetConfig(depth=1, width=2, image_size=8, num_channels=1, id2label=names)
                parts[name] = ConvNetForImageClassification(config).eval()
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    found: Any = DsCoPipeline(denoiser, scheduler, id2label=names, **parts)
    found.predict_noise = lambda latents, *_: latents
    found.decode_latents = lambda latents, preview=False: latents
    return found


def stand_in_targets(
    pipe: DsCoPipeline, method: SamplingMethod | None = None, *, features: Features = None, embedding_dim: int = 2048
) -> Targets | None:
    """Targets of the right shapes for all of a pipeline's classes, without data: their values change no cost.

    Args:
        pipe (`DsCoPipeline`): its networks give the features.
        method ([`SamplingMethod`], *optional*): that takes them; [`NOpt`] with its default objective if None.
        features (*optional*): what they match, see [`dsco_hf.matching.feature_spec.features_of`].
        embedding_dim (`int`): D.

    Returns:
        [`MatchingTargets`], or what the method itself has as a stand-in; None where nothing is matched.
    """
    method = method or Sampling().method
    if len(takers := method.takers) > 1:
        sizes: dict[str, Any] = {"features": features, "embedding_dim": embedding_dim}
        return JointTargets({name: stand_in_targets(pipe, part, **sizes) for name, part in takers.items()})
    method = next(iter(takers.values()), method)
    own = method.stand_in_targets(pipe)
    if own is not None or method.without_targets() == method:
        return own
    classes, generator = range(pipe.num_classes), torch.Generator().manual_seed(0)
    names = [pipe.id2label.get(index, str(index)) for index in classes]
    specs = features_of(pipe, features)
    probe = torch.cat(FeatureSource(pipe, specs).probe(), dim=1)
    size = probe.shape[1]
    return MatchingTargets(
        class_names=names,
        class_labels=list(classes),
        embeddings=torch.zeros(len(classes), embedding_dim),
        counts=torch.ones(len(classes)),
        feature_mean=torch.zeros(size),
        feature_std=torch.ones(size),
        frequencies=draw_frequencies(size, embedding_dim, 1.0, generator=generator),
        bandwidth=1.0,
        probe=probe,
        features=specs,
        second_moment=torch.eye(embedding_dim) if method.second_moment else None,
    )


@plain_arguments()
def predict(
    rehearsal: Rehearsal,
    num_classes: int,
    images_per_class: int,
    *,
    costs: Mapping[str, PassCost],
    seconds: Mapping[str, float],
    num_processes: Sequence[int] = (1,),
    **sizes: int,
) -> Prediction:
    """Predicts a concentration.

    Args:
        rehearsal ([`Rehearsal`]): of the pipeline and how images are drawn.
        num_classes (`int`): classes that are drawn.
        images_per_class (`int`): the budget.
        costs (`dict[str, PassCost]`): from [`pass_costs`].
        seconds (`dict[str, float]`): of one image's pass by kind, measured or from [`assumed_seconds`].
        num_processes (sequence of `int`): each has a device of its own. The slowest process's share counts, as runs
            divide it.
        sizes (`int`): `block_size`, `images_per_call` and `population`, see [`Rehearsal.run`].

    Raises:
        ValueError: for a number below 1.
    """
    total: Counter[str] = Counter()
    by_group: dict[int, float] = defaultdict(float)
    found, sampling = rehearsal.run(num_classes, images_per_class, **sizes), rehearsal.sampling
    for unit, passes in found:
        total += passes
        by_group[unit.group] += weighted(passes, seconds)
    units = [unit for unit, _ in found]
    shares = {count: divide(units, count) for count in num_processes}
    return Prediction(
        images_per_class=images_per_class,
        images=num_classes * images_per_class,
        passes=dict(total),
        flops=weighted(total, {kind: cost.flops for kind, cost in costs.items()}),
        memory_bytes=predict_memory(
            rehearsal.pipe,
            max(unit.images for unit in units) * sampling.method.candidates,
            costs,
            optimised=takes_gradients(total),
            guidance_scale=sampling.guidance_scale,
            batch_size=sampling.batch_size,
        ),
        seconds={
            count: max(sum(by_group[group] for group in share) for share in shares[count]) for count in num_processes
        },
    )


def synthesis_flops(
    pipe: DsCoPipeline,
    sampling: Sampling,
    num_classes: int,
    images_per_class: int,
    *,
    costs: Mapping[str, PassCost],
    features: Features = None,
    **sizes: int,
) -> float:
    """FLOPs of drawing a set, of matrix multiplications and convolutions; a multiply-add is 2.

    Args:
        pipe (`DsCoPipeline`): as of [`Rehearsal`]; it may be one of shapes only, on "meta".
        sampling ([`Sampling`]): how images are drawn.
        num_classes (`int`): classes that are drawn.
        images_per_class (`int`): the budget.
        features (*optional*): as of [`Rehearsal`].
        costs (`dict[str, PassCost]`): from [`pass_costs`].
        sizes (`int`): `block_size` and `images_per_call`.
    """
    units = Rehearsal(pipe, sampling, features).run(num_classes, images_per_class, **sizes)
    rates = {kind: cost.flops for kind, cost in costs.items()}
    return sum(weighted(passes, rates) for _, passes in units)


def takes_gradients(passes: Mapping[str, int]) -> bool:
    """Whether gradients are taken through a decoder and a network, which need the memory of both."""
    return any(passes.get(kind, 0) > 0 for kind in ("classifier_backward", "surrogate_backward"))


def weighted(passes: Mapping[str, int], rates: Mapping[str, float]) -> float:
    """Sum over kinds of passes times what one costs."""
    return sum(count * rates.get(kind, 0.0) for kind, count in passes.items())


def assumed_seconds(costs: Mapping[str, PassCost], *, peak_tflops: float, utilisation: float) -> dict[str, float]:
    """Seconds of one image's pass on a device of which a constant share of the peak rate is used.

    Args:
        costs (`dict[str, PassCost]`): from [`pass_costs`].
        peak_tflops (`float`): of matrix multiplications in the models' precision, 10¹² operations per second.
        utilisation (`float`): the share that is reached, in (0, 1].

    Raises:
        ValueError: for a rate or a share out of range.
    """
    if not (peak_tflops > 0 and math.isfinite(peak_tflops)):
        raise ValueError(f"`peak_tflops` must be a positive number, got {peak_tflops!r}: 312 is that of an A100.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"`utilisation` must be in (0, 1], got {utilisation!r}: 0.4 is usual.")
    return {kind: cost.flops / (peak_tflops * 1e12 * utilisation) for kind, cost in costs.items()}
