"""The two files that targets are kept in: written whole, found in a folder or on the Hub, read, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file

from ..utils.files import DamagedFileError, check_path, read_json, reading, whole, write_json
from ..utils.files import explained as explained_disk
from ..utils.safety import explained
from ..utils.values import check_real, check_whole


WEIGHTS_NAME, CONFIG_NAME = "targets.safetensors", "targets.json"
SAVE_AGAIN = "Save the targets again, or download them again."


def write_targets(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes both files into a folder, which is made if it is not there."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with explained_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # never the names of old targets beside the weights of new ones
        with whole(folder / WEIGHTS_NAME) as partial:
            save_file(stored, partial, metadata={"format": "pt"})
        write_json(folder / CONFIG_NAME, config)


def find_targets(name_or_path: str | Path, *, subfolder: str | None = None, **options: Any) -> tuple[Path, Path]:
    """The paths of both files, in a folder or downloaded with `options` of `hf_hub_download`.

    Raises:
        FileNotFoundError: if a file, or the repository, is missing.
        PermissionError: if it is gated, or the token is not valid.
        ConnectionError: if the Hub cannot be reached.
    """
    text = str(name_or_path)
    check_path(name_or_path, wanted="Give a folder that `save_pretrained` wrote, or an id such as 'user/name'.")
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
    config = read_json(path, SAVE_AGAIN)
    if missing := [name for name in fields if name not in config and not optional]:
        raise DamagedFileError(f"{path} does not describe targets: it lacks {missing}. {SAVE_AGAIN}")
    return {name: config[name] for name in fields if name in config}


def read_tensors(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The tensors of the other file, the optional ones if there; ValueError if it is damaged or lacks one."""
    with reading(path, SAVE_AGAIN):
        tensors = load_file(path)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DamagedFileError(
            f"{path} lacks {missing}: it does not hold targets, or those of another version. {SAVE_AGAIN}"
        )
    return {name: tensors[name] for name in (*names, *optional) if name in tensors}


def check_shapes(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Refuses files that do not belong together: written by two different targets, or one of them edited."""
    _check_types(config, where / CONFIG_NAME)
    for name in ("frequencies", "probe"):
        if tensors[name].ndim != 2:
            raise DamagedFileError(
                f"{where / WEIGHTS_NAME}: {name} has {tensors[name].ndim} dimensions instead of 2. {SAVE_AGAIN}"
            )
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
        raise DamagedFileError(
            f"{CONFIG_NAME} and {WEIGHTS_NAME} in {where} do not belong together: for {classes} class_names, "
            f"{'; '.join(wrong)}. {SAVE_AGAIN}"
        )
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise DamagedFileError(f"{where / WEIGHTS_NAME}: {bad} are not finite. {SAVE_AGAIN}")


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    """Refuses a JSON file that somebody edited into something else."""
    names, labels, bandwidth = (config[name] for name in ("class_names", "class_labels", "bandwidth"))
    with reading(path, SAVE_AGAIN):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"class_names must be a list of names, got {str(names)[:80]}")
        if not isinstance(labels, list) or not isinstance(config["provenance"], dict):
            raise TypeError("class_labels must be a list, and provenance an object")
        for label in labels:
            check_whole("class_labels", label, 0)
        check_real("bandwidth", bandwidth, 0, open_low=True)
