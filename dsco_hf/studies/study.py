"""Studies: what networks reach that are trained from scratch on small sets, beside real images; and the records."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..concentration.concentrate import measure_discrepancy
from ..concentration.doping import select, selected_rows
from ..concentration.methods import in_order
from ..concentration.selection import Herding
from ..data.datasets import Pool
from ..evaluators import (
    ImageSet,
    Protocol,
    get_protocol,
    job_identity,
    protocol_to_dict,
    run_job,
    summarise,
    train_job,
)
from ..evaluators.evaluation import read_job, run_environment
from ..matching.targets import MatchingTargets
from ..sampling.pipeline import DsCoPipeline
from ..utils.configs import make_accelerator
from ..utils.files import write_json
from ..utils.progress import Clock
from ..utils.values import check_whole
from .plans import PlannedSets, set_name


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
        accelerator (`Accelerator`, *optional*): of the launch; made if None.
        teacher (`PreTrainedModel`, *optional*): where labels are those of a teacher.
        clock ([`~dsco_hf.utils.progress.Clock`], *optional*): when it is over, nothing new is begun.
        models (`str` or `Path`, *optional*): where to store the trained networks.
        on_epoch (`Callable`, *optional*): is told the training's name and its figures after every epoch.
        training: of [`~dsco_hf.evaluators.train_job`]: overrides, compiled, checkpoint_seconds, track_best, progress.
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
        self.discrepancies: dict[str, float] = {}
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.architectures = list(architectures)
        self.seeds = list(range(check_whole("seeds", seeds, 1)) if isinstance(seeds, int) else seeds)
        self.accelerator = accelerator or make_accelerator()
        self.clock = clock or Clock(self.accelerator)
        self.models, self.on_epoch = None if models is None else Path(models), on_epoch
        shown = training.pop("progress", False)
        shared = {"protocol": self.protocol, "teacher": teacher, "accelerator": self.accelerator}
        self._decisive = {**shared, **training}  # all that decides a result, beside the images and the network
        self._further = {"progress": shown, "checkpoint_seconds": self._decisive.pop("checkpoint_seconds", 60.0)}

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
        for key in tqdm(list(self.jobs())[rank::world], desc="Evaluators", unit="run", disable=not shown):
            if not self.clock.is_over():
                run_job(key, self._train, settings=self._settings, folder=self.folder / "jobs")

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

    def _job(self, key: str) -> tuple[ImageSet, dict[str, Any]]:
        name, network, seed = self.jobs()[key]
        return self.images(name, seed), {"architecture": network, "seed": seed, **self._decisive}

    def _train(self, key: str, checkpoint: Path) -> dict[str, Any]:
        images, options = self._job(key)
        tell = self.on_epoch
        return train_job(
            images, self.test, checkpoint=checkpoint, save_to=None if self.models is None else self.models / key,
            on_epoch=tell and (lambda figures: tell(key, figures)), **options, **self._further,
        )  # fmt: skip

    def _settings(self, key: str) -> dict[str, Any]:
        images, options = self._job(key)
        return job_identity(images, self.test, **options) | {"save_models": self.models is not None}

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

    def results(self, made: PlannedSets | None = None, **told: Any) -> dict[str, Any]:
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
            self.discrepancies = study_discrepancies(self.fixed, made.pipe, made.targets["real"])
        rows = []
        for network in self.architectures:
            for method, budget, names in self._groups():
                row = {"method": method, "architecture": network, "images_per_class": budget}
                row["images"] = len(self.images(names[0], self.seeds[0]).labels)
                row |= summarise([job for name in names for job in done[name, network]])
                row |= {"synthesis_seeds": len(names), "training_seeds": len(self.seeds)}
                rows.append(row | ({} if made is None else self._drawn(made, names)))
        full = {}
        if FULL in self.sets:
            network, images = self.architectures[0], len(self.images(FULL, self.seeds[0]).labels)
            full = {"full": {"architecture": network, "images": images, **summarise(done[FULL, network])}}
            full["full"]["seeds"] = len(self.seeds)
        return {"classes": len(self.test.names), "rows": rows, **full, "protocol": protocol_to_dict(self.protocol),
                "test_images": len(self.test.labels), "test_fingerprint": self.test.fingerprint,
                "environment": run_environment(self.accelerator), **told}  # fmt: skip

    def _drawn(self, made: PlannedSets, names: Sequence[str]) -> dict[str, Any]:
        """What sets of a row cost, and their discrepancy."""
        spent = [made.kept.told(name) for name in names]
        return {
            "discrepancy": statistics.fmean(self.discrepancies[name] for name in names),
            "random_discrepancy": random_beside(self.discrepancies).get(names[0]),
            "seconds": statistics.fmean(cost.get("seconds", 0.0) for cost in spent),
            **{f"{kind}_calls": spent[0].get(f"{kind}_calls", 0) for kind in ("denoiser", "decoder", "classifier")},
        }


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


def study_discrepancies(
    sets: Mapping[str, ImageSet], pipe: DsCoPipeline, targets: MatchingTargets
) -> dict[str, float]:
    """MMD² of every set from the real classes, mean over classes; that of random real images among them."""
    return {
        name: statistics.fmean(measure_discrepancy(images.pixels, images.labels, pipe, targets).values())
        for name, images in sets.items()
    }


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
