"""Sources of videos: their frames, decoded by FFmpeg, or whole files for a decoder that takes those."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from av.error import FFmpegError
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8

from dali_pipes import ffmpeg, kernels, planar
from dali_pipes.options import Kind
from dali_pipes.stored import BadClip, changed, read_bytes
from dfer.files import reason
from dfer.lists.index import ClipIndex
from dfer.lists.scan import VideoFiles as VideoStore
from dfer.video.colour import Matrix, yuv_to_rgb
from dfer.video.decode import BadVideo, check_claims
from dfer.video.random_access import PLANAR, read_frames

# Codecs whose chroma samples lie on even columns of luma, unless the stream says otherwise, which FFmpeg obeys. Those
# of all other codecs lie between two columns.
CHROMA_LEFT = frozenset({"h264", "hevc", "mpeg2video", "mpeg4"})

Read = TypeVar("Read")


class VideoFiles:
    """One video file per clip, decoded by FFmpeg on the calling thread, without its colour conversion."""

    def __init__(self, index: ClipIndex):
        assert isinstance(index.store, VideoStore)
        self.index, self.store = index, index.store
        self._videos = ffmpeg.videos_of([record.path for record in index.records], index.store)
        self._unusual: set[int] = set()  # videos that compiled code has left to `others`, which could read them

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "H W C"]]:
        """Return the T pictures: planar 4:2:0 YUV (3 H / 2, W, 1), or RGB (H, W, 3) from streams of other kinds.

        Raises:
            BadClip: if the file cannot be read, claims more than MAX_SIDE, or the decoder does not return a frame.
        """
        planar = self.planar(video, frames)
        if planar is None:
            return self.others(video, frames)
        pictures, which = planar
        return [pictures[number] for number in which.tolist()]

    def planar(
        self, video: int, frames: Int64[np.ndarray, " T"], **memory: Any
    ) -> tuple[UInt8[np.ndarray, "n rows W 1"], Int64[np.ndarray, " T"]] | None:
        """Return what ffmpeg.read_planar does, None included.

        Raises:
            BadClip: if the file is known to be bad, or cannot be opened.
        """
        return self._compiled(ffmpeg.read_planar, video, frames, **memory)

    def write(
        self,
        video: int,
        frames: Int64[np.ndarray, " T"],
        out: Shaped[np.ndarray, "T S S 3"],
        parameters: Float32[np.ndarray, " P"],
    ) -> None:
        """Write a clip, by the CPU's kernels, whose `parameters` these are.

        Raises:
            BadClip: as `fetch`; what `out` is then means nothing.
        """
        if not self._compiled(ffmpeg.read_clip, video, frames, out=out, parameters=parameters):
            for place, picture in zip(out, self.others(video, frames), strict=True):
                (planar if picture.shape[2] == 1 else kernels).fused(place, picture, parameters)

    def _compiled(
        self, read: Callable[..., Read], video: int, frames: Int64[np.ndarray, " T"], **more: Any
    ) -> Read | None:
        """Return what one of the functions of ffmpeg.py reads of a video; None if that is for `others` to do."""
        if video in self.index.bad:  # even if it was mended since: the index lacks its frames
            raise BadClip(self.index.bad[video])
        if self.index.hashes is not None:
            _read_video(self.index, video)
        if video in self._unusual or (self.store.pixels is not None and self.store.pixels[video] not in PLANAR):
            return None
        return read(self._videos, video, frames, **more)

    def others(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "H W C"]]:
        """Return what `fetch` does, of a video that compiled code has not read.

        Raises:
            BadClip: as `fetch`.
        """
        with self._named_errors(video):
            pictures = read_frames(*self._scan(video), frames, *self._colours(video))
        self._unusual.add(video)
        return pictures

    def _scan(self, video: int) -> tuple[Path, Int64[np.ndarray, " F"], Bool[np.ndarray, " F"]]:
        part = slice(self.store.first[video], self.store.first[video + 1])
        return self.index.records[video].path, self.store.pts[part], self.store.key[part]

    def _colours(self, video: int) -> tuple[Matrix, bool]:
        return self.store.matrix[video].item(), bool(self.store.full_range[video])

    @contextlib.contextmanager
    def _named_errors(self, video: int) -> Iterator[None]:
        """Raise what cannot be read of a video as BadClip."""
        try:
            yield
        except (BadVideo, FFmpegError, OSError) as error:
            raise BadClip(f"{_video_name(self.index, video)}: {reason(error)}") from None

    def yuv(self) -> Float32[np.ndarray, "N 13"]:
        """Return how the pixels of each video become RGB: the (3, 4) map, and 1 where chroma lies on even columns."""
        store, known = self.store, {}
        rows = np.empty((len(store.codec), 13), dtype=np.float32)
        streams = zip(store.codec.tolist(), store.matrix.tolist(), store.full_range.tolist(), strict=True)
        for video, (codec, matrix, full_range) in enumerate(streams):
            if (codec, matrix, full_range) not in known:
                known[codec, matrix, full_range] = np.append(yuv_to_rgb(matrix, full_range), codec in CHROMA_LEFT)
            rows[video] = known[codec, matrix, full_range]
        return rows


class VideoBytes:
    """Whole video files, for a decoder that takes files (NVDEC)."""

    kind: Kind = "videos"

    def __init__(self, index: ClipIndex):
        assert isinstance(index.store, VideoStore)
        self.index = index

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, " _"]]:
        """Return the bytes of the file, as one array.

        Raises:
            BadClip: if the file cannot be read, is no video, claims more than MAX_SIDE, or its hash differs.
        """
        if video in self.index.bad:
            raise BadClip(self.index.bad[video])
        try:
            check_claims(self.index.records[video].path)
        except (BadVideo, FFmpegError, OSError) as error:
            raise BadClip(f"{_video_name(self.index, video)}: {reason(error)}") from None
        return [_read_video(self.index, video)]

    def read(self, *args: Any) -> None:
        """Do nothing: videos are fetched one by one."""


def _read_video(index: ClipIndex, video: int) -> UInt8[np.ndarray, " _"]:
    """Return the bytes of a video file, or raise a BadClip."""
    data = read_bytes(index.records[video].path)
    problem = data if isinstance(data, str) else changed(index, video, 0, data)
    if problem is not None or isinstance(data, str):
        raise BadClip(f"{_video_name(index, video)}: {problem}")
    return data


def _video_name(index: ClipIndex, video: int) -> str:
    """Return what messages call a video file."""
    record = index.records[video]
    return f"{record.source}: cannot decode the video {record.path}"
