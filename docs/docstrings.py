"""An extension of griffe for docstrings in the style of Hugging Face: references and types without their marks."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PlainReferences(griffe.Extension):
    """Sphinx and doc-builder link them; mkdocstrings would show their brackets."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for everything that has a docstring."""
        if obj.docstring is not None:
            text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?!\()", r"`\1`", obj.docstring.value)
            # types are set as code anyway
            obj.docstring.value = re.sub(
                r"^( +\*{0,2}[\w, ]+ \()(.*?)(?=\):)",
                lambda line: line[1] + re.sub("[`*]", "", line[2]),
                text,
                flags=re.MULTILINE,
            )
