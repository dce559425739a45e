"""Where a model or dataset came from, as others may read it: repository and commit, but no place on a machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .paths import looks_like_path


_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})(?:[/\\](?P<part>\w+))?")
_OUTSIDE = re.compile(
    r"(?:file://|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)"
)  # how a path that is none of a repository begins
# Folders at the root of usual machines: class names such as OpenImages' "/m/01g317" are no paths.
_ROOTS = set(
    "Users content data gpfs home kaggle lustre media mnt nfs opt private root scratch srv tmp var work".split()
)


def commit_of(model: Any) -> str | None:
    """The commit that a model of transformers was loaded from, told from the Hub's cache.

    Args:
        model (`PreTrainedModel`): as it was loaded: `name_or_path` is its repository.

    Returns:
        `str`: 40 hexadecimal digits; None for a model from a folder, one whose weights no cached commit has (it was
            trained since, or cached elsewhere), or one that several commits have, unless one of them is the newest.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    found = [folder.name for folder in sorted((repository / "snapshots").glob("*")) if _has_weights_of(folder, model)]
    newest = repository / "refs" / "main"
    if len(found) > 1 and newest.is_file():
        found = [commit for commit in found if commit == newest.read_text(encoding="utf-8").strip()]
    return found[0] if len(found) == 1 else None


def _has_weights_of(folder: Path, model: Any) -> bool:
    """Whether a snapshot holds the model's weights."""
    tensors, seen = dict(model.state_dict()), 0
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as content:
                for name in set(content.keys()) & set(tensors):
                    mine, stored = tensors[name].detach().cpu(), content.get_tensor(name)
                    if mine.shape != stored.shape or not torch.equal(mine, stored.to(mine.dtype)):
                        return False
                    seen += 1
        except (OSError, SafetensorError):
            return False
    return seen > 0


def published_origin(name: str | Path | None) -> dict[str, str]:
    """Where a model or dataset came from, as others may read it: `id` of a repository, or the own name of a `folder`.

    Where a folder lies says who its user is and how the machine is built, and nobody else can use it.
    """
    text = str(name or "")
    if not text:
        return {}
    path = Path(text).expanduser()
    if path.is_absolute() or path.exists() or looks_like_path(text):
        return {"folder": re.split(r"[\\/]", str(path.resolve()))[-1]}
    return {"id": text}


def cached_origin(path: str) -> dict[str, Any] | None:
    """Repository, commit and subfolder of a model that was loaded from the Hub's cache, told from its path."""
    match = _SNAPSHOT.search(path)
    if match is None:
        return None
    origin = {"id": match["id"].replace("--", "/", 1), "revision": match["revision"], "subfolder": match["part"]}
    return {key: value for key, value in origin.items() if value is not None}


def without_places(value: Any) -> Any:
    """Plain values with the own name of a folder or file in place of where it lies on a machine.

    Texts that are a path from the root, the home or the working folder are shortened; of one into the Hub's cache the
    id of the repository is left. A model's configuration loses the name that it was loaded by, if that is a path.
    """
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not (key == "_name_or_path" and _only_here(item))}
        return {key: without_places(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str) or not _is_place(text):
        return text
    return str((cached_origin(text) or {}).get("id") or re.split(r"[\\/]", text.rstrip("\\/"))[-1])


def _is_place(text: str) -> bool:
    if len(text.splitlines()) != 1 or re.search(r"[\\/].", text) is None:
        return False
    root = text.split("/")[1] if text.startswith("/") else ""
    return _OUTSIDE.match(text) is not None or (root != "" and (root in _ROOTS or Path(f"/{root}").is_dir()))


def _only_here(name: Any) -> bool:
    """Whether this is a place that the Hub's cache does not know as a repository's."""
    return isinstance(name, str) and "folder" in published_origin(name) and cached_origin(name) is None
