"""What errors about datasets, folders of images, splits, labels and class names say to do is done, and works."""

import shutil

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDatasetDict, concatenate_datasets
from PIL import Image as Pillow

from advice import follow, is_of
from dsco_hf import load_image_dataset, save_dataset_folder, select
from dsco_hf.data.datasets import find_columns, load_pixels, stratified_split
from dsco_hf.data.labels import class_mapping
from dsco_hf.data.schema import features_of
from dsco_hf.data.splits import divide


NAMES = ("circle", "square", "triangle")
PETS = {0: "cat, house cat", 1: "dog", 2: "cat, tom"}


def images(root, *paths):
    """A folder with these images; what an earlier step made of it is gone."""
    shutil.rmtree(root, ignore_errors=True)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(np.zeros((4, 4), np.uint8)).save(root / path)
    return root


def opened(w, *paths):
    """Rows by split and class of a folder with these images."""
    loaded = load_image_dataset(images(w.folder / "set", *paths))
    names = next(iter(loaded.values())).features["label"].names
    return {split: [names[label] for label in rows["label"]] for split, rows in loaded.items()}


def labelled(w, *labels):
    """The first rows, with these labels."""
    rows = w.real.select(range(len(labels)))
    return rows.remove_columns("label").add_column("label", list(labels)).cast_column("label", ClassLabel(names=NAMES))


def sorted_rows(w):
    return w.real.sort("label")


def stream(w):
    return w.real.to_iterable_dataset()


def tables(folder, configs=("a", "b")):
    """A folder of parquet files with several configurations; empty without any."""
    shutil.rmtree(folder, ignore_errors=True)
    picture = Pillow.fromarray(np.zeros((4, 4), np.uint8))
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    rows = Dataset.from_dict({"image": [picture] * 2, "label": [0, 1]}, features=features)
    if configs:
        save_dataset_folder(dict.fromkeys(configs, rows), folder)
    else:
        folder.mkdir()
        (folder / "rows.jsonl").write_text('{"label": 0}\n', encoding="utf-8")
    return folder


def parquet(w):
    w.real.to_parquet(w.folder / "x.parquet")
    return w.folder / "x.parquet"


def renamed(w, old, new):
    names = [new if name == old else name for name in NAMES]
    return w.real.cast_column("label", ClassLabel(names=names))


def unlabelled(w):
    return {"train": w.real, "test": labelled(w, -1, -1)}


def rows_of(divided):
    return [None if part is None else len(part) for part in divided[:2]]


def doubled(row):
    return {"image": row["image"], "label": row["label"]}


OPENING = {
    "an empty list": (
        lambda w: load_image_dataset([]),
        "give a Hub id, a folder, or parquet file",
        lambda w: [
            len(load_image_dataset([place])["train"])
            for place in (parquet(w), images(w.folder / "set", "a/0.png", "b/0.png"))
        ],
        [21, 2],
    ),
    "several configurations": (
        lambda w: load_image_dataset(tables(w.folder / "[set]")),
        "choose one with `name=`",
        lambda w: load_image_dataset(tables(w.folder / "[set]"), name="b")["train"],
        is_of(2),
    ),
    "a folder called like a pattern": (
        lambda w: load_image_dataset(tables(w.folder / "[set]", ())),
        "datasets reads its name as a pattern: rename it",
        lambda w: load_image_dataset(tables(w.folder / "[set]", ()).rename(w.folder / "set"))["train"],
        is_of(1),
    ),
    "an option without a meaning: name": (
        lambda w: load_image_dataset(images(w.folder / "set", "a/0.png"), name="x"),
        "has no meaning for .*; leave it out",
        lambda w: opened(w, "a/0.png"),
        {"train": ["a"]},
    ),
    "images outside of folders": (
        lambda w: opened(w, "0.png", "a/1.png"),
        "Put every image into the folder of its class, or remove those that have none",
        lambda w: [opened(w, "b/0.png", "a/1.png"), opened(w, "a/1.png")],
        [{"train": ["a", "b"]}, {"train": ["a"]}],
    ),
    "folders in one another": (
        lambda w: opened(w, "a/0.png", "a/more/0.png", "b/0.png"),
        "Move the images of a class into one folder",
        lambda w: opened(w, "a/0.png", "a/1.png", "b/0.png"),
        {"train": ["a", "a", "b"]},
    ),
    "a class in two folders": (
        lambda w: opened(w, "x/a/0.png", "y/a/0.png"),
        "Give each class one folder",
        lambda w: [opened(w, "x/a/0.png", "y/b/0.png"), opened(w, "a/0.png", "a/1.png")],
        [{"train": ["a", "b"]}, {"train": ["a", "a"]}],
    ),
    "splits without classes": (
        lambda w: opened(w, "train/0.png", "test/0.png"),
        "Put the images of every split into one folder per class; if these are the classes, rename one",
        lambda w: [
            opened(w, "train/a/0.png", "test/a/0.png"),
            opened(w, "trains/0.png", "test/0.png"),
        ],
        [{"train": ["a"], "test": ["a"]}, {"train": ["test", "trains"]}],
    ),
    "splits and other folders": (
        lambda w: opened(w, "train/a/0.png", "more/b/0.png"),
        "Move those elsewhere, or into a split",
        lambda w: [opened(w, "train/a/0.png"), opened(w, "train/a/0.png", "train/b/0.png")],
        [{"train": ["a"]}, {"train": ["a", "b"]}],
    ),
    "two folders for a split": (
        lambda w: opened(w, "val/a/0.png", "dev/a/1.png"),
        r"two folders for the split 'validation'",
        lambda w: opened(w, "val/a/0.png", "val/a/1.png"),
        {"validation": ["a", "a"]},
    ),
}

SPLITS = {
    "a stream is not split": (
        lambda w: stratified_split(stream(w), test_size=0.4, seed=0),
        "load it without `streaming`, or use its own splits",
        lambda w: [
            len(stratified_split(w.real, test_size=0.4, seed=0)["test"]),
            *rows_of(divide(w.both)),
        ],
        [9, 21, 21],
    ),
    "no test split of a stream": (
        lambda w: divide({"train": stream(w)}),
        r"Read it without `streaming`, or take all of them with `test_split='none'`",
        lambda w: [*rows_of(divide({"train": w.real})), divide({"train": stream(w)}, test_split="none")[1]],
        [17, 4, None],
    ),
    "a slice of a stream, not streamed": (
        lambda w: divide({"train": stream(w), "test": stream(w)}, train_split="train[:2]"),
        "or load without `streaming`",
        lambda w: rows_of(divide(w.both, train_split="train[:3]")),
        [3, 21],
    ),
    "a test split without labels": (
        lambda w: divide(unlabelled(w), test_split="test"),
        "Choose another one, or 'auto', which takes the validation split or holds images out",
        lambda w: [
            rows_of(divide({**unlabelled(w), "extra": w.real}, test_split="extra")),
            rows_of(divide({**unlabelled(w), "validation": w.real}, test_split="auto")),
            rows_of(divide(unlabelled(w), test_split="auto")),
        ],
        [[21, 21], [21, 21], [17, 4]],
    ),
    "a slice of sorted rows": (
        lambda w: divide({"train": sorted_rows(w)}, train_split="train[:10]", test_split="none"),
        r"Shuffle them first \(`dataset.shuffle\(seed=0\)`\), or take the whole split",
        lambda w: [
            rows_of(divide({"train": sorted_rows(w).shuffle(seed=0)}, train_split="train[:10]", test_split="none")),
            rows_of(divide({"train": sorted_rows(w)}, train_split="train", test_split="none")),
        ],
        [[10, None], [21, None]],
    ),
    "nothing to test on": (
        lambda w: divide({"train": labelled(w, 0, 1, 2)}),
        "Pass `test_split='none'`, or more images",
        lambda w: rows_of(divide({"train": labelled(w, 0, 1, 2, 0, 1, 2)})),
        [3, 3],
    ),
}

COLUMNS = {
    "all splits of streams": (
        lambda w: features_of(IterableDatasetDict(train=stream(w))),
        r"choose one, for example `dataset\['train'\]`",
        lambda w: list(features_of(IterableDatasetDict(train=stream(w))["train"])),
        ["image", "label"],
    ),
    "no dataset": (
        lambda w: features_of([1]),
        r"`load_image_dataset\(path, split=...\)` opens one",
        lambda w: list(features_of(load_image_dataset(images(w.folder / "set", "a/0.png"), split="train"))),
        ["image", "label"],
    ),
    "a stream without types": (
        lambda w: features_of(stream(w).map(doubled)),
        r"Keep them with `stream.map\(function, features=stream.features\)`, or declare them with "
        r"`stream.cast\(features\)`",
        lambda w: [
            find_columns(stream(w).map(doubled, features=stream(w).features)),
            find_columns(stream(w).map(doubled).cast(w.real.features)),
        ],
        [("image", "label")] * 2,
    ),
    "an unlabelled row": (
        lambda w: load_pixels(labelled(w, 0, -1, 1)),
        "choose a labelled split or remove such rows with `dataset.filter`",
        lambda w: load_pixels(labelled(w, 0, -1, 1).filter(lambda row: row["label"] >= 0))[1].tolist(),
        [0, 1],
    ),
    "a class of another name": (
        lambda w: load_pixels(renamed(w, "square", "box"), classes=list(NAMES)),
        "or give the class the name that it has there",
        lambda w: (
            load_pixels(
                renamed(w, "square", "box").cast_column("label", ClassLabel(names=list(NAMES))), classes=list(NAMES)
            )[1]
            .bincount()
            .tolist()
        ),
        [9, 7, 5],
    ),
    "an image that cannot be decoded: without the row": (
        lambda w: load_pixels(w.broken),
        "Repair or remove the row",
        lambda w: load_pixels(w.broken.select(range(1, 21)))[0],
        is_of(20),
    ),
    "too few images of a class": (
        lambda w: select(w.real, "random", images_per_class=6),
        "Add images, ask for fewer per class, or leave the class out",
        lambda w: [
            len(select(concatenate_datasets([w.real] * 2), "random", images_per_class=6)),
            len(select(w.real, "random", images_per_class=5)),
            len(select(w.real.filter(lambda row: row["label"] != 2), "random", images_per_class=6)),
        ],
        [18, 15, 12],
    ),
}

CLASSES = {
    "a mapping of another form": (
        lambda w: class_mapping(["circle"], {0: "x", 281: "y"}, 300, mapping={"circle": 1.5}),
        "must give a generator class .* for example `{'circle': 281}`",
        lambda w: class_mapping(["circle"], {0: "x", 281: "y"}, 300, mapping={"circle": 281}),
        [281],
    ),
    "a name of several classes": (
        lambda w: named(w).get_label_ids(["cat"]),
        "Pass an index or WordNet id",
        lambda w: named(w).get_label_ids([2]),
        [2],
    ),
    "a label set that is not known": (
        lambda w: class_mapping(["tench"], {0: "tench"}, 1, mapping="imagenete"),
        r"there are \['imagenet-1k', .*Nearest: 'imagenette'",
        lambda w: class_mapping(["tench"], {0: "tench"}, 1, mapping="imagenette"),
        [0],
    ),
    "names that a label set does not have": (
        lambda w: class_mapping(["tabby", "tench"], {0: "tench", 1: "tabby"}, 2, mapping="imagenette"),
        "Pass a `dict` as `mapping`, or another label set of",
        lambda w: [
            class_mapping(["tabby", "tench"], {0: "tench", 1: "tabby"}, 2, mapping={"tabby": 1, "tench": "tench"}),
            class_mapping(["tabby", "tench"], {0: "tench", 1: "tabby"}, 2, mapping="imagenet-1k"),
        ],
        [[1, 0], [1, 0]],
    ),
}


def named(w):
    pipe = w.make.pipe()
    return type(pipe)(pipe.transformer, pipe.scheduler, id2label=PETS)


TABLE = OPENING | SPLITS | COLUMNS | CLASSES


@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])
