"""The methods that results compare: their names in `results.json`, how people call them, and how figures draw them.

Colours are those of Okabe and Ito, told apart by readers with any colour vision; every method has a marker of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
    "nopt-quantile": Method("released objective", "#0072b2", "P"),
    "nopt-classifier-only": Method("DsCo, classifier only", "#009e73", "X"),
    "nopt-data-free": Method("DsCo, data-free", "#cc79a7", "D", emphasis=True),
    "nopt": Method("DsCo", "#d55e00", "o", emphasis=True),
    "nopt+doping": Method("DsCo + doping", "#e69f00", "*", emphasis=True),
}

# How methods without a style of their own are drawn, in turn: colours of Paul Tol that are far from those above.
_OTHERS = (
    ("#999933", "^"),
    ("#882255", "<"),
    ("#117733", ">"),
    ("#332288", "p"),
    ("#aa4499", "h"),
    ("#44aa99", "d"),
)


def find_method(name: str) -> Method:
    """The method of that name; another name is its own label."""
    return METHODS.get(name, Method(name, *_OTHERS[0]))


def find_methods(names: Iterable[str]) -> dict[str, Method]:
    """Methods by name, in the order of `in_order`; names without a style get different colours and markers."""
    ordered = in_order(names)
    others = [name for name in ordered if name not in METHODS]
    return {name: METHODS.get(name) or Method(name, *_OTHERS[others.index(name) % len(_OTHERS)]) for name in ordered}


def in_order(names: Iterable[str]) -> list[str]:
    """Names of methods, each once, in the order of all tables and figures; unknown ones come last."""
    order = list(METHODS)
    present = dict.fromkeys(names)
    return sorted(present, key=lambda name: order.index(name) if name in order else len(order))
