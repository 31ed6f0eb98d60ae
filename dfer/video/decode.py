"""Every frame of a video file once, in presentation order, or an error.

Opening a file, choosing its stream and checking what it claims are shared with `random_access`.
"""

import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.video.reformatter import VideoReformatter
from PIL import Image

from dfer.video.colour import upright_image

# torchvision, once imported, hands FFmpeg's messages to Python's loggers: what they say stands in the errors too.
logging.getLogger("libav").addHandler(logging.NullHandler())

MAX_SIDE = 8192  # px; what a hostile header may claim is far more
# FFmpeg must refuse oversized streams before it allocates. The limit works only if it is set on both the container and
# the codec context.
LIMITS = {"max_pixels": str(MAX_SIDE * MAX_SIDE)}
# What FFmpeg learns by decoding ahead when a file is opened, which takes longer than decoding three frames, the decoder
# learns again. With no codec allowed it only demuxes, and with 32 bytes to look at, one packet.
_QUICK = {"codec_whitelist": "none", "probesize": "32"}


class BadVideo(Exception):
    """A video that cannot be used. The message says why, without the file's name."""


# What the functions of this room raise on a file that cannot be read as a video.
VIDEO_ERRORS = (BadVideo, FFmpegError, OSError)


def decode(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """Yield all frames of a video in presentation order, with their times in seconds, which always rise.

    They are upright, and RGB by the matrix and range that the stream states. A stream that states no matrix is taken
    for BT.601, as the ffmpeg program does.

    Raises:
        BadVideo, av.FFmpegError: if there is nothing to decode or the video is truncated or damaged, which may show
            only after its last good frame.
    """
    reformatter = VideoReformatter()
    for now, frame in decode_frames(path):
        yield now, upright_image(frame, reformatter)


def decode_frames(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield all frames as they come out of the decoder; times and errors are those of `decode`."""
    with open_video(path) as container:
        video = best_stream(container)
        ends: dict[int, float] = {}
        num_frames, now = 0, -np.inf
        for packet in read_packets(container, video, ends):
            try:
                frames = packet.decode()
            except InvalidDataError:
                if video.codec_context.width:
                    raise
                # FFmpeg forgets a size beyond its limit, and says no more than this about it.
                raise BadVideo(f"damaged, or more than {MAX_SIDE} x {MAX_SIDE} pixels") from None
            for frame in frames:
                if frame.is_corrupt:  # FFmpeg has patched over missing data
                    raise BadVideo("damaged")
                check_size(frame)
                # Raw streams have no times, broken ones stop the clock.
                now = max(
                    num_frames / float(video.average_rate or 25) if frame.time is None else frame.time, now + 1e-3
                )
                yield now, frame
                num_frames += 1
        if not num_frames:
            raise BadVideo("no frames")
        check_end(container, video, ends)


def claimed_seconds(path: Path) -> float | None:
    """Return how long a video is by its header, which may be wrong; None if it does not say.

    Raises:
        BadVideo, av.FFmpegError, OSError: if it cannot be opened as a video.
    """
    with open_video(path) as container:
        video = best_stream(container)
        if container.duration is None or container.duration <= 0:
            return float(video.duration * _time_base(video)) if video.duration else None
        return container.duration / av.time_base


def check_claims(path: Path) -> None:
    """Check that a file is a video of sides that can be decoded, as far as its header says; nothing is decoded.

    Raises:
        BadVideo, av.FFmpegError, OSError: if it is not.
    """
    with open_quickly(path) as container:
        best_stream(container)


def open_video(
    path: Path, format: str | None = None, container_options: dict[str, str] | None = None
) -> InputContainer:
    """Open a file, with limits, for `best_stream`. The options are those of av.open."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadVideo("not a file")  # a pipe would never end
    # Absolute, as FFmpeg takes "a:b.mp4" for a protocol; old files have tags that are not UTF-8.
    return av.open(
        os.path.abspath(path),
        format=format,
        metadata_errors="replace",
        options=LIMITS,
        container_options=container_options,
    )


def open_quickly(path: Path) -> InputContainer:
    """Open a file without decoding ahead. Only what containers themselves say of a stream is known then."""
    return open_video(path, _format(path), _QUICK)


def _format(path: Path) -> str | None:
    """Return FFmpeg's name of a file's format, None if it must find out: it tries all, half the time of opening."""
    file = os.open(path, os.O_RDONLY)
    try:
        head = os.read(file, 8)
    finally:
        os.close(file)
    return "mov" if head[4:] == b"ftyp" else "matroska" if head[:4] == b"\x1a\x45\xdf\xa3" else None


def best_stream(container: InputContainer) -> av.VideoStream:
    """Return the video stream to decode, with limits and one thread.

    Raises:
        BadVideo: if there is none, or it claims more than MAX_SIDE.
    """
    video = container.streams.best("video")
    if video is None:
        raise BadVideo("no video stream")
    assert isinstance(video, av.VideoStream)
    if video.codec_context is not None:  # else there is no decoder, which decode() says
        check_size(video.codec_context)
        video.codec_context.thread_count = 1  # the workers are the parallelism
        video.codec_context.options = LIMITS
    return video


def check_size(picture: av.VideoCodecContext | av.VideoFrame) -> None:
    """Raise BadVideo if a picture has more than MAX_SIDE pixels on a side."""
    if max(picture.width, picture.height) > MAX_SIDE:
        raise BadVideo(f"{picture.width} x {picture.height} pixels, more than {MAX_SIDE} on a side")


def read_packets(container: InputContainer, video: av.VideoStream, ends: dict[int, float]) -> Iterator[av.Packet]:
    """Yield the packets of a video stream. `ends` gets where, in seconds, each stream read so far ends, by its index.

    Raises:
        BadVideo: if a packet is not whole.
    """
    for packet in container.demux([video, *container.streams.audio]):
        if packet.is_corrupt:
            raise BadVideo("truncated or damaged")
        index = packet.stream.index
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[index] = max(ends.get(index, 0.0), end)
        if index == video.index:
            yield packet


def check_end(container: InputContainer, video: av.VideoStream, ends: dict[int, float]) -> None:
    """Raise BadVideo if a file that was read to its end, as `ends` of `read_packets` says, ends before it claims to."""
    if container.format.name == "gif":  # which states no length, and FFmpeg takes any end for one
        with open(container.name, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 64, 0))
            if not file.read().rstrip(b"\0\r\n").endswith(b";"):
                raise BadVideo("truncated")
    # Matroska, and any file cut between two packets, just stops, and only the header tells. Either track may be the
    # longer one; a video that reaches its own stated end is whole whatever the container's says.
    slack = 0.1 + 2 / float(video.average_rate or 25)
    # FFmpeg writes into Matroska when the last track ends, not how long it takes from when the first one starts.
    begin = 0 if container.format.name == "matroska,webm" else container.start_time or 0
    end = (begin + container.duration) / av.time_base if container.duration else 0.0
    if max(ends.values(), default=0.0) >= end - slack:
        return
    end = float(((video.start_time or 0) + video.duration) * _time_base(video)) if video.duration else np.inf
    if ends.get(video.index, 0.0) < end - slack:
        raise BadVideo("truncated")


def _time_base(video: av.VideoStream) -> Fraction:
    """Return the unit of a stream's times in seconds, which all streams of opened files have."""
    assert video.time_base is not None
    return video.time_base
