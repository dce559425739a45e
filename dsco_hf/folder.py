"""A published dataset on disk: parquet shards per config, the card, `concentration.json`, `results.json` and figures.

`concentration.json` is what makes a published set checkable and repeatable. What the caller recorded (`method`,
`parameters`, `seed`, `source`, `generator`, `classifier`, `versions`, `cost`; each may also stand under
`configs.<name>`) is kept, and for each config this module adds its features and, per split, rows, rows per class and
per source, the SHA-256 of the rows' content and of every file. The same content gives the same bytes, so that
publishing it again changes nothing.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features

from .cards import DatasetCardFields, render_dataset_card
from .files import bring_to_disk, read_json, reading
from .markdown import merge_cards
from .records import concentration_record as concentration_record
from .records import targets_record
from .safety import safe_path
from .samples import draw_samples
from .set_records import record_of, without_paths
from .shards import (
    CONFIG_NAME,
    DatasetLike,
    as_configs,
    describe_split,
    file_sha256,
    read_split,
    rows_sha256,
    write_shards,
)
from .targets import MatchingTargets


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CARD, CONCENTRATION, RESULTS = "README.md", "concentration.json", "results.json"
OWN_ENTRIES = {CARD, CONCENTRATION, RESULTS, "data", "figures", "targets", ".gitattributes"}
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".webp")

TargetsLike = MatchingTargets | Mapping[str, MatchingTargets] | None
WRITE_AGAIN = "Download it again, or write the folder again."


def to_json(values: object) -> str:
    """Writes JSON that any reader accepts: NaN and infinity become null, NumPy numbers plain ones, paths strings."""

    def plain(value: object) -> object:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
        if isinstance(value, np.ndarray | np.generic):
            return plain(value.tolist())
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if value is None or isinstance(value, bool | int | float):
            return value
        return str(value).encode("utf-8", "replace").decode()  # without lone surrogates, which no file can hold

    return json.dumps(plain(values), indent=2, ensure_ascii=False) + "\n"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        new.chmod(0o755)
        yield new
        for entry in (*new.rglob("*"), new):
            bring_to_disk(entry)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
            folder.rename(old / "old")
            new.rename(folder)
            shutil.rmtree(old)
        else:
            new.rename(folder)
        bring_to_disk(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_target(folder: Path) -> None:
    if folder.is_file() or folder.is_symlink():
        raise FileExistsError(
            f"{folder} is a file or a link, but a folder is to be written there. Choose another path."
        )
    if folder.is_dir():
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in OWN_ENTRIES)
        if foreign:
            raise FileExistsError(
                f"{folder} holds files that no published dataset has ({', '.join(foreign[:5])}), and would be "
                f"replaced as a whole. "
                "Choose another folder, or move them away."
            )


def build_concentration(
    concentration: Mapping[str, Any] | None,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    default_config: str,
    others: Mapping[str, Any] | None = None,
    card: DatasetCardFields | None = None,
) -> dict[str, Any]:
    """Joins what the caller recorded with the description of the files to the content of `concentration.json`.

    Args:
        concentration: Records of the caller.
        configs: Description of each config written now.
        default_config: Config that loads when none is named.
        others: Configs that are in the repository already, and stay.
        card: What a person says about the dataset, kept for later pushes; what was recorded of it if `None`.
    """
    recorded = dict(concentration or {})
    if card is not None:
        recorded["card"] = {k: v for k, v in vars(card).items() if v and k != "repo_id"}
    per_config = recorded.pop("configs", None) or {}
    for key in ("format_version", "default_config"):
        recorded.pop(key, None)
    if not recorded.get("card"):
        recorded.pop("card", None)
    merged = {name: {**dict(per_config.get(name) or {}), **entry} for name, entry in configs.items()}
    return {
        "format_version": FORMAT_VERSION,
        **recorded,
        "default_config": default_config,
        "configs": dict(sorted({**(others or {}), **merged}.items(), key=lambda item: _natural(item[0]))),
    }


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"\d+|\D+", name)]


def write_configs(configs: Mapping[str, Mapping[str, Dataset]], folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the shards of all configs below `folder/data` and returns their description."""
    described = {}
    for name, splits in configs.items():
        entry: dict[str, Any] = {"features": next(iter(splits.values())).features.to_dict(), "splits": {}}
        for split, dataset in splits.items():
            paths, size = write_shards(dataset, folder / "data" / name, split=split)
            files = [
                {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": file_sha256(path)}
                for path in paths
            ]
            entry["splits"][split] = {**describe_split(dataset), "bytes": size, "files": files}
        described[name] = entry
    return described


def pick_default(configs: Mapping[str, object], default_config: str | None) -> str:
    """Returns the config that loads when none is named: the given one, `default`, or the first.

    Raises:
        ValueError: If there is no such config.
    """
    if default_config is None:
        return "default" if "default" in configs else next(iter(configs))
    if default_config not in configs:
        raise ValueError(f"default_config {default_config!r} is not one of the configs {sorted(configs)}.")
    if "default" in configs and default_config != "default":
        raise ValueError(
            f"A config named 'default' always loads by default, so default_config cannot be {default_config!r}. "
            f"Rename it."
        )
    return default_config


def save_dataset_folder(
    configs: Mapping[str, DatasetLike] | DatasetLike,
    folder: str | Path,
    *,
    default_config: str | None = None,
    card: DatasetCardFields | None = None,
    results: Mapping[str, Any] | None = None,
    concentration: Mapping[str, Any] | None = None,
    figures: Sequence[Path | str] = (),
    targets: TargetsLike = None,
) -> Path:
    """Writes a dataset as it is published: plain `load_dataset(folder, "ipc10", split="train")` reads it.

    The folder is whole or as it was before, and the same content gives the same bytes. Text that a person wrote into
    the README.md of an existing folder, outside of the marked section, is kept.

    Args:
        configs: One dataset per config name (a `DatasetDict` holds the splits of a config); a single dataset becomes
            `default`.
        folder: Folder to write; an existing published dataset there is replaced.
        default_config: Config that `load_dataset(folder)` loads; `default` or the first if `None`.
        card: What a person says about the dataset: title, licences, texts.
        results: Content of `results.json`, the source of the accuracy table.
        concentration: How the dataset was made (see the head of this file).
        figures: Images for the card; a sample grid is drawn if there is none named `samples`.
        targets: What the images were matched to, to be stored along, so that they can be made again without the data;
            one for all configs, or by config.

    Returns:
        The folder.

    Raises:
        TypeError: If a config is not a `Dataset` or `DatasetDict`.
        ValueError: If a name, a column or a default is not allowed.
        FileExistsError: If the folder holds files of something else.
    """
    folder = Path(folder)
    checked = as_configs(configs)
    default = pick_default(checked, default_config)
    _check_target(folder)
    readme = folder / CARD
    existing = readme.read_text(encoding="utf-8") if readme.is_file() else None
    with atomic_folder(folder) as new:
        described = write_configs(checked, new)
        concentration = carried_records(checked, concentration)
        concentration = with_targets(concentration, targets, new, names=list(checked))
        paths = write_figures(figures, new, dataset=next(iter(checked[default].values())))
        record = build_concentration(concentration, described, default_config=default, card=card)
        write_records(new, record, card=card, results=results, figures=paths, existing_card=existing)
    return folder


def carried_records(
    configs: Mapping[str, Mapping[str, Dataset]], given: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """What the sets themselves say they were drawn with, where no record is given; one that contradicts is refused.

    Rows that were changed, added or left out since are said to be so.

    Raises:
        ValueError: if a set was drawn with another seed or other parameters than the given record says.
    """
    carried = {name: found for name, splits in configs.items() if (found := _carried(next(iter(splits.values()))))}
    if given is None:
        if not carried:
            return None
        found = next(iter(carried.values())) if len(configs) == 1 else {"configs": carried}
        return without_paths(found)
    for name, own in carried.items():
        told = {**given, **((given.get("configs") or {}).get(name) or {})}
        mine, theirs = (entry.get("parameters") or {} for entry in (own, told))
        pairs = [("seed", own.get("seed"), told.get("seed"))]
        pairs += [
            (key, value, theirs.get(key)) for key, value in mine.items() if key != "class_labels"
        ]  # by name or id
        for key, here, there in pairs:
            if here is not None and there is not None and here != there:
                raise ValueError(
                    f"Config {name!r} says itself that it was drawn with {key}={here!r}, the given record says "
                    f"{there!r}: leave `concentration` out, and what the set says is recorded."
                )
    return without_paths(given)


def _carried(dataset: Dataset) -> dict[str, Any] | None:
    record = record_of(dataset)
    if record is None or "source" not in dataset.features:
        return record
    drawn = record.get("synthetic") or {}
    column = dataset.with_format(None)["source"][:]
    synthetic = dataset.select([row for row, source in enumerate(column) if source == 0])
    if len(synthetic) and drawn.get("rows_sha256") not in (None, rows_sha256(synthetic)):
        return {**record, "changed": "rows were changed, added or left out after they were drawn"}
    return record


def with_targets(
    concentration: Mapping[str, Any] | None, targets: TargetsLike, folder: Path, *, names: Sequence[str]
) -> Mapping[str, Any] | None:
    """Stores targets below `folder/targets`, by their content, and returns the records with their place.

    Raises:
        ValueError: If they are given for a config that is not published.
    """
    if targets is None:
        return concentration
    record = dict(concentration or {})
    if isinstance(targets, MatchingTargets):
        return {**record, "targets": _store_targets(targets, folder)}
    if unknown := sorted(set(targets) - set(names)):
        raise ValueError(f"There are targets for a config {unknown[0]!r}, but the configs are {list(names)}.")
    configs = {name: dict(entry) for name, entry in (record.get("configs") or {}).items()}
    for name, own in targets.items():
        configs[name] = {**configs.get(name, {}), "targets": _store_targets(own, folder)}
    return {**record, "configs": configs}


def _store_targets(targets: MatchingTargets, folder: Path) -> dict[str, Any]:
    record = targets_record(targets)
    path = f"targets/{record['sha256'][:12]}"
    targets.save_pretrained(folder / path)
    return {**record, "path": path}


def parse_record(text: str, name: str) -> dict[str, Any]:
    """Parses a JSON object that came from a repository.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error}). Correct or delete it there.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, but is a {type(value).__name__}. Delete it there.")
    if not isinstance(value.get("configs", {}), dict):
        raise ValueError(f"`configs` of {name} must be a JSON object. Delete the file there.")
    return value


def merged_record(
    concentration: Mapping[str, Any] | None,
    described: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Any],
    default_config: str | None,
    card: DatasetCardFields | None,
) -> dict[str, Any]:
    """Joins the records of a push with those of the configs that stay in the repository.

    What was recorded for the whole repository is written into the configs that stay wherever it no longer holds for
    all.
    """
    kept = {name: entry for name, entry in (before.get("configs") or {}).items() if name not in described}
    old = {k: v for k, v in before.items() if k not in ("configs", "format_version", "default_config", "card")}
    if concentration is None:
        # Without new records the old ones hold only for rows that are the same.
        recorded = {name: recorded_only(entry) for name, entry in (before.get("configs") or {}).items()}
        concentration = {**old, "configs": recorded} if _same_rows(before, described) else {}
    others = {
        name: {**{k: v for k, v in old.items() if concentration.get(k) != v}, **entry} for name, entry in kept.items()
    }
    names = {**others, **described}
    if default_config is None and before.get("default_config") in names:
        default_config = before["default_config"]
    return build_concentration(
        {"card": before.get("card"), **concentration},
        described,
        default_config=pick_default(names, default_config),
        others=others,
        card=card,
    )


def _same_rows(before: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]]) -> bool:
    def hashes(entry: Mapping[str, Any]) -> dict[str, str]:
        return {split: info.get("rows_sha256") for split, info in (entry.get("splits") or {}).items()}

    configs = before.get("configs") or {}
    return all(hashes(configs.get(name) or {}) == hashes(entry) for name, entry in described.items())


def write_figures(
    figures: Sequence[Path | str], folder: Path, *, dataset: Dataset | None, others: Sequence[str] = ()
) -> list[str]:
    """Copies figures to `folder/figures` and returns the paths of all figures of the card, samples first.

    Args:
        figures: Images to copy.
        folder: Folder of the published dataset.
        dataset: Dataset of which a sample grid is drawn if no figure is named `samples`; none is drawn if `None`.
        others: Paths of figures that are in the repository already.
    """
    target = folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    names = []
    for figure in map(Path, figures):
        if figure.suffix.lower() not in FIGURE_SUFFIXES or not CONFIG_NAME.fullmatch(figure.name):
            raise ValueError(
                f"{figure.name!r} cannot be a figure of the card: {', '.join(FIGURE_SUFFIXES)} files with plain "
                f"names can."
            )
        if not figure.is_file():
            raise FileNotFoundError(f"There is no figure at {figure}.")
        shutil.copyfile(figure, target / figure.name)
        names.append(figure.name)
    if dataset is not None and not any(Path(name).stem == "samples" for name in names):
        draw_samples(dataset).save(target / "samples.png")
        names.append("samples.png")
    for path in others:
        name = PurePosixPath(path).name
        if name not in names and CONFIG_NAME.fullmatch(name) and name.lower().endswith(FIGURE_SUFFIXES):
            names.append(name)
    order = ["samples", "accuracy", "features", "cost"]
    names.sort(key=lambda name: (order.index(stem) if (stem := Path(name).stem) in order else len(order), name))
    return [f"figures/{name}" for name in names]


def write_records(
    folder: Path,
    record: Mapping[str, Any],
    *,
    card: DatasetCardFields | None,
    results: Mapping[str, Any] | None,
    figures: Sequence[str],
    existing_card: str | None,
    repo_id: str | None = None,
) -> None:
    """Writes `concentration.json`, `results.json` and the card beside the shards."""
    (folder / CONCENTRATION).write_text(to_json(record), encoding="utf-8", newline="\n")
    if results is not None:
        (folder / RESULTS).write_text(to_json(results), encoding="utf-8", newline="\n")
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    record = json.loads((folder / CONCENTRATION).read_text(encoding="utf-8"))
    text = render_dataset_card(record, fields=card_fields(record, repo_id), results=results, figures=figures)
    keep = () if card and card.pretty_name else ("pretty_name",)
    (folder / CARD).write_text(merge_cards(existing_card, text, keep=keep), encoding="utf-8", newline="\n")


def card_fields(record: Mapping[str, Any], repo_id: str | None) -> DatasetCardFields:
    """Returns what a person said about the dataset, from `concentration.json`; entries of wrong type are left out."""
    recorded = record.get("card")
    kept: dict[str, Any] = {}
    for key, value in recorded.items() if isinstance(recorded, dict) else ():
        if key in ("language", "tags"):
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                kept[key] = value
        elif key in DatasetCardFields.__dataclass_fields__ and key != "repo_id" and isinstance(value, str):
            kept[key] = value
    return DatasetCardFields(**kept, repo_id=repo_id)


def read_folder(folder: str | Path) -> dict[str, Any]:
    """Reads a folder that `save_dataset_folder` wrote: `configs` and the other arguments it was called with.

    Raises:
        FileNotFoundError: If it is not such a folder, or one of its files is missing.
    """
    folder = Path(folder)
    if not (folder / CONCENTRATION).is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a published dataset: it has no {CONCENTRATION}. Write it with "
            "`save_dataset_folder`."
        )
    record = read_json(folder / CONCENTRATION, WRITE_AGAIN)
    with reading(folder / CONCENTRATION, WRITE_AGAIN):
        listed = {name: _listed(entry) for name, entry in record["configs"].items()}
        record["default_config"]
    configs: dict[str, DatasetDict] = {}
    for name, (features, files) in listed.items():
        splits = {}
        for split, names in files.items():
            paths = [safe_path(folder, path) for path in names]
            if missing := [path for path in paths if not path.is_file()]:
                raise FileNotFoundError(
                    f"{missing[0]} is missing, but {CONCENTRATION} lists it. Write the folder again."
                )
            splits[split] = read_split(paths, features)
        configs[name] = DatasetDict(splits)
    results = folder / RESULTS
    recorded = {name: recorded_only(entry) for name, entry in record["configs"].items()}
    return {
        "configs": configs,
        "default_config": record["default_config"],
        "concentration": {**record, "configs": recorded},
        "results": read_json(results, WRITE_AGAIN) if results.is_file() else None,
        "figures": sorted((folder / "figures").glob("*")),
        "targets": _read_targets(folder, record),
    }


def _listed(entry: Mapping[str, Any]) -> tuple[Features, dict[str, list[str]]]:
    """Columns and files by split of a recorded config."""
    splits = {split: [file["path"] for file in info["files"]] for split, info in entry["splits"].items()}
    return Features.from_dict(entry["features"]), splits


def _read_targets(folder: Path, record: Mapping[str, Any]) -> dict[str, MatchingTargets] | None:
    """The targets in a folder, by config."""
    found: dict[str, MatchingTargets] = {}
    for name, entry in record["configs"].items():
        place = (entry.get("targets") or record.get("targets") or {}).get("path")
        if place is not None:
            found[name] = MatchingTargets.from_pretrained(safe_path(folder, place))
    return found or None


def recorded_only(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the caller recorded of a config, without the description of its files."""
    return {key: value for key, value in entry.items() if key not in ("features", "splits")}
