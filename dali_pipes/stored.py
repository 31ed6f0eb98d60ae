"""What is stored of a clip: its bytes, whether they are those that their hash was made of, and what is said if not."""

import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dfer.cli import UserError
from dfer.files import reason
from dfer.lists.index import ClipIndex

CHANGED = "its bytes are not those that the hashes beside the list were made of"
_CHUNK = 65536  # bytes


class BadClip(UserError):
    """A clip that cannot be read, or must not be decoded. The message is one line that names its row and its file."""

    def alone(self) -> "BadClip":
        """Return it without the frames that it, and what it stands for, have seen: they hold the batch."""
        self.__context__ = None
        return self.with_traceback(None)


def changed(index: ClipIndex, video: int, frame: int, data: UInt8[np.ndarray, " _"]) -> str | None:
    """Return what is wrong with bytes whose hash differs from the one beside the list, else None."""
    return None if index.hashes is None or index.hashes.fit(video, frame, data) else CHANGED


def read_bytes(path: str | Path, limit: float = math.inf) -> UInt8[np.ndarray, " _"] | str:
    """Return the bytes of a file, or why there are none; a file of more than `limit` bytes is not read to its end."""
    # One system call reads a small file, where Python's file objects need four. What is plain, native.py reads.
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            parts = [os.read(file, _CHUNK)]
            while len(parts[-1]) == _CHUNK:
                if len(parts) * _CHUNK > limit:
                    return f"more than {limit:,} bytes"
                parts.append(os.read(file, _CHUNK))
        finally:
            os.close(file)
    except OSError as error:
        return reason(error)
    return np.frombuffer(b"".join(parts), dtype=np.uint8)
