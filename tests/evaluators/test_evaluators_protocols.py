"""Protocols: numbers of the sources, budgets, variants, YAML."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from dsco_hf.evaluators import PROTOCOLS, get_protocol, protocol_from_dict, protocol_to_dict
from dsco_hf.evaluators.augmentation import (
    DSA,
    ColorJitter,
    CutMix,
    HorizontalFlip,
    Lighting,
    RandomResizedCrop,
    RandomShift,
    ShufflePatches,
)
from dsco_hf.evaluators.protocols import Protocol, by_budget, learning_rate_factor


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.mark.parametrize(
    ("images_per_class", "epochs"),
    [(1, 3000), (10, 2000), (11, 1500), (50, 1500), (100, 1000), (500, 500), (1300, 300)],
)
def test_minimax_lengths(images_per_class, epochs):
    assert by_budget(PROTOCOLS["minimax-hard"].epochs, images_per_class) == epochs


PUBLISHED = {
    "minimax-hard": {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "decay_vectors": True,
        "batch_size": 64,
        "schedule": "multistep",
        "schedule_milestones": (2 / 3, 5 / 6),
        "schedule_factor": 0.2,
        "label_type": "hard",
        "image_size": 224,
        "norm": "instance",
        "augmentation": (
            RandomResizedCrop(scale=(0.5, 1.0)),
            HorizontalFlip(0.5),
            ColorJitter(0.4, 0.4, 0.4),
            Lighting(0.1),
            CutMix(1.0),
        ),
    },
    "released-dsco": {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "batch_size": 64,
        "epochs": ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (None, 500)),
        "schedule": "multistep",
        "label_type": "hard",
        "load_size": 256,
        "image_size": 224,
        "test_size": 256,
    },
    "rded-soft": {
        "epochs": 300,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "decay_vectors": False,
        "schedule": "half-cosine",
        "label_type": "teacher",
        "temperature": 20.0,
        "image_size": 224,
        "test_size": 256,
        "best_from": 0.8,
        "best_every": 10,
        "augmentation": (ShufflePatches(2), RandomResizedCrop(scale=(0.5, 1.0)), HorizontalFlip(0.5), CutMix(1.0)),
    },
    "rded-soft-small": {
        "epochs": 300,
        "label_type": "teacher",
        "temperature": 20.0,
        "image_size": None,
        "augmentation": (HorizontalFlip(0.5), CutMix(1.0)),
    },
    "cifar-convnet": {
        "epochs": 1001,
        "batch_size": 256,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "multistep",
        "schedule_factor": 0.1,
        "label_type": "hard",
        "image_size": 32,
        "norm": "instance",
        "augmentation": (DSA(strategies=("color", "crop", "cutout", "flip", "scale", "rotate")),),
    },
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_numbers_are_those_of_the_sources(name):
    assert {field: getattr(PROTOCOLS[name], field) for field in PUBLISHED[name]} == PUBLISHED[name]
    assert set(PUBLISHED) | {"quick"} == set(PROTOCOLS)


def test_minimax_for_100_and_1000_classes():
    protocol = PROTOCOLS["minimax-hard"]
    hundred, thousand = protocol.for_model(100, "dsco_convnet"), protocol.for_model(1000, "dsco_convnet")
    assert [by_budget(hundred.epochs, n) for n in (1, 10, 50, 100)] == [2000, 1300, 1000, 600]
    assert (hundred.learning_rate, hundred.batch_size) == (0.01, 64)
    assert (thousand.learning_rate, thousand.weight_decay, thousand.batch_size) == (0.1, 1e-4, 128)
    assert by_budget(thousand.epochs, 10) == 2000


def test_rded_batch_sizes_and_learning_rates():
    protocol = PROTOCOLS["rded-soft"]
    assert [by_budget(protocol.batch_size, n) for n in (1, 10, 50, 100)] == [10, 50, 100, 100]
    assert by_budget(protocol.for_model(1000, "resnet").batch_size, 50) == 200
    assert by_budget(PROTOCOLS["rded-soft-small"].for_model(200, "resnet").batch_size, 1) == 100
    assert protocol.for_model(10, "vit").learning_rate == 1e-4
    assert protocol.for_model(100, "mobilenet_v2").learning_rate == 2.5e-3
    assert (protocol.temperature, protocol.label_type, protocol.decay_vectors) == (20.0, "teacher", False)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_protocol_says_where_it_comes_from_and_survives_yaml(name):
    protocol = PROTOCOLS[name]
    assert protocol.name == name and protocol.source
    plain = yaml.safe_load(yaml.safe_dump(protocol_to_dict(protocol)))
    assert protocol_from_dict(plain) == protocol


def test_schedules():
    cosine, half = get_protocol("quick"), get_protocol("rded-soft")
    assert learning_rate_factor(cosine, 0, 10) == 1.0 and learning_rate_factor(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate_factor(half, 299, 300) == pytest.approx(0.5 * (1 + math.cos(math.pi * 299 / 600)))
    steps = get_protocol("minimax-hard")
    factors = [learning_rate_factor(steps, epoch, 2000) for epoch in (1332, 1333, 1665, 1666)]
    assert factors == pytest.approx([1, 0.2, 0.2, 0.04])
    classic = get_protocol("cifar-convnet")
    assert [learning_rate_factor(classic, epoch, 1001) for epoch in (501, 502)] == pytest.approx([1, 0.1])
    assert learning_rate_factor(get_protocol("quick", schedule="constant"), 9, 10) == 1.0


def test_changes_are_marked_and_beat_variants():
    changed = get_protocol("rded-soft", learning_rate=0.5, epochs=7)
    assert changed.name == "rded-soft (changed)" and changed.epochs == 7
    assert changed.for_model(10, "vit").learning_rate == 0.5
    assert get_protocol("quick", epochs=3).steps is None
    assert get_protocol("cifar-convnet", steps=3).epochs is None
    assert PROTOCOLS["rded-soft"].learning_rate == 1e-3


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="Unknown protocol 'rded'.*'rded-soft'"):
        get_protocol("rded")
    with pytest.raises(ValueError, match="no field 'learning_rat'.*'learning_rate'"):
        get_protocol("quick", learning_rat=1)
    with pytest.raises(ValueError, match="Unknown augmentation 'Cutmix'.*'CutMix'"):
        protocol_from_dict({"base": "quick", "name": "mine", "augmentation": [{"name": "Cutmix"}]})
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        get_protocol("missing.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None, "steps": None}, "either epochs or steps"),
        ({"epochs": 3, "steps": 3}, "either epochs or steps"),
        ({"label_type": "fuzzy"}, "hard, teacher, stored"),
        ({"optimizer": "lion"}, "adamw, sgd"),
        ({"schedule": "linear"}, "half-cosine"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"temperature": float("nan")}, "`temperature` must be a finite number, got nan"),
        ({"steps": 0}, "at least 1"),
        ({"steps": ((50, 10), (10, 20), (None, 30))}, "rising order"),
        ({"steps": ((50, 10),)}, "the last one has None"),
        ({"augmentation": (CutMix(), HorizontalFlip())}, "must be the last"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"name": "bad", "source": "none", "steps": 10, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, "no field 'lerning_rate'. Nearest: 'learning_rate'"),
        ({"learning_rate": "fast"}, "`learning_rate` must be a finite number, got 'fast', which is text"),
        ({"weight_decay": -1}, "`weight_decay` must be a finite number of at least 0, got -1"),
        ({"momentum": 3}, "`momentum` must be a number from 0 to 1, got 3"),
        ({"image_size": 0}, "`image_size` must be a whole number of at least 1, got 0"),
        ({"image_mean": [0.5, "a", 0.5]}, "`image_mean` must be a finite number, got 'a'"),
        ({"image_std": [0, 0, 0]}, "`image_std` must be a finite number above 0, got 0"),
        ({"image_mean": [0.5]}, "a number per channel"),
        ({"norm": "layer"}, "Unknown norm 'layer'; allowed: instance"),
        ({"schedule_milestones": 0.5}, "`schedule_milestones` must be a list of numbers, got 0.5"),
        ({"augmentation": "HorizontalFlip"}, "`augmentation` must be a list, got 'HorizontalFlip'"),
        ({"augmentation": ["HorizontalFlip"]}, "in a file {name: HorizontalFlip}, got 'HorizontalFlip'"),
        (
            {"augmentation": [{"name": "RandomShift", "pixel": 3}]},
            "RandomShift has no field 'pixel'. Nearest:",
        ),
        ({"augmentation": [{"name": "RandomShift", "pixels": "a"}]}, "`pixels` must be a whole number, got 'a'"),
        ({"augmentation": [{"name": "DSA", "mean": "gray"}]}, "`mean` must be a list of numbers, got 'gray'"),
        (
            {"variants": [{"classes": [1, 2]}]},
            "of a variant must be `field: value` lines or pairs, got None",
        ),
        ({"variants": [{"changes": {"learning_rate": "x"}}]}, "`learning_rate` must be a finite number, got 'x'"),
        ({"variants": [{"changes": {"steps": 4}, "clases": [1, 2]}]}, "no field 'clases'. Nearest: 'classes'"),
        ({"variants": [{"changes": {"steps": 4}, "classes": "all"}]}, "smallest and largest number, got 'all'"),
        ({"best_from": 2}, "`best_from` must be a number from 0 to 1, got 2"),
        ({"source": 7}, "`source` of a protocol must be text, got 7"),
    ],
)
def test_what_no_field_of_a_protocol_can_hold_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        protocol_from_dict({"name": "mine", "source": "me", "steps": 3, **changes})


def test_a_protocol_needs_its_fields_or_a_base():
    with pytest.raises(ValueError, match="lacks 'source': give them, or `base`"):
        protocol_from_dict({"name": "mine", "steps": 3})
    with pytest.raises(ValueError, match="a mapping of fields to values, got 'quick'; `get_protocol` takes names"):
        protocol_from_dict("quick")
    mine = {"name": "mine", "source": "me", "steps": np.int64(3), "learning_rate": np.float32(0.5)}
    read = protocol_from_dict(mine | {"variants": [{"changes": {"steps": 4}, "classes": [100, None]}]})
    assert (read.steps, read.learning_rate, read.for_model(200, "vit").steps) == (3, 0.5, 4)


def test_a_protocol_that_was_changed_says_so_in_words():
    assert protocol_from_dict(protocol_to_dict(PROTOCOLS["quick"]) | {"name": "quick*"}).name == "quick (changed)"
    assert get_protocol("quick", steps=3).name == "quick (changed)"
    assert protocol_from_dict({"base": "quick", "steps": 3}).name == "quick (changed)"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("protocols/*.yaml")), ids=lambda path: path.stem)
def test_yaml_protocols_load(path):
    protocol = get_protocol(path)
    assert protocol.source
    assert protocol_from_dict(protocol_to_dict(protocol)) == protocol


def test_yaml_with_a_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: rded-soft\nname: mine\nsource: me\nepochs: 5\n"
        "augmentation: [{name: RandomShift, pixels: 4}, {name: RandomResizedCrop, scale: [0.5, 1.0]}]\n"
    )
    protocol = get_protocol(path)
    assert (protocol.name, protocol.epochs, protocol.temperature) == ("mine", 5, 20.0)
    assert protocol.augmentation == (RandomShift(4), RandomResizedCrop((0.5, 1.0)))


def test_what_was_recorded_as_input_size_is_read_as_image_size():
    old = protocol_to_dict(PROTOCOLS["rded-soft"])
    old["input_size"] = old.pop("image_size")
    old["variants"].append({"changes": [["input_size", 64]], "classes": [200, 200], "model_types": []})
    read = protocol_from_dict(old)
    assert read.image_size == 224 and read.for_model(200, "resnet").image_size == 64
    assert protocol_from_dict({"base": "quick", "input_size": 16}).image_size == 16


def test_sizes_of_loading_and_cropping_follow_the_image_size():
    changed = get_protocol("released-dsco", image_size=56)
    assert (changed.load_size, changed.image_size, changed.test_size) == (64, 56, 64)
    assert changed.augmentation[0] == RandomResizedCrop(scale=(0.5, 1.0), size=56)
    kept = get_protocol("released-dsco", image_size=56, test_size=60)
    assert (kept.load_size, kept.test_size) == (64, 60)
    assert get_protocol("quick", image_size=56).load_size is None
