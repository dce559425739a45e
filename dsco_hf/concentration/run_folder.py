"""The folder of a run: finished units as parquet shards with checksums, a lock, a log, and what the run was asked for.

    run.json                           what is to be drawn, with what; written first
    units/group-00000-block-00000.*    .parquet: the rows of a unit; .json: its manifest entry, written after it
    log/process-00000.jsonl            what each process did, one JSON object per line

A unit is finished when its manifest entry is there. Every file is written beside its place, brought to the disk and
then renamed, so that it is whole or absent; what a killed run leaves behind is removed by the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import Accelerator
from datasets import Dataset, DatasetInfo, Features

from ..data.schema import nearest
from ..data.shards import embedded, file_sha256
from ..sampling.call import Sampling
from ..sampling.flat import from_flat
from ..utils.configs import make_accelerator
from ..utils.files import (
    DamagedFileError,
    explained,
    locked,
    read_json,
    reading,
    remove_partials,
    whole,
    write_atomically,
    write_json,
)
from ..utils.origins import differences, in_words
from ..utils.progress import Bar
from ..utils.values import plain, plain_fields
from .concentrate import Unit, plan_units


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# settings that say how many units there are and what is in them
_SIZES = ("num_classes", "images_per_class", "block_size", "images_per_call")
_FIXED = {*_SIZES, "seed", "class_labels", "class_names"}
_LATER = {"versions", "measure_by"}  # which folders of older versions did not note


@dataclasses.dataclass(frozen=True)
class RunSession:
    """How the processes of a launch work at a run.

    Attributes:
        cpu_threads (`int`): threads of a process that computes on the CPU. Part of a run's settings, as their number
            changes the last bits of sums; use several processes to use several cores.
        max_hours (`float`, *optional*): no unit is begun that would probably not end within this time.
        accept_changed (sequence of `str`): settings that may differ from those the folder was started with, after a
            repair for example: `["models.transformer"]`. What is drawn stays, and the change is noted.
        accelerator (`Accelerator`): connects the processes.
    """

    cpu_threads: int = 1
    max_hours: float | None = None
    accept_changed: Sequence[str] = ()
    accelerator: Accelerator = dataclasses.field(default_factory=make_accelerator)

    field_limits: ClassVar[dict[str, float]] = {"cpu_threads": 1, "max_hours": 0}

    def __post_init__(self) -> None:
        """Refuses numbers out of range."""
        plain_fields(self)


class RunFolder:
    """Files of one run.

    Args:
        path (`str` or `Path`): the folder; relative paths are resolved now.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.units, self.logs = self.path / "units", self.path / "log"

    def explained(self) -> contextlib.AbstractContextManager[None]:
        """Turns errors of the file system into a `RunError` that says what to do."""
        return explained(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder, which is made, for this run.

        Raises:
            RunError: if another run holds it, or it cannot be written to.
        """
        with locked(self.path):
            with self.explained():
                self.units.mkdir(exist_ok=True)
                self.logs.mkdir(exist_ok=True)
            yield

    def begin(self, settings: Mapping[str, Any], *, accept_changed: Sequence[str] = ()) -> None:
        """Starts the folder with `run.json`, or checks that it was started with the same settings.

        Args:
            settings: what fixes the images, as JSON values; `images_per_class` may grow or shrink by whole blocks.
            accept_changed: names of settings that may differ all the same; what changed, and after how many units, is
                noted in `run.json`.

        Raises:
            ValueError: naming the settings that differ, or if the folder is not that of a run.
        """
        for folder in (self.path, self.units):
            remove_partials(folder)
        settings = json.loads(json.dumps(plain(settings)))
        record: dict[str, Any] = {"format_version": FORMAT_VERSION, "settings": settings}
        if (self.path / "run.json").is_file():
            before, record["changes"] = self.settings(), self.changes()
            if changed := check_settings(before, settings, self.path, accept_changed=accept_changed):
                record["changes"].append({"settings": changed, "finished_units": len(self.finished())})
            elif settings["images_per_class"] <= before["images_per_class"]:
                return
        elif any(self.units.iterdir()):
            raise ValueError(f"{self.path} holds units, but no run.json to tell what they are. Choose another folder.")
        with self.explained():
            write_json(self.path / "run.json", record)

    def settings(self) -> dict[str, Any]:
        """The settings that the folder was started with, or that were accepted later.

        Raises:
            FileNotFoundError: if there is no run in it.
            ValueError: if `run.json` is damaged.
        """
        settings = self._record()["settings"]
        if "objective" in (options := settings.get("options") or {}):  # flat, of an earlier version
            sampling = Sampling(**from_flat(options)).for_targets(settings.get("targets"))
            settings["options"] = sampling.as_record()
        return settings

    def changes(self) -> list[dict[str, Any]]:
        """Settings that were changed on the way: `settings` (old and new value by name) and `finished_units` then."""
        return self._record().get("changes", [])

    def _record(self) -> dict[str, Any]:
        path = self.path / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} is not the folder of a run: it has no run.json.")
        remedy = "Put it back, or choose another folder."
        record = read_json(path, remedy)
        if record.get("format_version") != FORMAT_VERSION:
            raise DamagedFileError(
                f"{path} has format_version {record.get('format_version')!r}, and this version of dsco_hf reads "
                f"{FORMAT_VERSION}. {remedy}"
            )
        with reading(path, remedy):
            plan_units(**{name: record["settings"][name] for name in _SIZES})
            iter(record.get("changes", []))
        return record

    def finished(self) -> set[str]:
        """Names of the units that have a manifest entry."""
        with os.scandir(self.units) as entries:
            return {entry.name[:-5] for entry in entries if entry.name.endswith(".json") and entry.name[0] != "."}

    def verify(self, names: Sequence[str]) -> list[str]:
        """The finished units that do not fit their checksums: they lose their entry, and so are drawn again."""
        damaged = []
        for name in names:
            entry, shard = self.entry(name), self._shard(name)
            whole = entry is not None and shard.is_file() and shard.stat().st_size == entry.get("bytes")
            if not whole or file_sha256(shard) != entry["sha256"]:  # type: ignore[index]
                logger.warning("Unit %s is damaged, and drawn again.", name)
                with self.explained():
                    self._entry(name).unlink(missing_ok=True)
                damaged.append(name)
        return damaged

    def write_unit(self, unit: Unit, rows: Dataset, entry: Mapping[str, Any]) -> None:
        """Stores a finished unit: first the shard, then the entry that makes it count."""
        name, sink = unit_name(unit), io.BytesIO()
        pq.write_table(embedded(rows), sink)
        data = sink.getvalue()
        described = {"unit": name, "images": unit.images, "bytes": len(data), **entry}
        described["sha256"] = hashlib.sha256(data).hexdigest()
        with self.explained():
            write_atomically(self._shard(name), data)
            write_atomically(self._entry(name), (json.dumps(described) + "\n").encode())

    def entry(self, name: str) -> dict[str, Any] | None:
        """A unit's manifest entry; None if there is none, or it is damaged."""
        try:
            entry = read_json(self._entry(name), "")
        except (FileNotFoundError, DamagedFileError):
            return None
        return entry if isinstance(entry.get("sha256"), str) else None

    def rows(self, unit: Unit, features: Features) -> Dataset:
        """The rows of a finished unit, in memory."""
        return Dataset(self._table(unit, features), info=DatasetInfo(features=features))

    def log(self, process: int, event: str, **values: object) -> None:
        """Appends one line to the log of a process. A log that cannot be written stops no run."""
        line = {"time": datetime.now(UTC).isoformat(), "clock": time.monotonic(), "event": event, **values}
        path = self.logs / f"process-{process:05d}.jsonl"
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def assemble(self, units: Sequence[Unit], features: Features, *, cache_file: Path | None = None) -> Dataset:
        """All rows by class and index, in memory, or written group by group to an Arrow file and read from it."""
        tables = (self._group(units, group, features) for group in sorted({unit.group for unit in units}))
        if cache_file is None:
            return Dataset(pa.concat_tables(tables), info=DatasetInfo(features=features))
        with self.explained(), whole(cache_file) as partial:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
                for table in tables:
                    writer.write_table(table)
        return Dataset.from_file(str(cache_file), info=DatasetInfo(features=features))

    def _group(self, units: Sequence[Unit], group: int, features: Features) -> pa.Table:
        """The rows of a group, which are those of a range of classes: by class, block after block."""
        blocks = sorted((unit for unit in units if unit.group == group), key=lambda unit: unit.block)
        table = pa.concat_tables([self._table(unit, features) for unit in blocks])
        return table.take(pc.sort_indices(table["label"]))  # stable

    def _table(self, unit: Unit, features: Features) -> pa.Table:
        path = self._shard(unit_name(unit))
        with reading(path, "Run the same command again: it is drawn anew."):
            return pq.read_table(path, schema=features.arrow_schema)

    def _shard(self, name: str) -> Path:
        return self.units / f"{name}.parquet"

    def _entry(self, name: str) -> Path:
        return self.units / f"{name}.json"


def unit_name(unit: Unit) -> str:
    """The name of a unit's files."""
    return f"group-{unit.group:05d}-block-{unit.block:05d}"


def check_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, *, accept_changed: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Refuses to go on with a run that was started with other settings.

    `images_per_class` may change: blocks are nested, as long as none of them changes its size. `accept_changed` names
    settings that may differ, such as `models.classifier`, or `models` for all; not those that say what is to be drawn.

    Returns:
        `dict`: the accepted changes, `[old value, new value]` by name.

    Raises:
        ValueError: naming the settings that differ, with both values.
    """
    now = {key: value for key, value in now.items() if key in before or key not in _LATER}
    differing = differences(before, now)
    differing.pop("images_per_class", None)
    groups = {*before, *now}
    for name in accept_changed:
        if name.split(".")[0] not in groups - _FIXED:
            allowed = sorted(groups - _FIXED)
            raise ValueError(f"`accept_changed` takes settings of {allowed}, got {name!r}.{nearest(name, allowed)}")
    accepted = tuple(f"{name}." for name in accept_changed)
    if refused := {key: values for key, values in differing.items() if not f"{key}.".startswith(accepted)}:
        names = sorted({key for key in refused if key.split(".")[0] not in _FIXED})
        hint = f" To keep what is drawn all the same and go on: `accept_changed={names}`." if names else ""
        raise ValueError(
            f"{folder} holds a run with other settings ({in_words(refused)}). Choose another folder, or set them as "
            f"they were.{hint}"
        )
    small, large = (
        {unit_name(unit): unit for unit in plan_units(**{**{key: now[key] for key in _SIZES}, "images_per_class": n})}
        for n in sorted((int(before["images_per_class"]), int(now["images_per_class"])))
    )
    if any(large.get(name) != unit for name, unit in small.items()):
        raise ValueError(
            f"{folder} holds a run with images_per_class={before['images_per_class']}, and "
            f"{now['images_per_class']} were asked for. A run changes by whole blocks of {now['block_size']} images: "
            f"the smaller number must be a multiple of {now['block_size']}. Choose another folder or number."
        )
    return differing


class RunProgress:
    """A bar over the images of all processes, which the manifest tells of; it moves while this process is at work."""

    def __init__(self, folder: RunFolder, images: Mapping[str, int], *, shown: bool, interval: float = 1.0) -> None:
        self.folder, self.images, self.interval = folder, images, interval
        self.bar = Bar(
            total=sum(images.values()), initial=self._count(), desc="Concentrating", unit="img", disable=not shown
        )
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if not self.bar.disable:
            self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.end.set()
        if not self.bar.disable:
            self.thread.join()
            self._show()
        self.bar.close()

    def _watch(self) -> None:
        while not self.end.wait(self.interval):
            self._show()

    def _show(self) -> None:
        with contextlib.suppress(OSError):  # a bar stops no run
            self.bar.update(self._count() - self.bar.n)

    def _count(self) -> int:
        return sum(self.images.get(name, 0) for name in self.folder.finished())
