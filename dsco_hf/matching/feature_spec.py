"""Which features are matched: layers, poolings, networks and spaces, chosen by data that is kept with the targets."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from ..data.images import to_signed
from ..data.labels import class_mapping
from ..data.schema import nearest
from ..evaluators.models import build_evaluator, is_own_architecture
from ..evaluators.preprocessing import preprocess
from ..utils.values import check_choice, plain_fields
from .features import POOLINGS, SEEDING, Observation, RandomExtractor, check_layer, observe_layers


logger = logging.getLogger(__name__)

NETWORKS = ("classifier", "classifier_2", "untrained", "random")
TRAINED = NETWORKS[:2]  # components of the pipeline; the others are made of their seed
SPACES = ("pixels", "latents")


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Features of one network. Several specs together are concatenated.

    Attributes:
        layers (`tuple[str, ...]`): "pooled" (the input of the classifier's linear head), "logits", "hidden_0",
            "hidden_1", … (the `hidden_states` of transformers) or names of the classifier's modules.
        pooling (`str`): what is kept of the positions of such a layer: "average", "grid2" (averages of the four
            quarters), "mean_std" or "cls" (the class token of a vision transformer). "pooled" and "logits" are vectors
            already, and stay as they are.
        network (`str`): "classifier" or "classifier_2", the pipeline's components; "untrained", a network as
            evaluators are before their training (as in distribution matching, arXiv 2110.04181), made for the
            generator's images; or "random": the untrained network of the objective that the DsCo authors released.
        space (`str`): "pixels", or "latents": the predicted latents as the denoiser sees them, with no decoder in
            between. The network must take as many channels as they have; an untrained or random one does.
        seed (`int`): of an untrained or random network's weights; one that no evaluator of the architecture has.
        architecture (`str`, *optional*): of the untrained network, see [`~dsco_hf.build_evaluator`]; if None a ConvNet
            of three blocks, or of as many as bring larger images to 4x4 positions.
        width (`int`, *optional*): of the untrained network, if it is one of dsco_hf; 256 channels for a ConvNet and
            the architecture's own otherwise if None.

    Raises:
        ValueError: for a value that is not allowed, or a pooling with nothing to pool.
    """

    layers: tuple[str, ...] = ("pooled",)
    pooling: str = "average"
    network: str = "classifier"
    space: str = "pixels"
    seed: int = 0
    architecture: str | None = None
    width: int | None = None

    field_limits = {"width": 1}

    def __post_init__(self) -> None:
        plain_fields(self)
        several = isinstance(self.layers, list | tuple)
        layers = tuple(self.layers) if several else (self.layers,)
        object.__setattr__(self, "layers", layers)
        if not layers or not all(isinstance(layer, str) for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"`layers` must be different names of layers, such as ('pooled',); got {self.layers!r}.")
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("network", self.network, NETWORKS)
        check_choice("space", self.space, SPACES)
        if self.pooling != "average" and set(layers) <= {"pooled", "logits"}:
            raise ValueError(
                f"pooling={self.pooling!r} needs positions, and {list(layers)} are pooled already: add a layer such "
                "as 'hidden_3', or leave `pooling` out."
            )
        if self.network == "random" and layers != ("pooled",):
            raise ValueError(f"The random network has one layer, 'pooled'; got {list(layers)}.")
        self._check_architecture()

    def _check_architecture(self) -> None:
        """Refuses an architecture or a width that does not exist, or of a network that has its own."""
        given = [name for name in ("architecture", "width") if getattr(self, name) is not None]
        if self.network != "untrained" and given:
            raise ValueError(
                f"`{given[0]}` is of an untrained network, and this is {self.network!r}: leave it out, or choose "
                "network='untrained'."
            )
        if self.architecture is not None:
            own = is_own_architecture(self.architecture)
            if self.width is not None and not own:
                raise ValueError(
                    f"{self.architecture!r} has no `width`: leave it out, or choose a ConvNet, such as 'convnet-3'."
                )

    def as_record(self) -> dict[str, Any]:
        """All fields that say something, as plain JSON values: earlier versions had no untrained networks."""
        fields = dataclasses.asdict(self) | {"layers": list(self.layers)}
        return {name: fields[name] for name in fields if self.network == "untrained" or name not in _OF_UNTRAINED}

    def made_for(self, image_size: int) -> FeatureSpec:
        """The same with nothing left open, for images of this height and width in pixels."""
        if self.network != "untrained":
            return self
        depth = max(3, round(math.log2(image_size)) - 2)
        architecture = self.architecture or f"convnet-{depth}"
        width = CONVNET_WIDTH if self.width is None and architecture.startswith("convnet") else self.width
        return dataclasses.replace(self, architecture=architecture, width=width)


_OF_UNTRAINED = ("architecture", "width")
CONVNET_WIDTH = 256  # as wide as the networks that the recorded benchmarks matched
POOLED = (FeatureSpec(),)  # what targets match that say nothing of it: those of earlier versions
UNTRAINED = FeatureSpec(network="untrained", seed=1000)  # no evaluator's seed


Features: TypeAlias = FeatureSpec | Mapping[str, Any] | Sequence[FeatureSpec | Mapping[str, Any]] | str | None
"""What a `features` argument takes, see [`features_of`]."""


def features_of(pipe: DiffusionPipeline, features: Features = None) -> tuple[FeatureSpec, ...]:
    """What targets match that are made with a pipeline.

    Args:
        pipe (`DsCoPipeline`): the size of its images decides what a spec leaves open.
        features (*optional*): see [`feature_specs`]; if None what the classifier's head reads and what an untrained
            network sees, the latter alone in a pipeline without a classifier.
    """
    if features is None:
        features = (UNTRAINED,) if pipe.classifier is None else (*POOLED, UNTRAINED)
    sizes = {"pixels": pipe.image_size, "latents": pipe.latent_shape[1]}
    return tuple(spec.made_for(sizes[spec.space]) for spec in feature_specs(features))


def feature_specs(features: Features) -> tuple[FeatureSpec, ...]:
    """Any form of a `features` argument but None as a tuple of specs.

    Args:
        features: a [`FeatureSpec`] or a `dict` of its fields; several of them in a list; the same as a YAML (or JSON)
            string.

    Raises:
        ValueError: for an unknown field (the nearest is suggested), a value that is not allowed, or the same features
            twice.
    """
    if isinstance(features, str):
        try:
            features = yaml.safe_load(features)
        except yaml.YAMLError as error:
            raise ValueError(f"`features` is not valid YAML: {error}") from error
    given = [features] if isinstance(features, FeatureSpec | Mapping) else features
    if not isinstance(given, list | tuple) or not all(isinstance(item, FeatureSpec | Mapping) for item in given):
        raise ValueError(
            "`features` must be a FeatureSpec, a dict of its fields, or a list of them, for example "
            f"{{'layers': ['pooled', 'hidden_3'], 'pooling': 'grid2'}}; got {str(features)[:200]}."
        )
    fields = [field.name for field in dataclasses.fields(FeatureSpec)]
    specs = []
    for item in given:
        if isinstance(item, Mapping):
            for key in item:
                if key not in fields:
                    raise ValueError(
                        f"A feature spec has no field {key!r}.{nearest(str(key), fields)} It has {fields}."
                    )
            item = FeatureSpec(**item)
        specs.append(item)
    if not specs or len({part for spec in specs for part in _parts(spec)}) < sum(len(spec.layers) for spec in specs):
        raise ValueError(f"`features` must name at least one layer, and none twice; got {specs}.")
    return tuple(specs)


def layer_weights(sizes: Sequence[int]) -> torch.Tensor:
    """Weights `(d,)` of concatenated standardised features by which every layer counts alike.

    The squared distance of standardised features grows with their number, so a wide layer would drown a narrow one.
    Layer l of L with d_l of the d dimensions gets √(d / (L·d_l)), which leaves the expected distance as it was. The
    weight of a single layer is 1.
    """
    total = sum(sizes)
    return torch.cat([torch.full((size,), math.sqrt(total / (len(sizes) * size))) for size in sizes])


_Seen: TypeAlias = torch.Tensor | Mapping[FeatureSpec, torch.Tensor] | None  # by network, if they see others


class FeatureSource:
    """The frozen networks of a pipeline that specs name, as one function of pixels and latents.

    Args:
        pipe (`DsCoPipeline`): has the networks; a random network is drawn for it.
        specs (sequence of [`FeatureSpec`]): what to observe.

    Raises:
        ValueError: for a network that the pipeline lacks or that is in train mode, an unknown layer, or latents that
            the network cannot take.
    """

    def __init__(self, pipe: DiffusionPipeline, specs: Sequence[FeatureSpec]) -> None:
        self.pipe, self.specs = pipe, tuple(specs)
        self.needs_pixels = any(spec.space == "pixels" for spec in specs)
        self.needs_latents = any(spec.space == "latents" for spec in specs)
        # the classifier of pixels first: its logits are those of an observation
        order = sorted(
            dict.fromkeys(map(_group, specs)), key=lambda key: (key.space == "latents", NETWORKS.index(key.network))
        )
        self._groups = {key: self._network(key) for key in order}
        for spec in self.specs:
            network = self._groups[_group(spec)]
            if not isinstance(network, RandomExtractor):
                for layer in spec.layers:
                    check_layer(network, layer)

    @property
    def networks(self) -> list[nn.Module]:
        """What every image passes through."""
        return list(self._groups.values())

    @property
    def predicts(self) -> bool:
        """Whether the logits of an observation are those of the pipeline's classifier."""
        return POOLED[0] in self._groups

    def warn_of_other_classes(self, names: Sequence[str]) -> None:
        """Logs a warning for a classifier that was trained on other classes than these."""
        for key, network in self._groups.items():
            if key.network not in TRAINED or isinstance(network, RandomExtractor):
                continue
            try:
                class_mapping(names, network.config.id2label, network.config.num_labels)
            except ValueError:
                logger.warning(
                    "The pipeline's `%s` was trained on other classes than %s%s: its features are matched, but "
                    "its predictions mean nothing here (no soft labels, no clarity doping, weighting='none').",
                    key.network,
                    list(names[:3]),
                    " …" if len(names) > 3 else "",
                )

    def __call__(
        self, pixels: torch.Tensor | None, latents: torch.Tensor | None = None, *, moments: bool = False
    ) -> Observation:
        """Features of images; gradients reach the pixels and the latents.

        Args:
            pixels (`torch.Tensor` of shape `(B, C, H, W)`, range [-1, 1], *optional*): needed if `needs_pixels`.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): of the same images, as the denoiser sees
                them; needed if `needs_latents`.
            moments (`bool`): also record the moments at the BatchNorm layers of the networks.

        Returns:
            [`Observation`]: all features one after the other; logits of the first classifier, `(B, 0)` without one.
        """
        blocks, logits, seen = self._observe(pixels, latents, moments=moments)
        first = blocks[0]
        return Observation(
            torch.cat(blocks, dim=1) if len(blocks) > 1 else first,
            logits[0] if logits else first.new_zeros(len(first), 0),
            torch.cat(seen, dim=1) if len(seen) > 1 else seen[0],
        )

    @torch.no_grad()
    def of_pixels(self, pixels: torch.Tensor) -> Observation:
        """Features of finished images `(B, C, H, W)` in [-1, 1], which are encoded where latents are observed."""
        pixels = pixels.to(self.device)
        latents = self.pipe.encode_pixels(pixels, sample_posterior=False) if self.needs_latents else None
        return self(pixels, latents)

    def parts(self) -> dict[str, Any]:
        """What every real image passes through on its way to features, by name."""
        networks: dict[str, Any] = {str(place): network for place, network in enumerate(self.networks)}
        return networks | ({"vae": self.pipe.vae} if self.needs_latents else {})

    def classifiers(self) -> dict[str, str | None]:
        """Names of the classifiers that features come from."""
        used = {"classifier"} | ({"classifier_2"} & {spec.network for spec in self.specs})
        return {name: name_of(getattr(self.pipe, name)) for name in sorted(used)}

    @torch.no_grad()
    def probe(self) -> list[torch.Tensor]:
        """Features `(2, d_l)` of two fixed noise images, layer by layer, float32 on CPU.

        They tell networks apart, whatever the device or precision; compare with a tolerance of some percent.
        """
        noise = {}
        for key, network in self._groups.items():
            generator = torch.Generator().manual_seed(0)
            if key.space == "latents":
                noise[key] = torch.randn(2, *self.latent_shape, generator=generator).to(self.device)
            else:
                channels = getattr(getattr(network, "config", None), "num_channels", None) or self.pipe.num_channels
                noise[key] = to_signed(torch.rand(2, channels, 32, 32, generator=generator)).to(self.device)
        return [block.cpu() for block in self._observe(noise, noise)[0]]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(next(iter(self._groups.values())).parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return self.pipe.latent_shape

    def _observe(
        self, pixels: _Seen, latents: _Seen, *, moments: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Features by layer in the order of the specs; logits and moments by network."""
        found: dict[tuple, torch.Tensor] = {}
        logits, seen = [], []
        for key, network in self._groups.items():
            given = latents if key.space == "latents" else pixels
            inputs = given[key] if isinstance(given, Mapping) else given
            if inputs is None:
                raise ValueError(f"These features are taken from {key.space}, and none were given.")
            if isinstance(network, RandomExtractor):
                features = network(inputs.to(next(network.parameters()).dtype)).float()
                found[key, "pooled", "average"] = features
                seen.append(features.new_zeros(len(features), 0, 2))
                continue
            layers = [part[1:] for spec in self.specs if _group(spec) == key for part in _parts(spec)]
            if key.space == "pixels":  # resized in float32: on CPU there is no antialiased resizing in half precision
                half = inputs.dtype in (torch.float16, torch.bfloat16)
                inputs = preprocess(inputs.float() if half else inputs, network)
            blocks, mine, statistics = observe_layers(network, inputs.to(network.dtype), layers, moments=moments)
            found |= {(key, *layer): block for layer, block in zip(layers, blocks, strict=True)}
            seen.append(statistics)
            if key.network in TRAINED:
                logits.append(mine)
        return [found[part] for spec in self.specs for part in _parts(spec)], logits, seen

    def _network(self, key: FeatureSpec) -> PreTrainedModel | RandomExtractor:
        name, space = key.network, key.space
        if space == "latents" and self.pipe.vae is None:
            raise ValueError(
                "The generator draws pixels and has no latents: use FeatureSpec(space='pixels'), as cheap here."
            )
        if name not in TRAINED:
            shape = self.latent_shape if space == "latents" else (self.pipe.num_channels, self.pipe.image_size)
            if name == "random" and shape[-1] < 8:
                raise ValueError(
                    f"The random network halves its input three times and needs at least 8 positions a side, the "
                    f"{space} have {shape[-1]}: use a classifier's features."
                )
            return _made_network(key, shape[0], shape[1], self.pipe._execution_device, self.pipe.denoiser.dtype)
        network: PreTrainedModel | None = getattr(self.pipe, name, None)
        if network is None:
            raise ValueError(
                f"Matching needs the features of a classifier, and the pipeline has none: pass `{name}=` to "
                "`DsCoPipeline.from_pretrained`, for example `AutoModelForImageClassification.from_pretrained(...)`, "
                "or match FeatureSpec(network='untrained')."
            )
        if network.training:
            raise ValueError(
                f"The pipeline's `{name}` is in train mode, where dropout and batch statistics change its "
                f"features: call `pipe.{name}.eval()` first."
            )
        if space == "latents":
            self._check_takes_latents(network, name)
        return network

    def _check_takes_latents(self, network: PreTrainedModel, name: str) -> None:
        channels, side, _ = self.latent_shape
        size = getattr(network.config, "image_size", None) or side
        takes = getattr(network.config, "num_channels", 3)
        if takes != channels or size not in (side, (side, side), [side, side]):
            raise ValueError(
                f"`{name}` takes {takes} channels of {size} px, the latents have {channels} of {side}: train one on "
                "latents (its config says `num_channels` and `image_size`), use FeatureSpec(network='random', "
                "space='latents'), or take features of pixels."
            )


@functools.lru_cache(maxsize=4)
def _made_network(key: FeatureSpec, channels: int, size: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The random or untrained network of a spec, frozen, for inputs of so many channels and positions a side."""
    if key.network == "random":
        extractor = RandomExtractor(channels, seed=key.seed).to(device, dtype)
        # faster, on a CPU by a third
        return extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape: dict[str, Any] = {"image_size": size, "num_channels": channels}
    width = {} if key.width is None else {"width": key.width}
    with SEEDING:  # what the head tells apart is not seen
        network = build_evaluator(str(key.architecture), class_names="01", seed=key.seed, **shape, **width)
    return network.eval().requires_grad_(False).to(device, dtype)


@functools.lru_cache(maxsize=64)
def _group(spec: FeatureSpec) -> FeatureSpec:
    """What one pass through a network serves: that network's first features."""
    seed = 0 if spec.network in TRAINED else spec.seed
    return dataclasses.replace(spec, layers=("pooled",), pooling="average", seed=seed)


def _parts(spec: FeatureSpec) -> list[tuple[FeatureSpec, str, str]]:
    """Every layer of a spec, told from all others."""
    return [(_group(spec), layer, spec.pooling) for layer in spec.layers]


def name_of(model: object) -> str | None:
    """Hub id of a model; of a local folder only its last part, as targets are shared."""
    name = str(getattr(model, "name_or_path", "") or "")
    return (Path(name).name if Path(name).exists() or Path(name).is_absolute() else name) or None
