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
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, DatasetDict, Features

from ..concentration.config_records import ABOUT_FILES, by_config, laid_out, recorded_only
from ..concentration.config_records import to_json as to_json
from ..concentration.records import TargetsLike, joined_records, with_targets
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


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CARD, CONCENTRATION, RESULTS = "README.md", "concentration.json", "results.json"
OWN_ENTRIES = {CARD, CONCENTRATION, RESULTS, "data", "figures", "targets", ".gitattributes"}
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".webp")

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
                f"replaced as a whole. "
                "Choose another folder, or move them away."
            )


def build_concentration(
    records: Mapping[str, Mapping[str, Any]],
    described: Mapping[str, Mapping[str, Any]],
    *,
    default_config: str,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Joins what is recorded with the description of the files to the content of `concentration.json`.

    Args:
        records: Of each config, how it was made.
        described: Of each config, its features and files.
        default_config: Config that loads when none is named.
        card: What a person says about the dataset, kept for later pushes.
    """
    names = sorted(described, key=_natural)
    found = laid_out({name: records.get(name, {}) for name in names})
    about_files = {name: {k: v for k, v in described[name].items() if k in ABOUT_FILES} for name in names}
    own = found.pop("configs")
    return {
        "format_version": FORMAT_VERSION,
        **found,
        **({"card": dict(card)} if card else {}),
        "default_config": default_config,
        "configs": {name: {**own[name], **about_files[name]} for name in names},
    }


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
        figures: Images for the card; a sample grid is drawn if there is none named `samples`.
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
    checked = as_configs(configs, soft_label_top_k=soft_label_top_k)
    default = pick_default(checked, default_config)
    check_given(
        list(checked), concentration=concentration, results=results, targets=targets, card=card, figures=figures
    )
    _check_target(folder)
    readme = folder / CARD
    existing = readme.read_text(encoding="utf-8") if readme.is_file() else None
    with atomic_folder(folder) as new:
        described = write_configs(checked, new)
        records = joined_records(checked, concentration)
        records = with_targets(records, targets, new, class_names=names_of_classes(checked))
        paths = write_figures(figures, new, dataset=next(iter(checked[default].values())))
        record = build_concentration(records, described, default_config=default, card=said(card, concentration))
        write_records(new, record, card=card, results=results, figures=paths, existing_card=existing)
    return folder


def save_study_folder(
    study: Study,
    made: PlannedSets,
    folder: str | Path,
    *,
    results: Mapping[str, Any],
    source: Mapping[str, Any],
    doped: str = "doped{budget}",
    **options: Any,
) -> Path | None:
    """Writes the sets of a study that are of the first seed as they are published, with targets and discrepancies.

    Args:
        study: With its results.
        made: The sets.
        folder: To write.
        results: Of the study.
        source: Where the real images are from; None among its values is left out.
        doped: Names of the configs with real images in them.
        **options: Of [`save_dataset_folder`].

    Returns:
        The folder; `None` where the plan draws nothing.
    """
    chosen = made.plan.published(doped)
    if not chosen:
        return None
    beside, check = random_beside(study.discrepancies), made.check
    record: dict[str, Any] = {"source": {key: value for key, value in source.items() if value is not None}}
    record |= {"generator_check": check.record()} if check is not None else {}
    record["configs"] = {
        config: {"discrepancy": {"set": study.discrepancies[name], "as many random real images": beside[name]}}
        for config, name in chosen.items()
    }
    targets = {config: own for config, name in chosen.items() if (own := made.targets_of(name)) is not None}
    rows = {config: made.kept.rows(name) for config, name in chosen.items()}
    return save_dataset_folder(rows, folder, results=results, concentration=record, targets=targets or None, **options)


def names_of_classes(configs: Mapping[str, Mapping[str, Dataset]]) -> dict[str, list[str]]:
    """The class names of each config."""
    return {name: next(iter(splits.values())).features["label"].names for name, splits in configs.items()}


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
    """Joins the records of a push with those of the repository.

    Configs that are not pushed stay with all that is recorded of them. So does the record of one that is pushed
    without any, if its rows are the same.
    """
    kept = before.get("configs") or {}
    old = by_config(before)
    for name, entry in described.items():
        same = name in kept and _hashes(kept[name]) == _hashes(entry)
        old[name] = dict(records.get(name) or (old[name] if same else {}))
    names = {**kept, **described}
    if default_config is None and before.get("default_config") in names:
        default_config = before["default_config"]
    return build_concentration(old, names, default_config=pick_default(names, default_config), card=card)


def _hashes(entry: Mapping[str, Any]) -> dict[str, str]:
    return {split: info.get("rows_sha256") for split, info in (entry.get("splits") or {}).items()}


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
        (folder / RESULTS).write_text(to_json(without_places(results)), encoding="utf-8", newline="\n")
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
