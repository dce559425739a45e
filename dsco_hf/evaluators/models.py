"""Evaluator networks: what a small dataset is trained on to learn how good it is.

The ConvNet and the ResNets of the dataset-distillation literature as `PreTrainedModel`s, and any other
`AutoModelForImageClassification` architecture through `build_evaluator`. All store `image_size`, `num_channels`,
`image_mean` and `image_std` in their config, so that `preprocess` knows what they expect.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from ..data.schema import nearest
from ..utils.values import plain, plain_arguments
from .configurations import ConvNetConfig, EvaluatorConfig, EvaluatorResNetConfig, make_norm, pooled_sizes


# Sizes that the peers use; anything else of `transformers` goes by its model type and `overrides`.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "convnet": ("dsco_convnet", {"depth": 3, "width": 128}),
    "resnet-18": ("dsco_resnet", {"depths": [2, 2, 2, 2], "width": 64, "norm": "batch"}),
    "resnetap-10": ("dsco_resnet", {"depths": [1, 1, 1, 1], "width": 64, "average_pool": True}),
    "efficientnet-b0": (
        "efficientnet",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "dropout_rate": 0.2},
    ),
    "resnet-small": (
        "resnet",
        {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"},
    ),
}


class EvaluatorPreTrainedModel(PreTrainedModel):
    """Base of our evaluators: PyTorch's own initialisation, on which the published protocols rely."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.BatchNorm2d):
            # A module whose weights came from a checkpoint must keep them.
            if not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
                module.reset_parameters()


class Trunk(EvaluatorPreTrainedModel):
    """An evaluator without its head: `blocks`, and `pool`, whose `feature_size` numbers the linear head reads."""

    blocks: nn.Sequential
    feature_size: int

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        """The map `(B, d, h, w)` of the last block as features `(B, feature_size)`."""
        return hidden.flatten(1)

    def forward(self, pixel_values: torch.Tensor, **kwargs: object) -> BaseModelOutputWithPoolingAndNoAttention:
        """The map of a batch and its features, `pooler_output` of shape `(B, feature_size)`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): normalised images of the configured size.
            **kwargs: ignored; what `transformers` passes to every model.
        """
        hidden = self.blocks(pixel_values)  # (B, d, h, w)
        return BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=hidden, pooler_output=self.pool(hidden))


class Classifier(EvaluatorPreTrainedModel):
    """A trunk and a linear head."""

    trunk_class: ClassVar[type[Trunk]]

    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        trunk = self.trunk_class(config)
        setattr(self, self.base_model_prefix, trunk)
        self.classifier = nn.Linear(trunk.feature_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: object
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits of a batch, of shape `(B, num_labels)`, and the cross entropy where labels are given.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): normalised images of the configured size.
            labels (`torch.Tensor` of shape `(B,)`, *optional*): class indices.
            **kwargs: ignored; what `transformers` passes to every model.
        """
        logits = self.classifier(self.base_model(pixel_values).pooler_output)  # (B, K)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class ConvNetModel(Trunk):
    """Blocks of convolution, norm, ReLU and average pooling."""

    config_class = ConvNetConfig
    base_model_prefix = "convnet"

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        channels, size = config.num_channels, config.image_size
        for pooled in pooled_sizes(config.image_size, config.depth):
            layers += [
                nn.Conv2d(channels, config.width, kernel_size=3, padding=1),
                make_norm(config.norm, config.width),
                nn.ReLU(),
            ]
            if pooled < size:
                layers.append(nn.AvgPool2d(2))
            channels, size = config.width, pooled
        self.blocks = nn.Sequential(*layers)
        self.feature_size = config.width * size * size
        self.post_init()


class ConvNetForImageClassification(Classifier):
    """The ConvNet of Gidaris and Komodakis as dataset distillation uses it (arXiv 2006.05929), any depth and width."""

    config_class = ConvNetConfig
    base_model_prefix = "convnet"
    trunk_class = ConvNetModel


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, halving the map where `stride` is 2.

    Args:
        channels_in (`int`): channels of the input.
        channels (`int`): channels of the output.
        stride (`int`): 1 or 2.
        norm (`str`): see `make_norm`.
        average_pool (`bool`): average pooling in place of the strides.
    """

    def __init__(self, channels_in: int, channels: int, *, stride: int, norm: str, average_pool: bool) -> None:
        super().__init__()
        bias = norm == "none"
        step = 1 if average_pool else stride
        pool = nn.AvgPool2d(stride) if average_pool and stride > 1 else nn.Identity()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=step, padding=1, bias=bias),
            make_norm(norm, channels),
            nn.ReLU(),
            pool,
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            make_norm(norm, channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=step, bias=bias), pool, make_norm(norm, channels)
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(B, channels_in, h, w)` to `(B, channels, h / stride, w / stride)`."""
        return nn.functional.relu(self.body(hidden) + self.shortcut(hidden))


def resnet_stem(config: EvaluatorResNetConfig) -> tuple[nn.Sequential, int]:
    """First layers of the ResNet, and the size of the map they leave."""
    bias = config.norm == "none"
    size = config.image_size
    pool: nn.Module
    if size <= 64:
        kernel, stride, pool, halvings = 3, 1, nn.Identity(), 0
    elif config.average_pool:
        kernel, stride, halvings = (3, 1, 1) if size <= 128 else (7, 1, 2)
        pool = nn.AvgPool2d(2**halvings)
    else:
        kernel, stride, pool, halvings = 7, 2, nn.MaxPool2d(3, stride=2, padding=1), 2
    convolution = nn.Conv2d(config.num_channels, config.width, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return nn.Sequential(convolution, make_norm(config.norm, config.width), nn.ReLU(), pool), size // 2**halvings


class EvaluatorResNetModel(Trunk):
    """Stem and stages of basic blocks, with convolutions initialised by He's rule over outputs."""

    config_class = EvaluatorResNetConfig
    base_model_prefix = "resnet"

    def __init__(self, config: EvaluatorResNetConfig) -> None:
        super().__init__(config)
        self.stem, size = resnet_stem(config)
        blocks: list[nn.Module] = []
        channels_in = config.width
        for stage, depth in enumerate(config.depths):
            channels = config.width * 2**stage
            for index in range(depth):
                # As in the ConvNet, a map is not halved to a single pixel.
                stride = 2 if stage > 0 and index == 0 and size >= 4 else 1
                size //= stride
                blocks.append(
                    BasicBlock(
                        channels_in, channels, stride=stride, norm=config.norm, average_pool=config.average_pool
                    )
                )
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.feature_size = channels_in
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d) and not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        """The mean of the map `(B, d, h, w)`, of shape `(B, d)`."""
        return hidden.mean((2, 3))

    def forward(self, pixel_values: torch.Tensor, **kwargs: object) -> BaseModelOutputWithPoolingAndNoAttention:
        """As `Trunk`, of images `(B, C, H, W)`."""
        return super().forward(self.stem(pixel_values))


class EvaluatorResNetForImageClassification(Classifier):
    """ResNet-18 with the stem of its image size, and ResNetAP-10, the evaluators of Minimax and RDED."""

    config_class = EvaluatorResNetConfig
    base_model_prefix = "resnet"
    trunk_class = EvaluatorResNetModel


for _classifier in (ConvNetForImageClassification, EvaluatorResNetForImageClassification):
    # exist_ok: a module imported a second time (a notebook, a test) is no error.
    AutoConfig.register(_classifier.config_class.model_type, _classifier.config_class, exist_ok=True)
    AutoModel.register(_classifier.config_class, _classifier.trunk_class, exist_ok=True)
    AutoModelForImageClassification.register(_classifier.config_class, _classifier, exist_ok=True)


def image_classification_types() -> list[str]:
    """Model types that `AutoModelForImageClassification` can build from a configuration, ours included."""
    return sorted({config_class.model_type for config_class in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING})


def resolve_architecture(architecture: str) -> tuple[str, dict[str, Any]]:
    """Model type and configuration values of an architecture name.

    Args:
        architecture (`str`): a name of `ARCHITECTURES`, `convnet-<depth>`, or any model type of
            `AutoModelForImageClassification`.

    Returns:
        `tuple[str, dict]`: `transformers` model type and configuration values.

    Raises:
        ValueError: for an unknown name; names the nearest ones.
    """
    if match := re.fullmatch(r"convnet-([1-9]\d*)", architecture):
        return "dsco_convnet", {"depth": int(match.group(1)), "width": 128}
    if architecture in ARCHITECTURES:
        model_type, values = ARCHITECTURES[architecture]
        return model_type, dict(values)
    model_types = image_classification_types()
    if architecture in model_types:
        return architecture, {}
    hint = nearest(architecture, [*ARCHITECTURES, "convnet-3", "convnet-6", *model_types])
    raise ValueError(
        f"Unknown architecture {architecture!r}.{hint} Allowed: {', '.join(ARCHITECTURES)}, convnet-<depth>, "
        "or a model type of AutoModelForImageClassification such as vit or mobilenet_v2."
    )


def is_own_architecture(architecture: str) -> bool:
    """Whether a network is one of this package, which fits images of any size, or a stock one of `transformers`."""
    return resolve_architecture(architecture)[0] in (ConvNetConfig.model_type, EvaluatorResNetConfig.model_type)


@plain_arguments(image_size=1, num_channels=1)
def build_evaluator(
    architecture: str,
    *,
    class_names: Sequence[str],
    image_size: int,
    num_channels: int = 3,
    seed: int | None = None,
    **overrides: object,
) -> PreTrainedModel:
    """Builds an untrained classifier.

    Args:
        architecture (`str`): see `resolve_architecture`.
        class_names (`Sequence[str]`): names of the classes in the order of their labels; at least two, all different.
        image_size (`int`): height and width in pixels that the model is fed; `preprocess` resizes to it.
        num_channels (`int`): channels of its input.
        seed (`int`, *optional*): of the initial weights, which leaves PyTorch's global generator as it is; without it
            they come from that.
        **overrides: further values of the architecture's configuration, e.g. `width=32`.

    Returns:
        `PreTrainedModel`: on the CPU, in train mode.

    Raises:
        ValueError: for an unknown architecture, fewer than two classes, or names that repeat.
    """
    names = list(class_names)
    if len(names) < 2:
        raise ValueError(f"An evaluator needs at least two classes, got {names}; check the label column.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Class names must differ, got {repeated} more than once.")
    model_type, values = resolve_architecture(architecture)
    config = AutoConfig.for_model(
        model_type,
        **{
            "image_size": image_size,
            "num_channels": num_channels,
            "image_mean": [0.5] * num_channels,
            "image_std": [0.5] * num_channels,
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            **values,
            **plain(overrides),
        },
    )
    if seed is None:
        return AutoModelForImageClassification.from_config(config).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageClassification.from_config(config).train()
