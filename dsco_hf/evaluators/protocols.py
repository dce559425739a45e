"""Evaluation protocols as data: everything that decides an accuracy, stated once, with its source.

Whatever a source does, a result is the accuracy of the last epoch; that of the best epoch on the test set, which most
of the field prints, is `accuracy_best` beside it. Lengths and batch sizes depend on the images per class: a table
such as `((10, 400), (None, 1500))` reads "400 up to 10 images per class, 1,500 above".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..utils.files import reading
from ..utils.names import RENAMED, nearest
from ..utils.values import plain
from .augmentation import (
    AUGMENTATIONS,
    CIFAR_MEAN,
    CIFAR_STD,
    DSA,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorJitter,
    CutMix,
    HorizontalFlip,
    Lighting,
    RandomResizedCrop,
    ShufflePatches,
    Transform,
)
from .protocol_fields import CHANGED, Protocol, Variant
from .protocol_fields import LABEL_TYPES as LABEL_TYPES
from .protocol_fields import OPTIMIZERS as OPTIMIZERS
from .protocol_fields import SCHEDULES as SCHEDULES
from .protocol_fields import ByBudget as ByBudget
from .protocol_fields import by_budget as by_budget
from .protocol_fields import learning_rate_factor as learning_rate_factor


_CLASSES_100 = (100, 100)
_MINIMAX_AUGMENTATION = (
    RandomResizedCrop(scale=(0.5, 1.0)),
    HorizontalFlip(),
    ColorJitter(0.4, 0.4, 0.4),
    Lighting(0.1),
    CutMix(),
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="quick",
            source="this project: for tests and demos on small images",
            steps=((10, 400), (None, 1500)),
            batch_size=64,
            best_every=0.1,
        ),
        Protocol(
            name="minimax-hard",
            source="github.com/vimar-gu/MinimaxDiffusion argument.py, train.py, data.py (commit 62fc435)",
            epochs=((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (None, 300)),
            batch_size=64,
            optimizer="sgd",
            learning_rate=0.01,
            weight_decay=5e-4,
            schedule="multistep",
            schedule_milestones=(2 / 3, 5 / 6),
            schedule_factor=0.2,
            augmentation=_MINIMAX_AUGMENTATION,
            image_size=224,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            best_every=0.01,
            variants=(
                # Two thirds of the epochs, rounded down to hundreds.
                Variant(
                    (("epochs", ((1, 2000), (10, 1300), (50, 1000), (200, 600), (500, 300), (None, 200))),),
                    classes=_CLASSES_100,
                ),
                Variant((("learning_rate", 0.1), ("weight_decay", 1e-4), ("batch_size", 128)), classes=(101, None)),
            ),
        ),
        Protocol(
            name="released-dsco",
            source=(
                "github.com/kkkkqq/Dataset-Concentration train.py, utils.py, datasets/imagenet.py (commits aee5052, "
                "5b0b2bc), hard labels; with --teach --sche cos: label_type='teacher', temperature=20, "
                "schedule='half-cosine'. Its colour jitter draws once a batch and takes the first three images for "
                "the colours; here each image is jittered on its own"
            ),
            epochs=((1, 3000), (10, 2000), (50, 1500), (200, 1000), (None, 500)),
            batch_size=64,
            learning_rate=1e-3,
            weight_decay=0.01,
            schedule="multistep",
            schedule_milestones=(2 / 3, 5 / 6),
            schedule_factor=0.2,
            augmentation=(RandomResizedCrop(scale=(0.5, 1.0), size=224), *_MINIMAX_AUGMENTATION[1:]),
            image_size=224,
            load_size=256,
            test_size=256,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            best_from=2 / 3,
            best_every=10,
        ),
        Protocol(
            name="rded-soft",
            source=(
                "github.com/LINs-lab/RDED argument.py, validation/main.py, validation/utils.py (commit 31f9117), for "
                "its images of 2 x 2 crops (ImageNet subsets at 224 px; ConvNets at 128). For plain images at 32 and "
                "64 px use rded-soft-small. It knows 1, 10 and 50 images per class; the rows between are ours. There "
                "the student also sees each batch once without a gradient, which moves batch norm statistics twice"
            ),
            epochs=300,
            batch_size=((1, 10), (10, 50), (None, 100)),
            learning_rate=1e-3,
            weight_decay=0.01,
            decay_vectors=False,
            schedule="half-cosine",
            augmentation=(ShufflePatches(2), RandomResizedCrop(scale=(0.5, 1.0)), HorizontalFlip(), CutMix()),
            label_type="teacher",
            temperature=20.0,
            image_size=224,
            test_size=256,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            norm="batch",
            best_from=0.8,
            best_every=10,
            variants=(
                Variant((("batch_size", ((1, 20), (10, 100), (None, 200))),), classes=_CLASSES_100),
                Variant((("batch_size", ((1, 20), (10, 100), (None, 200))),), classes=(1000, 1000)),
                Variant((("learning_rate", 2e-3),), model_types=("efficientnet",)),
                Variant((("learning_rate", 2.5e-3),), model_types=("mobilenet_v2",)),
                Variant((("learning_rate", 1e-4),), model_types=("swin", "swinv2", "vit")),
            ),
        ),
        Protocol(
            name="cifar-convnet",
            source=(
                "github.com/VICO-UoE/DatasetCondensation main_DM.py, utils.py (commits 306245d, 131a5a5): "
                "evaluate_synset with DSA. It runs one epoch more than it states and starts its momentum anew when "
                "the rate falls, which is not repeated here"
            ),
            epochs=1001,
            batch_size=256,
            optimizer="sgd",
            learning_rate=0.01,
            weight_decay=5e-4,
            schedule="multistep",
            schedule_milestones=(502 / 1001,),
            schedule_factor=0.1,
            augmentation=(DSA(CIFAR_MEAN, CIFAR_STD),),
            image_size=32,
            image_mean=CIFAR_MEAN,
            image_std=CIFAR_STD,
            best_from=1.0,
        ),
    )
}
# CIFAR (32 px) and Tiny-ImageNet (64 px) in RDED: one image is one crop, so a patch is the whole image.
PROTOCOLS["rded-soft-small"] = dataclasses.replace(
    PROTOCOLS["rded-soft"],
    name="rded-soft-small",
    augmentation=(HorizontalFlip(), CutMix()),
    image_size=None,
    test_size=None,
    variants=(
        *PROTOCOLS["rded-soft"].variants,
        Variant((("batch_size", 100),), classes=(200, 200)),  # Tiny-ImageNet
    ),
    source="as rded-soft, with factor 1: no patches, and a random resized crop of scale (1, 1), which is the image",
)


def get_protocol(name: str | Path, **overrides: object) -> Protocol:
    """A protocol by name or YAML file, with some of its values changed.

    Args:
        name (`str` or `Path`): a key of `PROTOCOLS`, or a file that `Protocol` fields are read from, see
            `protocol_from_dict`.
        **overrides: fields of `Protocol`. Giving `steps` drops the protocol's `epochs`, and the other way round; with
            another `image_size`, the sizes that images are loaded at and cropped to keep their ratio to it.

    Returns:
        `Protocol`: named `"<name> (changed)"` where something was, so that no table takes it for the original.

    Raises:
        ValueError: for an unknown name or field; names the nearest.
        FileNotFoundError: for a YAML file that does not exist.
    """
    if str(name).endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"No protocol file {str(name)!r}; names are {', '.join(PROTOCOLS)}.")
        with reading(Path(name), "Correct it: it must be YAML, with fields of `Protocol`."):
            fields = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise TypeError(f"`field: value` lines are needed, this is a {type(fields).__name__}")
        protocol = protocol_from_dict(fields)
    elif str(name) in PROTOCOLS:
        protocol = PROTOCOLS[str(name)]
    else:
        raise ValueError(
            f"Unknown protocol {str(name)!r}.{nearest(str(name), PROTOCOLS)} Allowed: {', '.join(PROTOCOLS)}."
        )
    if not overrides:
        return protocol
    _check_fields(overrides)
    changes = {key: _frozen(key, value) for key, value in overrides.items()}
    if changes.get("steps") is not None:
        changes.setdefault("epochs", None)
    if changes.get("epochs") is not None:
        changes.setdefault("steps", None)
    changes = _scaled_sizes(protocol, changes) | changes
    # A variant must not undo what was asked for.
    variants = tuple(
        dataclasses.replace(v, changes=tuple(change for change in v.changes if change[0] not in changes))
        for v in protocol.variants
    )
    changes = {"variants": variants, **changes, "name": protocol.name.removesuffix(CHANGED) + CHANGED}
    return dataclasses.replace(protocol, **changes)


def _scaled_sizes(protocol: Protocol, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from another image size: sizes that images are loaded at or cropped to, in the same ratio to it."""
    before, now = protocol.image_size, overrides.get("image_size")
    if before is None or now is None or before == now:
        return {}
    sizes = {name: getattr(protocol, name) for name in ("load_size", "test_size")}
    scaled: dict[str, Any] = {name: round(size * now / before) for name, size in sizes.items() if size is not None}
    scaled["augmentation"] = tuple(
        dataclasses.replace(one, size=round(one.size * now / before))
        if isinstance(one, RandomResizedCrop) and one.size is not None
        else one
        for one in protocol.augmentation
    )
    return scaled


def protocol_to_dict(protocol: Protocol) -> dict[str, Any]:
    """A protocol as plain values for JSON and YAML; `protocol_from_dict` turns it back."""
    values = dataclasses.asdict(protocol)
    values["augmentation"] = [
        {"name": type(transform).__name__, **vars(transform)} for transform in protocol.augmentation
    ]
    return plain(values)


def protocol_from_dict(values: Mapping[str, Any]) -> Protocol:
    """A protocol from plain values.

    Args:
        values (`Mapping`): fields of `Protocol`; `augmentation` is a list of `{"name": class, field: value}`. With
            `base`, the name of another protocol, only what differs from that one has to be given.

    Returns:
        `Protocol`: checked.

    Raises:
        ValueError: for unknown fields or augmentations (names the nearest), values that a field cannot have, or
            something else than a mapping.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"A protocol is a mapping of fields to values, got {values!r}; `get_protocol` takes names.")
    values = {RENAMED.get(key, key): value for key, value in values.items()}
    base = values.pop("base", None)
    _check_fields({key: value for key, value in values.items() if key != "name"})
    fields = {key: _frozen(key, value) for key, value in values.items()}
    if str(fields.get("name")).endswith("*"):  # recorded before the mark of changes was a word
        fields["name"] = fields["name"].rstrip("*") + CHANGED
    if base is None:
        if missing := [key for key in ("name", "source") if key not in fields]:
            raise ValueError(
                f"The protocol lacks {' and '.join(map(repr, missing))}: give them, or `base`, the name of a protocol "
                f"that it differs from ({', '.join(PROTOCOLS)})."
            )
        return Protocol(**fields)
    return dataclasses.replace(get_protocol(base, **{k: v for k, v in fields.items() if k != "name"}), **fields)


def _check_fields(values: Mapping[str, object], kind: type = Protocol, what: str = "Protocol") -> None:
    fields = [field.name for field in dataclasses.fields(kind) if field.name != "name"]
    for key in values:
        if key not in fields:
            raise ValueError(f"{what} has no field {key!r}.{nearest(str(key), fields)} Fields: {', '.join(fields)}.")


def _frozen(key: str, value: object) -> Any:
    """Lists of YAML as the tuples and classes that a frozen protocol holds."""
    if key in ("augmentation", "variants"):
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{key}` must be a list, got {value!r}.")
        read = _augmentation if key == "augmentation" else _variant
        return tuple(read(item) if isinstance(item, Mapping) else item for item in value)
    return _tuples(value)


def _variant(item: Mapping[str, Any]) -> Variant:
    _check_fields(item, Variant, "A variant")
    options = {key: _tuples(value) for key, value in item.items() if key != "changes"}
    given = item.get("changes")
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ValueError(f"`changes` of a variant must be `field: value` lines or pairs, got {given!r}.")
    changes = {RENAMED.get(key, key): value for key, value in pairs}
    _check_fields(changes)
    return Variant(tuple((key, _frozen(key, value)) for key, value in changes.items()), **options)


def _augmentation(item: Mapping[str, Any]) -> Transform | CutMix:
    options = {key: _tuples(value) for key, value in item.items() if key != "name"}
    name = item.get("name")
    if name not in AUGMENTATIONS:
        raise ValueError(
            f"Unknown augmentation {name!r}.{nearest(str(name), AUGMENTATIONS)} Allowed: {', '.join(AUGMENTATIONS)}."
        )
    _check_fields(options, AUGMENTATIONS[name], f"The augmentation {name}")
    return AUGMENTATIONS[name](**options)


def _tuples(value: object) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
