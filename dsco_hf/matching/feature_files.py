"""Where the features of a population wait until their mean, spread and bandwidth are known: unit by unit, on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, save

from ..utils.files import explained, locked, read_json, reading, remove_partials, write_atomically, write_json
from ..utils.origins import differences, in_words
from ..utils.processes import RunError, Team
from ..utils.values import plain


logger = logging.getLogger(__name__)

PASS_NAME = "pass.json"


class TemporaryFeatures:
    """Units in a file without a name, which vanishes with its process."""

    names: tuple[str, ...] = ()  # what was finished beforehand: nothing

    def __init__(self) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="dsco-features-")
        self._places: dict[str, tuple[int, int]] = {}

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores a unit."""
        data = save(dict(tensors))
        self._places[name] = (self._file.seek(0, 2), len(data))
        with explained(Path(tempfile.gettempdir())):
            self._file.write(data)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A stored unit."""
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
            with explained(self.folder):
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
        """Stores a unit."""
        data = save(dict(tensors))
        self._files[name] = f"features-{name}.{_checksum(data)}.safetensors"
        with explained(self.folder):
            write_atomically(self.folder / self._files[name], data)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A stored unit."""
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
