import errno
import os
import subprocess
import sys

import pytest

from dsco_hf.utils.files import (
    DamagedFileError,
    explained,
    locked,
    portable,
    read_json,
    remove_partials,
    same_file,
    whole,
    write_atomically,
)
from dsco_hf.utils.processes import RunError


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


def test_a_folder_is_whole_or_absent(tmp_path):
    with whole(tmp_path / "folder") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "file").write_bytes(b"x")
        assert partial.parent == tmp_path and not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "deep" / "file").read_bytes() == b"x"
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "other") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_bytes_are_on_the_disk_before_they_have_a_name(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, type(tmp_path).replace

    def seen_sync(number):
        events.append("sync")
        sync(number)

    def seen_replace(path, target):
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", seen_sync)
    monkeypatch.setattr(type(tmp_path), "replace", seen_replace)
    write_atomically(tmp_path / "file", b"x")
    assert events == ["sync", "rename", "sync"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in (".a.json.7.partial", ".b.json.7.partial", "a.json", "c.partial"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".a.json.8.partial").mkdir()
    remove_partials(tmp_path, "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.7.partial", "a.json", "c.partial"]
    remove_partials(tmp_path)
    remove_partials(tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "c.partial"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is damaged: it is empty \(JSONDecodeError"),
        (b'{"a": 1', r"is damaged: it may be truncated, or something else \(JSONDecodeError"),
        (b"\xff\xfe\x00", "is damaged: .*UnicodeDecodeError"),
        (b"[1]", "is damaged: .*a JSON object is needed, this is a list"),
        (b"[" * 100_000, "is damaged: .*RecursionError"),
        (None, "is a folder, and a file is needed there"),
    ],
)
def test_damaged_json_is_named_with_the_way_out(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"^{path} {message}.* Save it again.$"):
        read_json(path, "Save it again.")


def test_json_of_an_editor_that_marks_the_beginning(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n')
    assert read_json(tmp_path / "a.json", "") == {"a": "é"}
    with pytest.raises(FileNotFoundError, match=r"b.json is missing. Save it."):
        read_json(tmp_path / "b.json", "Save it.")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"{}")

    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "read_text", refused)
    with pytest.raises(PermissionError, match=f"There is no permission to read {path}: change that. Save it."):
        read_json(path, "Save it.")


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


@pytest.mark.parametrize("name", ["ipc10", "a.b", "console", "aux1x", "com10", "été", ".hidden", "con-1"])
def test_names_that_every_system_can_have(name):
    assert portable(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "CON",
        "nul",
        "aux.parquet",
        "Com1.txt",
        "lpt9",
        "a.",
        "a ",
        "a:b",
        "a\\b",
        "a/b",
        "a*",
        "a?",
        'a"',
        "a\nb",
        "con .x",
    ],
)
def test_names_that_some_system_cannot_have(name):
    assert not portable(name)


def test_names_that_are_one_file_on_some_systems():
    assert same_file(["a", "A", "b", "straße", "STRASSE", "cafe\u0301", "caf\u00e9"]) == [
        ["a", "A"], ["straße", "STRASSE"], ["cafe\u0301", "caf\u00e9"],
    ]  # fmt: skip
    assert same_file(["a", "b"]) == []
