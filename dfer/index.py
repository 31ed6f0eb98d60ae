"""ClipIndex: where the frames of each video lie. The truth is the disk, not the list."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dfer.annotations import VideoRecord

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


def build_index(records: Sequence[VideoRecord]) -> ClipIndex:
    """Scan the frame folders of all records.

    Raises:
        ValueError: in one line naming list, row and folder, if a folder is missing or holds no frames.
    """
    with ThreadPoolExecutor(8) as pool:  # directory reads wait on the disk, not on the GIL
        frames = list(pool.map(_scan_folder, records))
    return ClipIndex(
        records=list(records),
        frames=frames,
        num_frames=np.array([len(f) for f in frames], dtype=np.int64),
        labels=np.array([r.label for r in records], dtype=np.int64),
    )


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
