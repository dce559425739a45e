"""Targets that are made once and used again: they lie beside all that decided them; see `dsco_hf.utils.origins`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from ..data.datasets import dataset_fingerprint
from ..utils.files import read_json, write_json
from ..utils.origins import components_of, differences, fingerprint, identity, in_words, versions
from .targets import MatchingTargets


MADE_WITH = "made_with.json"
LOOKING = ("classifier", "classifier_2", "vae", "classes")  # what an image passes through on its way to features


def pipeline_identity(
    pipe: DiffusionPipeline,
    real: Dataset | IterableDataset | None = None,
    *,
    draws: bool = True,
    **options: object,
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
    columns: dict[str, Any] = {name: options.get(name) for name in ("image_column", "label_column")}
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
    make: Callable[..., Any],
    *,
    accelerator: Accelerator,
    renew: bool = False,
    kind: Any = MatchingTargets,
) -> Any:
    """Targets of an earlier session that were made with the same, or new ones, which are then kept.

    Args:
        folder (`str` or `Path`): of the targets, on a file system that all processes see.
        made_with: all that decides them, see [`pipeline_identity`].
        make (`Callable`): `make(accelerator=, work_dir=)` makes them, by all processes together.
        accelerator (`Accelerator`): connects the processes; all of them call this.
        renew (`bool`): make those anew that were made with something else; otherwise they are refused, for a run goes
            on with those that it began with.
        kind (`type`): of the targets, with `save_pretrained` and `from_pretrained`.

    Raises:
        ValueError: for targets that were made with something else; what differs is named.
    """
    folder = Path(folder)
    path = folder / MADE_WITH
    before = read_json(path, f"Remove {folder}: the targets are then made again.") if path.is_file() else None
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    if before is not None:
        if not (differing := differences(before, made_with)):
            return kind.from_pretrained(folder)
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
    return kind.from_pretrained(folder)
