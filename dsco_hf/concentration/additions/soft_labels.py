"""Labels with more in them than a class: a teacher's probabilities, and those that a regression learns for its images.

Both stay with the rows: they are published, read by `load_dataset` and trained on, with `label_type="stored"` and
`label_type="learned"` of a protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedModel

from ...data.datasets import class_names, iterate_pixels, load_pixels, present_classes
from ...data.labels import class_mapping
from ...data.pixels import default_threads, image_sizes
from ...data.schema import image_seed
from ...data.shards import HALF_LEAST, compact_feature, compact_row
from ...evaluators.augmentation import CutMix, HorizontalFlip, RandomResizedCrop, Transform, augment
from ...evaluators.batches import class_columns, model_classes, predict_logits
from ...evaluators.preprocessing import ensure_preprocessing
from ...matching.discrepancy import embed_pixels
from ...matching.kernels import learned_labels
from ...matching.objectives import check_kind
from ...matching.targets import MatchingTargets
from ...sampling.models import load_classifier
from ...sampling.pipeline import DsCoPipeline
from ...utils.names import find_classes
from ...utils.origins import targets_sha256
from ...utils.values import check_real, plain, plain_arguments
from ..config_records import as_description
from ..set_records import network_record, record_of


SOFT, LEARNED = "soft_label", "learned_label"
GROUP = 128  # images that share a generator of views, whatever the batches of the teacher are
# What relabelling takes: the crops of `rded-soft` and a flip.
VIEWS: tuple[Transform, ...] = (RandomResizedCrop(scale=(0.5, 1.0)), HorizontalFlip())


@plain_arguments(views=1, batch_size=1)
def add_soft_labels(
    dataset: Dataset,
    teacher: PreTrainedModel | str | Path,
    *,
    views: int = 1,
    augmentation: Sequence[Transform | CutMix] = VIEWS,
    temperature: float = 1.0,
    top_k: int | None = None,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Stores with every image what a teacher says of it, in the column `soft_label`.

    The probabilities are the mean over several views of an image. "A Fast Knowledge Distillation Framework for Visual
    Recognition" (Shen & Xing 2021, arXiv 2112.01528) and SRe2L (arXiv 2306.13092) also ask a teacher for crops, but
    keep the label of every one; here an image has one label. It is stored in half precision, as by SRe2L. With
    `top_k`, whoever reads the labels spreads what is missing to 1 evenly over the other classes: the "marginal
    smoothing" of the former.

    Args:
        dataset (`Dataset`): images of any size with their classes; rows and their order stay.
        teacher (`PreTrainedModel`, or a folder or Hub id): a classifier that knows every class of the dataset by name,
            and may know more: probabilities are those among the classes of both. See
            [`~dsco_hf.data.labels.class_mapping`] for names.
        views (`int`): how often each image is seen; once as it is, several times augmented.
        augmentation (sequence of augmentations): of the views, such as those of a protocol. `CutMix` is left out, as a
            training mixes the labels that it mixes the images of.
        temperature (`float`): T of softmax(logits / T). A protocol's own temperature softens once more what is stored.
        top_k (`int`, *optional*): keep the most probable classes of each image; all if None.
        image_size (`int`, *optional*): what images are brought to (shorter side, then the centre) before they are
            augmented: that of the protocol that trains on them. By default they keep their size; if they have several,
            that of the teacher's input.
        image_column (`str`, *optional*): where there are several of the kind.
        label_column (`str`, *optional*): likewise.
        revision (`str`, *optional*): of a teacher on the Hub.
        device (`str`, *optional*): where a teacher that is named runs; a GPU if there is one. A network is asked where
            it is and in its precision.
        dtype (`torch.dtype`, *optional*): precision of a teacher that is named, the stored one by default.
        batch_size (`int`): images in a pass of the teacher; labels do not depend on it.
        seed (`int`): of the views.
        progress (`bool`): show a progress bar.

    Returns:
        `Dataset`: the rows with the new column, and in their record how it was made.

    Raises:
        ValueError: if the column is there, the teacher does not know a class, views do not differ, an option is out
            of range, an image cannot be read, or the teacher's logits are not finite.
    """
    temperature = check_real("temperature", temperature, 0, open_low=True)
    transforms = [one for one in augmentation if not isinstance(one, CutMix)]
    if views > 1 and not transforms:
        raise ValueError("Without `augmentation` all views are the image itself: pass `views=1`, or augmentations.")
    _check_new(dataset, SOFT)
    names = class_names(dataset, label_column=label_column)
    stored = compact_feature(len(names), top_k)
    if not isinstance(teacher, PreTrainedModel):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        teacher = load_classifier(str(teacher), revision=revision, dtype=dtype).to(device)
    places = _places(names, present_classes(dataset, label_column=label_column), teacher)
    columns = {"image_column": image_column, "label_column": label_column}
    size = image_size or _common_size(dataset, teacher, columns)
    options: dict[str, Any] = {"views": views, "transforms": transforms, "temperature": temperature}
    options |= {"batch_size": batch_size, "seed": seed}
    rows: list[np.ndarray | dict[str, np.ndarray]] = []
    channels = 1 if getattr(teacher.config, "num_channels", 3) == 1 else 3
    reading: dict[str, Any] = {"num_channels": channels, "threads": default_threads(), "progress": progress, **columns}
    for group, batch in enumerate(iterate_pixels(dataset, image_size=size, batch_size=GROUP, **reading)):
        found = view_probabilities(teacher, batch.pixels, places=places, group=group, **options)
        if not found.isfinite().all():
            row = int(batch.indices[(~found.isfinite()).any(1).int().argmax()])
            raise ValueError(
                f"The teacher's logits are not finite in row {row}: check its weights, or load it with "
                "`dtype=torch.float32`."
            )
        rows += [compact_row(row, top_k) for row in found.cpu().numpy()]
    told = {
        **(network_record(teacher) or {}),
        "views": views,
        "augmentation": [{"name": type(one).__name__, **plain(vars(one))} for one in transforms]
        if views > 1
        else None,
        "seed": seed if views > 1 else None,
        "temperature": temperature,
        "top_k": top_k,
        "image_size": size,
    }
    told = {key: value for key, value in told.items() if value is not None}
    return _with_column(dataset, SOFT, rows, stored, {"soft_labels": told})


@torch.no_grad()
def view_probabilities(
    teacher: PreTrainedModel,
    pixels: torch.Tensor,
    *,
    places: Sequence[int | None],
    views: int,
    transforms: Sequence[Transform],
    temperature: float,
    batch_size: int,
    seed: int,
    group: int = 0,
) -> torch.Tensor:
    """Mean over views of softmax(logits / T), by the dataset's classes.

    Args:
        teacher (`PreTrainedModel`): a classifier of K' classes.
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, range [-1, 1]): images.
        places (sequence of `int` or None, of length K): of each class of the dataset its place among the teacher's;
            what it does not know gets 0.
        views (`int`): 1 for the images as they are.
        transforms (sequence): what makes a view, for more than one.
        temperature (`float`): T.
        batch_size (`int`): images in a pass.
        seed (`int`): of the views, with `group` and the number of the view.
        group (`int`): which images of a dataset these are.

    Returns:
        `torch.Tensor` of shape `(B, K)`: float32, rows sum to 1. No class that the teacher knows has less than half
            precision can hold, so that a protocol can soften it.
    """
    known = [row for row, place in enumerate(places) if place is not None]
    total = torch.zeros(len(pixels), len(known), device=teacher.device)
    for view in range(views):
        seen = pixels
        if views > 1:
            generator = torch.Generator().manual_seed(image_seed(seed, group, view, "soft label"))
            seen = augment(transforms, pixels, generator=generator).pixels
        logits = predict_logits(teacher, seen, batch_size=batch_size)
        total += (logits[:, [places[row] for row in known]] / temperature).softmax(1)
    found = torch.zeros(len(pixels), len(places), device=total.device)
    found[:, known] = (total / views).clamp_min(HALF_LEAST)
    return found


@plain_arguments()
def add_learned_labels(
    dataset: Dataset,
    pipe: DsCoPipeline,
    targets: MatchingTargets,
    *,
    regularization: float = 0.1,
    image_column: str | None = None,
    label_column: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Stores with every image the label from which a ridge regression learns most, in the column `learned_label`.

    The images stay. Of all labels those are taken with which a regression that is trained on the set makes the
    smallest error on the population behind the targets, see [`~dsco_hf.matching.kernels.learned_labels`]. They are no
    probabilities: a hard label of this kind is 1 for the class and 0 for the others, and what is learned also goes
    below 0 and above 1, with the same sum. A protocol of `label_type="learned"` trains networks on them by the
    squared error.

    Args:
        dataset (`Dataset`): the whole small set; labels hold for all of it together.
        pipe (`DsCoPipeline`): with the networks that the targets were made with; gives size and channels.
        targets (`MatchingTargets`): of two classes or more, with their second moment, which is of the population: no
            further image is read.
        regularization (`float`): λ of the regression. A small one leaves labels in the range that networks learn.
        image_column (`str`, *optional*): where there are several of the kind.
        label_column (`str`, *optional*): likewise.
        progress (`bool`): show a progress bar.

    Returns:
        `Dataset`: the rows with the new column, and in their record how it was made.

    Raises:
        ValueError: if the column is there, targets and dataset have different classes, or the targets are of one class
            or without a second moment.
    """
    check_kind("add_learned_labels", MatchingTargets, targets)
    regularization = check_real("regularization", regularization, 0, open_low=True)
    _check_new(dataset, LEARNED)
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    names = class_names(dataset, label_column=label_column)
    class_columns(present_classes(dataset, label_column=label_column), targets.class_names, what="the targets")
    places = class_columns(targets.class_names, names, what="the dataset that is labelled")
    if targets.second_moment is None or targets.num_classes < 2:
        raise ValueError(
            "Labels are learned from the second moment of a population of several classes, which these targets lack: "
            "make them with `MatchingTargets.from_dataset(dataset, pipe)`."
        )
    targets.check_pipeline(pipe)
    reading: dict[str, Any] = {"image_size": pipe.image_size, "num_channels": pipe.num_channels, "progress": progress}
    pixels, _, _ = load_pixels(dataset, **reading, **columns)
    means = targets.embeddings
    cross = (means - means.mean(dim=0)).T / targets.num_classes  # (D, C)
    psi = embed_pixels(pixels, pipe, targets)
    found = learned_labels(psi, targets.second_moment, cross, regularization) + 1 / targets.num_classes  # (n, C)
    labels = torch.zeros(len(found), len(names))
    labels[:, places] = found.float().cpu()
    told = {"targets_sha256": targets_sha256(targets), "regularization": regularization}
    stored = List(Value("float32"), length=len(names))
    return _with_column(dataset, LEARNED, list(labels.numpy()), stored, {"learned_labels": told})


def _check_new(dataset: object, column: str) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Labels are added to a `datasets.Dataset`, got a {type(dataset).__name__}: choose one split, and make a "
            "stream one with `Dataset.from_generator`."
        )
    if column in dataset.features:
        raise ValueError(
            f"The dataset has a column {column!r} already: remove it with `dataset.remove_columns({column!r})`."
        )


def _places(names: Sequence[str], present: Sequence[str], teacher: PreTrainedModel) -> list[int | None]:
    """Where each class stands among the teacher's, which must know those that have images; None where it does not."""
    config = teacher.config
    found = class_mapping(names, config.id2label, config.num_labels, present=present, owner="teacher")
    sure = dict(zip([name for name in names if name in set(present)], found, strict=True))
    others = zip(names, find_classes(names, model_classes(teacher)), strict=True)
    return [sure.get(name, None if place in found else place) for name, place in others]


def _common_size(dataset: Dataset, teacher: PreTrainedModel, columns: Mapping[str, Any]) -> int | None:
    """None where all images have one size, which they keep; the teacher's otherwise."""
    if len(image_sizes(dataset, **columns)) < 2:
        return None
    size = ensure_preprocessing(teacher).config.image_size
    return int(size if isinstance(size, int) else min(size))


def _with_column(
    dataset: Dataset, name: str, rows: Sequence[object], kind: object, told: Mapping[str, object]
) -> Dataset:
    """The dataset with one more column of this type, its record with what is told of it."""
    record = {**(record_of(dataset) or {}), **told}
    labels = Dataset.from_dict({name: rows}, features=Features({name: kind}))
    found = concatenate_datasets([dataset.with_format(None), labels], axis=1)
    found.info.description = as_description(plain(record))
    return found
