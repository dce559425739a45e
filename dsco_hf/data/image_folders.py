"""Folders of images, one folder per class: every class and every image, whatever they are called.

`datasets` reads such folders by patterns of names, in which a class called "train" or "[a]" means something else; here
the folders are walked. Images stay on disk until they are read.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .splits import split_named


logger = logging.getLogger(__name__)

ENDINGS = frozenset(ImageFolder.EXTENSIONS)


def is_image_folder(folder: Path) -> bool:
    """Whether a folder is one of images, with nothing in it that says how else it should be read.

    Parquet files, tables of labels (`metadata.csv`) and a README.md with configs are for datasets.
    """
    images = False
    for _, _, files in _walk(folder):
        if any(_ending(name) in (".parquet", ".arrow") or name.startswith("metadata.") for name in files):
            return False
        images = images or any(_ending(name) in ENDINGS for name in files)
    readme = folder / "README.md"
    return images and not (readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace"))


def image_files(paths: Iterable[str]) -> list[str]:
    """Those of a repository's paths that are images; hidden ones are left out."""
    return [path for path in paths if _ending(path) in ENDINGS and not path.startswith(".") and "/." not in path]


def load_image_folder(folder: Path) -> DatasetDict:
    """All splits of a folder of images; columns `image` and `label`, rows by class and file name.

    Layouts: `CLASS/image.png`, or `SPLIT/CLASS/image.png` where the outer folders are called like splits ("train",
    "test", "val", …) and hold folders of images themselves. Folders around them that hold one folder only are passed
    through. Hidden files and files that are no images are left out; hidden folders with images as well, with a
    warning.

    Args:
        folder (`Path`): the outermost folder.

    Raises:
        ValueError: if images lie outside of class folders, or it is not certain which folders are classes.
    """
    found, hidden = _images_by_folder(folder)
    if hidden:
        logger.warning("Hidden folders with images are left out: %s", hidden[:10])
    root = _innermost(folder, found)
    by_split = _splits(root, found)
    names = sorted({place.name for places in by_split.values() for place in places})
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    splits = {}
    for split, places in by_split.items():
        ordered = sorted(places, key=lambda place: names.index(place.name))
        paths = [str(place / name) for place in ordered for name in sorted(found[place])]
        labels = [names.index(place.name) for place in ordered for _ in found[place]]
        splits[split] = Dataset.from_dict({"image": paths, "label": labels}, features=features)
    _tell_empty(root, by_split, found)
    return DatasetDict(splits)


def _walk(folder: Path) -> list[tuple[Path, list[str], list[str]]]:
    """Folders below, with the names of their folders and files, links followed, in the order of their names."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        path = Path(place)
        if path.is_symlink() and any(path.resolve() == above.resolve() for above in path.parents):
            folders.clear()  # a link to a folder above it
            continue
        folders.sort()
        found.append((path, list(folders), files))
    return found


def _ending(name: str) -> str:
    return Path(name).suffix.lower()


def _images_by_folder(folder: Path) -> tuple[dict[Path, list[str]], list[str]]:
    """Image files by the folder that holds them, and hidden folders that hold some."""
    found: dict[Path, list[str]] = {}
    hidden = []
    for place, _, files in _walk(folder):
        images = [name for name in files if _ending(name) in ENDINGS and not name.startswith(".")]
        if any(part.startswith(".") for part in place.relative_to(folder).parts):
            hidden += [str(place.relative_to(folder))] if images else []
        elif images:
            found[place] = images
    return found, hidden


def _innermost(folder: Path, found: dict[Path, list[str]]) -> Path:
    """The folder that has the classes or splits: folders around it that hold one folder only are passed through."""
    if folder in found:
        others = [place for place in found if place != folder]
        example = sorted(found[folder])[0]
        raise ValueError(
            f"{folder} has images outside of class folders, such as {example!r}"
            + (f", beside folders such as {others[0].name!r}" if others else "")
            + ". Put every image into the folder of its class, or remove those that have none."
        )
    inner = sorted({folder / place.relative_to(folder).parts[0] for place in found})
    if len(inner) == 1 and inner[0] not in found and split_named(inner[0].name) is None:
        return _innermost(inner[0], found)
    return folder


def _splits(root: Path, found: dict[Path, list[str]]) -> dict[str, list[Path]]:
    """The class folders of every split; "train" where there are no splits."""
    outer = {place: root / place.relative_to(root).parts[0] for place in found}
    tops = sorted(set(outer.values()))
    deep = [top for top in tops if top not in found]
    named = [top for top in deep if split_named(top.name)]
    if not named:
        places = sorted(found)
        _check_classes(root, places)
        if len(tops) > 1 and all(split_named(top.name) for top in tops):
            raise ValueError(
                f"The folders {[top.name for top in tops]} of {root} are called like splits and hold images, but no "
                "class folders. Put the images of every split into one folder per class; if these are the classes, "
                "rename one."
            )
        return {"train": places}
    if others := [top.name for top in tops if top not in named]:
        raise ValueError(
            f"{root} has the splits {[top.name for top in named]} and beside them folders with images, {others[:10]}. "
            "Move those elsewhere, or into a split."
        )
    by_split: dict[str, list[Path]] = {}
    for top in named:
        split = split_named(top.name) or top.name
        if split in by_split:
            raise ValueError(f"{root} has two folders for the split {split!r}: {[place.name for place in named]}.")
        by_split[split] = sorted(place for place in found if outer[place] == top)
        _check_classes(top, by_split[split])
    order = ("train", "validation", "test")
    return {split: by_split[split] for split in order if split in by_split}


def _check_classes(root: Path, places: list[Path]) -> None:
    """Raises if a class would be two folders, or a folder of images lies in another one."""
    for place in places:
        if inner := next((other for other in places if place in other.parents), None):
            raise ValueError(
                f"{place.relative_to(root)} holds images and, in {inner.relative_to(place)}, further images: it is "
                "not certain which of the two folders is the class. Move the images of a class into one folder."
            )
    twice = [name for name, count in Counter(place.name for place in places).items() if count > 1]
    if twice:
        same = [str(place.relative_to(root)) for place in places if place.name == twice[0]]
        raise ValueError(
            f"Several folders below {root} are called {twice[0]!r}: {same[:10]}. Give each class one folder."
        )


def _tell_empty(root: Path, by_split: dict[str, list[Path]], found: dict[Path, list[str]]) -> None:
    """Warns of folders where a class would be, without an image."""
    parents = {place.parent for places in by_split.values() for place in places}
    empty = [
        str(place.relative_to(root))
        for place, folders, _ in _walk(root)
        if place.parent in parents and not folders and place not in found and not place.name.startswith(".")
    ]
    if empty:
        logger.warning("Folders without an image are left out: %s", empty[:20])
