"""What clients are told to do, run in their processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets

from .samples import tiny_dataset


def publish_tiny(repo_id: str, configs: dict[str, dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Publishes tiny datasets, described by the arguments of `tiny_dataset`, and returns what was done."""
    from dsco_hf.hub import push
    from dsco_hf.hub.cards import DatasetCardFields
    from dsco_hf.hub.publish import publish

    push.FIRST_WAIT = 0.02
    if "card" in options:
        options["card"] = DatasetCardFields(**options["card"])
    pushed = {field.name for field in dataclasses.fields(push.PushOptions)} & set(options)
    options["push"] = push.PushOptions(**{name: options.pop(name) for name in pushed})
    result = publish({name: tiny_dataset(**values) for name, values in configs.items()}, repo_id, **options)
    return {**vars(result), "text": str(result)}


def load(repo_id: str, *args: Any, **options: Any) -> dict[str, Any]:
    """Loads a dataset with plain `datasets` code, and also as a stream."""
    options = {"split": "train", **options}
    dataset = datasets.load_dataset(repo_id, *args, **options)
    stream = datasets.load_dataset(repo_id, *args, streaming=True, **options)
    for row, streamed in zip(dataset, stream, strict=True):
        assert row["image"].tobytes() == streamed["image"].tobytes() and row["label"] == streamed["label"]
    return {
        "rows": len(dataset),
        "columns": dataset.column_names,
        "names": dataset.features["label"].names,
        "sources": dataset.features["source"].names,
        "pixels": [row["image"].tobytes().hex() for row in dataset],
        "labels": dataset["label"][:],
    }


def verify(repo_id: str, **options: Any) -> list[str]:
    """Verifies a published dataset; returns the names of its configs."""
    from dsco_hf.hub.publish import verify as verify_published

    return list(verify_published(repo_id, **options)["configs"])
