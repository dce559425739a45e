"""Markdown made safe: escaping, templates, and the marked section of a README.md that is ours to replace.

Everything that comes from outside (class names, ids, parameters, texts) is escaped on its way into Markdown: a
template can only print a raw string that was marked `Trusted`. Metadata goes through a YAML writer, never through a
template.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub.utils import yaml_dump


logger = logging.getLogger(__name__)

BEGIN_MARK = "<!-- dsco_hf:begin (text outside of these two marks is kept when the dataset is published again) -->"
END_MARK = "<!-- dsco_hf:end -->"
MARKED_SECTION = re.compile(r"<!-- dsco_hf:begin\b[^>]*-->.*?<!-- dsco_hf:end -->", re.DOTALL)
LONE_MARK = re.compile(r"<!-- dsco_hf:(begin|end)\b[^>]*-->")
# The Hub's own rule for the metadata block at the top of a README.md.
FRONT_MATTER = re.compile(r"^\s*---[ \t]*\r?\n(?P<yaml>.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


class Trusted(str):
    """Markdown made here, which a template may print unescaped."""


def inert(text: str) -> str:
    """A text without control, format (bidirectional overrides, zero-width) and surrogate characters."""
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def escape_markdown(text: object, *, max_length: int = 120) -> str:
    """Returns `text` as one line of inert Markdown: no link, HTML, mention, table cell or heading starts in it.

    Args:
        text: Anything; it is converted by `str`.
        max_length: Characters kept, before escaping; the rest becomes an ellipsis.
    """
    line = inert(" ".join(str(text).split()))
    if len(line) > max_length:
        line = line[: max_length - 1] + "…"
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    # GitHub-flavoured Markdown turns bare addresses into links.
    line = line.replace("://", ":&#47;&#47;").replace("javascript:", "javascript&#58;")
    line = re.sub(r"(?i)\bwww\.", lambda match: match.group()[:-1] + "&#46;", line)
    return re.sub(r"^([#+\-=:!])", r"\\\1", line)


def _finalize(value: object) -> str:
    return value if isinstance(value, Trusted) else escape_markdown(value, max_length=4000)


def render(template: str, **values: object) -> str:
    """Fills a template of `dsco_hf/hub/templates`; every value that is not `Trusted` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "hub" / "templates"),
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def format_number(value: object, *, digits: int = 2, scale: float = 1.0) -> str:
    """Formats a number for a table; `–` for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if isinstance(value, int) and scale == 1:
        return f"{value:,}"
    value = value * scale
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10**-digits else f"{value:.2g}"


def parameter_rows(values: object, prefix: str = "") -> list[tuple[str, str]]:
    """Flattens nested parameters to (dotted name, short text) rows."""
    if not isinstance(values, Mapping):
        return []
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += parameter_rows(value, f"{name}.")
        elif value is not None:
            rows.append((name, escape_id(value)))
    return [(Trusted(escape_markdown(k)), Trusted(v)) for k, v in rows] if not prefix else rows


def last_part(path: str) -> str:
    """Returns the last part of a path or repository id."""
    return re.split(r"[\\/]", path.rstrip("/\\"))[-1]


def escape_id(value: object) -> str:
    """Escapes an identifier; of an absolute local path only the last part is shown."""
    text = str(value)
    if isinstance(value, str) and (text.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", text)):
        text = f"{last_part(text)} (a local folder)"
    return escape_markdown(text)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Splits a README.md into its YAML metadata and its body.

    Raises:
        ValueError: If the metadata block is not valid YAML, or not a mapping.
    """
    match = FRONT_MATTER.match(text.removeprefix("\ufeff"))
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match["yaml"])
    except yaml.YAMLError as error:
        raise ValueError(
            f"The metadata block at the top of the README.md is not valid YAML ({' '.join(str(error).split())}). "
            f"Correct it, or "
            "remove the block: it is made anew."
        ) from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(
            f"The metadata block of the README.md must be a mapping, but is a {type(metadata).__name__}. Remove it."
        )
    return metadata or {}, text.removeprefix("\ufeff")[match.end() :]


def join_card(metadata: Mapping[str, Any], body: str) -> str:
    """Joins metadata and body to the text of a README.md."""
    return f"---\n{yaml_dump(dict(metadata), sort_keys=False)}---\n\n{body.lstrip()}"


def merge_cards(existing: str | None, new: str, *, keep: Iterable[str] = ("pretty_name",)) -> str:
    """Puts a new card into an existing README.md: what a person wrote outside of the marked section stays as it is.

    Args:
        existing: README.md of the repository, or `None`.
        new: Card rendered here, with its marked section.
        keep: Metadata keys for which the existing value wins. Tags and languages are united, configs are replaced by
            name; an `unknown` licence never replaces a stated one.

    Raises:
        ValueError: If the existing metadata is not valid YAML.
    """
    if not existing or not existing.strip():
        return new
    old_metadata, old_body = split_card(existing)
    new_metadata, new_body = split_card(new)
    keep = set(keep)
    if new_metadata.get("license") == "unknown":
        keep |= {"license", "license_name", "license_link"}
    elif old_metadata.get("license", "unknown") not in ("unknown", new_metadata.get("license")):
        logger.warning(
            "The licence in the README.md changes from %s to %s; pass `license=` to choose it.",
            old_metadata["license"],
            new_metadata.get("license"),
        )
    merged = dict(old_metadata)
    if "license" not in keep and "license_name" not in new_metadata:
        merged.pop("license_name", None)
    for key, value in new_metadata.items():
        before = old_metadata.get(key)
        if key in ("tags", "language", "datasets") and isinstance(before, list):
            merged[key] = before + [item for item in value if item not in before]
        elif key in ("configs", "dataset_info"):
            merged[key] = _merge_configs(before, value)
        elif key not in keep or before in (None, "", []):
            merged[key] = value
    section = MARKED_SECTION.search(new_body)
    section_text = section.group() if section else new_body.strip()
    body, replaced = MARKED_SECTION.subn("\0", old_body)
    if replaced:
        head, *rest = body.split("\0")
        body = LONE_MARK.sub("", head) + section_text + LONE_MARK.sub("", "".join(rest))
    else:
        own = LONE_MARK.sub("", body).strip()
        body = f"{own}\n\n{section_text}\n" if own else f"{section_text}\n"
    return join_card(merged, body)


def _merge_configs(old: object, new: object) -> object:
    """Replaces entries by `config_name`; configs that are not ours stay, but only ours can be the default."""
    old_list = [old] if isinstance(old, dict) else old if isinstance(old, list) else []
    new_list = [new] if isinstance(new, dict) else list(new) if isinstance(new, list) else []
    names = {entry.get("config_name", "default") for entry in new_list}
    has_default = any(entry.get("default") for entry in new_list) or "default" in names
    kept = [
        {k: v for k, v in entry.items() if k != "default" or not has_default}
        for entry in old_list
        if isinstance(entry, dict) and entry.get("config_name", "default") not in names
    ]
    return [*new_list, *kept] if kept else new
