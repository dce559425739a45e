"""Errors that say what to do: it is done, literally, and works; and what messages name exists.

Advice that is followed elsewhere: single variants and pickles of models (test_weights), sizes and columns of compared
sets (test_recipes_evaluators), `--test_dataset` (there, too), `--resume false` (test_recipe_options), streams without
a test split (test_opening), largest sets (test_concentrate), splits that lose classes (test_opening), class folders on
the Hub (test_opening).
"""

import ast
import builtins
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from test_recipe_options import RECIPES

import dsco_hf
from advice import FAST, follow, is_of
from dsco_hf import DsCoPipeline, ImageSet, MatchingTargets, concentrate, dope, get_protocol, load_image_dataset
from dsco_hf.concentration.additions.doping import select
from dsco_hf.data.datasets import find_columns, load_pixels, stratified_split
from dsco_hf.data.splits import divide, refuse_slice
from dsco_hf.evaluators.batches import check_same_classes
from dsco_hf.studies.metrics import Accuracy, Coverage
from dsco_hf.utils.configs import parse_config
from dsco_hf.utils.values import check_whole
from recipes.plan import main as plan
from recipes.train_classifier import ClassifierRecipe


ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "dsco_hf").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])


def with_euler(w):
    w.pipe.scheduler = EulerDiscreteScheduler()
    return w.pipe


def with_ddim(w):
    pipe = with_euler(w)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def in_train_mode(w):
    w.pipe.transformer.train()
    return w.pipe


def in_eval_mode(w):
    pipe = in_train_mode(w)
    pipe.transformer.eval()
    return pipe


# what is done wrong, what the error says, what it says to do, and whether that has worked
TABLE = {
    "one class per image": (
        lambda w: w.pipe([], **FAST),
        r"pass one class per image, for example `\[0, 0, 1, 1\]`",
        lambda w: w.pipe([0, 0, 1, 1], **FAST).images,
        is_of(4),
    ),
    "one generator per image": (
        lambda w: w.pipe([0, 1, 2], generator=w.make.generators([0, 1]), **FAST),
        "pass one per image, or a single one",
        lambda w: (
            [*w.pipe([0, 1], generator=w.make.generators([0, 1]), **FAST).images]
            + [*w.pipe([0, 1], generator=torch.Generator(), **FAST).images]
        ),
        is_of(4),
    ),
    "a list of classes": (
        lambda w: w.pipe(0, **FAST),
        r"must be a list, got 0: pass `\[0\]`",
        lambda w: w.pipe([0], **FAST).images,
        is_of(1),
    ),
    "a class that is out of range": (
        lambda w: w.pipe([3], **FAST),
        "3 classes: pass 0 to 2",
        lambda w: w.pipe([0, 2], **FAST).images,
        is_of(2),
    ),
    "a scheduler of another kind": (
        lambda w: with_euler(w)([0], **FAST),
        r"set `pipe.scheduler = DDIMScheduler.from_config\(pipe.scheduler.config\)`",
        lambda w: with_ddim(w)([0], **FAST).images,
        is_of(1),
    ),
    "train mode": (
        lambda w: in_train_mode(w)([0], **FAST),
        r"call `pipe.transformer.eval\(\)` first",
        lambda w: in_eval_mode(w)([0], **FAST).images,
        is_of(1),
    ),
    "no classifier to match with": (
        lambda w: concentrate(w.without, w.targets, 1, **FAST),
        r"pass `classifier=` to `DsCoPipeline.from_pretrained`",
        lambda w: concentrate(
            DsCoPipeline.from_pretrained(w.saved("plain"), classifier=w.pipe.classifier), w.targets, 1, **FAST
        ),
        is_of(3),
    ),
    "no classifier to choose with": (
        lambda w: select(w.real, "clearest", pipe=w.without, progress=False),
        r"pass `classifier=` to `DsCoPipeline.from_pretrained`",
        lambda w: select(
            w.real,
            "clearest",
            pipe=DsCoPipeline.from_pretrained(w.saved("plain"), classifier=w.pipe.classifier),
            progress=False,
        ),
        is_of(5),
    ),
    "the classifier objective takes no targets": (
        lambda w: w.pipe([0], targets=w.targets, objective="classifier", **FAST),
        "leave `targets` out, or choose objective='rkhs'",
        lambda w: (
            [*w.pipe([0], objective="classifier", **FAST).images]
            + [*w.pipe([0], targets=w.targets, objective="rkhs", **FAST).images]
        ),
        is_of(2),
    ),
    "classes beside targets": (
        lambda w: w.small(class_labels=[0]),
        "leave `class_labels` out",
        lambda w: w.small(),
        is_of(3),
    ),
    "all splits": (
        lambda w: find_columns(w.both),
        r"choose one, for example `dataset\['train'\]`",
        lambda w: find_columns(w.both["train"]),
        lambda found: found == ("image", "label"),
    ),
    "several columns": (
        lambda w: find_columns(w.two),
        "Several columns are of type ClassLabel: .* Choose one with `label_column=`",
        lambda w: find_columns(w.two, label_column="shape"),
        lambda found: found == ("image", "shape"),
    ),
    "sizes that differ": (
        lambda w: load_pixels(w.mixed),
        "Pass `image_size=` .* to bring them all to one size",
        lambda w: load_pixels(w.mixed, image_size=8)[0].shape,
        lambda found: found == (22, 1, 8, 8) or found == (22, 3, 8, 8),
    ),
    "an image that cannot be decoded": (
        lambda w: load_pixels(w.broken),
        "pass `on_error='skip'`",
        lambda w: load_pixels(w.broken, on_error="skip")[0],
        is_of(20),
    ),
    "a class that is not wanted": (
        lambda w: load_pixels(w.real, classes=["circle", "square"]),
        "is of class 'triangle' .* Remove the rows of that class with `dataset.filter`",
        lambda w: load_pixels(w.real.filter(lambda row: row["label"] != 2), classes=["circle", "square"])[0],
        is_of(16),
    ),
    "a class of one image": (
        lambda w: stratified_split(w.make.images((5, 5, 1)), test_size=0.4, seed=0),
        "leave the class out: remove its rows with `dataset.filter`",
        lambda w: stratified_split(
            w.make.images((5, 5, 1)).filter(lambda row: row["label"] != 2), test_size=0.4, seed=0
        )["test"],
        is_of(4),
    ),
    "nothing to hold out": (
        lambda w: divide({"train": w.real.select(range(3))}),
        "Pass `test_split='none'`",
        lambda w: divide({"train": w.real.select(range(3))}, test_split="none")[0],
        is_of(3),
    ),
    "a slice of a stream": (
        lambda w: refuse_slice("train[:2]"),
        r"Take the first rows with `\.take\(n\)`, leave rows out with `\.skip\(n\)`",
        lambda w: [*w.real.to_iterable_dataset().take(2)] + [*w.real.to_iterable_dataset().skip(19)],
        is_of(4),
    ),
    "a file that is no dataset": (
        lambda w: (w.folder / "notes.txt").write_text("a") and load_image_dataset(w.folder / "notes.txt"),
        "Give its folder, or a file that ends in .parquet",
        lambda w: w.real.to_parquet(w.folder / "x.parquet") and load_image_dataset(w.folder / "x.parquet")["train"],
        is_of(21),
    ),
    "an option without a meaning": (
        lambda w: load_image_dataset("digits", revision="main"),
        "`revision='main'` has no meaning for the embedded digits; leave it out",
        lambda w: load_image_dataset("digits")["test"],
        is_of(360),
    ),
    "other numbers of classes": (
        lambda w: check_same_classes(["b", "a"], ["a", "b"], what="the test set"),
        r"`load_pixels\(..., classes=names\)`",
        lambda w: load_pixels(w.real, classes=["triangle", "square", "circle"])[1].bincount().tolist(),
        lambda found: found == [5, 7, 9],
    ),
    "two sizes of a doped set": (
        lambda w: dope(w.small(), w.real, w.pipe, images_per_class=2, total=6, progress=False),
        "Pass either `images_per_class` or `total`",
        lambda w: dope(w.small(), w.real, w.pipe, total=6, strategy="random", progress=False),
        is_of(6),
    ),
    "herding without a pipeline": (
        lambda w: dope(w.small(), w.real, images_per_class=2, strategy="herding", progress=False),
        "needs `pipe`, .* or choose another strategy",
        lambda w: dope(w.small(), w.real, images_per_class=2, strategy="random", progress=False),
        is_of(6),
    ),
    "a budget of a doped set": (
        lambda w: dope(w.small(), w.real, total=100, strategy="random", progress=False),
        "choose from 3 to 24",
        lambda w: dope(w.small(), w.real, total=24, strategy="random", progress=False),
        is_of(24),
    ),
    "sizes of a doped set": (
        lambda w: dope(w.mixed, w.real, images_per_class=11, strategy="random", progress=False),
        "pass `image_size=8` or another number of pixels, or `image_size='original'`",
        lambda w: dope(w.mixed, w.real, total=23, strategy="random", image_size=8, progress=False),
        is_of(23),
    ),
    "samples without a classifier": (
        lambda w: MatchingTargets.from_generator(w.without, progress=False, samples_per_class=2, **FAST),
        "and there is none: pass `weighting='none'`",
        lambda w: (
            MatchingTargets.from_generator(
                w.without, weighting="none", progress=False, samples_per_class=2, embedding_dim=8, **FAST
            ).class_names
        ),
        is_of(3),
    ),
    "pickles are not written": (
        lambda w: w.without.save_pretrained(w.folder / "pickled", safe_serialization=False),
        "leave `safe_serialization=False` out",
        lambda w: w.without.save_pretrained(w.folder / "fine") or [*(w.folder / "fine").glob("*/*.safetensors")],
        is_of(1),
    ),
    "a folder that is no pipeline": (
        lambda w: (w.folder / "empty").mkdir(exist_ok=True) or DsCoPipeline.from_pretrained(w.folder / "empty"),
        "Give one that `save_pretrained` wrote",
        lambda w: [DsCoPipeline.from_pretrained(w.saved("plain"))],
        is_of(1),
    ),
    "a variant that is not there": (
        lambda w: DsCoPipeline.from_pretrained(w.saved("plain"), variant="fp16"),
        "leave `variant` out",
        lambda w: [DsCoPipeline.from_pretrained(w.saved("plain"))],
        is_of(1),
    ),
    "a label type without labels": (
        lambda w: dsco_hf.train_evaluator(
            w.make.convnet(),
            ImageSet(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])),
            protocol=get_protocol("quick", label_type="teacher", steps=1),
        ),
        r"Pass it, or change the protocol: get_protocol\('quick', label_type=...\)",
        lambda w: [
            dsco_hf.train_evaluator(
                w.make.convnet(),
                ImageSet(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])),
                protocol=get_protocol("quick", label_type="hard", steps=1),
            )
        ],
        is_of(1),
    ),
    "too large a k": (
        lambda w: Accuracy().compute(predictions=np.eye(3), references=[0, 1, 2]),
        "classes, got 5: pass a smaller `k=`",
        lambda w: [Accuracy().compute(predictions=np.eye(3), references=[0, 1, 2], k=3)["top_k"]],
        lambda found: found == [1.0],
    ),
    "features of the real data": (
        lambda w: Coverage().compute(predictions=np.zeros((2, 2))),
        "Pass the features of the real dataset as `real_features`",
        lambda w: Coverage().compute(predictions=np.zeros((2, 2)), real_features=np.eye(9)[:, :2]),
        is_of(2),
    ),
    "a whole number": (
        lambda w: check_whole("k", 2.0),
        "got 2.0: write 2",
        lambda w: [check_whole("k", 2)],
        lambda found: found == [2],
    ),
    "a value with blanks": (
        lambda w: parse_config(ClassifierRecipe, ["--model_options", "{", "}"]),
        "joined with commas: --model_options {,}",
        lambda w: parse_config(ClassifierRecipe, ["--model_options", "{,}"]).model_options,
        lambda found: found == "{,}",
    ),
    "a config without a file": (
        lambda w: parse_config(ClassifierRecipe, ["--config"]),
        "needs a file: `--config FILE`",
        lambda w: (
            (w.folder / "c.yaml").write_text("seed: 3")
            and [parse_config(ClassifierRecipe, ["--config", str(w.folder / "c.yaml")]).seed]
        ),
        lambda found: found == [3],
    ),
    "a plan without a classifier": (
        lambda w: plan(["--generator", w.saved("plain"), "--dtype", "float32"]),
        "name one with `--classifier`, or plan `--plain true`",
        lambda w: plan(
            ["--generator", w.saved("plain"), "--plain", "true", "--guidance_scale", "1", "--dtype", "float32"]
        )["rows"],
        is_of(1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])


@functools.cache
def messages(path):
    """The texts of a file that are no documentation, with `{}` where a value comes in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False)
    }
    told |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            texts.append(node.value)
    return texts


# options of other programs, and those that `parse_config` adds itself
OTHERS = {"config", "help", "multi_gpu", "num_processes", "from", "to", "ignore"}


@pytest.mark.slow
def test_every_option_that_a_message_names_exists():
    """In the recipe itself or in one that the message names; the library's messages may be of any recipe."""
    options = {name: {field.name for field in dataclasses.fields(recipe)} for name, recipe in RECIPES.items()}
    seen = 0
    for path in FILES:
        for text in messages(path):
            if " " not in text.strip() or "Dataset-Concentration" in text:
                continue  # built for a command, or about the authors' scripts
            named = [name for name in options if f"{name}.py" in text]
            mine = [path.stem, *named] if path.stem in options else list(options)
            for option in re.findall(r"--([a-z][a-z_]*[a-z])\b(?!_?\{)", text):
                if path.stem in options or path.parent.name != "recipes":
                    assert option in OTHERS or any(option in options[name] for name in mine), f"{path.name}: {text}"
                    seen += 1
    assert seen > 15


def all_callables():
    """Every function, class and method of the package by its name, and those of libraries that messages name."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(dsco_hf.__path__, "dsco_hf.")]
    named = {(name, id(value)): value for module in modules for name, value in vars(module).items() if callable(value)}
    classes = {
        id(value): value for value in [*named.values(), Dataset, StableDiffusionPipeline] if inspect.isclass(value)
    }
    inner = {
        (name, id(method)): method for one in classes.values() for name, method in inspect.getmembers(one, callable)
    }
    found = {}
    for (name, _), value in (named | inner).items():
        found.setdefault(name, []).append(value)
    return found


def parameters(function):
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return set()
    names = {name for name, one in signature.parameters.items() if one.kind is not one.VAR_KEYWORD}
    wild = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    return names | ({"**"} if wild else set())


@pytest.mark.slow
def test_every_function_and_argument_that_a_message_names_exists():
    known, seen = all_callables(), 0
    arguments = {name for functions in known.values() for one in functions for name in parameters(one)}
    for path in FILES:
        for text in messages(path):
            for call in re.findall(r"`([\w.]+\([^`{}]*\))`", text):
                node = ast.parse(call.lstrip(".").replace("...,", "").replace("=...", "=None"), mode="eval").body
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func).rpartition(".")[2]
                assert name in known or hasattr(builtins, name) or name in EXTERNAL, f"{path.name}: {call}"
                given = {keyword.arg for keyword in node.keywords}
                taken = [parameters(one) for one in known.get(name, ())]
                assert not given or name in EXTERNAL or any(given <= one or "**" in one for one in taken), (
                    f"{path.name}: {call}"
                )
                seen += 1
            for argument in re.findall(r"`(\w+)=[^`]*`", text):
                assert argument in arguments | EXTERNAL, f"{path.name}: {argument} in {text}"
                seen += 1
    assert seen > 60


# names of other libraries
EXTERNAL = {"use_safetensors", "variant", "force_download", "token", "revision", "take", "skip", "from_config", "eval",
            "snapshot_download", "register_to_config", "DDIMScheduler", "astype"}  # fmt: skip
