"""The files of a pack, open and in memory."""

import errno
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from dfer.cli import UserError
from dfer.files import reason
from dfer.lists.packed import Packed


def open_shards(store: Packed) -> Int32[np.ndarray, " S"]:
    """Return the file descriptors of the shards.

    Raises:
        UserError: if one cannot be opened.
    """
    files: list[int] = []
    for path in store.paths:
        try:
            files.append(os.open(path, os.O_RDONLY))
        except OSError as error:
            close_shards(files)
            raise _closed(store, path, error) from None
    return np.array(files, dtype=np.int32)


def close_shards(files: Iterable[int]) -> None:
    """Close file descriptors."""
    for file in files:
        os.close(file)


def map_shards(store: Packed, files: Int32[np.ndarray, " S"]) -> list[UInt8[np.ndarray, " _"]]:
    """Return open shards as read-only memory.

    Raises:
        UserError: if one cannot be mapped.
    """
    maps = []
    for path, file in zip(store.paths, files.tolist(), strict=True):
        try:
            maps.append(np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), dtype=np.uint8))
        except OSError as error:
            raise _closed(store, path, error) from None
    return maps


def _closed(store: Packed, path: Path, error: OSError) -> UserError:
    """Return the error of a shard that cannot be opened, with advice where it is their number."""
    if error.errno != errno.EMFILE:
        return UserError(f"{path}: {reason(error)}")
    number = len(store.paths)
    return UserError(
        f"{path}: {reason(error)}, as one of {number:,} shards: ulimit -n {max(4096, 8 * number)}, "
        "or pack the list again with a larger --shard-size"
    )
