"""Names as they are compared: one canonical form of Unicode, exact before folded, and numbers as numbers.

Two names are the same if their canonical composition (NFC) is: "é" as one character or as "e" and an accent. Where no
name is the same, names are compared folded: without case, and with `_`, `-` and white space alike. Compatibility forms
(NFKC: "²" and "2", wide letters and digits) stay different names.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence


# Options and fields by the names that they had in earlier configs and records.
RENAMED = {"input_size": "image_size", "templates_per_class": "samples_per_class"}


def canonical(name: str) -> str:
    """A name in the one form (NFC) in which names are the same or not."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name without case, with one blank for any of `_`, `-` and white space.

    The sign of a number is kept, and so is a name of nothing but separators.
    """
    plain = re.sub(r"[\s_\-]+", " ", canonical(canonical(name).casefold())).strip()
    if re.fullmatch(r"\s*-\d.*", name):
        plain = f"-{plain}"
    return plain or canonical(name)


def number_of(name: str) -> int | None:
    """The class that a name numbers: 7 for "7", "07", "7.0", "LABEL_7" and "class 7"; None for other names."""
    found = re.fullmatch(r"(?:label|class)?\s*([0-9]+)(?:\.0+)?", folded(name))
    return int(found[1]) if found else None


def numbers_of(names: Sequence[str]) -> list[int] | None:
    """The numbers of names that are all numbers; None if one is not."""
    numbers = [number_of(name) for name in names]
    return None if None in numbers else [number for number in numbers if number is not None]


def find_classes(wanted: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The place in `names` of each of the wanted classes; None for one that is not there.

    Names are the same if their canonical forms are; a name that `names` has twice in that form is found as it is
    written.
    """
    written = {name: place for place, name in enumerate(names)}
    same: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        same[canonical(name)].append(place)
    found = []
    for name in wanted:
        places = same.get(canonical(name), [])
        found.append(places[0] if len(places) == 1 else written.get(name))
    return found


def nearest(name: str, choices: Iterable[object]) -> str:
    """The end of an error message: up to three of the choices that look like `name`, or nothing.

    A choice that differs from `name` only in characters beyond ASCII is also written with escapes, as the two may look
    the same.
    """
    name = str(name)
    spellings: dict[str, list[str]] = defaultdict(list)
    for choice in dict.fromkeys(map(str, choices)):
        if choice != name:
            spellings[canonical(choice).casefold()].append(choice)
    close = difflib.get_close_matches(canonical(name).casefold(), list(spellings), n=3, cutoff=0.5)
    found = [choice for key in close for choice in spellings[key]][:3]
    shown = ", ".join(_told_apart(choice, name) for choice in found)
    if shown and "(" in shown and not name.isascii():
        shown += f"; given was {ascii(name)}"
    return f" Nearest: {shown}." if shown else ""


def _told_apart(choice: str, name: str) -> str:
    def visible(text: str) -> str:
        return "".join(c for c in unicodedata.normalize("NFKD", text) if c.isascii() and c.isprintable())

    alike = len(canonical(choice)) == len(canonical(name)) and all(
        a == b or not (a.isascii() and b.isascii()) for a, b in zip(canonical(choice), canonical(name), strict=True)
    )
    if alike or (visible(choice) == visible(name) and not (choice.isascii() and name.isascii())):
        return f"{choice!r} ({ascii(choice)})"
    return repr(choice)
