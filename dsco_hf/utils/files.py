"""Files that are whole or absent, folders for one run at a time, and errors that name the file and the way out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock, Timeout

from .names import nearest
from .processes import RunError
from .values import NumberLoader, plain


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "a file would exceed the size limit (`ulimit -f`); raise it",
    errno.EROFS: "it lies on a read-only file system; make it writable, or choose another folder",
    errno.EACCES: "there is no permission to write there; change it, or choose another folder",
    errno.EPERM: "there is no permission to write there; change it, or choose another folder",
    errno.ENOTDIR: "a file lies where a folder is needed; move it away, or choose another folder",
    errno.EEXIST: "a file lies where a folder is needed; move it away, or choose another folder",
}
# names that Windows keeps for devices, whatever follows the first dot
_DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10))}
_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of file systems that bring no folder to the disk


class DamagedFileError(ValueError):
    """A file that is truncated, empty, or of another kind; the message names it and the way out."""


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise RunError(
            f"Cannot write to {folder}: {reason}, and run the same command again. What is finished is kept."
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made, for one run. The lock is the kernel's: that of a dead process is free.

    Raises:
        RunError: if another run holds it, or the folder cannot be written to.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunError(
                f"Another run is at work on {folder}. Wait until it has ended, or choose another folder."
            ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which then is whole or absent.

    At the end it is brought to the disk and gets its name, in place of a file that had it; on an error it is removed.
    What a killed process leaves behind is for [`remove_partials`].
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove(partial)
    try:
        yield partial
        for file in sorted(partial.rglob("*")) if partial.is_dir() else []:
            bring_to_disk(file)
        bring_to_disk(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise
    bring_to_disk(path.parent)  # the new name, too


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is whole or absent, whenever the process or the machine stops."""
    with whole(path) as partial:
        partial.write_bytes(data)


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left of the file or folder `name`, or of all; no other may be at work on them."""
    begin = "." if name is None else f".{name}."
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith(begin) and entry.name.endswith(".partial"):
            _remove(entry)


def bring_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; not every system can do that for folders."""
    folder = path.is_dir()
    try:
        opened = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs only what is open for writing
    except PermissionError:
        if folder:  # Windows opens none
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        if not folder or error.errno not in _NO_FOLDERS:
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turns whatever a library raises at a file that it cannot read into an error that names the file.

    Args:
        path (`Path`): the file.
        remedy (`str`): the way out, a sentence.

    Raises:
        DamagedFileError: if it is truncated, empty, a folder, or of another kind.
        PermissionError: if it may not be read.
        FileNotFoundError: if it is not there.
    """
    try:
        yield
    except (DamagedFileError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not path.exists():
            raise FileNotFoundError(f"{path} is missing. {remedy}") from error
        if isinstance(error, OSError) and path.is_dir():
            raise DamagedFileError(f"{path} is a folder, and a file is needed there. {remedy}") from error
        if isinstance(error, PermissionError):
            raise PermissionError(f"There is no permission to read {path}: change that. {remedy}") from error
        empty = path.is_file() and not path.stat().st_size
        found = "it is empty" if empty else "it may be truncated, or something else"
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DamagedFileError(f"{path} is damaged: {found} ({detail}). {remedy}") from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; errors as of [`reading`]."""
    with reading(path, remedy):
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin a file with a mark
        if not isinstance(value, dict):
            raise TypeError(f"a JSON object is needed, this is a {type(value).__name__}")
        return value


def write_json(path: Path, value: object) -> None:
    """Writes JSON, also numbers of NumPy and torch, to a file that is whole or absent."""
    write_atomically(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def portable(name: str) -> bool:
    """Whether every system can have a file or folder of this name."""
    return (
        bool(name)
        and not set(name) & set('<>:"/\\|?*')
        and not any(ord(character) < 32 for character in name)
        and name[-1] not in ". "
        and name.split(".")[0].rstrip().casefold() not in _DEVICES
    )


def same_file(names: Iterable[str]) -> list[list[str]]:
    """Names that are one file where case does not count (Windows, macOS), or one in canonical Unicode (macOS)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


class Entry(NamedTuple):
    """A value of a file: what YAML makes of it, its text if it is a plain (unquoted) scalar, its items if a list."""

    value: object
    text: str | None = None
    items: list[Entry] | None = None


def read_entries(path: Path, what: str) -> object:
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


def _of_yaml(text: str) -> object:
    loader = NumberLoader(text)
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


def _of_json(value: object) -> object:
    if isinstance(value, dict):
        return {key: _json_entry(item) for key, item in value.items()}
    return [_json_entry(item) for item in value] if isinstance(value, list) else value


def _json_entry(value: object) -> Entry:
    return Entry(value, items=[_json_entry(item) for item in value] if isinstance(value, list) else None)


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _BadKeys(f"the key {key!r} occurs twice.")
        found[key] = value
    return found
