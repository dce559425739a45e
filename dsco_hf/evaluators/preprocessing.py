"""What the image processor of a classifier makes of an image, as arithmetic that gradients pass through.

The rules are those of transformers' image processors (`transformers/image_processing_backends.py` and the classes of
the single models): crop and resize to a size that depends on the image's, crop the centre, rescale, normalise, turn
the channels around. They are written into the classifier's config, so that they are saved with it, and checked against
the processor itself.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, PreTrainedModel

from ..data.images import to_unit
from ..utils.files import read_json
from ..utils.origins import commit_of
from .augmentation import IMAGENET_MEAN, IMAGENET_STD


if TYPE_CHECKING:
    from transformers import BaseImageProcessor

logger = logging.getLogger(__name__)

IMAGENET_SIZE = 224
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling that PyTorch has, antialiased
_CLASSES = {  # what these do with their `size` and `crop_size` and nobody else does
    "ConvNext": "crop_pct", "PoolFormer": "enlarge", "Levit": "levit", "Perceiver": "crop_first", "TextNet": "divisor",
}  # fmt: skip
_LEVELS = 3.0  # of 255: Pillow rounds to whole levels after each of two passes


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image of levels 0 to 255 becomes `pixel_values`.

    Attributes:
        size (`dict[str, int]`): what it is resized to, as in transformers: "height" and "width", "shortest_edge" (and
            "longest_edge"), or "max_height" and "max_width".
        resample (`int`): filter, of `PIL.Image.Resampling`.
        crop (`list[int]`, *optional*): height and width of the centre that is cut out; black where it is larger.
        rule (`str`): "" or what one family does otherwise: "crop_pct" (ConvNeXt: enlarge and cut out, from 384 pixels
            warp), "enlarge" (PoolFormer: by 1 / crop_pct), "levit" (by 256 / 224), "crop_first" (Perceiver),
            "divisor" (TextNet: up to a multiple).
        crop_pct (`float`): of the first two rules.
        divisor (`int`): of the last one.
        gain, bias (`list[float]`, one per channel): pixel_values = gain · x + bias, x in [-1, 1].
        resize (`bool`): whether it is resized at all.
        flip (`bool`): channels in the order BGR.
    """

    size: dict[str, int]
    resample: int
    crop: list[int] | None
    gain: list[float]
    bias: list[float]
    resize: bool = True
    rule: str = ""
    crop_pct: float = 1.0
    divisor: int = 1
    flip: bool = False

    @classmethod
    def of(cls, processor: BaseImageProcessor, channels: int = 3) -> Preprocessing:
        """That of an image processor of transformers; AttributeError or TypeError for one of another kind."""
        name = type(processor).__name__
        rule = next((rule for start, rule in _CLASSES.items() if name.startswith(start)), "")
        size = {key: int(value) for key, value in dict(processor.size or {}).items() if value is not None}
        crop = dict(getattr(processor, "crop_size", None) or {})
        resample = getattr(processor, "resample", None)
        gain, bias = _arithmetic(processor, channels)
        return cls(
            size=size,
            resize=bool(getattr(processor, "do_resize", True)),
            resample=2 if resample is None else int(resample),
            crop=[int(crop["height"]), int(crop["width"])]
            if getattr(processor, "do_center_crop", False) and crop
            else None,
            gain=gain,
            bias=bias,
            rule=rule,
            crop_pct=float(getattr(processor, "crop_pct", None) or 1.0),
            divisor=int(getattr(processor, "size_divisor", None) or 1),
            flip=bool(getattr(processor, "do_flip_channel_order", False)),
        )

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, C, H, W)` in [-1, 1] as `pixel_values` `(B, C, h, w)`; differentiable."""
        if self.rule == "crop_first" and self.crop is not None:  # of the image, the share that size is of crop_size
            shorter = min(pixels.shape[-2:])
            wanted = (self.size["height"] / self.crop[0], self.size["width"] / self.crop[1])
            pixels = center_crop(pixels, [int(share * shorter) for share in wanted])
        if self.resize:
            pixels = self._resize(pixels)
        if self.crop is not None and self.rule != "crop_first":
            pixels = center_crop(pixels, self.crop)
        gain, bias = (
            torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)
            for values in (self.gain, self.bias)
        )
        values = pixels * gain + bias
        return values.flip(1) if self.flip else values

    def _resize(self, pixels: torch.Tensor) -> torch.Tensor:
        size, crop = self._sizes(*pixels.shape[-2:])
        if tuple(pixels.shape[-2:]) != size:
            mode = _MODES.get(self.resample, "bicubic")
            options = {} if mode == "nearest-exact" else {"antialias": True}
            pixels = F.interpolate(pixels, size=size, mode=mode, **options)
            pixels = pixels.clamp(-1, 1) if mode == "bicubic" else pixels  # 8-bit images cannot overshoot
        return pixels if crop is None else center_crop(pixels, crop)

    def _sizes(self, height: int, width: int) -> tuple[tuple[int, int], list[int] | None]:
        """What an image is resized to, and what is cut out at once."""
        size, edge = self.size, self.size.get("shortest_edge")
        if self.rule == "crop_pct" and edge is not None:
            if edge >= 384:
                return (edge, edge), None
            return _shorter_to(int(edge / self.crop_pct), height, width), [edge, edge]
        if self.rule == "enlarge" and (edge or size["height"] == size["width"]):
            return _shorter_to(int((edge or size["height"]) / self.crop_pct), height, width), None
        if self.rule == "enlarge":
            return (int(size["height"] / self.crop_pct), int(size["width"] / self.crop_pct)), None
        if self.rule == "levit" and edge is not None:
            return _shorter_to(int((256 / 224) * edge), height, width), None
        if edge is not None:
            found = _shorter_to(edge, height, width, size.get("longest_edge"))
            return tuple(-(-side // self.divisor) * self.divisor for side in found), None  # type: ignore[return-value]
        if "max_height" in size:
            scale = min(size["max_height"] / height, size["max_width"] / width)
            return (int(height * scale), int(width * scale)), None
        if "longest_edge" in size:
            scale = size["longest_edge"] / max(height, width)
            return (int(height * scale), int(width * scale)), None
        return (size["height"], size["width"]), None

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the `pixel_values` of an image of this size."""
        with torch.no_grad():
            shape = self(torch.empty(1, len(self.gain), height, width, device="cpu")).shape
        return shape[-2], shape[-1]


def _arithmetic(processor: BaseImageProcessor, channels: int) -> tuple[list[float], list[float]]:
    """Gain and bias of what is done to values x in [-1, 1], of levels v = 127.5 (x + 1)."""
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0
    gain, bias = np.full(channels, 127.5 * factor), np.full(channels, 127.5 * factor)
    if getattr(processor, "do_rescale", True) and getattr(processor, "rescale_offset", False):
        bias = bias - 1
    mean, std = (_per_channel(getattr(processor, name, None), channels) for name in ("image_mean", "image_std"))
    if getattr(processor, "do_normalize", None):
        gain, bias = gain / std, (bias - mean) / std
    if getattr(processor, "include_top", False):  # EfficientNet: once more by the deviation
        gain, bias = gain / std, bias / std
    return gain.tolist(), bias.tolist()


def _per_channel(values: float | Sequence[float] | None, channels: int) -> np.ndarray:
    """One number per channel; the mean of several where a classifier has another number of channels."""
    found = np.atleast_1d(np.asarray(1.0 if values is None else values, dtype=np.float64))
    return found if len(found) == channels else np.full(channels, found.mean())


def _shorter_to(edge: float, height: int, width: int, longest: int | None = None) -> tuple[int, int]:
    """Height and width with the shorter side at `edge`, less if the longer one would exceed `longest`."""
    shorter, longer = min(height, width), max(height, width)
    if longest is not None and longer / shorter * edge > longest:
        edge = longest * shorter / longer
    short, long = round(edge), int(edge * longer / shorter)
    return (short, long) if height <= width else (long, short)


def center_crop(pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The centre of images `(B, C, H, W)`; black, -1, around it where they are smaller."""
    for dim, wanted in zip((-2, -1), size, strict=True):
        have = pixels.shape[dim]
        if wanted <= have:
            pixels = pixels.narrow(dim, (have - wanted) // 2, wanted)
        else:
            before = math.ceil((wanted - have) / 2)
            after = wanted - have - before
            pixels = F.pad(pixels, (before, after) if dim == -1 else (0, 0, before, after), value=-1.0)
    return pixels


def check_against(processor: BaseImageProcessor, preprocessing: Preprocessing, channels: int, name: str) -> None:
    """Warns, once and by name, of what a processor does and we do not follow; on a probe image of 40 x 40 pixels."""
    y, x = np.mgrid[:40, :40]
    waves = [127.5 + 110 * np.sin(x / (3 + c)) * np.cos(y / (4 + c)) for c in range(3)]
    array = np.stack(waves, axis=-1).round().astype(np.uint8)
    array = array if channels == 3 else array[..., 0]
    image = PIL.Image.fromarray(array)
    reason = f"its filter {PIL.Image.Resampling(preprocessing.resample).name} is taken as bicubic"
    try:
        expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
        found = preprocessing(torch.from_numpy(array.reshape(40, 40, -1)).permute(2, 0, 1)[None] / 127.5 - 1)
        if expected.shape == found.shape:
            levels = (expected - found).abs().amax(dim=(0, 2, 3)) / torch.tensor(preprocessing.gain).abs() * 127.5
            if levels.max() <= _LEVELS and preprocessing.resample in (*_MODES, 4):
                return
            if preprocessing.resample in _MODES:
                reason = f"its values differ by up to {levels.max():.0f} of 255 levels"
        else:
            reason = f"it makes shape {tuple(expected.shape[1:])}, not {tuple(found.shape[1:])}"
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"it makes no `pixel_values` of an image alone ({type(error).__name__})"
    logger.warning(
        "What %s makes of images is not followed in full for classifier %r: %s. Its features and logits are those of "
        "other inputs; choose a classifier with another processor, or set its switches otherwise.",
        type(processor).__name__,
        name,
        reason,
    )


def as_dict(preprocessing: Preprocessing) -> dict[str, Any]:
    """Plain values for a config."""
    return dataclasses.asdict(preprocessing)


def from_dict(values: Mapping[str, Any]) -> Preprocessing:
    """Back from a config."""
    return Preprocessing(**values)


def ensure_preprocessing(
    classifier: PreTrainedModel, *, subfolder: str | None = None, token: str | bool | None = None
) -> PreTrainedModel:
    """Writes what a classifier expects of its inputs into its config, where it is saved with it.

    A config that holds `image_size`, `image_mean` and `image_std` (those trained by our recipes do) says it all:
    resize, bilinear, and normalise. Otherwise the image processor beside the weights, of the same commit, is followed
    in all it does, as `config.preprocessing` (see [`Preprocessing`]); what cannot be followed is warned of. If
    there is none, the usual ImageNet values are taken, with a warning.

    Args:
        classifier (`PreTrainedModel`): a classifier of images.
        subfolder (`str`, *optional*): that it was loaded from.
        token (`str` or `bool`, *optional*): for a private repository on the Hub.

    Returns:
        `PreTrainedModel`: the same object.
    """
    config, wanted = classifier.config, ("image_size", "image_mean", "image_std")
    if getattr(config, "preprocessing", None) or all(getattr(config, name, None) is not None for name in wanted):
        return classifier
    channels = getattr(config, "num_channels", 3)
    name = classifier.name_or_path
    try:
        options: dict[str, Any] = {} if subfolder is None else {"subfolder": subfolder}
        options |= {} if Path(name).is_dir() else {"token": token, "revision": commit_of(classifier)}
        processor = AutoImageProcessor.from_pretrained(name, **options)
        found = Preprocessing.of(processor, channels)
        if channels in (1, 3):
            check_against(processor, found, channels, name)
        height, width = found.input_size(IMAGENET_SIZE, IMAGENET_SIZE)
        size = height if height == width else [height, width]
        mean, std = processor.image_mean, processor.image_std
        config.preprocessing = as_dict(found)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ImportError) as error:
        path = Path(name) / (subfolder or "") / "preprocessor_config.json"
        if path.is_file():  # damaged, and then no reason to guess
            read_json(path, "Save the image processor again, or copy it again.")
        logger.warning(
            "No preprocessor config that can be followed was found for classifier %r (%s): assuming %d px and "
            "ImageNet normalisation. Set `image_size`, `image_mean` and `image_std` of `classifier.config` otherwise.",
            name,
            type(error).__name__,
            IMAGENET_SIZE,
        )
        size, mean, std = IMAGENET_SIZE, IMAGENET_MEAN, IMAGENET_STD
    for key, value in zip(wanted, (size, _of_channels(mean, channels), _of_channels(std, channels)), strict=True):
        if getattr(config, key, None) is None:
            setattr(config, key, value)
    return classifier


def _of_channels(values: Sequence[float] | float | None, channels: int) -> list[float]:
    """The same as a list, for a config."""
    return _per_channel(0.0 if values is None else values, channels).tolist()


def preprocess(pixels: torch.Tensor, classifier: PreTrainedModel) -> torch.Tensor:
    """Turns pixels in [-1, 1] into the `pixel_values` of a classifier; differentiable.

    Args:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, range [-1, 1]): C is 1 or 3; grayscale is repeated for a colour
            classifier, colour is averaged for a grayscale one.
        classifier (`PreTrainedModel`): what it expects is in its config, see [`ensure_preprocessing`].

    Returns:
        `torch.Tensor` of shape `(B, num_channels, h, w)`, in the precision of `pixels`, as the classifier's processor
            makes them.
    """
    config = ensure_preprocessing(classifier).config  # a classifier may have been put into a pipeline by hand
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise ValueError(
            f"{type(classifier).__name__} takes {channels} channels, images have 1 or 3. Features of a classifier "
            "that was trained on latents are matched with `FeatureSpec(space='latents')`."
        )
    if pixels.shape[1] != channels:
        pixels = pixels.expand(-1, channels, -1, -1) if pixels.shape[1] == 1 else pixels.mean(dim=1, keepdim=True)
    if getattr(config, "preprocessing", None):
        return from_dict(config.preprocessing)(pixels)
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(pixels.shape[-2:]) != size:
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    if all(m == 0.5 for m in config.image_mean) and all(s == 0.5 for s in config.image_std):
        return pixels  # (x / 2 + 0.5 - 0.5) / 0.5 = x
    mean, std = (
        torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)
        for v in (config.image_mean, config.image_std)
    )
    return (to_unit(pixels) - mean) / std
