import errno
import os
import subprocess
import sys

import pytest

from dsco_hf.files import explained, locked, write_atomically
from dsco_hf.team import RunError


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(("code", "text"), [
    (errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "no permission"),
    (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f"),
])  # fmt: skip
def test_errors_of_the_file_system_say_what_to_do(tmp_path, code, text):
    with pytest.raises(RunError, match=f"{text}.*run the same command again. What is finished is kept"):
        with explained(tmp_path):
            raise OSError(code, os.strerror(code))
    with pytest.raises(OSError, match="Input/output"), explained(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "file"
    write_atomically(target, b"old")
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new" and [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match="No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "file", b"x")


def test_two_at_once_and_the_lock_of_a_dead_process(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="Another run is at work on"), locked(tmp_path):
            pass
    finally:
        holder.kill()  # SIGKILL: it cannot tidy up
        holder.wait()
    with locked(tmp_path / "made"):
        assert (tmp_path / "made").is_dir()
