"""Hashes of a list's frames or video files, by which loaders verify what they read.

scripts/hash_clips.py writes them to LIST.hashes.npz beside the list: one hash of each frame (its image file, or its
pixels if the list is packed raw), or of each video file. A decoder does not notice every flipped bit; a hash does.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from dfer.cli import UserError, command_of
from dfer.files import reason, write_whole
from dfer.lists.annotations import VideoRecord

FORMAT = 1
SIZE = 16  # bytes of a hash: the first of SHA-256, which processors calculate faster than any other


@dataclass(frozen=True)
class Hashes:
    """The hashes of N videos. A part is a frame, or the whole file of a video."""

    first: Int64[np.ndarray, " _"]  # (N + 1,); the parts of video i are those from first[i] to first[i + 1]
    digests: bytes  # SIZE of each part

    def fit(self, video: int, part: int, data: UInt8[np.ndarray, "..."]) -> bool:
        """Return whether the bytes of a part are those that were hashed."""
        start = SIZE * (int(self.first[video]) + part)
        return digest(data) == self.digests[start : start + SIZE]


def digest(data: UInt8[np.ndarray, "..."]) -> bytes:
    """Return the hash of a part, SIZE bytes."""
    return hashlib.sha256(data.data).digest()[:SIZE]


def hashes_path(list_path: str | Path) -> Path:
    """Return where the hashes of a list are kept."""
    return Path(f"{list_path}.hashes.npz")


def write_hashes(list_path: str | Path, records: Sequence[VideoRecord], parts: Sequence[Sequence[bytes]]) -> Path:
    """Write the hashes of all parts of each video beside the list, whole or not at all. Returns the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = hashes_path(list_path)
    digests = np.frombuffer(b"".join(part for video in parts for part in video), dtype=np.uint8)
    first = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    assert len(digests) == SIZE * first[-1] and len(parts) == len(records)
    entries = {"format": FORMAT, "clips": np.array(_key(records)), "first": first, "digests": digests}
    write_whole(path, lambda file: np.savez(file, **entries))
    return path


def read_hashes(
    list_path: str | Path, records: Sequence[VideoRecord], num_parts: Int64[np.ndarray, " N"]
) -> Hashes | None:
    """Read the hashes beside a list; None if there are none. `num_parts` is how many parts each video has now.

    Raises:
        UserError: if they are damaged, or of other videos than the list's.
    """
    path = hashes_path(list_path)
    if not os.path.exists(path):  # or its name would be longer than the list's may be
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            version, key = int(found["format"]), str(found["clips"])
            first, digests = found["first"].astype(np.int64), found["digests"].tobytes()
    except Exception as error:  # a damaged zip file raises errors of many kinds
        raise UserError(f"{path}: damaged ({reason(error)}): {_advice(list_path)}") from None
    if version != FORMAT:
        raise UserError(f"{path}: hashes of format {version}, this version reads {FORMAT}: {_advice(list_path)}")
    if key != _key(records):
        raise UserError(f"{path}: hashes of other clips than the list's: {_advice(list_path)}")
    if first.shape != (len(records) + 1,) or len(digests) != SIZE * first[-1]:
        raise UserError(f"{path}: damaged (its parts do not fit together): {_advice(list_path)}")
    counts = np.diff(first)
    for video in np.flatnonzero(counts != num_parts)[:1].tolist():
        record = records[video]
        raise UserError(
            f"{record.source}: clip {record.name} has {num_parts[video]} frames or files now, {counts[video]} when "
            f"{path} was made: {_advice(list_path)}"
        )
    return Hashes(first, digests)


def _key(records: Sequence[VideoRecord]) -> str:
    return hashlib.sha256("\0".join(record.name for record in records).encode()).hexdigest()


def _advice(list_path: str | Path) -> str:
    return f"write it anew with {command_of('hash_clips')} {list_path}, or delete it"
