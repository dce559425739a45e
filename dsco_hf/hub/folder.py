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
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, DatasetDict, Features

from ..concentration.config_records import ABOUT_FILES, by_config, laid_out, recorded_only
from ..concentration.config_records import to_json as to_json
from ..concentration.records import Records, TargetsLike, joined_records, with_targets
from ..concentration.records import concentration_record as concentration_record
from ..data.images import draw_samples
from ..data.shards import CONFIG_NAME, DatasetLike, as_configs, describe_split, file_sha256, read_split, write_shards
from ..matching.targets import MatchingTargets
from ..studies.plans import PlannedSets
from ..studies.study import Study, random_beside
from ..utils.files import bring_to_disk, read_json, reading
from ..utils.markdown import merge_cards
from ..utils.origins import without_places
from ..utils.safety import safe_path
from .cards import DatasetCardFields, render_dataset_card
from .given import check_given
from .push import NOTHING, Remote


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CARD, CONCENTRATION, RESULTS = "README.md", "concentration.json", "results.json"
OWN_ENTRIES = {CARD, CONCENTRATION, RESULTS, "data", "figures", "targets", ".gitattributes"}
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".webp", ".html")

WRITE_AGAIN = "Download it again, or write the folder again."


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
                "replaced as a whole. Choose another folder, or move them away."
            )


def said(card: DatasetCardFields | None, recorded: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a person says about the dataset, or said when it was written before."""
    if card is not None:
        return {key: value for key, value in vars(card).items() if value and key != "repo_id"}
    return dict(kept) if isinstance(kept := (recorded or {}).get("card"), Mapping) else None


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
            "Rename it."
        )
    return default_config


@dataclass(frozen=True)
class Content:
    """All that is written of a dataset, in a folder or a repository; arguments as of [`save_dataset_folder`]."""

    configs: dict[str, dict[str, Dataset]]
    records: Records
    default_config: str | None
    said: Mapping[str, Any] | None
    card: DatasetCardFields | None
    results: Mapping[str, Any] | None
    figures: Sequence[Path | str]
    targets: TargetsLike

    @classmethod
    def of(
        cls,
        dataset: object,
        *,
        config_name: str = "default",
        soft_label_top_k: int | None,
        default_config: str | None,
        concentration: Mapping[str, Any] | None,
        card: DatasetCardFields | None,
        results: Mapping[str, Any] | None,
        figures: Sequence[Path | str],
        targets: TargetsLike,
    ) -> Content:
        """What is given, checked before anything is written."""
        configs = as_configs(dataset, config_name=config_name, soft_label_top_k=soft_label_top_k)
        check_given(
            list(configs), concentration=concentration, results=results, targets=targets, card=card, figures=figures
        )
        records, told = joined_records(configs, concentration), said(card, concentration)
        return cls(configs, records, default_config, told, card, results, figures, targets)

    def write(
        self, folder: Path, before: Remote, described: Mapping[str, Mapping[str, Any]], repo_id: str | None = None
    ) -> None:
        """Writes records, targets, figures and the card beside the shards, joined with what was there before."""
        there = _read_json(before, CONCENTRATION)
        names = {name: next(iter(splits.values())).features["label"].names for name, splits in self.configs.items()}
        records = with_targets(self.records, self.targets, folder, class_names=names)
        kept = self.said if self.said is not None else said(None, there)
        record = merged_record(records, described, there or {}, self.default_config, kept)
        shown = self.configs.get(record["default_config"])
        if shown is None and not any(path.startswith("figures/samples.") for path in before.files):
            shown = next(iter(self.configs.values()))
        others = [path for path in before.files if path.startswith("figures/")]
        sampled = next(iter(shown.values())) if shown else None
        figures = write_figures(self.figures, folder, dataset=sampled, others=others)
        results = self.results if self.results is not None else _read_json(before, RESULTS)
        if results is not None:
            results = _write_json(folder / RESULTS, without_places(results))
        record = _write_json(folder / CONCENTRATION, record)
        text = render_dataset_card(record, fields=card_fields(record, repo_id), results=results, figures=figures)
        keep = () if self.card and self.card.pretty_name else ("pretty_name",)
        (folder / CARD).write_text(merge_cards(before.read(CARD), text, keep=keep), encoding="utf-8", newline="\n")


def _read_json(remote: Remote, path: str) -> dict[str, Any] | None:
    text = remote.read(path)
    return None if text is None else parse_record(text, f"{path} of the repository")


def _write_json(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Writes values, and gives them back as they will be read."""
    path.write_text(text := to_json(values), encoding="utf-8", newline="\n")
    return json.loads(text)


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
    soft_label_top_k: int | None = None,
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
        concentration: How the dataset was made (see the head of this file), joined with what the sets carry.
        figures: Images for the card, and pages as of [`look`], which it links; a sample grid is drawn if there is
            none named `samples`.
        targets: What the images were matched to, to be stored along, so that they can be made again without the data;
            one for all configs, or by config.
        soft_label_top_k: Keep this many classes of each soft label; all of them, in half precision, if `None`.

    Returns:
        The folder.

    Raises:
        TypeError: If a config is not a `Dataset` or `DatasetDict`, or an argument is of another kind.
        ValueError: If a name, a column, a default or an entry of a record is not allowed, the record contradicts
            what a set carries, or the targets are not those that it was drawn for.
        FileExistsError: If the folder holds files of something else.
    """
    folder = Path(folder)
    content = Content.of(
        configs, soft_label_top_k=soft_label_top_k, default_config=default_config, concentration=concentration,
        card=card, results=results, figures=figures, targets=targets,
    )  # fmt: skip
    pick_default(content.configs, default_config)
    _check_target(folder)
    existing = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None
    with atomic_folder(folder) as new:
        content.write(new, replace(NOTHING, read={CARD: existing}.get), write_configs(content.configs, new))
    return folder


def save_study_folder(
    study: Study,
    made: PlannedSets,
    folder: str | Path,
    *,
    results: Mapping[str, Any],
    source: Mapping[str, Any],
    doped: str = "doped{budget}",
    card: DatasetCardFields | None = None,
    figures: Sequence[Path | str] = (),
    default_config: str | None = None,
) -> Path | None:
    """Writes the sets of a study that are of the first seed as they are published, with targets and discrepancies.

    Arguments as for [`save_dataset_folder`]; None among the values of `source` is left out, `doped` names the configs
    with real images in them. The folder is returned unless the plan draws nothing.
    """
    chosen = made.plan.published(doped)
    if not chosen:
        return None
    beside, check = random_beside(study.discrepancies), made.check
    record: dict[str, Any] = {"source": {key: value for key, value in source.items() if value is not None}}
    record |= {"generator_check": check.record()} if check is not None else {}
    each = {name: found.discrepancy for name, found in study.measured.items()}
    record["configs"] = {
        config: {"discrepancy": {
            "set": study.discrepancies[name], "as many random real images": beside[name], "by class": each[name],
            "random by class": {
                label: random_beside({of: values[label] for of, values in each.items() if label in values})[name]
                for label in each[name]
            },
        }}
        for config, name in chosen.items()
    }  # fmt: skip
    targets = {config: own for config, name in chosen.items() if (own := made.targets_of(name)) is not None}
    rows = {config: made.kept.rows(name) for config, name in chosen.items()}
    return save_dataset_folder(
        rows, folder, default_config=default_config, card=card, results=results, concentration=record,
        figures=figures, targets=targets or None,
    )  # fmt: skip


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
    records: Mapping[str, Mapping[str, Any]],
    described: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Any],
    default_config: str | None,
    card: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of `concentration.json`: what is recorded and the description of the files, over what was there.

    Configs that are not written stay with all that is recorded of them. So does the record of one that is written
    without any, if its rows are the same. `described` has the features and files of those that are.
    """
    kept = before.get("configs") or {}
    old = by_config(before)
    for name, entry in described.items():
        same = name in kept and _hashes(kept[name]) == _hashes(entry)
        old[name] = dict(records.get(name) or (old[name] if same else {}))
    names = {**kept, **described}
    if default_config is None and before.get("default_config") in names:
        default_config = before["default_config"]
    default = pick_default(names, default_config)
    names = dict(sorted(names.items(), key=lambda item: _natural(item[0])))
    found = laid_out({name: old.get(name, {}) for name in names})
    own = found.pop("configs")
    files = {name: {k: v for k, v in entry.items() if k in ABOUT_FILES} for name, entry in names.items()}
    return {
        "format_version": FORMAT_VERSION,
        **found,
        **({"card": dict(card)} if card else {}),
        "default_config": default,
        "configs": {name: {**own[name], **files[name]} for name in names},
    }


def _hashes(entry: Mapping[str, Any]) -> dict[str, str]:
    return {split: info.get("rows_sha256") for split, info in (entry.get("splits") or {}).items()}


def write_figures(
    figures: Sequence[Path | str], folder: Path, *, dataset: Dataset | None, others: Sequence[str] = ()
) -> list[str]:
    """Copies figures to `folder/figures` and returns the paths of all figures of the card, samples first.

    Of `dataset` a sample grid is drawn if no figure is named `samples`; `others` are in the repository already.
    """
    target = folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    names = []
    for figure in map(Path, figures):
        if figure.suffix.lower() not in FIGURE_SUFFIXES or not CONFIG_NAME.fullmatch(figure.name):
            allowed = ", ".join(FIGURE_SUFFIXES)
            raise ValueError(f"{figure.name!r} cannot be a figure of the card: {allowed} files with plain names can.")
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


def card_fields(record: Mapping[str, Any], repo_id: str | None) -> DatasetCardFields:
    """Returns what a person said about the dataset, from `concentration.json`; entries of wrong type are left out."""
    recorded = record.get("card")
    kept: dict[str, Any] = {}
    for key, value in recorded.items() if isinstance(recorded, dict) else ():
        parts = value if key in ("language", "tags") else [value]
        if key in DatasetCardFields.__dataclass_fields__ and key != "repo_id" and isinstance(parts, list):
            kept |= {key: value} if all(isinstance(part, str) for part in parts) else {}
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
        listed = {
            name: {split: [file["path"] for file in info["files"]] for split, info in entry["splits"].items()}
            for name, entry in record["configs"].items()
        }
        columns = {name: Features.from_dict(entry["features"]) for name, entry in record["configs"].items()}
        record["default_config"]
    configs: dict[str, DatasetDict] = {}
    for name, files in listed.items():
        splits = {}
        for split, names in files.items():
            paths = [safe_path(folder, path) for path in names]
            if missing := [path for path in paths if not path.is_file()]:
                raise FileNotFoundError(
                    f"{missing[0]} is missing, but {CONCENTRATION} lists it. Write the folder again."
                )
            splits[split] = read_split(paths, columns[name])
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


def _read_targets(folder: Path, record: Mapping[str, Any]) -> dict[str, MatchingTargets] | None:
    """The targets in a folder, by config."""
    found: dict[str, MatchingTargets] = {}
    for name, entry in record["configs"].items():
        place = (entry.get("targets") or record.get("targets") or {}).get("path")
        if place is not None:
            found[name] = MatchingTargets.from_pretrained(safe_path(folder, place))
    return found or None
