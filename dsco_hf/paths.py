"""Whether a name means a place on this machine or a repository on the Hub; a wrong path is told at once."""

from __future__ import annotations

from pathlib import Path

from .names import nearest


_USUAL = ("outputs", "output", "runs", "data", "datasets", "results", "models", "checkpoints")


def looks_like_path(name: str | Path) -> bool:
    """Whether a name can only be a path, or lies in a folder of this machine that has something called nearly so."""
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1:
        return True
    parent, _, last = text.rpartition("/")
    if not parent or not Path(parent).is_dir():
        return False
    return parent in _USUAL or bool(nearest(last, [place.name for place in Path(parent).iterdir()]))


def check_path(name: str | Path, *, wanted: str) -> None:
    """Raises FileNotFoundError for what looks like a path where nothing is.

    Args:
        name (`str` or `Path`): what was given; URLs and ids of repositories pass.
        wanted (`str`): what should have been given, as the end of the message.
    """
    path = Path(name).expanduser()
    if path.exists() or "://" in str(name) or not looks_like_path(name):
        return
    parent = path.absolute().parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    missing = path.absolute().relative_to(parent).parts[0]
    near = nearest(missing, [place.name for place in parent.iterdir()])
    raise FileNotFoundError(
        f"There is no file or folder {name}: {parent.name or parent} has no {missing!r}.{near} {wanted}"
    )
