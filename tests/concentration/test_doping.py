import copy

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from dsco_hf import (
    Clarity,
    ConvNetForImageClassification,
    Herding,
    MatchingTargets,
    concentrate,
    dope,
    recorded_doping,
)
from dsco_hf.concentration.additions.beginning import until_doping
from dsco_hf.concentration.set_records import changed_since, record_of
from dsco_hf.data.datasets import load_pixels
from dsco_hf.matching.discrepancy import embed_pixels
from dsco_hf.matching.kernels import mmd2


@pytest.fixture(scope="module")
def _small(_pixel_pipe):
    return concentrate(copy.deepcopy(_pixel_pipe), None, 2, num_inference_steps=2, guidance_scale=1.0, progress=False)


@pytest.fixture
def small(_small):
    """Two synthetic images of each class."""
    return _small


def added(mixed):
    return mixed.select([row for row, source in enumerate(mixed["source"]) if source == 1])


def per_class(dataset):
    return torch.bincount(torch.tensor(list(dataset["label"])), minlength=3).tolist()


STRATEGIES = ["herding", "clarity", "random"]


def rule(strategy, pipe):
    return Clarity(student=pipe.classifier) if strategy == "clarity" else strategy


@pytest.fixture
def mix(small, real_images, pipe):
    """`dope` with a student for "clarity", so that nothing is trained."""

    def run(*, strategy, small=small, real=real_images, **options):
        return dope(small, real, pipe, strategy=rule(strategy, pipe), progress=False, **options)

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_and_provenance(mix, small, real_images, strategy):
    mixed = mix(strategy=strategy, images_per_class=5)
    assert isinstance(mixed, Dataset) and mixed.features == small.features
    assert mixed.column_names == small.column_names
    assert per_class(mixed) == [5, 5, 5]
    assert mixed.select(range(6)).remove_columns("image")[:] == small.remove_columns("image")[:]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(mixed["image"][:6], small["image"], strict=True))
    real = added(mixed)
    assert list(mixed["source"]) == [0] * 6 + [1] * 9
    assert set(real["seed"]) == set(real["block"]) == {-1}
    assert len(set(real["real_index"])) == 9
    for row in real:
        original = real_images[row["real_index"]]
        assert original["label"] == row["label"] and original["image"].tobytes() == row["image"].tobytes()


def test_image_files_are_taken_over_as_they_are(mix, small, real_images):
    def encoded(dataset):
        return [image["bytes"] for image in dataset.with_format("arrow")[:]["image"].to_pylist()]

    mixed = mix(strategy="random", total=12)
    originals = encoded(real_images)
    indices = mixed["real_index"][6:]
    assert encoded(mixed)[6:] == [originals[i] for i in indices] and encoded(mixed)[:6] == encoded(small)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_total_budget(mix, strategy):
    mixed = mix(strategy=strategy, total=13)
    assert len(mixed) == 13
    if strategy != "clarity":  # which ranks over all classes
        assert sorted(per_class(mixed)) == [4, 4, 5]
    assert sorted(per_class(mix(strategy=strategy, total=13, class_wise=True))) == [4, 4, 5]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_total_evens_out_what_synthesis_left_uneven(mix, small, strategy):
    uneven = small.select([0, 1, 2])  # 2, 1 and no synthetic images
    mixed = mix(strategy=strategy, small=uneven, total=9, class_wise=True)
    assert per_class(mixed) == [3, 3, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_total_beyond_the_smallest_class_goes_to_the_others(mix, strategy):
    mixed = mix(strategy=strategy, total=6 + 20, class_wise=True)  # 9, 7 and 5 real images
    assert per_class(added(mixed)) == [8, 7, 5]
    everything = mix(strategy=strategy, total=6 + 21)
    assert sorted(added(everything)["real_index"]) == list(range(21))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [{"images_per_class": 2}, {"total": 6}])
def test_nothing_to_add(mix, small, strategy, budget):
    mixed = mix(strategy=strategy, **budget)
    assert mixed.features == small.features and mixed.remove_columns("image")[:] == small.remove_columns("image")[:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_class_without_synthetic_image(mix, small, strategy):
    less = small.filter(lambda label: label != 1, input_columns="label")
    mixed = mix(strategy=strategy, small=less, images_per_class=3)
    assert per_class(mixed) == [3, 3, 3] and per_class(added(mixed)) == [1, 3, 1]


def test_herding_takes_what_lowers_the_discrepancy_of_the_mixture(mix, small, real_images, pipe, targets):
    mixed = mix(strategy=Herding(targets), images_per_class=5)
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    have, candidates = (embed_pixels(x, pipe, targets) for x in (load_pixels(small, num_channels=1)[0], pixels))
    for row in range(3):
        sums, count, picked = have[2 * row : 2 * row + 2].double().sum(0), 2, []
        for _ in range(3):
            free = [i for i in range(21) if labels[i] == row and i not in picked]
            gaps = [mmd2((sums + candidates[i]) / (count + 1), targets.embeddings[row].double()).item() for i in free]
            picked.append(free[min(range(len(free)), key=gaps.__getitem__)])
            sums, count = sums + candidates[picked[-1]], count + 1
        assert mixed["real_index"][6 + 3 * row : 9 + 3 * row] == picked
    # targets of the real images are what it makes itself
    default = mix(strategy="herding", images_per_class=4)
    assert len(default) == 12


def test_random_choice_follows_its_seed(mix, small, real_images):
    first, again, other = (mix(strategy="random", images_per_class=4, seed=seed) for seed in (0, 0, 1))
    assert list(first["real_index"]) == list(again["real_index"]) != list(other["real_index"])
    alone = dope(small, real_images, strategy="random", images_per_class=4, progress=False)  # needs no pipeline
    assert list(alone["real_index"]) == list(first["real_index"])


def test_other_column_names(mix, small, real_images):
    renamed = real_images.rename_columns({"image": "img", "label": "digit"})
    mixed = mix(strategy="herding", real=renamed, images_per_class=3)
    assert mixed.features == small.features and per_class(mixed) == [3, 3, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"total": 28}, "28 images cannot be made of 6 synthetic and up to 21 real ones: choose from 6 to 27"),
        ({"total": 5}, "choose from 6 to 27"),
        ({"total": 0}, "`total` must be a whole number of at least 1, got 0"),
        ({"total": -2}, "`total` must be a whole number of at least 1, got -2"),
        ({"images_per_class": 8}, "Class 'triangle' has 2 synthetic and 5 real images: .* from 2 to 7, got 8"),
        ({"images_per_class": 1}, "from 2 to 11, got 1"),
        ({"images_per_class": 0}, "`images_per_class` must be a whole number of at least 1, got 0"),
        ({}, "Pass either `images_per_class` or `total`"),
        ({"total": 9, "images_per_class": 3}, "Pass either `images_per_class` or `total`"),
    ],
)
def test_budgets_that_cannot_be_met(mix, strategy, budget, message):
    with pytest.raises(ValueError, match=message):
        mix(strategy=strategy, **budget)


def test_bad_input(mix, small, real_images, pipe, targets, make):
    with pytest.raises(ValueError, match="`strategy` must be one of .*got 'herdin'. Nearest: 'herding'"):
        mix(strategy="herdin", total=8)
    with pytest.raises(ValueError, match="needs `pipe`, whose classifier"):
        dope(small, real_images, strategy="herding", total=8)
    with pytest.raises(ValueError, match="the pipeline has none: pass `classifier=`"):
        dope(small, real_images, make.pipe(), strategy="herding", total=8, progress=False)
    other = make.pipe(classifier=make.convnet(seed=9))
    with pytest.raises(ValueError, match="is not the one that the targets were made with"):
        dope(small, real_images, other, strategy=Herding(targets), total=8, progress=False)
    with pytest.raises(ValueError, match="'triangle' has 2 synthetic and 0 real images"):
        mix(strategy="random", real=make.images((3, 3), names=("circle", "square")), images_per_class=3)
    with pytest.raises(ValueError, match=r"of a class of the small set, .*got \['cat', 'dog'\]"):
        mix(strategy="random", real=make.images((3, 3), names=("cat", "dog")), total=8)
    with pytest.raises(ValueError, match="No column is of type Image"):
        mix(strategy="random", real=real_images.remove_columns("image"), total=8)
    student = make.convnet(names=("cat", "dog", "cow"))
    assert isinstance(student, ConvNetForImageClassification)
    with pytest.raises(ValueError, match="student"):
        mix(strategy=Clarity(student=student), total=8)


@pytest.mark.slow
def test_targets_are_made_of_the_real_images(mix, real_images, pipe):
    made = MatchingTargets.from_dataset(real_images, pipe, features={}, progress=False)
    given = mix(strategy=Herding(made), images_per_class=4)
    assert list(given["real_index"]) == list(mix(strategy="herding", images_per_class=4)["real_index"])


def levels(dataset):
    """The pattern of every class's images by name: stripes, columns or checkers, as `make.images` draws them."""
    y, x = np.mgrid[:8, :8]
    patterns = [y // 2 % 2, x // 2 % 2, (x + y) % 2]
    found = {}
    for image, label in zip(dataset["image"], dataset["label"], strict=True):
        values = np.asarray(image.convert("L")).astype(float)
        scores = [np.corrcoef(values.flatten(), pattern.flatten())[0, 1] for pattern in patterns]
        found.setdefault(dataset.features["label"].names[label], set()).add(int(np.argmax(scores)))
    return found


SHOWN = {"circle": {0}, "square": {1}, "triangle": {2}}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_classes_are_found_by_name_in_any_order(strategy, make, pipe):
    real, names = make.images((4, 4, 4)), ["triangle", "circle", "square"]
    turned = real.align_labels_with_mapping({name: i for i, name in enumerate(names)}, "label")
    small = turned.select(range(3))
    for chosen_from in (real, turned):
        mixed = dope(small, chosen_from, pipe, images_per_class=3, strategy=rule(strategy, pipe), progress=False)
        assert levels(mixed) == SHOWN and per_class(mixed) == [3, 3, 3]
        assert mixed.features["label"].names == names


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_small_set_of_some_classes_takes_images_of_those(strategy, make, pipe):
    real = make.images((4, 4, 4))
    some = real.filter(lambda label: label != 1, input_columns="label")
    for small in (
        some.select(range(2)),
        some.select(range(2)).align_labels_with_mapping({"circle": 0, "triangle": 1}, "label"),
    ):
        mixed = dope(small, real, pipe, images_per_class=2, strategy=rule(strategy, pipe), progress=False)
        expected = {"circle", "triangle"} | ({"square"} if len(small.features["label"].names) == 3 else set())
        assert set(levels(mixed)) == expected and all(levels(mixed)[name] == SHOWN[name] for name in expected)
        filtered = dope(small, some, pipe, images_per_class=2, strategy=rule(strategy, pipe), progress=False)
        assert set(levels(filtered)) == {"circle", "triangle"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_anybodys_small_set_and_columns_by_name(strategy, make, pipe, caplog):
    real = make.images((4, 4, 4)).rename_columns({"label": "fine", "image": "photo"})
    real = real.add_column("coarse", [0] * len(real)).cast_column("coarse", ClassLabel(names=["thing"]))
    real = real.map(
        lambda row: {"thumbnail": row["photo"]}, features=Features({**real.features, "thumbnail": Image()})
    )
    small = make.images((1, 1, 1), seed=3).rename_columns({"label": "kind", "image": "img"})
    small = small.add_column("author", ["ann"] * 3)
    columns = {"image_column": "photo", "label_column": "fine"}
    mixed = dope(small, real, pipe, images_per_class=2, strategy=rule(strategy, pipe), progress=False, **columns)
    assert levels(mixed) == SHOWN and per_class(mixed) == [2, 2, 2] and "['author']" in caplog.text
    assert mixed["source"][:] == [0] * 3 + [1] * 3 and mixed["seed"][:] == [-1] * 6
    with pytest.raises(ValueError, match="Choose one with `label_column=`"):
        dope(
            small,
            real.rename_columns({"fine": "a", "coarse": "b"}),
            images_per_class=2,
            strategy="random",
            image_column="photo",
        )


def test_chosen_files_keep_their_bytes_unless_their_size_differs(make, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["circle"])})
    noise = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    PIL.Image.fromarray(noise[:8, :8]).save(tmp_path / "same.jpg", quality=60)
    PIL.Image.fromarray(noise).save(tmp_path / "other.jpg", quality=60)
    paths = [str(tmp_path / name) for name in ("same.jpg", "other.jpg")]
    real = Dataset.from_dict({"image": paths, "label": [0, 0]}, features=features)
    small = make.images((1,), names=("circle",))
    shown = [real, real.with_format("torch"), real.with_transform(lambda rows: {"image": [0], "label": [0]})]
    for dataset in shown:
        before = dataset.format["type"]
        mixed = dope(small, dataset, images_per_class=3, strategy="random").cast_column("image", Image(decode=False))
        stored = {row["real_index"]: row["image"] for row in mixed}
        assert stored[0]["bytes"] == (tmp_path / "same.jpg").read_bytes() and stored[0]["path"] == "same.jpg"
        assert stored[1]["bytes"].startswith(b"\x89PNG") and dataset.format["type"] == before
    mixed = dope(small, real, images_per_class=3, strategy="random")
    assert {image.size for image in mixed["image"]} == {(8, 8)}
    expected, _, _ = load_pixels(real.select([1]), num_channels=1, image_size=8)
    kept = mixed.filter(lambda row: row == 1, input_columns="real_index")
    assert torch.equal(load_pixels(kept, num_channels=1)[0], expected)  # as everything else reads that file
    original = dope(small, real, images_per_class=3, strategy="random", image_size="original")
    assert {image.size for image in original["image"]} == {(8, 8), (30, 20)}
    sixteen = dope(small, real, images_per_class=3, strategy="random", image_size=16)
    assert [image.size for image in sixteen["image"]] == [(8, 8), (16, 16), (16, 16)]
    with pytest.raises(ValueError, match="number of pixels or 'original', got 'orginal'"):
        dope(small, real, images_per_class=3, strategy="random", image_size="orginal")


# --- where synthesis stops paying


@pytest.fixture(scope="module")
def blocks(_pixel_pipe):
    """Five synthetic images of each class, in blocks of two."""
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "block_size": 2, "progress": False}
    return concentrate(copy.deepcopy(_pixel_pipe), None, 5, **options)


def test_auto_keeps_whole_blocks_until_doping_begins(blocks, real_images):
    mixed = dope(blocks, real_images, images_per_class="auto", begin_doping=4.9, strategy="random", progress=False)
    drawn = mixed.select(range(12))
    assert per_class(mixed) == [5, 5, 5] and per_class(added(mixed)) == [1, 1, 1]
    assert set(drawn["block"]) == {0, 1} and set(drawn["source"]) == {0}
    record = record_of(mixed)
    assert record["parameters"]["images_per_class"] == 4 and record["synthetic"]["rows"] == 12
    assert record_of(blocks)["parameters"]["images_per_class"] == 5 and changed_since(record, mixed) is None
    few = dope(blocks, real_images, images_per_class="auto", begin_doping=2, strategy="random", progress=False)
    again = dope(few.select(range(6)), real_images, progress=False, **recorded_doping(record_of(few)["doping"]))
    assert per_class(added(few)) == [3, 3, 3] and again["real_index"][:] == few["real_index"][:]


def test_the_record_of_what_is_kept_is_that_of_a_run_that_drew_no_more(blocks, _pixel_pipe):
    kept, size = until_doping(blocks, 4)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "block_size": 2, "progress": False}
    alone = concentrate(copy.deepcopy(_pixel_pipe), None, 4, **options)
    told, own = record_of(kept), record_of(alone)
    assert size == 5 and told["parameters"] == own["parameters"] and told["synthetic"] == own["synthetic"]


def test_without_blocks_every_image_counts_as_one(small, real_images):
    bare = small.select_columns(["image", "label"])
    mixed = dope(bare, real_images, images_per_class="auto", begin_doping=1.5, strategy="random", progress=False)
    assert per_class(mixed) == [2, 2, 2] and per_class(added(mixed)) == [1, 1, 1]


def test_auto_replaces_nothing_of_a_doped_set(small, real_images):
    mixed = dope(small, real_images, images_per_class=3, strategy="random", progress=False)
    with pytest.raises(ValueError, match="has real images already"):
        dope(mixed, real_images, images_per_class="auto", begin_doping=1, strategy="random", progress=False)
