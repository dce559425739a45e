"""Files that are whole or absent, folders for one run at a time, and errors of the disk that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .team import RunError


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "a file would exceed the size limit (`ulimit -f`); raise it",
    errno.EROFS: "it lies on a read-only file system; make it writable, or choose another folder",
    errno.EACCES: "there is no permission to write there; change it, or choose another folder",
    errno.EPERM: "there is no permission to write there; change it, or choose another folder",
}


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


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is whole or absent, whenever the process or the machine stops."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, has to reach the disk
    finally:
        os.close(folder)
