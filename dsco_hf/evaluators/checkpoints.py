"""Checkpoints of a training: one safetensors file that is whole or absent, and a hash that tells whose it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..files import explained, reading, whole


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], *, fingerprint: str, **metadata: Any) -> None:
    """Writes tensors, the fingerprint of the run and JSON values into a file, whose folder is made.

    Raises:
        RunError: if it cannot be written.
    """
    texts = {"fingerprint": fingerprint, **{name: json.dumps(value) for name, value in metadata.items()}}
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            # clone: safetensors refuses tensors that share memory, such as tied weights.
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, texts)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata (`fingerprint`, `progress`, `scaler`) and tensors of a checkpoint.

    Raises:
        DamagedFileError: if it is truncated, or something else.
    """
    remedy = "No training can go on from it: delete it to start anew, or write to another file."
    with reading(path, remedy), safe_open(path, framework="pt") as file:
        texts = dict(file.metadata() or {})
        metadata: dict[str, Any] = {"fingerprint": texts["fingerprint"]}
        metadata |= {name: json.loads(texts[name]) for name in ("progress", "scaler")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    return metadata, tensors


def content_hash(*parts: Any) -> str:
    """A hash of settings, tensors and models, which count by their weights: what a stored result depends on."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(f"{tuple(part.shape)}{part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().numpy().data)
        elif isinstance(part, PreTrainedModel):
            digest.update(content_hash(*part.state_dict().values()).encode())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
