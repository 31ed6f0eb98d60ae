"""Files are there whole or not at all, also where several processes write one, a disk is full or a folder odd."""

import errno
import os

import pytest

from dfer import files
from dfer.cli import UserError


def test_all_kinds_of_content_are_written(tmp_path):
    path = tmp_path / ("n" * 240)
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


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file"):
        files.write_whole(tmp_path / "pipe", "a")
    assert os.listdir(tmp_path) == ["pipe"] and (tmp_path / "pipe").is_fifo()


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
