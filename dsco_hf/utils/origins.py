"""Where a model or dataset came from, as others may read it: repository and commit, but no place on a machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib import metadata
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .files import looks_like_path
from .values import Choice, plain


if TYPE_CHECKING:
    from _hashlib import HASH

    from _typeshed import DataclassInstance
    from diffusers import DiffusionPipeline

_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})(?:[/\\](?P<part>\w+))?")
_OUTSIDE = re.compile(
    r"(?:file://|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)"
)  # how a path that is none of a repository begins
# Folders at the root of usual machines: class names such as OpenImages' "/m/01g317" are no paths.
_ROOTS = set(
    "Users content data gpfs home kaggle lustre media mnt nfs opt private root scratch srv tmp var work".split()
)


def commit_of(model: torch.nn.Module) -> str | None:
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


def _has_weights_of(folder: Path, model: torch.nn.Module) -> bool:
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


def without_places(value: object) -> Any:
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


def _only_here(name: object) -> bool:
    """Whether this is a place that the Hub's cache does not know as a repository's."""
    return isinstance(name, str) and "folder" in published_origin(name) and cached_origin(name) is None


_NOT_CONTENT = ("architectures", "transformers_version", "dtype", "torch_dtype")
LIBRARIES = ("dsco_hf", "torch", "diffusers", "transformers", "pillow")  # whose versions can change the numbers


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of the libraries that compute: other ones may draw, train and decode otherwise."""
    return {name: found for name in libraries if (found := _version(name)) is not None}


@functools.cache
def _version(name: str) -> str | None:
    """Kept: to look it up takes as long as a step of a small network."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a checkout
        return None


def fingerprint(*parts: object, **named: object) -> str:
    """SHA-256, in hexadecimal, of values of any kind: what a result that is kept depends on.

    Tensors and arrays count by type, shape and content; models, schedulers and pipelines by weights and configuration;
    targets by content without provenance; dataclasses by their public fields; mappings (in any order), sequences and
    plain values by what is in them. A whole number is the same as an `int` and as a `float`.

    Raises:
        TypeError: for anything else, as it could not be told from another one of its kind.
    """
    digest = hashlib.sha256()
    _take(digest, [list(parts), named])
    return digest.hexdigest()


def identity(**parts: object) -> dict[str, Any]:
    """All that decides a result, by name, to be kept beside it as JSON.

    Plain values stay as they are, so that a difference can be told in words; all else is its [`fingerprint`], of which
    16 digits are kept. A pipeline becomes its components by name, a dataclass its fields.
    """
    return {str(name): _told(value) for name, value in parts.items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What differs between two identities: `[old, new]` by path, such as `models.classifier`; None if there is none.

    Args:
        before: as it was kept.
        now: as it would be made.
    """
    old, new = (flat(json.loads(json.dumps(plain(values)))) for values in (before, now))
    return {key: [old.get(key), new.get(key)] for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)}


def in_words(differing: Mapping[str, Sequence[Any]]) -> str:
    """Up to ten of the differences, for an error: "seed: 0 there, 1 now; …"."""
    told = [f"{key}: {_short(old)} there, {_short(new)} now" for key, (old, new) in list(differing.items())[:10]]
    return "; ".join(told) + (f"; and {len(differing) - 10} more" if len(differing) > 10 else "")


def flat(values: object, name: str = "") -> dict[str, Any]:
    """Nested values by their path, such as `options.eta` or `class_names.3`."""
    if not isinstance(values, Mapping | list) or not values:
        return {name: values}
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    return {k: v for key, value in items for k, v in flat(value, f"{name}.{key}" if name else str(key)).items()}


def targets_sha256(targets: DataclassInstance) -> str:
    """Content of targets of any class, without their provenance."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(targets):
        if field.name == "provenance" or field.name.startswith("_"):
            continue
        value = getattr(targets, field.name)
        if value is None:  # what is not there is no content: targets keep their digest when a field is added
            continue
        if isinstance(value, Mapping) and all(isinstance(part, torch.Tensor) for part in value.values()):
            value = [part for _, part in sorted(value.items())]
        elif isinstance(value, Mapping) and any(map(dataclasses.is_dataclass, value.values())):
            value = {name: targets_sha256(part) for name, part in sorted(value.items())}  # targets of several parts
        parts = value if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else [value]
        for part in parts:
            _update(digest, field.name, part)
    return digest.hexdigest()


def model_sha256(model: object) -> str:
    """Content of a model or scheduler: weights and configuration, without names of files and versions."""
    digest = hashlib.sha256()
    config = getattr(model, "config", {})
    config = config if isinstance(config, Mapping) else config.to_dict()
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_CONTENT}
    _update(digest, type(model).__name__, json.loads(json.dumps(kept, sort_keys=True, default=str)))
    if isinstance(model, torch.nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            _update(digest, name, tensor)
    return digest.hexdigest()


def components_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The models and the scheduler that images depend on, by name, and the names of the classes."""
    beside = getattr(pipe, "only_prepares", ())
    found = {
        name: part for name, part in sorted(pipe.components.items()) if hasattr(part, "config") and name not in beside
    }
    size = getattr(getattr(pipe, "config", None), "image_size", None)
    found |= {} if size is None else {"image_size": size}
    return {**found, "classes": {str(label): name for label, name in (getattr(pipe, "id2label", None) or {}).items()}}


def _update(digest: HASH, name: str, value: object) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(f"\0{name} {json.dumps(value, sort_keys=True, default=_as_record)}".encode())


def _as_record(value: DataclassInstance) -> object:
    """A dataclass as JSON values; by its own account if it has one, which stays the same when it gets a new field."""
    return value.as_record() if hasattr(value, "as_record") else dataclasses.asdict(value)


def _take(digest: HASH, value: object) -> None:
    """Adds a value to a digest; what is added first says what kind it is and how long."""
    if isinstance(value, torch.Tensor):
        return _update(digest, "tensor", value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"\0array {value.dtype.str} {value.shape} ".encode())
        return digest.update(np.ascontiguousarray(value).tobytes())
    if hasattr(value, "components") and hasattr(value, "save_pretrained"):
        return _take(digest, components_of(value))
    if isinstance(value, torch.nn.Module) or hasattr(value, "config"):
        return digest.update(f"\0model {model_sha256(value)}".encode())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "provenance"):
            return digest.update(f"\0targets {targets_sha256(value)}".encode())
        digest.update(f"\0{type(value).__name__}".encode())
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return _take(digest, {name: getattr(value, name) for name in names})
    if isinstance(value, Mapping):
        digest.update(f"\0mapping {len(value)}".encode())
        for key in sorted(value, key=lambda key: (str(key), type(key).__name__)):
            _take(digest, key)
            _take(digest, value[key])
        return None
    if isinstance(value, AbstractSet):
        return _take(digest, ["set", *sorted(fingerprint(item) for item in value)])
    if isinstance(value, list | tuple | range):
        digest.update(f"\0list {len(value)}".encode())
        for item in value:
            _take(digest, item)
        return None
    if isinstance(value, bytes):
        digest.update(f"\0bytes {len(value)} ".encode())
        return digest.update(value)
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, bool | int | float | str | PurePath | torch.dtype | torch.device):
        text = str(value) if isinstance(value, str | PurePath) else repr(value)
        kind = "text" if isinstance(value, str | PurePath) else "value"
        return digest.update(f"\0{kind} {len(text)} ".encode() + text.encode("utf-8", "surrogatepass"))
    raise TypeError(
        f"A {type(value).__name__} cannot be told from another one: give what it depends on as numbers, text, "
        "tensors, models, dataclasses, lists or mappings."
    )


def _told(value: object) -> object:
    """A value of an identity as JSON."""
    if hasattr(value, "components") and hasattr(value, "save_pretrained"):
        value = components_of(value)
    if isinstance(value, Choice):
        return value.as_record()
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "provenance"):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name[0] != "_"}
    if isinstance(value, Mapping):
        return {str(key): _told(item) for key, item in value.items()}
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, list | tuple) and all(_is_plain(item) for item in value):
        return list(value)
    return value if _is_plain(value) else fingerprint(value)[:16]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
