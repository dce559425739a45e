"""Methods combined: one part begins elsewhere, one steers the steps, one chooses among what was drawn."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...matching.files import SAVE_AGAIN
from ...matching.targets import MatchingTargets
from ...utils.files import read_json, write_json
from ..call import Call, Population, Sampling, SamplingMethod, Targets


HOOKS = {
    "begin": "begin elsewhere than at pure noise",
    "guide": "change the prediction of a step",
    "noise": "move the noise of a step",
    "choose": "choose among the drawn images",
    "weights": "weigh the images",
}
PARTS = "parts.json"


def hooks_of(method: SamplingMethod) -> list[str]:
    """The hooks in which a method differs from plain sampling."""
    return [hook for hook in HOOKS if getattr(type(method), hook) is not getattr(SamplingMethod, hook)]


@dataclasses.dataclass
class JointTargets:
    """Targets of several parts of a combination, each made for its part, of the same classes.

    Attributes:
        parts (`dict`): targets by the name of the part.
        class_names (`list[str]`), class_labels (`list[int]`): as in [`MatchingTargets`].
    """

    parts: dict[str, Any]
    class_names: list[str] = dataclasses.field(init=False)
    class_labels: list[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Refuses targets of different classes."""
        told = {name: (list(one.class_names), list(one.class_labels)) for name, one in self.parts.items()}
        (first, classes), *others = told.items()
        self.class_names, self.class_labels = classes
        if different := [name for name, found in others if found != classes]:
            raise ValueError(
                f"The targets of {first!r} and {different[0]!r} are of different classes, {classes[0][:10]} and "
                f"{told[different[0]][0][:10]}: make both of one dataset."
            )

    @property
    def provenance(self) -> dict[str, Any]:
        """What is the same of all parts, such as the dataset."""
        first, *others = [getattr(one, "provenance", {}) for one in self.parts.values()]
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

    def to(self, device: str | torch.device) -> JointTargets:
        """The same with tensors on another device, as far as parts can be moved."""
        return JointTargets({n: one.to(device) if hasattr(one, "to") else one for n, one in self.parts.items()})

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes each part into a folder of its name, and `parts.json`, which says what they are."""
        for name, one in self.parts.items():
            one.save_pretrained(Path(folder) / _file_name(name))
        write_json(Path(folder) / PARTS, {name: type(one).__name__ for name, one in self.parts.items()})

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> JointTargets:
        """Loads what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged.
        """
        declared = [getattr(kind, "targets_class", None) for kind in SamplingMethod.kinds.values()]
        known: dict[str, Any] = {kind.__name__: kind for kind in declared if isinstance(kind, type)}
        named = read_json(Path(name_or_path) / PARTS, SAVE_AGAIN)
        found = {
            name: known[kind].from_pretrained(Path(name_or_path) / _file_name(name)) for name, kind in named.items()
        }
        return cls(found)


def _file_name(name: str) -> str:
    """Of a part's folder: "module:Class" is no name for one on Windows."""
    return name.replace(":", ".")


def matching_of(targets: object) -> MatchingTargets | None:
    """The targets that discrepancies are measured by: these themselves, or one of several; None if there are none."""
    several = list(targets.parts.values()) if isinstance(targets, JointTargets) else [targets]
    return next((one for one in several if isinstance(one, MatchingTargets)), None)


@dataclasses.dataclass(frozen=True)
class Combined(SamplingMethod):
    """Several methods as one: `D4M() + NOpt()`, by name "d4m+nopt"; the order does not matter.

    Of each hook ([`HOOKS`]) at most one part differs from plain sampling, and no part moves noise that another does
    without. Where a part chooses, the others draw each of its sets of candidates as if it were the only one: a set is
    optimised by itself, and the first is what is drawn without the choice. Targets are made by each part that looks at
    some (`takes_targets`), in a pass of its own.

    Attributes:
        parts (tuple of [`SamplingMethod`]): names and records become objects.
    """

    parts: tuple[SamplingMethod, ...] = ()

    def __post_init__(self) -> None:
        """Makes the parts of their names or records; refuses those that contradict each other."""
        if isinstance(self.parts, str) or not isinstance(self.parts, Sequence) or not self.parts:
            raise TypeError(f"`parts` must be a list of methods, such as ['d4m', 'nopt'], got {self.parts!r}.")
        given = [SamplingMethod.of(part) for part in self.parts]
        flat = [inner for part in given for inner in (part.parts if isinstance(part, Combined) else (part,))]
        check_parts(flat)
        object.__setattr__(self, "parts", tuple(sorted(flat, key=lambda part: list(HOOKS).index(hooks_of(part)[0]))))

    def of_hook(self, hook: str) -> SamplingMethod | None:
        """The part that differs from plain sampling in a hook, if one does."""
        return next((part for part in self.parts if hook in hooks_of(part)), None)

    def with_objective(self, objective: object) -> SamplingMethod:
        """The same with another objective of the part that has one."""
        has = ["objective" in part.__dataclass_fields__ for part in self.parts]
        if not any(has):
            return super().with_objective(objective)
        pairs = zip(self.parts, has, strict=True)
        return Combined(tuple(part.with_objective(objective) if own else part for part, own in pairs))

    @property
    def iterations(self) -> int:
        """Of the part that has some."""
        return max(getattr(part, "iterations", 1) for part in self.parts)

    def with_iterations(self, iterations: int) -> SamplingMethod:
        """As the parts are."""
        return dataclasses.replace(self, parts=tuple(part.with_iterations(iterations) for part in self.parts))

    @property
    def takers(self) -> dict[str, SamplingMethod]:
        """The parts that take targets."""
        return {part.name: part for part in self.parts if part.takes_targets}

    @property
    def takes_targets(self) -> bool:  # type: ignore[override]
        """As any part."""
        return bool(self.takers)

    @property
    def targets_class(self) -> type | None:  # type: ignore[override]
        """Of the one part that takes targets, or of several; None if those of one cannot be kept."""
        kinds = [part.targets_class for part in (self.takers or {"": self.parts[0]}).values()]
        return None if None in kinds else kinds[0] if len(kinds) == 1 else JointTargets

    @property
    def candidates(self) -> int:  # type: ignore[override]
        """Of the part that chooses."""
        return max(part.candidates for part in self.parts)

    @property
    def adds_noise(self) -> bool:  # type: ignore[override]
        """Unless a part does without."""
        return all(part.adds_noise for part in self.parts)

    @property
    def usual_steps(self) -> int:  # type: ignore[override]
        """The fewest of any part."""
        return min(part.usual_steps for part in self.parts)

    @property
    def sentence(self) -> str:  # type: ignore[override]
        """Those of the parts; what is chosen among is not plain then."""
        return " ".join(part.sentence.replace("plain samples", "samples") for part in self.parts)

    @property
    def second_moment(self) -> bool:
        """As any part."""
        return any(part.second_moment for part in self.parts)

    @property
    def by_budget(self) -> bool:
        """As any part."""
        return any(part.by_budget for part in self.parts)

    @property
    def weighs(self) -> bool:
        """As any part."""
        return any(part.weighs for part in self.parts)

    @property
    def memory(self) -> str | None:
        """Of the part that has one."""
        return next((part.memory for part in self.parts if part.memory is not None), None)

    @property
    def uses_classifier(self) -> bool:
        """As any part."""
        return any(part.uses_classifier for part in self.parts)

    def as_record(self) -> dict[str, Any]:
        """Name, and the records of the parts."""
        return {"name": self.name, "parts": [part.as_record() for part in self.parts]}

    def label(self, targets: object) -> str:
        """Those of the parts, such as "d4m+nopt"."""
        return "+".join(part.label(self.targets_of(part, targets)) for part in self.parts)

    def without_targets(self) -> SamplingMethod:
        """What the parts are without; those that are then plain samples are left out."""
        parts = [part.without_targets() for part in self.parts]
        left = tuple(part for part in parts if hooks_of(part))
        if tuple(parts) == self.parts:
            return self
        return Combined(left) if len(left) > 1 else left[0] if left else parts[0]

    def targets_of(self, part: SamplingMethod, targets: Any) -> Any:
        """What a part is given of the targets: its own, or those that there are; None if it looks at none."""
        own = targets.parts.get(part.name) if isinstance(targets, JointTargets) else targets
        return own if part.takes_targets else None

    def joined(self, targets: Mapping[str, Targets]) -> Targets:
        """The targets of [`Combined.takers`] as one object."""
        return JointTargets(dict(targets)) if len(targets) > 1 else next(iter(targets.values()))

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """As the parts do; ValueError for other targets than those of all parts that take some."""
        takers = self.takers
        if len(takers) > 1 and targets is not None:
            found = list(targets.parts) if isinstance(targets, JointTargets) else type(targets).__name__
            if found != list(takers):
                raise ValueError(
                    f"{list(takers)} each take targets of their own, got {found}: pass the dataset, and both are made."
                )
        for part in self.parts:
            part.check(pipe, self.targets_of(part, targets))

    def rehearsed(self) -> SamplingMethod:
        """As the parts are."""
        return dataclasses.replace(self, parts=tuple(part.rehearsed() for part in self.parts))

    def own_passes(
        self, pipe: DiffusionPipeline
    ) -> tuple[torch.nn.Module, dict[str, Callable[[torch.Tensor], torch.Tensor]]] | None:
        """Of the part that has a network."""
        return next((own for part in self.parts if (own := part.own_passes(pipe)) is not None), None)

    def make_targets(
        self, pipe: DiffusionPipeline, given: Population, sampling: Sampling, *, work_dir: Any = None, **options: Any
    ) -> Targets:
        """Those of each part that takes some, one after another; of names alone if none does."""
        takers = self.takers or {self.parts[0].name: self.parts[0]}
        if work_dir is None or len(takers) == 1:
            places = dict.fromkeys(takers, work_dir)
        else:
            places = {name: Path(work_dir) / _file_name(name) for name in takers}
        made = {}
        for name, part in takers.items():
            own = {} if places[name] is None else {"work_dir": places[name]}
            made[name] = part.make_targets(pipe, given, sampling, **options, **own)
        return self.joined(made)

    def prepare(self, call: Call) -> None:
        """Lets each part see the call as if it were alone: `call.state` is by part, for each set of candidates."""
        chooses = self.of_hook("choose")
        call.state = {
            part.name: [
                (rows, seen_by(part, call, self.targets_of(part, call.targets), rows))
                for rows in ([slice(None)] if part is chooses else sets_of(call))
            ]
            for part in self.parts
        }
        for part in self.parts:
            for _, seen in call.state[part.name]:
                part.prepare(seen)

    def begin(self, call: Call) -> tuple[torch.Tensor, int]:
        """Where the part begins that begins elsewhere, `(B, C, h, w)`."""
        if (part := self.of_hook("begin")) is None:
            return super().begin(call)
        found = [part.begin(seen) for _, seen in call.state[part.name]]
        return torch.cat([latents for latents, _ in found]), found[0][1]

    def guide(self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """The prediction `(B, C, h, w)` of the part that changes it."""
        if (part := self.of_hook("guide")) is None:
            return noise_pred
        seen = call.state[part.name]
        return torch.cat([part.guide(one, i, latents[rows], noise_pred[rows]) for rows, one in seen])

    def noise(
        self, call: Call, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The noise `(B, C, h, w)` of the part that moves it; a loss is the mean over the sets of candidates."""
        if (part := self.of_hook("noise")) is None:
            return noise
        seen = call.state[part.name]
        before = [len(one.discrepancies) for _, one in seen]
        moved = torch.cat([part.noise(one, i, latents[rows], noise_pred[rows], noise[rows]) for rows, one in seen])
        new = [one.discrepancies[count:] for (_, one), count in zip(seen, before, strict=True)]
        call.discrepancies += [torch.stack(losses).mean(dim=0) for losses in zip(*new, strict=True)]
        return moved

    def choose(self, call: Call, latents: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """What the part that chooses would choose alone, `(N,)`."""
        if (part := self.of_hook("choose")) is None:
            return super().choose(call, latents, pixels)
        ((_, seen),) = call.state[part.name]
        return part.choose(seen, latents, pixels)

    def weights(self, call: Call) -> torch.Tensor:
        """Those of the part that weighs, `(B,)`."""
        if (part := self.of_hook("weights")) is None:
            return super().weights(call)
        return torch.cat([part.weights(seen) for _, seen in call.state[part.name]])


def sets_of(call: Call) -> list[slice]:
    """The drawn images of each set of candidates."""
    size = len(call.wanted)
    return [slice(first, first + size) for first in range(0, len(call.ids), size)]


def seen_by(part: SamplingMethod, call: Call, targets: Any, rows: slice) -> Call:
    """A call as one part sees it: with its own targets and state, and of these images only; counts are the call's."""
    seen = copy.copy(call)
    seen.method, seen.targets, seen.state, seen.discrepancies = part, targets, None, []
    seen.sampling = dataclasses.replace(call.sampling, method=part)
    for name in ("ids", "indices", "labels", "conditions"):
        setattr(seen, name, getattr(call, name)[rows])
    if isinstance(call.generator, Sequence):
        seen.generator = call.generator[rows]
    return seen


def check_parts(parts: Sequence[SamplingMethod]) -> None:
    """Raises ValueError for methods that contradict each other, or one that does nothing."""
    for part in parts:
        if not hooks_of(part):
            raise ValueError(
                f"{part.name!r} steers nothing, so it is no part of a combination: leave it out. {_allowed()}"
            )
    for hook, does in HOOKS.items():
        both = [part for part in parts if hook in hooks_of(part)]
        if len(both) > 1:
            raise ValueError(
                f"{both[0].name!r} and {both[1].name!r} both {does}, of which a combination has one: leave one of "
                f"them out. {_allowed()}"
            )
    still = next((part for part in parts if not part.adds_noise), None)
    moves = next((part for part in parts if "noise" in hooks_of(part)), None)
    if still is not None and moves is not None and still is not moves:
        raise ValueError(
            f"{still.name!r} draws without noise, so there is none for {moves.name!r} to move: leave one of them out. "
            f"{_allowed()}"
        )


def _allowed() -> str:
    """Which methods there are for each hook, for an error."""
    kinds = {name: kind for name, kind in SamplingMethod.kinds.items() if ":" not in name and kind is not Combined}
    names = {
        hook: [name for name, kind in kinds.items() if getattr(kind, hook) is not getattr(SamplingMethod, hook)]
        for hook in HOOKS
        if hook != "weights"
    }
    told = "; ".join(f"{HOOKS[hook].split(' of')[0]} {', '.join(found)}" for hook, found in names.items())
    return f"At most one each may: {told}."
