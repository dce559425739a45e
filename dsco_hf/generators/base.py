"""The seam of denoisers: what a family of noise predictors says of itself, and which families there are.

All that differs between a DiT, a class-conditional UNet or a network of one's own stands in one subclass of
[`Denoiser`]. Pipelines, their checks, training, costs and records ask the subclass that takes the network.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import ModelMixin
from torch import nn

from ..utils.values import Limits, plain_arguments, plain_fields


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Denoiser:
    """A noise predictor: a network, and all that is particular to its family.

    A subclass names the classes of networks and where their config holds the number of classes; all else has defaults
    that fit a network of diffusers with `config.in_channels` and `config.sample_size`, square, that is called as
    `network(x, timestep=t, class_labels=y).sample`. [`register_denoiser`] makes the family known.

    Attributes:
        name (`str`): the family's name, `architecture` in a training config.
        kinds (`tuple`): the classes of networks that the family takes; they are `ModelMixin`s of diffusers.
        classes_field (`str`): of the network's config: how many classes it has.
        counts_null (`bool`): whether the null class is one of those. If so, it is there if the pipeline has a name for
            each of them but the last.
        component (`str`): where a pipeline and its `model_index.json` keep the network.
        former_names (`tuple`): names that published pipelines give one of `kinds`.
        any_size (`bool`): whether a trained network can be trained further at another size.
        channels_last (`bool`): whether it learns faster in that memory format, on a GPU.
        encoders (`tuple`): further components of a pipeline that encode prompts; none for a family without prompts.
        flow (`bool`, *optional*): whether its networks predict the velocity of a flow; None if they may do either, as
            their scheduler says.
        own_spacing (`bool`): whether pipelines of the family leave the steps of a flow to the scheduler, see
            [`~dsco_hf.generators.steps.set_flow_steps`].

    Args:
        network (`ModelMixin`): of one of `kinds`.
        class_names (`Mapping[int, str]`, *optional*): names of the classes by index, as the pipeline knows them. None
            for a network in training, whose last embedding is the null class.
        prompts (`ModelMixin`, *optional*): of a family that has `encoders`: the encoded prompts of the classes.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[type[ModelMixin], ...]]
    classes_field: ClassVar[str]
    counts_null: ClassVar[bool] = False
    component: ClassVar[str] = "custom_denoiser"
    former_names: ClassVar[tuple[str, ...]] = ()
    any_size: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False
    encoders: ClassVar[tuple[str, ...]] = ()
    flow: ClassVar[bool | None] = None
    own_spacing: ClassVar[bool] = False

    def __init__(
        self,
        network: ModelMixin,
        class_names: Mapping[int, str] | None = None,
        prompts: ModelMixin | None = None,
    ) -> None:
        self.network, self.class_names, self.prompts = network, class_names, prompts

    # what it is

    @classmethod
    def stored_kinds(cls) -> dict[str, str]:
        """The classes that a `model_index.json` may give for `component`, with the library beside each."""
        libraries = [kind.__module__ for kind in cls.kinds]
        libraries = ["diffusers" if library.startswith("diffusers.") else library for library in libraries]
        kinds = dict(zip((kind.__name__ for kind in cls.kinds), libraries, strict=True))
        return kinds | dict.fromkeys(cls.former_names, libraries[0])

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class."""
        embeddings, names = self.network.config[self.classes_field], self.class_names
        return embeddings - (self.counts_null and (names is None or embeddings == len(names) + 1 > 1))

    @property
    def null_class(self) -> int | None:
        """Index of the class that stands for none, the one after the last; None if all embeddings are classes."""
        classes = self.num_classes
        return None if self.counts_null and classes == self.network.config[self.classes_field] else classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is drawn, in latents or pixels; height and width are the same.

        Raises:
            ValueError: for a network of no fixed size, or one that is not square.
        """
        size = self.network.config.sample_size
        sides = {size} if isinstance(size, int) or size is None else set(size)
        if len(sides) != 1 or not isinstance(side := sides.pop(), int):
            raise ValueError(
                f"The denoiser's `sample_size` must be one whole number, the height and width of what it draws, got "
                f"{size!r}: set it with `denoiser.register_to_config(sample_size=...)`."
            )
        return self.network.config.in_channels, side, side

    @property
    def side_factor(self) -> tuple[int, str]:
        """What the side must be a multiple of, and why: "it …"."""
        return 1, "takes any size"

    @property
    def tokens(self) -> int:
        """Patches of a sample, or its pixels if it is not cut into any."""
        return (self.sample_shape[1] // (self.network.config.get("patch_size") or 1)) ** 2

    def check_conditioned(self) -> None:
        """Raises ValueError if the network is not conditioned on classes."""
        found = {key: self.network.config.get(key) for key in (self.classes_field, "class_embed_type")}
        if found[self.classes_field] is None or found["class_embed_type"] is not None:
            raise ValueError(
                f"The `{self.component}` (a {type(self.network).__name__}) is not conditioned on classes: "
                f"{', '.join(f'{key}={value!r}' for key, value in found.items())}. Take one that was trained with "
                f"`{self.classes_field}=...`."
            )

    def check_size(self) -> None:
        """Raises ValueError if the network cannot take samples of its own size."""
        check_side(type(self.network).__name__, self.sample_shape[1], *self.side_factor)

    def check_guidance(self, guidance_scale: float) -> None:
        """Raises ValueError for guidance without a null class."""
        if guidance_scale > 1 and self.null_class is None:
            raise ValueError(
                f"`guidance_scale={guidance_scale}` needs a null class, which the generator does not have: its "
                f"`{self.classes_field}={self.num_classes}` are as many classes. Pass `guidance_scale=1.0`, or if its "
                "last embedding is the null class, name the other classes in `id2label`."
            )

    # what it predicts

    def conditions(self, labels: Sequence[int], seeds: Iterable[int]) -> list[int]:
        """What `forward` is told of images of these classes that are drawn with these seeds, in place of the class."""
        return list(labels)

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """The two answers `(B, C, h, w)` put together, as classifier-free guidance does."""
        return unconditional + scale * (conditional - unconditional)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The network's answer `(B, C, h, w)` to noisy samples `(B, C, h, w)`, without a learned variance.

        Args:
            x (`torch.Tensor` of shape `(B, C, h, w)`): in the network's own type.
            timesteps (`torch.Tensor` of shape `(B,)`): noise levels.
            classes (`torch.Tensor` of shape `(B,)`): classes, or the null class.
        """
        # a learned variance, if there is one, fills the other half of the channels
        return self.network(x, timestep=timesteps, class_labels=classes).sample[:, : x.shape[1]]

    def predict(
        self, x: torch.Tensor, timestep: torch.Tensor | int, classes: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """The same with classifier-free guidance if `guidance_scale` > 1, in one call of both branches.

        Args:
            x (`torch.Tensor` of shape `(B, C, h, w)`): in any type, in which the answer is given.
            timestep (`torch.Tensor` or `int`): one for all.
            classes (`torch.Tensor` of shape `(B,)`): classes.
            guidance_scale (`float`): 1 is off.
        """
        guided, inputs = guidance_scale > 1, x
        if guided:
            self.check_guidance(guidance_scale)
            inputs = torch.cat([x, x])
            classes = torch.cat([classes, torch.full_like(classes, cast(int, self.null_class))])
        times = torch.as_tensor(timestep, device=x.device).expand(len(inputs))
        predicted = self.forward(inputs.to(self.network.dtype), times, classes).to(x.dtype)
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = self.guided(conditional, unconditional, guidance_scale)
        return predicted

    # how it is trained

    @classmethod
    def build(cls, config: Any, *, num_classes: int, sample_size: int, num_channels: int) -> ModelMixin:
        """A new network with a null class; its random numbers are torch's own, which the caller has seeded.

        Args:
            config ([`~dsco_hf.generators.denoisers.GeneratorTrainingConfig`]): with the options of this family.
            num_classes (`int`): classes without the null class.
            sample_size (`int`): height and width of the samples.
            num_channels (`int`): their channels.
        """
        raise ValueError(f"The architecture {cls.name!r} cannot be built: pass a network, `denoiser=...`.")

    def begin_training(self) -> None:
        """Puts the network in train mode; the labels are dropped by the training, and not by the network."""
        self.network.train()

    def class_tables(self) -> Iterator[tuple[str, nn.Embedding]]:
        """Names and modules of the network's tables of class embeddings, the null class last; for other classes."""
        return iter(())

    @plain_arguments()
    def adapt(
        self,
        num_classes: int,
        *,
        mapping: Mapping[int, int | Sequence[int]] | None = None,
        sample_size: int | None = None,
    ) -> ModelMixin:
        """A copy of the network with embeddings of other classes, and for another size; all other weights are its own.

        The embedding of the null class stays the last one. All tables of classes are replaced.

        Args:
            num_classes (`int`): number of the new classes.
            mapping (`dict`, *optional*): new class to old class, or to several old ones whose mean is taken. Classes
                that are not named start from the mean of all old classes.
            sample_size (`int`, *optional*): height and width of the samples, in pixels or latents; its own if None.

        Raises:
            ValueError: for a class of `mapping` that does not exist, or a size that the network cannot take.
        """
        check_fused(self.component, self.network)
        mapping, old_classes = dict(mapping or {}), self.num_classes
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
        for new, old in mapping.items():
            olds = [old] if isinstance(old, int) else list(old)
            if new not in range(num_classes) or not olds or not set(olds) <= set(range(old_classes)):
                raise ValueError(
                    f"`mapping` has {new}: {old}; new classes are 0 to {num_classes - 1}, from at least one old class "
                    f"of 0 to {old_classes - 1}."
                )
        changes = {self.classes_field: num_classes + self.counts_null} | self.other_size(sample_size)
        adapted = type(self.network).from_config(self.network.config, **changes)
        tables = {name: module.weight.detach() for name, module in self.class_tables()}
        state = {
            key: value for key, value in self.network.state_dict().items() if key.removesuffix(".weight") not in tables
        }
        for name, table in tables.items():
            known = table[:old_classes]
            rows = [
                known[[old] if isinstance(old, int) else list(old)].mean(dim=0)
                for old in (mapping.get(new, range(old_classes)) for new in range(num_classes))
            ]
            state[f"{name}.weight"] = torch.stack([*rows, table[old_classes]])
        adapted.load_state_dict(state)
        return adapted.to(self.network.device, self.network.dtype)

    def other_size(self, sample_size: int | None) -> dict[str, int]:
        """What changes in the network's config for another height and width; nothing for None or its own.

        Raises:
            ValueError: for a size that the network cannot take.
        """
        if sample_size is None or sample_size == self.network.config.sample_size:
            return {}
        if not self.any_size:
            raise ValueError(
                f"A {type(self.network).__name__} trained at size {self.network.config.sample_size} has positions "
                f"of that size and cannot be trained at {sample_size}. Leave `image_size` out, or start from a "
                "denoiser that takes any size, such as a UNet."
            )
        remedy = " It follows from `image_size`."
        check_side(type(self.network).__name__, sample_size, *self.side_factor, remedy=remedy)
        return {"sample_size": sample_size}

    def set_trainable(self, trainable: str, *, lora_rank: int = 8, seed: int = 0) -> list[str]:
        """Freezes the weights that are not to be trained, and names the others.

        Args:
            trainable (`str`): "all" weights, or "bias_and_norm": every bias, every norm, and the tables of classes; or
                "lora": W + B A in the place of W for all projections of attention (https://arxiv.org/abs/2106.09685),
                scaled by one, of which A and B, new and at first without effect, are trained.
            lora_rank (`int`): rows of A.
            seed (`int`): of A.

        Returns:
            `list[str]`: names of the parameters that are trained.
        """
        if trainable == "lora":
            self.network.requires_grad_(False)
            add_lora(self.network, lora_rank, seed)
            return [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        chosen = {f"{name}.weight" for name, _ in self.class_tables()}
        for name, module in self.network.named_modules():
            if isinstance(module, _NORMS):
                chosen |= {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
        for name, parameter in self.network.named_parameters():
            # a positional table and other buffers are no parameters and never train
            parameter.requires_grad_(trainable == "all" or name in chosen or name.rpartition(".")[2] == "bias")
        return [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]


# What diffusers calls the projections of attention, those of a second stream (of prompts) included.
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def check_fused(name: str, model: object) -> None:
    """Raises ValueError if a component has adapters beside its weights, as a host's `load_lora_weights` adds.

    The layers inside have other names than without them, by which their weights would not be found again.
    """
    if isinstance(model, nn.Module) and (adapters := getattr(model, "peft_config", None)):
        raise ValueError(
            f"`{name}` has the adapters {sorted(adapters)} beside its weights, and is neither saved nor trained "
            "with them: call `pipe.fuse_lora()` and then `pipe.unload_lora_weights()` of the pipeline that they were "
            "loaded into. One that shares its models draws the same then."
        )


def check_lora(network: ModelMixin) -> None:
    """Raises ValueError if LoRA cannot be added to a network."""
    check_fused(family_of(network).component, network)
    if not hasattr(network, "add_adapter"):
        raise ValueError(
            f"diffusers has no LoRA for a {type(network).__name__}: set `trainable='bias_and_norm'`, which trains few "
            "weights as well."
        )
    if importlib.util.find_spec("peft") is None:
        raise ValueError("`trainable='lora'` needs that package: pip install 'dsco_hf[lora]', or peft alone.")


def add_lora(network: ModelMixin, rank: int, seed: int = 0) -> None:
    """Adds LoRA to all projections of attention, by diffusers' `add_adapter`; its A is drawn from the seed, B is 0."""
    check_lora(network)
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(_PROJECTIONS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(config)


def fuse_lora(network: ModelMixin) -> dict[str, torch.Tensor]:
    """Adds what LoRA has learnt to the weights and takes it out; gives it, by the names that diffusers stores.

    Returns:
        `dict[str, torch.Tensor]`: A `(rank, d)` and B `(d', rank)` of every layer; empty for a network without LoRA.
    """
    if not getattr(network, "peft_config", None):
        return {}
    from peft import get_peft_model_state_dict

    found = {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(network).items()}
    network.fuse_lora()
    network.unload_lora()
    return found


@dataclass(frozen=True)
class ArchitectureOptions:
    """Base of what a family can be built with: fields with defaults, checked in `__post_init__`.

    What numbers may be is in `field_limits`, see [`~dsco_hf.utils.values.plain_fields`].
    """

    field_limits: ClassVar[Mapping[str, float | Limits]] = {}

    def __post_init__(self) -> None:
        """Makes numbers plain, and refuses those of another kind."""
        plain_fields(self)


def check_side(kind: str, side: int, factor: int, why: str, *, remedy: str = "") -> None:
    """Raises ValueError if a network of the class `kind` cannot take samples of that height and width."""
    if side < 1 or side % factor:
        closest = max(1, math.floor(side / factor + 0.5)) * factor
        raise ValueError(
            f"The {kind} cannot take `sample_size={side}`, as it {why}: it must be a multiple of {factor}, for "
            f"example {closest}.{remedy}"
        )


FAMILIES: dict[str, type[Denoiser]] = {}  # by name
_Family = TypeVar("_Family", bound=type[Denoiser])


def register_denoiser(family: _Family) -> _Family:
    """Makes a family of denoisers known, as the decorator of its class; the latest that takes a network is asked.

    Raises:
        ValueError: if another family has the name.
    """
    known = FAMILIES.get(family.name, family)
    if (known.__module__, known.__qualname__) != (family.__module__, family.__qualname__):
        raise ValueError(
            f"There is a family of denoisers named {family.name!r} already, {known.__module__}.{known.__qualname__}: "
            "choose another `name`."
        )
    FAMILIES.pop(family.name, None)
    FAMILIES[family.name] = family
    return family


def _takes(network: nn.Module | None) -> type[Denoiser] | None:
    """The newest family that takes a network as it is."""
    return next((family for family in reversed(FAMILIES.values()) if isinstance(network, family.kinds)), None)


def family_of(network: nn.Module | None) -> type[Denoiser]:
    """The family that takes a network.

    Raises:
        ValueError: if there is none.
    """
    found = _takes(network)
    if found is None and isinstance(network, nn.Module):  # compiled, or wrapped for several processes
        found = _takes(extract_model_from_parallel(network, keep_torch_compile=False))
    if found is not None:
        return found
    known = ", ".join(kind.__name__ for family in FAMILIES.values() for kind in family.kinds)
    raise ValueError(
        f"No family of denoisers takes a {type(network).__name__}; there are some for {known}. Write one for it, see "
        "`dsco_hf.Denoiser`, and register it with `@register_denoiser`."
    )


def denoiser_of(
    network: ModelMixin, class_names: Mapping[int, str] | None = None, prompts: ModelMixin | None = None
) -> Denoiser:
    """A network as the [`Denoiser`] of its family; arguments as of that class."""
    return family_of(network)(network, class_names, prompts)
