"""Doping: mixes chosen real images into a synthetic dataset, which reaches accuracies that synthesis alone cannot."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, Image, concatenate_datasets
from transformers import PreTrainedModel

from ..data.datasets import dataset_fingerprint, load_pixels, present_classes
from ..data.images import stored_at
from ..data.labels import class_mapping
from ..data.pixels import class_places, place_of
from ..data.schema import class_names, find_columns
from ..data.shards import rows_record, synthetic_rows
from ..evaluators import predict_logits
from ..evaluators.checks import class_columns
from ..evaluators.protocols import Protocol, protocol_to_dict
from ..matching.kernels import herd
from ..matching.objectives import class_margin
from ..matching.targets import MatchingTargets
from ..sampling.pipeline import DsCoPipeline
from ..utils.origins import model_sha256, targets_sha256
from ..utils.values import check_choice, check_real, check_whole, plain_arguments
from .clarity import clarity as clarity
from .clarity import clarity_scores as clarity_scores
from .clarity import student_protocol
from .concentrate import SOURCES, embed_pixels, row_features
from .set_records import record_of, with_record


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
    image_size: int | str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
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
        small (`Dataset`): from [`concentrate`], or anybody's set with an `Image` and a `ClassLabel` column.
        real (`Dataset`): the images to choose from. Classes are found by name, in any order; images of classes that
            `small` does not have are not chosen.
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
        image_size (`int` or `str`, *optional*): what the chosen images are stored at: "original", or a size to resize
            and crop to. By default that of the images of `small`, which then must have one. Files that have that size
            already are kept as they are; the others become PNGs.
        image_column (`str`, *optional*): of `real`, where there are several of the kind.
        label_column (`str`, *optional*): of `real`, where there are several of the kind.
        seed (`int`): of the random choice and the student.
        progress (`bool`): show progress bars.

    Returns:
        `Dataset`: the rows of `small`, then the chosen real images, with their row in `real_index`; the columns of
            [`concentrate`], and no others.

    Raises:
        ValueError: for class names that differ, images of several sizes in `small` without `image_size`, a budget
            smaller than `small` or larger than the data, less than one student or several beside a given one, a
            missing classifier, or for "clarity" one that was trained on other classes.
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
    record = record_of(small) or {}
    small = as_concentrated(small)
    names, stored_size = class_names(small), check_size(image_size, small)
    columns = {"image_column": image_column, "label_column": label_column}
    pool = _Pool.of(real, names, **columns)
    class_wise = total is None if class_wise is None else class_wise
    held = torch.bincount(torch.tensor(small["label"]), minlength=len(names))
    ask = (pipe, student, protocol, architecture, num_students, seed, progress, image_column, label_column)
    if strategy == "clarity" and not class_wise:
        size = total if total is not None else (images_per_class or 0) * len(names)
        budget = _check_budget(size, len(small), len(pool.labels))
        chosen = clarity(small, pool.dataset, *ask).argsort(stable=True)[:budget]
    else:
        wanted = _per_class(names, held, torch.bincount(pool.labels, minlength=len(names)), images_per_class, total)
        if strategy == "random":
            chosen = _random(pool.labels, wanted, seed)
        elif strategy == "herding":
            chosen = _herded(small, pool, wanted, pipe, targets, progress)
        else:
            order = clarity(small, pool.dataset, *ask).argsort(stable=True)
            chosen = torch.cat([order[pool.labels[order] == row][:count] for row, count in enumerate(wanted)])
    doping = {"strategy": strategy, "images_per_class": images_per_class, "total": total, "class_wise": class_wise}
    doping |= {"image_size": stored_size or "original", "seed": seed, **_asked(strategy, names, targets, *ask[:5])}
    doping |= {"real_fingerprint": dataset_fingerprint(real, **columns), "real_rows": len(real), **columns}
    if record.get("doping") is not None:  # real images were in it before
        doping["before"] = record["doping"]
    mixed = concatenate_datasets([small, _as_rows(pool, chosen, small, stored_size)])
    given = {
        "synthetic": record.get("synthetic") or rows_record(synthetic_rows(small)),
        "method": f"{record['method'].removesuffix('+doping')}+doping" if "method" in record else None,
        "doping": doping,
        "doped": rows_record(mixed),
    }
    return with_record(mixed, {**record, **{key: value for key, value in given.items() if value is not None}})


def _asked(
    strategy: str,
    names: Sequence[str],
    targets: MatchingTargets | None,
    pipe: DsCoPipeline | None,
    student: PreTrainedModel | None,
    protocol: str | Protocol,
    architecture: str,
    num_students: int,
) -> dict[str, Any]:
    """What a strategy took beside the images, for the record: in full, so that it can be repeated."""
    if strategy == "random":
        return {}
    if strategy == "herding":
        made = {"classifier_sha256": model_sha256(pipe.classifier)} if pipe is not None and pipe.classifier else {}
        return made | ({} if targets is None else {"targets_sha256": targets_sha256(targets)})
    if student is not None:
        return {"student": {"architecture": type(student).__name__, "sha256": model_sha256(student)}}
    teacher, used = student_protocol(pipe, names, protocol)
    told = {"protocol": protocol_to_dict(used), "architecture": architecture, "num_students": num_students}
    return told | ({} if teacher is None else {"teacher_sha256": model_sha256(teacher)})


def as_concentrated(small: Dataset) -> Dataset:
    """Anybody's small set with the columns of a concentrated one: what it does not say is -1, its source "synthetic".

    Further columns are left out, and named in the log.
    """
    image_column, label_column = find_columns(small)
    names = class_names(small)
    features = row_features(names)
    small = small.with_format(None)
    renamed = {key: value for key, value in {image_column: "image", label_column: "label"}.items() if key != value}
    if clash := [value for value in renamed.values() if value in small.column_names]:
        small = small.remove_columns(clash)
    small = small.rename_columns(renamed)
    for name in features:
        if name not in small.column_names:
            small = small.add_column(name, [SOURCES.index("synthetic") if name == "source" else -1] * len(small))
    if further := [name for name in small.column_names if name not in features]:
        logger.warning("Columns that the doped set cannot have for its real images are left out: %s", further)
    return small.select_columns(list(features)).cast(features)


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The real images that may be chosen.

    Attributes:
        dataset (`Dataset`): the rows of the small set's classes, as they are stored.
        labels (`torch.Tensor` of shape `(N,)`): of these rows, numbered as in the small set.
        rows (`torch.Tensor` of shape `(N,)`): their rows in the dataset that was given.
        columns (`dict`): how they are read: `image_column`, `label_column` and the small set's `classes`.
    """

    dataset: Dataset
    labels: torch.Tensor
    rows: torch.Tensor
    columns: dict[str, Any]

    @classmethod
    def of(cls, real: Dataset, names: Sequence[str], **columns: str | None) -> _Pool:
        """Of a dataset the images of the named classes."""
        image_column, label_column = find_columns(real, **columns)
        theirs = class_names(real, label_column=label_column)
        places = class_places(theirs, names)
        real = real.with_format(None)  # formats and transforms are how a dataset is shown, not what it is
        given = real[label_column][:]
        rows = [row for row, label in enumerate(given) if not isinstance(place_of(label, row, places), str)]
        if not rows:
            raise ValueError(f"No real image is of a class of the small set, {list(names)[:10]}: got {theirs[:10]}.")
        labels = torch.tensor([places[given[row]] for row in rows])
        return cls(
            real if len(rows) == len(real) else real.select(rows),
            labels,
            torch.tensor(rows),
            {"image_column": image_column, "label_column": label_column, "classes": list(names)},
        )


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
    present = present_classes(real, label_column=label_column)
    try:
        known = torch.tensor(
            class_mapping(names, config.id2label, config.num_labels, present=present, owner="classifier")
        )
    except ValueError as error:
        raise ValueError(f"The classifier was trained on other classes than the dataset: {error}") from error
    pixels, labels, indices = load_pixels(
        real, image_size=pipe.image_size, num_channels=pipe.num_channels, image_column=image_column,
        label_column=label_column, classes=present, progress=progress,
    )  # fmt: skip
    labels = labels.cpu()
    margins = class_margin(predict_logits(pipe.classifier, pixels).cpu(), known[labels])
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = margins[members].argsort(descending=True, stable=True)
        chosen.append(members[order[: math.ceil(share * len(members))]])
    return real.select(indices[torch.cat(chosen)].sort().values.tolist())


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
            if have + most and not have <= images_per_class <= have + most:
                raise ValueError(
                    f"Class {name!r} has {have} synthetic and {most} real images: `images_per_class` must be from "
                    f"{have} to {have + most}, got {images_per_class}."
                )
        return torch.where(held + available > 0, images_per_class - held, 0).tolist()
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
    pool: _Pool,
    wanted: Sequence[int],
    pipe: DsCoPipeline | None,
    targets: MatchingTargets | None,
    progress: bool,
) -> torch.Tensor:
    if pipe is None:
        raise ValueError(
            "strategy='herding' needs `pipe`, whose classifier gives the features, or choose another strategy."
        )
    columns = {name: pool.columns[name] for name in ("image_column", "label_column")}
    targets = targets or MatchingTargets.from_dataset(pool.dataset, pipe, **columns, progress=progress)
    targets.check_pipeline(pipe)
    aims = class_columns(
        [name for name, count in zip(pool.columns["classes"], wanted, strict=True) if count],
        targets.class_names,
        what="the targets",
    )
    options: dict[str, Any] = {"image_size": pipe.image_size, "num_channels": pipe.num_channels, "progress": progress}
    small_pixels, small_labels, _ = load_pixels(small, **options)
    real_pixels, labels, indices = load_pixels(pool.dataset, **pool.columns, **options)
    have, candidates = (embed_pixels(pixels, pipe, targets) for pixels in (small_pixels, real_pixels))
    parts = []
    for aim, row in zip(aims, [row for row, count in enumerate(wanted) if count], strict=True):
        members = (labels == row).nonzero()[:, 0]
        mine = have[small_labels == row]
        picked = herd(
            candidates[members],
            targets.embeddings[aim],
            wanted[row],
            initial_sum=mine.sum(dim=0),
            initial_count=len(mine),
        )
        parts.append(indices[members[picked]])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _as_rows(pool: _Pool, chosen: torch.Tensor, small: Dataset, size: int | None) -> Dataset:
    """Chosen real images as rows of a concentrated dataset; files of the right size are taken over byte by byte."""
    image_column = pool.columns["image_column"]
    encoded = pool.dataset.select(chosen.tolist()).select_columns([image_column])
    images = [stored_at(value, size) for value in encoded.cast_column(image_column, Image(decode=False))[image_column]]
    count, features = len(chosen), small.features
    columns = {
        "image": images,
        "label": pool.labels[chosen].tolist(),
        "source": [SOURCES.index("real")] * count,
        "seed": [-1] * count,
        "block": [-1] * count,
        "real_index": pool.rows[chosen].tolist(),
    }
    return Dataset.from_dict({name: columns[name] for name in features}, features=features)


def check_size(image_size: Any, small: Dataset) -> int | None:
    """The size to store images at; None for their own.

    By default it is that of the images of the small set, which must be one; or their own, if that is not square.
    """
    if image_size == "original":
        return None
    if isinstance(image_size, str):
        raise ValueError(f"`image_size` must be a number of pixels or 'original', got {image_size!r}.")
    if image_size is not None:
        return check_whole("image_size", image_size, 1)
    sizes = collections.Counter(row["image"].size for row in small.select_columns(["image"]))
    if len(sizes) > 1:
        told = ", ".join(f"{count} of {width} x {height}" for (width, height), count in sizes.most_common(5))
        raise ValueError(
            f"The images of the small set have {len(sizes)} sizes ({told}), so that there is none to store real ones "
            f"at: pass `image_size={min(sizes.most_common(1)[0][0])}` or another number of pixels, or "
            "`image_size='original'`, which keeps theirs."
        )
    ((width, height),) = sizes
    return width if width == height else None
