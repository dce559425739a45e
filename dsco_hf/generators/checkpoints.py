"""Checkpoints of a generator's training: folders that are whole or absent, checked before they are loaded."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ..data.shards import file_sha256
from ..utils.files import DamagedFileError, bring_to_disk, explained, read_json, reading
from ..utils.origins import differences, in_words
from ..utils.values import plain
from .denoisers import GeneratorTrainingConfig


logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimiser."""

    step: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


# What a checkpoint of an older version, which did not know a setting, was trained with.
_UNSET: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(GeneratorTrainingConfig)}


class Checkpoints:
    """Checkpoints of one run: `<folder>/step-00001000`, whole or absent; the newest replaces the older ones.

    `progress.json` lists the checksums of the other files.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, identity: dict[str, Any]) -> None:
        self.folder, self.accelerator, self.identity = folder, accelerator, identity
        self.damaged: set[Path] = set()

    def complete(self) -> list[Path]:
        """All checkpoints, the newest first."""
        found = [path for path in self.folder.glob("step-*") if path.suffix != ".partial" and path.is_dir()]
        return sorted(found, reverse=True)

    def save(self, progress: Progress, ema: dict[str, torch.Tensor]) -> None:
        """Writes a checkpoint; all processes call this.

        Raises:
            RunError: if it cannot be written.
        """
        final = self.folder / f"step-{progress.step:08d}"
        if final.exists() and final not in self.damaged:
            return
        partial = final.with_suffix(".partial")  # of a name that all processes know
        if self.accelerator.is_main_process:
            with explained(self.folder):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with explained(self.folder):
            self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with explained(self.folder):
                self._finish(partial, final, progress, ema)
        self.accelerator.wait_for_everyone()

    def _finish(self, partial: Path, final: Path, progress: Progress, ema: dict[str, torch.Tensor]) -> None:
        """Adds what is not the accelerator's, brings all to the disk, and only then removes the older ones."""
        save_file(ema, partial / "ema.safetensors")
        state = {
            "progress": plain(dataclasses.asdict(progress)),
            "identity": plain(self.identity),
            "files": {path.name: file_sha256(path) for path in sorted(partial.iterdir())},
        }
        (partial / "progress.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        older = [path for path in self.folder.glob("step-*") if path not in (partial, final)]
        for path in (*partial.iterdir(), partial):
            bring_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        partial.rename(final)
        bring_to_disk(self.folder)
        for path in older:
            shutil.rmtree(path)

    def load_newest(self) -> tuple[Path, Progress, dict[str, torch.Tensor]] | None:
        """Restores from the newest checkpoint that can be read; None if there is none at all.

        Raises:
            ValueError: if it belongs to another configuration or other data.
            DamagedFileError, FileNotFoundError: if none can be read.
        """
        found = self.complete()
        for path in found:
            try:
                return path, *self.load(path)
            except (DamagedFileError, FileNotFoundError) as error:
                if path == found[-1]:
                    raise
                logger.warning("%s An older checkpoint is used.", error)
                self.damaged.add(path)
        return None

    def load(self, path: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
        """Restores model and optimiser in place; returns the rest.

        Raises:
            ValueError: if the checkpoint belongs to another configuration or other data.
        """
        remedy = f"Delete {path} and start again: from an older checkpoint if there is one, or anew."
        state = read_json(path / "progress.json", remedy)
        with reading(path / "progress.json", remedy):
            theirs, progress = dict(state["identity"]), Progress(**state["progress"])
        known = _UNSET | {"versions": self.identity.get("versions")}  # where an older version did not note it
        before = {name: theirs.get(name, known.get(name)) for name in self.identity}
        if changed := differences(before, self.identity):
            raise ValueError(
                f"The checkpoint {path} belongs to another run: {in_words(changed)}. Resume with the same settings "
                "and data, or start anew in another folder."
            )
        for name, sha256 in state.get("files", {}).items():  # older versions stored none
            with reading(path / name, remedy):
                if file_sha256(path / name) != sha256:
                    raise DamagedFileError(f"{path / name} is damaged: its checksum differs. {remedy}")
        with reading(path / "ema.safetensors", remedy):
            averaged = load_file(path / "ema.safetensors")
        with reading(path, remedy):
            self.accelerator.load_state(str(path))
        return progress, averaged
