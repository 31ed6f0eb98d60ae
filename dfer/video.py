"""Video files to frames: every frame once, in presentation order, upright and in its true colours, or an error."""

import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import SideData, Type
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Float64, Int64
from PIL import Image

MAX_SIDE = 8192  # px; what a hostile header may claim is far more
MAX_REPEATS = 100  # by a constant frame rate, of a frame on average; beyond, the time stamps are broken
# By default swscale repeats chroma samples and truncates: 10-bit colours come out up to 3 levels too dark.
EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
# Signs of a, b, c, d in a display matrix (x' = ax + cy, y' = bx + dy, y pointing down) -> what makes a frame upright.
UPRIGHT = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # counter-clockwise, as all of Pillow's: a phone held upright
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


class BadVideo(Exception):
    """A video that cannot be used; the message says why."""


def decode(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """All frames of a video in presentation order, with their times in seconds, which always rise.

    They are upright, and RGB by the matrix and range that the stream states.

    A stream that states no matrix is taken for BT.601, as the ffmpeg program does.

    Raises:
        BadVideo, av.FFmpegError: if there is nothing to decode or the video is truncated or damaged, which may show
            only after its last good frame.
    """
    if path.exists() and not path.is_file():
        raise BadVideo("not a file")  # a pipe would never end
    # Absolute, as FFmpeg takes "a:b.mp4" for a protocol; old files have tags that are not UTF-8.
    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        video = container.streams.best("video")
        if video is None:
            raise BadVideo("no video stream")
        if video.codec_context is not None:  # else there is no decoder, which decode() says
            _check_size(video.codec_context)
            video.codec_context.thread_count = 1  # the workers are the parallelism
        rgb = VideoReformatter()
        streams = [video, *container.streams.audio]
        ends = {stream.index: 0.0 for stream in streams}  # seconds
        num_frames, now = 0, -np.inf
        for packet in container.demux(streams):
            if packet.is_corrupt:
                raise BadVideo("truncated or damaged")
            index = packet.stream.index
            if packet.pts is not None:
                ends[index] = max(ends[index], float((packet.pts + (packet.duration or 0)) * packet.time_base))
            for frame in packet.decode() if index == video.index else ():
                if frame.is_corrupt:  # FFmpeg has patched over missing data
                    raise BadVideo("damaged")
                _check_size(frame)
                # Raw streams have no times, broken ones stop the clock.
                now = max(
                    num_frames / float(video.average_rate or 25) if frame.time is None else frame.time, now + 1e-3
                )
                pixels = rgb.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
                yield now, _upright(Image.fromarray(pixels), frame.side_data.get(Type.DISPLAYMATRIX))
                num_frames += 1
        if not num_frames:
            raise BadVideo("no frames")
        # Matroska, and any file cut between two packets, just stops, and only the header tells. Either track may be the
        # longer one; a video that reaches its own stated end is whole whatever the container's says.
        slack = 0.1 + 2 / float(video.average_rate or 25)
        short = container.duration and max(ends.values()) < _end(container, Fraction(1, av.time_base)) - slack
        if short and (video.duration is None or ends[video.index] < _end(video, video.time_base) - slack):
            raise BadVideo("truncated")


def _check_size(picture: av.VideoCodecContext | av.VideoFrame) -> None:
    if max(picture.width, picture.height) > MAX_SIDE:
        raise BadVideo(f"{picture.width} x {picture.height} pixels, more than {MAX_SIDE} on a side")


def _end(timed: av.container.InputContainer | av.VideoStream, unit: Fraction) -> float:
    return float(((timed.start_time or 0) + timed.duration) * unit)


def _upright(image: Image.Image, matrix: SideData | None) -> Image.Image:
    """Turn a frame as the stream says. VideoFrame.rotation will not do: it takes mirrored for upside down."""
    if matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # 16.16 fixed point
    turn = UPRIGHT.get(tuple((x > 2**15) - (x < -(2**15)) for x in (a, b, c, d)))
    return image if turn is None else image.transpose(turn)


def nearest_frames(times: Float64[np.ndarray, " N"], fps: float) -> Int64[np.ndarray, " N"]:
    """How often each frame is taken, if at every 1/fps seconds from the first one the frame nearest in time is.

    `times` in seconds, rising. At its own rate each frame of a video is taken once.

    Raises:
        BadVideo: if the times are so far apart that frames would be repeated without end.
    """
    ticks = (times[-1] - times[0]) * fps
    if not ticks < MAX_REPEATS * len(times):
        raise BadVideo(f"time stamps {times[-1] - times[0]:,.0f} s apart in {len(times)} frames")
    wanted = times[0] + np.arange(int(ticks + 0.25) + 1) / fps  # files round their times
    after = np.minimum(np.searchsorted(times, wanted), len(times) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(wanted - times[before] <= times[after] - wanted + 1e-9, before, after)
    return np.bincount(nearest, minlength=len(times))
