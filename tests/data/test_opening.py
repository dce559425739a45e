"""Every class and every image on the way in: folders of any names, slices and sums through every door, test parts."""

import io
import logging
import re

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, ReadInstruction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsco_hf import DsCoPipeline, MatchingTargets, load_image_dataset, save_dataset_folder
from dsco_hf.data.datasets import load_pixels, load_splits, load_test_split
from dsco_hf.data.splits import divide, part_to_test, take_split
from hub import Client, ClientError, LoopbackHub


def save(place, level=0, size=4):
    place.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size, size), level, np.uint8)).save(place)


def folder(root, counts):
    """Class folders with so many images each; every image of class i has level i."""
    for level, (name, count) in enumerate(sorted(counts.items())):
        for number in range(count):
            save(root / name / f"{number}.png", level)
    return root


def counts(dataset):
    names = dataset.features["label"].names
    labels = dataset["label"][:]
    return {name: labels.count(label) for label, name in enumerate(names)}


def levels_are_labels(dataset):
    pixels, labels, _ = load_pixels(dataset, num_channels=1)
    return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == labels.tolist()


ODD = [
    "train", "test", "validation", "7", "007", "a[b]", "[a]", "a*", "a?", "100%", "%20", "a b", " a", "#a", "a&b",
    "a'b", "café", "日本", "no", "null", "1e5", "a-00000-of-00001", "data", "{a}", "a:b", "~", "$HOME", "a,b", "a;b",
    "!a", "..a", "val ", "README.md",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_class_may_be_called_anything(name, tmp_path):
    if name == "..a":  # a hidden folder, as editors and systems make them
        assert counts(load_image_dataset(folder(tmp_path / "x", {name: 1, "plain": 2}), split="train")) == {"plain": 2}
        return
    dataset = load_image_dataset(folder(tmp_path / "x", {name: 2, "plain": 3}), split="train")
    assert counts(dataset) == {name: 2, "plain": 3} and levels_are_labels(dataset)
    streamed = load_image_dataset(tmp_path / "x", split="train", streaming=True)
    assert [row["label"] for row in streamed] == dataset["label"][:]


@pytest.mark.parametrize("name", [name for name in ODD if name not in ("train", "test", "validation")])
def test_a_dataset_may_lie_anywhere(name, tmp_path):
    root = tmp_path / name / "set"
    dataset = load_image_dataset(folder(root, {"x": 1, "y": 2}), split="train")
    assert counts(dataset) == {"x": 1, "y": 2} and levels_are_labels(dataset)
    saved = tmp_path / name / "saved"
    save_dataset_folder(dataset, saved)
    assert counts(load_image_dataset(saved, split="train")) == {"x": 1, "y": 2}
    if "$" in name:  # which datasets replaces by the variable of that name
        return
    dataset.to_parquet(tmp_path / name / "rows.parquet")
    assert counts(load_image_dataset(str(tmp_path / name / "rows.parquet"), split="train")) == {"x": 1, "y": 2}


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.text(
            st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\0\\"), min_size=1, max_size=12
        ).filter(lambda name: not name.startswith(".") and len(name.encode()) < 200),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_any_names_and_images_come_back_in_one_order(tmp_path_factory, names):
    root = folder(tmp_path_factory.mktemp("any") / "set", dict.fromkeys(names, 2))
    dataset = load_image_dataset(root, split="train")
    assert counts(dataset) == dict.fromkeys(sorted(names), 2) and levels_are_labels(dataset)


def test_split_folders_with_classes_called_like_splits(tmp_path):
    for split, each in (("train", 3), ("val", 1), ("test", 2)):
        folder(tmp_path / split, {"train": each, "test": each, "x": each})
    folder(tmp_path / "train", {"only here": 2})
    loaded = load_image_dataset(tmp_path)
    assert list(loaded) == ["train", "validation", "test"]
    assert counts(loaded["train"]) == {"only here": 2, "test": 3, "train": 3, "x": 3}
    assert counts(loaded["test"]) == {"only here": 0, "test": 2, "train": 2, "x": 2}
    assert counts(load_image_dataset(tmp_path, split="validation"))["x"] == 1
    with pytest.raises(ValueError, match="no split 'val' of the dataset.*Nearest: 'validation'"):
        load_image_dataset(tmp_path, split="val")


def test_foreign_hidden_and_empty_things(tmp_path, caplog):
    root = folder(tmp_path / "set", {"x": 2, "y": 2})
    for name in (".DS_Store", "Thumbs.db", "README.md", "labels.csv", "._0.png", "notes.txt"):
        for place in (root, root / "x"):
            (place / name).write_bytes(b"\0")
    (root / "empty").mkdir()
    save(root / ".thumbnails" / "0.png")
    (root / "x" / "0.png").rename(root / "x" / "0.PNG")
    (root / "y" / "1.png").rename(root / "y" / "1.jpeg")
    assert counts(load_image_dataset(root, split="train")) == {"x": 2, "y": 2}
    assert "Folders without an image are left out: ['empty']" in caplog.text
    assert "Hidden folders with images are left out: ['.thumbnails']" in caplog.text


def test_folders_around_and_links(tmp_path):
    root = folder(tmp_path / "download" / "flowers" / "images", {"x": 2, "y": 1})
    (root / "z").symlink_to(root / "x", target_is_directory=True)
    (root / "x" / "loop").symlink_to(tmp_path, target_is_directory=True)
    elsewhere = folder(tmp_path / "elsewhere", {"w": 3}) / "w"
    (root / "w").symlink_to(elsewhere, target_is_directory=True)
    assert counts(load_image_dataset(tmp_path / "download", split="train")) == {"w": 3, "x": 2, "y": 1, "z": 2}


UNCERTAIN = {
    "beside": (["0.png", "x/0.png"], "images outside of class folders, such as '0.png', beside folders such as 'x'"),
    "no folders": (["0.png"], "images outside of class folders"),
    "in one another": (["x/0.png", "x/more/0.png", "y/0.png"], "holds images and, in more, further images"),
    "twice": (["a/x/0.png", "b/x/0.png"], "are called 'x': "),
    "splits without classes": (
        ["train/0.png", "test/0.png"],
        "called like splits and hold images, but no class folders",
    ),
    "splits and others": (["train/x/0.png", "more/x/0.png"], r"beside them folders with images, \['more'\]"),
    "one split twice": (["val/x/0.png", "dev/x/0.png"], "two folders for the split 'validation'"),
}


@pytest.mark.parametrize("layout", UNCERTAIN)
def test_uncertain_layouts_are_refused(layout, tmp_path):
    paths, says = UNCERTAIN[layout]
    for path in paths:
        save(tmp_path / "set" / path)
    with pytest.raises(ValueError, match=says):
        load_image_dataset(tmp_path / "set")


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """The same 12 rows (and 6 of a test split) behind every door."""
    root = tmp_path_factory.mktemp("doors")
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    images = [PIL.Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(12)]
    train = Dataset.from_dict({"image": images, "label": [i // 4 for i in range(12)]}, features=features)
    splits = DatasetDict(train=train, test=train.select(range(3, 9)))
    splits.save_to_disk(root / "saved")
    train.to_parquet(root / "rows.parquet")
    for name, part in splits.items():
        for row, label in enumerate(part["label"]):
            save(root / "images" / name / "abc"[label] / f"{row:02}.png", row)
        (root / "hub").mkdir(exist_ok=True)
        part.to_parquet(root / "hub" / f"{name}-00000-of-00001.parquet")
    save_dataset_folder(splits, root / "ours")
    return {name: root / name for name in ("saved", "images", "hub", "ours")} | {"parquet": str(root / "rows.parquet")}


SLICES = {
    "train[:5]": [0, 1, 2, 3, 4], "train[-2:]": [10, 11], "train[3:5]": [3, 4], "train[:25%]": [0, 1, 2],
    "train": range(12), "train[:2]+train[10:]": [0, 1, 10, 11],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("door", ["saved", "images", "hub", "ours", "parquet"])
def test_slices_and_sums_through_every_door(door, doors):
    for split, rows in SLICES.items():
        dataset = load_image_dataset(doors[door], split=split)
        assert dataset["label"][:] == [row // 4 for row in rows], split
        streamed = load_image_dataset(doors[door], split=split, streaming=True)
        assert [row["label"] for row in streamed] == [row // 4 for row in rows]
    if door != "parquet":
        assert len(load_image_dataset(doors[door], split="train+test")) == 18
        assert len(load_image_dataset(doors[door], split=ReadInstruction("test", to=2, unit="abs"))) == 2
    for wrong in ("trian", "train[:5", "train[a:b]", "train+tset"):
        with pytest.raises(ValueError, match="There is no split .*which has .*'train'.*slices|Slices"):
            load_image_dataset(doors[door], split=wrong)


def test_slices_of_the_digits():
    assert len(load_image_dataset("digits", split="train[:100]")) == 100
    assert len(load_image_dataset("digits", split="train+test")) == 1797


def labelled(labels, names=("a", "b", "c")):
    images = [PIL.Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(len(labels))]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_the_test_part_is_found_by_name_or_held_out(caplog):
    train, other = labelled([0, 1, 2] * 10), labelled([2, 1, 0])
    unlabelled = other.map(lambda row: {"label": -1}, features=other.features)
    for splits, expected in (
        ({"train": train, "test": other, "validation": train}, "test"),
        ({"train": train, "val": other}, "val"),
        ({"train": train, "test": unlabelled, "dev": other}, "dev"),
    ):
        found = divide(splits)
        assert found[0] is train and found[1] is splits[expected]
        assert found[2] == {"train_split": "train", "test_split": expected}
    assert "'test' of the dataset has no labels and is left aside" in caplog.text
    kept, held, facts = divide({"train": train, "test": unlabelled}, holdout=0.2)
    assert counts(kept) == {"a": 8, "b": 8, "c": 8} and counts(held) == {"a": 2, "b": 2, "c": 2}
    pictures = [{np.asarray(image).tobytes() for image in part["image"]} for part in (kept, held)]
    assert not pictures[0] & pictures[1]
    assert facts["test_split"] == "train, held out: 20 % of every class, seed 0" and facts["holdout"] == 0.2
    assert divide({"train": train})[1]["image"][0].tobytes() == held["image"][0].tobytes()  # the same in every recipe
    assert sorted(divide({"train": train}, seed=1)[1]["label"][:]) == [0, 0, 1, 1, 2, 2]
    none = divide({"train": train}, test_split="none")
    assert none[0] is train and none[1] is None


def test_few_images_and_slices_that_lose_classes(caplog):
    kept, held, _ = divide({"train": labelled([0, 0, 1, 2, 2, 2])})
    assert counts(kept) == {"a": 1, "b": 1, "c": 2} and counts(held) == {"a": 1, "b": 0, "c": 1}
    assert "Classes of one image are not tested: ['b']" in caplog.text
    with pytest.raises(ValueError, match="no class has two. Pass `test_split='none'`"):
        divide({"train": labelled([0, 1, 2])})
    with pytest.raises(ValueError, match=r"'train\[:4\]' leaves 1 classes out, \['c'\]: the rows are sorted"):
        divide({"train": labelled([0, 0, 1, 1, 2, 2])}, train_split="train[:4]")
    shuffled = labelled([0, 0, 1, 1, 2, 2]).shuffle(seed=0)  # the advice
    assert len(divide({"train": shuffled}, train_split="train[:5]", test_split="none")[0]) == 5
    unlabelled = labelled([0, 1]).map(lambda row: {"label": -1}, features=labelled([0]).features)
    with pytest.raises(ValueError, match="without a label .*'auto'"):
        divide({"train": labelled([0, 1]), "test": unlabelled}, test_split="test")
    for bad in (0, 1, -0.1, float("nan"), True, "x"):
        with pytest.raises(ValueError, match="`holdout`"):
            divide({"train": labelled([0, 0])}, holdout=bad)


def test_load_splits_of_a_folder(tmp_path):
    train, test, facts = load_splits(folder(tmp_path, {"x": 10, "y": 5}), holdout=0.4, seed=3)
    assert counts(train) == {"x": 6, "y": 3} and counts(test) == {"x": 4, "y": 2} and facts["holdout_seed"] == 3
    assert len(load_splits("digits")[1]) == 360


def test_what_is_tested_on_is_what_was_held_out(tmp_path):
    place = folder(tmp_path, {"x": 10, "y": 5})
    train, held, facts = load_splits(place, holdout=0.4, seed=3)
    test, told = load_test_split(place, holdout=0.4, seed=3)
    assert test["image"][0].tobytes() == held["image"][0].tobytes() and test["label"][:] == held["label"][:]
    assert told == {name: facts[name] for name in ("test_split", "holdout", "holdout_seed")}
    streams = load_splits(place, holdout=0.4, seed=3, streaming=True)
    assert [row["label"] for row in streams[0]] == train["label"][:] and streams[2] == facts
    for splits, expected in (
        ({"test": labelled([1])}, "test"),
        ({"val": labelled([1]), "full": labelled([2])}, "val"),
    ):
        assert part_to_test(splits) == (splits[expected], {"test_split": expected})  # without a training split
    with pytest.raises(ValueError, match="is a split or 'auto' here, not 'none'"):
        part_to_test({"train": labelled([0, 0])}, test_split="none")


def test_the_splits_of_a_stream():
    train, other = labelled([0, 1, 2]), labelled([2, 1])
    unlabelled = other.map(lambda row: {"label": -1}, features=other.features)
    parts = {"train": train, "test": unlabelled, "dev": other}
    streams = {name: part.to_iterable_dataset() for name, part in parts.items()}
    assert divide(streams)[1:] == (streams["dev"], {"train_split": "train", "test_split": "dev"})
    assert divide(streams, test_split="none")[:2] == (streams["train"], None)
    with pytest.raises(ValueError, match="no images can be held out. .*`test_split='none'`"):
        divide({name: streams[name] for name in ("train", "test")})
    with pytest.raises(ValueError, match=r"There is no split 'trian' .*Nearest: 'train'"):
        divide(streams, train_split="trian")
    with pytest.raises(ValueError, match=r"A stream has whole splits only, got 'train\[:2\]'"):
        divide(streams, train_split="train[:2]")


def test_a_slice_is_held_against_the_splits_that_it_names():
    both = {"train": labelled([0, 1, 2]), "train_more": labelled([0, 1, 0, 1])}
    assert len(divide(both, train_split="train_more[:2]", test_split="none")[0]) == 2  # which has no 'c'


def test_a_wrong_path_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path, {"outputs/flowers/x": 1}))
    monkeypatch.setattr("dsco_hf.data.opening.load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    for wrong in ("outputs/flower", "./outputs/flower", str(tmp_path / "outputs" / "flower"), "outputs/flower/x/y"):
        with pytest.raises(FileNotFoundError, match="Nearest: 'flowers'"):
            load_image_dataset(wrong)
        for load in (DsCoPipeline.from_pretrained, MatchingTargets.from_pretrained):
            with pytest.raises(FileNotFoundError, match="Nearest: 'flowers'"):
                load(wrong)


def test_take_split_says_what_there_is(caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(
        ValueError, match=r"no split 'tests' of my set, which has \['train', 'test'\]. Nearest: 'test'"
    ):
        take_split({"train": labelled([0]), "test": labelled([0])}, "tests", what="my set")


@pytest.mark.slow
def test_class_folders_on_the_hub_that_datasets_takes_for_splits(tmp_path):
    image = io.BytesIO()
    PIL.Image.new("L", (8, 8), 9).save(image, "PNG")
    layouts = {
        "ann/lost": ("cat", "test-tubes", "train"),
        "ann/whole": ("cat", "dog", ".trash"),
        "ann/split": ("train/cat", "train/dog", "test/cat", "test/dog"),
    }
    snippet = """
    from dsco_hf import load_image_dataset
    import huggingface_hub
    splits = load_image_dataset(eval(place) if "(" in place else place)
    return {name: [len(rows), rows.features["label"].names] for name, rows in splits.items()}
    """
    with LoopbackHub(tmp_path / "server") as hub, Client(hub.url, tmp_path / "client") as client:
        for repo, folders in layouts.items():
            hub.store.create("datasets", repo, private=False)
            hub.put(repo, {f"{name}/{i}.png": image.getvalue() for name in folders for i in range(2)})
        with pytest.raises(ClientError, match="Of the 6 images of ann/lost, datasets reads [24]:") as error:
            client.run(snippet, place="ann/lost")
        advice = re.search(r"`load_image_dataset\((.*)\)`", error.value.message)[1]
        assert client.run(snippet, place=advice) == {"train": [6, ["cat", "test-tubes", "train"]]}
        assert client.run(snippet, place="ann/whole") == {"train": [4, ["cat", "dog"]]}
        names = ["cat", "dog"]
        assert client.run(snippet, place="ann/split") == {"train": [4, names], "test": [4, names]}
