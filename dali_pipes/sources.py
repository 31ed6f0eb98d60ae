"""Sources: from (videos, frames) to encoded bytes. One class per kind of storage, one method: fetch."""

import numpy as np
from jaxtyping import Int64, UInt8

from dfer.index import ClipIndex


class FrameFolders:
    """Folders of encoded frames, one folder per video."""

    def __init__(self, index: ClipIndex):
        self.index = index

    def fetch(self, videos: Int64[np.ndarray, " B"], frames: Int64[np.ndarray, "B T"]) -> list[UInt8[np.ndarray, " _"]]:
        """Read the encoded frames, B*T arrays in clip-major order.

        Never raises for a bad file: a missing or unreadable one is an empty array, which the decoder refuses, so that
        every kind of damage is found and named in one place (ClipLoader).
        """
        paths = [
            self.index.frame_path(v, f) for v, row in zip(videos.tolist(), frames.tolist(), strict=True) for f in row
        ]
        return [_read(path) for path in paths]


def _read(path: str) -> UInt8[np.ndarray, " _"]:
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError:
        return np.empty(0, dtype=np.uint8)
