"""Real images chosen by a rule of `selection`: alone, or mixed into a synthetic dataset.

Doping, as the authors of DsCo call the latter, reaches accuracies that synthesis alone cannot.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, Image, concatenate_datasets

from ...data.datasets import Pool
from ...data.images import stored_at
from ...data.schema import class_names, find_columns
from ...data.shards import rows_record, synthetic_rows
from ...evaluators import ImageSet
from ...sampling.pipeline import DsCoPipeline
from ...utils.origins import model_sha256
from ...utils.values import check_whole, plain_arguments
from ..concentrate import SOURCES, row_features
from ..selection import Selection, recorded_selection
from ..set_records import record_of, with_record
from .beginning import until_doping


logger = logging.getLogger(__name__)


@plain_arguments()
def dope(
    small: Dataset,
    real: Dataset | Pool,
    pipe: DsCoPipeline | None = None,
    *,
    images_per_class: int | str | None = None,
    total: int | None = None,
    begin_doping: float | None = None,
    strategy: str | Selection = "ridge_rule",
    class_wise: bool | None = None,
    image_size: int | str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """Adds chosen real images to a synthetic dataset until it has the given size.

    Args:
        small (`Dataset`): from [`concentrate`], or anybody's set with an `Image` and a `ClassLabel` column.
        real (`Dataset` or [`~dsco_hf.data.datasets.Pool`]): the images to choose from; a pool keeps what was read for
            the next set. Classes are found by name, in any order; images of classes that `small` does not have are
            not chosen.
        pipe (`DsCoPipeline`, *optional*): its classifier gives the features for "ridge_rule" and "herding", and the
            soft labels on which a student for "clarity" is trained. Not needed for "random" or `Clarity(student=...)`.
        images_per_class (`int` or "auto", *optional*): size of the result per class, synthetic images included.
            With "auto" real images take the place of the synthetic ones from `begin_doping` on: the size stays.
        total (`int`, *optional*): size of the result. Pass one of the two.
        begin_doping (`float`, *optional*): images per class from where on the next synthetic image is worth less than
            a real one, such as [`~dsco_hf.studies.lossless.efficiency.recommended_doping`] says; for "auto" alone.
        strategy (`str` or [`Selection`]): by which rule, with its own options, such as `Clarity(num_students=4)`; or
            the name of one with its defaults: "ridge_rule", "herding", "clarity", "random", "k_center", …
        class_wise (`bool`, *optional*): fill every class to the same number. If False, a rule that compares images
            across classes, such as "clarity", ranks over the whole dataset; the others always go by class. By default
            True with `images_per_class`, False with `total`.
        image_size (`int` or `str`, *optional*): what the chosen images are stored at: "original", or a size to resize
            and crop to. By default that of the images of `small`, which then must have one. Files that have that size
            already are kept as they are; the others become PNGs.
        image_column (`str`, *optional*): of `real`, where there are several of the kind; a pool has its own.
        label_column (`str`, *optional*): likewise.
        seed (`int`): of all that is random in the rule.
        progress (`bool`): show progress bars.

    Returns:
        `Dataset`: the rows of `small`, then the chosen real images, with their row in `real_index`; the columns of
            [`concentrate`], and no others.

    Raises:
        ValueError: for class names that differ, images of several sizes in `small` without `image_size`, a budget
            smaller than `small` or larger than the data, or what the rule says of models that it misses.
    """
    rule = Selection.of(strategy)
    if (images_per_class is None) == (total is None):
        raise ValueError(
            "Pass either `images_per_class` or `total`, the size of the result with its synthetic images."
        )
    if images_per_class == "auto":
        small, images_per_class = until_doping(small, begin_doping)
    elif begin_doping is not None or isinstance(images_per_class, str):
        raise ValueError(
            f"`images_per_class` must be a number or 'auto', which alone has `begin_doping`; got {images_per_class!r} "
            f"and {begin_doping!r}: pass `images_per_class='auto'` with `begin_doping`, or a number alone."
        )
    elif images_per_class is not None:
        images_per_class = check_whole("images_per_class", images_per_class, 1)
    record = record_of(small) or {}
    small = as_concentrated(small)
    names, stored_size = class_names(small), check_size(image_size, small)
    whole = Pool.of(real, image_column=image_column, label_column=label_column, progress=progress)
    pool, mine = whole.of_classes(names), Pool(small, progress=progress)
    class_wise = total is None if class_wise is None else class_wise
    wanted: Sequence[int] | int
    if rule.across_classes and not class_wise:
        size = total if total is not None else (images_per_class or 0) * len(names)
        wanted = _check_budget(size, len(small), len(pool.labels))
    else:
        held, available = torch.tensor(mine.counts), torch.tensor(pool.counts)
        wanted = _per_class(names, held, available, images_per_class, total)
    chosen = choose(rule, pool, mine, wanted, pipe, seed)
    classifier = None if pipe is None else pipe.classifier
    doping = {
        **{"strategy": rule.record(names, pipe), "images_per_class": images_per_class, "total": total},
        **{"class_wise": class_wise, "image_size": stored_size or "original", "seed": seed},
        **({} if begin_doping is None else {"begin_doping": begin_doping}),
        **({} if classifier is None else {"classifier_sha256": model_sha256(classifier)}),
        **{"real_fingerprint": whole.fingerprint, "real_rows": len(whole.dataset), **whole.columns},
    }
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


def recorded_doping(doping: Mapping[str, Any], **given: object) -> dict[str, Any]:
    """A recorded doping as arguments of [`dope`]: `dope(small, real, pipe, **recorded_doping(record["doping"]))`.

    Args:
        doping (mapping): what a record holds under `doping`, also one of an earlier version.
        given: models and targets of the rule, of which the record knows the SHA-256 only, such as `targets=`.

    Raises:
        ValueError: for a rule that is not there, and models or targets that are missing or others.
    """
    told = doping.get("strategy")
    if isinstance(told, str):  # of dsco_hf 0.1, where the fields of the rule stood beside its name
        fields = {"clarity": ("student", "protocol", "architecture", "num_students")}.get(told, ())
        told = {"name": told, **{name: doping[name] for name in fields if name in doping}}
        if "targets_sha256" in doping:
            told["targets"] = {"sha256": doping["targets_sha256"]}
    if not isinstance(told, Mapping):
        raise ValueError(f"The record has no `strategy` of a doping, but {sorted(doping)}.")
    names = ("images_per_class", "total", "class_wise", "image_size", "image_column", "label_column", "seed")
    options = {name: doping[name] for name in names if doping.get(name) is not None}
    return {"strategy": recorded_selection(told, **given), **options}


@plain_arguments()
def select(
    real: Dataset | ImageSet | Pool,
    strategy: str | Selection,
    *,
    images_per_class: int | None = None,
    total: int | None = None,
    pipe: DsCoPipeline | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Dataset | ImageSet:
    """Chooses real images by a rule, without a small set: a baseline, or what a small set should match.

    Args:
        real (`Dataset`, `ImageSet` or [`Pool`]): the images; a pool keeps what was read for the next selection.
        strategy (`str` or [`Selection`]): a rule, or the name of one with its defaults.
        images_per_class (`int`, *optional*): at least 1; a smaller choice is part of a larger one, unless the rule
            is not `nested`. Only rules that say themselves how many, such as [`Clearest`], need no number.
        total (`int`, *optional*): in its place, of all classes together: rules `across_classes` take the best of all,
            the others spread it evenly over the classes, as far as these have images.
        pipe (`DsCoPipeline`, *optional*): for rules that ask its models.
        image_column (`str`, *optional*): where there are several of the kind.
        label_column (`str`, *optional*): likewise.
        seed (`int`): of all that is random.
        progress (`bool`): show progress bars.

    Returns:
        `Dataset` or `ImageSet`, as `real` is: best first, class by class unless the best of all were taken; in the
            order of `real` without a number.

    Raises:
        ValueError: where a class that has images has fewer than wanted, or a rule misses what it needs.
    """
    pool = Pool.of(real, image_column=image_column, label_column=label_column, progress=progress)
    rows = selected_rows(pool, strategy, images_per_class=images_per_class, total=total, pipe=pipe, seed=seed)
    return pool.real.select(rows.tolist())


def selected_rows(
    pool: Pool,
    strategy: str | Selection,
    *,
    images_per_class: int | None = None,
    total: int | None = None,
    pipe: DsCoPipeline | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """The rows of [`select`] in what the pool was made of: `(n,)`, int64."""
    rule = Selection.of(strategy)
    if not len(pool.labels):
        raise ValueError("No image to choose from: the dataset is empty.")
    if total is not None:
        if images_per_class is not None:
            raise ValueError(
                "Pass either `images_per_class` or `total`, the number of images of all classes together."
            )
        if not 1 <= check_whole("total", total, 1) <= len(pool.labels):
            raise ValueError(f"`total` must be from 1 to {len(pool.labels)}, the images there are; got {total}.")
        have = torch.tensor(pool.counts)
        spread = total if rule.across_classes else _per_class(pool.names, 0 * have, have, None, total)
        return pool.rows[choose(rule, pool, None, spread, pipe, seed)]
    if images_per_class is None:
        if not rule.picks:
            raise ValueError(f"`images_per_class` is missing: {rule.name!r} ranks all images there are.")
        return pool.rows[choose(rule, pool, None, len(pool.labels), pipe, seed).sort().values]
    count = check_whole("images_per_class", images_per_class, 1)
    present = [(name, have) for name, have in zip(pool.names, pool.counts, strict=True) if have]
    if lacking := [f"{name!r} has {have}" for name, have in present if have < count]:
        raise ValueError(
            f"Every class needs at least {count} images, but {', '.join(lacking[:10])}{', …' * (len(lacking) > 10)}. "
            "Add images, ask for fewer per class, or leave the class out: remove its rows with `dataset.filter`."
        )
    return pool.rows[choose(rule, pool, None, [count if have else 0 for have in pool.counts], pipe, seed)]


def choose(
    rule: Selection,
    pool: Pool,
    small: Pool | None,
    wanted: Sequence[int] | int,
    pipe: DsCoPipeline | None,
    seed: int,
) -> torch.Tensor:
    """Places in the pool, `(n,)`: the first of every class by a rule's ranking, or the first of all.

    Args:
        rule ([`Selection`]): which ranks.
        pool ([`Pool`]): real images.
        small ([`Pool`], *optional*): what they are added to.
        wanted (sequence of `int`, or `int`): of each class; or up to so many of all classes together.
        pipe (`DsCoPipeline`, *optional*): for the rule.
        seed (`int`): for the rule.

    Raises:
        ValueError: for what is no ranking of the pool, or one with too few images of a class.
    """
    name, size = rule.name, len(pool.labels)
    order = torch.as_tensor(rule.rank(pool, small, wanted, pipe, seed)).cpu()
    if order.ndim != 1 or order.is_floating_point() or (len(order) and not 0 <= order.min() <= order.max() < size):
        raise ValueError(
            f"`rank` of {name!r} must return places in the pool, whole numbers from 0 to {size - 1}, of shape (M,); "
            f"got {order.dtype} of shape {tuple(order.shape)}. Scores are ranked by their `argsort`."
        )
    if len(order.unique()) < len(order):
        raise ValueError(f"`rank` of {name!r} returned a place twice: each image can be chosen once.")
    if isinstance(wanted, int):
        return order[:wanted]
    parts = [order[pool.labels[order] == row][:count] for row, count in enumerate(wanted)]
    for class_name, part, count in zip(pool.names, parts, wanted, strict=True):
        if len(part) < count:
            raise ValueError(
                f"{name!r} ranks {len(part)} images of class {class_name!r}, and {count} are wanted: ask for fewer."
            )
    return torch.cat(parts)


def as_concentrated(small: Dataset) -> Dataset:
    """Anybody's small set with the columns of a concentrated one: what it does not say is -1, its source "synthetic".

    Further columns are left out, and named in the log.
    """
    image_column, label_column = find_columns(small)
    names = class_names(small)
    features = row_features(names, weighted={"weight", "source"} <= set(small.column_names))
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


def _as_rows(pool: Pool, chosen: torch.Tensor, small: Dataset, size: int | None) -> Dataset:
    """Chosen real images as rows of a concentrated dataset; files of the right size are taken over byte by byte."""
    image_column, _ = find_columns(pool.dataset, **pool.columns)
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
        "weight": [1.0] * count,
    }
    return Dataset.from_dict({name: columns[name] for name in features}, features=features)


def check_size(image_size: object, small: Dataset) -> int | None:
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
