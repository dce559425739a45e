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
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


logger = logging.getLogger(__name__)

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
    def of(cls, processor: Any, channels: int = 3) -> Preprocessing:
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


def _arithmetic(processor: Any, channels: int) -> tuple[list[float], list[float]]:
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


def check_against(processor: Any, preprocessing: Preprocessing, channels: int, name: str) -> None:
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
