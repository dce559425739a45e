"""Which commit on the Hub a model came from. transformers does not keep it with the model, its cache does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open


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
