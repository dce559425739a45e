"""Images as numbers and back: what every mode of Pillow means (`docs/inputs.md` has a table), and ranges of values.

Inside of the package pixels are float32 `(B, C, H, W)` in [-1, 1]. What else there is, is converted here: images of 8
bits, and the [0, 1] of diffusers and of augmentations.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image


_DECODER = Image()
_ALPHA = {"LA", "PA", "RGBA"}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# what a mode that is refused lacks, and what to do
_REFUSED = {
    "F": "floating-point images have no defined range; store them with 8 or 16 bits per channel",
    "LAB": "the white point that mode LAB refers to is not stored; convert them to RGB with `PIL.ImageCms`",
}


def image_array(image: PIL.Image.Image, num_channels: int, image_size: int | None = None) -> np.ndarray:
    """An image as 8-bit values: what training, targets, doping and evaluators all see of a file.

    Args:
        image (`PIL.Image.Image`): of any mode; alpha channels are left out.
        num_channels (`int`): 1 (gray, by 0.299 R + 0.587 G + 0.114 B) or 3 (RGB).
        image_size (`int`, *optional*): resize the shorter side to this with bicubic filtering, then crop the centre.

    Returns:
        array `(H, W)` or `(H, W, 3)`, uint8.

    Raises:
        ValueError: for a mode without a defined range or colours, or values that the mode cannot mean.
    """
    mode = "L" if num_channels == 1 else "RGB"
    if image.mode != mode:
        image = _convert(image, mode)
    if image_size is not None and image.size != (image_size, image_size):
        image = resize_and_crop(image, image_size)
    return np.asarray(image)


def resize_and_crop(image: PIL.Image.Image, image_size: int) -> PIL.Image.Image:
    """Resizes the shorter side with bicubic filtering, antialiased, and crops the centre to a square."""
    width, height = image.size
    scale = image_size / min(width, height)
    width, height = max(round(width * scale), image_size), max(round(height * scale), image_size)
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def decoded(value: dict[str, Any]) -> PIL.Image.Image:
    """An image as `datasets` decodes it (upright), without a file that stays open whatever happens.

    `value` has `bytes` or the `path` of a file; what Pillow's readers raise for broken ones is of any kind.
    """
    if value["bytes"] is None and value["path"] is not None and Path(value["path"]).is_file():
        # A reader of Pillow that fails, or has further frames, would keep the file that it opened.
        value = {"bytes": Path(value["path"]).read_bytes(), "path": value["path"]}
    return _DECODER.decode_example(value)


def stored_at(value: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """An encoded image at a size: the very bytes of its file if it has that size (or any will do), else a PNG."""
    content, path = value["bytes"], value["path"]
    if content is None and path is not None and Path(path).is_file():
        content = Path(path).read_bytes()
    if image_size is not None:
        with decoded({"bytes": content, "path": path}) as image:
            if image.size != (image_size, image_size):
                channels = 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3
                array = image_array(image, channels, image_size)
                PIL.Image.fromarray(array).save(buffer := io.BytesIO(), format="PNG")
                content, path = buffer.getvalue(), None
    # a folder of this machine is no part of a dataset
    return {"bytes": content, "path": path if content is None or path is None else Path(path).name}


def ignored_parts(image: PIL.Image.Image) -> list[str]:
    """What an image shows that is not read: "transparency", or "further frames"."""
    found = []
    if image.mode in _ALPHA and image.getextrema()[-1][0] < 255:  # type: ignore[index]
        found.append("transparency")
    elif image.mode in _PREMULTIPLIED or "transparency" in image.info:
        found.append("transparency")
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: photographs with a preview beside them
        found.append("further frames")
    return found


def _convert(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    if image.mode in _REFUSED:
        raise ValueError(_REFUSED[image.mode])
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow would warn
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    return image.convert(mode)


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Gray values of more than 8 bits: 16-bit ones are scaled by 1/257; wider ones have to be 8-bit values already."""
    low, high = int(values.min()), int(values.max())
    if mode == "I":
        if low < 0 or high > 255:
            raise ValueError(
                f"its 32-bit integers are from {low} to {high}, and only 0 to 255 have a meaning; store them with 8 "
                "bits, or scale them to 16 (`array.astype('uint16')` of 0 to 65535)"
            )
        return values.astype(np.uint8)
    if 0 < high <= 255:
        raise ValueError(
            f"its 16-bit values are at most {high} of 65535, which is black; if they are 8-bit values, store them as "
            "such (`array.astype('uint8')`)"
        )
    return (values.astype(np.float32) / 257).round().astype(np.uint8)


def pixels_from_arrays(arrays: np.ndarray) -> torch.Tensor:
    """uint8 `(B, H, W)` or `(B, H, W, C)` to float32 `(B, C, H, W)` in [-1, 1]."""
    return from_levels(torch.from_numpy(arrays if arrays.ndim == 4 else arrays[..., None]).permute(0, 3, 1, 2))


def pixels_from_images(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """Equally large gray or RGB images as pixels `(B, C, H, W)` in [-1, 1]; the inverse of `images_from_pixels`."""
    return pixels_from_arrays(np.stack([np.asarray(image) for image in images]))


def images_from_pixels(pixels: torch.Tensor) -> list[PIL.Image.Image]:
    """Pixels `(B, 1 or 3, H, W)` in [-1, 1] as images of mode L or RGB; values outside are clipped.

    Raises:
        ValueError: if the shape is another, or a value is NaN.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"Expected pixels of shape (B, 1 or 3, H, W), got {tuple(pixels.shape)}.")
    if torch.isnan(pixels).any():
        raise ValueError("The pixels contain NaN; they cannot be made images.")
    arrays = to_levels(pixels).permute(0, 2, 3, 1).contiguous().numpy()  # (B, H, W, C)
    return [PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def to_levels(pixels: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1], of any shape, as uint8 on the CPU; values outside are clipped."""
    return pixels.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """uint8 values, of any shape, as float32 in [-1, 1]; the inverse of `to_levels`."""
    return levels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def as_stored(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, C, H, W)` in [-1, 1] with the values that they have once they were stored as 8-bit images."""
    return from_levels(to_levels(pixels))


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1], of any shape, as values in [0, 1]."""
    return pixels / 2 + 0.5


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1], of any shape, as values in [-1, 1]; the inverse of `to_unit`."""
    return images * 2 - 1


def images_from_unit(arrays: np.ndarray) -> list[PIL.Image.Image]:
    """Arrays `(B, H, W, 1 or 3)` in [0, 1], as diffusers has them, as images of mode L or RGB."""
    arrays = (arrays * 255).round().astype("uint8")
    return [PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


def draw_samples(
    dataset: Dataset, *, max_classes: int = 10, per_class: int = 10, max_side: int = 96
) -> PIL.Image.Image:
    """The first images of the first classes, one row per class, each at most `max_side` pixels wide and high.

    Smaller ones are enlarged by whole factors, without smoothing.
    """
    labels = np.asarray(dataset.with_format(None)["label"][:])
    rows = [np.flatnonzero(labels == label)[:per_class].tolist() for label in np.unique(labels)[:max_classes]]
    tiles = [[dataset[i]["image"].convert("RGB") for i in row] for row in rows]
    side = max(max(tile.size) for row in tiles for tile in row)
    side = side * max(1, 48 // side) if side < max_side else max_side
    grid = PIL.Image.new("RGB", ((side + 2) * max(map(len, tiles)) - 2, (side + 2) * len(tiles) - 2), "white")
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            resample = PIL.Image.Resampling.NEAREST if side >= max(tile.size) else PIL.Image.Resampling.LANCZOS
            scale = side / max(tile.size)
            size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
            grid.paste(tile.resize(size, resample), ((side + 2) * x, (side + 2) * y))
    return grid
