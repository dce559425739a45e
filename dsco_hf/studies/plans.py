"""Which small sets a study draws, of which methods and sizes, and with what: options that recipes inherit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from ..concentration.selection import SELECTIONS
from ..data.schema import nearest
from ..matching.objectives import MATCHING
from ..utils.values import check_choice


METHODS = ("plain", "nopt", "nopt-data-free", "nopt-quantile")
FEATURES: dict[str, Any] = {
    "trained": {},
    "untrained": {"network": "classifier_2"},
    "both": [{}, {"network": "classifier_2"}],
}
DEFAULT_BUDGETS = (1, 10, 50)
# What all sets of a study depend on beside models and images; the rest is about single sets.
SHARED = (
    "num_inference_steps", "guidance_scale", "block_size", "images_per_call", "samples_per_class",
    "template_guidance_scale", "template_steps", "weighting", "quantile_iterations", "features", "step_size",
    "optimize_from", "optimize_until",
)  # fmt: skip


def set_name(method: str, images_per_class: int, seed: int) -> str:
    """What a study calls a set, such as "nopt-ipc10-seed0"."""
    return f"{method}-ipc{images_per_class}-seed{seed}"


def set_parts(name: str) -> tuple[str, int, int]:
    """Method, images per class and seed of a set's name; the inverse of [`set_name`]."""
    method, size, seed = name.rsplit("-", 2)
    return method, int(size.removeprefix("ipc")), int(seed.removeprefix("seed"))


def clear_name(share: float) -> str:
    """Name of the targets of the clearest images."""
    return f"clearest-{share}"


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """The small sets of a study.

    Attributes:
        features: what is matched: those of the "trained" classifier; of an "untrained" network of the evaluators'
            architecture, whose seed no evaluator has (as in distribution matching, https://arxiv.org/abs/2110.04181);
            or of "both".
        methods: of "plain", "nopt", "nopt-data-free" and "nopt-quantile" (the released objective, which takes long).
        budgets: images per class; if none, those of 1, 10 and 50 that every class has.
        synthesis_seeds: repetitions of the sets. "nopt-quantile", whose cost is many times that of the others, has
            one.
        num_inference_steps, guidance_scale: of sampling.
        clearest_share: "nopt" matches this share of every class, the images that the classifier is surest of; one
            value, or one for each of the budgets. Fewer images can only show clearer ones.
        step_size, optimize_from, optimize_until: of NOpt. With a weak generator, steps of less than 1 stay closer to
            the images it knows.
        objective: of NOpt, "rkhs" or "ridge"; one, or one for each of the budgets.
        contrast, regularization: of NOpt with "rkhs" and with "ridge"; one value, or one for each of the budgets.
        block_size: images of a class that are optimised jointly.
        images_per_call: images of several classes drawn in one call, at most.
        samples_per_class: generator samples behind the data-free targets.
        template_guidance_scale, template_steps: of those samples, in place of `guidance_scale` and
            `num_inference_steps`: less guidance and more steps bring them nearer to the real images.
        weighting: of those samples by what the classifier says of them, see `MatchingTargets.from_generator`.
        doping_budgets: images per class of sets whose first part is the largest set of "nopt" below it, and whose rest
            are chosen real images; if neither these nor `budgets` are given, half of the smallest class.
        doping_strategy: how they are chosen, see `dsco_hf.dope`; "clarity" takes four students.
        quantile_iterations: of the released objective, per sampling step; its authors use 200.

    Raises:
        ValueError: for something that does not exist, or values that do not go together.
    """

    features: str = "trained"
    methods: list[str] = field(default_factory=lambda: ["plain", "nopt", "nopt-data-free"])
    budgets: list[int] = field(default_factory=list)
    synthesis_seeds: int = 2
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    clearest_share: list[float] = field(default_factory=lambda: [1.0])
    step_size: float = 1.0
    optimize_from: float = 0.6
    optimize_until: float = 1.0
    objective: list[str] = field(default_factory=lambda: ["rkhs"])
    contrast: list[float] = field(default_factory=lambda: [0.0])
    regularization: list[float] = field(default_factory=lambda: [2.0])
    block_size: int = 10
    images_per_call: int = 128
    samples_per_class: int = 200
    template_guidance_scale: float | None = None
    template_steps: int | None = None
    weighting: str = "confidence"
    doping_budgets: list[int] = field(default_factory=list)
    doping_strategy: str = "herding"
    quantile_iterations: int = 200

    def __post_init__(self) -> None:
        """Refuses what does not exist, or does not go together."""
        if self.features not in FEATURES:
            raise ValueError(
                f"`features` must be one of {list(FEATURES)}, got {self.features!r}.{nearest(self.features, FEATURES)}"
            )
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"`methods` may hold {list(METHODS)}, got {method!r}.{nearest(method, METHODS)}")
        check_choice("doping_strategy", self.doping_strategy, list(SELECTIONS))
        for budget in self.doping_budgets:
            if "nopt" not in self.methods:
                raise ValueError(f"Real images are added to sets of 'nopt', which `methods` {self.methods} lacks.")
            if self.budgets and min(self.budgets) >= budget:
                raise ValueError(
                    f"`doping_budgets` must exceed the smallest of `budgets` {self.budgets}, got {budget}."
                )
        for objective in self.objective:
            if objective not in MATCHING:
                raise ValueError(
                    f"`objective` may hold {list(MATCHING)}, got {objective!r}.{nearest(objective, MATCHING)}"
                )
        for name in ("clearest_share", "objective", "contrast", "regularization"):
            if len(values := getattr(self, name)) > 1 and not self.budgets:
                raise ValueError(f"Several values of `{name}` belong to as many `budgets`: give these, too.")
            if len(values) not in (1, len(self.budgets) or 1):
                raise ValueError(
                    f"`{name}` must be one value or one for each of the {len(self.budgets)} budgets {self.budgets}, "
                    f"got {values}."
                )

    def for_classes(self, smallest: int) -> Self:
        """With the budgets that this number of images in the smallest class allows, where none were given."""
        if self.budgets:
            return self
        budgets = [budget for budget in DEFAULT_BUDGETS if budget <= smallest] or [1]
        doping = self.doping_budgets
        if not doping and "nopt" in self.methods and smallest // 2 > budgets[0]:
            doping = [smallest // 2]
        return dataclasses.replace(self, budgets=budgets, doping_budgets=doping)

    def at_budget(self, name: str, budget: int) -> Any:
        """The value of an option that may differ between budgets."""
        values: list[Any] = getattr(self, name)
        return values[self.budgets.index(budget) if len(values) > 1 else 0]

    @property
    def shared(self) -> dict[str, Any]:
        """What all sets depend on beside models and images."""
        return {name: getattr(self, name) for name in SHARED} | {"second_moment": self.second_moment}

    @property
    def second_moment(self) -> bool:
        """Whether the targets need E ψψᵀ."""
        return "ridge" in self.objective

    @property
    def matched(self) -> dict[str, Any]:
        """What targets are made for, as options of `MatchingTargets`."""
        return {"features": FEATURES[self.features], "second_moment": self.second_moment}

    @property
    def templates(self) -> dict[str, Any]:
        """How the samples behind data-free targets are drawn, as options of `MatchingTargets.from_generator`."""
        guidance = self.template_guidance_scale
        return {
            "num_inference_steps": self.template_steps or self.num_inference_steps,
            "guidance_scale": self.guidance_scale if guidance is None else guidance,
            "samples_per_class": self.samples_per_class,
            "weighting": self.weighting,
        }

    @property
    def pivots(self) -> dict[str, Any]:
        """How the targets of the released objective are made, as options of `QuantileTargets.from_dataset`."""
        return {"draws": 1, "counts": sorted({min(number, self.block_size) for number in self.budgets})}

    @property
    def sizes(self) -> list[int]:
        """All numbers of images per class, doped sets among them."""
        return sorted({*self.budgets, *self.doping_budgets})

    def set_names(self) -> list[str]:
        """Names of all synthetic sets, the slow ones first."""
        return [
            set_name(method, budget, seed)
            for budget in sorted(self.budgets, reverse=True)
            for method in reversed(METHODS)
            if method in self.methods
            for seed in range(1 if method == "nopt-quantile" else self.synthesis_seeds)
        ]

    def doped_names(self) -> dict[str, str]:
        """Names of the sets with real images in them, with the set of "nopt" that each begins with."""
        return {
            set_name("nopt+doping", budget, seed): set_name("nopt", max(b for b in self.budgets if b < budget), seed)
            for budget in self.doping_budgets
            for seed in range(self.synthesis_seeds)
        }

    def drawing(self, method: str, budget: int) -> tuple[str | None, dict[str, Any]]:
        """The population that a set matches ("real", "clearest-0.2", "nopt-data-free"), and how it is drawn.

        The options are those of `concentrate`.
        """
        names = ("num_inference_steps", "guidance_scale", "block_size", "images_per_call")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if method == "plain":
            return None, options | {"optimization_steps": 0}
        options |= {name: getattr(self, name) for name in ("step_size", "optimize_from", "optimize_until")}
        if method == "nopt-quantile":
            options |= {"objective": "quantile", "optimize_from": 0.0}
            return None, options | {"optimization_steps": self.quantile_iterations}
        objective = self.at_budget("objective", budget)
        strength = "contrast" if objective == "rkhs" else "regularization"
        options |= {"objective": objective, strength: self.at_budget(strength, budget)}
        if method == "nopt-data-free":
            return method, options
        share = self.at_budget("clearest_share", budget)
        return "real" if share == 1 else clear_name(share), options
