"""The two files that targets are kept in: written whole, found in a folder or on the Hub, read, and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .safety import explained


WEIGHTS_NAME, CONFIG_NAME = "targets.safetensors", "targets.json"


def write_targets(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes both files into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, write in (
        (WEIGHTS_NAME, lambda path: save_file(stored, path, metadata={"format": "pt"})),
        (CONFIG_NAME, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")),
    ):
        partial = folder / f".{name}.partial"
        write(partial)
        partial.replace(folder / name)  # a file is whole or absent


def find_targets(name_or_path: str | Path, *, subfolder: str | None = None, **options: Any) -> tuple[Path, Path]:
    """The paths of both files, in a folder or downloaded with `options` of `hf_hub_download`.

    Raises:
        FileNotFoundError: if a file, or the repository, is missing.
        PermissionError: if it is gated, or the token is not valid.
        ConnectionError: if the Hub cannot be reached.
    """
    text = str(name_or_path)
    looks_local = isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_local and not Path(name_or_path).is_dir():
        raise FileNotFoundError(f"There is no folder {name_or_path}: give one written by `save_pretrained`.")
    paths = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if Path(name_or_path).is_dir():
            path = Path(name_or_path) / (subfolder or "") / name
        else:
            with explained(text, token=options.get("token"), action="load targets from"):
                try:
                    path = Path(hf_hub_download(text, name, subfolder=subfolder, **options))
                except RemoteEntryNotFoundError:
                    raise FileNotFoundError(
                        f"The repository {name_or_path} has no {name}: no targets are there."
                    ) from None
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: targets are the two files {CONFIG_NAME} and {WEIGHTS_NAME}, as written by "
                "`MatchingTargets.save_pretrained`."
            )
        paths.append(path)
    return paths[0], paths[1]


def read_config(path: Path, fields: Sequence[str], *, optional: bool = False) -> dict[str, Any]:
    """The fields of the JSON file; ValueError if it is damaged or lacks one, unless they are `optional`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): it may be truncated. Save the targets again."
        ) from error
    if not isinstance(config, dict) or (missing := [name for name in fields if name not in config and not optional]):
        raise ValueError(
            f"{path} does not describe targets{f': it lacks {missing}' if isinstance(config, dict) else ''}."
        )
    return {name: config[name] for name in fields if name in config}


def read_tensors(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The tensors of the other file, the optional ones if there; ValueError if it is damaged or lacks one."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it may be truncated. Save the targets again.") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {missing}: it does not hold targets, or those of another version.")
    return {name: tensors[name] for name in (*names, *optional) if name in tensors}


def check_shapes(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Refuses files that do not belong together: written by two different targets, or one of them edited."""
    classes, d, half = len(config["class_names"]), *tensors["frequencies"].shape
    expected = {
        "embeddings": (classes, 2 * half),
        "counts": (classes,),
        "feature_mean": (d,),
        "feature_std": (d,),
        "probe": (len(tensors["probe"]), d),
    }
    if "second_moment" in tensors:
        expected["second_moment"] = (2 * half, 2 * half)
    wrong = [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if len(config["class_labels"]) != classes:
        wrong.append(f"there are {len(config['class_labels'])} class_labels")
    if wrong:
        raise ValueError(
            f"{CONFIG_NAME} and {WEIGHTS_NAME} in {where} do not belong together: for {classes} class_names, "
            f"{'; '.join(wrong)}. Save the targets again."
        )
