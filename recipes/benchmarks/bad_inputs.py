"""Runs bad and odd inputs of every kind, and counts what comes of them: the right value, a clear error, or neither.

    python recipes/benchmarks/bad_inputs.py --out bad_inputs.json
    python recipes/benchmarks/bad_inputs.py --kinds pixels names    # some kinds only
    python recipes/benchmarks/bad_inputs.py --verbose               # a line for every input

The inputs are those that users of image-classification and diffusion tools reported in public, and their relatives.
Every input states its right value, or that it has to be refused and what the refusal must name.

Prints one JSON object as its last line. `inputs`: how many were run; `right`: those with the right value;
`clear_error`: refused with an error that names what it has to; `silent`: a wrong value, or an input that has to be
refused and was taken; `unclear`: another exception, or one that does not say what it has to. `failures`: the names of
the last two sorts.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset
from diffusers import DDIMScheduler, DiTTransformer2DModel
from huggingface_hub import constants

from dsco_hf import (
    DsCoPipeline,
    FeatureSpec,
    MatchingTargets,
    PushOptions,
    build_evaluator,
    concentrate,
    concentrate_and_report,
    concentrate_to_folder,
    dope,
    load_image_dataset,
    publish_pipeline,
    read_concentration,
    save_dataset_folder,
    select,
    verify,
)
from dsco_hf.concentration.selection import Clearest
from dsco_hf.concentration.set_records import record_of
from dsco_hf.data.datasets import class_mapping, load_pixels, stratified_split
from dsco_hf.evaluators import get_protocol, load_image_set, protocol_from_dict
from dsco_hf.evaluators.batches import check_same_classes
from dsco_hf.generators.denoisers import GeneratorTrainingConfig
from dsco_hf.sampling.flat import from_flat
from dsco_hf.utils.configs import parse_config
from dsco_hf.utils.processes import RunError


# what the package raises on purpose; anything else has escaped it
OURS = (ValueError, TypeError, FileNotFoundError, PermissionError, ConnectionError, RunError)
SHORTEST = 25  # characters of an error that states what came and what to do


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        name: what is odd about it.
        run: gives a value, or raises.
        right: whether a value is right; None if the input has to be refused.
        says: what a refusal has to name.
        may_be_refused: whether a clear refusal is as good as the right value.
    """

    name: str
    run: Callable[[], Any]
    right: Callable[[Any], bool] | None = None
    says: Sequence[str] = ()
    may_be_refused: bool = False


def equals(expected: Any) -> Callable[[Any], bool]:
    """Whether a value is the expected one."""
    return lambda value: value == expected


NAMES = ("circle", "square", "triangle")


# --- what the kinds are made of ------------------------------------------------------------------------------------


def images_of(labels: Sequence[int], names: Sequence[str] = NAMES, *, size: int = 8, first: int = 0) -> Dataset:
    """Gray images of which each class has its own level, 10 + 60 · label, so that a picture tells its class."""
    rng = np.random.default_rng(first)
    arrays = [(10 + 60 * (label % 4) + rng.integers(0, 9, (size, size))).astype(np.uint8) for label in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    columns = {"image": [PIL.Image.fromarray(array) for array in arrays], "label": list(labels)}
    return Dataset.from_dict(columns, features=features)


def tiny_pipe(names: Sequence[str] = NAMES, *, generator_names: Sequence[str] | None = None) -> DsCoPipeline:
    """One layer of random weights that draws 8x8 gray images of these classes, and a ConvNet that knows them."""
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=len(names), norm_num_groups=1,
    ).eval()  # fmt: skip
    network = build_evaluator("convnet-2", class_names=list(names), image_size=8, num_channels=1, width=4, seed=1)
    known = dict(enumerate(generator_names or names))
    pipe = DsCoPipeline(dit, DDIMScheduler(), classifier=network.eval(), id2label=known)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gray_of_classes(dataset: Dataset) -> dict[str, int]:
    """The level of the classes' images, by name: 0 to 3 for `images_of`."""
    names = dataset.features["label"].names
    pixels, labels, _ = load_pixels(dataset, num_channels=1)
    levels = [round((float(image.mean() + 1) * 127.5 - 14) / 60) for image in pixels]
    return {names[int(label)]: level for label, level in zip(labels, levels, strict=True)}


SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0, "progress": False}


# --- pixels --------------------------------------------------------------------------------------------------------


def pixels(folder: Path) -> Iterator[Input]:
    """Modes and forms of images; values are those of the first pixel, 0 to 255."""

    def read(dataset: Dataset, channels: int) -> list[int]:
        values, _, _ = load_pixels(dataset, num_channels=channels)
        return ((values[0, :, 0, 0] + 1) * 127.5).round().int().tolist()

    def column(image: Any) -> Dataset:
        features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
        return Dataset.from_dict({"image": [image], "label": [0]}, features=features)

    def file(image: PIL.Image.Image, name: str, **options: Any) -> Dataset:
        image.save(folder / name, **options)
        return column(str(folder / name))

    def new(mode: str, color: Any, size: tuple[int, int] = (2, 2)) -> PIL.Image.Image:
        return PIL.Image.new(mode, size, color)

    sixteen = PIL.Image.fromarray(np.full((2, 2), 257 * 100, np.uint16))
    palette = new("RGB", (10, 200, 30)).convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    modes: dict[str, tuple[Any, str, list[int], list[int]]] = {
        "1-bit white": (new("1", 1), "png", [255] * 3, [255]),
        "1-bit black": (new("1", 0), "tiff", [0] * 3, [0]),
        "gray": (new("L", 77), "png", [77] * 3, [77]),
        "gray with opaque alpha": (new("LA", (77, 255)), "png", [77] * 3, [77]),
        "palette": (palette, "png", [10, 200, 30], [124]),  # 0.299 r + 0.587 g + 0.114 b
        "RGB": (new("RGB", (10, 200, 30)), "png", [10, 200, 30], [124]),
        "RGBA, opaque": (new("RGBA", (10, 200, 30, 255)), "png", [10, 200, 30], [124]),
        "CMYK": (new("CMYK", (255, 0, 0, 0)), "tiff", [0, 255, 255], [179]),
        "16 bits": (sixteen, "png", [100] * 3, [100]),
        "16 bits, TIFF": (sixteen, "tiff", [100] * 3, [100]),
    }
    for name, (image, ending, colour, gray) in modes.items():
        for channels, expected in ((3, colour), (1, gray)):
            where = f"{name}.{ending}"
            close = lambda value, expected=expected: np.abs(np.subtract(value, expected)).max() <= 1  # noqa: E731
            yield Input(
                f"{name} as {'RGB' if channels == 3 else 'gray'}",
                lambda image=image, where=where, channels=channels: read(file(image, where), channels),
                close,
            )
    yield Input("floating point", lambda: read(file(new("F", 0.5), "f.tiff"), 3), None, ["float"])
    wide = PIL.Image.fromarray(np.full((2, 2), 100_000, np.int32))
    yield Input("32-bit integers above 16 bits", lambda: read(file(wide, "i.tiff"), 3), None, ["100000"], True)

    turned = PIL.Image.fromarray(np.array([[0, 0], [255, 255]], np.uint8))  # stored rotated by 180 degrees
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    yield Input("rotated by EXIF", lambda: read(file(turned, "exif.png", exif=exif), 1), equals([255]))
    frames = [new("L", 40), new("L", 200)]
    for ending in ("gif", "tiff", "png"):
        yield Input(
            f"animated {ending}",
            lambda ending=ending: read(
                file(frames[0], f"frames.{ending}", save_all=True, append_images=frames[1:]), 1
            ),
            lambda value: abs(value[0] - 40) <= 1,
            ["frame"],
            True,
        )
    yield Input("one pixel wide", lambda: read(column(new("L", 9, (1, 5))), 1), equals([9]))
    yield Input(
        "one pixel wide, resized",
        lambda: list(load_pixels(column(new("L", 9, (1, 50))), image_size=8, num_channels=1)[0].shape),
        equals([1, 1, 8, 8]),
    )

    def listed(values: Any) -> Callable[[], list[int]]:
        def run() -> list[int]:
            rows = Dataset.from_dict({"image": [values], "label": [0]}).cast_column("label", ClassLabel(names=["a"]))
            return read(rows.cast_column("image", Image()), 1)

        return run

    grays = [[100, 100], [100, 100]]
    forms: dict[str, tuple[Any, list[int] | None]] = {
        "uint8 array": (np.array(grays, np.uint8), [100]),
        "int64 array of 0 to 255": (np.array(grays), [100]),
        "int32 array of 0 to 255": (np.array(grays, np.int32), [100]),
        "int16 array of 0 to 255": (np.array(grays, np.int16), [100]),
        "uint16 array": (np.full((2, 2), 25_700, np.uint16), [100]),
        "boolean array": (np.ones((2, 2), bool), [255]),
        "negative integers": (np.array(grays) - 200, None),
        "integers above 255": (np.array(grays, np.int64) * 10, None),
        "floats in [0, 1]": (np.full((2, 2), 0.5, np.float32), None),
        "floats in [0, 255]": (np.full((2, 2), 100.0), None),
        "NaN": (np.full((2, 2), np.nan), None),
        "float16": (np.full((2, 2), 0.5, np.float16), None),
    }
    for name, (array, expected) in forms.items():
        right = None if expected is None else equals(expected)
        yield Input(f"{name}, encoded by datasets", lambda array=array: read(column(array), 1), right, (), True)
    yield Input("nested lists of 0 to 255", listed(grays), equals([100]), (), True)
    yield Input("an image that is missing", lambda: read(column(None), 1), None, ["row 0"])
    (folder / "text.png").write_text("no image", encoding="utf-8")
    yield Input("text in a .png", lambda: read(column(str(folder / "text.png")), 1), None, ["row 0", "text.png"])
    (folder / "empty.png").write_bytes(b"")
    yield Input("an empty file", lambda: read(column(str(folder / "empty.png")), 1), None, ["row 0", "empty.png"])
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    for cut in (10, len(content) // 2, len(content) - 200):
        (folder / f"cut{cut}.jpg").write_bytes(content[:cut])
        where = str(folder / f"cut{cut}.jpg")
        yield Input(f"truncated to {cut} bytes", lambda w=where: read(column(w), 1), None, ["row 0", f"cut{cut}.jpg"])


# --- classes on the way in -----------------------------------------------------------------------------------------

ODD_NAMES = (
    "train", "test", "validation", "val", "dev", "eval", "training", "7", "007", "1.5", "a[b]", "[a]", "a*", "a?b",
    "100%", "%20", "a b", " a", ".a", "..a", "#a", "a&b", "a'b", 'a"b', "a,b", "a;b", "a=b", "a{b}", "a:b", "~a", "$a",
    "a-00000-of-00001", "data", "café", "cafe\u0301", "日本", "no", "null", "true", "nan", "1e5", "2024-01-01", "a\\b",
    "train-a", "my test", "a!b", "(a)", "a+b", "a|b", "a@b", "__a__", "con", "A", "\u00b2",
)  # fmt: skip


def folders(folder: Path) -> Iterator[Input]:
    """Class folders with odd names, in folders with odd names, beside foreign files."""

    def write(place: Path, names: Sequence[str], each: int = 2) -> Path:
        for name in names:
            (place / name).mkdir(parents=True)
            for i in range(each):
                PIL.Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(place / name / f"{i}.png")
        return place

    def classes(place: Path, **options: Any) -> dict[str, int]:
        """Images of every class."""
        loaded = load_image_dataset(place, **options)
        parts = loaded.values() if isinstance(loaded, DatasetDict) else [loaded]
        found: dict[str, int] = {}
        for part in parts:
            for label in part["label"]:
                name = part.features["label"].names[label]
                found[name] = found.get(name, 0) + 1
        return found

    for number, name in enumerate(ODD_NAMES):
        place = write(folder / f"flat{number}", [name, "plain"])
        yield Input(
            f"a class called {name!r}",
            lambda place=place: classes(place),
            equals({"plain": 2} if name.startswith(".") else {name: 2, "plain": 2}),  # hidden folders: warned of
            (),
            True,
        )
    for number, name in enumerate(ODD_NAMES):
        if name not in ("train", "test", "a\\b"):
            place = write(folder / f"dir{number}" / name, ["x", "y"])
            yield Input(f"in a folder called {name!r}", lambda place=place: classes(place), equals({"x": 2, "y": 2}))
    for name in ("train", "test", "[x]", "7"):
        place = folder / f"split-{name}"
        write(place / "train", [name, "y"]), write(place / "test", [name, "y"], each=1)
        yield Input(
            f"a class called {name!r} in split folders",
            lambda place=place: classes(place, split="train"),
            equals({name: 2, "y": 2}),
            (),
            True,
        )
    foreign = {
        ".DS_Store": b"\0", "Thumbs.db": b"\0", "desktop.ini": b"[x]", "README.md": b"# x", "notes.txt": b"x",
        "labels.csv": b"a,b\n", "._0.png": b"\0\5\x16\7", "checksum.md5": b"0",
    }  # fmt: skip
    for name, content in foreign.items():
        for inside in (False, True):
            place = write(folder / f"foreign-{name}-{inside}", ["x", "y"])
            ((place / "x" if inside else place) / name).write_bytes(content)
            where = "a class folder" if inside else "the dataset folder"
            yield Input(f"{name} in {where}", lambda place=place: classes(place), equals({"x": 2, "y": 2}))
    place = write(folder / "hidden", ["x", "y"])
    (place / ".git").mkdir(), (place / ".git" / "index").write_bytes(b"\0")
    yield Input("a hidden folder", lambda place=place: classes(place), equals({"x": 2, "y": 2}))
    place = write(folder / "upper", ["x", "y"])
    (place / "x" / "0.png").rename(place / "x" / "0.PNG")
    yield Input("an ending in capitals", lambda place=place: classes(place), equals({"x": 2, "y": 2}))
    yield Input("an empty folder", lambda: classes(Path(_made(folder / "nothing"))), None, ["nothing"])
    for wrong in ("outputs/dat", "./flat", "~/no/such/set", str(folder / "flat")):
        yield Input(f"a wrong path, {wrong[:6]}…", lambda wrong=wrong: load_image_dataset(wrong), None, [wrong[-4:]])
        yield Input(f"a wrong pipeline, {wrong[:6]}…", lambda w=wrong: DsCoPipeline.from_pretrained(w), None, [])


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def doors(folder: Path) -> Iterator[Input]:
    """The same slices and splits through every door."""
    data = images_of([0, 1, 2] * 4)
    splits = DatasetDict(train=data, test=data.select(range(6)))
    splits.save_to_disk(folder / "saved")
    data.to_parquet(folder / "rows.parquet")
    _made(folder / "data")
    data.to_parquet(folder / "hub" / "train-00000-of-00001.parquet") if _made(folder / "hub") else None
    for split, part in splits.items():
        for row, image in enumerate(part["image"]):
            name = NAMES[part["label"][row]]
            image.save(_made(folder / "images" / split / name) / f"{row}.png")
    save_dataset_folder(data.add_column("source", [0] * len(data)), folder / "ours")
    places: dict[str, Any] = {
        "images": folder / "images", "saved to disk": folder / "saved", "parquet": str(folder / "rows.parquet"),
        "folder of parquet": folder / "hub", "our own folder": folder / "ours", "digits": "digits",
    }  # fmt: skip
    for door, place in places.items():
        rows = 1437 if door == "digits" else 12
        slices = {"train[:5]": 5, "train[:50%]": round(rows / 2), "train[-3:]": 3, "train[2:4]": 2, "train": rows}
        if door in ("images", "saved to disk", "digits"):
            slices["train+test"] = rows + (360 if door == "digits" else 6)
        for split, expected in slices.items():
            yield Input(
                f"{door}: {split}",
                lambda place=place, split=split: len(load_image_dataset(place, split=split)),
                lambda value, expected=expected: abs(value - expected) <= (expected > 100),
                (),
                True,
            )
        yield Input(
            f"{door}: an unknown split", lambda p=place: load_image_dataset(p, split="trian"), None, ["trian", "train"]
        )
    unlabelled = data.map(lambda row: {"label": -1}, features=data.features)
    yield Input("a split without labels", lambda: load_pixels(unlabelled, num_channels=1), None, ["label", "-1"])


# --- names ---------------------------------------------------------------------------------------------------------


def names(folder: Path) -> Iterator[Input]:
    """Names of a dataset's classes against a generator's."""
    generic = {i: f"LABEL_{i}" for i in range(12)}
    tens = [str(i) for i in range(12)]
    by_text = sorted(tens)
    cases: dict[str, tuple[Sequence[str], dict[int, str], list[int] | None, Sequence[str]]] = {
        "the same in another order": (["b", "a"], {0: "a", 1: "b"}, [1, 0], ()),
        "composed and decomposed": (["caf\u00e9"], {0: "cafe\u0301"}, [0], ()),
        "decomposed and composed": (["cafe\u0301"], {0: "tea", 1: "caf\u00e9"}, [1], ()),
        "a and A on both sides": (["a", "A"], {0: "A", 1: "a"}, [1, 0], ()),
        "a where there are a and A": (["a"], {0: "A", 1: "a"}, [1], ()),
        "folded where it is one": (["Chain_Saw"], {0: "chain saw, chainsaw"}, [0], ()),
        "folded where it is two": (["ChainSaw"], {0: "chainsaw", 1: "CHAINSAW"}, None, ["ChainSaw"]),
        "numbers sorted as text, names without meaning": (by_text, generic, [int(n) for n in by_text], ["10"]),
        "numbers in order, names without meaning": (tens, generic, list(range(12)), ()),
        "numbers from one, names without meaning": ([str(i + 1) for i in range(12)], generic, None, ["12"]),
        "numbers on both sides": (["2", "1"], {0: "1", 1: "2"}, [1, 0], ()),
        "a number that is no class": (["2", "3"], {0: "1", 1: "2"}, None, ["3"]),
        "padded numbers": (["01", "02"], {0: "1", 1: "2"}, None, ["01"]),
        "WordNet ids": (["n01440764"], {0: "goldfish", 1: "tench, Tinca tinca"}, [1], ()),
        "nothing alike": (["cat"], {0: "dog"}, None, ["cat"]),
        "a blank name": ([" "], {0: "dog"}, None, ["' '"]),
        "two that mean one": (["a_b", "a-b"], {0: "a b", 1: "c"}, None, ["a_b", "a-b"]),
    }
    for name, (mine, theirs, expected, says) in cases.items():
        right = None if expected is None else equals(expected)
        refusable = name.startswith("numbers sorted")
        yield Input(
            name, lambda m=mine, t=theirs: class_mapping(list(m), t, len(t)), right, says, may_be_refused=refusable
        )
    for odd in (
        "no",
        "yes",
        "on",
        "null",
        "~",
        "true",
        "1",
        "007",
        "1e5",
        "0x10",
        "1:30",
        "2024-01-01",
        "1_000",
        "nan",
    ):
        place = folder / f"mapping-{len(odd)}-{abs(hash(odd))}.yaml"
        place.write_text(f"{odd}: 1\nplain: 0\n", encoding="utf-8")
        yield Input(
            f"{odd!r} in a mapping file",
            lambda place=place, odd=odd: class_mapping([odd, "plain"], {0: "x", 1: "y"}, 2, mapping=place),
            equals([1, 0]),
            (odd,),
            True,
        )
    lookups = [({"cat": True}, ["True"]), ({"cat": 1.5}, ["1.5"]), ({"cat": 99}, ["99"]), ({"dog": 0}, ["dog"])]
    for told, says in lookups:
        yield Input(
            f"mapping={told}", lambda t=told: class_mapping(["cat"], {0: "x", 1: "y"}, 2, mapping=t), None, says
        )
    yield Input(
        "mapping with NumPy numbers",
        lambda: class_mapping(["cat"], {0: "x", 1: "y"}, 2, mapping={"cat": np.int64(1)}),
        equals([1]),
    )
    yield Input(
        "a mapping file that is not there",
        lambda: class_mapping(["a"], {0: "a"}, 1, mapping="no.yaml"),
        None,
        ["no.yaml"],
    )


def kept_names(folder: Path) -> Iterator[Input]:
    """Class names through a published folder and plain `load_dataset`."""
    for number, name in enumerate(
        (*ODD_NAMES, "a\nb", "- a", "a: b", "'a'", "<script>alert(1)</script>", "| a |", "`a`")
    ):
        rows = images_of([0, 1], [name, "plain"])
        place = folder / f"set{number}"

        def through(rows: Dataset = rows, place: Path = place) -> list[str]:
            save_dataset_folder(rows, place)
            found = load_dataset(str(place), split="train").features["label"].names
            verify(place)
            assert load_image_dataset(place, split="train").features["label"].names == found
            shown = (place / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]  # what pages show
            assert "<script>" not in shown
            return found

        yield Input(f"{name!r}", through, equals([name, "plain"]), (), True)


# --- orders and subsets --------------------------------------------------------------------------------------------


def orders(folder: Path) -> Iterator[Input]:
    """Sets of the same classes in another order, or of some of them."""
    pipe = tiny_pipe()
    real = images_of([0, 1, 2] * 3)
    turned = images_of([0, 1, 2] * 3, first=1).align_labels_with_mapping(
        {name: i for i, name in enumerate(reversed(NAMES))}, "label"
    )
    levels = {"circle": 0, "square": 1, "triangle": 2}

    def mixed(small: Dataset, data: Dataset, strategy: str = "random") -> dict[str, int]:
        return gray_of_classes(dope(small, data, pipe, images_per_class=3, strategy=strategy))

    for strategy in ("random", "herding"):
        yield Input(
            f"dope ({strategy}) with classes in another order",
            lambda s=strategy: mixed(real.select(range(3)), turned, s), equals(levels), ["order"], True,
        )  # fmt: skip
    yield Input(
        "clearest with classes in another order than the classifier",
        lambda: gray_of_classes(select(turned, Clearest(0.5), pipe=pipe, progress=False)), equals(levels),
    )  # fmt: skip
    some = real.filter(lambda label: label != 1, input_columns="label")
    yield Input(
        "a dataset that was filtered to some classes, split",
        lambda: sorted(gray_of_classes(stratified_split(some, test_size=2, seed=0)["train"])),
        equals(["circle", "triangle"]), ["align_labels_with_mapping"], True,
    )  # fmt: skip
    yield Input(
        "a dataset that was filtered to some classes, concentrated",
        lambda: set(_names_of(concentrate(pipe, _targets(some, pipe), 1, **SAMPLING))),
        equals({"circle", "triangle"}), ["square"], True,
    )  # fmt: skip
    yield Input(
        "a test set of other classes",
        lambda: check_same_classes(NAMES, ["circle", "square"], what="test set"),
        None,
        ["triangle"],
    )
    yield Input(
        "select of a class with too few images",
        lambda: select(some.select(range(5)), "random", images_per_class=3),
        None,
        ["triangle"],
    )


def _names_of(dataset: Dataset) -> list[str]:
    return [dataset.features["label"].names[label] for label in dataset["label"]]


# --- the caller's state --------------------------------------------------------------------------------------------


def state(folder: Path) -> Iterator[Input]:
    """Formats and transforms of the datasets that are given, and what they are afterwards."""
    pipe, small = tiny_pipe(), images_of([0, 1, 2])
    PIL.Image.effect_noise((8, 8), 60).save(folder / "noise.jpg", quality=70)
    encoded = {"bytes": (folder / "noise.jpg").read_bytes(), "path": None}
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES))})
    real = Dataset.from_dict({"image": [encoded] * 6, "label": [0, 1, 2] * 2}, features=features)
    expected = load_pixels(real, num_channels=1)[0]
    changed = {
        "torch format": real.with_format("torch"),
        "numpy format": real.with_format("numpy"),
        "format of one column": real.with_format("torch", columns=["label"]),
        "transform": real.with_transform(lambda rows: {"image": [0 for _ in rows["image"]], "label": rows["label"]}),
    }
    for name, dataset in changed.items():
        before = dataset.format
        yield Input(f"{name}: pixels", lambda d=dataset: load_pixels(d, num_channels=1)[0], expected.equal)

        def doped(dataset: Dataset = dataset) -> bool:
            rows = dope(small, dataset, pipe, images_per_class=2, strategy="random").cast_column(
                "image", Image(decode=False)
            )
            return all(row["image"]["bytes"] == encoded["bytes"] for row in rows if row["real_index"] >= 0)

        yield Input(f"{name}: dope keeps the files' bytes", doped, equals(True))
        yield Input(
            f"{name}: left as it was",
            lambda d=dataset: (_targets(d, pipe), [d.format[key] for key in ("type", "columns")])[1],
            equals([before[key] for key in ("type", "columns")]),
        )

    def random_state() -> bool:
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        concentrate(pipe, _targets(real, pipe), 1, **SAMPLING)
        dope(small, real, pipe, images_per_class=2, strategy="herding")
        return torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002

    yield Input("the global random state", random_state, equals(True))


# --- numbers -------------------------------------------------------------------------------------------------------


def numbers(folder: Path) -> Iterator[Input]:
    """Numbers of other types, and values that are no such number."""
    pipe = tiny_pipe()
    real = images_of([0, 1, 2] * 3)
    targets = _targets(real, pipe)
    small = concentrate(pipe, targets, 1, **SAMPLING)
    taken: dict[str, Callable[[Any], Any]] = {
        "concentrate": lambda n: len(concentrate(pipe, targets, n, **SAMPLING)) // 3,
        "dope": lambda n: len(dope(small, real, pipe, images_per_class=n, strategy="random")) // 3,
        "select": lambda n: len(select(real, "random", images_per_class=n)) // 3,
        "a run folder": lambda n: len(concentrate_to_folder(
            pipe, targets, n, folder / f"run-{type(n).__name__}-{n}", **SAMPLING).dataset()) // 3,
        "batch_size of load_pixels": lambda n: len(load_pixels(real, num_channels=1, batch_size=n)[0]) // 9 * 2,
    }  # fmt: skip
    for name, run in taken.items():
        for good in (2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)):
            kind = f"{type(good).__module__}.{type(good).__name__}"
            yield Input(f"{name}: 2 as {kind}", lambda run=run, good=good: run(good), equals(2))
        for bad in (True, "2", 2.5, float("nan"), float("inf"), -1, 0, None, np.float32("nan"), [2]):
            yield Input(f"{name}: {bad!r}", lambda run=run, bad=bad: run(bad), None, [])
    for option, bad in (
        ("guidance_scale", float("nan")), ("guidance_scale", float("inf")), ("eta", float("nan")), ("eta", True),
        ("step_size", float("inf")), ("num_inference_steps", 2.5), ("num_inference_steps", True), ("seed", 1.5),
        ("seed", True), ("seed", -1), ("seed", "3"), ("batch_size", True), ("lookahead", "guidd"),
        ("objective", "rhks"),
    ):  # fmt: skip
        yield Input(
            f"{option}={bad!r}",
            lambda o=option, b=bad: concentrate_and_report(pipe, targets, 1, **SAMPLING | from_flat({o: b})),
            None,
            [option],
        )
    for good in (np.float32(1.0), np.float64(1.0), torch.tensor(1.0), 1):
        yield Input(
            f"guidance_scale as {type(good).__name__}",
            lambda g=good: len(concentrate(pipe, targets, 1, **{**SAMPLING, "guidance_scale": g})), equals(3),
        )  # fmt: skip
    seeds = concentrate(pipe, targets, 1, seed=3, **SAMPLING)["seed"][:]
    yield Input(
        "seed as NumPy", lambda: concentrate(pipe, targets, 1, seed=np.int64(3), **SAMPLING)["seed"][:], equals(seeds)
    )
    yield Input(
        "learning_rate=nan", lambda: get_protocol("quick", learning_rate=float("nan")), None, ["learning_rate"]
    )
    yield Input("epochs=True", lambda: get_protocol("quick", epochs=True), None, ["epochs"])
    for name, bad in (("train_steps", "abc"), ("train_steps", "1.5"), ("learning_rate", "nan"), ("trian_steps", "3")):
        yield Input(
            f"--{name} {bad}",
            lambda n=name, b=bad: parse_config(GeneratorTrainingConfig, [f"--{n}", b]),
            None, [name],
        )  # fmt: skip


# --- networks of other precisions ----------------------------------------------------------------------------------


def dtypes(folder: Path) -> Iterator[Input]:
    """Networks in half and double precision at every call."""
    real = images_of([0, 1, 2] * 3)
    small = real.select(range(3))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        pipe = tiny_pipe()
        pipe.classifier.to(dtype)
        name = str(dtype).removeprefix("torch.")
        targets = lambda pipe=pipe: _targets(real, pipe)  # noqa: E731
        calls: dict[str, tuple[Callable[[], Any], Any]] = {
            "targets": (lambda t=targets: bool(t().embeddings.isfinite().all()), True),
            "concentrate": (lambda p=pipe, t=targets: len(concentrate(p, t(), 1, **SAMPLING)), 3),
            "clearest": (lambda p=pipe: len(select(real, Clearest(0.3), pipe=p, progress=False)), 3),
            "herding": (lambda p=pipe: len(dope(small, real, p, images_per_class=2, strategy="herding")), 6),
        }
        for what, (run, expected) in calls.items():
            yield Input(f"{name} classifier: {what}", run, equals(expected))


# --- damaged files -------------------------------------------------------------------------------------------------


def damaged(folder: Path) -> Iterator[Input]:
    """Files that are cut, empty, of noise or of another kind: the file is named."""
    pipe = tiny_pipe()
    real = images_of([0, 1, 2] * 3)
    targets = _targets(real, pipe)
    pipe.save_pretrained(folder / "pipe")
    targets.save_pretrained(folder / "targets")
    rows = concentrate(pipe, targets, 1, **SAMPLING)
    save_dataset_folder(rows, folder / "set")
    concentrate_to_folder(pipe, targets, 1, folder / "run", **SAMPLING)
    (folder / "config.yaml").write_text("train_steps: 100\n", encoding="utf-8")
    readers: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "pipe": (folder / "pipe", lambda place: DsCoPipeline.from_pretrained(place)),
        "targets": (folder / "targets", lambda place: MatchingTargets.from_pretrained(place)),
        "set": (folder / "set", lambda place: (read_concentration(place), verify(place))),
        "run": (folder / "run", lambda place: len(_run(pipe, targets, place))),
    }  # fmt: skip
    for name, (place, read) in readers.items():
        for path in sorted(place.rglob("*")):
            if not path.is_file() or path.suffix not in (".json", ".safetensors", ".parquet"):
                continue
            if name == "run" and path.parent.name == "log":
                continue
            whole = path.read_bytes()
            for kind, content in {
                "cut in half": whole[: len(whole) // 2],
                "empty": b"",
                "noise": b"\x93\0\xff" * 50,
            }.items():

                def run(place: Path = place, path: Path = path, read: Any = read, content: bytes = content) -> Any:
                    copied = folder / "copy"
                    shutil.rmtree(copied, ignore_errors=True)
                    shutil.copytree(place, copied)
                    (copied / path.relative_to(place)).write_bytes(content)
                    return read(copied)

                # a run draws again what is damaged; everything else is refused by name
                right = equals(3) if name == "run" and path.parent.name == "units" else None
                yield Input(f"{path.relative_to(folder)} {kind}", run, right, [path.name] if right is None else [])
    for kind, text in {
        "cut": "train_steps: [1",
        "a list": "- a\n",
        "unknown": "trian_steps: 1\n",
    }.items():
        place = folder / f"{kind}.yaml"
        place.write_text(text, encoding="utf-8")
        says = ["trian_steps", "train_steps"] if kind == "unknown" else [place.name]
        yield Input(
            f"a config that is {kind}",
            lambda p=place: parse_config(GeneratorTrainingConfig, ["--config", str(p)]),
            None,
            says,
        )


# --- sets of other people, records ---------------------------------------------------------------------------------


def others(folder: Path) -> Iterator[Input]:
    """Small sets that have an image and a label only, and what is published of ours."""
    pipe, real = tiny_pipe(), images_of([0, 1, 2] * 3)
    small = images_of([0, 1, 2], first=5)
    yield Input("dope", lambda: len(dope(small, real, pipe, images_per_class=2, strategy="random")), equals(6))

    def saved() -> bool:
        save_dataset_folder(small, folder / "theirs")
        verify(folder / "theirs")
        return load_dataset(str(folder / "theirs"), split="train").num_rows == 3

    yield Input("save_dataset_folder and verify", saved, equals(True))

    def telltale() -> list[str]:
        secret = folder / "secret-user-home"
        pipe.save_pretrained(secret / "pipe")
        mine = DsCoPipeline.from_pretrained(secret / "pipe")
        mine.set_progress_bar_config(disable=True)
        drawn = concentrate(mine, MatchingTargets.from_dataset(real, mine, progress=False), 1, **SAMPLING)
        save_dataset_folder(drawn, folder / "published")
        files = [path for path in (folder / "published").rglob("*") if path.is_file()]
        return [path.name for path in files if b"secret-user-home" in path.read_bytes()]

    yield Input("a path of this machine in what is published", telltale, equals([]))

    def recorded() -> tuple[Any, Any]:
        drawn = concentrate(pipe, _targets(real, pipe), 1, **SAMPLING)
        save_dataset_folder(drawn, folder / "recorded")
        parameters = json.loads((folder / "recorded" / "concentration.json").read_text(encoding="utf-8")).get(
            "parameters"
        )
        return parameters["guidance_scale"], parameters["num_inference_steps"]

    yield Input("a record that nobody typed", recorded, equals((1.0, 2)))
    yield Input(
        "a set without targets is recorded as plain samples",
        lambda: record_of(concentrate(pipe, None, 1, **SAMPLING))["method"],
        equals("plain"),
    )
    two = real.add_column("other", real["label"]).cast_column("other", ClassLabel(names=["x", "y", "z"]))
    two = two.rename_column("label", "fine")
    yield Input("two label columns", lambda: load_pixels(two, num_channels=1), None, ["label_column", "fine", "other"])
    yield Input(
        "two label columns, one chosen, doped",
        lambda: len(dope(small, two, pipe, images_per_class=2, strategy="random", label_column="fine")), equals(6),
    )  # fmt: skip
    numbers_only = real.cast_column("label", Value("int64"))
    yield Input("labels that are plain numbers", lambda: load_pixels(numbers_only, num_channels=1), None, ["label"])
    yield Input("a dict of splits", lambda: load_pixels(DatasetDict(train=real), num_channels=1), None, ["train"])
    yield Input(
        "train mode",
        lambda: concentrate(_training(pipe), None, 1, objective="classifier", **SAMPLING),
        None,
        ["eval()"],
    )


# --- settings, and what is told of a set ---------------------------------------------------------------------------


def settings(folder: Path) -> Iterator[Input]:
    """Mappings, features, protocols, and sizes: of the wrong kind, or at the edge of what is allowed."""
    two = {0: "a", 1: "b"}
    told: dict[str, tuple[dict[str, Any], list[int] | None, Sequence[str]]] = {
        "no classes": ({"names": []}, [], ()),
        "text in place of names": ({"names": "ab"}, None, ["names", "'ab'"]),
        "numbers in place of names": ({"names": [0, 1]}, None, ["names"]),
        "no class of the generator": ({"num_classes": 0}, None, ["num_classes", "0"]),
        "a bool as number of classes": ({"num_classes": True}, None, ["num_classes", "True"]),
        "a NumPy number of classes": ({"num_classes": np.int64(2)}, [1, 0], ()),
        "a list of the generator's names": ({"id2label": ["a", "b"]}, None, ["id2label"]),
        "keys of JSON": ({"id2label": {"0": "a", "1": "b"}}, [1, 0], ()),
        "no names of the generator": ({"names": ["x", "y"], "id2label": None}, [0, 1], ()),
        "a name twice": ({"names": ["a", "a"]}, None, ["'a'", "mapping"]),
        "a list": ({"names": ["x", "y"], "mapping": [1, 0]}, [1, 0], ()),
        "an array": ({"names": ["x", "y"], "mapping": np.array([1, 0])}, [1, 0], ()),
        "a tensor": ({"names": ["x", "y"], "mapping": torch.tensor([1, 0])}, [1, 0], ()),
        "a list that is short": ({"mapping": [1]}, None, ["1", "2"]),
        "a list of bools": ({"mapping": [True, False]}, None, ["True"]),
        "a list of floats": ({"mapping": [1.0, 0.0]}, None, ["1.0"]),
        "a list with None": ({"mapping": [1, None]}, None, ["None"]),
        "a class below zero": ({"mapping": {"a": -1}}, None, ["-1"]),
        "a set": ({"mapping": {"a"}}, None, ["{'a'}"]),
        "an empty mapping": ({"mapping": {}}, [1, 0], ()),
        "index": ({"names": ["x", "y"], "mapping": "index"}, [0, 1], ()),
        "number": ({"names": ["1", "0"], "mapping": "number"}, [1, 0], ()),
        "number, of words": ({"names": ["x", "y"], "mapping": "number"}, None, ["'x'"]),
        "a label set that is none": ({"mapping": "indx"}, None, ["indx", "imagenet-1k"]),
        "a wanted class that is none": ({"present": ["z"]}, None, ["present", "'z'"]),
        "places of some classes only": ({"own_labels": [0]}, None, ["own_labels", "1"]),
    }
    for name, (options, expected, says) in told.items():
        arguments = {"names": ["b", "a"], "id2label": two, "num_classes": 2, **options}
        right = None if expected is None else equals(expected)
        yield Input(f"class_mapping: {name}", lambda a=arguments: class_mapping(**a), right, says)

    for field, bad in (
        ("seed", True), ("seed", -1), ("seed", 1.5), ("seed", "3"), ("seed", None), ("layers", []), ("layers", 3),
        ("layers", [1]), ("layers", None), ("pooling", "avg"), ("network", "classifer"), ("space", None),
    ):  # fmt: skip
        yield Input(f"FeatureSpec({field}={bad!r})", lambda f=field, b=bad: FeatureSpec(**{f: b}), None, [field])
    yield Input("FeatureSpec(seed=numpy)", lambda: FeatureSpec(seed=np.int64(3)).seed, equals(3))
    yield Input("FeatureSpec of one name", lambda: FeatureSpec(layers="hidden_1").layers, equals(("hidden_1",)))

    changes: dict[str, Any] = {
        "lerning_rate": 1, "learning_rate": "fast", "weight_decay": -1, "momentum": 3, "image_size": 0,
        "load_size": "big", "image_mean": [0.5, "a", 0.5], "image_std": [0, 0, 0], "norm": "layer", "steps": "3",
        "batch_size": True, "schedule": "cosin", "schedule_milestones": 0.5, "label_type": None, "best_from": 2,
        "best_every": 0, "decay_vectors": "no", "temperature": float("nan"), "augmentation": ["HorizontalFlip"],
        "variants": "a", "epochs": 4,
    }  # fmt: skip
    for field, bad in changes.items():
        values = {"name": "mine", "source": "me", "steps": 3, field: bad}
        yield Input(f"a protocol of {field}: {bad!r}", lambda v=values: protocol_from_dict(v), None, [field])
    parts: dict[str, tuple[Any, Sequence[str]]] = {
        "an unknown augmentation": ({"augmentation": [{"name": "Flip"}]}, ["Flip", "HorizontalFlip"]),
        "a field that it lacks": ({"augmentation": [{"name": "RandomShift", "pixel": 3}]}, ["'pixel'", "'pixels'"]),
        "text for a number": ({"augmentation": [{"name": "RandomShift", "pixels": "a"}]}, ["pixels", "'a'"]),
        "a variant without changes": ({"variants": [{"classes": [1, 2]}]}, ["changes"]),
        "a variant of a bad value": ({"variants": [{"changes": {"learning_rate": "x"}}]}, ["learning_rate", "'x'"]),
        "no source": ({"source": None}, ["source"]),
    }
    for name, (change, says) in parts.items():
        values = {"name": "mine", "source": "me", "steps": 3, **change}
        yield Input(f"a protocol with {name}", lambda v=values: protocol_from_dict(v), None, says)
    yield Input("a name in place of a protocol", lambda: protocol_from_dict("quick"), None, ["get_protocol"])
    yield Input("a protocol of NumPy", lambda: get_protocol("quick", steps=np.int64(3)).steps, equals(3))

    sizes = concatenate_datasets([images_of([0, 1, 2], size=size) for size in (8, 12, 20)])
    quick, small = get_protocol("quick"), images_of([0, 1, 2])

    def shape(dataset: Any, **options: Any) -> list[int]:
        return list(load_image_set(dataset, **{"protocol": quick, "num_channels": 1, **options}).pixels.shape)

    at_12 = get_protocol("quick", image_size=12)
    like = load_image_set(small, protocol=quick, num_channels=1)
    yield Input("several sizes, none named", lambda: shape(sizes), equals([9, 1, 32, 32]))
    yield Input("several sizes, one named", lambda: shape(sizes, protocol=at_12), equals([9, 1, 12, 12]))
    yield Input("several sizes, tested", lambda: shape(sizes, test_for=like), equals([9, 1, 8, 8]))
    yield Input("a stream of several sizes", lambda: shape(sizes.to_iterable_dataset()), None, ["row 3", "protocol"])
    yield Input("a protocol by name", lambda: shape(small, protocol="quick"), None, ["get_protocol"])
    yield Input("a test set for a dataset", lambda: shape(small, test_for=small), None, ["test_for", "Dataset"])


def published(folder: Path) -> Iterator[Input]:
    """Dry runs, and records of the wrong kind."""
    pipe, rows = tiny_pipe(), images_of([0, 1, 2])
    sent, pushed = ("README.md", "model_index.json", "pipeline.py"), ("revision", "max_retries", "private")

    def dry(**options: Any) -> bool:
        push = PushOptions(dry_run=True, **{name: options.pop(name) for name in pushed if name in options})
        arguments = {"pipeline": pipe, "repo_id": "ann/pipe", **options}
        result = publish_pipeline(arguments.pop("pipeline"), arguments.pop("repo_id"), push=push, **arguments)
        return result is not None and set(sent) <= set(result.added)

    yield Input("a dry run of a pipeline that lies nowhere", dry, equals(True))
    wrong: dict[str, Any] = {
        "pipeline": "outputs/pipe", "targets": rows, "license": 3, "revision": 3, "max_retries": -1, "private": "yes",
    }  # fmt: skip
    for option, bad in wrong.items():
        says = {"pipeline": "DsCoPipeline", "targets": "MatchingTargets"}.get(option, option)
        yield Input(f"a dry run with {option}={bad!r}"[:60], lambda o={option: bad}: dry(**o), None, [says])
    for bad in (None, 3, "", "a/b/c", "ann/x y", "./outputs/x"):
        yield Input(f"a dry run to {bad!r}", lambda bad=bad: dry(repo_id=bad), None, ["repository id", repr(bad)])

    def saved(**options: Any) -> dict[str, Any]:
        shutil.rmtree(folder / "set", ignore_errors=True)
        save_dataset_folder(rows, folder / "set", **options)
        verify(folder / "set")
        return json.loads((folder / "set" / "concentration.json").read_text(encoding="utf-8"))

    arguments: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
        "targets by path": ({"targets": "outputs/targets"}, ["targets", "from_pretrained"]),
        "targets that are a dataset": ({"targets": rows}, ["targets", "Dataset"]),
        "targets of no config": ({"targets": {"ipc9": _targets(rows, pipe)}}, ["ipc9", "default"]),
        "a card that is a dict": ({"card": {"pretty_name": "x"}}, ["DatasetCardFields"]),
        "figures that are one path": ({"figures": "a.png"}, ["list"]),
        "a record that is text": ({"concentration": "nopt"}, ["concentration", "nopt"]),
        "results in percent": ({"results": {"rows": [{"method": "nopt", "accuracy_mean": 50.0}]}}, ["fraction"]),
        "results of text": ({"results": {"rows": [{"method": "nopt", "accuracy_mean": "high"}]}}, ["accuracy_mean"]),
        "results without methods": ({"results": {"rows": [{"accuracy_mean": 0.5}]}}, ["method"]),
    }
    for name, (options, says) in arguments.items():
        yield Input(name, lambda o=options: saved(**o), None, says)
    records: dict[str, tuple[Any, Sequence[str]]] = {
        "a method that is a number": ({"method": 3}, ["method", "3"]),
        "a seed that is text": ({"seed": "a"}, ["seed", "'a'"]),
        "a seed that is NaN": ({"seed": float("nan")}, ["seed", "nan"]),
        "parameters in a list": ({"parameters": [1]}, ["parameters"]),
        "targets that are a fingerprint": ({"targets": "abc"}, ["targets", "'abc'"]),
        "a fingerprint that is a number": ({"targets": {"sha256": 3}}, ["sha256", "3"]),
        "a fingerprint that is cut": ({"generator": {"weights_sha256": "0a"}}, ["weights_sha256", "'0a'"]),
        "a config that is not there": ({"configs": {"ipc7": {}}}, ["ipc7", "default"]),
        "a config that is text": ({"configs": {"default": "x"}}, ["default", "'x'"]),
        "an object": ({"parameters": {"x": object()}}, ["object"]),
    }
    for name, (record, says) in records.items():
        yield Input(name, lambda r=record: saved(concentration=r), None, says)
    plain = {"parameters": {"step_size": torch.tensor(2.0), "steps": np.int64(3)}}
    yield Input(
        "numbers of NumPy and torch in a record",
        lambda: saved(concentration=plain)["parameters"], equals({"step_size": 2.0, "steps": 3}),
    )  # fmt: skip


def _targets(dataset: Dataset, pipe: DsCoPipeline) -> MatchingTargets:
    return MatchingTargets.from_dataset(dataset, pipe, embedding_dim=64, progress=False)


def _run(pipe: DsCoPipeline, targets: MatchingTargets, place: Path) -> Dataset:
    return concentrate_to_folder(pipe, targets, 1, place, **SAMPLING).dataset()


def _training(pipe: DsCoPipeline) -> DsCoPipeline:
    pipe = copy.deepcopy(pipe)
    pipe.transformer.train()
    return pipe


KINDS: dict[str, Callable[[Path], Iterator[Input]]] = {
    kind.__name__: kind
    for kind in (
        pixels,
        folders,
        doors,
        names,
        kept_names,
        orders,
        state,
        numbers,
        dtypes,
        damaged,
        others,
        settings,
        published,
    )
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Judges all inputs of the wanted kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--verbose", action="store_true", help="a line for every input")
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    constants.HF_HUB_OFFLINE = True  # nothing here needs the network
    torch.set_num_threads(1)
    counts, failures = Counter(dict.fromkeys(("right", "clear_error", "silent", "unclear"), 0)), []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for item in KINDS[kind](Path(folder)):
                outcome, said = judge(item)
                counts[outcome] += 1
                if outcome in ("silent", "unclear"):
                    failures.append(f"{kind}: {item.name}: {outcome}: {said}"[:400])
                if options.verbose:
                    print(f"{outcome:12} {kind}: {item.name}: {said}"[:600], flush=True)
    figures = {"inputs": sum(counts.values()), **counts, "failures": failures}
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))
    return figures


def judge(item: Input) -> tuple[str, str]:
    """What came of an input, and the value or the error in words."""
    try:
        value = item.run()
    except OURS as error:
        text = " ".join(str(error).split())
        allowed = item.right is None or item.may_be_refused
        clear = allowed and len(text) >= SHORTEST and all(word in text for word in item.says)
        return ("clear_error" if clear else "unclear"), f"{type(error).__name__}: {text}"
    except Exception as error:
        return "unclear", f"{type(error).__name__}: {error}"
    if item.right is not None and item.right(value):
        return "right", str(value)
    return "silent", f"got {value!r}"


if __name__ == "__main__":
    main()
