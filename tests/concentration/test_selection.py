"""Rules that choose real images, alone and on top of a small set."""

import copy
import logging
from dataclasses import dataclass

import pytest
import torch

from dsco_hf import Clarity, Clearest, Herding, Pool, Random, Selection, dope, get_protocol, recorded_doping, select
from dsco_hf.concentration.additions.doping import selected_rows
from dsco_hf.concentration.config_records import what_was_done
from dsco_hf.concentration.selection import clarity_scores, find_selection
from dsco_hf.concentration.set_records import record_of
from dsco_hf.data.datasets import load_pixels
from dsco_hf.evaluators import load_image_set, protocol_to_dict


SHORT = get_protocol("quick", epochs=2)


@pytest.fixture
def small(make):
    """One image of each class."""
    return make.images((1, 1, 1), seed=3)


@pytest.fixture
def train(real_images):
    """The real images in memory."""
    return load_image_set(real_images, protocol=get_protocol("quick"), num_channels=1)


def per_class(dataset):
    return torch.bincount(torch.tensor(list(dataset["label"])), minlength=3).tolist()


def scores_of(rule, small, real, pipe, seed=0):
    return rule.scores(Pool(real, progress=False), Pool(small, progress=False), pipe, seed)


# Alone.


def test_the_rows_are_those_that_earlier_versions_chose(make, real_images, train, small, pipe):
    pool = Pool(train)
    assert selected_rows(pool, "random", images_per_class=3, seed=1).tolist() == [19, 0, 3, 18, 4, 13, 14, 5, 2]
    pixels = Herding(features="pixels")
    assert selected_rows(pool, pixels, images_per_class=3, seed=1).tolist() == [15, 9, 20, 7, 16, 4, 11, 5, 2]
    model = Herding(features=make.convnet())
    assert selected_rows(pool, model, images_per_class=3).tolist() == [20, 9, 12, 16, 13, 10, 2, 5, 11]
    numbered = real_images.add_column("row", range(21))
    clearest = select(numbered, Clearest(0.4), pipe=pipe, progress=False)
    assert clearest["row"][:] == [1, 3, 7, 9, 11, 14, 15, 17, 18]
    student = Clarity(student=make.convnet(seed=5))
    for rule, seed, rows in (
        ("random", 1, [12, 0, 1, 4, 11, 5]),
        ("herding", 0, [20, 0, 16, 10, 8, 14]),
        (student, 0, [15, 17, 18, 1, 14, 11]),
    ):
        mixed = dope(small, real_images, pipe, images_per_class=3, strategy=rule, seed=seed, progress=False)
        assert mixed["real_index"][3:] == rows


def test_a_small_choice_is_part_of_a_large_one(make, real_images, train, pipe):
    pool = Pool(real_images, progress=False)
    rules = ("random", "herding", Herding(features="pixels"), Clarity(student=make.convnet(seed=5)))
    for rule in rules:
        one, three = (selected_rows(pool, rule, images_per_class=n, pipe=pipe, seed=2) for n in (1, 3))
        assert torch.equal(three.view(3, 3)[:, 0], one) and pool.labels[three].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert len(pool._pixels) == 2  # those of the generator's channels, and those of herded pixels, each read once
    other = selected_rows(pool, "random", images_per_class=3, seed=3)
    assert not torch.equal(other, selected_rows(pool, "random", images_per_class=3, seed=2))
    few = select(train, Random(), images_per_class=2)
    assert few.pixels.shape == (6, 1, 8, 8) and few.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_what_is_herded_has_the_mean_of_its_class(train):
    few = select(train, Herding(features="pixels"), images_per_class=3)
    for label in range(3):
        whole = train.pixels[train.labels == label]
        gap = (few.pixels[few.labels == label].mean(0) - whole.mean(0)).norm()
        assert gap < (whole[:3].mean(0) - whole.mean(0)).norm()


def test_what_cannot_be_selected(real_images, pipe):
    with pytest.raises(ValueError, match="at least 6 images, but 'triangle' has 5. Add images, ask for fewer"):
        select(real_images, "random", images_per_class=6)
    with pytest.raises(ValueError, match="`images_per_class` must be a whole number of at least 1, got 0"):
        select(real_images, "random", images_per_class=0)
    with pytest.raises(ValueError, match="`images_per_class` is missing: 'herding' ranks all images"):
        select(real_images, "herding", pipe=pipe)
    with pytest.raises(ValueError, match="No image to choose from: the dataset is empty"):
        select(real_images.select([]), "random", images_per_class=1)
    with pytest.raises(ValueError, match="Herding\\(features='pixels'\\)"):
        select(real_images, "herding", images_per_class=1)
    assert len(select(real_images, Herding(features="pixels"), images_per_class=1, progress=False)) == 3
    with pytest.raises(ValueError, match="`features` must be one of \\['pixels'\\]"):
        Herding(features="pixel")
    with pytest.raises(ValueError, match="there is none: pass `Clarity\\(student=...\\)`"):
        select(real_images, "clarity", images_per_class=1, pipe=pipe)
    with pytest.raises(TypeError, match="one of 'random', .*, or an object of a class below Selection, got <class"):
        select(real_images, Herding, images_per_class=1)
    with pytest.raises(ValueError, match="'clearest' ranks 1 images of class 'circle', and 2 are wanted"):
        select(real_images, Clearest(0.1), images_per_class=2, pipe=pipe, progress=False)


def test_a_ranking_that_is_none_is_refused(real_images):
    @dataclass(frozen=True)
    class Wrong(Selection):
        places: object

        def rank(self, pool, small, wanted, pipe, seed):
            return self.places

    for places in (torch.rand(21), [[1, 2]], [21], [-1]):
        with pytest.raises(ValueError, match="must return places in the pool, whole numbers from 0 to 20"):
            select(real_images, Wrong(places), images_per_class=1)
    with pytest.raises(ValueError, match="returned a place twice"):
        select(real_images, Wrong([0, 1, 2, 0]), images_per_class=1)
    with pytest.raises(TypeError, match="abstract method '?rank"):
        Selection()


def test_a_rule_by_its_name_takes_the_options_that_it_has():
    offered = {"num_students": 4, "protocol": SHORT, "targets": None}
    assert find_selection("clarity", **offered) == Clarity(num_students=4, protocol=SHORT)
    assert [find_selection(name, **offered) for name in ("herding", "random")] == [Herding(), Random()]
    assert [name for name in Selection.kinds if ":" not in name] == [
        *["random", "herding", "clarity", "clearest", "el2n", "forgetting", "aum", "dyn_unc", "dual"],
        *["ccs", "moderate", "k_center", "d2", "ridge_rule"],
    ]


# Clarity.


def test_clarity_by_the_formula():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(clarity_scores(p, torch.tensor([0, 1, 0])), torch.tensor([0.5, -0.3, 0.0]))


def test_clarity_of_images(small, real_images, pipe):
    scores = scores_of(Clarity(student=pipe.classifier), small, real_images, pipe)
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    with torch.no_grad():
        p = pipe.classifier(pixels).logits.softmax(1)
    expected = [p[i, y] - max(p[i, k] for k in range(3) if k != y) for i, y in enumerate(labels.tolist())]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=0)
    assert scores.std() > 1e-4


def test_clarity_takes_the_least_clear(small, real_images, pipe):
    rule = Clarity(student=pipe.classifier)

    def chosen(**options):
        return dope(small, real_images, strategy=rule, progress=False, **options)["real_index"][3:]

    scores = scores_of(Clarity(student=pipe.classifier), small, real_images, pipe)
    ranked = scores.argsort().tolist()
    assert chosen(total=8) == ranked[:5]
    assert chosen(images_per_class=2, class_wise=False) == ranked[:3]
    labels = list(real_images["label"])
    assert chosen(images_per_class=3) == [i for row in range(3) for i in [j for j in ranked if labels[j] == row][:2]]


def test_clarity_trains_a_student(small, real_images, pipe, caplog):
    options = {"strategy": Clarity(protocol=SHORT), "total": 7, "progress": False}
    with caplog.at_level(logging.WARNING, "dsco_hf"):
        first, again = (dope(small, real_images, pipe, **options) for _ in range(2))
    assert not caplog.records  # the pipeline's classifier is the teacher
    assert list(first["real_index"]) == list(again["real_index"])
    with caplog.at_level(logging.WARNING, "dsco_hf"):
        gray = dope(small, real_images, **options)
    assert "hard labels" in caplog.text and len(gray) == 7


def test_the_mean_of_several_students_ranks(small, real_images, pipe):
    def scores(students, seed=0):
        return scores_of(Clarity(protocol=SHORT, num_students=students), small, real_images, pipe, seed)

    one, three, again = scores(1), scores(3), scores(3)
    assert torch.equal(three, again) and not torch.equal(one, three)
    others = 3 * three - one  # the sum of two students, each within [-1, 1], none of them the first again
    assert others.abs().max() <= 2 and not torch.allclose(others, 2 * one, atol=1e-4)
    rule = Clarity(protocol=SHORT, num_students=3)
    mixed = dope(small, real_images, pipe, total=7, strategy=rule, progress=False)
    assert list(mixed["real_index"])[3:] == three.argsort(stable=True)[:4].tolist()


def test_numbers_of_students_that_cannot_be(pipe):
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"`num_students` must be a whole number of at least 1, got {number}"):
            Clarity(num_students=number)
    with pytest.raises(ValueError, match="`num_students` must be 1 where a `student` is given; got 2"):
        Clarity(student=pipe.classifier, num_students=2)


# The clearest.


@pytest.mark.parametrize(("share", "sizes"), [(0.01, [1, 1, 1]), (0.5, [5, 4, 3]), (1.0, [9, 7, 5])])
def test_the_clearest_of_every_class(real_images, pipe, share, sizes):
    numbered = real_images.add_column("row", range(len(real_images)))
    chosen = select(numbered, Clearest(share), pipe=pipe, progress=False)
    assert per_class(chosen) == sizes and chosen.features == numbered.features
    rows = list(chosen["row"])
    assert rows == sorted(rows)
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    with torch.no_grad():
        p = pipe.classifier(pixels).logits.double().softmax(1)[range(len(labels)), labels]
    for label in range(3):
        taken = [row for row in rows if labels[row] == label]
        left = [row for row in range(len(labels)) if labels[row] == label and row not in rows]
        assert all(p[a] >= p[b] for a in taken for b in left)


def test_the_clearest_by_a_classifier_that_orders_classes_otherwise(real_images, make):
    names = ("square", "circle", "triangle")
    turned = make.pipe(classifier=make.convnet(names=names))
    chosen = select(real_images.add_column("row", range(21)), Clearest(0.01), pipe=turned, progress=False)
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    own = torch.tensor([1, 0, 2])[labels]
    with torch.no_grad():
        p = turned.classifier(pixels).logits.double().softmax(1)[range(len(labels)), own]
    best = [max((i for i in range(len(labels)) if labels[i] == label), key=lambda i: p[i]) for label in range(3)]
    assert sorted(best) == list(chosen["row"])


def test_clearest_bad_input(real_images, pipe, make):
    for share in (0, -0.2, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`share` must be a finite number above 0 and at most 1, got"):
            Clearest(share)
    with pytest.raises(ValueError, match="there is none: pass `classifier=`"):
        select(real_images, "clearest", pipe=make.pipe())
    with pytest.raises(ValueError, match="trained on other classes than the dataset"):
        select(real_images, "clearest", pipe=make.pipe(classifier=make.convnet(names=("cat", "dog", "cow"))))


# Records.


def test_a_recorded_doping_is_done_again(small, real_images, pipe, targets):
    pool = Pool(real_images, progress=False)
    rules = (Random(), Clarity(protocol=SHORT, architecture="convnet-2"), Clearest(0.6), Herding(targets))
    given = ({}, {}, {}, {"targets": targets})
    for rule, objects in zip(rules, given, strict=True):
        mixed = dope(small, pool, pipe, total=8, strategy=rule, seed=2, progress=False)
        arguments = recorded_doping(record_of(mixed)["doping"], **objects)
        again = dope(small, pool, pipe, progress=False, **arguments)
        assert again["real_index"][:] == mixed["real_index"][:] and type(arguments["strategy"]) is type(rule)
        assert record_of(again) == record_of(mixed)
    told = record_of(mixed)["doping"]
    with pytest.raises(ValueError, match="SHA-256 .{12}… only: pass the same one as `targets=`.$"):
        recorded_doping(told)
    other = copy.deepcopy(targets)
    other.embeddings[0, 0] += 1
    with pytest.raises(ValueError, match="`targets=`; the one given is another"):
        recorded_doping(told, targets=other)
    with pytest.raises(ValueError, match="`strategy` must be one of .*, got 'herdin'. Nearest: 'herding'"):
        recorded_doping({**told, "strategy": {"name": "herdin"}})
    with pytest.raises(ValueError, match="no class below Selection is there: `import my` first"):
        recorded_doping({**told, "strategy": {"name": "my:Rule"}})
    with pytest.raises(ValueError, match="Clearest has no field 'shere'. Nearest: 'share'"):
        recorded_doping({**told, "strategy": {"name": "clearest", "shere": 1}})


def test_a_doping_that_an_earlier_version_recorded(pipe):
    common = {"images_per_class": 3, "total": None, "class_wise": True, "image_size": 8, "seed": 5, "real_rows": 21}
    fields = {
        "architecture": "convnet-2",
        "num_students": 4,
        "protocol": protocol_to_dict(SHORT),
        "teacher_sha256": "0",
    }
    found = recorded_doping({"strategy": "clarity", **common, **fields})
    assert found["strategy"] == Clarity(protocol=SHORT, architecture="convnet-2", num_students=4)
    assert {key: found[key] for key in found if key != "strategy"} == {
        **{"images_per_class": 3, "class_wise": True, "image_size": 8, "seed": 5}
    }
    assert recorded_doping({"strategy": "random", **common})["strategy"] == Random()
    for strategy in ("random", {"name": "random"}):
        assert what_was_done({"doping": {"strategy": strategy, **common}}) == ["Real images were added at random."]
    herded = {"strategy": "herding", **common, "classifier_sha256": "0"}
    assert recorded_doping(herded)["strategy"] == Herding()
    with pytest.raises(ValueError, match="pass the same one as `targets=`"):
        recorded_doping({**herded, "targets_sha256": "f" * 64})
    with pytest.raises(ValueError, match="no `strategy` of a doping"):
        recorded_doping({"seed": 5})
