"""IGD: images move to where a network's gradient is that of their real class, and away from each other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ...evaluators.batches import ImageSet
from ...evaluators.configurations import InstanceNorm
from ...evaluators.models import build_evaluator, resolve_architecture
from ...evaluators.preprocessing import preprocess
from ...evaluators.protocols import Protocol
from ...evaluators.training import Execution, train_evaluator
from ...generators.steps import split
from ...matching.features import SEEDING
from ...matching.population import refuse_empty_classes
from ...utils.values import Limits
from ..call import Call, Population, Sampling, SamplingMethod
from .statistics import (
    MOST_IMAGES,
    ClassStatistics,
    Sample,
    check_statistics,
    refuse_without_images,
    stand_in,
    stream_classes,
)


INFLUENCE = 0.0015  # their factor of the influence's length
PUBLISHED_SIZE = 4 * 32 * 32  # values of the latents that their γ is for
MOST_EARLIER = 64
AT_ONCE = 64  # real images, for their mean gradient


@dataclasses.dataclass(frozen=True)
class IGD(SamplingMethod):
    """Influence-guided diffusion (Chen et al., "Influence-Guided Diffusion for Dataset Distillation", ICLR 2025).

    A network is trained on the real images, and kept at a few epochs. In the middle steps x_{t-1} moves by
    -k·ρ_t·g - γ·d. The influence g is the gradient, to x_t, of Σ 1 - cos(∇CE(decode(x̂0)), G_c) over these epochs, ∇
    being to the network's parameters and G_c the mean of ∇ over real images of the class; its length is that of
    ρ_t = 0.0015·√(1 - ᾱ_t)·rms(ε̂) / rms(g). The deviation d is the gradient of the cosine between x_t and the closest
    earlier image of the class, of up to 64.

    Otherwise than published: the images of a block are guided together, and the x̂0 of those before an image stand for
    its finished earlier ones (an image of another block is not looked at); ε̂ is held fixed within x̂0, where theirs
    takes the gradient through the denoiser too; γ is for latents of 4 x 32 x 32 values, and grows in proportion to
    their number; the preview decoder, where there is one, takes the VAE's place. The network sees up to 1,000 images
    of a class without augmentation, and is kept at the epochs (s / (S - 1))²·E: 0, 4, 18 and 40, where theirs are 0,
    5, 16 and 40 of 50 on ImageWoof, found by how far gradients turn. Guidance scale and steps are those of
    [`Sampling`], theirs being 4 and 50; where a step adds no noise (`eta=0`) nothing moves.

    Its targets hold a number for each class, checkpoint and parameter, and the pass keeps its images in memory.

    Attributes:
        scale (`float`): k.
        deviation (`float`): γ.
        checkpoints (`int`): S; the first is the untrained network.
        epochs (`int`): E.
        architecture (`str`, *optional*): of the network, an evaluator's; if None the ConvNet whose last map has 4 x 4
            values, of at least 3 blocks, which is theirs at 256 pixels (ConvNet-6).
        images (`int`): real images of a class, at most, whose gradient is matched.
        start (`float`), stop (`float`): where it begins and ends, as fractions of the steps; theirs are k = 45, …, 30
            of 49, …, 0.
    """

    sentence: ClassVar[str] = (
        "The sampling of a frozen class-conditional diffusion model was guided to images whose influence on the "
        "training of a network is that of their real classes, and which differ from each other."
    )
    targets_class: ClassVar[type | None] = ClassStatistics
    statistics: ClassVar[str] = "gradients"
    scale: float = 5.0
    deviation: float = 120.0
    checkpoints: int = 4
    epochs: int = 40
    architecture: str | None = None
    images: int = 200
    start: float = 0.08
    stop: float = 0.4

    field_limits = {
        **{"scale": 0, "deviation": 0, "checkpoints": 1, "epochs": 1, "images": 1},
        **{"start": Limits(0, 1), "stop": Limits(0, 1)},
    }

    def __post_init__(self) -> None:
        """Refuses numbers out of range, and architectures that do not exist."""
        super().__post_init__()
        if self.architecture is not None:
            resolve_architecture(self.architecture)

    def network(self, pipe: DiffusionPipeline, names: Sequence[str], seed: int = 0) -> PreTrainedModel:
        """The untrained network for these classes, in train mode."""
        found = self.architecture or convnet_of(pipe.image_size)
        size = {"image_size": pipe.image_size, "num_channels": pipe.num_channels}
        with SEEDING:
            return build_evaluator(found, class_names=names, seed=seed, **size)

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError for anything but gradients of this network at as many epochs."""
        check_statistics(self.name, "gradients", targets, {"gradients": (None, None)})
        assert isinstance(targets, ClassStatistics)
        found = tuple(targets.tensors["gradients"].shape[1:])
        names = (self.architecture or convnet_of(pipe.image_size), len(targets.class_names), pipe.image_size)
        wanted = (self.checkpoints, count_parameters(*names, pipe.num_channels))
        if found != wanted or not targets.shared:
            raise ValueError(
                f"These targets have gradients of {found[0]} checkpoints to {found[1]:,} parameters, and "
                f"{wanted[0]} to {wanted[1]:,} are needed, those of a {names[0]} for {names[1]} classes and images of "
                f"{names[2]} pixels: make them with this pipeline and method."
            )

    def stand_in_targets(self, pipe: DiffusionPipeline) -> ClassStatistics:
        """Untrained networks, and ones."""
        names = [str(index) for index in range(max(2, pipe.num_classes))]
        state = weights_of(self.network(pipe, names))
        count = sum(state[name].numel() for name in parameter_names(self.network(pipe, names)))
        made = stand_in(pipe, "gradients", {"gradients": torch.ones(pipe.num_classes, self.checkpoints, count)})
        made.shared = {name: torch.stack([value] * self.checkpoints) for name, value in state.items()}
        return made

    def rehearsed(self) -> SamplingMethod:
        """Without a network."""
        return _Rehearsed(**vars(self))

    def own_passes(
        self, pipe: DiffusionPipeline
    ) -> tuple[nn.Module, dict[str, Callable[[torch.Tensor], torch.Tensor]]]:
        """A gradient to the weights, and the mismatch of one to another."""
        names = [str(index) for index in range(max(2, pipe.num_classes))]
        network = with_plain_norms(self.network(pipe, names)).to(pipe.denoiser.device)
        state = {name: value.float() for name, value in network.state_dict().items()}

        def train(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return parameter_gradient(network, state, preprocess(x.float(), network), x.new_zeros(1).long())

        def match(x: torch.Tensor) -> torch.Tensor:
            wanted = torch.ones(sum(value.numel() for value in network.parameters()), device=x.device)
            return mismatch(network, state, preprocess(x.float(), network), x.new_zeros(1).long(), wanted)

        return network, {"surrogate": train, "surrogate_backward": match}

    @torch.enable_grad()
    def make_targets(
        self, pipe: DiffusionPipeline, given: Population, sampling: Sampling, *, seed: int = 0, **options: Any
    ) -> ClassStatistics:
        """Trains the network, and takes the mean gradients; arguments as of [`SamplingMethod.make_targets`].

        Raises:
            ValueError: for classes without images, or fewer than two classes.
        """
        refuse_without_images(self.name, given)
        found, images, read = sample_pixels(given, pipe, max(MOST_IMAGES, self.images), seed=seed, **options)
        network = self.network(pipe, found.class_names, seed)
        plain = with_plain_norms(self.network(pipe, found.class_names)).to(pipe._execution_device)
        labels = torch.tensor([row for row, one in enumerate(images) for _ in one])
        training = ImageSet(torch.cat(images), labels, tuple(found.class_names))
        epochs = epochs_kept(self.checkpoints, self.epochs)
        shown = {name: options[name] for name in ("accelerator", "progress") if name in options}
        found.shared = train_and_keep(network, training, epochs, seed=seed, **shown)
        states = states_of(found.shared, self.checkpoints, pipe._execution_device)
        matched = [one[: self.images].to(pipe._execution_device) for one in images]
        means = [
            torch.stack([mean_gradient(plain, state, one, row) for state in states]) for row, one in enumerate(matched)
        ]
        found.kind, found.tensors = "gradients", {"gradients": torch.stack(means).cpu()}
        passes = len(labels) * max(epochs) + self.checkpoints * sum(map(len, matched))
        found.provenance |= {"images": read, "passes": {"surrogate": passes}, "epochs": epochs}
        return found

    def prepare(self, call: Call) -> None:
        """Finds each image's row `(B,)` of the targets, and the network with its weights at each epoch."""
        device = call.labels.device
        network = with_plain_norms(self.network(call.pipe, call.targets.class_names)).to(device)
        states = states_of(call.targets.shared, self.checkpoints, device)
        call.state = call.targets.rows_of(call.ids).to(device), network, states

    def noise(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Z `(B, C, h, w)` and what x_{t-1} moves by, in units of σ_t: the step multiplies it with that."""
        steps, sigma = len(call.timesteps), call.sigma(i)
        if not round(self.start * steps) <= i < round(self.stop * steps) or sigma == 0:
            return noise
        weight = self.deviation * latents[0].numel() / PUBLISHED_SIZE
        move = weight * towards_closest(latents, call.clean(i, latents, noise_pred), call.labels)
        if self.scale > 0:
            level, places = call.steps.starts[i], torch.arange(len(latents), device=latents.device)
            predicted = split(call.steps.kind, level, latents, noise_pred)[1]
            parts = places.split(call.batch_size)
            found = torch.cat([self.influence(call, i, latents[part], noise_pred[part], part) for part in parts])
            unit = found / rms(found).clamp_min(torch.finfo(found.dtype).tiny)
            move = move + self.scale * INFLUENCE * level.sigma.to(latents) * rms(predicted) * unit
        return noise - move / sigma

    def influence(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """The gradient g `(b, C, h, w)` of the images at `rows` `(b,)` of the call; ε̂ is held fixed."""
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_(True)
            pixels = call.decode(call.clean(i, leaf, noise_pred), preview=True)
            call.passed("surrogate", len(pixels) * self.checkpoints)
            upstream = self.pixel_gradient(call, pixels.detach(), rows)
            (gradient,) = torch.autograd.grad(pixels, leaf, upstream)
        return gradient

    def pixel_gradient(self, call: Call, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The gradient of the mismatch to pixels `(b, C, H, W)`: one image after another, at one epoch at a time."""
        labels, network, states = call.state
        found = torch.zeros_like(pixels)
        for place, label in enumerate(labels[rows]):
            wanted = call.targets.tensors["gradients"][int(label)].to(pixels.device)
            for state, mean in zip(states, wanted, strict=True):
                leaf = pixels[place : place + 1].float().requires_grad_(True)
                loss = mismatch(network, state, preprocess(leaf, network), label[None], mean)
                found[place] += torch.autograd.grad(loss, leaf)[0][0].to(found.dtype)
        return found


class _Rehearsed(IGD):
    """The same passes, which are counted, without a network."""

    name: ClassVar[str] = "igd:rehearsed"

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        pass

    def stand_in_targets(self, pipe: DiffusionPipeline) -> ClassStatistics:
        return stand_in(pipe, "gradients", {})

    def prepare(self, call: Call) -> None:
        pass

    def pixel_gradient(self, call: Call, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(pixels)


def convnet_of(image_size: int) -> str:
    """The ConvNet, of at least 3 blocks, whose last map has 4 x 4 values: `convnet-3` at 32 pixels, -6 at 256."""
    return f"convnet-{max(3, int(math.log2(image_size)) - 2)}"


@functools.lru_cache(maxsize=16)
def count_parameters(architecture: str, classes: int, image_size: int, num_channels: int) -> int:
    """Numbers that such a network learns."""
    names = [str(index) for index in range(classes)]
    with SEEDING:
        network = build_evaluator(
            architecture, class_names=names, image_size=image_size, num_channels=num_channels, seed=0
        )
    return sum(part.numel() for part in network.parameters())


def epochs_kept(checkpoints: int, epochs: int) -> list[int]:
    """After which epochs a network is kept, from 0 to the last: (s / (S - 1))²·E."""
    return [round(epochs * (one / max(1, checkpoints - 1)) ** 2) for one in range(checkpoints)]


def sample_pixels(
    given: Dataset | IterableDataset, pipe: DiffusionPipeline, most: int, *, seed: int, **options: Any
) -> tuple[ClassStatistics, list[torch.Tensor], int]:
    """Reads a dataset once and keeps up to `most` images of each class, in the order of keys that `seed` mixes.

    Returns:
        `tuple`: statistics without tensors; of each class pixels `(n_c, C, H, W)` in [-1, 1]; and how many were read.

    Raises:
        ValueError: for a class without an image, and as [`~dsco_hf.sampling.peers.statistics.stream_classes`] does.
    """
    found, batches = stream_classes(given, pipe, seed=seed, **options)
    sample, read = Sample(len(found.class_names), most, seed), 0
    for batch in batches:
        read += len(batch.labels)
        stays = sample.may_stay(batch.labels, batch.keys)
        if stays.any():
            sample.add(batch.pixels[stays], batch.labels[stays], batch.keys[stays])
    refuse_empty_classes([len(one) for one in sample.values], found.class_names)
    return found, sample.values, read


def train_and_keep(
    network: PreTrainedModel,
    images: ImageSet,
    epochs: Sequence[int],
    *,
    seed: int,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Trains a network by this process alone, and gives its weights `(S, ...)` after S epochs, by name.

    Theirs is trained by SGD with momentum and a constant rate; the numbers are those of the Minimax protocol.

    Args:
        network (`PreTrainedModel`): is changed.
        images ([`ImageSet`]): that it is trained on.
        epochs (sequence of `int`): after which it is kept, ascending; 0 is as it is given.
        seed (`int`): of the order of the images.
        accelerator (`Accelerator`, *optional*): gives the device.
        progress (`bool`): show a progress bar.
    """
    kept = {0: weights_of(network)}

    def keep(metrics: Mapping[str, float]) -> None:
        epoch = int(metrics["epoch"])
        kept.update({epoch: weights_of(network)} if epoch in epochs else {})

    if max(epochs) > 0:
        protocol = Protocol(
            name="igd", source="github.com/mchen725/DD_IGD train_ckpt.sh, without augmentation", epochs=max(epochs),
            batch_size=64, optimizer="sgd", learning_rate=0.01, weight_decay=5e-4, schedule="constant",
        )  # fmt: skip
        execution = Execution() if accelerator is None else Execution(accelerator)
        train_evaluator(
            network, images, protocol=protocol, seed=seed, execution=execution, on_epoch=keep, progress=progress
        )
    return {name: torch.stack([kept[epoch][name] for epoch in epochs]) for name in kept[0]}


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and statistics of a network by name, on the CPU, as they are now."""
    state = {name: value.detach() for name, value in network.state_dict().items() if value.is_floating_point()}
    return {name: value.to("cpu", memory_format=torch.contiguous_format, copy=True) for name, value in state.items()}


def states_of(
    shared: Mapping[str, torch.Tensor], checkpoints: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """The weights of each checkpoint by name, of those of all together `(S, ...)`."""
    return [{name: value[one].to(device) for name, value in shared.items()} for one in range(checkpoints)]


def parameter_names(network: nn.Module) -> list[str]:
    """In the order in which gradients are laid out."""
    return [name for name, _ in network.named_parameters()]


def with_plain_norms(network: PreTrainedModel) -> PreTrainedModel:
    """The network, frozen, with PyTorch's instance norm: that of evaluators can be differentiated once only."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, InstanceNorm):
                parent.register_module(name, nn.GroupNorm(child.num_groups, child.num_channels, child.eps))
    return network.eval().requires_grad_(False)


def parameter_gradient(
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    twice: bool = False,
) -> torch.Tensor:
    """∇ of the mean cross entropy to all parameters, `(P,)`, one after the other.

    Args:
        network (`nn.Module`): whose output has `logits`.
        state (mapping): its weights, which take the place of its own.
        inputs (`torch.Tensor` of shape `(B, ...)`): what it takes.
        labels (`torch.Tensor` of shape `(B,)`): the class of each.
        twice (`bool`): whether gradients are to reach the inputs through it.
    """
    leaves = {name: state[name].detach().requires_grad_(True) for name in parameter_names(network)}
    logits = functional_call(network, {**state, **leaves}, (inputs,)).logits.float()
    loss = nn.functional.cross_entropy(logits, labels)
    found = torch.autograd.grad(loss, list(leaves.values()), create_graph=twice)
    return torch.cat([one.flatten() for one in found])


def mismatch(
    network: nn.Module,
    state: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    label: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """1 - cos of the gradient of one image `(1, ...)` and a wanted one `(P,)`, a scalar; gradients reach the image."""
    found = parameter_gradient(network, state, inputs, label, twice=True)
    return 1 - torch.cosine_similarity(found, wanted, dim=0)


def mean_gradient(
    network: PreTrainedModel, state: Mapping[str, torch.Tensor], pixels: torch.Tensor, label: int
) -> torch.Tensor:
    """G_c `(P,)`: the mean of the gradients of pixels `(n, C, H, W)` of one class."""
    total = torch.zeros(())
    for part in pixels.split(AT_ONCE):
        labels = torch.full((len(part),), label, device=part.device)
        found = parameter_gradient(network, state, preprocess(part, network), labels)
        total = total.to(found) + found * (len(part) / len(pixels))
    return total


def towards_closest(latents: torch.Tensor, clean: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient of cos(x, m) to x, m being the closest of the earlier images of the class; 0 for the first.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): x of all images.
        clean (`torch.Tensor` of shape `(B, C, h, w)`): m of all images.
        labels (`torch.Tensor` of shape `(B,)`): their classes. Earlier are those that stand before, up to 64.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`.
    """
    lengths = latents.flatten(1).norm(dim=1, keepdim=True).clamp_min(torch.finfo(latents.dtype).tiny)
    x, m = latents.flatten(1) / lengths, nn.functional.normalize(clean.flatten(1), dim=1)
    cosines, places = x @ m.T, torch.arange(len(x), device=x.device)
    same = labels[:, None] == labels
    rank = (same & (places <= places[:, None])).sum(dim=1)  # of each image within its class, from 1
    gap = rank[:, None] - rank
    earlier = same & (gap > 0) & (gap <= MOST_EARLIER)
    highest, closest = cosines.masked_fill(~earlier, -math.inf).max(dim=1)
    found = (m[closest] - highest[:, None].clamp_min(-1) * x) / lengths
    return torch.where(earlier.any(dim=1, keepdim=True), found, 0.0).view_as(latents)


def rms(values: torch.Tensor) -> torch.Tensor:
    """√ of the mean square of each row of `(B, C, h, w)`, as `(B, 1, 1, 1)`."""
    return values.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
