"""One function tells apart all that decides a result."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dsco_hf.evaluators import get_protocol
from dsco_hf.utils.origins import differences, fingerprint, identity, in_words


@dataclasses.dataclass
class Point:
    x: int = 1
    y: float = 0.5


DIFFERENT = [
    None, False, True, 0, 1, 0.5, "1", "", b"1", [], [1], [[1]], [1, 2], [2, 1], ["ab", "c"], ["a", "bc"], {}, [None],
    {"a": 1}, {"a": 2}, {"b": 1}, {1: 1}, {"1": 1}, {1, 2}, {1}, Point(), Point(x=2), torch.zeros(2), np.zeros(2),
    torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), torch.zeros(()),
    torch.zeros(2, 1), np.zeros(2, np.float32), torch.float16, torch.device("cpu"), [torch.zeros(2)], float("inf"),
]  # fmt: skip


def test_all_different_values_have_different_fingerprints():
    assert len({fingerprint(value) for value in DIFFERENT}) == len(DIFFERENT)
    assert len(fingerprint(1)) == 64 and fingerprint(1, 2) != fingerprint([1, 2]) != fingerprint(a=1)


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ((1, 2), [1, 2]), (2, 2.0), (np.int64(3), 3), (np.float32(0.5), 0.5),
        (torch.ones(2, 2), torch.ones(4, 2)[::2]), (range(2), [0, 1]), (Point(), Point(1, 0.5)),
    ],
)  # fmt: skip
def test_the_same_value_has_the_same_fingerprint_however_it_is_written(one, same):
    assert fingerprint(one) == fingerprint(same)


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(TypeError, match="A function cannot be told from another one: give what it depends on"):
        fingerprint([lambda: None])


def test_models_count_by_weights_type_and_configuration(make):
    base = fingerprint(make.convnet())
    assert base == fingerprint(make.convnet())
    assert base != fingerprint(make.convnet(seed=3)) and base != fingerprint(make.convnet().half())
    changed = make.convnet()
    changed.config.image_mean = [0.1]
    assert base != fingerprint(changed)
    renamed = make.convnet(names=("circle", "square", "oval"))
    assert base != fingerprint(renamed)
    assert fingerprint(DDIMScheduler()) != fingerprint(DDIMScheduler(prediction_type="v_prediction"))


def test_pipelines_count_by_their_parts_and_classes(pipe, make, targets):
    base = identity(pipe=pipe)["pipe"]
    assert set(base) == {"classifier", "scheduler", "transformer", "classes"}
    pipe.register_modules(classifier=make.convnet(seed=9))
    assert list(differences({"pipe": base}, identity(pipe=pipe))) == ["pipe.classifier"]
    assert fingerprint(targets) == fingerprint(dataclasses.replace(targets, provenance={"other": 1}))
    assert fingerprint(targets) != fingerprint(dataclasses.replace(targets, bandwidth=targets.bandwidth + 1))
    protocol = get_protocol("quick")
    assert fingerprint(protocol) != fingerprint(dataclasses.replace(protocol, weight_decay=0.3))


def test_differences_are_told_by_name():
    before = json.loads(json.dumps(identity(seed=0, options={"eta": 1.0, "steps": [1, 2]}, images=torch.zeros(3))))
    assert differences(before, identity(seed=0, options={"steps": (1, 2), "eta": 1}, images=torch.zeros(3))) == {}
    now = identity(seed=1, options={"eta": 0.5, "steps": [1]}, images=torch.ones(3))
    found = differences(before, now)
    assert list(found) == ["seed", "options.eta", "options.steps.1", "images"] and found["options.steps.1"] == [
        2,
        None,
    ]
    assert in_words(found).startswith("seed: 0 there, 1 now; options.eta: 1.0 there, 0.5 now; ")
    assert in_words({str(i): [0, 1] for i in range(12)}).endswith("; and 2 more")
