"""SHA-256 of models and targets: what they are, whatever they are called and wherever they came from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


_NOT_CONTENT = ("architectures", "transformers_version", "dtype", "torch_dtype")


def targets_sha256(targets: Any) -> str:
    """Content of `MatchingTargets` or `QuantileTargets`, without their provenance."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(targets):
        if field.name == "provenance" or field.name.startswith("_"):
            continue
        value = getattr(targets, field.name)
        if value is None:  # what is not there is no content: targets keep their digest when a field is added
            continue
        parts = value if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else [value]
        for part in parts:
            _update(digest, field.name, part)
    return digest.hexdigest()


def model_sha256(model: Any) -> str:
    """Content of a model or scheduler: weights and configuration, without names of files and versions."""
    digest = hashlib.sha256()
    config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_CONTENT}
    _update(digest, type(model).__name__, json.loads(json.dumps(kept, sort_keys=True, default=str)))
    if isinstance(model, torch.nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(f"\0{name} {json.dumps(value, sort_keys=True, default=dataclasses.asdict)}".encode())
