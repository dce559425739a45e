"""YAML and JSON files with the text of every value as it was written, besides what YAML makes of it.

YAML 1.1 reads `no` as false, `1:30` as 90, `012` as 10 and `2024-01-01` as a date. Names, and fields that are text,
are what was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Entry(NamedTuple):
    """A value of a file: what YAML makes of it, its text if it is a plain (unquoted) scalar, its items if a list."""

    value: Any
    text: str | None = None
    items: list[Entry] | None = None


def read_entries(path: Path, what: str) -> dict[str, Entry] | list[Entry] | Any:
    """Reads a file that holds a mapping or a list.

    Args:
        path (`Path`): a YAML file, or a JSON file by its ending.
        what (`str`): how errors call it, for example "config file".

    Returns:
        `dict` from keys as written, or `list`, of [`Entry`]; the value itself of a file that holds neither.

    Raises:
        ValueError: for a file that is neither, or that gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return _of_json(json.loads(text, object_pairs_hook=_distinct))
        return _of_yaml(text)
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError, _BadKeys) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
        raise ValueError(f"The {what} {path} is not valid {kind}: {error}") from error


class _BadKeys(ValueError):
    """A file gives a key twice, or one that is no scalar."""


def _of_yaml(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            if any(not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
                raise _BadKeys("a key is a list or a mapping; keys must be text.")
            return _distinct((key.value, _entry(loader, value)) for key, value in node.value)
        entry = Entry(None) if node is None else _entry(loader, node)
        return entry.value if entry.items is None else entry.items
    finally:
        loader.dispose()


def _entry(loader: yaml.SafeLoader, node: yaml.Node) -> Entry:
    if isinstance(node, yaml.SequenceNode):
        return Entry(loader.construct_object(node, deep=True), items=[_entry(loader, item) for item in node.value])
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    try:
        value = loader.construct_object(node, deep=True)
    except ValueError:  # looks like a date or a number, and is none: "2024-13-01"
        value = node.value
    return Entry(value, text=node.value if plain else None)


def _of_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_entry(item) for key, item in value.items()}
    return [_json_entry(item) for item in value] if isinstance(value, list) else value


def _json_entry(value: Any) -> Entry:
    return Entry(value, items=[_json_entry(item) for item in value] if isinstance(value, list) else None)


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _BadKeys(f"the key {key!r} occurs twice.")
        found[key] = value
    return found
