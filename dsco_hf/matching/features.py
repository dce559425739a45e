"""φ: what a frozen image classifier of transformers sees: pooled features, differentiable."""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data.images import to_signed
from ..data.schema import nearest
from ..evaluators.preprocessing import preprocess


if TYPE_CHECKING:
    from transformers.utils import ModelOutput

POOLINGS = ("average", "grid2", "mean_std", "cls")
DEFAULT_LAYERS = (("pooled", "average"),)

_HIDDEN = re.compile(r"hidden_\d+")
SEEDING = threading.Lock()  # weights are drawn with the random state that all threads share
_PASSES = threading.Lock()  # a pass is seen through hooks of the network, which would see another thread's pass, too


def classification_head(classifier: PreTrainedModel) -> nn.Linear:
    """The linear layer that maps pooled features to logits: the last `nn.Linear` with one output per class."""
    num_labels = classifier.config.num_labels
    heads = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m.out_features == num_labels]
    if not heads:
        raise ValueError(
            f"{type(classifier).__name__} has no linear layer with {num_labels} outputs (config.num_labels), so its "
            "pooled features cannot be found. Pass a model for image classification with a linear head."
        )
    return heads[-1]


def feature_dim(classifier: PreTrainedModel) -> int:
    """d, the dimension of a classifier's pooled features."""
    return classification_head(classifier).in_features


class Observation(NamedTuple):
    """What a classifier sees, per image.

    Attributes:
        features (`torch.Tensor` of shape `(B, d)`): pooled features φ(x), float32.
        logits (`torch.Tensor` of shape `(B, num_labels)`): float32.
        moments (`torch.Tensor` of shape `(B, M, 2)`): mean and mean square over space of the inputs to all BatchNorm
            layers, M channels together; M = 0 if there are none or they were not asked for.
    """

    features: torch.Tensor
    logits: torch.Tensor
    moments: torch.Tensor


def batchnorm_layers(classifier: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that remember statistics of the training images."""
    layers = [m for m in classifier.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]


def observe(
    classifier: PreTrainedModel,
    pixels: torch.Tensor,
    *,
    moments: bool = False,
    layers: Sequence[tuple[str, str]] = DEFAULT_LAYERS,
) -> Observation:
    """One forward pass; gradients reach the pixels.

    φ is by default the input of the classifier's linear head, which is the pooled feature of every image classifier in
    transformers (ResNet, ConvNeXt, ViT, Swin, MobileNet, …), whatever its parts are called.

    Args:
        classifier (`PreTrainedModel`): in eval mode.
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, range [-1, 1]): the images.
        moments (`bool`): also record the moments at the BatchNorm layers.
        layers (sequence of `(layer, pooling)`): what φ consists of, one after the other; see [`observe_layers`].
    """
    # resized in float32: on CPU there is no antialiased resizing in half precision
    pixels = pixels.float() if pixels.dtype in (torch.float16, torch.bfloat16) else pixels
    inputs = preprocess(pixels, classifier).to(classifier.dtype)
    blocks, logits, seen = observe_layers(classifier, inputs, layers, moments=moments)
    return Observation(torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0], logits, seen)


def observe_layers(
    classifier: PreTrainedModel,
    inputs: torch.Tensor,
    layers: Sequence[tuple[str, str]],
    *,
    moments: bool = False,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """One forward pass of a classifier's own input, pooled at several layers.

    Args:
        classifier (`PreTrainedModel`): in eval mode.
        inputs (`torch.Tensor` of shape `(B, C, H, W)`): its `pixel_values`.
        layers (sequence of `(layer, pooling)`): a layer is "pooled" (the input of the linear head), "logits",
            "hidden_0", "hidden_1", … (the `hidden_states` of transformers) or the name of a module, whose output is
            taken; a pooling is one of `POOLINGS`, see [`pool`].
        moments (`bool`): also record the moments at the BatchNorm layers.

    Returns:
        `tuple`: features `(B, d_l)` of every entry, float32; logits `(B, num_labels)`, float32; moments `(B, M, 2)`,
            see [`Observation`].

    Raises:
        ValueError: for a layer that the classifier does not have, or a pooling that does not fit it.
    """
    found: dict[str, torch.Tensor] = {}
    seen: list[torch.Tensor] = []

    def record(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].float()
        x = x.flatten(2) if x.ndim > 2 else x[:, :, None]  # (B, M_l, HW)
        seen.append(torch.stack([x.mean(dim=2), x.square().mean(dim=2)], dim=2))

    def keep(name: str) -> Callable:
        return lambda _, __, output: found.update({name: _first_tensor(output)})

    head = classification_head(classifier)
    names = {layer for layer, _ in layers}
    modules = {name: _module(classifier, name) for name in names if not _is_reserved(name)}
    states = any(_HIDDEN.fullmatch(name) for name in names)
    with _PASSES, contextlib.ExitStack() as hooks:
        handles = [head.register_forward_pre_hook(lambda _, given: found.update(pooled=given[0].flatten(1)))]
        handles += [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        if moments:
            handles += [layer.register_forward_pre_hook(record) for layer in batchnorm_layers(classifier)]
        for handle in handles:
            hooks.callback(handle.remove)
        output = classifier(inputs, **({"output_hidden_states": True} if states else {}))
    logits = output.logits.float()
    found["logits"] = logits
    found |= _hidden_states(classifier, output) if states else {}
    blocks = []
    for name, pooling in layers:
        if name not in found:
            raise unknown_layer(name, classifier, found)
        blocks.append(pool(found[name].float(), pooling, layer=name, grid=(inputs.shape[-2], inputs.shape[-1])))
    return blocks, logits, torch.cat(seen, dim=1) if seen else logits.new_zeros(len(logits), 0, 2)


def layer_names(classifier: PreTrainedModel) -> list[str]:
    """A classifier's layers but its hidden states, which take a pass to count: "pooled", "logits" and its modules."""
    return ["pooled", "logits"] + [name for name, _ in classifier.named_modules() if name]


def check_layer(classifier: PreTrainedModel, layer: str) -> None:
    """Raises ValueError for a layer name that cannot be one of the classifier's; hidden states are counted later."""
    if not _is_reserved(layer):
        _module(classifier, layer)


def unknown_layer(layer: str, classifier: PreTrainedModel, found: Iterable[str] = ()) -> ValueError:
    """The error for a layer that a classifier does not have: it lists those that there are."""
    names = layer_names(classifier)
    states = [name for name in found if _HIDDEN.fullmatch(name)] or ['"hidden_0" and on, if it returns hidden states']
    modules = [name for name in names[2:] if name.count(".") <= 2 and not name.startswith(("classifier", "dropout"))]
    return ValueError(
        f"{type(classifier).__name__} has no layer {layer!r}.{nearest(layer, [*names, *found])} It has 'pooled', "
        f"'logits', {', '.join(states)}, and its modules: {', '.join(modules[:20])}{', …' * (len(modules) > 20)}."
    )


def pool(hidden: torch.Tensor, pooling: str, *, layer: str, grid: tuple[int, int]) -> torch.Tensor:
    """What is kept of the positions of a layer: `(B, C, h, w)` maps or `(B, N, C)` tokens → `(B, d)`.

    Vectors `(B, d)` are left as they are. Poolings: "average" over positions (without class tokens), d = C; "grid2",
    the averages of the four quarters, d = 4 C; "mean_std", mean and standard deviation over positions, d = 2 C; "cls",
    the class token, d = C.

    Args:
        hidden (`torch.Tensor`): the output of a layer.
        pooling (`str`): one of `POOLINGS`.
        layer (`str`): its name, for errors.
        grid (`tuple[int, int]`): height and width of the classifier's input, to whose shape tokens are laid out.

    Raises:
        ValueError: for a pooling that does not fit the layer.
    """
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim not in (3, 4):
        raise ValueError(f"Layer {layer!r} has shape {tuple(hidden.shape)}: choose one with tokens or feature maps.")
    if hidden.ndim == 3:
        extra, size = _token_grid(hidden.shape[1], grid)
        if pooling == "cls":
            if not extra:
                raise ValueError(
                    f"pooling='cls' takes the class token, and layer {layer!r} has none among its {hidden.shape[1]} "
                    "tokens: choose 'average', 'mean_std' or 'grid2'."
                )
            return hidden[:, 0]
        hidden = hidden[:, extra:].transpose(1, 2).unflatten(2, size)
    elif pooling == "cls":
        raise ValueError(
            f"pooling='cls' takes the class token of a vision transformer, and layer {layer!r} is a feature map: "
            "choose 'average', 'mean_std' or 'grid2'."
        )
    if pooling == "mean_std":
        flat = hidden.flatten(2)
        return torch.cat([flat.mean(dim=2), (flat.var(dim=2, unbiased=False) + 1e-6).sqrt()], dim=1)
    if pooling == "grid2":
        if min(hidden.shape[-2:]) < 2:
            raise ValueError(
                f"pooling='grid2' needs a map of at least 2x2 positions, and layer {layer!r} has "
                f"{hidden.shape[-2]}x{hidden.shape[-1]}: choose 'average' or an earlier layer."
            )
        return F.adaptive_avg_pool2d(hidden, 2).flatten(1)
    return hidden.mean(dim=(2, 3))


def _token_grid(count: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Tokens that stand before the patches (class, distillation, registers), and the patches' height and width."""
    for extra in range(min(count, 9)):
        h = round(math.sqrt((count - extra) * size[0] / size[1]))
        if h and (count - extra) % h == 0 and h * size[1] == (count - extra) // h * size[0]:
            return extra, (h, (count - extra) // h)
    return 0, (1, count)


def _hidden_states(classifier: PreTrainedModel, output: ModelOutput) -> dict[str, torch.Tensor]:
    states = output.get("reshaped_hidden_states") or output.get("hidden_states")
    if not states:
        modules = [name for name in layer_names(classifier)[2:] if name.count(".") <= 2]
        raise ValueError(
            f"{type(classifier).__name__} returns no hidden states: choose 'pooled', 'logits' or one of its modules, "
            f"{', '.join(modules[:20])}{', …' * (len(modules) > 20)}."
        )
    return {f"hidden_{i}": state for i, state in enumerate(states)}


def _is_reserved(layer: str) -> bool:
    return layer in ("pooled", "logits") or _HIDDEN.fullmatch(layer) is not None


def _module(classifier: PreTrainedModel, name: str) -> nn.Module:
    modules = dict(classifier.named_modules())
    if not name or name not in modules:
        raise unknown_layer(name, classifier)
    return modules[name]


def _first_tensor(output: ModelOutput | tuple | torch.Tensor) -> torch.Tensor:
    """The main tensor that a module returned; models return it first in a tuple or an output object."""
    while not torch.is_tensor(output):
        output = output[0]
    return output


def features_and_logits(classifier: PreTrainedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(x) `(B, d)` and logits `(B, num_labels)` of pixels `(B, C, H, W)` in [-1, 1], see [`observe`]."""
    seen = observe(classifier, pixels)
    return seen.features, seen.logits


@torch.no_grad()
def probe_features(classifier: PreTrainedModel) -> torch.Tensor:
    """Features of two fixed noise images: they tell two classifiers apart, whatever the device or precision.

    Returns:
        `torch.Tensor` of shape `(2, d)`, float32 on CPU. Compare with a tolerance of some percent.
    """
    parameter = next(classifier.parameters())
    channels = getattr(classifier.config, "num_channels", 3)
    pixels = to_signed(torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(0)))
    return features_and_logits(classifier, pixels.to(parameter.device))[0].cpu()


def check_probe(found: Sequence[torch.Tensor], expected: torch.Tensor, made_with: str) -> None:
    """Refuses networks other than those that targets were made with.

    Args:
        found (sequence of `torch.Tensor` of shape `(2, d_l)`): the probe layer by layer, see [`FeatureSource.probe`].
        expected (`torch.Tensor` of shape `(2, d)`): that of the targets.
        made_with (`str`): what they were made with, for the error.

    Raises:
        ValueError: if the feature sizes differ, or the features seen in the probe images.
    """
    size = sum(block.shape[1] for block in found)
    if size != expected.shape[1]:
        raise ValueError(
            f"The pipeline's classifier gives {size} features, the targets are for {expected.shape[1]}: they were "
            f"made with another classifier ({made_with}). Load that one or make new targets."
        )
    for block, wanted in zip(found, expected.cpu().split([block.shape[1] for block in found], dim=1), strict=True):
        # bfloat16 features differ by about 1 %; another training of the same architecture by far more than 10 %
        if not (block - wanted).norm() <= 0.1 * wanted.norm() + 1e-6:
            raise ValueError(
                "The pipeline's classifier is not the one that the targets were made with: it has the same feature "
                f"size but sees other features. They were made with {made_with}. Load that one or make new targets."
            )


def check_finite(features: torch.Tensor, where: str) -> None:
    """Raises ValueError for features `(B, d)` that are not finite; `where` says which images they are of."""
    bad = (~features.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"The classifier's features are not finite for {len(bad)} of {len(features)} images ({where}; the first "
            f"is number {int(bad[0])} of the batch). Check its weights, or load it with `dtype=torch.float32`."
        )


class RandomExtractor(nn.Module):
    """The random, untrained, frozen network of the released objective: latents `(B, C, H, W)` → features `(B, 2048)`.

    Conv 3x3 to 256 channels, then three grouped (16) 4x4 convolutions of stride 2 to 512, 1024 and 2048 channels,
    LeakyReLU in between, averaged over space.

    Args:
        in_channels (`int`): C.
        seed (`int`): of the weights; the global random state is left as it is.
    """

    def __init__(self, in_channels: int, *, seed: int = 0) -> None:
        super().__init__()
        with SEEDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(in_channels, 256, 3, padding=1),
                nn.LeakyReLU(),
                nn.Conv2d(256, 512, 4, stride=2, padding=1, groups=16),
                nn.LeakyReLU(),
                nn.Conv2d(512, 1024, 4, stride=2, padding=1, groups=16),
                nn.LeakyReLU(),
                nn.Conv2d(1024, 2048, 4, stride=2, padding=1, groups=16),
            )
        self.requires_grad_(False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Features `(B, 2048)` of latents `(B, C, H, W)` with H and W of at least 8."""
        return self.layers(latents).mean(dim=(-2, -1))
