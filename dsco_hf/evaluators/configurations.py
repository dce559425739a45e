"""Configurations of the evaluators that transformers does not have."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .norms import check_norm


class ConvNetConfig(PreTrainedConfig):
    """Configuration of `ConvNetForImageClassification`.

    Args:
        depth (`int`): number of blocks, at least 1.
        width (`int`): channels of every block, at least 1.
        norm (`str`): `"instance"` (the field's choice), `"batch"` or `"none"`.
        image_size (`int`): height and width of the input in pixels; fixes the size of the linear head.
        num_channels (`int`): channels of the input.
        image_mean (`list[float]`, *optional*): mean per channel on the [0, 1] scale; 0.5 leaves [-1, 1] as it is.
        image_std (`list[float]`, *optional*): standard deviation per channel on the [0, 1] scale.

    Raises:
        ValueError: for a depth, width or image size below 1 or an unknown norm.
    """

    model_type = "dsco_convnet"

    def __init__(
        self,
        depth: int = 3,
        width: int = 128,
        norm: str = "instance",
        image_size: int = 32,
        num_channels: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("depth", depth), ("width", width), ("image_size", image_size)):
            if value < 1:
                raise ValueError(f"ConvNetConfig got {name}={value}; it must be at least 1.")
        check_norm(norm)
        self.depth = depth
        self.width = width
        self.norm = norm
        self.image_size = image_size
        self.num_channels = num_channels
        self.image_mean = [0.5] * num_channels if image_mean is None else list(image_mean)
        self.image_std = [0.5] * num_channels if image_std is None else list(image_std)
        super().__init__(**kwargs)


def pooled_sizes(image_size: int, depth: int) -> list[int]:
    """Spatial size after each block of the ConvNet.

    A block halves its map unless that would leave a single pixel: instance norm of one pixel is zero whatever the
    image, so 8 px images would otherwise be lost after three blocks.

    Args:
        image_size (`int`): height and width of the input in pixels.
        depth (`int`): number of blocks.

    Returns:
        `list[int]`: one size per block.
    """
    sizes = []
    for _ in range(depth):
        image_size = image_size // 2 if image_size >= 4 else image_size
        sizes.append(image_size)
    return sizes


class EvaluatorResNetConfig(PreTrainedConfig):
    """Configuration of `EvaluatorResNetForImageClassification`.

    Args:
        depths (`list[int]`, *optional*): basic blocks of each stage; ResNet-18 has [2, 2, 2, 2].
        width (`int`): channels of the first stage; each further stage has twice as many.
        norm (`str`): `"instance"`, `"batch"` or `"none"`.
        average_pool (`bool`): halve by average pooling instead of strides (ResNetAP of IDC and Minimax).
        image_size (`int`): height and width of the input. Up to 64 px the stem is one 3×3 convolution.
        num_channels (`int`): channels of the input.
        image_mean (`list[float]`, *optional*): see `ConvNetConfig`.
        image_std (`list[float]`, *optional*): see `ConvNetConfig`.

    Raises:
        ValueError: for an empty or non-positive size or an unknown norm.
    """

    model_type = "dsco_resnet"

    def __init__(
        self,
        depths: list[int] | None = None,
        width: int = 64,
        norm: str = "instance",
        average_pool: bool = False,
        image_size: int = 224,
        num_channels: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.depths = [2, 2, 2, 2] if depths is None else list(depths)
        if not self.depths or min(*self.depths, width, image_size) < 1:
            raise ValueError(
                f"EvaluatorResNetConfig got depths={self.depths}, width={width}, image_size={image_size}; all must "
                "be at least 1."
            )
        check_norm(norm)
        self.width = width
        self.norm = norm
        self.average_pool = average_pool
        self.image_size = image_size
        self.num_channels = num_channels
        self.image_mean = [0.5] * num_channels if image_mean is None else list(image_mean)
        self.image_std = [0.5] * num_channels if image_std is None else list(image_std)
        super().__init__(**kwargs)
