"""Checkpoints of a training: one safetensors file that is whole or absent, and the settings that tell whose it is."""

from __future__ import annotations

import dataclasses
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
from ..values import plain


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: Any) -> None:
    """Writes tensors and JSON values, the settings of the run among them, into a file, whose folder is made.

    Raises:
        RunError: if it cannot be written.
    """
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            # clone: safetensors refuses tensors that share memory, such as tied weights.
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, texts)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata (`settings`, `progress`, `scaler`) and tensors of a checkpoint.

    Raises:
        DamagedFileError: if it is truncated, or something else.
    """
    remedy = "No training can go on from it: delete it to start anew, or write to another file."
    with reading(path, remedy), safe_open(path, framework="pt") as file:
        texts = dict(file.metadata() or {})
        metadata = {name: json.loads(texts[name]) for name in ("settings", "progress", "scaler")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    return metadata, tensors


def settings_of(**parts: Any) -> dict[str, Any]:
    """All that a result depends on, by name, as JSON values.

    Args:
        parts: fields of dataclasses and entries of mappings go by their own names; tensors and models by a hash of
            their content.
    """
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            found |= dataclasses.asdict(part)
        elif isinstance(part, Mapping):
            found |= part
        elif isinstance(part, torch.Tensor | PreTrainedModel):
            found[name] = content_hash(part)[:16]
        else:
            found[name] = part
    return json.loads(json.dumps(plain(found), default=repr))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, with both values: "learning_rate: 0.1 there, 0.2 now"; "" if none does."""
    differing = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    texts = [f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} now" for name in differing]
    return "; ".join(texts[:10]) + "; …" * (len(texts) > 10)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
