"""Some frames of a video, with no more decoding than they need.

A trainer wants few frames of many videos: `scan_video` says, once, what frames there are, `read_frames` then decodes
what it must for some of them, to the same pixels as `decode`. Pixels that are not square stay as they are stored: the
boxes of a plan are shares of the picture, and crops become squares, whatever the shape of its pixels.
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Discard
from av.video.reformatter import VideoReformatter
from jaxtyping import Bool, Int64, UInt8

from dfer.video.colour import (
    MATRICES,
    Colours,
    Matrix,
    fill_in,
    is_full_range,
    shown_as_stored,
    stated_colours,
    upright_image,
    upright_size,
)
from dfer.video.decode import (
    VIDEO_ERRORS,
    BadVideo,
    Reading,
    best_stream,
    check_end,
    check_picture,
    decode_frames,
    open_quickly,
    open_video,
    read_packets,
)
from dfer.video.webp import is_webp

PLANAR = ("yuv420p", "yuvj420p")

# Containers that store a presentation time for each packet, the same however one came to it.
_STORES_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Codecs where a packet is a frame that is displayed: others hide some (VP8, VP9) or pack and skip them (MPEG-4).
_PACKET_IS_FRAME = ("h264", "hevc", "av1", "mjpeg")
# Codecs where what is displayed of a frame is all that there is of it if no other frame refers to it: VP8 and VP9 hand
# on probabilities and segment maps as well. AV1's decoder does not skip.
CAN_SKIP = ("h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video")


@dataclass(frozen=True)
class VideoScan:
    """What `read_frames` has to know of a video. Frame i is the i-th that `decode` yields."""

    pts: Int64[np.ndarray, " F"]  # presentation times in units of the stream's time base, rising
    # Frames to start decoding at. If there is none, not even the first, then frames are told apart by counting all, and
    # pts may be 0, 1, 2 ...
    key: Bool[np.ndarray, " F"]
    height: int  # px, upright, as width
    width: int
    codec: str  # FFmpeg's name of it
    matrix: Matrix  # of a stream that states none: bt601, as in `decode`
    full_range: bool  # Y, Cb and Cr use 0..255, not 16..235 and 16..240
    # FFmpeg's name of their format, such as yuv420p; "" if they are not shown as they are stored: turned, HDR, or WebP.
    # Decoders that know of nothing else may be used where there is one.
    pixels: str


class _Unseekable(Exception):
    """A frame did not come out where its scan says that it would."""


# ---- Scanning


class _Packet(NamedTuple):
    pts: int | None
    is_start: bool  # see `_is_start`
    is_discard: bool  # decoded, but not displayed


class _Packets(NamedTuple):
    """What the packets of a video say of its frames."""

    packets: list[_Packet]
    first: av.VideoFrame | None  # the first frame that is displayed; None if it did not come out
    codec: str
    stores_times: bool  # in the container, for each packet that is a frame


def scan_video(path: Path) -> VideoScan:
    """Return what frames a video has, from its packets; only the first frame is decoded.

    Where packets do not tell (AVI, MPEG-TS, FLV and raw streams; VP8, VP9 and MPEG-4; frames before the first
    keyframe), all frames are decoded once.

    Raises:
        BadVideo, av.FFmpegError: if there is nothing to decode or the video is truncated. Damage is found only by
            decoding.
    """
    found = _scan_packets(path)
    first, stores_times = found.first, found.stores_times
    times = _displayed_times(found)
    if times is None or first is None:
        times = []
        for _, frame in decode_frames(path):
            first = frame if first is None else first
            times.append(frame.pts)
        rising = None not in times and all(a < b for a, b in itertools.pairwise(times))
        stores_times &= rising
        if not rising:
            times = list(range(len(times)))
    assert first is not None
    check_picture(first)
    starts = [p.pts for p in found.packets if p.is_start and not p.is_discard] if stores_times else []
    pts = np.sort(np.array(times, dtype=np.int64))
    height, width = upright_size(first)
    return VideoScan(
        pts=pts,
        key=np.isin(pts, np.array(starts, dtype=np.int64)),
        height=height,
        width=width,
        codec=found.codec,
        matrix=MATRICES.get(first.colorspace, "bt601"),
        full_range=is_full_range(first),
        pixels=first.format.name if shown_as_stored(first) and found.codec != "webp" else "",
    )


def _scan_packets(path: Path) -> _Packets:
    """Read all packets of a video and decode its first frame."""
    if is_webp(path):
        return _Packets([], None, "webp", stores_times=False)
    with open_video(path) as container:
        video = best_stream(container)
        decoder = video.codec_context
        if decoder is None:
            raise BadVideo("no decoder for it")
        first, stated = None, stated_colours(decoder)
        packets: list[_Packet] = []
        read = Reading()
        for packet in read_packets(container, video, read):
            if first is None:
                with contextlib.suppress(FFmpegError):  # if nothing comes of it, all frames are decoded
                    frames = packet.decode()
                    if not frames and not packets and not packet.is_discard:
                        frames = decoder.decode()  # do not wait for those that are displayed before
                        decoder.flush_buffers()
                    first = next(iter(frames), None)
            if packet.size:
                packets.append(_Packet(packet.pts, _is_start(packet, decoder), packet.is_discard))
        if not packets:
            raise BadVideo("no frames")
        check_end(container, video, read)
        stores_times = (
            container.format.name in _STORES_TIMES
            # Matroska may hold an AVI in disguise, with the codec's tag in it.
            and (container.format.name != "matroska,webm" or decoder.codec_tag == "\0\0\0\0")
            and decoder.field_order in (0, 1)  # unknown, progressive: else a packet may be half a frame
            and len(container.streams.video) == 1  # which is best may depend on how far one has looked
        )
        if first is not None:
            fill_in(first, stated)
        return _Packets(packets, first, decoder.codec.canonical_name, stores_times)


def _displayed_times(found: _Packets) -> list[int] | None:
    """Return the presentation times of all frames that are displayed, None if packets do not tell."""
    if not (found.stores_times and found.codec in _PACKET_IS_FRAME and found.packets[0].is_start):
        return None
    displayed = [packet.pts for packet in found.packets if not packet.is_discard]
    start, times = found.packets[0].pts, [pts for pts in displayed if pts is not None]
    if start is None or not times or len(set(times)) < len(displayed) or min(times) < start:
        return None
    return times


def _is_start(packet: av.Packet, decoder: av.VideoCodecContext) -> bool:
    """Return whether all frames displayed from this one on come out the same if decoding starts here."""
    if not packet.is_keyframe or decoder.codec.canonical_name != "h264":
        return packet.is_keyframe
    # In H.264 a keyframe may be any picture from which one can recover in time: it is exact at once if it is an IDR
    # picture or its recovery point message says so (7.3.2.3 and D.1.8 of ITU-T H.264).
    record, data = decoder.extradata or b"", bytes(packet)
    if len(record) < 5 or record[0] != 1:
        return False
    prefix, place = (record[4] & 3) + 1, 0
    while place + prefix < len(data):
        begin = place + prefix
        place = begin + int.from_bytes(data[place:begin], "big")
        kind = data[begin] & 31
        if 1 <= kind <= 5:
            return kind == 5
        if kind == 6 and _recovers_at_once(data[begin + 1 : place].replace(b"\0\0\3", b"\0\0")):
            return True
    return False


def _recovers_at_once(messages: bytes) -> bool:
    """Return whether H.264 SEI messages have a recovery point of 0 frames and exact match."""
    place = 0
    while place + 2 < len(messages):
        fields = []
        for _ in range(2):  # type and size, in bytes of which all but the last are 255
            field = 0
            while place < len(messages) and messages[place] == 255:
                field, place = field + 255, place + 1
            fields.append(field + messages[place] if place < len(messages) else 0)
            place += 1
        kind, size = fields
        if kind == 6 and place < len(messages):
            return messages[place] >> 5 == 0b110  # 0 as an Exp-Golomb code, exact_match_flag, broken_link_flag
        place += size
    return False


# ---- Reading


def read_frames(
    path: Path,
    pts: Int64[np.ndarray, " F"],
    key: Bool[np.ndarray, " F"],
    frames: Int64[np.ndarray, " T"],
    matrix: Matrix,
    full_range: bool,
) -> list[UInt8[np.ndarray, "rows width channels"]]:
    """Return some frames of a video by their numbers, which rise and may repeat; `pts` to `full_range` are of its scan.

    A frame of 8-bit 4:2:0 with even sides, neither turned nor mirrored, comes as planar I420 of shape
    (H * 3 // 2, W, 1) for `yuv_to_rgb`: H rows of Y, then U and V, H/2 x W/2 each, without gaps. Where its chroma
    samples lie between those of Y is the consumer's business. Any other frame, and any in other colours than the
    scan's, comes as RGB of shape (H, W, 3), to the pixel as from `decode`. Frames that repeat share their memory.

    Decodes on the calling thread alone; Python's lock is taken twice for each packet. Skips what no wanted frame refers
    to; a video where that fails is decoded as by `decode`, up to the last wanted frame. What FFmpeg makes up for frames
    that are missing from a spliced stream, without a word, may differ from what it makes up for `decode`.

    Raises:
        BadVideo, av.FFmpegError: if a wanted frame does not come out whole.
    """
    counted = not key.any()
    names: list[int] = (frames if counted else pts[frames]).tolist()
    wanted = _WantedFrames(set(names), matrix, full_range)
    if not counted:
        with contextlib.suppress(_Unseekable, *VIDEO_ERRORS):  # if it is not our doing, it will recur
            _read_some(path, pts[key], wanted)
    if not wanted.complete:
        wanted = _WantedFrames(set(names), matrix, full_range)
        _read_all(path, counted, wanted)
    for frame, name in zip(frames.tolist(), names, strict=True):
        if name not in wanted.frames:
            raise BadVideo(f"frame {frame} does not come out of the decoder")
    return [wanted.frames[name] for name in names]


class _WantedFrames:
    """The wanted ones of the frames that come out of a decoder, as `read_frames` returns them.

    What runs between two frames finds the processor's caches full of the decoder's data: each call counts.
    """

    def __init__(self, names: set[int], matrix: Matrix, full_range: bool) -> None:
        self.names = names  # presentation times, or numbers where those are no use
        self.frames: dict[int, UInt8[np.ndarray, "rows width channels"]] = {}
        self.stated: Colours | None = None  # by the container
        self._colours = matrix, full_range
        self._reformatter = VideoReformatter()
        self._layout: tuple = ()  # of the frame before
        self._planes: tuple[UInt8[np.ndarray, "T _ _"], ...] = ()  # Y, U and V of all frames; none of RGB frames

    @property
    def complete(self) -> bool:
        return len(self.frames) == len(self.names)

    def take(self, frames: list[av.VideoFrame]) -> None:
        """Keep copies of those that are wanted, by their times, and let go of all of them at once.

        A decoder that fails to notice damage may show what lay in its memory before: if frames were still held, it
        would take other memory, and give other pixels.
        """
        for frame in frames:
            self.add(frame.pts, frame)

    def add(self, name: int | None, frame: av.VideoFrame) -> None:
        """Keep a frame if it is wanted.

        Raises:
            BadVideo: if it is not whole.
        """
        if frame.is_corrupt:  # FFmpeg has patched over missing data
            raise BadVideo("damaged")
        if name not in self.names:
            return
        self.stated = fill_in(frame, self.stated)
        layout = frame.format.name, frame.height, frame.width, frame.colorspace, frame.color_range, frame.rotation
        if layout != self._layout:
            self._layout = layout
            self._prepare(frame)
        if not self._planes:
            self.frames[name] = np.array(upright_image(frame, self._reformatter))
            return
        place = len(self.frames)
        for plane, part in zip(frame.planes, self._planes, strict=True):
            view = memoryview(plane)  # its rows are padded
            part[place] = np.ndarray(part.shape[1:], np.uint8, view, 0, (plane.line_size, 1))
        self.frames[name] = self._planar[place]

    def _prepare(self, frame: av.VideoFrame) -> None:
        """Allocate memory for frames like this one if they are handed on as planar I420."""
        height, width = frame.height, frame.width
        self._planes = ()
        if (
            frame.format.name in PLANAR
            and not height % 2
            and not width % 2
            and (MATRICES.get(frame.colorspace), is_full_range(frame)) == self._colours
            and shown_as_stored(frame)
        ):
            self._planar = np.empty((len(self.names), height * 3 // 2, width, 1), np.uint8)
            chroma = self._planar[:, height:].reshape(-1, 2, height // 2, width // 2)
            self._planes = self._planar[:, :height, :, 0], chroma[:, 0], chroma[:, 1]


def _read_all(path: Path, counted: bool, wanted: _WantedFrames) -> None:
    """Decode from the first frame to the last wanted one. If `counted`, frames are named by their numbers."""
    for number, (_, frame) in enumerate(decode_frames(path)):
        wanted.add(number if counted else frame.pts, frame)
        if wanted.complete:
            break


def _read_some(path: Path, starts: Int64[np.ndarray, " K"], wanted: _WantedFrames) -> None:
    """Decode no more than what the wanted frames need; there are keyframes to start from at the times `starts`."""
    with open_quickly(path) as container:
        video = best_stream(container)
        for stream in container.streams:
            if stream is not video:
                stream.discard = Discard.all
        decoder = video.codec_context
        if decoder is None:
            raise _Unseekable
        wanted.stated = stated_colours(decoder)
        skip = "NONREF" if can_skip(decoder.codec.canonical_name, decoder.extradata or b"") else "DEFAULT"
        packets = container.demux(video)
        sent: set[int | None] = set()
        for start, times in _runs(sorted(wanted.names), starts):
            if (
                start is not None and start not in sent
            ):  # else it went to the decoder with frames that are displayed before it
                wanted.take(decoder.decode())  # what it still holds
                container.seek(start, stream=video)
                packets = itertools.dropwhile(functools.partial(_is_before, start), container.demux(video))
            unsent = set(times) - sent
            while unsent:
                packet = next(packets)
                if packet.is_corrupt or not packet.size:
                    raise _Unseekable
                time = packet.pts
                decoder.skip_frame = "DEFAULT" if time in wanted.names else skip
                wanted.take(decoder.decode(packet))
                sent.add(time)
                unsent.discard(time)
        wanted.take(decoder.decode())


def _runs(times: Sequence[int], starts: Int64[np.ndarray, " K"]) -> list[tuple[int | None, list[int]]]:
    """Return rising times in groups by where decoding starts; None is the beginning of the file.

    What is displayed from a keyframe on can be decoded from there; what is stored after it need not.
    """
    runs: dict[int | None, list[int]] = {}
    for time, after in zip(times, np.searchsorted(starts, times, side="right").tolist(), strict=True):
        # Nothing is gained by looking for the first keyframe.
        runs.setdefault(int(starts[after - 1]) if after > 1 else None, []).append(time)
    return list(runs.items())


def _is_before(start: int, packet: av.Packet) -> bool:
    """Return whether the keyframe at `start` is still to come; seeking need not hit it."""
    if not packet.size or (packet.is_keyframe and (packet.pts is None or packet.pts > start)):
        raise _Unseekable
    return not packet.is_keyframe or packet.pts != start


def can_skip(codec: str, record: bytes) -> bool:
    """Return whether frames that a decoder takes for non-reference ones are such, by the codec and its `extradata`."""
    if codec != "hevc":
        return codec in CAN_SKIP
    # In HEVC frames of a higher temporal layer may refer to them: the number of layers stands in the hvcC record.
    return len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1
