"""What the Hub checks in the metadata of a card, as far as it matters here."""

from __future__ import annotations

import re

import yaml


LICENSES = {
    "apache-2.0",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "mit",
    "openrail",
    "other",
    "unknown",
}
SIZES = {"n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"}


def validate_card(content: str, kind: str) -> list[str]:
    """The metadata checks of the Hub, as far as they matter here; returns messages of errors."""
    match = re.match(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["Metadata must be a mapping"]
    errors = []
    licenses = data.get("license")
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name is not None and name not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}, not {name!r}')
    for key in ("tags", "task_categories", "size_categories", "source_datasets"):
        values = data.get(key)
        if values is not None and not (isinstance(values, list) and all(isinstance(v, str) and v for v in values)):
            errors.append(f'"{key}" must be a list of strings')
    if set(data.get("size_categories") or []) - SIZES:
        errors.append('"size_categories" is not known')
    for config in data.get("configs") or []:
        if not isinstance(config, dict) or not {"config_name", "data_files"} <= set(config):
            errors.append('each of "configs" needs "config_name" and "data_files"')
    for model in data.get("model-index") or []:
        for result in model.get("results", [{}]):
            metrics = result.get("metrics") or [{}]
            if not result.get("task", {}).get("type") or not {"type", "value"} <= set(metrics[0]):
                errors.append('"model-index" needs task.type and metrics of type and value')
            if not {"name", "type"} <= set(result.get("dataset") or {}):
                errors.append('"model-index" needs dataset.name and dataset.type')
    return errors
