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
from ...evaluators import ImageSet, Protocol, check_same_classes, get_protocol, protocol_to_dict
from ...evaluators.batches import check_images, epoch_batches
from ...evaluators.evaluation import evaluator_builder, read_job, run_environment, unpacked
from ...evaluators.protocols import by_budget
from ...sampling.pipeline import DsCoPipeline
from ...utils.configs import make_accelerator
from ...utils.progress import Clock, remaining
from ...utils.values import check_choice, check_real, check_whole
from ..study import Study
from .noninferiority import images_needed
from .search import Search, SearchPlan


LENGTHS = ("same steps", "same epochs")


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
    plan = check_plan(plan or SearchPlan(), 0 if small is None else len(small.labels), len(real.labels))
    check_same_classes(real.names, test.names, what="the test set")
    check_images(test.pixels, test.labels, len(real.names), what="test")
    check_choice("length", length, LENGTHS)
    rule, accelerator = Selection.of(strategy), accelerator or make_accelerator()
    given = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if given.label_type in ("stored", "learned"):
        raise ValueError(
            "A search trains on real images, which have no stored soft labels: set the protocol's label_type='hard', "
            "or 'teacher' and pass `teacher=`."
        )
    network = evaluator_builder(architecture, real, given, **(training.get("overrides") or {}))()
    fixed = with_length(given.for_model(len(real.names), network.config.model_type), length, real)
    order = nested_order(Pool(real, progress=False), None if small is None else Pool(small), rule, pipe)
    trainer = _Trainer(real, small, order, test, Path(folder), accelerator,
                       {"protocol": fixed, "architectures": [architecture], **training})  # fmt: skip
    search = Search(len(real.labels), plan, trainer)
    trainer.planned = plan.reference_seeds + plan.trainings
    trainer.clock.say(
        f"up to {trainer.planned} trainings: {plan.reference_seeds} on all {search.whole:,} images, {plan.trainings} "
        f"on fewer, {length} ({protocol_length(fixed)} each)"
    )
    check_reference(search.reference(), test.labels, plan)
    search.run()
    teacher: PreTrainedModel | None = training.get("teacher")
    return {
        **described(search, small),
        "labels": "hard" if teacher is None else "teacher",
        "length": length,
        "selection": rule.record(real.names, pipe),
        "architecture": architecture,
        "protocol": protocol_to_dict(fixed),
        "rows": None if search.accepted is None else order[: search.accepted - trainer.synthetic].tolist(),
        "environment": run_environment(accelerator),
    }


def check_plan(plan: SearchPlan, synthetic: int, real: int) -> SearchPlan:
    """The plan, with a smallest size that holds the synthetic images.

    Raises:
        ValueError: for a margin or confidence out of range, too few trainings, or as many synthetic images as real.
    """
    check_real("margin", plan.margin, 0, 0.5, open_low=True)
    check_real("confidence", plan.confidence, 0.5, 0.9999)
    check_whole("reference_seeds", plan.reference_seeds, 2)
    check_whole("trainings", plan.trainings, len(plan.first_shares) + 2)
    check_whole("looks", plan.looks, 1, 2)
    if synthetic >= real:
        raise ValueError(
            f"There are {synthetic} synthetic images and {real} real ones: a search looks for fewer images than all "
            "real ones, so give fewer synthetic ones."
        )
    return dataclasses.replace(plan, smallest=max(plan.smallest, synthetic))


def check_reference(full: NDArray[np.bool_], labels: torch.Tensor, plan: SearchPlan) -> None:
    """Checks what trainings on all data have right, `(R, M)`.

    Raises:
        ValueError: where they are no better than chance, or too few test images for the margin.
    """
    accuracy, chance = full.mean(1), float(torch.bincount(labels).max()) / len(labels)
    error = float(np.sqrt(chance * (1 - chance) / len(labels)))
    if accuracy.mean() <= chance + 3 * error:
        raise ValueError(
            f"Trainings on all data reach {100 * accuracy.mean():.1f} %, and always naming the most frequent class "
            f"reaches {100 * chance:.1f} %: nothing can be lost. Train longer, or with another learning rate."
        )
    needed = images_needed(full, plan.margin, 1 - plan.confidence)
    if needed > full.shape[1]:
        raise ValueError(
            f"A margin of {100 * plan.margin:g} points cannot be resolved with {full.shape[1]:,} test images: about "
            f"{needed:,} would be needed. Use a wider margin, or more test images."
        )


def with_length(protocol: Protocol, length: str, real: ImageSet) -> Protocol:
    """The protocol with the batch size that it has for all data, and the steps or the epochs."""
    size = by_budget(protocol.batch_size, real.images_per_class)
    batches = len(epoch_batches(len(real.labels), size, generator=torch.Generator(), device=torch.device("cpu")))
    if protocol.steps is None:
        epochs = by_budget(protocol.epochs or 1, real.images_per_class)
        steps = epochs * batches
    else:
        steps = by_budget(protocol.steps, real.images_per_class)
        epochs = -(-steps // batches)
    own: dict[str, Any] = (
        {"steps": steps, "epochs": None} if length == LENGTHS[0] else {"steps": None, "epochs": epochs}
    )
    return dataclasses.replace(protocol, batch_size=size, **own)


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
        self.planned, self.done, self.seconds = 0, 0, 0.0

    def __call__(self, images: int, seeds: Sequence[int]) -> NDArray[np.bool_]:
        left = ""
        if self.done:
            mean = self.seconds / self.done / min(self.accelerator.num_processes, len(seeds))
            left = f"; at most {remaining(mean * (self.planned - self.done))}"
        self.clock.say(f"{len(seeds)} trainings on {images:,} images{left}")
        study = Study(
            {f"lossless-{images}": self.images(images)}, self.test, self.folder, seeds=list(seeds),
            accelerator=self.accelerator, **self.options,
        )  # fmt: skip
        study.train()
        self.accelerator.wait_for_everyone()
        jobs = [read_job(self.folder / "jobs" / f"{key}.json") for key in study.jobs()]
        self.done += len(jobs)
        self.seconds += sum(job["seconds"] for job in jobs)
        return np.stack([unpacked(job["correct"], len(self.test.labels)) for job in jobs])

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
