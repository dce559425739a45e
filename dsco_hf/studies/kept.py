"""What is made once and used again: targets, sets, checks of a generator. Each lies beside all that decided it.

A thing is used again where its identity is that of what would be made now, and made anew or refused where it differs;
see `dsco_hf.utils.origins`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from ..concentration.set_records import read_set, write_set
from ..data.datasets import dataset_fingerprint
from ..generators.failures import NonFiniteError
from ..matching.targets import MatchingTargets
from ..utils.files import DamagedFileError, read_json, reading, remove_partials, write_json
from ..utils.origins import components_of, differences, fingerprint, identity, in_words, versions
from .generator_check import GeneratorCheck, check_generator


MADE_WITH = "made_with.json"
LOOKING = ("classifier", "classifier_2", "vae", "classes")  # what an image passes through on its way to features
DRAW_AGAIN = "Delete it, and run the same command again: it is made anew."


def pipeline_identity(
    pipe: DiffusionPipeline,
    real: Dataset | IterableDataset | None = None,
    *,
    draws: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """What decides anything that a pipeline makes, of real images or without them: an identity of `utils.origins`.

    Args:
        pipe (`DsCoPipeline`): its models count by weights, type and configuration, its classes by name.
        real (`Dataset` or `IterableDataset`, *optional*): counts by content; `image_column` and `label_column` among
            the options say which of its columns.
        draws (`bool`): whether the pipeline draws something; if it looks at images only, denoiser, scheduler and
            preview decoder do not count.
        options: all else that decides it.
    """
    columns = {name: options.get(name) for name in ("image_column", "label_column")}
    return identity(
        models={name: part for name, part in components_of(pipe).items() if draws or name in LOOKING},
        image_size=pipe.image_size,
        num_channels=pipe.num_channels,
        real=None if real is None else dataset_fingerprint(real, **columns),
        options=options,
        versions=versions(),
    )


def kept_targets(
    folder: str | Path,
    made_with: Mapping[str, Any],
    make: Callable[..., MatchingTargets],
    *,
    accelerator: Accelerator,
    renew: bool = False,
) -> MatchingTargets:
    """Targets of an earlier session that were made with the same, or new ones, which are then kept.

    Args:
        folder (`str` or `Path`): of the targets, on a file system that all processes see.
        made_with: all that decides them, see [`pipeline_identity`].
        make (`Callable`): `make(accelerator=, work_dir=)` makes them, by all processes together.
        accelerator (`Accelerator`): connects the processes; all of them call this.
        renew (`bool`): make those anew that were made with something else; otherwise they are refused, for a run goes
            on with those that it began with.

    Raises:
        ValueError: for targets that were made with something else; what differs is named.
    """
    folder = Path(folder)
    path = folder / MADE_WITH
    before = read_json(path, f"Remove {folder}: the targets are then made again.") if path.is_file() else None
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    if before is not None:
        if not (differing := differences(before, made_with)):
            return MatchingTargets.from_pretrained(folder)
        if not renew:
            raise ValueError(
                f"{folder} holds targets that were made otherwise ({in_words(differing)}). Remove it, or choose "
                "another folder."
            )
    work = f"{folder.name}-work-"  # a pass that was stopped is continued by the same targets only
    targets = make(accelerator=accelerator, work_dir=folder.with_name(work + fingerprint(made_with)[:8]))
    if accelerator.is_main_process:
        path.unlink(missing_ok=True)
        targets.save_pretrained(folder)
        write_json(path, made_with)
        for left in folder.parent.glob(f"{work}*"):
            shutil.rmtree(left)
    accelerator.wait_for_everyone()
    return MatchingTargets.from_pretrained(folder)


class KeptSets:
    """Small sets in a folder, each with what it was made with, what it cost and how it was drawn.

        <name>.parquet      the rows with their record, see `dsco_hf.concentration.set_records`; whole or absent
        <name>.json         `made_with`, and what else is told of it

    Args:
        folder (`str` or `Path`): made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, name: str) -> bool:
        return self._rows(name).is_file() and self._notes(name).is_file()

    def is_made(self, name: str, made_with: Mapping[str, Any]) -> bool:
        """Whether a set is there, and was made with the same."""
        try:
            return name in self and not differences(self.told(name)["made_with"], made_with)
        except (DamagedFileError, KeyError):
            return False

    def save(self, name: str, rows: Dataset, made_with: Mapping[str, Any], **told: Any) -> None:
        """Keeps a set, in place of an earlier one of the name; `told` are JSON values."""
        self._rows(name).unlink(missing_ok=True)
        remove_partials(self.folder, self._rows(name).name)
        write_json(self._notes(name), {**told, "made_with": made_with})
        write_set(rows, self._rows(name))

    def rows(self, name: str) -> Dataset:
        """A finished set, with its record.

        Raises:
            DamagedFileError: if its file cannot be read.
        """
        with reading(self._rows(name), DRAW_AGAIN):
            return read_set(self._rows(name))

    def told(self, name: str) -> dict[str, Any]:
        """What was told of a set; nothing of one that is not there."""
        return read_json(self._notes(name), DRAW_AGAIN) if self._notes(name).is_file() else {}

    def file(self, name: str) -> Path:
        """The parquet file of a set."""
        return self._rows(name)

    def _rows(self, name: str) -> Path:
        return self.folder / f"{name}.parquet"

    def _notes(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def kept_check(
    path: str | Path, pipe: DiffusionPipeline, real: Dataset | None = None, **options: Any
) -> GeneratorCheck | None:
    """What the classifier makes of plain samples: of an earlier session with the same models and images, or asked now.

    Args:
        path (`str` or `Path`): the JSON file that it is kept in.
        pipe (`DsCoPipeline`): as for [`~dsco_hf.studies.generator_check.check_generator`], like `real` and `options`.
        real (`Dataset`, *optional*): to compare with.
        options: of that function.

    Returns:
        [`GeneratorCheck`]; None where the classifier cannot say, or a sample is not finite: the run that follows says
        which.
    """
    path, made_with = Path(path), pipeline_identity(pipe, real, **options)
    if path.is_file():
        kept = read_json(path, f"Remove {path}: the samples are then drawn again.")
        if not differences(kept.get("made_with") or {}, made_with):
            check = GeneratorCheck(**kept["check"])
            check.warn()
            return check
    try:
        found = check_generator(pipe, real, **options)
    except NonFiniteError:
        return None
    if found is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"check": dataclasses.asdict(found), "made_with": json.loads(json.dumps(made_with))})
    return found
