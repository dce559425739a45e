"""Prompts: what a text-conditioned denoiser is told of each class, encoded once; then it is class-conditional."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, cast

import torch
import yaml
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.labels import first_synonym
from ..data.schema import image_seed, nearest
from .base import Denoiser, check_fused


Given: TypeAlias = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]] | None
"""What a `prompts` argument takes, see [`class_prompts`]."""
Encoders: TypeAlias = dict[str, PreTrainedModel | PreTrainedTokenizerBase]
"""Tokenizers and text encoders, by the names of components."""
TEMPLATE = "a photo of a {}"
ZERO_SNR_RESCALE = 0.7  # https://arxiv.org/abs/2305.08891, section 3.4


class Prompts(ModelMixin, ConfigMixin):
    """The encoded prompts of C classes and of none of them, as rows of tensors, which are saved as safetensors.

    Row c < C is the first prompt of class c, and row C the negative prompt. If the classes have K prompts each, those
    after the first follow, C at a time; an image's seed picks one.

    Args:
        class_names (`list[str]`): names of the classes, by index; a config would not keep the order of a dict.
        texts (`list[list[str]]`): K prompts of every class.
        negative_prompt (`str`, *optional*): what guidance leads away from; None is what the host pipeline does then.
        guidance_rescale (`float`, in [0, 1]): how far guided predictions get the deviation of conditional ones back,
            see [`TextConditioned.guided`].
        shapes (`dict[str, list[int]]`): of one row of each tensor, by the name that the family gives it.
        host (`str`, *optional*): class of the pipeline that encoded them.
    """

    @register_to_config
    def __init__(
        self,
        class_names: list[str],
        texts: list[list[str]],
        negative_prompt: str | None = None,
        guidance_rescale: float = 0.0,
        shapes: dict[str, list[int]] | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__()
        rows = 1 + sum(map(len, texts))
        for name, shape in (shapes or {}).items():
            self.register_buffer(name, torch.zeros(rows, *shape))

    def row(self, label: int, seed: int) -> int:
        """The row of an image of a class that is drawn with a seed."""
        classes, pick = len(self.config.texts), image_seed(seed, 0, 0, "prompt") % len(self.config.texts[0])
        return label if pick == 0 else classes + 1 + (pick - 1) * classes + label

    def rows(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows `(B, ...)` of `labels` `(B,)`, by name."""
        return {name: tensor[labels.to(tensor.device)].to(labels.device) for name, tensor in self.named_buffers()}

    def as_record(self) -> dict[str, Any]:
        """The texts, as records tell them."""
        texts = [own[0] if len(own) == 1 else list(own) for own in self.config.texts]
        told = {key: self.config[key] for key in ("negative_prompt", "guidance_rescale") if self.config[key]}
        return {"class_names": list(self.config.class_names), "texts": texts, **told}


class TextConditioned(Denoiser):
    """Base of families that are conditioned on encoded prompts; a subclass has `hosts`, `encoders` and three methods.

    Attributes:
        hosts (`tuple`): the pipelines of diffusers that have such a denoiser, whose `encode_prompt` is used, by name:
            importing them takes long.
    """

    hosts: ClassVar[tuple[str, ...]]

    @property
    def table(self) -> Prompts:
        """The encoded prompts.

        Raises:
            ValueError: if there are none.
        """
        if not isinstance(self.prompts, Prompts):
            raise ValueError(
                f"The `{self.component}`, a {type(self.network).__name__}, is conditioned on prompts, and there are "
                "none: make the pipeline with `DsCoPipeline.from_pipe(pipe, class_names=[...])`, `pipe` being the one "
                f"of diffusers, a {' or '.join(self.hosts)}."
            )
        return self.prompts

    @property
    def num_classes(self) -> int:
        """As many as have prompts."""
        return len(self.table.config.texts)

    @property
    def null_class(self) -> int | None:
        """The row of the negative prompt."""
        return self.num_classes

    def conditions(self, labels: Sequence[int], seeds: Iterable[int]) -> list[int]:
        """The row that an image's seed picks of those of its class."""
        return [self.table.row(label, seed) for label, seed in zip(labels, seeds, strict=True)]

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """See [`Denoiser.forward`]; `classes` `(B,)` are rows of the table."""
        rows = {name: row.to(x.dtype) for name, row in self.table.rows(classes).items()}
        return self.ask(x, timesteps, rows)[:, : x.shape[1]]

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """With the deviation of each image brought back, by the table's φ (https://arxiv.org/abs/2305.08891)."""
        found = super().guided(conditional, unconditional, scale)
        if not (share := self.table.config.guidance_rescale):
            return found
        own, much = (part.std(dim=(1, 2, 3), keepdim=True) for part in (conditional, found))
        return share * (found * (own / much)) + (1 - share) * found

    def adapt(
        self,
        num_classes: int,
        *,
        mapping: Mapping[int, int | Sequence[int]] | None = None,
        sample_size: int | None = None,
    ) -> ModelMixin:
        """A copy of the network, for another size; its classes are prompts, and it has nothing else of them.

        Raises:
            ValueError: for a `mapping`, a size that the network cannot take, or adapters beside its weights.
        """
        if mapping:
            raise ValueError(
                f"The classes of a {type(self.network).__name__} are prompts, and start from nothing else: leave "
                "`mapping` (`--class_mapping`) out, and say in `prompts` what each is like."
            )
        check_fused(self.component, self.network)
        adapted = type(self.network).from_config(self.network.config, **self.other_size(sample_size))
        if adapted.dtype != self.network.dtype:  # diffusers warns of any dtype that it is given
            adapted.to(dtype=self.network.dtype)
        adapted.load_state_dict(self.network.state_dict())
        return adapted.to(self.network.device)

    @classmethod
    def build_encoders(cls, seed: int) -> Encoders:
        """New tokenizers and text encoders, frozen, for a network that `build` made; random weights of a seed."""
        raise ValueError(f"The architecture {cls.name!r} has no new text encoders: begin with a pipeline that has.")

    def ask(self, x: torch.Tensor, timesteps: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The network's answer `(B, C or more, h, w)` to `x` `(B, C, h, w)`, `timesteps` `(B,)`, rows `(B, ...)`."""
        raise NotImplementedError

    def host(self, components: Mapping[str, Any], name: str | None) -> DiffusionPipeline:
        """The pipeline of diffusers that encodes, of this network and of encoders and a VAE by name.

        `name` is that of its class, for a family that has several of the same components.
        """
        raise NotImplementedError

    def encoded(self, host: DiffusionPipeline, text: str, negative: str | None) -> list[dict[str, torch.Tensor]]:
        """The rows `(...)` by name of a prompt, and of the negative one, by the host's own `encode_prompt`."""
        raise NotImplementedError

    @property
    def overflows(self) -> bool:
        """Whether a VAE that says `force_upcast` overflows in float16 with what this network draws."""
        return False

    def needed(self, components: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of `encoders` without which the components of a pipeline, by name, cannot encode prompts."""
        return self.encoders

    def longest(self, host: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens that a prompt may have, with those of its beginning and end."""
        return tokenizer.model_max_length

    @torch.no_grad()
    def encode(
        self,
        components: Mapping[str, Any],
        by_class: Mapping[str, Sequence[str]],
        negative_prompt: str | None = None,
        guidance_rescale: float = 0.0,
        host_name: str | None = None,
    ) -> Prompts:
        """All prompts encoded, one by one, so that none depends on the others.

        Args:
            components (`Mapping`): tokenizers, text encoders and the VAE, by name.
            by_class (`Mapping`): prompts by class, see [`class_prompts`].
            negative_prompt (`str`, *optional*): see [`Prompts`].
            guidance_rescale (`float`): likewise.
            host_name (`str`, *optional*): class of the pipeline that the components are of, if they do not tell.

        Raises:
            ValueError: for encoders that are not there, or a prompt that is too long.
        """
        if missing := [name for name in self.needed(components) if components.get(name) is None]:
            raise ValueError(
                f"Prompts cannot be encoded without {' and '.join(f'`{name}`' for name in missing)}: they were "
                "dropped, or never there. Begin with the whole pipeline of diffusers, `DsCoPipeline.from_pipe(pipe, "
                "prompts=...)`."
            )
        host, texts = self.host(components, host_name), [list(of) for of in by_class.values()]
        for name, text in [(name, text) for name, of in by_class.items() for text in of]:
            self.check_length(host, text, f"The prompt of class {name!r}")
        self.check_length(host, negative_prompt or "", "`negative_prompt`")
        pairs = [self.encoded(host, of[k], negative_prompt) for k in range(len(texts[0])) for of in texts]
        rows = [pair[0] for pair in pairs]
        rows.insert(len(texts), pairs[0][1])
        shapes = {name: list(row.shape) for name, row in rows[0].items()}
        table = Prompts(list(by_class), texts, negative_prompt, guidance_rescale, shapes, type(host).__name__)
        for name in shapes:
            table.register_buffer(name, torch.stack([row[name] for row in rows]))
        return table.eval()

    def check_length(self, host: DiffusionPipeline, text: str, what: str) -> None:
        """Raises ValueError for a text that a tokenizer would cut."""
        for tokenizer in (getattr(host, name) for name in self.needed(host.components) if "tokenizer" in name):
            most, ids = self.longest(host, tokenizer), tokenizer(text, verbose=False).input_ids
            if len(ids) > most:
                cut = tokenizer.decode(ids[most - 1 : -1]).strip()
                raise ValueError(
                    f"{what} has {len(ids)} tokens and the tokenizer takes {most}, so that {cut!r} would be cut off: "
                    f"shorten {text!r}."
                )


def blank(classes: int, states: list[int], **others: list[int]) -> Prompts:
    """A table of zeros for classes without names, whose rows have these shapes."""
    names = [str(label) for label in range(classes)]
    return Prompts(names, [[name] for name in names], shapes={"encoder_hidden_states": states, **others})


def class_prompts(given: Given, names: Sequence[str]) -> dict[str, list[str]]:
    """The prompts of every class.

    Args:
        given: one of:
            - `str`: a template, in which "{}" stands for the class, "a photo of a {}" if None;
            - `list`: several, of which an image's seed picks one;
            - `dict`: a prompt, or as many for each, by the class's name;
            - a YAML file with any of these.
        names (sequence of `str`): the classes. Of ImageNet's strings, "tench, Tinca tinca", the first synonym is put
            into a template; other names as they are.

    Raises:
        ValueError: for classes without names, or prompts that are missing, empty, unequal in number, or of no class.
    """
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml"))):
        given = cast(Given, yaml.safe_load(Path(given).read_text(encoding="utf-8")))
    if not names:
        raise ValueError(
            "The classes have no names, and each needs a prompt: pass `class_names=[...]`, or the data, `dataset=...`."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"Two classes are named {twice!r}, and prompts go by name: pass other `class_names`.")
    if isinstance(given, Mapping):
        found = _by_name(given, names)
    else:
        several = [given or TEMPLATE] if given is None or isinstance(given, str) else given
        templates = list(cast(Sequence[str], several))
        if not templates or (without := [text for text in templates if "{}" not in str(text)]):
            raise ValueError(
                f"A template must have {{}} in it, where the class goes, got {without[0] if templates else []!r}: "
                f"for example {TEMPLATE!r}. What is to be said of one class only goes into a dict, by its name."
            )
        found = {name: [text.replace("{}", first_synonym(name)) for text in templates] for name in names}
    for name, texts in found.items():
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"The prompt of class {name!r} is empty, {texts!r}: say what it shows.")
    counts = {name: len(texts) for name, texts in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"Each class must have as many prompts as the others, got {counts}.")
    return found


def _by_name(given: Mapping[str, str | Sequence[str]], names: Sequence[str]) -> dict[str, list[str]]:
    texts = {str(name): [text] if isinstance(text, str) else list(text or []) for name, text in given.items()}
    if unknown := [name for name in texts if name not in names]:
        raise ValueError(f"`prompts` has {unknown[0]!r}, which is no class.{nearest(unknown[0], names)}")
    if missing := [name for name in names if name not in texts]:
        raise ValueError(
            f"`prompts` has none for {len(missing)} of {len(names)} classes: {missing[:5]}. Add them, or pass a "
            f"template for all, such as {TEMPLATE!r}."
        )
    return {name: texts[name] for name in names}
