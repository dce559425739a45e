"""Doping: mixes chosen real images into a synthetic dataset, which reaches accuracies that synthesis alone cannot."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel

from .concentrate import SOURCES, embed_pixels, row_features
from .data import load_pixels
from .evaluators import predict_logits
from .evaluators.checks import check_same_classes
from .evaluators.evaluation import ImageSet, evaluator_builder
from .evaluators.protocols import Protocol, get_protocol
from .evaluators.training import train_evaluator
from .kernels import herd
from .labels import class_mapping
from .objectives import class_margin
from .pipeline import DsCoPipeline
from .schema import class_names, find_columns
from .seeds import image_seed
from .targets import MatchingTargets
from .values import check_choice, check_real, check_whole, plain_arguments


logger = logging.getLogger(__name__)

STRATEGIES = ("herding", "clarity", "random")


@plain_arguments()
def dope(
    small: Dataset,
    real: Dataset,
    pipe: DsCoPipeline | None = None,
    *,
    images_per_class: int | None = None,
    total: int | None = None,
    strategy: str = "herding",
    targets: MatchingTargets | None = None,
    student: PreTrainedModel | None = None,
    protocol: str | Protocol = "quick",
    architecture: str = "convnet",
    num_students: int = 1,
    class_wise: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Adds chosen real images to a synthetic dataset until it has the given size.

    Strategies:
        - "herding": class by class, the real image that lowers the discrepancy of the mixture most, so the real images
          fill what the synthesis left unmatched.
        - "clarity": the real images that a student trained on the synthetic ones finds least clear, by
          p(label) - max p(other); the rule the DsCo authors released (repository kkkkqq/Dataset-Concentration).
        - "random": a random choice, as the baseline.

    Args:
        small (`Dataset`): from [`concentrate`].
        real (`Dataset`): the images to choose from, with the same class names.
        pipe (`DsCoPipeline`, *optional*): its classifier gives the features for "herding", and the soft labels on
            which a student for "clarity" is trained. Not needed for "random" or with a `student`.
        images_per_class (`int`, *optional*): size of the result per class, synthetic images included.
        total (`int`, *optional*): size of the result. Pass one of the two.
        strategy (`str`): "herding", "clarity" or "random".
        targets (`MatchingTargets`, *optional*): for "herding"; made from `real` if None.
        student (`PreTrainedModel`, *optional*): for "clarity"; one is trained on `small` if None.
        protocol (`str` or `Protocol`): how that student is trained.
        architecture (`str`): of that student.
        num_students (`int`): students that are trained for "clarity"; the mean of theirs ranks the images more
            steadily than that of one, which is what the authors take.
        class_wise (`bool`, *optional*): fill every class to the same number. If False, "clarity" ranks over the whole
            dataset; the others always go by class. By default True with `images_per_class`, False with `total`.
        seed (`int`): of the random choice and the student.
        progress (`bool`): show progress bars.

    Returns:
        `Dataset`: the rows of `small`, then the chosen real images as they are, with their row in `real_index`.

    Raises:
        ValueError: for class names that differ, a budget smaller than `small` or larger than the data, less than one
            student or several beside a given one, a missing classifier, or for "clarity" one that was trained on
            other classes.
    """
    check_choice("strategy", strategy, STRATEGIES)
    if num_students < 1 or (student is not None and num_students > 1):
        raise ValueError(
            f"`num_students` must be at least 1, and 1 where a `student` is given; got {num_students}"
            f"{' and a student' if student is not None else ''}."
        )
    if (images_per_class is None) == (total is None):
        raise ValueError(
            "Pass either `images_per_class` or `total`, the size of the result with its synthetic images."
        )
    image_column, label_column = find_columns(real)
    names = class_names(small)
    check_same_classes(names, class_names(real, label_column=label_column), what="real images")
    class_wise = total is None if class_wise is None else class_wise
    labels = torch.tensor(real[label_column])
    held = torch.bincount(torch.tensor(small["label"]), minlength=len(names))
    if strategy == "clarity" and not class_wise:
        size = total if total is not None else (images_per_class or 0) * len(names)
        budget = _check_budget(size, len(small), len(real))
        scores = clarity(small, real, pipe, student, protocol, architecture, num_students, seed, progress)
        chosen = scores.argsort(stable=True)[:budget]
    else:
        wanted = _per_class(names, held, torch.bincount(labels, minlength=len(names)), images_per_class, total)
        if strategy == "random":
            chosen = _random(labels, wanted, seed)
        elif strategy == "herding":
            chosen = _herded(small, real, labels, wanted, pipe, targets, progress)
        else:
            scores = clarity(small, real, pipe, student, protocol, architecture, num_students, seed, progress)
            order = scores.argsort(stable=True)
            chosen = torch.cat([order[labels[order] == row][:count] for row, count in enumerate(wanted)])
    return concatenate_datasets([small, _as_rows(real, chosen, names, small, image_column, label_column)])


def clarity_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p[y] - max_{k≠y} p[k]: `(N, K)` and `(N,)` → `(N,)` in [-1, 1]. Low where a student is wrong or in doubt."""
    own = probabilities.gather(1, labels[:, None])[:, 0]
    return own - probabilities.scatter(1, labels[:, None], float("-inf")).max(dim=1).values


@plain_arguments(num_students=1)
def clarity(
    small: Dataset,
    real: Dataset,
    pipe: DsCoPipeline | None,
    student: PreTrainedModel | None = None,
    protocol: str | Protocol = "quick",
    architecture: str = "convnet",
    num_students: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> torch.Tensor:
    """Clarity of every real image `(N,)` to students of the synthetic images; arguments as for [`dope`]."""
    names = class_names(small)
    channels = pipe.num_channels if pipe is not None else student.config.num_channels if student is not None else 3
    students = [] if student is None else [student]
    if student is None:
        teacher = _teacher(pipe, names)
        protocol = protocol if isinstance(protocol, Protocol) else get_protocol(protocol)
        if teacher is not None:
            protocol = dataclasses.replace(protocol, label_type="teacher", temperature=1.0)
        pixels, labels, _ = load_pixels(small, image_size=protocol.input_size, num_channels=channels)
        build = evaluator_builder(architecture, ImageSet(pixels, labels, tuple(names)), protocol)
        seeds = [seed, *(image_seed(seed, 0, place, "student") for place in range(1, num_students))]
        students = [
            train_evaluator(
                build, pixels, labels, protocol=protocol, seed=one, teacher=teacher, progress=progress
            ).model
            for one in seeds
        ]
    check_same_classes(names, [students[0].config.id2label[i] for i in range(len(names))], what="student")
    size = students[0].config.image_size
    pixels, labels, indices = load_pixels(real, image_size=size, num_channels=channels, progress=progress)
    scores = torch.full((len(real),), float("inf"))  # images that could not be read are never chosen
    found = [
        clarity_scores(predict_logits(model, pixels).float().softmax(dim=1).cpu(), labels.cpu()) for model in students
    ]
    scores[indices] = torch.stack(found).mean(dim=0)
    return scores


@plain_arguments()
def clearest(
    real: Dataset,
    pipe: DsCoPipeline,
    *,
    share: float = 0.2,
    image_column: str | None = None,
    label_column: str | None = None,
    progress: bool = True,
) -> Dataset:
    """The real images of every class that the pipeline's classifier is surest of: what a small set should match.

    Few images that match all of a class, its unclear images included, train worse evaluators than few that match its
    clearest part: `MatchingTargets.from_dataset(clearest(real, pipe), pipe)`.

    Args:
        real (`Dataset`): one split with an `Image` and a `ClassLabel` column.
        pipe (`DsCoPipeline`): its classifier must know the dataset's classes.
        share (`float`): of the images of a class, in (0, 1]; at least one is taken.
        image_column (`str`, *optional*): where there are several of the kind.
        label_column (`str`, *optional*): where there are several of the kind.
        progress (`bool`): show a progress bar.

    Returns:
        `Dataset`: rows of `real`, in their order. Images are ranked by log p / (1 - p), p the probability of their
        class, and by their place where that is the same.

    Raises:
        ValueError: for a share out of range, a missing classifier, or one that was trained on other classes.
    """
    check_real("share", share, 0, 1, open_low=True)
    if pipe.classifier is None:
        raise ValueError(
            "Choosing the clearest images asks the pipeline's classifier, and there is none: pass `classifier=` to "
            "`DsCoPipeline.from_pretrained`."
        )
    names, config = class_names(real, label_column=label_column), pipe.classifier.config
    try:
        known = torch.tensor(class_mapping(names, config.id2label, config.num_labels, owner="classifier"))
    except ValueError as error:
        raise ValueError(f"The classifier was trained on other classes than the dataset: {error}") from error
    pixels, labels, indices = load_pixels(
        real, image_size=pipe.image_size, num_channels=pipe.num_channels, image_column=image_column,
        label_column=label_column, progress=progress,
    )  # fmt: skip
    labels = labels.cpu()
    margins = class_margin(predict_logits(pipe.classifier, pixels).cpu(), known[labels])
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = margins[members].argsort(descending=True, stable=True)
        chosen.append(members[order[: math.ceil(share * len(members))]])
    return real.select(indices[torch.cat(chosen)].sort().values.tolist())


def _teacher(pipe: DsCoPipeline | None, names: Sequence[str]) -> PreTrainedModel | None:
    """The pipeline's classifier if it knows the classes of the dataset by the same labels; hard labels otherwise.

    Raises:
        ValueError: if it was trained on other classes, so that its features may be matched but says nothing of these.
    """
    classifier = None if pipe is None else pipe.classifier
    if classifier is not None:
        config = classifier.config
        if [config.id2label.get(i) for i in range(len(names))] == list(names) and config.num_labels == len(names):
            return classifier
        try:
            class_mapping(names, config.id2label, config.num_labels, owner="classifier")
        except ValueError as error:
            raise ValueError(
                f"The pipeline's classifier was trained on other classes than the dataset, and cannot teach a student "
                f"whose clarity is to be measured: {error} Or pass a `student` of the dataset's classes, leave `pipe` "
                "out to train one on hard labels, or choose strategy='herding', which needs features only."
            ) from error
    logger.warning(
        "There is no classifier of the dataset's classes alone: the student for clarity is trained on hard labels."
    )
    return None


def _check_budget(total: int, synthetic: int, real: int) -> int:
    check_whole("total", total, 1)
    if not synthetic <= total <= synthetic + real:
        raise ValueError(
            f"A result of {total} images cannot be made of {synthetic} synthetic and up to {real} real ones: choose "
            f"from {synthetic} to {synthetic + real}."
        )
    return total - synthetic


def _per_class(
    names: Sequence[str], held: torch.Tensor, available: torch.Tensor, images_per_class: int | None, total: int | None
) -> list[int]:
    """Real images to add to each class; with a total they go where there are fewest, as far as there are any."""
    if total is None:
        assert images_per_class is not None
        check_whole("images_per_class", images_per_class, 1)
        for name, have, most in zip(names, held.tolist(), available.tolist(), strict=True):
            if not have <= images_per_class <= have + most:
                raise ValueError(
                    f"Class {name!r} has {have} synthetic and {most} real images: `images_per_class` must be from "
                    f"{have} to {have + most}, got {images_per_class}."
                )
        return (images_per_class - held).tolist()
    budget = _check_budget(total, int(held.sum()), int(available.sum()))
    wanted = torch.zeros_like(held)
    for _ in range(budget):
        size = torch.where(wanted < available, held + wanted, torch.iinfo(held.dtype).max)
        wanted[size.argmin()] += 1
    return wanted.tolist()


def _random(labels: torch.Tensor, wanted: Sequence[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for row, count in enumerate(wanted):
        members = (labels == row).nonzero()[:, 0]
        parts.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(parts)


def _herded(
    small: Dataset,
    real: Dataset,
    labels: torch.Tensor,
    wanted: Sequence[int],
    pipe: DsCoPipeline | None,
    targets: MatchingTargets | None,
    progress: bool,
) -> torch.Tensor:
    if pipe is None:
        raise ValueError(
            "strategy='herding' needs `pipe`, whose classifier gives the features, or choose another strategy."
        )
    targets = targets or MatchingTargets.from_dataset(real, pipe, progress=progress)
    targets.check_pipeline(pipe)
    options: dict[str, Any] = {"image_size": pipe.image_size, "num_channels": pipe.num_channels, "progress": progress}
    small_pixels, small_labels, _ = load_pixels(small, **options)
    real_pixels, _, indices = load_pixels(real, **options)
    have, candidates = (embed_pixels(pixels, pipe, targets) for pixels in (small_pixels, real_pixels))
    parts = []
    for row, count in enumerate(wanted):
        members = (labels[indices] == row).nonzero()[:, 0]
        mine = have[small_labels == row]
        picked = herd(
            candidates[members], targets.embeddings[row], count, initial_sum=mine.sum(dim=0), initial_count=len(mine)
        )
        parts.append(indices[members[picked]])
    return torch.cat(parts)


def _as_rows(
    real: Dataset, chosen: torch.Tensor, names: Sequence[str], small: Dataset, image_column: str, label_column: str
) -> Dataset:
    """Chosen real images as rows of a concentrated dataset; the image files are taken over as they are."""
    rows = real.select(chosen.tolist()).select_columns([image_column, label_column])
    rows = rows.rename_columns({k: v for k, v in {image_column: "image", label_column: "label"}.items() if k != v})
    for name, value in (("source", SOURCES.index("real")), ("seed", -1), ("block", -1)):
        rows = rows.add_column(name, [value] * len(chosen))
    rows = rows.add_column("real_index", chosen.tolist())
    return rows.select_columns(list(row_features(names))).cast(small.features)
