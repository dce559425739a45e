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
from typing import Any

from filelock import FileLock, Timeout

from .team import RunError
from .values import plain


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


def write_json(path: Path, value: Any) -> None:
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
