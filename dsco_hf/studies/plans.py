"""Which small sets a study draws, of which methods and sizes, and with what; and the making of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

from accelerate import Accelerator
from datasets import Dataset

from ..concentration.additions.doping import dope, select
from ..concentration.concentrate import concentrate_and_report
from ..concentration.selection import Clearest, find_selection
from ..data.datasets import Pool
from ..data.schema import nearest
from ..data.shards import file_sha256
from ..matching.feature_spec import feature_specs
from ..matching.kept import kept_targets, pipeline_identity
from ..matching.objectives import ClassifierEvidence, Objective
from ..matching.targets import MatchingTargets
from ..sampling.call import Plain, Sampling
from ..sampling.flat import from_flat
from ..sampling.methods import Combined, JointTargets, NOpt, QuantileTargets, Released
from ..sampling.peers import PEERS, ClassStatistics
from ..sampling.pipeline import DsCoPipeline
from ..utils.configs import ImportOptions
from ..utils.files import read_json, write_json
from ..utils.origins import fingerprint, identity
from ..utils.progress import Bar, Clock
from ..utils.values import Named
from .generator_check import GeneratorCheck
from .kept import DRAW_AGAIN, KeptSets, clear_name, flops_of, kept_check, passes_of, set_name, set_parts, shared_out


METHODS = ("plain", "nopt-classifier-only", "nopt", "nopt-data-free", "nopt-quantile")
ALLOWED = (*METHODS, *PEERS)
PUBLISHED = ("nopt", "nopt-data-free", "nopt-quantile", "plain")  # the first that was drawn becomes the dataset
OF_SAMPLING = ("num_inference_steps", "guidance_scale")
Kept: TypeAlias = MatchingTargets | ClassStatistics
EFFORT = {"plain": 1.0, "best-of-n": 4.0, "s3": 5.0, "igd": 40.0}
DEFAULT_BUDGETS = (1, 10, 50)
PER_BUDGET = ("clearest_share", "objective", "contrast", "regularization")  # one value, or one for each budget
# What all sets of a study depend on beside models and images; the rest is about single sets.
SHARED = (
    "num_inference_steps", "guidance_scale", "block_size", "images_per_call", "samples_per_class",
    "template_guidance_scale", "template_steps", "weighting", "quantile_iterations", "features", "step_size",
    "optimize_from", "optimize_until",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StudyPlan(ImportOptions):
    """The small sets of a study.

    Attributes:
        features: what is matched, as YAML or JSON; see `dsco_hf.matching.feature_spec`. An untrained network's seed is
            one that no evaluator has.
        methods: of "plain", "nopt", "nopt-data-free", "nopt-classifier-only" (matches nothing: the classifier's
            evidence alone) and "nopt-quantile" (the released objective, which takes long); or peers, such as "mgd3",
            with their defaults, see `dsco_hf.sampling.peers`; or several that go together, such as "d4m+nopt".
        budgets: images per class; if none, those of 1, 10 and 50 that every class has.
        synthesis_seeds: repetitions of the sets. "nopt-quantile", whose cost is many times that of the others, has
            one.
        single_seeds: of those at one image per class, where sets differ most; as many if None.
        num_inference_steps, guidance_scale: of sampling.
        clearest_share: "nopt" matches this share of every class, the images that the classifier is surest of; one
            value, or one for each of the budgets. Fewer images can only show clearer ones.
        step_size, optimize_from, optimize_until: of NOpt. With a weak generator, steps of less than 1 stay closer to
            the images it knows.
        objective: of NOpt, "ridge", "rkhs" or your own "module:Class", also with fields; one, or one for each budget.
        contrast, regularization: of NOpt with "rkhs" and with "ridge"; one value, or one for each of the budgets.
        block_size: images of a class that are optimised jointly.
        images_per_call: images of several classes drawn in one call, at most.
        samples_per_class: generator samples behind the data-free targets.
        template_guidance_scale, template_steps: of those samples, in place of `guidance_scale` and
            `num_inference_steps`: less guidance and more steps bring them nearer to the real images.
        weighting: of those samples by what the classifier says of them, see `MatchingTargets.from_generator`.
        doping_budgets: images per class of sets whose first part is the largest set of "nopt" below it, and whose rest
            are chosen real images; if neither these nor `budgets` are given, half of the smallest class.
        doping_strategy: how they are chosen, by name or with fields, see `dsco_hf.dope`; "clarity" takes four
            students.
        doping_class_wise: fill every class to the same number; otherwise "clarity" ranks over all of them.
        quantile_iterations: of the released objective, per sampling step; its authors use 200.
        check_images: plain samples of a class that the classifier is asked about before anything is drawn, 64 at most;
            0 asks nothing.

    Raises:
        ValueError: for something that does not exist, or values that do not go together.
    """

    features: str | None = None
    methods: list[str] = field(default_factory=lambda: ["plain", "nopt", "nopt-data-free"])
    budgets: list[int] = field(default_factory=list)
    synthesis_seeds: int = 2
    single_seeds: int | None = None
    num_inference_steps: int = 16
    guidance_scale: float = 1.0
    clearest_share: list[float] = field(default_factory=lambda: [1.0])
    step_size: float = 1.0
    optimize_from: float = 0.0
    optimize_until: float = 1.0
    objective: list[Named] = field(default_factory=lambda: ["ridge"])
    contrast: list[float] = field(default_factory=lambda: [0.0])
    regularization: list[float] = field(default_factory=lambda: [2.0])
    block_size: int = 10
    images_per_call: int = 128
    samples_per_class: int = 200
    template_guidance_scale: float | None = None
    template_steps: int | None = None
    weighting: str = "confidence"
    doping_budgets: list[int] = field(default_factory=list)
    doping_strategy: Named = "ridge_rule"
    doping_class_wise: bool = True
    quantile_iterations: int = 200
    check_images: int = 4

    def __post_init__(self) -> None:
        """Refuses what does not exist, or does not go together."""
        if self.features is not None:
            feature_specs(self.features)
        object.__setattr__(self, "methods", [one for given in self.methods for one in given.split(",") if one])
        for method in self.methods:
            for part in method.split("+"):
                if part not in ALLOWED or "nopt-quantile" == part != method:
                    told = f"{list(ALLOWED)}, or some of them, but not 'nopt-quantile', joined by '+'"
                    raise ValueError(f"`methods` may hold {told}, got {method!r}.{nearest(part, ALLOWED)}")
            if "+" in method:
                self.drawing(method, (self.budgets or DEFAULT_BUDGETS)[0])  # refuses parts that contradict each other
        find_selection(self.doping_strategy)
        for budget in self.doping_budgets:
            if "nopt" not in self.methods:
                raise ValueError(f"Real images are added to sets of 'nopt', which `methods` {self.methods} lacks.")
            if self.budgets and min(self.budgets) >= budget:
                raise ValueError(
                    f"`doping_budgets` must exceed the smallest of `budgets` {self.budgets}, got {budget}."
                )
        for objective in self.objective:
            if Objective.of(objective).needs is None:
                raise ValueError(f"`objective` may hold those that match something, and {objective!r} does not.")
        for name in PER_BUDGET:
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
        return any(Objective.of(name).needs == "second_moment" for name in self.objective)

    @property
    def matched(self) -> dict[str, Any]:
        """What targets are made for, as options of `MatchingTargets`."""
        return {"features": self.features, "second_moment": self.second_moment}

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

    def seeds(self, method: str, budget: int) -> range:
        """Seeds of the sets of a method and size."""
        several = self.single_seeds if budget == 1 and self.single_seeds else self.synthesis_seeds
        return range(1 if method == "nopt-quantile" else several)

    def set_names(self) -> list[str]:
        """Names of all synthetic sets, the slow ones first."""
        return [
            set_name(method, budget, seed)
            for budget in sorted(self.budgets, reverse=True)
            for method in sorted(dict.fromkeys(self.methods), key=[*ALLOWED, *self.methods].index, reverse=True)
            for seed in self.seeds(method, budget)
        ]

    def effort(self, name: str) -> float:
        """About how long a set takes, in images that are sampled plainly; told by figures of the digits."""
        method, budget, _ = set_parts(name)
        quantile = 2.0 * self.quantile_iterations * (budget + 5)  # real images pass, too
        parts = math.prod(EFFORT.get(part, 1.5) for part in method.split("+"))
        return quantile if method == "nopt-quantile" else budget * parts

    def doped_names(self) -> dict[str, str]:
        """Names of the sets with real images in them, with the set of "nopt" that each begins with."""
        return {
            set_name("nopt+doping", budget, seed): set_name("nopt", max(b for b in self.budgets if b < budget), seed)
            for budget in self.doping_budgets
            for seed in self.seeds("nopt", budget)
        }

    def published(self, doped: str = "doped{budget}") -> dict[str, str]:
        """Sets of the first seed that make the dataset of the study, by config; none without a method of its own."""
        method = next((name for name in PUBLISHED if name in self.methods), None)
        configs = {f"ipc{budget}": set_name(method, budget, 0) for budget in self.budgets} if method else {}
        mixed = {doped.format(budget=budget): set_name("nopt+doping", budget, 0) for budget in self.doping_budgets}
        return configs | mixed

    def drawing(self, method: str, budget: int) -> tuple[str | None, dict[str, Any]]:
        """What a set is drawn for ("real", "clearest-0.2", "nopt-data-free", "centroids-10"), and how it is drawn.

        The options are those of `concentrate`. What the parts of a combination are drawn for is joined by "+".
        """
        if "+" in method:
            alone = [self.drawing(part, budget) for part in method.split("+")]
            combined = Combined(tuple(options["method"] for _, options in alone))
            asked = {options["method"].name: population for population, options in alone}
            found = [population for part in combined.takers if (population := asked[part])]
            return "+".join(found) or None, alone[0][1] | {"method": combined}
        names = (*OF_SAMPLING, "block_size", "images_per_call")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if method == "plain":
            return None, options | {"method": Plain()}
        if method == "nopt-classifier-only":
            # of all steps, it teaches less on the digits than of the late ones
            return None, options | {"method": NOpt(ClassifierEvidence(), start=0.6)}
        if method == "nopt-quantile":
            return None, options | {"method": Released(self.quantile_iterations)}
        if method in PEERS:
            peer = PEERS[method]()
            size = f"-{budget}" if peer.by_budget else ""
            return None if peer.statistics == "names" else f"{peer.statistics}{size}", options | {"method": peer}
        of_method = ("step_size", "optimize_from", "optimize_until")
        of_objective = ("objective", "contrast", "regularization")
        flat = {name: getattr(self, name) for name in of_method}
        options |= from_flat(flat | {name: self.at_budget(name, budget) for name in of_objective})
        if method == "nopt-data-free":
            return method, options
        share = self.at_budget("clearest_share", budget)
        return "real" if share == 1 else clear_name(share), options


class PlannedSets:
    """The sets of a plan and the targets that they match: each is made once, and kept beside all that decided it.

    Args:
        plan ([`StudyPlan`]): with budgets.
        pipe (`DsCoPipeline`): draws, with the networks that the plan's features name.
        real (`Dataset`): the real images to match and to choose from.
        folder (`str` or `Path`): on a file system that all processes see; sets of other models, images or settings
            lie beside these.
        clock ([`~dsco_hf.utils.progress.Clock`]): of the launch; when it is over, nothing new is begun.
        columns (mapping): `image_column` and `label_column` of `real`, where there are several.
        students (mapping): protocol and architecture of the students of doping by clarity.
        told: what else is to keep sets apart, such as where the images are from.
    """

    def __init__(
        self,
        plan: StudyPlan,
        pipe: DsCoPipeline,
        real: Dataset,
        folder: str | Path,
        *,
        clock: Clock,
        columns: Mapping[str, str | None] | None = None,
        students: Mapping[str, Any] | None = None,
        **told: Any,
    ) -> None:
        self.plan, self.pipe, self.real, self.clock = plan, pipe, real, clock
        self.accelerator = clock.accelerator
        self.columns: dict[str, Any] = dict(columns or {})
        self.students = dict(students or {})
        self.pool = Pool(real, progress=False, **self.columns)
        self.made_with = pipeline_identity(pipe, real, **plan.shared, **self.columns, **told)
        self.folder = Path(folder) / fingerprint(self.made_with)[:8]
        self.kept = KeptSets(self.folder / "sets")
        self.targets: dict[str, Any] = {}
        self.check: GeneratorCheck | None = None

    def make(self) -> None:
        """Makes what is left: the targets by all processes together, of the sets each process its share.

        Before anything is drawn, it is told what the classifier makes of plain samples, if the plan asks for it.
        """
        self.targets = {name: self._targets(name, make) for name, make in self._makers().items()}
        if self.plan.check_images and self.accelerator.is_main_process:
            self.clock.say("asking the classifier about plain samples")
            self.check = kept_check(
                self.folder / "generator_check.json", self.pipe, self.real, **self.columns,
                class_labels=self.targets["real"].class_labels, images_per_class=self.plan.check_images,
                num_inference_steps=self.plan.num_inference_steps, guidance_scale=self.plan.guidance_scale,
            )  # fmt: skip
            if self.check is not None:
                self.clock.say(str(self.check))
        self._draw()
        self._dope()

    def seconds(self, clock: Clock) -> float:
        """Time until all was done; a run that finds everything done tells that of the one that did it."""
        path = self.folder / "seconds.json"
        if not path.is_file():
            write_json(path, {"seconds": round(time.monotonic() - clock.start, 1)})
        return float(read_json(path, DRAW_AGAIN)["seconds"])

    def rows(self) -> dict[str, Dataset]:
        """The finished sets by name."""
        names = (*self.plan.set_names(), *self.plan.doped_names())
        return {name: self.kept.rows(name) for name in names if name in self.kept}

    def drawn_for(self, name: str) -> Any:
        """The targets of a set, or of the one that a doped set begins with, as far as they are files of their own."""
        drawn = self.plan.doped_names().get(name, name)
        method, budget, _ = set_parts(drawn)
        return self._matched(self.kept.told(drawn).get("population"), method, budget)

    def targets_of(self, name: str) -> MatchingTargets | None:
        """The same, if they are what a published set can bring."""
        return found if isinstance(found := self.drawn_for(name), MatchingTargets) else None

    def _makers(self) -> dict[str, Callable[..., Any]]:
        """How targets are made, by name; the discrepancy of all sets is measured by the first."""
        plan, parts = self.plan, dict.fromkeys("+".join(self.plan.methods).split("+"))

        def of_images(share: float = 1.0, **shared: Any) -> MatchingTargets:
            chosen = self.real
            if share < 1:
                chosen = select(self.pool, Clearest(share), pipe=self.pipe)
            return MatchingTargets.from_dataset(chosen, self.pipe, **plan.matched, **self.columns, **shared)

        makers: dict[str, Callable[..., Any]] = {"real": of_images}
        if "nopt" in parts:
            shares = sorted(set(plan.clearest_share) - {1})
            makers |= {clear_name(share): functools.partial(of_images, share) for share in shares}
        if "nopt-data-free" in parts:
            makers["nopt-data-free"] = functools.partial(
                MatchingTargets.from_generator, self.pipe, **plan.templates, **plan.matched
            )
        for method, budget in itertools.product([name for name in parts if name in PEERS], plan.budgets):
            population, options = plan.drawing(method, budget)
            if population is not None:
                sampling = Sampling.of(**{name: options[name] for name in (*OF_SAMPLING, "method")})
                given = {"images_per_class": budget, **self.columns}
                makers[population] = functools.partial(sampling.make_targets, self.pipe, self.real, **given)
        return makers

    def _targets(self, name: str, make: Callable[..., Kept]) -> Kept:
        def timed(accelerator: Accelerator, work_dir: Path) -> Kept:
            self.clock.say(f"targets: {name}")
            start = time.perf_counter()
            targets = make(progress=False, accelerator=accelerator, work_dir=work_dir)
            targets.provenance["seconds"] = round(time.perf_counter() - start, 2)
            return targets

        path, made_with = self.folder / f"targets-{name}", {**self.made_with, "population": name}
        peer = name.split("-")[0] in {peer.statistics for peer in PEERS.values()}
        kind = ClassStatistics if peer else MatchingTargets
        return kept_targets(path, made_with, timed, accelerator=self.accelerator, renew=True, kind=kind)

    @functools.cached_property
    def _quantile(self) -> QuantileTargets:
        return QuantileTargets.from_dataset(self.real, self.pipe, progress=False, **self.plan.pivots, **self.columns)

    def _matched(self, population: str | None, method: str, budget: int) -> Any:
        """The targets of that name; of several names, joined by "+", those of the parts of a combination."""
        if population is None or "+" not in population:
            return self.targets.get(population or "")
        takers = self.plan.drawing(method, budget)[1]["method"].takers
        return JointTargets({part: self.targets[one] for part, one in zip(takers, population.split("+"), strict=True)})

    def _draw(self) -> None:
        self.clock.say(f"synthesis: {', '.join(self.plan.methods)}")
        rank = self.accelerator.process_index
        mine = shared_out(self.plan.set_names(), self.plan.effort, self.accelerator.num_processes)[rank]
        for name in Bar(mine, desc="Sets", disable=rank > 0):
            method, budget, seed = set_parts(name)
            population, options = self.plan.drawing(method, budget)
            targets = self._matched(population, method, budget)
            matched: object = self.plan.pivots if method == "nopt-quantile" else targets
            made_with = {**self.made_with, "set": identity(seed=seed, budget=budget, targets=matched, **options)}
            if self.kept.is_made(name, made_with) or self.clock.is_over():
                continue
            rows, report = concentrate_and_report(
                self.pipe, self._quantile if method == "nopt-quantile" else targets, budget, seed=seed,
                measure_by=self.targets["real"], progress=False, **options,
            )  # fmt: skip
            read: dict[str, Any] = {"features": self.plan.features, "data_pass": passes_of(targets, self.pipe)}
            flops = {} if seed else flops_of(self.pipe, options, self.targets["real"].num_classes, budget, **read)
            self.kept.save(name, rows, made_with, population=population, **dataclasses.asdict(report), **flops)
        self.accelerator.wait_for_everyone()

    def _dope(self) -> None:
        bases = self.plan.doped_names()
        for name in list(bases)[self.accelerator.process_index :: self.accelerator.num_processes]:
            _, budget, seed = set_parts(name)
            if bases[name] not in self.kept or self.clock.is_over():
                self.clock.unfinished = True
                continue
            rule = find_selection(
                self.plan.doping_strategy, targets=self.targets["real"], num_students=4, **self.students
            )
            doping: dict[str, Any] = {"strategy": rule, "images_per_class": budget, "seed": seed}
            doping |= {} if self.plan.doping_class_wise else {"class_wise": False}
            base, precision = file_sha256(self.kept.file(bases[name])), self.accelerator.mixed_precision
            made_with = {**self.made_with, "set": identity(base=base, mixed_precision=precision, **doping)}
            if self.kept.is_made(name, made_with):
                continue
            self.clock.say(f"doping: {name}")
            start = time.perf_counter()
            rows = dope(self.kept.rows(bases[name]), self.pool, self.pipe, progress=False, **doping)
            self.kept.save(name, rows, made_with, population="real", seconds=time.perf_counter() - start)
        self.accelerator.wait_for_everyone()
