"""Studies: what networks reach that are trained from scratch on small sets, beside real images; and the records."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel

from ..concentration.additions.doping import select, selected_rows
from ..concentration.methods import in_order
from ..concentration.selection import Herding
from ..data.datasets import Pool, find_columns, load_image_dataset, with_classes_of, with_numbered_classes
from ..data.pixels import image_sizes
from ..evaluators import (
    Execution,
    ImageSet,
    Protocol,
    TrainingJob,
    get_protocol,
    load_image_set,
    protocol_to_dict,
    run_job,
    summarise,
    train_job,
)
from ..evaluators.evaluation import read_job, run_environment
from ..matching.discrepancy import SetMeasures, measure_set
from ..utils.configs import make_accelerator
from ..utils.files import write_json
from ..utils.progress import Bar, Clock
from ..utils.values import check_whole
from .kept import FLOPS, passes_of
from .plans import PER_BUDGET, PlannedSets, StudyPlan, set_name


FULL = "full"  # the set of all real images
SetOfSeed = Callable[[int], ImageSet]


class Study:
    """Small sets, each with trainings from scratch: sets × networks × seeds → results.json.

        data, protocol = load_digits_dataset(), get_protocol("quick", steps=300)
        train = load_image_set(data["train"], protocol=protocol, num_channels=1)
        test = load_image_set(data["test"], protocol=protocol, num_channels=1, test_for=train)
        sets = real_baselines(train, [1, 10], random_seeds=2)
        mine = load_dataset("user/mine", split="train")
        sets["mine-ipc10-seed0"] = load_image_set(mine, protocol=protocol, num_channels=1, classes=train.names)
        study = Study(sets, test, "outputs/study", protocol=protocol, architectures=["convnet-3"], seeds=3)
        results = study.run(dataset="digits")
        print(results_table(results))

    Every training is done once: its result lies in `<folder>/jobs`, beside all that decided it, images and versions
    among them. The same lines run again, after a kill or by several processes (`accelerate launch`), do what is left
    and end with the same numbers. To another study's folder they refuse to write.

    Args:
        sets (mapping of `str` to [`~dsco_hf.evaluators.ImageSet`]): by name; those with names of [`set_name`] that
            differ in the seed only are one row. A function of the training's seed gives each training a set of its
            own; "full" is all real images. `study.sets` may grow between trainings.
        test ([`~dsco_hf.evaluators.ImageSet`]): images to test on.
        folder (`str` or `Path`): a file system that all processes see.
        protocol (`str` or `Protocol`): how networks are trained.
        architectures (sequence of `str`): see [`~dsco_hf.evaluators.build_evaluator`].
        seeds (`int` or sequence of `int`): of the trainings of each network on each set; a number counts from 0.
        accelerator (`Accelerator`, *optional*): of the launch; that of `clock`, or made if there is none.
        teacher (`PreTrainedModel`, *optional*): where labels are those of a teacher.
        clock ([`~dsco_hf.utils.progress.Clock`], *optional*): when it is over, nothing new is begun.
        models (`str` or `Path`, *optional*): where to store the trained networks.
        on_epoch (`Callable`, *optional*): is told the training's name and its figures after every epoch.
        training: overrides and track_best of [`~dsco_hf.evaluators.TrainingJob`], compiled of
            [`~dsco_hf.evaluators.Execution`], checkpoint_seconds and progress of [`~dsco_hf.evaluators.train_job`].
    """

    def __init__(
        self,
        sets: Mapping[str, ImageSet | SetOfSeed],
        test: ImageSet,
        folder: str | Path,
        *,
        protocol: str | Protocol = "quick",
        architectures: Sequence[str] = ("convnet-3",),
        seeds: int | Sequence[int] = 3,
        accelerator: Accelerator | None = None,
        teacher: PreTrainedModel | None = None,
        clock: Clock | None = None,
        models: str | Path | None = None,
        on_epoch: Callable[[str, dict[str, float]], None] | None = None,
        **training: Any,
    ) -> None:
        self.sets, self.test, self.folder = dict(sets), test, Path(folder)
        self.measured: dict[str, SetMeasures] = {}
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.architectures = list(architectures)
        self.seeds = list(range(check_whole("seeds", seeds, 1)) if isinstance(seeds, int) else seeds)
        self.clock = clock or Clock(accelerator or make_accelerator())
        self.accelerator = self.clock.accelerator
        self.models, self.on_epoch = None if models is None else Path(models), on_epoch
        watched = ("progress", "checkpoint_seconds")
        self._watched = {name: training.pop(name) for name in watched if name in training}
        execution = Execution(self.accelerator, compiled=training.pop("compiled", False))
        job: dict[str, Any] = {"protocol": self.protocol, "teacher": teacher, "execution": execution, **training}
        self._jobs = {network: TrainingJob(network, **job) for network in self.architectures}

    def run(self, **told: Any) -> dict[str, Any] | None:
        """Trains what is left and writes results.json.

        Args:
            told: further content of it, such as `dataset`.

        Returns:
            `dict`: the content of results.json, on every process; None where the clock has left something undone.

        Raises:
            ValueError: where a stored result belongs to other settings or data.
        """
        self.train()
        self.accelerator.wait_for_everyone()
        if self.clock.any_unfinished():
            return None
        results = self.results(**told)
        if self.accelerator.is_main_process:
            write_json(self.folder / "results.json", results)
        return results

    def train(self, *, rank: int | None = None, world: int | None = None) -> None:
        """Does this process's share of what is left, large sets first; by default all processes share, see `run`."""
        rank = self.accelerator.process_index if rank is None else rank
        world = self.accelerator.num_processes if world is None else world
        shown = self.accelerator.is_main_process
        for key in Bar(list(self.jobs())[rank::world], desc="Evaluators", unit="run", disable=not shown):
            if not self.clock.is_over():
                run_job(key, self._train, settings=self._settings, folder=self.folder / "jobs")

    def train_planned(self, made: PlannedSets, **reading: Any) -> bool:
        """Makes the sets of a plan and trains on them, too, by all processes; False where the clock left something.

        Args:
            made ([`~dsco_hf.studies.plans.PlannedSets`]): the sets.
            reading: of [`~dsco_hf.evaluators.load_image_set`].
        """
        made.make()
        rows = made.rows()
        self.sets |= {name: load_image_set(rows[name], protocol=self.protocol, **reading) for name in rows}
        self.clock.say("training evaluators")
        self.train()
        self.accelerator.wait_for_everyone()
        return not self.clock.any_unfinished()

    def jobs(self) -> dict[str, tuple[str, str, int]]:
        """The trainings by name: set, network and seed."""
        sizes = {name: 0 if callable(images) else len(images.labels) for name, images in self.sets.items()}
        return {
            f"{name}-{network.replace('/', '_')}-run{seed}": (name, network, seed)
            for name in sorted(sizes, key=lambda name: (-sizes[name], name))
            for network in self.architectures
            for seed in self.seeds
        }

    def images(self, name: str, seed: int) -> ImageSet:
        """What a training of this seed on a set sees."""
        images = self.sets[name]
        return images(seed) if callable(images) else images

    def _job(self, key: str) -> tuple[TrainingJob, ImageSet]:
        name, network, seed = self.jobs()[key]
        return dataclasses.replace(self._jobs[network], seed=seed), self.images(name, seed)

    def _train(self, key: str, checkpoint: Path) -> dict[str, Any]:
        tell, save_to = self.on_epoch, None if self.models is None else self.models / key
        return train_job(
            *self._job(key), self.test, checkpoint=checkpoint, save_to=save_to,
            on_epoch=tell and (lambda figures: tell(key, figures)), **self._watched,
        )  # fmt: skip

    def _settings(self, key: str) -> dict[str, Any]:
        job, images = self._job(key)
        return job.identity(images, self.test) | {"save_models": self.models is not None}

    def _groups(self) -> Iterator[tuple[str, int, list[str]]]:
        """Rows of the table: method, images per class, and the sets by their names."""
        groups: dict[tuple[int, str], list[str]] = {}
        for name in self.sets:
            if name != FULL:
                found = re.fullmatch(r"(.+)-ipc(\d+)(-seed\d+)?", name)
                size = int(found[2]) if found else round(self.images(name, self.seeds[0]).images_per_class)
                groups.setdefault((size, found[1] if found else name), []).append(name)
        order = in_order(method for _, method in groups)
        for budget, method in sorted(groups, key=lambda key: (key[0], order.index(key[1]))):
            yield method, budget, groups[budget, method]

    @property
    def fixed(self) -> dict[str, ImageSet]:
        """The small sets that are the same for every training."""
        return {name: own for name, own in self.sets.items() if name != FULL and isinstance(own, ImageSet)}

    @property
    def discrepancies(self) -> dict[str, float]:
        """MMD² of every set from the real classes, mean over classes; known once there are results."""
        return {name: statistics.fmean(found.discrepancy.values()) for name, found in self.measured.items()}

    def results(self, made: PlannedSets | None = None, **told: object) -> dict[str, Any]:
        """The content of results.json, once all is trained.

        Args:
            made ([`~dsco_hf.studies.plans.PlannedSets`], *optional*): where sets were drawn. Rows then have what they
                cost, and discrepancies from the real classes, with those of random real images beside.
            told: further content, such as `dataset`.

        Returns:
            `dict`: `rows`, one for each network, number of images per class and method, over all seeds, and `full`.
        """
        done: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for key, (name, network, _) in self.jobs().items():
            done.setdefault((name, network), []).append(read_job(self.folder / "jobs" / f"{key}.json"))
        if made is not None:
            self.measured = {
                name: measure_set(images.pixels, images.labels, made.pipe, made.targets["real"])
                for name, images in self.fixed.items()
            }
        rows = []
        for network in self.architectures:
            for method, budget, names in self._groups():
                row = {"method": method, "architecture": network, "images_per_class": budget}
                row["images"] = len(self.images(names[0], self.seeds[0]).labels)
                row |= summarise([job for name in names for job in done[name, network]])
                row |= {"synthesis_seeds": len(names), "training_seeds": len(self.seeds)}
                rows.append(row | ({} if made is None else self._drawn(made, method, budget, names)))
        full = {}
        if FULL in self.sets:
            network, images = self.architectures[0], len(self.images(FULL, self.seeds[0]).labels)
            full = {"full": {"architecture": network, "images": images, **summarise(done[FULL, network])}}
            full["full"]["seeds"] = len(self.seeds)
        return {"classes": len(self.test.names), "rows": rows, **full, "protocol": protocol_to_dict(self.protocol),
                "test_images": len(self.test.labels), "test_fingerprint": self.test.fingerprint,
                "environment": run_environment(self.accelerator), **told}  # fmt: skip

    def _drawn(self, made: PlannedSets, method: str, budget: int, names: Sequence[str]) -> dict[str, Any]:
        """What sets of a row cost, and what was measured of them."""
        spent = [made.kept.told(name) for name in names]
        return {
            "discrepancy": statistics.fmean(self.discrepancies[name] for name in names),
            "random_discrepancy": random_beside(self.discrepancies).get(names[0]),
            **measures_of_row([self.measured[name] for name in names]),
            "seconds": statistics.fmean(cost.get("seconds", 0.0) for cost in spent),
            "peak_memory_bytes": max(cost.get("peak_memory_bytes", 0) for cost in spent),
            **{f"{kind}_calls": spent[0].get(f"{kind}_calls", 0) for kind in ("denoiser", "decoder", "classifier")},
            **{kind: spent[0][kind] for kind in FLOPS if kind in spent[0]},
            "data_pass": passes_of(made.drawn_for(names[0]), made.pipe),
        }


@dataclass(frozen=True, kw_only=True)
class ComparedOptions:
    """Small sets of anybody, of several sizes.

    Attributes:
        datasets: `name=path[@config[@split[@revision]]]`, where a part may be empty (`name=path@@@main`) and
            `{budget}` stands for the images per class.
        datasets_image_column, datasets_label_column: of those, where they have several of them: a column of all of
            them, or `name=column` for each.
        datasets_classes: which of their classes is which, where names and WordNet ids do not tell: "index" if label i
            is class number i of the real images, also of labels without names, "number" if classes are named by these
            numbers, or a YAML file, see `dsco_hf.class_mapping`; for all of them, or `name=index` for each.
        budgets: images per class.
        allow_unequal: accept datasets of other sizes than the budget.

    Raises:
        ValueError: for names that are taken, or columns of a dataset that is not compared.
    """

    datasets: list[str] = field(default_factory=list)
    datasets_image_column: list[str] = field(default_factory=list)
    datasets_label_column: list[str] = field(default_factory=list)
    datasets_classes: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=lambda: [10])
    allow_unequal: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be told apart."""
        for item in self.datasets:
            if "=" not in item or item.split("=")[0] in ("", "random", "herding", "full") or item.count("@") > 3:
                raise ValueError(
                    f"--datasets takes name=path[@config[@split[@revision]]] with a name of its own, got {item!r}."
                )
        names = [item.split("=")[0] for item in self.datasets]
        if len(set(names)) != len(names):
            raise ValueError(f"The names of --datasets must differ, got {names}.")
        for option in ("image_column", "label_column", "classes"):
            given = getattr(self, f"datasets_{option}")
            owners = [item.split("=")[0] for item in given if "=" in item]
            if len(given) - len(owners) > 1 or len(set(owners)) < len(owners) or set(owners) - set(names):
                raise ValueError(
                    f"--datasets_{option} takes one value for all datasets, or name=value for some of {names}, got "
                    f"{given}."
                )

    def columns_of(self, name: str) -> dict[str, Any]:
        """The columns of a compared dataset."""
        return {option: self._own(name, option) for option in ("image_column", "label_column")}

    def _own(self, name: str, option: str) -> str | None:
        given: list[str] = getattr(self, f"datasets_{option}")
        shared = next((item for item in given if "=" not in item), None)
        return dict(item.split("=", 1) for item in given if "=" in item).get(name, shared)

    def open_compared(self) -> dict[tuple[str, int], Dataset]:
        """The compared datasets by name and budget."""
        opened = {}
        for item in self.datasets:
            name, place = item.split("=", 1)
            for budget in self.budgets:
                path, config, split, revision = [*place.format(budget=budget).split("@"), "", "", ""][:4]
                rows = load_image_dataset(path, config or None, split=split or "train", revision=revision or None)
                if self._own(name, "classes") == "index":
                    rows = with_numbered_classes(rows, self._own(name, "label_column"))
                try:
                    find_columns(rows, **self.columns_of(name))
                except ValueError as error:
                    raise ValueError(
                        f"Set {name!r}: {error} Here these are --datasets_image_column and --datasets_label_column, "
                        "and --datasets_classes index takes numbers without names for places among the real classes."
                    ) from error
                opened[name, budget] = rows
        return opened

    def size_of_all(self, compared: Mapping[tuple[str, int], Dataset]) -> int | None:
        """The one size of compared images, to which all others are brought, so that all are treated alike.

        Raises:
            ValueError: if they have several.
        """
        found = {key: image_sizes(rows, **self.columns_of(key[0])) for key, rows in compared.items()}
        sides = {side for sizes in found.values() for size in sizes for side in size}
        if len(sides) > 1:
            listed = [
                f"{name} ({budget} per class) {' and '.join(f'{w}x{h}' for w, h in sorted(sizes)[:3])}"
                for (name, budget), sizes in found.items()
            ]
            raise ValueError(
                f"The compared images have several sizes: {'; '.join(listed[:10])}. To treat all alike, choose one "
                f"with --image_size, such as {min(sides)}."
            )
        return sides.pop() if sides else None

    def load_compared(
        self, compared: Mapping[tuple[str, int], Dataset], real: ImageSet, **options: Any
    ) -> dict[str, ImageSet]:
        """The compared datasets in memory, by name of a set, with the classes of `real`; checked for size.

        Args:
            compared: see [`ComparedOptions.open_compared`].
            real: the real images.
            **options: of [`~dsco_hf.evaluators.load_image_set`].
        """
        sets = {}
        for (name, budget), dataset in compared.items():
            told = {"mapping": self._own(name, "classes"), "label_column": self._own(name, "label_column")}
            dataset = with_classes_of(real.names, dataset, **told)
            images = load_image_set(dataset, classes=real.names, **options, **self.columns_of(name))
            wanted = budget * len(real.names)
            if len(images.labels) != wanted and not self.allow_unequal:
                raise ValueError(
                    f"The dataset {name!r} has {len(images.labels)} images, but {budget} per class are {wanted}. "
                    "Compare at equal size, with {budget} in the path or config, or pass --allow_unequal true."
                )
            sets[f"{name}-ipc{budget}"] = images
        return sets


def real_baselines(
    train: ImageSet,
    budgets: Sequence[int],
    *,
    random_seeds: int = 1,
    classifiers: Sequence[PreTrainedModel | None] = (None,),
) -> dict[str, ImageSet]:
    """The sets that need no generator: random real images by seed, and herded ones, at every size; by [`set_name`].

    Args:
        train (`ImageSet`): all real images.
        budgets (sequence of `int`): images per class.
        random_seeds (`int`): choices of random images.
        classifiers (sequence of `PreTrainedModel`): in eval mode; by the features of each one set is herded, with its
            place as seed. None stands for pixels.
    """
    most, found = max(budgets, default=0), {}  # a small set is the start of a large one
    rules = [Herding(features="pixels" if network is None else network) for network in classifiers if most]
    herded = [selected_rows(Pool(train), rule, images_per_class=most).view(-1, most) for rule in rules]  # (K, most)
    for budget in budgets:
        for seed, rows in enumerate(herded):
            found[set_name("herding", budget, seed)] = train.select(rows[:, :budget].flatten())
        for seed in range(random_seeds):
            found[set_name("random", budget, seed)] = select(train, "random", images_per_class=budget, seed=seed)
    return found


def first_sets(plan: StudyPlan, methods: Sequence[str]) -> StudyPlan:
    """Of the largest size, and of these methods, one set each: what can be looked at before all is drawn."""
    largest = max(plan.budgets)
    values: dict[str, Any] = {name: [plan.at_budget(name, largest)] for name in PER_BUDGET}
    values |= {"methods": [name for name in plan.methods if name in methods], "budgets": [largest]}
    return dataclasses.replace(plan, doping_budgets=[], synthesis_seeds=1, single_seeds=1, **values)


def measures_of_row(sets: Sequence[SetMeasures]) -> dict[str, Any]:
    """What a row tells of its sets: each one's discrepancy, what it leaves unexplained, and redundancy as a mean."""
    told: dict[str, Any] = {"discrepancies": [statistics.fmean(one.discrepancy.values()) for one in sets]}
    if (unexplained := [one.unexplained for one in sets])[0] is not None:
        told["unexplained"] = unexplained
    if squares := [one.redundancy for one in sets if one.redundancy is not None]:
        told["redundancy"] = [
            [None if None in values else statistics.fmean(values) for values in zip(*rows, strict=False)]
            for rows in zip(*squares, strict=False)  # doping over all classes may leave one set a block less
        ]
    return told


def random_beside(discrepancies: Mapping[str, float]) -> dict[str, float]:
    """Beside each set of real measures, by [`set_name`], the mean of random real images of as many per class."""
    by_budget: dict[str, list[float]] = {}
    for name, value in discrepancies.items():
        method, budget, _ = name.rsplit("-", 2)
        if method == "random":
            by_budget.setdefault(budget, []).append(value)
    return {
        name: statistics.fmean(by_budget[budget])
        for name in discrepancies
        if (budget := name.rsplit("-", 2)[1]) in by_budget
    }
