"""Files that are written whole or not at all, their hashes, errors of the system, and names that are no data."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from dfer.cli import UserError

# What file systems answer that cannot sync a folder: some network and FUSE mounts, and folders that may not be read.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)

# What no user has put there, in lower case: bins, thumbnails, snapshots and notes of systems and network storage.
_OF_THE_SYSTEM = {
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),  # Windows
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder", "icon\r"),  # macOS
    *("lost+found", "lost.dir", "__pycache__"),
    *("@eadir", "@tmp", "@synoresource", "#recycle", "#snapshot"),  # Synology
    *("@recycle", "@recently-snapshot", "@sharebin", "@__thumb", "~snapshot"),  # QNAP, NetApp
}


def is_data(name: str) -> bool:
    """Return whether a file or folder with this name may be a user's: the rule wherever a folder is searched.

    Hidden names are not: .Trash-1000, .ipynb_checkpoints, and the ._1.jpg that macOS leaves beside each 1.jpg.
    """
    return name[0] != "." and name.lower() not in _OF_THE_SYSTEM


def write_whole(path: Path, content: bytes | str | Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Create or replace a file: at every moment the old content or the new one is there.

    A link stays one, and what it leads to is replaced. A pipe, a device and a stream (/dev/stdout, `>(gzip > a.gz)`)
    are written to, as nothing else can be done with them.

    Args:
        path: the file.
        content: its bytes, its text (written as UTF-8), or a function that writes to the open file.
        durable: wait until it is on the disk, so that the promise also holds after a power cut.

    Raises:
        OSError: if it cannot be written; what was there stays, and nothing else is left.
    """
    with _naming(path), partial(path, durable) as name, contextlib.ExitStack() as ends:
        if streamed := name == path:
            ends.enter_context(contextlib.suppress(BrokenPipeError))  # its reader has seen enough
        file = ends.enter_context(open(_opened(path) if streamed else name, "wb"))
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have errors of the system say which file they are about: a full disk and a lost one do not."""
    try:
        yield
    except OSError as error:
        error.filename = os.fspath(path) if error.filename is None else error.filename
        raise


@contextlib.contextmanager
def partial(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a name beside `path` to write to, for writers that want a name: it becomes `path` at the end.

    The name is its own for each call, so that several processes may write the same file. If anything is raised
    meanwhile, the partial file is deleted and `path` stays as it was. Of what is no file the name is its own.
    """
    if is_stream(path):
        yield path
        return
    path = Path(os.path.realpath(path))
    short = os.fsdecode(os.fsencode(path.name)[:200])  # the system counts bytes
    name = path.with_name(f"{short}.{secrets.token_hex(4)}.partial")
    try:
        yield name
        commit(name, path, durable)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)
        raise


def is_stream(path: Path) -> bool:
    """Return whether there is something under this name that can be written to and not replaced: no file, no folder.

    A name of an open descriptor is one too, whatever that is: another file in its place would not be read by anybody.
    """
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever writes says why that cannot be
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _descriptor(path: Path) -> int | None:
    """Return the descriptor of this process that a path is a name of, like /dev/stdout; None if it is none."""
    named = re.fullmatch(rf"/dev/(?:fd/(\d+)|(stdout)|(stderr))|/proc/(?:self|{os.getpid()})/fd/(\d+)", str(path))
    if named is None:
        return None
    return int(named[1] or named[4]) if named[1] or named[4] else 1 if named[2] else 2


def _opened(stream: Path) -> Path | int:
    """Return what `open` takes for a stream: of a descriptor a copy, which goes on where the descriptor is."""
    if (descriptor := _descriptor(stream)) is None:
        return stream
    if descriptor in (1, 2) and (said := (sys.stdout, sys.stderr)[descriptor - 1]) is not None:
        said.flush()  # what was said before stands before it
    return os.dup(descriptor)


def check_output(path: Path) -> None:
    """Check before the work that a file can be written afterwards; nothing is written.

    Raises:
        UserError: if that is not so.
    """
    if is_stream(path):
        writable = _descriptor(path) is not None or os.access(path, os.W_OK)
    else:
        with disk_errors("cannot write"), contextlib.suppress(FileNotFoundError):
            os.stat(path)
        folder = os.path.dirname(os.path.realpath(path))
        if os.path.isdir(path) or not os.path.isdir(folder):
            raise UserError(
                f"{path}: cannot be written: {'a folder' if os.path.isdir(path) else 'its folder is missing'}"
            )
        writable = os.access(folder, os.W_OK | os.X_OK)
    if not writable:
        raise UserError(f"{path}: cannot be written: no permission, or a disk that is only read")


def commit(written: Path, path: Path, durable: bool = True) -> None:
    """Rename a file that is complete to the name that others look for. Both lie on one file system."""
    if durable:
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(written, path)
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where its file system can do that by itself."""
    cannot_sync(folder)


def cannot_sync(folder: Path) -> str | None:
    """Put the names in a folder on the disk; return why its file system cannot do that, None if it did.

    Raises:
        OSError: of a disk that fails.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        return reason(error)
    return None


def read_file(path: Path) -> bytes:
    """Return all of a file. Links are followed, as shared caches and large-file stores keep their files behind them.

    Raises:
        UserError: if it cannot be read, or is no file (a pipe or a device may never end).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: is no file")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        missing = f"a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "no such file"
        raise UserError(f"{path}: {missing}") from None
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """Return why something failed, in one line: the system's own words where there are any."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def check_visible(path: str | Path) -> None:
    """Raise UserError if nobody can tell whether a path is there: a folder above it is closed, or a mount is gone."""
    if why := closed(path):
        raise UserError(f"{path}: cannot be looked at ({why})")


def closed(path: str | Path) -> str | None:
    """Return why nobody can tell whether a path is there; None if it is, or is not."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a path with a NUL is a ValueError
        return None
    except OSError as error:
        return None if error.errno == errno.ENAMETOOLONG else reason(error)  # nothing has such a name
    return None


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that are free where a folder lies; None where its file system cannot say.

    Many FUSE mounts (BlobFuse) and overlays answer "0 of 0 bytes" or an error, and writing works.
    """
    try:
        usage = shutil.disk_usage(folder)
    except (OSError, OverflowError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
            raise
        return None
    return None if usage.free <= 0 >= usage.total or usage.free < 0 else usage.free


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Raise an OSError of the block as a UserError, for blocks in which it can only be about the user's disk.

    The message is `what`, the file if the system names one, and the reason.
    """
    try:
        yield
    except OSError as error:
        file = "" if error.filename is None else f"{error.filename}: "
        raise UserError(f"{what}: {file}{reason(error)}") from None
