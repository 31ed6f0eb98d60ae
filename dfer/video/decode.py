"""Video files to frames, upright and in their true colours, or an error.

`decode` gives every frame once, in presentation order. A trainer wants few frames of many videos: `scan_video` says,
once, what frames there are, `read_frames` then decodes no more than it must for some of them, to the same pixels.
"""

import contextlib
import functools
import itertools
import logging
import os
import re
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeAlias

import av
import numpy as np
from av.filter.context import FilterContext
from av.sidedata.sidedata import SideData, SideDataContainer, Type
from av.stream import Discard
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image

# torchvision, once imported, hands FFmpeg's messages to Python's loggers: what they say stands in the errors too.
logging.getLogger("libav").addHandler(logging.NullHandler())

# What to take from a folder; a file that is named, or listed, may be called anything.
VIDEO_SUFFIX = re.compile(r"\.(3gp|asf|avi|flv|gif|m2?ts|m4v|mkv|mov|mp4|mpe?g|mxf|ogv|ts|vob|webm|wmv)", re.IGNORECASE)
MAX_NAME = 200  # bytes of what is named after a video; disks take 255, and a clip's number or a suffix follows

MAX_SIDE = 8192  # px; what a hostile header may claim is far more
# What a stream itself claims, the decoder hears before we do. It takes two to tell it: said only when a file is opened,
# or only to the decoder, this is without effect.
LIMITS = {"max_pixels": str(MAX_SIDE * MAX_SIDE)}
MAX_REPEATS = 100  # by a constant frame rate, of a frame on average; beyond, the time stamps are broken
# By default swscale repeats chroma samples and truncates: 10-bit colours come out up to 3 levels too dark.
EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
TO_RGB = {"format": "rgb24", "interpolation": EXACT, "threads": 1}
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

Matrix: TypeAlias = Literal["bt601", "bt709", "bt2020"]
LUMA: dict[Matrix, tuple[float, float]] = {  # share of R and of B in Y, from the ITU-R recommendations
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}
# FFmpeg's AVColorSpace. Others than these (RGB, FCC, SMPTE 240M, YCgCo ...) are left to swscale.
MATRICES: dict[int, Matrix] = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601", 9: "bt2020"}
PLANAR = ("yuv420p", "yuvj420p")

# Containers that store a presentation time for each packet, the same however one came to it.
STORES_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Codecs where a packet is a frame that is shown: others hide some (VP8, VP9) or pack and skip them (MPEG-4).
PACKET_IS_FRAME = ("h264", "hevc", "av1", "mjpeg")
# Codecs where what is shown of a frame is all that there is of it if no other frame refers to it: VP8 and VP9 hand on
# probabilities and segment maps as well. AV1's decoder does not skip.
CAN_SKIP = ("h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video")
# What FFmpeg learns by decoding ahead when a file is opened, which takes longer than decoding three frames, the decoder
# learns again. With no codec allowed it only demuxes, and with 32 bytes to look at, one packet.
QUICK = {"codec_whitelist": "none", "probesize": "32"}


class BadVideo(Exception):
    """A video that cannot be used; the message says why."""


@dataclass(frozen=True)
class VideoScan:
    """What `read_frames` has to know of a video. Frame i is the i-th that `decode` gives."""

    pts: Int64[np.ndarray, " F"]  # presentation times in units of the stream's time base, rising
    # Frames to start decoding at. If there is none, not even the first, then frames are told apart by counting all, and
    # pts may be 0, 1, 2 ...
    key: Bool[np.ndarray, " F"]
    height: int  # px, upright, as width
    width: int
    codec: str  # FFmpeg's name of it
    matrix: Matrix  # of a stream that states none: bt601, as in `decode`
    full_range: bool  # Y, Cb and Cr use 0..255, not 16..235 and 16..240


def find_video_files(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The videos in a folder and all below it, in no order; through links too, but not through those in a circle.

    `warn` is told, in one line each, what was not looked into.
    """
    # Names with a leading dot are what macOS leaves on foreign disks, next to each real file.
    return [path for path in _walk(folder, warn) if VIDEO_SUFFIX.fullmatch(path.suffix) and path.name[0] != "."]


def _walk(source: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    folders: list[tuple[Path, frozenset[str]]] = [(source, frozenset())]
    while folders:
        folder, above = folders.pop()
        here = os.path.realpath(folder)
        if here in above:
            warn(f"{folder}: a link in a circle, not followed")
            continue
        try:
            names = os.listdir(folder)
        except OSError as error:
            warn(f"{folder}: cannot be read ({error.strerror})")
            continue
        for path in (folder / name for name in names):
            if os.path.isdir(path):  # unlike Path's and DirEntry's methods it never raises
                folders.append((path, above | {here}))
            else:
                yield path


def unique_names(paths: Sequence[str]) -> list[str]:
    """A name for each relative path: without suffix, unique on any disk and safe in a row of a list."""
    names: list[str] = []
    taken = set()
    for path in paths:
        stem, _ = os.path.splitext(path)
        printable = ("".join(c if c.isprintable() else "_" for c in part) for part in Path(stem).parts if part != "..")
        short = (part.encode()[:MAX_NAME].decode(errors="ignore") for part in printable)
        name = unique = "/".join(part.strip(" .") or "_" for part in short)
        number = 1
        while unique.casefold() in taken:  # a.mp4 beside a.avi, or A.mp4 where the disk ignores case
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique.casefold())
        names.append(unique)
    return names


class _Lost(Exception):
    """A frame that did not come out where its scan says that it would."""


def decode(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """All frames of a video in presentation order, with their times in seconds, which always rise.

    They are upright, and RGB by the matrix and range that the stream states.

    A stream that states no matrix is taken for BT.601, as the ffmpeg program does.

    Raises:
        BadVideo, av.FFmpegError: if there is nothing to decode or the video is truncated or damaged, which may show
            only after its last good frame.
    """
    rgb = VideoReformatter()
    for now, frame in _decode(path):
        pixels = rgb.reformat(frame, **TO_RGB).to_ndarray()
        yield now, _upright(Image.fromarray(pixels), _display_matrix(frame))


def claimed_seconds(path: Path) -> float | None:
    """How long a video is by its header, which may be wrong; None if it does not say.

    Raises:
        BadVideo, av.FFmpegError, OSError: if it cannot be opened as a video.
    """
    with _open(path) as container:
        video = _best_video(container)
        if container.duration is None or container.duration <= 0:
            return float(video.duration * video.time_base) if video.duration else None
        return container.duration / av.time_base


def write_mp4(path: Path, frames: Iterable[tuple[float, UInt8[np.ndarray, "H W 3"]]]) -> None:
    """Write frames, of one even height and width, at their times in seconds, rising, as H.264 that any browser plays.

    The file is there whole or not at all.

    Raises:
        OSError, av.FFmpegError: if it cannot be written.
    """
    with (
        _whole(path) as partial,
        av.open(str(partial), "w", format="mp4", container_options={"movflags": "faststart"}) as container,
    ):
        options = {"preset": "veryfast", "crf": "21"}
        video, rgb = container.add_stream("libx264", rate=25, options=options), VideoReformatter()
        video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 90000)
        # Players guess BT.709 for large pictures that state nothing.
        video.codec_context.colorspace, video.codec_context.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        for time, pixels in frames:
            if not video.codec_context.is_open:
                video.height, video.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = rgb.reformat(frame, format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, interpolation=EXACT)
            frame.time_base, frame.pts = video.codec_context.time_base, round(90000 * time)
            container.mux(video.encode(frame))
        container.mux(video.encode())


def write_gif(
    path: Path,
    frames: Iterable[tuple[float, UInt8[np.ndarray, "H W 3"]]],
    samples: Iterable[UInt8[np.ndarray, "H W 3"]],
) -> None:
    """Write frames, of one height and width, as a GIF that repeats, with its 256 colours chosen from the samples.

    Times are in seconds, rising, and rounded to 1/100; browsers slow down what is faster than 50 frames/s. One frame is
    held at a time. The file is there whole or not at all.

    Raises:
        OSError, av.FFmpegError: if it cannot be written.
    """
    base, first = Fraction(1, 100), True
    palette = _palette(samples)
    # Its pattern lies still, where the usual dithering would have all of a frame flicker for one pixel that changes.
    options = "dither=bayer:bayer_scale=5"
    with _whole(path) as partial, av.open(str(partial), "w", format="gif") as container:
        video = container.add_stream("gif", rate=25)
        video.pix_fmt, video.codec_context.time_base = "pal8", base
        for time, pixels in frames:
            if first:
                video.height, video.width = pixels.shape[:2]
                graph, first = av.filter.Graph(), False
                source = graph.add_buffer(width=video.width, height=video.height, format="rgb24", time_base=base)
                colours = graph.add_buffer(width=16, height=16, format=palette.format.name, time_base=base)
                mapped, sink = graph.add("paletteuse", options), graph.add("buffersink")
                source.link_to(mapped, 0, 0)
                colours.link_to(mapped, 0, 1)
                mapped.link_to(sink)
                graph.configure()
                palette.pts, palette.time_base = 0, base
                colours.push(palette)
                colours.push(None)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base, frame.pts = base, round(100 * time)
            source.push(frame)
            _drain(sink, container, video)
        source.push(None)
        _drain(sink, container, video)
        container.mux(video.encode())


def _palette(samples: Iterable[UInt8[np.ndarray, "H W 3"]]) -> av.VideoFrame:
    """The colours that many pictures are shown best with."""
    graph = None
    for number, pixels in enumerate(samples):
        if graph is None:
            graph = av.filter.Graph()
            height, width = pixels.shape[:2]
            source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 100))
            generator, sink = graph.add("palettegen", "reserve_transparent=1"), graph.add("buffersink")
            source.link_to(generator)
            generator.link_to(sink)
            graph.configure()
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.time_base, frame.pts = Fraction(1, 100), number
        source.push(frame)
    source.push(None)
    return sink.pull()


def _drain(sink: FilterContext, container: av.container.OutputContainer, video: av.VideoStream) -> None:
    """Write what has come out of a filter."""
    with contextlib.suppress(BlockingIOError, EOFError):
        while True:
            container.mux(video.encode(sink.pull()))


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end; if it comes to that."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def record(source: str, path: Path, seconds: float, format: str | None = None) -> None:
    """Write what a camera or a stream shows for so long, or until the interrupt key, with `write_mp4`.

    `source` is all that FFmpeg opens, `format` its name of the device or container, if the source does not tell.

    Raises:
        BadVideo, av.FFmpegError, OSError: if nothing comes, or it cannot be written.
    """

    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    def frames() -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
        rgb, first, now, size = VideoReformatter(), None, -np.inf, {}
        with av.open(source, format=format, metadata_errors="replace", options=LIMITS, timeout=10) as container:
            for frame in container.decode(_best_video(container)):
                _check_size(frame)
                if frame.is_corrupt or frame.time is None or frame.time <= now:
                    continue  # as streams begin
                first, now = frame.time if first is None else first, frame.time
                if stopped or now - first >= seconds:
                    break
                size = size or {"width": max(frame.width // 2 * 2, 2), "height": max(frame.height // 2 * 2, 2)}
                yield now - first, rgb.reformat(frame, **TO_RGB, **size).to_ndarray()
        if first is None:
            raise BadVideo("no frames")

    before = signal.signal(signal.SIGINT, stop)  # an exception could come anywhere, and cost the file
    try:
        write_mp4(path, frames())
    finally:
        signal.signal(signal.SIGINT, before)


def scan_video(path: Path) -> VideoScan:
    """What frames a video has, from its packets; only the first frame is decoded.

    Where packets do not tell (AVI, MPEG-TS, FLV and raw streams; VP8, VP9 and MPEG-4; frames before the first
    keyframe), all frames are decoded once.

    Raises:
        BadVideo, av.FFmpegError: if there is nothing to decode or the video is truncated. Damage shows only to who
            decodes.
    """
    with _open(path) as container:
        video = _best_video(container)
        decoder = video.codec_context
        if decoder is None:
            raise BadVideo("no decoder for it")
        first, packets, ends = None, [], {}
        for packet in _packets(container, video, ends):
            if first is None:
                with contextlib.suppress(av.FFmpegError):  # if nothing comes of it, all frames are decoded
                    frames = packet.decode()
                    if not frames and not packets and not packet.is_discard:
                        frames = decoder.decode()  # do not wait for those that are shown before
                        decoder.flush_buffers()
                    first = next(iter(frames), None)
            if packet.size:
                packets.append((packet.pts, _starts(packet, decoder), packet.is_discard))
        if not packets:
            raise BadVideo("no frames")
        _check_end(container, video, ends)
        codec = decoder.codec.canonical_name
        stores_times = (
            container.format.name in STORES_TIMES
            # Matroska may hold an AVI in disguise, with the codec's tag in it.
            and (container.format.name != "matroska,webm" or decoder.codec_tag == "\0\0\0\0")
            and decoder.field_order in (0, 1)  # unknown, progressive: else a packet may be half a frame
            and len(container.streams.video) == 1  # which is best may depend on how far one has looked
        )
    shown = [pts for pts, _, discard in packets if not discard]
    start, starts_clean, _ = packets[0]
    told = (
        first is not None
        and stores_times
        and codec in PACKET_IS_FRAME
        and starts_clean
        and None not in shown
        and len(set(shown)) == len(shown)
        and min(shown) >= start
    )
    if not told:
        shown = []
        for _, frame in _decode(path):
            first = frame if first is None else first
            shown.append(frame.pts)
        timed = None not in shown and all(a < b for a, b in itertools.pairwise(shown))
        stores_times &= timed
        if not timed:
            shown = range(len(shown))
    times = np.sort(np.array(shown, dtype=np.int64))
    starts = [pts for pts, starts, discard in packets if starts and not discard] if stores_times else []
    picture = _upright(Image.new("1", (first.width, first.height)), _display_matrix(first))
    return VideoScan(
        pts=times,
        key=np.isin(times, np.array(starts, dtype=np.int64)),
        height=picture.height,
        width=picture.width,
        codec=codec,
        matrix=MATRICES.get(first.colorspace, "bt601"),
        full_range=_is_full_range(first),
    )


def check_claims(path: Path) -> None:
    """That a file is a video of sides that can be decoded, as far as its header says; nothing is decoded.

    Raises:
        BadVideo, av.FFmpegError, OSError: if it is not.
    """
    with _open(path, format=_format(path), container_options=QUICK) as container:
        _best_video(container)


def read_frames(
    path: Path,
    pts: Int64[np.ndarray, " F"],
    key: Bool[np.ndarray, " F"],
    frames: Int64[np.ndarray, " T"],
    matrix: Matrix,
    full_range: bool,
) -> list[UInt8[np.ndarray, "rows width channels"]]:
    """Some frames of a video, by their numbers, which rise and may repeat; `pts` to `full_range` are from its scan.

    A frame of 8-bit 4:2:0 with even sides, neither turned nor mirrored, comes as planar I420 of shape
    (H * 3 // 2, W, 1) for `yuv_to_rgb`: H rows of Y, then U and V, H/2 x W/2 each, without gaps. Where its chroma
    samples lie between those of Y is the consumer's business. Any other frame, and any in other colours than the
    scan's, comes as RGB of shape (H, W, 3), to the pixel as from `decode`. Frames that repeat share their memory.

    Decodes on the calling thread alone and mostly without the GIL. Skips what no wanted frame refers to; a video where
    that fails is decoded as by `decode`, up to the last wanted frame. What FFmpeg makes up for frames that are missing
    from a spliced stream, without a word, may differ from what it makes up for `decode`.

    Raises:
        BadVideo, av.FFmpegError: if a wanted frame does not come out whole.
    """
    counted = not key.any()
    names = (frames if counted else pts[frames]).tolist()
    taken = _Taken(set(names), matrix, full_range)
    if not counted:
        with contextlib.suppress(_Lost, BadVideo, av.FFmpegError, OSError):  # if it is not our doing, it will recur
            _read_some(path, pts[key], taken)
    if len(taken.frames) < len(taken.wanted):
        taken = _Taken(set(names), matrix, full_range)
        _read_all(path, counted, taken)
    for frame, name in zip(frames.tolist(), names, strict=True):
        if name not in taken.frames:
            raise BadVideo(f"frame {frame} does not come out of the decoder")
    return [taken.frames[name] for name in names]


def yuv_to_rgb(matrix: Matrix, full_range: bool) -> Float32[np.ndarray, "3 4"]:
    """(Y, Cb, Cr) in 0..255 -> RGB in 0..255, not yet clamped: rgb = m[:, :3] @ yuv + m[:, 3].

    By ITU-R BT.601-7, BT.709-6 and BT.2020-2 (non-constant luminance), for 8 bits: with Y' = Kr R' + Kg G' + Kb B',
    Cb' = (B' - Y') / (2 - 2 Kb) and Cr' = (R' - Y') / (2 - 2 Kr), the samples are Y = 219 Y' + 16 and
    C = 224 C' + 128 or, in full range (JFIF), Y = 255 Y' and C = 255 C' + 128.
    """
    red, blue = LUMA[matrix]
    green = 1 - red - blue
    colour = np.array(
        [
            [1, 0, 2 - 2 * red],
            [1, -(2 - 2 * blue) * blue / green, -(2 - 2 * red) * red / green],
            [1, 2 - 2 * blue, 0],
        ]
    )
    scale, zero = ((1, 1, 1), (0, 128, 128)) if full_range else ((255 / 219, 255 / 224, 255 / 224), (16, 128, 128))
    colour *= scale
    return np.column_stack([colour, -colour @ zero]).astype(np.float32)


def _open(path: Path, **options: object) -> av.container.InputContainer:
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadVideo("not a file")  # a pipe would never end
    # Absolute, as FFmpeg takes "a:b.mp4" for a protocol; old files have tags that are not UTF-8.
    return av.open(os.path.abspath(path), metadata_errors="replace", options=LIMITS, **options)


def _best_video(container: av.container.InputContainer) -> av.VideoStream:
    video = container.streams.best("video")
    if video is None:
        raise BadVideo("no video stream")
    if video.codec_context is not None:  # else there is no decoder, which decode() says
        _check_size(video.codec_context)
        video.codec_context.thread_count = 1  # the workers are the parallelism
        video.codec_context.options = LIMITS
    return video


def _packets(
    container: av.container.InputContainer, video: av.VideoStream, ends: dict[int, float]
) -> Iterator[av.Packet]:
    """The packets of a video stream; `ends` learns where, in seconds, each stream ends."""
    for packet in container.demux([video, *container.streams.audio]):
        if packet.is_corrupt:
            raise BadVideo("truncated or damaged")
        index = packet.stream.index
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[index] = max(ends.get(index, 0.0), end)
        if index == video.index:
            yield packet


def _check_end(container: av.container.InputContainer, video: av.VideoStream, ends: dict[int, float]) -> None:
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
    end = float(((video.start_time or 0) + video.duration) * video.time_base) if video.duration else np.inf
    if ends.get(video.index, 0.0) < end - slack:
        raise BadVideo("truncated")


def _decode(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """All frames as they come out of the decoder, with times as of `decode`."""
    with _open(path) as container:
        video = _best_video(container)
        ends: dict[int, float] = {}
        num_frames, now = 0, -np.inf
        for packet in _packets(container, video, ends):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                if video.codec_context.width:
                    raise
                # FFmpeg forgets a size beyond its limit, and says no more than this about it.
                raise BadVideo(f"damaged, or more than {MAX_SIDE} x {MAX_SIDE} pixels") from None
            for frame in frames:
                if frame.is_corrupt:  # FFmpeg has patched over missing data
                    raise BadVideo("damaged")
                _check_size(frame)
                # Raw streams have no times, broken ones stop the clock.
                now = max(
                    num_frames / float(video.average_rate or 25) if frame.time is None else frame.time, now + 1e-3
                )
                yield now, frame
                num_frames += 1
        if not num_frames:
            raise BadVideo("no frames")
        _check_end(container, video, ends)


class _Taken:
    """The wanted ones of the frames that come out of a decoder, as `read_frames` gives them.

    What runs between two frames finds the processor's caches full of the decoder's data: each call counts.
    """

    def __init__(self, wanted: set[int], matrix: Matrix, full_range: bool) -> None:
        self.wanted = wanted  # presentation times, or numbers where those are no use
        self.frames: dict[int, UInt8[np.ndarray, "rows width channels"]] = {}
        self._colours = matrix, full_range
        self._rgb = VideoReformatter()
        self._looks: tuple = ()
        self._parts: tuple[UInt8[np.ndarray, "T _ _"], ...] = ()  # Y, U and V of all frames; none of RGB frames

    def add(self, name: int, frame: av.VideoFrame) -> None:
        if frame.is_corrupt:  # FFmpeg has patched over missing data
            raise BadVideo("damaged")
        if name not in self.wanted:
            return
        looks = frame.format.name, frame.height, frame.width, frame.colorspace, frame.color_range, frame.rotation
        if looks != self._looks:
            self._looks = looks
            self._prepare(frame)
        if not self._parts:
            pixels = self._rgb.reformat(frame, **TO_RGB).to_ndarray()
            matrix = _display_matrix(frame)
            self.frames[name] = np.array(_upright(Image.fromarray(pixels), matrix))
            return
        place = len(self.frames)
        for plane, part in zip(frame.planes, self._parts, strict=True):
            part[place] = np.ndarray(part.shape[1:], np.uint8, plane, 0, (plane.line_size, 1))  # its rows are padded
        self.frames[name] = self._planar[place]

    def _prepare(self, frame: av.VideoFrame) -> None:
        height, width = frame.height, frame.width
        self._parts = ()
        if (
            frame.format.name in PLANAR
            and not height % 2
            and not width % 2
            and (MATRICES.get(frame.colorspace), _is_full_range(frame)) == self._colours
            and _turn(_display_matrix(frame)) is None
        ):
            self._planar = np.empty((len(self.wanted), height * 3 // 2, width, 1), np.uint8)
            chroma = self._planar[:, height:].reshape(-1, 2, height // 2, width // 2)
            self._parts = self._planar[:, :height, :, 0], chroma[:, 0], chroma[:, 1]


def _read_all(path: Path, counted: bool, taken: _Taken) -> None:
    """Take the wanted frames out of all, which are counted if their times are no use."""
    for number, (_, frame) in enumerate(_decode(path)):
        taken.add(number if counted else frame.pts, frame)
        if len(taken.frames) == len(taken.wanted):
            break


def _read_some(path: Path, starts: Int64[np.ndarray, " K"], taken: _Taken) -> None:
    """Take the wanted frames with no more decoded than what they need; there are keyframes at the times `starts`."""
    # What is shown from a keyframe on can be decoded from there; what is stored after it need not.
    wanted = sorted(taken.wanted)
    runs: dict[int | None, list[int]] = {}
    for time, after in zip(wanted, np.searchsorted(starts, wanted, side="right").tolist(), strict=True):
        # Nothing is gained by looking for the first keyframe.
        runs.setdefault(int(starts[after - 1]) if after > 1 else None, []).append(time)
    with _open(path, format=_format(path), container_options=QUICK) as container:
        video = _best_video(container)
        for stream in container.streams:
            if stream is not video:
                stream.discard = Discard.all
        decoder = video.codec_context
        if decoder is None:
            raise _Lost
        skip = "NONREF" if _can_skip(decoder) else "DEFAULT"
        packets, sent = container.demux(video), {None}
        for start, times in runs.items():
            if start not in sent:  # else it went to the decoder with frames that are shown before it
                for frame in decoder.decode():  # what it still holds
                    taken.add(frame.pts, frame)
                container.seek(start, stream=video)
                packets = itertools.dropwhile(functools.partial(_is_before, start), container.demux(video))
            unsent = set(times) - sent
            while unsent:
                packet = next(packets)
                if packet.is_corrupt or not packet.size:
                    raise _Lost
                time = packet.pts
                decoder.skip_frame = "DEFAULT" if time in taken.wanted else skip
                for frame in decoder.decode(packet):
                    taken.add(frame.pts, frame)
                sent.add(time)
                unsent.discard(time)
        for frame in decoder.decode():
            taken.add(frame.pts, frame)


def _is_before(start: int, packet: av.Packet) -> bool:
    """Whether the keyframe at `start` is still to come; seeking need not hit it."""
    if not packet.size or (packet.is_keyframe and packet.pts > start):
        raise _Lost
    return not packet.is_keyframe or packet.pts != start


def _can_skip(decoder: av.VideoCodecContext) -> bool:
    """Whether frames that the decoder takes for non-reference ones are such."""
    if decoder.codec.canonical_name != "hevc":
        return decoder.codec.canonical_name in CAN_SKIP
    # In HEVC frames of a higher temporal layer may refer to them: the number of layers stands in the hvcC record.
    record = decoder.extradata or b""
    return len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1


def _starts(packet: av.Packet, decoder: av.VideoCodecContext) -> bool:
    """Whether all frames shown from this one on come out the same if decoding starts here."""
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
    """Whether H.264 SEI messages have a recovery point of 0 frames and exact match."""
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


def _format(path: Path) -> str | None:
    """Spares FFmpeg trying all its formats, which is half of opening a file."""
    file = os.open(path, os.O_RDONLY)
    try:
        head = os.read(file, 8)
    finally:
        os.close(file)
    return "mov" if head[4:] == b"ftyp" else "matroska" if head[:4] == b"\x1a\x45\xdf\xa3" else None


def _is_full_range(frame: av.VideoFrame) -> bool:
    return frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")


def _check_size(picture: av.VideoCodecContext | av.VideoFrame) -> None:
    if max(picture.width, picture.height) > MAX_SIDE:
        raise BadVideo(f"{picture.width} x {picture.height} pixels, more than {MAX_SIDE} on a side")


def _display_matrix(frame: av.VideoFrame) -> SideData | None:
    # Not frame.side_data, which refers to the frame that keeps it: then only the garbage collector, which counts
    # objects and not their size, would free frames, by the hundred.
    return SideDataContainer(frame).get(Type.DISPLAYMATRIX)


def _turn(matrix: SideData | None) -> Image.Transpose | None:
    """What makes a frame upright. VideoFrame.rotation will not do: it takes mirrored for upside down."""
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # 16.16 fixed point
    return UPRIGHT.get(tuple((x > 2**15) - (x < -(2**15)) for x in (a, b, c, d)))


def _upright(image: Image.Image, matrix: SideData | None) -> Image.Image:
    turn = _turn(matrix)
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
