"""Files are there whole or not at all, also where several processes write one, a disk is full or a folder odd."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dfer import files
from dfer.cli import UserError
from tests.conftest import ROOT


def test_all_kinds_of_content_are_written(tmp_path):
    path = tmp_path / ("\u9577" * 80)  # 240 bytes
    for content in (b"bytes", "t\u00e9xt", lambda file: file.write(b"a")):
        files.write_whole(path, content)
    assert path.read_bytes() == b"a" and os.listdir(tmp_path) == [path.name]
    files.write_whole(path, "t\u00e9xt", durable=False)
    assert path.read_text(encoding="utf-8") == "t\u00e9xt"


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def break_off(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, break_off)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [10, 10**6])  # found by the close, and by the write
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, size):
    real = open
    monkeypatch.setattr("builtins.open", lambda path, mode: real("/dev/full", mode))
    with pytest.raises(OSError) as error:
        files.write_whole(tmp_path / "file", bytes(size))
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_several_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with files.partial(path) as one, files.partial(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("number", "told"), [(errno.EINVAL, False), (errno.EACCES, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, number, told):
    """Some file systems cannot; a disk that is broken is another matter."""
    sync = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if told:
        with pytest.raises(OSError, match="Input/output"):
            files.write_whole(tmp_path / "file", "a")
    else:
        files.write_whole(tmp_path / "file", "a")
        assert (tmp_path / "file").read_text() == "a"


def test_reasons_are_one_line():
    assert files.reason(OSError(28, "No space left on device", "a\nb")) == "No space left on device"
    assert files.reason(FileNotFoundError(2, "x")) == "no such file or folder"
    assert files.reason(RuntimeError("a\n  b")) == "a b" and files.reason(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("content", [b"all of it" * 30_000, "t\u00e9xt", lambda file: file.write(b"a")], ids=type)
def test_a_pipe_is_written_to_and_stays_one(tmp_path, content):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_bytes)
        files.write_whole(tmp_path / "pipe", content)
        files.write_whole(tmp_path / "file", content)
        assert read.result(10) == (tmp_path / "file").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_device_is_written_to_and_stays_one(tmp_path):
    terminal, end = os.openpty()
    device = Path(os.ttyname(end))
    (tmp_path / "link").symlink_to(device)
    for path in (device, tmp_path / "link"):
        files.check_output(path)
        files.write_whole(path, "a line\n")
        assert os.read(terminal, 100) == b"a line\r\n"
    assert device.is_char_device() and (tmp_path / "link").is_symlink()
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(Path("/dev/full"), "a")
    assert Path("/dev/full").is_char_device()
    os.close(terminal)
    os.close(end)


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a").write_text("old")
    (tmp_path / "link").symlink_to("results/a")
    (tmp_path / "results" / "chain").symlink_to(tmp_path / "link")
    (tmp_path / "not yet").symlink_to("results/b")
    for name, target in (("link", "a"), ("results/chain", "a"), ("not yet", "b")):
        files.check_output(tmp_path / name)
        files.write_whole(tmp_path / name, f"by {name}")
        assert (tmp_path / name).is_symlink() and (tmp_path / "results" / target).read_text() == f"by {name}"
    assert sorted(os.listdir(tmp_path / "results")) == ["a", "b", "chain"]
    assert sorted(os.listdir(tmp_path)) == ["link", "not yet", "results"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("to_file", [True, False])
def test_a_stream_is_written_where_it_is(tmp_path, name, to_file):
    """What was said before stands before, what is said after behind it, in a file as in a pipe."""
    code = f"from pathlib import Path; from dfer import files; print('before'); f = Path({name!r})\n"
    code += "files.check_output(f); files.write_whole(f, 'it\\n'); print('after')"
    with open(tmp_path / "out", "w") as out:
        stdout = out if to_file else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=stdout, text=True)
    assert done.returncode == 0
    assert ((tmp_path / "out").read_text() if to_file else done.stdout) == "before\nit\nafter\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    files.write_whole(Path(f"/dev/fd/{writing}"), b"a" * 100_000)
    os.close(writing)


def test_a_file_that_could_not_be_written_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "nowhere").symlink_to("no/file")
    (tmp_path / "itself").symlink_to("itself")
    for name, why in (
        ("no/file", "cannot be written: its folder is missing"),
        ("nowhere", "cannot be written: its folder is missing"),
        ("", "cannot be written: a folder"),
        ("n" * 300, "File name too long"),
        ("itself", "Too many levels of symbolic links"),
    ):
        with pytest.raises(UserError, match=why):
            files.check_output(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission"):
        files.check_output(tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_an_error_of_the_disk_becomes_the_users():
    for error, message in (
        (OSError(28, "No space left on device"), "cannot write: No space left on device"),
        (FileNotFoundError(2, "No such file", "a/b"), "cannot write: a/b: no such file or folder"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"), files.disk_errors("cannot write"):
            raise error
    with pytest.raises(KeyError), files.disk_errors("cannot write"):
        raise KeyError("a defect of ours")


NO_DATA = (
    ".Trash-1000", ".ipynb_checkpoints", ".AppleDouble", "._1.jpg", "@eaDir", "$RECYCLE.BIN", "lost+found",
    "System Volume Information", "__MACOSX", "Thumbs.db", "desktop.ini", "#recycle", "@Recycle", "~snapshot", "Icon\r",
)  # fmt: skip


@pytest.mark.parametrize("name", NO_DATA)
def test_what_no_user_has_put_there_is_no_data(tmp_path, name):
    assert not files.is_data(name) and not files.is_data(name.swapcase())
    for user in (f"1{name}", f"{name[1:]}1", "#12", "@home", "~me", "$1", "Trash", "recycle"):
        assert files.is_data(user), user
