"""Publishing datasets, pipelines and evaluators to the Hugging Face Hub, and checking what was published."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from datasets import Features
from datasets.info import DatasetInfosDict
from huggingface_hub import HfApi

from ..concentration.records import Records, TargetsLike
from ..data.shards import DatasetLike
from ..utils.markdown import split_card
from ..utils.processes import is_main_process
from ..utils.safety import Token, explained, is_pickle
from ..utils.values import plain_arguments
from .cards import DatasetCardFields
from .folder import CARD, CONCENTRATION, RESULTS, Content, read_folder, write_configs
from .folder import save_dataset_folder as save_dataset_folder
from .models import publish_evaluator as publish_evaluator
from .models import publish_pipeline as publish_pipeline
from .push import PublishResult, Remote, make_target, send
from .push import PushOptions as PushOptions
from .remake import fetch
from .remake import load_recorded as load_recorded
from .remake import read_concentration as read_concentration
from .verification import verify_folder


logger = logging.getLogger(__name__)

SHARD = re.compile(r"[\w.]+-\d{5}-of-\d{5}\.parquet")


@plain_arguments()
def publish(
    dataset: DatasetLike | Mapping[str, DatasetLike] | str | Path,
    repo_id: str,
    *,
    config_name: str = "default",
    default_config: str | None = None,
    card: DatasetCardFields | None = None,
    results: Mapping[str, Any] | None = None,
    concentration: Mapping[str, Any] | None = None,
    figures: Sequence[Path | str] = (),
    targets: TargetsLike = None,
    soft_label_top_k: int | None = None,
    overwrite_features: bool = False,
    push: PushOptions | None = None,
) -> PublishResult | None:
    """Publishes a concentrated dataset, with its card and its records, in one commit.

    Anybody can then call `load_dataset(repo_id)`, with a config such as `"ipc10"`, without this package. Calling it
    again with the same content commits nothing; after a cut it sends only what is missing. Other configs of the
    repository, and what a person wrote into its README.md outside of the marked section, stay.

    Args:
        dataset: A `Dataset`, a `DatasetDict` of splits, a dict of configs (`{"ipc1": ..., "ipc10": ...}`), or a folder
            that `save_dataset_folder` wrote.
        repo_id: `"user/name"`; your own name is put before a bare `"name"`.
        config_name: Name of the config if `dataset` is a single one.
        default_config: Config that loads when none is named; the repository's, `default` or the first if `None`.
        card: What a person says about the dataset: title, licences, texts.
        results: Content of `results.json`, the source of the accuracy table; the repository's stays if `None`.
        concentration: How the dataset was made (see `dsco_hf.hub.folder`), joined with what the sets carry; the
            repository's records stay if nothing is known and the rows are the same.
        figures: Images for the card, and pages as of [`look`], which it links; a sample grid is drawn if there is
            none named `samples`.
        targets: What the images were matched to, to be sent along, so that anybody can make them again without the
            data; one for all configs, or by config.
        soft_label_top_k: Keep this many classes of each soft label; all of them, in half precision, if `None`.
        overwrite_features: Whether a config may get other columns or class names than it has in the repository.
        push: Token, branch or pull request, message, dry run and the like: `PushOptions(dry_run=True)`.

    Returns:
        What was sent; `None` on all processes but the main one of a multi-process launch, which do nothing.

    Raises:
        TypeError: If `dataset` is of another type.
        ValueError: If the dataset, a name, the repository's metadata or its features do not fit, the record
            contradicts what a set carries, or the targets are not those that it was drawn for.
        PermissionError: If the token is missing, not valid, or may not write.
        FileNotFoundError: If the repository or revision cannot be seen.
        ConnectionError: If the Hub cannot be reached, or kept refusing.
    """
    if not is_main_process():
        return None
    given: dict[str, Any] = {"default_config": default_config, "card": card, "results": results, "figures": figures}
    given |= {"concentration": concentration, "targets": targets}
    if isinstance(dataset, str | Path):
        stored = read_folder(dataset)
        dataset = stored.pop("configs")
        given |= {name: value for name, value in stored.items() if not given[name]}
    content = Content.of(dataset, config_name=config_name, soft_label_top_k=soft_label_top_k, **given)
    _warn_of_local_parts(content.records)
    push = push or PushOptions()
    with explained(repo_id, token=push.token, action="publish to"), tempfile.TemporaryDirectory() as scratch:
        target = make_target(repo_id, "dataset", push)
        described = write_configs(content.configs, Path(scratch))

        def prepare(folder: Path, remote: Remote) -> list[str]:
            if not overwrite_features:
                _check_features(remote, content.configs, target.repo_id)
            content.write(folder, remote, described, target.repo_id)
            return _stale_shards(remote, content.configs, folder)

        return send(target, Path(scratch), prepare, f"Publish {', '.join(content.configs)} with dsco_hf")


def _warn_of_local_parts(records: Records) -> None:
    for part in ("generator", "classifier"):
        entries = [entry for record in records.values() if isinstance(entry := record.get(part), Mapping)]
        for name in dict.fromkeys(entry["folder"] for entry in entries if entry.get("folder")):
            logger.warning(
                "The %s is recorded as a folder %r of this machine, which nobody else can load. "
                "Publish it (`publish_pipeline`, `publish_evaluator`) and record its id, so that others can make the "
                "images again.",
                part,
                name,
            )


def _check_features(remote: Remote, configs: Mapping[str, Mapping[str, Any]], repo_id: str) -> None:
    metadata, _ = split_card(remote.read(CARD) or "")
    if not metadata.get("dataset_info"):
        return
    infos = DatasetInfosDict.from_dataset_card_data(huggingface_hub.DatasetCardData(**metadata))
    for name, splits in configs.items():
        if name not in infos or infos[name].features is None:
            continue
        there, here = infos[name].features, next(iter(splits.values())).features
        different = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
        if different:
            column = different[0]
            raise ValueError(
                f"Config {name!r} of {repo_id} has other features than this dataset: {', '.join(different)} differ "
                f"(there {_short(there, column)}, here {_short(here, column)}). Publish it under another config name "
                "or repository, or pass overwrite_features=True if those who load it can bear the change."
            )


def _short(features: Features, column: str) -> str:
    text = repr(features.get(column, "no such column"))
    return text if len(text) <= 200 else text[:199] + "…"


def _stale_shards(remote: Remote, configs: Mapping[str, object], folder: Path) -> list[str]:
    """Shards of the configs published now that are no longer theirs, also where `Dataset.push_to_hub` had put them."""
    metadata, _ = split_card(remote.read(CARD) or "")
    patterns: list[object] = []
    for entry in metadata.get("configs") or []:
        if isinstance(entry, dict) and entry.get("config_name", "default") in configs:
            files = entry.get("data_files")
            for file in files if isinstance(files, list) else [files]:
                pattern = file.get("path") if isinstance(file, dict) else file
                patterns += pattern if isinstance(pattern, list) else [pattern]
    shards = [path for path in remote.files if SHARD.fullmatch(path.rpartition("/")[2])]
    theirs = {path for path in shards for pattern in patterns if isinstance(pattern, str) and fnmatch(path, pattern)}
    theirs |= {path for path in shards if path.rpartition("/")[0] in {f"data/{config}" for config in configs}}
    return [path for path in shards if path in theirs and not (folder / path).is_file()]


def verify(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Checks that a published dataset is what its `concentration.json` says: schema, counts, hashes of files and rows.

    Args:
        repo_or_folder: `"user/name"`, or the folder of a published dataset.
        revision: Branch, tag or commit of the repository.
        token: Token for a private repository.
        cache_dir: Where to keep the download; the usual cache if `None`.

    Returns:
        The content of `concentration.json`.

    Raises:
        FileNotFoundError: If there is no such repository, revision or folder, or it has no `concentration.json`.
        PermissionError: If it is gated or the token is not valid.
        ValueError: If something differs; the message lists all of it.
        ConnectionError: If the Hub cannot be reached.
    """
    name, here = str(repo_or_folder), Path(repo_or_folder).is_dir()
    patterns = [CARD, CONCENTRATION, RESULTS, "*.parquet", "targets/*"]
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir, "action": "check"}
    folder = fetch(repo_or_folder, patterns, **options)
    # The names are enough to refuse pickle files; they are not downloaded.
    if not here and not huggingface_hub.constants.HF_HUB_OFFLINE:
        with explained(name, token=token, action="check"):
            api = HfApi(token=token, library_name="dsco_hf")
            listed = api.list_repo_files(name, repo_type="dataset", revision=folder.name)
        if pickles := [path for path in listed if is_pickle(path)]:
            raise ValueError(
                f"{name} holds a pickle file, {pickles[0]}, which can run code when loaded. Do not trust it."
            )
    return verify_folder(folder, name=name)
