"""Checkpoints of a training: one safetensors file that is whole or absent, and the settings that tell whose it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import explained, reading, whole
from ..values import plain


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: Any) -> None:
    """Writes tensors and JSON values, the settings of the run among them, into a file, whose folder is made.

    Raises:
        RunError: if it cannot be written.
    """
    texts = {name: json.dumps(plain(value)) for name, value in metadata.items()}
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
