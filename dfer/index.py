"""ClipIndex: where the frames of each video lie. The truth is the disk, not the list.

Folders are scanned once; what was found is kept beside the list, in LIST.index.npz, for as long as no folder changes.
"""

import contextlib
import hashlib
import os
import re
import secrets
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from dfer.annotations import VideoRecord, read_annotations

Item = TypeVar("Item")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ClipIndex:
    """The videos of one list with the frame files found on disk, in natural order (2.jpg before 10.jpg)."""

    records: list[VideoRecord]
    frames: list[list[str]]  # per video, file names inside record.path
    num_frames: Int64[np.ndarray, " N"]  # counted on disk
    labels: Int64[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.records)

    def frame_path(self, video: int, frame: int) -> str:
        return os.path.join(self.records[video].path, self.frames[video][frame])

    def num_miscounted(self) -> int:
        """Videos whose listed frame count differs from the disk's (the disk's is used)."""
        return sum(len(f) != r.num_frames for f, r in zip(self.frames, self.records, strict=True))


def load_index(list_path: str | Path, root: str | Path | None = None) -> ClipIndex:
    """The index of a list, from its cache where no folder has changed since, else by scanning the folders.

    Safe for any number of processes at once: the cache is replaced as a whole. Where it cannot be written, the folders
    are scanned at every start.

    Raises:
        ValueError: in one line naming list, row and folder, as read_annotations and build_index do.
    """
    records = read_annotations(list_path, root)
    cache_path = Path(f"{list_path}.index.npz")
    key = hashlib.sha256(b"\0".join(os.fsencode(r.path) for r in records)).hexdigest()
    # Taken before the scan: a folder that changes during it has another time at the next start.
    times = np.array(_in_threads(_change_time, records), dtype=np.int64)
    frames = _read_cache(cache_path, key, times)
    if frames is not None:
        return _index(records, frames)
    index = build_index(records)
    _write_cache(cache_path, key, times, index.frames)
    return index


def build_index(records: Sequence[VideoRecord]) -> ClipIndex:
    """Scan the frame folders of all records.

    Raises:
        ValueError: in one line naming list, row and folder, if a folder is missing or holds no frames.
    """
    return _index(records, _in_threads(_scan_folder, records))


def _in_threads(look: Callable[[VideoRecord], Item], records: Sequence[VideoRecord]) -> list[Item]:
    """Look at all folders, some at once, as it is the disk that is waited for; in chunks, as handing over costs too."""
    chunks = [records[start : start + 256] for start in range(0, len(records), 256)]
    with ThreadPoolExecutor(8) as pool:
        return [found for part in pool.map(lambda chunk: [look(record) for record in chunk], chunks) for found in part]


def _index(records: Sequence[VideoRecord], frames: list[list[str]]) -> ClipIndex:
    return ClipIndex(
        records=list(records),
        frames=frames,
        num_frames=np.array([len(f) for f in frames], dtype=np.int64),
        labels=np.array([r.label for r in records], dtype=np.int64),
    )


def _change_time(record: VideoRecord) -> int:
    """When a file was last added, removed or renamed in the folder, in ns; -1 if there is none, which the scan says."""
    try:
        return os.stat(record.path).st_mtime_ns
    except OSError:
        return -1


def _read_cache(path: Path, key: str, times: Int64[np.ndarray, " N"]) -> list[list[str]] | None:
    """The frame names of every folder, or None if the cache is missing, damaged or of other folders."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
            if str(cache["key"]) != key or not np.array_equal(cache["times"], times):
                return None
            counts, names = cache["num_frames"], os.fsdecode(cache["names"].tobytes()).split("\0")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if len(counts) != len(times) or counts.sum() != len(names):
        return None
    ends = np.cumsum(counts).tolist()
    return [names[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _write_cache(path: Path, key: str, times: Int64[np.ndarray, " N"], frames: list[list[str]]) -> None:
    names = np.frombuffer(b"\0".join(os.fsencode(name) for folder in frames for name in folder), dtype=np.uint8)
    counts = np.array([len(folder) for folder in frames], dtype=np.int64)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, key=np.array(key), times=times, num_frames=counts, names=names)
        os.replace(partial, path)
    except OSError:  # a read-only disk: a cache is no more than a convenience
        with contextlib.suppress(OSError):
            partial.unlink()


def _scan_folder(record: VideoRecord) -> list[str]:
    try:
        names = [name for name in os.listdir(record.path) if name.lower().endswith(FRAME_SUFFIXES)]
    except FileNotFoundError:
        raise ValueError(f"{record.source}: no such frame folder: {record.path}{_root_hint(record.path)}") from None
    except OSError as error:
        raise ValueError(f"{record.source}: cannot read the frame folder {record.path} ({error.strerror})") from None
    if not names:
        raise ValueError(f"{record.source}: no {'/'.join(FRAME_SUFFIXES)} frames in {record.path}")
    return sorted(names, key=natural_key)


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that reads digits as numbers: DFEW's 16-frame folders are 1.jpg .. 16.jpg, not zero-padded."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _root_hint(path: Path) -> str:
    return "" if path.parent.is_dir() else " (its parent is missing too: is --data.root right?)"
