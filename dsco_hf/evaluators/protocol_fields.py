"""What a protocol is made of: its fields, what is allowed in them, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..utils.values import Limits, check_real, check_whole, plain, plain_fields
from .augmentation import CutMix, Transform
from .configurations import check_norm


ByBudget = int | tuple[tuple[int | None, int], ...]

LABEL_TYPES = ("hard", "teacher", "stored", "learned")
COLUMNS = {"stored": "soft_label", "learned": "learned_label"}  # where the labels of these types are
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine", "half-cosine", "multistep")
CHANGED = " (changed)"  # ends the name of a protocol of which something was changed


def by_budget(table: ByBudget, images_per_class: float) -> int:
    """The entry of a budget table.

    Args:
        table (`int` or rows of `(largest images per class or None, value)`): rows in rising order, the last one None.
        images_per_class (`float`): mean number of images of a class, above 0.

    Returns:
        `int`: value of the first row whose limit is not exceeded.
    """
    if isinstance(table, int):
        return table
    return next(value for limit, value in table if limit is None or images_per_class <= limit)


@dataclass(frozen=True)
class Variant:
    """Fields of a protocol that differ for some datasets or networks.

    Args:
        changes (`tuple` of `(field, value)`): what is different.
        classes (`tuple[int, int | None]`): smallest and largest number of classes it is for.
        model_types (`tuple[str, ...]`): `config.model_type` of the networks it is for; empty for all.
    """

    changes: tuple[tuple[str, Any], ...]
    classes: tuple[int, int | None] = (1, None)
    model_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:  # noqa: D105
        if isinstance(self.classes, str) or len(tuple(self.classes)) != 2:
            raise ValueError(f"`classes` of a variant are the smallest and largest number, got {self.classes!r}.")
        least, most = self.classes
        limits = (check_whole("classes", least, 1), None if most is None else check_whole("classes", most, least))
        object.__setattr__(self, "classes", limits)

    def applies(self, num_classes: int, model_type: str) -> bool:
        """Whether it is for this dataset and network."""
        least, most = self.classes
        return least <= num_classes <= (most or num_classes) and model_type in (self.model_types or (model_type,))


@dataclass(frozen=True)
class Protocol:
    """How an evaluator is trained and what is reported.

    Args:
        name (`str`): what `get_protocol` calls it.
        source (`str`): where its numbers come from, and what is known to differ from there.
        epochs (`ByBudget`, *optional*): length in passes over the small set; exactly one of `epochs` and `steps`.
        steps (`ByBudget`, *optional*): length in optimiser steps.
        batch_size (`ByBudget`): images per step, over all processes.
        optimizer (`str`): `"adamw"` or `"sgd"`.
        learning_rate (`float`): at the start, above 0.
        weight_decay (`float`): at least 0.
        decay_vectors (`bool`): whether weight decay acts on biases and norms too.
        momentum (`float`): of SGD.
        schedule (`str`): `"constant"`, `"cosine"` to 0, `"half-cosine"` to half of it, or `"multistep"`; stepped once
            an epoch where the length is stated in epochs, and at every step otherwise.
        schedule_milestones (`tuple[float, ...]`): for multistep, shares of the length after which the rate falls.
        schedule_factor (`float`): for multistep, what the rate is multiplied by.
        augmentation (`tuple[Transform | CutMix, ...]`): applied to each batch in this order.
        label_type (`str`): `"hard"`, `"teacher"` (its labels on each augmented batch), `"stored"` (a column of
            probabilities) or `"learned"` (a column of numbers, learned by their squared error).
        temperature (`float`): of the softmax of student and teacher, for soft labels.
        image_size (`int`, *optional*): height and width the evaluator sees, to which images are brought as they are
            loaded (shorter side, then the centre); None for the training images' own.
        load_size (`int`, *optional*): training images are resized and cropped to it before augmentation; `image_size`
            by default.
        test_size (`int`, *optional*): test images are resized to it, then cropped to `image_size`.
        image_mean (`tuple[float, ...]`): that images are normalised by, on the [0, 1] scale.
        image_std (`tuple[float, ...]`): likewise.
        norm (`str`): of our own networks: `"instance"`, `"batch"` or `"none"`.
        best_from (`float`): share of the length after which the source looks for its best epoch on the test set.
        best_every (`int` or `float`): epochs between two of those evaluations; below 1, a share of the length.
        variants (`tuple[Variant, ...]`): what differs by number of classes or network.

    Raises:
        ValueError: for a value outside of what is listed.
    """

    name: str
    source: str
    epochs: ByBudget | None = None
    steps: ByBudget | None = None
    batch_size: ByBudget = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    decay_vectors: bool = True
    momentum: float = 0.9
    schedule: str = "cosine"
    schedule_milestones: tuple[float, ...] = ()
    schedule_factor: float = 0.1
    augmentation: tuple[Transform | CutMix, ...] = ()
    label_type: str = "hard"
    temperature: float = 1.0
    image_size: int | None = None
    load_size: int | None = None
    test_size: int | None = None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    norm: str = "instance"
    best_from: float = 0.0
    best_every: float = 10
    variants: tuple[Variant, ...] = ()

    field_limits = {
        **dict.fromkeys(("image_size", "load_size", "test_size"), 1),
        **dict.fromkeys(("weight_decay", "schedule_factor"), 0),
        **dict.fromkeys(("momentum", "best_from"), Limits(0, 1)),
        "best_every": Limits(0, open_low=True),
    }

    def __post_init__(self) -> None:  # noqa: D105
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"Protocol {self.name!r} needs either epochs or steps, got epochs={self.epochs}, steps={self.steps}."
            )
        for field in ("name", "source"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"`{field}` of a protocol must be text, got {getattr(self, field)!r}.")
        plain_fields(self)
        check_norm(self.norm)
        for field, low, high in (("schedule_milestones", 0, 1), ("image_mean", -math.inf, math.inf),
                                 ("image_std", 0, math.inf)):  # fmt: skip
            numbers = plain(getattr(self, field))
            if not isinstance(numbers, list):
                raise ValueError(f"`{field}` must be a list of numbers, got {numbers!r}.")
            checked = tuple(check_real(field, one, low, high, open_low=field == "image_std") for one in numbers)
            object.__setattr__(self, field, checked)
        if not self.image_mean or len(self.image_mean) != len(self.image_std):
            raise ValueError(
                f"`image_mean` and `image_std` hold a number per channel, got {self.image_mean} and {self.image_std}."
            )
        for transform in self.augmentation:
            if isinstance(transform, str | type) or not callable(transform):
                raise ValueError(
                    "`augmentation` holds augmentations such as HorizontalFlip(), in a file {name: HorizontalFlip}, "
                    f"got {transform!r}."
                )
        for field in ("epochs", "steps", "batch_size"):
            object.__setattr__(self, field, _checked_budget(self.name, field, getattr(self, field)))
        for field, allowed in (("label_type", LABEL_TYPES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"Protocol {self.name!r} got {field}={getattr(self, field)!r}; allowed: {', '.join(allowed)}."
                )
        for field in ("learning_rate", "temperature"):
            if not getattr(self, field) > 0:
                raise ValueError(f"Protocol {self.name!r} got {field}={getattr(self, field)}; it must be above 0.")
        if any(isinstance(transform, CutMix) for transform in self.augmentation[:-1]):
            raise ValueError(f"Protocol {self.name!r}: CutMix mixes labels and must be the last augmentation.")
        for variant in self.variants:
            if not isinstance(variant, Variant):
                raise ValueError(
                    f"`variants` holds {{changes: ..., classes: ..., model_types: ...}}, got {variant!r}."
                )
            dataclasses.replace(self, variants=(), **dict(variant.changes))  # its values are checked, too

    def for_model(self, num_classes: int, model_type: str) -> Protocol:
        """The protocol for a dataset and network, its variants applied.

        Args:
            num_classes (`int`): of the dataset.
            model_type (`str`): `config.model_type` of the network.

        Returns:
            `Protocol`: without variants.
        """
        changes: dict[str, Any] = {"variants": ()}
        for variant in self.variants:
            if variant.applies(num_classes, model_type):
                changes.update(variant.changes)
        return dataclasses.replace(self, **changes)


def learning_rate_factor(protocol: Protocol, done: int, total: int) -> float:
    """The schedule: what the initial learning rate is multiplied by.

    Args:
        protocol (`Protocol`): its `schedule` fields are read.
        done (`int`): epochs (or steps, where the protocol counts those) that are over.
        total (`int`): of all.

    Returns:
        `float`: in [0, 1].
    """
    if protocol.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done / total))
    if protocol.schedule == "half-cosine":
        return 0.5 * (1 + math.cos(math.pi * done / total / 2))
    if protocol.schedule == "multistep":
        # Rounded down, as the sources compute their milestones; the tolerance keeps 502/1001 of 1001 at 502.
        return protocol.schedule_factor ** sum(done >= int(m * total + 1e-6) for m in protocol.schedule_milestones)
    return 1.0


def _checked_budget(name: str, field: str, table: object) -> ByBudget | None:
    """A budget table in numbers of Python; ValueError if it is none."""
    if table is None:
        return None
    try:
        if not isinstance(table, list | tuple):
            return check_whole(field, table, 1)
        rows = [
            (limit if limit is None else check_whole(field, limit, 1), check_whole(field, value, 1))
            for limit, value in table
        ]
        limits = [math.inf if limit is None else limit for limit, _ in rows]
        if not rows or limits != sorted(limits) or limits[-1] != math.inf:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"Protocol {name!r} got {field}={table!r}; a number of at least 1 is needed, or rows (largest images per "
            "class, number) in rising order of which the last one has None."
        ) from None
    return tuple(rows)
