"""How people call what is in `results.json`: methods (and how figures draw them), datasets, networks, chance level.

Colours are those of Okabe and Ito, told apart by readers with any colour vision; every method has a marker of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One method: its label in tables and figures, its colour, its marker, and whether it is ours."""

    label: str
    color: str
    marker: str
    emphasis: bool = False


# In the order of all tables and figures.
METHODS = {
    "random": Method("random real", "#8c8c8c", "o"),
    "herding": Method("herded real", "#3d3d3d", "s"),
    "plain": Method("plain generator", "#56b4e9", "v"),
    "best-of-n": Method("best of N", "#999933", "^"),
    "uag": Method("UAG", "#882255", "<"),
    "d4m": Method("D4M", "#117733", ">"),
    "ddoq": Method("DDOQ", "#332288", "p"),
    "mgd3": Method("MGD3", "#aa4499", "h"),
    "s3": Method("S3", "#44aa99", "d"),
    "dmgd": Method("DMGD", "#661100", "8"),
    "d3hr": Method("D3HR", "#6699cc", "H"),
    "igd": Method("IGD", "#cc6677", "$i$"),
    "nopt-quantile": Method("released objective", "#0072b2", "P"),
    "nopt-classifier-only": Method("DsCo, classifier only", "#009e73", "X"),
    "nopt-data-free": Method("DsCo, data-free", "#cc79a7", "D", emphasis=True),
    "nopt": Method("DsCo", "#d55e00", "o", emphasis=True),
    "nopt+doping": Method("DsCo + doping", "#e69f00", "*", emphasis=True),
}

# How methods without a style of their own are drawn, in turn: colours of Paul Tol that are far from those above.
_OTHERS = (
    ("#bbcc33", "^"),
    ("#ee8866", "<"),
    ("#77aadd", ">"),
    ("#ffaabb", "p"),
    ("#aaaa00", "h"),
    ("#99ddff", "d"),
)


def find_method(name: str) -> Method:
    """The method of that name; another name is its own label, but for methods that are combined."""
    return METHODS.get(name, Method(_label(name), *_OTHERS[0]))


def find_methods(names: Iterable[str]) -> dict[str, Method]:
    """Methods by name, in the order of `in_order`; names without a style get different colours and markers."""
    ordered = in_order(names)
    others = [name for name in ordered if name not in METHODS]
    styles = {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)}
    return {name: METHODS.get(name) or Method(_label(name), *styles[name]) for name in ordered}


def _label(name: str) -> str:
    """That of a method without one of its own: "D4M + DsCo" of "d4m+nopt"."""
    return " + ".join(METHODS[part].label if part in METHODS else part for part in name.split("+"))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of methods, each once, in the order of all tables and figures; unknown ones come last."""
    order = list(METHODS)
    present = dict.fromkeys(names)
    return sorted(present, key=lambda name: order.index(name) if name in order else len(order))


def chance_level(results: Mapping[str, Any]) -> float | None:
    """The accuracy of guessing, 1 / number of classes.

    Args:
        results (`dict`): content of results.json, with `classes`, or with the `images` and `images_per_class` of rows
            that have as many of every class.

    Returns:
        `float`: in (0, 1]; None where the number of classes cannot be told.
    """
    counts = {results["classes"]} if results.get("classes") else set()
    if not counts:
        balanced = [row for row in results.get("rows") or [] if row.get("images") and row.get("images_per_class")]
        counts = {row["images"] / row["images_per_class"] for row in balanced}
    count = counts.pop() if len(counts) == 1 else 0
    return 1 / count if count >= 1 and count == int(count) else None


def dataset_title(results: Mapping[str, Any]) -> str:
    """The dataset as a reader knows it: the title that results have, or the last part of a path or repository id."""
    name = str(results.get("title") or results.get("dataset") or "a dataset")
    is_path = not results.get("title") and re.search(r"^[~./\\]|^[A-Za-z]:|\S[/\\]\S", name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name


def network_title(architecture: str) -> str:
    """An evaluator's name as papers write it: ConvNet-3 for `convnet-3`, ResNet-18 for `resnet-18`."""
    return re.sub(r"^(conv|res)net\b", lambda found: f"{found[1].capitalize()}Net", architecture)
