"""Every frame of a video file once, in presentation order, or an error.

Opening a file, choosing its stream and checking what it claims are shared with `random_access`.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.format import Flags
from av.video.reformatter import VideoReformatter
from PIL import Image

from dfer.video.colour import (
    HD,
    MAX_SIDE,
    SQUARE,
    UNKNOWN_MATRICES,
    UNSPECIFIED,
    believed_aspect,
    fill_in,
    shown_as_stored,
    stated_colours,
    upright_image,
)
from dfer.video.hdr import TRANSFERS
from dfer.video.structure import all_there
from dfer.video.webp import BadWebP, is_webp, webp_frames

# torchvision, once imported, hands FFmpeg's messages to Python's loggers: what they say stands in the errors too.
logging.getLogger("libav").addHandler(logging.NullHandler())

_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "avi")  # containers that list all packets
_PACKETS = {"mpegts": "packet", "ogg": "page"}  # streams whose parts all say how long they are
_DELAY = 2  # packets
_CLOCK = 1.0  # s, or a tenth: what the clock of a recorder may be wrong by
# Seconds between two frames, back or ahead, from which on another recording has begun.
_JUMP_BACK, _JUMP_AHEAD = 1.0, 10.0
# FFmpeg must refuse oversized streams before it allocates. The limit works only if it is set on both the container and
# the codec context; a container that is opened by QUICK decodes nothing.
LIMITS = {"max_pixels": str(MAX_SIDE * MAX_SIDE)}
# What FFmpeg learns by decoding ahead when a file is opened, which takes longer than decoding three frames, the decoder
# learns again. With no codec allowed it only demuxes, and with 32 bytes to look at, one packet. Nor need it parse the
# packets that follow: the containers where this matters say what each is.
QUICK = {"codec_whitelist": "none", "probesize": "32", "fflags": "noparse+nofillin"}


class BadVideo(Exception):
    """A video that cannot be used. The message says why, without the file's name."""


# What the functions of this package raise on a file that cannot be read as a video.
VIDEO_ERRORS = (BadVideo, FFmpegError, OSError)


def decode(path: Path, square: bool = True, notes: list[str] | None = None) -> Iterator[tuple[float, Image.Image]]:
    """Yield all frames of a video in presentation order, with their times in seconds, which always rise.

    They are what a player shows: upright, with square pixels, and RGB by the matrix and range that the stream states,
    PQ and HLG mapped to SDR as dfer/video/hdr.py says. Of the shapes of pixels that container and stream state the
    container's counts. A stream that states no matrix is taken for BT.601, as the ffmpeg program does.

    Args:
        path: the file.
        square: stretch pixels that are not square; else they come as they are stored, as from `read_frames`.
        notes: gets what is to be said of the pictures, a line each, before the first frame comes.

    Raises:
        BadVideo, av.FFmpegError: if there is nothing to decode or the video is truncated or damaged, which may show
            only after its last good frame.
    """
    reformatter = VideoReformatter()
    for number, (now, frame, aspect) in enumerate(_decode(path)):
        if number == 0 and notes is not None:
            notes += _notes(frame, aspect)
        yield now, upright_image(frame, reformatter, believed_aspect(aspect) if square else SQUARE)


def decode_frames(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield all frames as they come out of the decoder; times and errors are those of `decode`."""
    for now, frame, _ in _decode(path):
        yield now, frame


def plain_pixels(path: Path) -> str:
    """Return VideoScan's `pixels` of a video, by its first frame.

    Raises:
        BadVideo, av.FFmpegError, OSError: as `decode`.
    """
    if is_webp(path):
        return ""
    _, first = next(decode_frames(path))
    return first.format.name if shown_as_stored(first) else ""


def _decode(path: Path) -> Iterator[tuple[float, av.VideoFrame, Fraction | None]]:
    """Yield times, frames as they come out of the decoder, and how wide a pixel is by its height, if that is stated."""
    if is_webp(path):
        yield from _decode_webp(path)
        return
    with open_video(path) as container:
        video = best_stream(container)
        aspect, decoder = video.sample_aspect_ratio, video.codec_context
        # What the stream states may change on the way; what the container states does not.
        of_stream = aspect is None or (decoder is not None and aspect == decoder.sample_aspect_ratio)
        stated = None if decoder is None else stated_colours(decoder)
        clock = _Clock(float(video.average_rate or 25), joined=_states_no_length(container))
        read = Reading()
        for packet in read_packets(container, video, read):
            try:
                frames = packet.decode()
            except InvalidDataError:
                if decoder.width:
                    raise
                # FFmpeg forgets a size beyond its limit, and says no more than this about it.
                name = decoder.codec.canonical_name
                raise BadVideo(
                    f"cannot be decoded as {name}: damaged, of a kind that FFmpeg does not know, or more than "
                    f"{MAX_SIDE} x {MAX_SIDE} pixels"
                ) from None
            for frame in frames:
                if frame.is_corrupt:  # FFmpeg has patched over missing data
                    raise BadVideo("damaged")
                stated = fill_in(frame, stated)
                check_picture(frame)
                yield clock.time(frame), frame, decoder.sample_aspect_ratio if of_stream else aspect
        if not clock.num_frames:
            raise BadVideo("no frames")
        check_end(container, video, read)


def _decode_webp(path: Path) -> Iterator[tuple[float, av.VideoFrame, None]]:
    clock = _Clock(25.0, joined=False)
    try:
        for milliseconds, image in webp_frames(path, MAX_SIDE):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            yield clock.time(frame), frame, None
    except BadWebP as error:
        raise BadVideo(str(error)) from None


class _Clock:
    """Times of frames that rise, whatever a file says.

    Args:
        rate: frames a second, where nothing else tells.
        joined: the file may be several ones, put together as they are, each with times of its own.
    """

    def __init__(self, rate: float, joined: bool):
        self.num_frames = 0
        self._rate, self._joined = rate, joined
        self._stated, self._shift, self._now = -np.inf, 0.0, -np.inf

    def time(self, frame: av.VideoFrame) -> float:
        """Return the time of the next frame in seconds."""
        stated = frame.time
        if stated is None:  # as in raw streams
            now = self.num_frames / self._rate
        else:
            if self._joined and self.num_frames:
                ahead = stated - self._stated
                if (ahead < 0 and frame.key_frame) or not -_JUMP_BACK <= ahead <= _JUMP_AHEAD:
                    self._shift = self._now + 1 / self._rate - stated
            self._stated = stated
            now = stated + self._shift
        self.num_frames += 1
        self._now = max(now, self._now + 1e-3)  # broken files stop the clock
        return self._now


def _notes(frame: av.VideoFrame, aspect: Fraction | None) -> list[str]:
    """Return what is to be said of a video's pictures, by its first frame."""
    notes, transfer = [], TRANSFERS.get(frame.color_trc)
    if transfer is not None:
        notes.append(f"HDR ({transfer}) mapped to SDR")
    if frame.colorspace == UNSPECIFIED and frame.height >= HD and not (frame.format.is_rgb or transfer):
        notes.append("no colour matrix stated: taken for BT.601, where players may take BT.709")
    if aspect is not None and believed_aspect(aspect) != aspect:
        notes.append(f"pixels of {aspect.numerator}:{aspect.denominator}, as no screen has them: taken for square")
    return notes


def claimed_seconds(path: Path) -> float | None:
    """Return how long a video is by its header, which may be wrong; None if it does not say.

    Raises:
        BadVideo, av.FFmpegError, OSError: if it cannot be opened as a video.
    """
    if is_webp(path):
        return None
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
    return open_video(path, format_of(path), QUICK)


def format_of(path: Path) -> str | None:
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


@dataclass
class Reading:
    """What reading a file's packets has found so far."""

    ends: dict[int, float] = field(default_factory=dict)  # of each stream by its index, s
    num_packets: int = 0  # of the video stream
    doubts: dict[int, int] = field(default_factory=dict)  # by stream: packets since one that may not be whole

    def judge(self, packet: av.Packet, is_video: bool) -> None:
        """Take note of a packet of MPEG-TS that may not be whole, and drop or confirm the doubt about an earlier one.

        There each packet is counted, and files that were put together lose count where they meet: FFmpeg then doubts
        the last packet before, or the one before that. A new recording begins with a keyframe, and of what is whole the
        decoder does not complain.

        Raises:
            BadVideo: if no new recording begins behind it.
        """
        index = packet.stream.index
        if not packet.size:  # the end
            return
        if index in self.doubts:
            self.doubts[index] += 1
            if is_video and not packet.is_keyframe and self.doubts[index] == _DELAY:
                raise BadVideo("truncated or damaged")
            if self.doubts[index] == _DELAY or (is_video and packet.is_keyframe):
                del self.doubts[index]
        if packet.is_corrupt:
            self.doubts.setdefault(index, 0)


def check_picture(frame: av.VideoFrame) -> None:
    """Raise BadVideo if a frame has more than MAX_SIDE pixels on a side, or colours that are not known."""
    check_size(frame)
    if frame.colorspace in UNKNOWN_MATRICES and not frame.format.is_rgb:
        raise BadVideo(f"its colour matrix, {frame.colorspace} of ITU-T H.273, is not known here")


def read_packets(container: InputContainer, video: av.VideoStream, read: Reading) -> Iterator[av.Packet]:
    """Yield the packets of a video stream, and fill `read` on the way.

    Raises:
        BadVideo: if a packet is not whole.
    """
    joined = container.format.name == "mpegts"
    for packet in container.demux([video, *container.streams.audio]):
        index = packet.stream.index
        if packet.is_corrupt or read.doubts:
            if not joined:
                raise BadVideo("truncated or damaged")
            read.judge(packet, index == video.index)
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            read.ends[index] = max(read.ends.get(index, 0.0), end)
        if index == video.index:
            read.num_packets += packet.size > 0
            yield packet


def check_end(container: InputContainer, video: av.VideoStream, read: Reading) -> None:
    """Raise BadVideo if a file that was read to its end, as `read` says, ends before it should.

    Some files state a length that is not theirs: that of a longer track, or what a clock said. Those are whole if their
    container is, byte by byte.
    """
    if read.doubts:
        raise BadVideo("truncated")
    if container.format.name == "gif":  # which states no length, and FFmpeg takes any end for one
        with open(container.name, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 64, 0))
            if not file.read().rstrip(b"\0\r\n").endswith(b";"):
                raise BadVideo("truncated")
    if _states_no_length(container):
        if container.format.name in _PACKETS and all_there(container.name, container.format.name) is False:
            raise BadVideo(f"truncated, within its last {_PACKETS[container.format.name]}")
        return
    # Matroska, and any file cut between two packets, just stops, and only the header tells. Either track may be the
    # longer one; a video that reaches its own stated end is whole whatever the container's says.
    slack = 0.1 + 2 / float(video.average_rate or 25)
    # FFmpeg writes into Matroska when the last track ends, not how long it takes from when the first one starts.
    begin = 0 if container.format.name == "matroska,webm" else container.start_time or 0
    stated = (begin + container.duration) / av.time_base if container.duration else 0.0
    if max(read.ends.values(), default=0.0) >= stated - slack:
        return
    own = float(((video.start_time or 0) + video.duration) * _time_base(video)) if video.duration else np.inf
    end = read.ends.get(video.index, 0.0)
    if end >= own - slack:
        return
    stated = min(stated, own)
    there = all_there(container.name, container.format.name)
    if there and container.format.name in _INDEXED:
        there = read.num_packets >= len(video.index_entries)
    if there or (there is None and end >= stated - max(_CLOCK, stated / 10)):
        return
    frames = f"{read.num_packets} of {video.frames}" if video.frames > read.num_packets else f"{read.num_packets}"
    raise BadVideo(
        f"truncated: {frames} frames, to {end:.2f} s of the {stated:.2f} s in its header "
        "(ffmpeg -i FILE -c copy NEW makes a file of what is there)"
    )


def _states_no_length(container: InputContainer) -> bool:
    """Return whether a format is a stream (MPEG-TS, MPEG-PS, Ogg): FFmpeg takes its length from its last packets.

    Files of such formats may be put together as they are, each with times of its own.
    """
    return bool(container.format.flags & Flags.ts_discont.value)


def _time_base(video: av.VideoStream) -> Fraction:
    """Return the unit of a stream's times in seconds, which all streams of opened files have."""
    assert video.time_base is not None
    return video.time_base
