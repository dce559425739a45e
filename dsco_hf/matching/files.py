"""What matching keeps on disk: the two files of targets, and the features of a population, unit by unit.

Targets are written whole, found in a folder or on the Hub, read and checked. Features wait there until their mean,
spread and bandwidth are known.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load, load_file, save, save_file

from ..utils.files import (
    DamagedFileError,
    check_path,
    locked,
    read_json,
    reading,
    remove_partials,
    whole,
    write_atomically,
    write_json,
)
from ..utils.files import explained as explained_disk
from ..utils.origins import differences, in_words
from ..utils.processes import RunError, Team
from ..utils.safety import explained
from ..utils.values import check_real, check_whole, plain


logger = logging.getLogger(__name__)

PASS_NAME = "pass.json"


class TemporaryFeatures:
    """Units in a file without a name, which vanishes with its process."""

    names: tuple[str, ...] = ()  # what was finished beforehand: nothing

    def __init__(self) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="dsco-features-")
        self._places: dict[str, tuple[int, int]] = {}

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores a unit: features `(B, d)`, rows, weights and keys `(B,)`."""
        data = save(dict(tensors))
        self._places[name] = (self._file.seek(0, 2), len(data))
        with explained_disk(Path(tempfile.gettempdir())):
            self._file.write(data)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A stored unit: features `(B, d)`, rows, weights and keys `(B,)`."""
        start, size = self._places[name]
        self._file.seek(start)
        return load(self._file.read(size))

    def remove(self, names: Iterable[str]) -> None:
        """Forgets units."""
        for name in names:
            del self._places[name]

    def close(self) -> None:
        """Removes the file."""
        self._file.close()


class FeatureFolder:
    """Units in files of a folder, which outlive a killed process and are continued by the next.

        pass.json                              what the features were taken of, and with what
        features-<unit>.<checksum>.safetensors whole or absent; a file that does not fit its checksum is made again

    Args:
        folder (`Path`): on a file system that all processes share.
        identity (`dict`): what fixes the features, as JSON values; a folder of other features is refused.
        team (`Team`): the processes that write to it.

    Raises:
        RunError: if another run is at work on the folder, or it cannot be written to.
        ValueError: if it holds features of something else; the differing fields are named.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], team: Team) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._stack = contextlib.ExitStack()
        try:
            found = team.from_main(lambda: self._begin(json.loads(json.dumps(plain(identity)))), "opening `work_dir`")
            parts = team.everywhere(lambda: self._damaged(found, team), "reading `work_dir`")
        except BaseException:
            self.close()
            raise
        damaged = {name for part in parts for name in part}
        self._files: dict[str, str] = {name: file for name, file in found.items() if name not in damaged}
        self.names = tuple(sorted(self._files))

    def _begin(self, identity: dict[str, Any]) -> dict[str, str]:
        """Locks and checks the folder. Returns the files of finished units by name."""
        self._stack.enter_context(locked(self.folder))
        remove_partials(self.folder)
        path = self.folder / PASS_NAME
        if path.is_file():
            before = read_json(path, "Choose another `work_dir`, or empty it.")
            if differing := differences(before, identity):
                raise ValueError(
                    f"{self.folder} holds the features of another pass; these differ: {in_words(differing)}. Choose "
                    "another `work_dir`, or set them as they were."
                )
        elif any(self.folder.glob("features-*")):
            raise ValueError(f"{self.folder} holds features but no {PASS_NAME}: choose another `work_dir`.")
        else:
            with explained_disk(self.folder):
                write_json(path, identity)
        files = sorted(path.name for path in self.folder.glob("features-*.*.safetensors"))
        return {file.removeprefix("features-").split(".")[0]: file for file in files}

    def _damaged(self, found: Mapping[str, str], team: Team) -> list[str]:
        """Those of this process's share of the files that do not fit their checksum; they are removed."""
        damaged = []
        for name in sorted(found)[team.rank :: team.world]:
            path = self.folder / found[name]
            try:
                data = path.read_bytes()
            except FileNotFoundError as error:
                raise RunError(
                    f"Process {team.rank} does not find {path}: `work_dir` must be on a file system that all "
                    "processes share."
                ) from error
            if _checksum(data) != found[name].split(".")[1]:
                logger.warning("%s is damaged, and made again.", path)
                path.unlink(missing_ok=True)
                damaged.append(name)
        return damaged

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores a unit: features `(B, d)`, rows, weights and keys `(B,)`."""
        data = save(dict(tensors))
        self._files[name] = f"features-{name}.{_checksum(data)}.safetensors"
        with explained_disk(self.folder):
            write_atomically(self.folder / self._files[name], data)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A stored unit: features `(B, d)`, rows, weights and keys `(B,)`."""
        path = self.folder / self._files[name]
        with reading(path, "Remove it, and run the same command again: it is made anew."):
            return load(path.read_bytes())

    def remove(self, names: Iterable[str]) -> None:
        """Removes units."""
        for name in names:
            (self.folder / self._files.pop(name)).unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the folder free; its files stay."""
        self._stack.close()


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


WEIGHTS_NAME, CONFIG_NAME = "targets.safetensors", "targets.json"
SAVE_AGAIN = "Save the targets again, or download them again."


def write_targets(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes both files into a folder, which is made if it is not there; tensors are of any shape."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with explained_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # never the names of old targets beside the weights of new ones
        with whole(folder / WEIGHTS_NAME) as partial:
            save_file(stored, partial, metadata={"format": "pt"})
        write_json(folder / CONFIG_NAME, config)


def find_targets(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Path, Path]:
    """The paths of both files, in a folder or downloaded; arguments as for `hf_hub_download`.

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
            with explained(text, token=token, action="load targets from"):
                try:
                    path = Path(
                        hf_hub_download(
                            text, name, subfolder=subfolder, revision=revision, token=token, cache_dir=cache_dir
                        )
                    )
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
    """Refuses files that do not belong together: written by two different targets, or one of them edited.

    For C classes, features of dimension d and embeddings of D: `embeddings` `(C, D)`, `counts` `(C,)`, `feature_mean`
    and `feature_std` `(d,)`, `frequencies` `(d, D / 2)`, `probe` `(2, d)`, `second_moment` `(D, D)`.
    """
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
