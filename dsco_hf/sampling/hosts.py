"""From a text-to-image pipeline of diffusers, the host, to a pipeline of classes with a prompt each."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, SchedulerMixin
from huggingface_hub import hf_hub_download

from ..data.labels import ClassLookup, class_mapping
from ..data.schema import AnyDataset, nearest
from ..data.schema import class_names as names_of
from ..generators.base import FAMILIES, family_of
from ..generators.denoisers import ENCODERS, SLOTS
from ..generators.prompts import ZERO_SNR_RESCALE, Given, Prompts, TextConditioned, class_prompts
from ..generators.steps import check_fits
from ..utils.files import check_path
from ..utils.safety import explained
from ..utils.values import check_real
from .loading import INDEX, StoredPipeline, embedded_folder, read_index


logger = logging.getLogger(__name__)

# Components of hosts that no image depends on.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
# What `from_pipe` and `from_pretrained` take beside what they take of other pipelines.
OPTIONS = ("class_names", "dataset", "negative_prompt", "guidance_rescale", "drop_text_encoders", "host")


class HostedPipeline(StoredPipeline):
    """A pipeline of classes; its denoiser may be one of a text-to-image pipeline, with a prompt for every class."""

    scheduler: SchedulerMixin
    prompts: Prompts | None
    vae: AutoencoderKL | AutoencoderTiny | None
    id2label: dict[int, str]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of the components of another, whose weights it shares.

        Args:
            pipeline (`DiffusionPipeline`): a text-to-image pipeline of diffusers, such as [`StableDiffusionPipeline`]
                or [`StableDiffusionXLPipeline`]; a [`DiTPipeline`]; or one of this class.
            kwargs: components to use in place of its own or beside, such as `classifier`; and of a text-to-image
                pipeline those of [`HostedPipeline.encode_prompts`], and `drop_text_encoders` (`bool`), which leaves
                the text encoders and tokenizers out. `dtype` (`torch.dtype`) is as of `pipe.to`; no weight changes
                its type without.

        Raises:
            ValueError: for a pipeline that cannot be taken, the nearest that can be is named; see
                [`HostedPipeline.encode_prompts`] for other errors.
        """
        if (host := check_host(type(pipeline).__name__, pipeline.components)) is not None:
            kwargs["host"] = host
        dtype = kwargs.pop("dtype", None)
        own = {key: value for key in ("id2label", "image_size") if (value := pipeline.config.get(key))}
        found = cls(**own | pipeline.components | kwargs)
        if (origin := getattr(pipeline, "name_or_path", None)) is not None:
            found.register_to_config(_name_or_path=origin)
        return found if dtype is None else found.to(dtype=dtype)

    @classmethod
    def _load(cls, name: str, folder: Path, kwargs: dict[str, Any]) -> Self:
        index = read_index(folder)
        host = check_host(str(index.get("_class_name")), index)
        if host is None:
            asked = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
            prompts = None if isinstance(kwargs.get("prompts"), Prompts) else kwargs.pop("prompts", None)
            pipe = super()._load(name, folder, kwargs)
            pipe.begin_prompts(prompts, asked)
            return pipe
        names = (*OPTIONS, *cls._optional_components, "id2label", "image_size")
        own = {key: kwargs.pop(key) for key in names if key in kwargs}
        kwargs |= {key: own.pop(key) for key in ("scheduler", "vae", *SLOTS, *ENCODERS) if key in own}
        # diffusers does not load a pipeline of its own that was saved without one of its components, unless it is told
        absent = {key: None for key in index if key in UNUSED or index[key] == [None, None]}
        pipe = getattr(diffusers, host).from_pretrained(name, **absent | kwargs)
        return cls.from_pipe(pipe, **own)

    @staticmethod
    def prompt_options(given: dict[str, Any]) -> dict[str, Any]:
        """Takes the options of prompts out of what a pipeline is made of, and components that nothing depends on."""
        for name in UNUSED:
            given.pop(name, None)
        return {key: given.pop(key) for key in OPTIONS if key in given}

    def begin_prompts(self, prompts: Given | Mapping[str, Any] | Prompts, options: Mapping[str, Any]) -> None:
        """What a new pipeline does for its prompts: takes over a scheduler, encodes, drops the encoders.

        A VAE that overflows in float16 becomes one of float32; that of another pipeline stays as it is.

        Args:
            prompts: see [`HostedPipeline.encode_prompts`]; or the table, which is there already.
            options (`Mapping`): of that method, and `drop_text_encoders`.
        """
        rest = {key: value for key, value in options.items() if key != "drop_text_encoders"}
        self.upcast_vae()
        takes = self.prompts is None and issubclass(family_of(self.denoiser), TextConditioned)
        if not isinstance(prompts, Prompts) and (takes or rest or prompts):
            check_fits(self.scheduler, type(self.denoiser).__name__, family_of(self.denoiser).flow)
            self.register_modules(scheduler=taken_over(self.scheduler, latents=self.vae is not None))
            self.encode_prompts(prompts, **rest)
        if options.get("drop_text_encoders"):
            self.register_modules(**dict.fromkeys(ENCODERS))

    def upcast_vae(self) -> None:
        """Puts a copy of the VAE in float32 in the place of one that overflows in float16 (`force_upcast`)."""
        if self.vae is None or self.vae.dtype != torch.float16 or not self.vae.config.get("force_upcast"):
            return
        if isinstance(family := self.family, TextConditioned) and family.overflows:
            self.register_modules(vae=copy.deepcopy(self.vae).to(torch.float32))

    def to(self, *args: object, **kwargs: object) -> Self:
        """See [`DiffusionPipeline.to`]; a VAE that overflows in float16 is in float32 then."""
        found = super().to(*args, **kwargs)
        self.upcast_vae()
        return found

    def encode_prompts(
        self,
        prompts: Given | Mapping[str, Any] = None,
        *,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        dataset: AnyDataset | None = None,
        negative_prompt: str | None = None,
        guidance_rescale: float | None = None,
        host: str | None = None,
    ) -> Self:
        """Encodes a prompt for every class, and keeps what comes of it as the component `prompts`.

        Args:
            prompts (*optional*): a template, several, or a prompt for each class, see [`class_prompts`]; or the entry
                of a record.
            class_names (sequence of `str`, *optional*): names of the classes; those of the pipeline if None.
            dataset (`Dataset`, *optional*): whose classes are meant, in place of their names.
            negative_prompt (`str`, *optional*): what guidance leads away from.
            guidance_rescale (`float`, *optional*): in [0, 1], see [`TextConditioned.guided`]; 0.7 if None and the
                scheduler begins with nothing but noise (`rescale_betas_zero_snr`), otherwise 0.
            host (`str`, *optional*): class of the text-to-image pipeline, where the components do not tell it; that
                of the prompts that there are if None.

        Raises:
            ValueError: for prompts that do not fit the classes, that are too long, or without encoders.
        """
        if isinstance(prompts, Mapping) and {"class_names", "texts"} <= set(prompts):  # of a record
            given: dict[str, Any] = {key: prompts.get(key) for key in ("negative_prompt", "guidance_rescale")}
            given["class_names"] = names = list(prompts["class_names"])
            return self.encode_prompts(dict(zip(names, prompts["texts"], strict=True)), host=host, **given)
        told = names_of(dataset) if dataset is not None else class_names or self.id2label
        names = [told[label] for label in sorted(told)] if isinstance(told, Mapping) else list(told)
        zero = bool(self.scheduler.config.get("rescale_betas_zero_snr"))
        rescale = ZERO_SNR_RESCALE * zero if guidance_rescale is None else guidance_rescale
        rescale = check_real("guidance_rescale", rescale, 0, 1)
        family = self.family
        if not isinstance(family, TextConditioned):
            raise ValueError(
                f"The pipeline's {type(self.denoiser).__name__} knows its classes by itself and takes no prompts: "
                "leave them out."
            )
        parts = {name: getattr(self, name) for name in (*ENCODERS, "vae")}
        host = host or (self.prompts.config.host if self.prompts is not None else None)
        table = family.encode(parts, class_prompts(prompts, names), negative_prompt, rescale, host)
        self.register_modules(prompts=table)
        self.name_classes(dict(enumerate(names)))
        return self

    def name_classes(self, id2label: Mapping[int, str]) -> None:
        """Sets the names of the generator's classes."""
        self.register_to_config(id2label={str(key): value for key, value in id2label.items()})
        self.id2label = {int(key): value for key, value in id2label.items()}
        self.labels = {
            name.strip(): key for key, value in self.id2label.items() for name in (value, *value.split(","))
        }

    def get_label_ids(self, class_labels: Sequence[int | str]) -> list[int]:
        """Indices of classes given by index, by name (any of ImageNet's comma-separated synonyms) or by WordNet id.

        Raises:
            ValueError: for a class that the generator does not know, with the nearest names, or a name that fits
                several, with the choices.
        """
        if isinstance(class_labels, str | int):
            raise ValueError(f"`class_labels` must be a list, got {class_labels!r}: pass `[{class_labels!r}]`.")
        lookup = ClassLookup(self.id2label, self.num_classes)
        ids = []
        for label in class_labels:
            found = lookup.find_typed(label) if isinstance(label, str) else lookup.find(label)
            if not found:
                known = "" if self.labels else " It has no class names (`id2label`): pass indices."
                raise ValueError(f"The generator has no class {label!r}.{nearest(str(label), self.labels)}{known}")
            if len(found) > 1:
                raise ValueError(
                    f"Class {label!r} fits several: {lookup.describe(found)}. Pass an index or WordNet id."
                )
            index = found.pop()
            if not 0 <= index < self.num_classes:
                raise ValueError(
                    f"Class {label!r} is outside the generator's {self.num_classes} classes: pass 0 to "
                    f"{self.num_classes - 1}."
                )
            ids.append(index)
        return ids

    def classifier_labels(self, ids: Sequence[int]) -> list[int]:
        """The classifier's label for each of the generator's classes, matched by name.

        Raises:
            ValueError: if the classifier was trained on other classes.
        """
        distinct, config = list(dict.fromkeys(ids)), self.classifier.config
        names = [self.id2label.get(index, str(index)) for index in distinct]
        # names that occur twice are settled by the usual order, if the classifier has it too
        labels = class_mapping(names, config.id2label, config.num_labels, own_labels=distinct, owner="classifier")
        found = dict(zip(distinct, labels, strict=True))
        return [found[index] for index in ids]


def check_host(name: str, components: Mapping[str, Any]) -> str | None:
    """The text-to-image pipeline that a class of this name is; None for one that takes no prompts.

    Raises:
        ValueError: for one of another family, or another use.
    """
    hosts: list[str] = [host for family in FAMILIES.values() for host in getattr(family, "hosts", ())]
    if name in hosts:
        return name
    text = any("text_encoder" in key for key in components)
    if not text or not hasattr(diffusers, name):
        return None
    known = nearest(name, hosts)
    same = [host for host in hosts if name.startswith(host.removesuffix("Pipeline"))]
    advice = f" Made of the same components is `diffusers.{same[-1]}.from_pipe(pipe)`: pass that." if same else known
    raise ValueError(f"A {name} cannot be taken: a pipeline must be a {', '.join(hosts[:-1])} or {hosts[-1]}.{advice}")


def is_host(name: str, revision: str | None = None) -> bool:
    """Whether a folder or a repository of the Hub is a text-to-image pipeline of diffusers."""
    if embedded_folder(name) is not None:
        return False
    folder = Path(name)
    if not folder.is_dir():
        check_path(name, wanted="Give a folder that `save_pretrained` wrote, or an id such as 'user/name'.")
        with explained(name, token=None, action="load"):
            folder = Path(hf_hub_download(name, INDEX, revision=revision)).parent
    index = read_index(folder)
    return check_host(str(index.get("_class_name")), index) is not None


def taken_over(scheduler: SchedulerMixin, *, latents: bool = True) -> SchedulerMixin:
    """A scheduler with the noise levels of another, of which noise can be taken from outside; said once.

    Latents are not clipped, whatever the other says: its own pipeline does not clip them either. Pixels may be.

    Raises:
        ValueError: for one without the levels of diffusion.
    """
    kind, config = type(scheduler).__name__, dict(scheduler.config)
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return scheduler
    if not hasattr(scheduler, "alphas_cumprod") or config.get("prediction_type") == "flow_prediction":
        raise ValueError(
            f"The scheduler, a {kind}, has not the noise levels of diffusion (`alphas_cumprod`), and cannot be taken "
            "over: pass `scheduler=DDIMScheduler(...)` with those that the model was trained with."
        )
    found = DDIMScheduler.from_config(scheduler.config, **({"clip_sample": False} if latents else {}))
    if not isinstance(scheduler, DDIMScheduler):
        logger.warning("The %s was taken over as a DDIMScheduler, whose noise can be optimised.", kind)
    return found
