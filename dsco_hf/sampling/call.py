"""One call of the pipeline: its options, the method that steers it, and its state, which is nobody else's.

A method has four hooks, and needs to define only those in which it differs from plain sampling: `begin` (first latents
and first step), `guide` (the prediction of a step), `noise` (the noise of a step) and `choose` (which of the drawn
images stay). What it has to find out first it does in `prepare`. Methods of different hooks can be combined.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..data.labels import counted_in_class
from ..data.schema import nearest
from ..generators.failures import FiniteWatch
from ..generators.latents import Generators, seeds_of, with_candidates
from ..generators.steps import Steps
from ..matching.targets import MatchingTargets
from ..utils.values import Choice, Limits, plain_fields


Population: TypeAlias = Dataset | IterableDataset | Sequence[int | str] | str
"""What targets are made of: real images; or, data-free, a label set's name or a list of the generator's classes."""
# Kinds of passes, each counted in images and networks. `_backward` is forward and backward to the input.
KINDS = {
    "denoiser": "denoiser, each branch of the guidance",
    "decoder": "decoder, of the finished images",
    "preview": "decoder that noise is optimised with (the full one where there is no other), forward only",
    "preview_backward": "the same, forward and backward",
    "classifier": "networks of the features, forward only",
    "classifier_backward": "the same, forward and backward",
    "extractor": "random network of `Released`, of real images",
    "extractor_backward": "the same, of drawn images",
    "surrogate": "network of `IGD`, forward and backward to its weights",
    "surrogate_backward": "the same, and the gradient of that gradient to drawn images",
}
_CALLS = {
    "denoiser_calls": ("denoiser",),
    "decoder_calls": ("decoder", "preview", "preview_backward"),
    "classifier_calls": ("classifier", "classifier_backward", "extractor_backward", "surrogate_backward"),
}


class Targets(Protocol):
    """What a set of images is held against; it names its classes and, by index, the generator's."""

    class_names: list[str]
    class_labels: list[int]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclasses.dataclass(frozen=True)
class SamplingMethod(Choice):
    """How the sampling of images is steered. A subclass has its settings as fields, and hooks; as it is, none is used.

    Attributes:
        candidates (`int`): images drawn for each one that stays, see `choose`.
        takes_targets (`bool`): whether it looks at targets, beyond the classes that these name.
        adds_noise (`bool`): whether the steps add noise.
        usual_steps (`int`): sampling steps where none are asked for; those that the field counts costs by.
        sentence (`str`): what cards say was done.
        targets_class (`type`, *optional*): of what `make_targets` makes, if folders can keep it (`save_pretrained`,
            `from_pretrained`).
    """

    argument: ClassVar[str] = "method"
    candidates = 1  # a subclass may have it as a field
    takes_targets = True
    adds_noise: ClassVar[bool] = True
    usual_steps = 50
    targets_class: ClassVar[type | None] = MatchingTargets
    sentence: ClassVar[str] = "The sampling of a frozen class-conditional diffusion model was steered."

    @classmethod
    def told(cls, given: object) -> dict[str, Any]:
        """As of all choices; names that are joined by "+" are those of a combination."""
        if isinstance(given, str) and "+" in given and not given.lstrip().startswith("{"):
            return {"name": "combined", "parts": given.split("+")}
        return super().told(given)

    def __add__(self, other: SamplingMethod) -> SamplingMethod:
        """Both as one method, see [`Combined`]."""
        return SamplingMethod.of({"name": "combined", "parts": [self, other]})

    @property
    def takers(self) -> dict[str, SamplingMethod]:
        """The methods that targets are made for, by name: this one, or parts of a combination."""
        return {self.name: self}

    def with_objective(self, objective: object) -> SamplingMethod:
        """The same with another objective; ValueError for a method that has none."""
        if "objective" not in self.__dataclass_fields__:
            raise ValueError(f"`objective` is a field of 'nopt', and {self.name!r} has none: leave it out.")
        return dataclasses.replace(self, objective=objective)  # type: ignore[call-arg]

    def with_iterations(self, iterations: int) -> SamplingMethod:
        """The same with so many updates of a step's noise, if it has `iterations`."""
        known = "iterations" in self.__dataclass_fields__
        return dataclasses.replace(self, iterations=iterations) if known else self  # type: ignore[call-arg]

    @property
    def second_moment(self) -> bool:
        """Whether targets that are made for it need E ψψᵀ."""
        return False

    @property
    def by_budget(self) -> bool:
        """Whether targets depend on how many images a class will have."""
        return False

    @property
    def weighs(self) -> bool:
        """Whether images count unequally in training, see `weights`."""
        return False

    @property
    def memory(self) -> str | None:
        """What later blocks of a run are told of finished ones, as `previous`.

        "sums" of their embeddings by class, "images" (each embedding), or None for nothing.
        """
        return None

    @property
    def uses_classifier(self) -> bool:
        """Whether the pipeline's classifiers see the images, and so must be able to."""
        return False

    def label(self, targets: object) -> str:
        """What results call a set that was drawn so."""
        return self.name.split(":")[-1].lower()

    def without_targets(self) -> SamplingMethod:
        """What is drawn where there are no targets: this, or plain samples if it is nothing without."""
        return self

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError for targets, or parts of a pipeline, that do not fit."""

    def stand_in_targets(self, pipe: DiffusionPipeline) -> Targets | None:
        """Targets of the right shapes for all classes of a pipeline, without data, by which costs are counted.

        None where [`MatchingTargets`], or nothing, stand in.
        """
        return None

    def rehearsed(self) -> SamplingMethod:
        """A method of the same passes through networks, by which they are counted: without work of other kinds."""
        return self

    def own_passes(
        self, pipe: DiffusionPipeline
    ) -> tuple[torch.nn.Module, dict[str, Callable[[torch.Tensor], torch.Tensor]]] | None:
        """A network of its own, and by kind what it does with pixels `(1, C, H, W)`: of these passes costs are traced.

        Kinds that end in "_backward" also take the gradient to the pixels. None where there is no such network.
        """
        return None

    def make_targets(
        self,
        pipe: DiffusionPipeline,
        given: Population,
        sampling: Sampling,
        *,
        seed: int = 0,
        progress: bool = True,
        images_per_class: int | None = None,
        **shared: Any,
    ) -> Targets:
        """Targets of what is given in their place.

        Args:
            pipe (`DiffusionPipeline`): that is to draw.
            given: a dataset of real images; or, data-free, a label set's name or a list of the generator's classes.
            sampling ([`Sampling`]): as the set is drawn, so are the samples that stand for the generator's classes.
            seed (`int`): of those samples.
            progress (`bool`): show a progress bar.
            images_per_class (`int`, *optional*): that will be drawn, where it is known; see `by_budget`.
            shared: `accelerator` and `work_dir` of [`MatchingTargets.from_dataset`].

        Raises:
            ValueError: for what targets cannot be made of.
        """
        options: dict[str, Any] = {"second_moment": self.second_moment, "progress": progress, **shared}
        if isinstance(given, Dataset | IterableDataset):
            return MatchingTargets.from_dataset(given, pipe, **options)
        drawn = {name: getattr(sampling, name) for name in ("num_inference_steps", "guidance_scale", "eta")}
        return MatchingTargets.from_generator(pipe, given, seed=seed, **options, **drawn)

    def prepare(self, call: Call) -> None:
        """Called once, before all else: what is to be kept for the length of the call goes into `call.state`."""

    def begin(self, call: Call) -> tuple[torch.Tensor, int]:
        """The first latents `(B, C, h, w)` and the first of the sampling steps; called once."""
        return call.first_latents(), 0

    def guide(self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """The prediction `(B, C, h, w)` that step i takes; given is the denoiser's.

        `call.clean(i, latents, noise_pred)` is x̂0, `call.timesteps[i]` t, and `call.sigma(i)` the deviation of the
        step's noise.
        """
        return noise_pred

    def noise(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The noise `(B, C, h, w)` that step i takes; given is a draw of it."""
        return noise

    def choose(self, call: Call, latents: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Which of the drawn images stay, in the order of `call.wanted`: indices `(len(call.wanted),)`.

        Args:
            call ([`Call`]): its `ids` are the classes of the drawn images, the wanted ones `candidates` times over.
            latents (`torch.Tensor` of shape `(B, C, h, w)`): all that were drawn.
            pixels (`torch.Tensor` of shape `(B, C, H, W)`): the images, in about [-1, 1].
        """
        return torch.arange(len(call.wanted))

    def weights(self, call: Call) -> torch.Tensor:
        """How much each of the drawn images counts in training if it stays, `(B,)`: 1 is as much as others.

        Asked only of a method that `weighs`.
        """
        return torch.ones(len(call.ids))


@dataclasses.dataclass(frozen=True)
class Plain(SamplingMethod):
    """Ancestral sampling, steered by nothing."""

    sentence: ClassVar[str] = (
        "The synthetic images are plain samples of a class-conditional diffusion model: nothing was optimised."
    )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn: what calls, runs, records, costs and recipes share.

    Attributes:
        num_inference_steps (`int`): sampling steps; if None the method's own, which are 50 unless noise is optimised,
            and 16 of NOpt.
        guidance_scale (`float`): classifier-free guidance; 1 is off.
        eta (`float`): 1 is ancestral sampling; smaller values leave less noise to optimise, 0 none. See [`Steps`].
        batch_size (`int`, *optional*): images per pass through denoiser, decoder and classifier; all of a call at once
            if None. Memory grows with it; a joint gradient stays exact.
        method ([`SamplingMethod`]): what steers it; a name, such as "plain", becomes the object.
    """

    num_inference_steps: int = None  # type: ignore[assignment]  # until it is made
    guidance_scale: float = 4.0
    eta: float = 1.0
    batch_size: int | None = None
    method: SamplingMethod = dataclasses.field(default_factory=lambda: SamplingMethod.of("nopt"))

    field_limits = {"num_inference_steps": 1, "batch_size": 1, "eta": Limits(0, 1), "guidance_scale": 0}

    def __post_init__(self) -> None:
        """Refuses numbers out of range; makes the method of its name or record."""
        object.__setattr__(self, "method", SamplingMethod.of(self.method))
        if self.num_inference_steps is None:
            object.__setattr__(self, "num_inference_steps", self.method.usual_steps)
        plain_fields(self)

    @classmethod
    def of(cls, method: object = None, objective: object = None, **fields: object) -> Self:
        """Options as callers give them.

        Args:
            method: a [`SamplingMethod`], its name, or a [`Sampling`] that the others change.
            objective: of the method, NOpt if none is given: an `Objective`, or its name.
            fields: of this class; those that are None are left as they are.

        Raises:
            TypeError: for an option that does not exist; the nearest is suggested.
            ValueError: for a value that cannot be, or a method without an objective.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.name != "method"]
        for name in fields:
            if name not in known:
                names = [*known, "method", "objective"]
                raise TypeError(f"There is no option `{name}`.{nearest(name, names)} The options are {names}.")
        base = (
            method if isinstance(method, cls) else cls() if method is None else cls(method=SamplingMethod.of(method))
        )
        changed: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        if objective is not None:
            changed["method"] = base.method.with_objective(objective)
        return dataclasses.replace(base, **changed)

    def for_targets(self, targets: object) -> Self:
        """The same, or plain sampling where the method needs targets and there are none."""
        method = self.method if targets is not None else self.method.without_targets()
        usual = self.num_inference_steps == self.method.usual_steps
        steps = method.usual_steps if usual else self.num_inference_steps
        return dataclasses.replace(self, method=method, num_inference_steps=steps)

    def make_targets(self, pipe: DiffusionPipeline, given: Any, **options: Any) -> Targets | None:
        """The targets that are given, or those of a dataset, a label set's name or a list of classes.

        Options are those of [`SamplingMethod.make_targets`].

        Raises:
            TypeError: for anything else; see [`SamplingMethod.make_targets`] for other errors.
        """
        if isinstance(given, DatasetDict | IterableDatasetDict):
            raise TypeError(
                f"Got all splits, {list(given)}; choose one, for example `dataset[{next(iter(given))!r}]`."
            )
        return self.method.make_targets(pipe, given, self, **options) if is_population(given) else given

    def as_record(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "method": self.method.as_record()}


def is_population(given: object) -> bool:
    """Whether targets are to be made of this: real images, a label set's name or a list of classes."""
    return isinstance(given, Dataset | IterableDataset | str | list | tuple)


class Call:
    """The state of one call of the pipeline, which it leaves as it was.

    Attributes:
        pipe (`DiffusionPipeline`), targets, sampling ([`Sampling`]): what it was called with.
        wanted (`list[int]`): the generator's class of each image that is asked for.
        indices (`list[int]`): which image of its class, counted from 0, each drawn image is, or is a candidate for.
        ids (`list[int]`), labels (`torch.Tensor` of shape `(B,)`): those of each image that is drawn.
        conditions (`torch.Tensor` of shape `(B,)`): what the denoiser is told in their place, see its family.
        steps ([`Steps`]): the noise levels and what leads from one to the next, with a scheduler of its own.
        batch_size (`int`): images per pass.
        previous (`tuple`, *optional*): finished images, as the method's `memory` tells them.
        counts (`Counter`): images that passed through the networks, by `KINDS`.
        discrepancies (`list[torch.Tensor]`): losses `(K,)` of the classes.
        state: what the method keeps.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        ids: Sequence[int],
        targets: Targets | None = None,
        sampling: Sampling | None = None,
        *,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        previous: tuple[torch.Tensor, torch.Tensor] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.pipe, self.sampling = pipe, (sampling or Sampling()).for_targets(targets)
        self.targets: Any = targets  # of whatever class the method takes
        self.method = self.sampling.method
        self.wanted, self.ids = list(ids), [*ids] * self.method.candidates
        counted = counted_in_class(self.wanted) if indices is None else list(indices)
        self.indices = counted * self.method.candidates
        self.labels = torch.tensor(self.ids, device=pipe._execution_device)
        self.generator = with_candidates(generator, self.method.candidates)
        conditions = pipe.family.conditions(self.ids, seeds_of(self.generator, len(self.ids)))
        self.conditions = torch.tensor(conditions, device=pipe._execution_device)
        self.given, self.previous = latents, previous
        self.batch_size = self.sampling.batch_size or len(self.ids)
        self.steps = Steps(
            pipe.scheduler, self.sampling.num_inference_steps, self.sampling.eta, tokens=pipe.family.tokens,
            own_spacing=pipe.family.own_spacing, device=pipe._execution_device,
        )  # fmt: skip
        self.counts: Counter[str] = Counter()
        self.discrepancies: list[torch.Tensor] = []
        self.watch = FiniteWatch(self.ids, self.timesteps)
        self.state: Any = None

    @property
    def timesteps(self) -> torch.Tensor:
        """What the denoiser is told at each step, `(S,)`."""
        return self.steps.timesteps

    @property
    def eta(self) -> float:
        """η of the steps; 0 where there is no noise to move."""
        return self.steps.eta

    def first_latents(self) -> torch.Tensor:
        """Pure noise `(B, C, h, w)`, or the latents that were given."""
        given = None if self.given is None else self.given.repeat(self.method.candidates, 1, 1, 1)
        return self.pipe.prepare_latents(len(self.ids), self.generator, given)

    def draw_noise(self, like: torch.Tensor) -> torch.Tensor:
        """Gaussian noise of the shape of `(B, C, h, w)`, of the call's generators."""
        return randn_tensor(like.shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def predict_noise(
        self, latents: torch.Tensor, timestep: torch.Tensor | int, guidance_scale: float | None = None
    ) -> torch.Tensor:
        """ε_θ `(B, C, h, w)` of all images of the call, counted, in passes of `batch_size` images."""
        scale = self.sampling.guidance_scale if guidance_scale is None else guidance_scale
        self.counts["denoiser"] += len(latents) * (2 if scale > 1 else 1)
        parts = zip(latents.split(self.batch_size), self.conditions.split(self.batch_size), strict=True)
        found = [self.pipe.predict_noise(x, timestep, y, scale) for x, y in parts]
        return torch.cat(found) if len(found) > 1 else found[0]

    def passed(self, kind: str, images: int) -> None:
        """Counts images that pass through a network: as `_backward` if a gradient is to be taken of it."""
        self.counts[f"{kind}_backward" if torch.is_grad_enabled() else kind] += images

    def decode(self, latents: torch.Tensor, *, preview: bool = False) -> torch.Tensor:
        """Pixels `(B, C, H, W)` of latents `(B, C, h, w)`, see [`DsCoPipeline.decode_latents`], counted."""
        if preview and (self.pipe.vae is not None or self.pipe.preview_vae is not None):
            self.passed("preview", len(latents))
        elif self.pipe.vae is not None:
            self.counts["decoder"] += len(latents)
        return self.pipe.decode_latents(latents, preview=preview)

    def chosen(self, rows: torch.Tensor) -> torch.Tensor:
        """The indices `(N,)` that a method chose; ValueError unless they are of the wanted classes, in order."""
        found = [self.ids[row] for row in rows.tolist()]
        if found != self.wanted:
            raise ValueError(
                f"`choose` of {self.method.name!r} left images of the classes {found[:10]}, and {self.wanted[:10]} "
                "were asked for: return one index for each of `call.wanted`, of an image of that class."
            )
        return rows

    def step(self, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_{t-1} of step i, all `(B, C, h, w)`; gradients reach the noise."""
        return self.steps.step(i, latents, noise_pred, noise)

    def clean(self, i: int, latents: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """x̂0 `(B, C, h, w)`, the clean latents that a prediction at step i says; gradients reach both."""
        return self.steps.clean(i, latents, noise_pred)

    def sigma(self, i: int) -> float:
        """Standard deviation of the noise that step i adds; 0 at the last."""
        return self.steps.deviation(i)


def calls(passes: Mapping[str, int]) -> dict[str, int]:
    """`denoiser_calls`, `decoder_calls` and `classifier_calls` of passes by kind, as in [`DsCoPipelineOutput`]."""
    return {name: sum(passes.get(kind, 0) for kind in kinds) for name, kinds in _CALLS.items()}
