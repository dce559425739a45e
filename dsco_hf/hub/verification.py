"""Checking a published dataset against its `concentration.json`: schema, counts, hashes of files and rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features

from ..concentration.config_records import as_description, by_config
from ..concentration.set_records import changed_since
from ..data.shards import describe_split, file_sha256, read_split
from ..matching.targets import MatchingTargets
from ..utils.markdown import split_card
from ..utils.origins import targets_sha256
from ..utils.safety import is_pickle, safe_path
from .folder import CARD, CONCENTRATION, FORMAT_VERSION


def verify_folder(folder: str | Path, *, name: str | None = None) -> dict[str, Any]:
    """Checks that a folder holds exactly what its `concentration.json` says.

    Returns the content of `concentration.json`. Errors call the folder `name`, where it has another than its path.

    Raises:
        FileNotFoundError: If there is no `concentration.json`.
        ValueError: If something differs; the message lists all of it.
    """
    folder, name = Path(folder), name or str(folder)
    if not (folder / CONCENTRATION).is_file():
        raise FileNotFoundError(
            f"{name} has no {CONCENTRATION}, so there is nothing to check it against. Datasets made with `publish` or "
            "`save_dataset_folder` have one."
        )
    problems = list(_problems(folder))
    if problems:
        lines = "".join(f"\n- {problem}" for problem in problems[:50])
        raise ValueError(
            f"{name} does not match its {CONCENTRATION}:{lines}\nDownload it again; if it stays so, do not rely on it."
        )
    return json.loads((folder / CONCENTRATION).read_text(encoding="utf-8"))


def _problems(folder: Path) -> Iterator[str]:
    try:
        record = json.loads((folder / CONCENTRATION).read_text(encoding="utf-8"))
        configs: Mapping[str, Any] = record["configs"]
        if record.get("format_version") != FORMAT_VERSION:
            yield f"format_version is {record.get('format_version')!r}, but this version of dsco_hf reads "
            f"{FORMAT_VERSION}"
            return
        listed = {file["path"] for e in configs.values() for s in e["splits"].values() for file in s["files"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f"{CONCENTRATION} is damaged: {type(error).__name__}: {error}"
        return
    for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        relative = path.relative_to(folder).as_posix()
        if is_pickle(relative):
            yield f"{relative} is a pickle file, which can run code when loaded"
        if path.suffix == ".parquet" and relative not in listed:
            yield f"{relative} is not listed"
    yield from _card_problems(folder, record)
    yield from _targets_problems(folder, record)
    told = by_config(record)
    for config, entry in configs.items():
        for split, expected in entry["splits"].items():
            drawn = told[config] if split == next(iter(entry["splits"])) else {}
            try:
                problems = list(_split_problems(folder, entry, expected, drawn))
            except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
                problems = [f"the record or a file is damaged: {type(error).__name__}: {error}"]
            yield from (f"config {config!r}, split {split!r}: {problem}" for problem in problems)


def _card_problems(folder: Path, record: Mapping[str, Any]) -> Iterator[str]:
    if not (folder / CARD).is_file():
        yield f"{CARD} is missing"
        return
    try:
        metadata, _ = split_card((folder / CARD).read_text(encoding="utf-8"))
        infos = metadata.get("dataset_info") or []
        described = {
            entry.get("config_name", "default"): entry["description"]
            for entry in (infos if isinstance(infos, list) else [infos])
            if "description" in entry
        }
        on_card = {
            (entry.get("config_name", "default"), file["split"], file["path"])
            for entry in metadata.get("configs") or []
            for file in entry["data_files"]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f"the metadata of {CARD} is damaged: {error}"
        return
    for config, entry in record["configs"].items():
        for split in entry["splits"]:
            if (config, split, f"data/{config}/{split}-*") not in on_card:
                yield f"config {config!r}, split {split!r}: the metadata of {CARD} does not point to its files"
    told = by_config(record)
    for config, description in described.items():
        if description != as_description(told.get(config, {})):
            yield f"config {config!r}: what the metadata of {CARD} says of how it was made is not what is recorded"


def _targets_problems(folder: Path, record: Mapping[str, Any]) -> Iterator[str]:
    entries = [entry.get("targets") for entry in (record, *record["configs"].values()) if isinstance(entry, Mapping)]
    stored = {(str(e["path"]), str(e.get("sha256"))) for e in entries if isinstance(e, Mapping) and "path" in e}
    for path, sha256 in sorted(stored):
        try:
            if targets_sha256(MatchingTargets.from_pretrained(safe_path(folder, path))) != sha256:
                yield f"the content of the targets in {path} differs"
        except (AttributeError, OSError, TypeError, ValueError) as error:
            yield f"the targets in {path} are missing or damaged: {error}"


def _split_problems(
    folder: Path, entry: Mapping[str, Any], expected: Mapping[str, Any], drawn: Mapping[str, Any]
) -> Iterator[str]:
    features = Features.from_dict(entry["features"])
    paths = []
    for file in expected["files"]:
        try:
            path = safe_path(folder, file["path"])
        except ValueError as error:
            yield str(error)
            return
        if not path.is_file():
            yield f"{file['path']} is missing"
        elif path.stat().st_size != file["size"]:
            yield f"{file['path']} has {path.stat().st_size} bytes instead of {file['size']}"
        elif file_sha256(path) != file["sha256"]:
            yield f"the SHA-256 of {file['path']} differs"
        elif not pq.read_schema(path).remove_metadata().equals(features.arrow_schema.remove_metadata()):
            yield f"the columns of {file['path']} are not the recorded ones"
        else:
            paths.append(path)
    if len(paths) < len(expected["files"]):
        return
    dataset: Dataset = read_split(paths, features)
    for key, value in describe_split(dataset).items():
        if key == "synthetic_sha256" and key not in expected:  # which earlier versions did not record
            continue
        if value != expected.get(key):
            shown = f"{str(value)[:80]} instead of {str(expected.get(key))[:80]}"
            yield f"{key} differs: {shown}"
    if not drawn.get("changed") and (changed := changed_since(drawn, dataset)):
        yield f"the rows are not those that the record says were drawn: {changed}"
