"""The search on real trainings: sets that nest, a reference, and a folder that a killed search goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ...concentration.selection import Selection
from ...data.datasets import Pool
from ...evaluators import ImageSet, Protocol, get_protocol, protocol_to_dict
from ...evaluators.batches import epoch_batches
from ...evaluators.evaluation import evaluator_builder, read_job, run_environment, unpacked
from ...evaluators.protocols import by_budget
from ...sampling.pipeline import DsCoPipeline
from ...utils.configs import make_accelerator
from ...utils.origins import model_sha256
from ...utils.progress import Clock, remaining
from ...utils.values import check_choice
from ..study import Study
from .checks import begin, check_plan, check_reference, check_trainable, rising
from .search import Search, SearchPlan


LENGTHS = ("same steps", "same epochs")
HALF_SEEDS = 2  # trainings on all images that are half as long, to see whether longer ones would reach more


def find_lossless_budget(
    real: ImageSet,
    test: ImageSet,
    folder: str | Path,
    *,
    strategy: str | Selection = "random",
    small: ImageSet | None = None,
    protocol: str | Protocol = "quick",
    architecture: str = "convnet-3",
    length: str = "same steps",
    plan: SearchPlan | None = None,
    pipe: DsCoPipeline | None = None,
    accelerator: Accelerator | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Finds the smallest number of images that trains as well as all of them, but for a margin said beforehand.

        train, test = ...  # of load_image_set
        found = find_lossless_budget(train, test, "outputs/lossless", strategy="herding", architecture="convnet-3")
        print(found["status"], found["images"], found["share"])

    Sets nest: the synthetic images, then real ones in the order of the rule, as many of each class as it has of all.
    Run again, after a kill or by several processes, it goes on with the trainings that are in the folder.

    Args:
        real (`ImageSet`): all training images.
        test (`ImageSet`): with the classes of `real`.
        folder (`str` or `Path`): a file system that all processes see.
        strategy (`str` or [`Selection`]): which real images come first.
        small (`ImageSet`, *optional*): synthetic images that every set begins with, its classes numbered as `real`'s.
        protocol (`str` or `Protocol`): its length with all data is that of "same steps" for all sizes; labels of a
            teacher need `teacher`.
        architecture (`str`): see [`~dsco_hf.evaluators.build_evaluator`].
        length (`str`): "same steps" as all data (storage is saved) or "same epochs" (computing is saved, too).
        plan ([`SearchPlan`], *optional*): margin, confidence, number of trainings.
        pipe (`DsCoPipeline`, *optional*): for rules that ask its models.
        accelerator (`Accelerator`, *optional*): of the launch; made if None.
        training: of [`~dsco_hf.studies.study.Study`], such as `teacher`, `overrides`, `compiled`.

    Returns:
        `dict`: content of lossless.json, on every process: `status` ("accepted" or "not shown"), `images`, `share`,
            `margin`, `confidence`, `bracket`, `labels`, `length`, `trainings`, `selection`, `every_training` and more.

    Raises:
        ValueError: for classes, labels or options that do not fit, a rule whose sets do not nest, a reference that is
            no better than chance, a margin that the test images cannot resolve, or a folder with other trainings.
    """
    check_choice("length", length, LENGTHS)
    plan = check_plan(plan or SearchPlan(), 0 if small is None else len(small.labels), len(real.labels))
    rule, accelerator, folder = Selection.of(strategy), accelerator or make_accelerator(), Path(folder)
    given = get_protocol(protocol) if isinstance(protocol, str) else protocol
    network = evaluator_builder(architecture, real, given, **(training.get("overrides") or {}))()
    teacher: PreTrainedModel | None = training.get("teacher")
    check_trainable(network, given, teacher, real, test, small)
    fixed = with_length(given.for_model(len(real.names), network.config.model_type), length, real)
    order = nested_order(Pool(real, progress=False), None if small is None else Pool(small), rule, pipe)
    stated = {
        "labels": fixed.label_type,
        "teacher": None if teacher is None else {"name": type(teacher).__name__, "sha256": model_sha256(teacher)},
        "length": length,
        "selection": rule.record(real.names, pipe),
        "architecture": architecture,
        "protocol": protocol_to_dict(fixed),
    }
    begin(folder, {**stated, **dataclasses.asdict(plan)}, accelerator)
    trainer = _Trainer(real, small, order, test, folder, accelerator,
                       {"protocol": fixed, "architectures": [architecture], **training})  # fmt: skip
    search = Search(len(real.labels), plan, trainer)
    trainer.tell(plan)
    check_reference(search.reference(), test.labels, plan)
    gain = trainer.check_length(search.reference(), plan)
    search.run()
    return {
        **described(search, small),
        **stated,
        "gain_of_second_half": gain,
        "rows": None if search.accepted is None else order[: search.accepted - trainer.synthetic].tolist(),
        "environment": run_environment(accelerator),
    }


def with_length(protocol: Protocol, length: str, real: ImageSet) -> Protocol:
    """The protocol with the batch size that it has for all data, and the steps or the epochs."""
    size = by_budget(protocol.batch_size, real.images_per_class)
    fixed = dataclasses.replace(protocol, batch_size=size)
    if protocol.steps is None:
        epochs = by_budget(protocol.epochs or 1, real.images_per_class)
        steps = length_in_steps(dataclasses.replace(fixed, epochs=epochs), len(real.labels))
    else:
        steps = by_budget(protocol.steps, real.images_per_class)
        epochs = -(-steps // _batches(len(real.labels), size))
    own: dict[str, Any] = (
        {"steps": steps, "epochs": None} if length == LENGTHS[0] else {"steps": None, "epochs": epochs}
    )
    return dataclasses.replace(fixed, **own)


def length_in_steps(protocol: Protocol, images: int) -> int:
    """Steps of a training on so many images, for a protocol as of [`with_length`]."""
    if isinstance(protocol.steps, int):
        return protocol.steps
    assert isinstance(protocol.epochs, int) and isinstance(protocol.batch_size, int)
    return protocol.epochs * _batches(images, protocol.batch_size)


def _batches(images: int, size: int) -> int:
    """Steps of an epoch."""
    return len(epoch_batches(images, size, generator=torch.Generator(), device=torch.device("cpu")))


def half_as_long(protocol: Protocol) -> Protocol:
    """The protocol with half its steps or epochs, at least one."""
    halved: dict[str, Any] = {
        name: max(1, value // 2) for name in ("steps", "epochs") if isinstance(value := getattr(protocol, name), int)
    }
    return dataclasses.replace(protocol, **halved)


def protocol_length(protocol: Protocol) -> str:
    """Steps or epochs, in words."""
    return f"{protocol.steps} steps" if protocol.steps is not None else f"{protocol.epochs} epochs"


def nested_order(pool: Pool, small: Pool | None, rule: Selection, pipe: DsCoPipeline | None) -> torch.Tensor:
    """Places in the pool, `(N,)`, so that the first n are the set of n images: each class has its share of them.

    Args:
        pool ([`Pool`]): all real images.
        small ([`Pool`], *optional*): what they are added to.
        rule ([`Selection`]): ranks them.
        pipe (`DsCoPipeline`, *optional*): for the rule.

    Raises:
        ValueError: for a rule that ranks not all images, or otherwise for another number of them.
    """
    names = pool.names
    ranked = torch.as_tensor(rule.rank(pool, small, pool.counts, pipe, 0)).cpu()
    few = [-(-count // 8) for count in pool.counts]
    probe = torch.as_tensor(rule.rank(pool, small, few, pipe, 0)).cpu()
    position = torch.empty(len(pool.labels), dtype=torch.float64)
    for label, count in enumerate(pool.counts):
        own = ranked[pool.labels[ranked] == label]
        if len(own) < count:
            raise ValueError(
                f"{rule.name!r} ranks {len(own)} of {count} images of class {names[label]!r}: a search needs a rule "
                "that ranks all of them, such as 'random' or 'herding'."
            )
        if not torch.equal(own[: few[label]], probe[pool.labels[probe] == label][: few[label]]):
            raise ValueError(
                f"{rule.name!r} chooses other images of class {names[label]!r} for a smaller set: sets do not nest. "
                "Use a rule whose choice of few is part of that of many, such as 'random' or 'herding'."
            )
        position[own] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return position.argsort(stable=True)


def described(search: Search, small: ImageSet | None) -> dict[str, Any]:
    """What a search has found, as JSON values."""
    plan, full = search.plan, search.measured[search.whole]
    curves, sizes = search.curves(), np.unique(np.geomspace(min(search.measured), search.whole, 60).astype(np.int64))
    low, middle, high = np.quantile(curves(sizes), [0.05, 0.5, 0.95], axis=0)
    return {
        "status": "not shown" if search.accepted is None else "accepted",
        "images": search.accepted,
        "share": None if search.accepted is None else search.accepted / search.whole,
        "all_images": search.whole,
        "synthetic_images": 0 if small is None else len(small.labels),
        "margin": plan.margin,
        "confidence": plan.confidence,
        "bracket": [search.refuted, search.accepted],
        "trainings": sum(len(own) for images, own in search.measured.items() if images != search.whole),
        "reference": {
            "trainings": len(full),
            "accuracy_mean": float(full.mean()),
            "accuracy_std": float(full.mean(1).std(ddof=1)),
        },
        "test_images": full.shape[1],
        "level": search.level,
        "looks": [
            {"images": images, **dataclasses.asdict(look), "lower": look.lower, "accepted": look.lower >= -plan.margin}
            for images, look in search.looks.items()
        ],
        "every_training": [
            {"images": images, "seed": seed, "accuracy": float(right.mean())}
            for images in sorted(search.measured)
            for seed, right in enumerate(search.measured[images])
        ],
        "curve": {"images": sizes.tolist(), "low": low.tolist(), "middle": middle.tolist(), "high": high.tolist()},
    }


class _Trainer:
    """Trains sizes and seeds as a study of their own, by all processes, and tells how long it will take."""

    def __init__(
        self,
        real: ImageSet,
        small: ImageSet | None,
        order: torch.Tensor,
        test: ImageSet,
        folder: Path,
        accelerator: Accelerator,
        options: dict[str, Any],
    ) -> None:
        self.real, self.small, self.order, self.test, self.folder = real, small, order, test, folder
        self.accelerator, self.options, self.clock = accelerator, options, Clock(accelerator)
        self.synthetic = 0 if small is None else len(small.labels)
        self.planned, self.done, self.seconds = 0.0, 0.0, 0.0  # in trainings of full length

    def __call__(self, sizes: Sequence[int], seeds: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Which test images trainings have right, `(S, M)` for each number of images."""
        self.say(f"{len(sizes) * len(seeds)} trainings on {', '.join(f'{size:,}' for size in sizes)} images")
        return self.train({f"lossless-{size}": self.images(size) for size in sizes}, seeds, self.options)

    def tell(self, plan: SearchPlan) -> None:
        """Says what the search will cost at most."""
        protocol: Protocol = self.options["protocol"]
        length = "steps" if protocol.steps is not None else "epochs"
        self.planned = plan.reference_seeds + HALF_SEEDS / 2 + plan.trainings
        self.say(
            f"up to {plan.reference_seeds + plan.trainings} trainings, {plan.reference_seeds} on all "
            f"{len(self.real.labels):,} images and {plan.trainings} on fewer, with the same number of {length} "
            f"({protocol_length(protocol)}), and {HALF_SEEDS} half as long"
        )

    def check_length(self, full: NDArray[np.bool_], plan: SearchPlan) -> float:
        """What the second half of the reference's trainings is worth, which is said where it is more than the margin.

        Args:
            full (array of shape `(R, M)`): what the reference has right.
            plan ([`SearchPlan`]): with the margin.
        """
        self.say(f"{HALF_SEEDS} trainings of half the length on all images")
        options = {**self.options, "protocol": half_as_long(self.options["protocol"])}
        (half,) = self.train({f"lossless-{len(self.real.labels)}-half": self.real}, range(HALF_SEEDS), options, 0.5)
        if (gain := rising(full, half)) > plan.margin:
            self.clock.say(
                f"all images are still rising: the second half of the training gains {100 * gain:.1f} points, more "
                f"than the margin of {100 * plan.margin:g}. What is found holds for this length only; a longer one "
                "may need more images."
            )
        return gain

    def say(self, what: str) -> None:
        """Tells a stage, and how long it is to the end at most."""
        left = ""
        if self.done:
            mean = self.seconds / self.done / self.accelerator.num_processes
            left = f"; at most {remaining(mean * (self.planned - self.done))}"
        self.clock.say(what + left)

    def train(
        self, sets: dict[str, ImageSet], seeds: Sequence[int], options: dict[str, Any], length: float = 1.0
    ) -> list[NDArray[np.bool_]]:
        """Trains on sets, and reads which test images each training has right, `(S, M)` for each set."""
        study = Study(dict(sets), self.test, self.folder, seeds=list(seeds), accelerator=self.accelerator, **options)
        study.train()
        self.accelerator.wait_for_everyone()
        found: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in sets}
        for key, (name, _, _) in study.jobs().items():
            job = read_job(self.folder / "jobs" / f"{key}.json")
            found[name].append(unpacked(job["correct"], len(self.test.labels)))
            self.done += length
            self.seconds += job["seconds"]
        return [np.stack(right) for right in found.values()]

    def images(self, count: int) -> ImageSet:
        """The set of so many images."""
        if count == len(self.real.labels):  # the reference, without synthetic images
            return self.real
        chosen = self.real.select(self.order[: count - self.synthetic])
        if self.small is None:
            return chosen
        both = (self.small, chosen)
        pixels, labels = torch.cat([one.pixels for one in both]), torch.cat([one.labels for one in both])
        return ImageSet(pixels, labels, self.real.names)
