"""Sources: from (video, frames) to the bytes or pixels of a clip. One class per kind of storage.

`kind` says what comes out: "images" (encoded), "pixels" (uint8 pictures) or "videos" (whole encoded files).
"""

import os
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from dfer.index import ClipIndex
from dfer.video import BadVideo, read_frames, yuv_to_rgb

# Codecs whose chroma samples lie on even columns of luma unless a stream says otherwise, which FFmpeg follows; those of
# all others lie between two columns.
CHROMA_LEFT = frozenset({"h264", "hevc", "mpeg2video", "mpeg4"})

_CHUNK = 65536  # bytes


class FrameFolders:
    """Folders of encoded images, one folder per video."""

    kind = "images"

    def __init__(self, index: ClipIndex):
        self.index = index

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, " _"]]:
        """The T encoded images.

        Raises:
            ValueError: in one line, if a file cannot be read.
        """
        return [_read(self.where(video, frame), self.name(video, frame)) for frame in frames.tolist()]

    def where(self, video: int, frame: int) -> str:
        return self.index.frame_path(video, frame)

    def name(self, video: int, frame: int) -> str:
        """How messages call a frame."""
        record = self.index.records[video]
        return f"{record.source}: bad frame {self.where(video, frame)} of clip {record.name}"


class Shards:
    """Encoded images, or pixels, inside packed files that are mapped into memory: what is fetched is not copied."""

    def __init__(self, index: ClipIndex):
        self.index, self.store = index, index.store
        self.kind = "images" if self.store.kind == "shards" else "pixels"
        self._maps = [np.memmap(path, dtype=np.uint8, mode="r") for path in self.store.paths]

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "..."]]:
        """The T encoded images (tar) or the T pictures (raw), (H, W, 3), as views of the file."""
        store = self.store
        data, rows = self._maps[store.shard[video]], store.first[video] + frames
        ends = (store.offset[rows] + store.length[rows]).tolist()
        views = [data[start:end] for start, end in zip(store.offset[rows].tolist(), ends, strict=True)]
        if self.kind == "images":
            return views
        return [view.reshape(store.height[video], store.width[video], 3) for view in views]

    def name(self, video: int, frame: int) -> str:
        record, path = self.index.records[video], self.store.paths[self.store.shard[video]]
        return f"{record.source}: bad frame {frame} of clip {record.name} in {path}"


class VideoFiles:
    """One video file per clip, decoded by FFmpeg on the calling thread, without its colour conversion."""

    kind = "pixels"

    def __init__(self, index: ClipIndex):
        self.index, self.store = index, index.store

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "H W C"]]:
        """The T pictures: planar 4:2:0 YUV (3 H / 2, W, 1), or RGB (H, W, 3) where the stream is of another kind.

        Raises:
            ValueError: in one line, if the file cannot be read or a frame does not come out of the decoder.
        """
        store, record = self.store, self.index.records[video]
        part = slice(store.first[video], store.first[video + 1])
        try:
            colours = str(store.matrix[video]), bool(store.full_range[video])
            return read_frames(record.path, store.pts[part], store.key[part], frames, *colours)
        except (BadVideo, av.FFmpegError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{record.source}: cannot decode the video {record.path}: {reason}") from None

    def yuv(self) -> Float32[np.ndarray, "N 13"]:
        """How the pixels of each video become RGB: the (3, 4) map, and 1 where chroma lies on even columns."""
        store, known = self.store, {}
        rows = np.empty((len(self.index), 13), dtype=np.float32)
        streams = zip(store.codec.tolist(), store.matrix.tolist(), store.full_range.tolist(), strict=True)
        for video, (codec, matrix, full_range) in enumerate(streams):
            if (codec, matrix, full_range) not in known:
                known[codec, matrix, full_range] = np.append(yuv_to_rgb(matrix, full_range), codec in CHROMA_LEFT)
            rows[video] = known[codec, matrix, full_range]
        return rows


class VideoBytes:
    """Whole video files as they are, for a decoder that takes files (NVDEC)."""

    kind = "videos"

    def __init__(self, index: ClipIndex):
        self.index = index

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, " _"]]:
        """The bytes of the file, one array.

        Raises:
            ValueError: in one line, if the file cannot be read.
        """
        record = self.index.records[video]
        return [_read(record.path, f"{record.source}: bad video {record.path}")]


def _read(path: str | Path, name: str) -> UInt8[np.ndarray, " _"]:
    # One system call reads a frame, where Python's file objects need four: a tenth of all of the loader's work.
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            parts = [os.read(file, _CHUNK)]
            while len(parts[-1]) == _CHUNK:
                parts.append(os.read(file, _CHUNK))
        finally:
            os.close(file)
    except OSError as error:
        reason = "file not found" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{name}: {reason}") from None
    return np.frombuffer(b"".join(parts), dtype=np.uint8)
