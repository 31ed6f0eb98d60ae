"""The frames of a video in compiled code, without Python's lock: see ffmpeg.py.

Nothing here may be called before `ffmpeg.why_not` has told where FFmpeg's functions are: the process would end.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped, UInt8
from numba import carray, types
from numba.extending import overload

from dali_pipes import planar
from dali_pipes.compiling import njit, pointer
from dali_pipes.ffmpeg_open import PREFIX, close_video, int32_at, int64_at, open_video, set_int32

# Places of the fields that are read, in the structures of FFmpeg 8: libavcodec/packet.h and libavutil/frame.h.
_PACKET_PTS, _PACKET_SIZE, _PACKET_STREAM, _PACKET_FLAGS = 8, 32, 36, 40  # AVPacket
_LINES, _WIDTH, _HEIGHT, _FORMAT, _PTS, _FLAGS, _ERRORS = 64, 104, 108, 116, 136, 276, 320  # AVFrame
_COLOURS = 280  # range, primaries, transfer, matrix

_KEY, _CORRUPT = 1, 2  # flags of a packet
_CORRUPT_FRAME = 1
_DISPLAY_MATRIX = 6  # kind of side data
_NOT_YET, _END = -11, -int.from_bytes(b"EOF ", "little")  # AVERROR(EAGAIN), AVERROR_EOF
_BACKWARD = 1  # AVSEEK_FLAG_BACKWARD
_YUV420P, _YUVJ420P, _FULL_RANGE, _UNSPECIFIED = 0, 12, 2, 2

FUNCTIONS = {
    "avformat": ("av_read_frame", "av_seek_frame"),
    "avcodec": ("avcodec_send_packet", "avcodec_receive_frame", "avcodec_flush_buffers", "av_packet_unref"),
    "avutil": ("av_frame_get_side_data",),
}
_two, _nothing = types.intc(types.int64, types.int64), types.void(types.int64)
_read_packet = types.ExternalFunction(PREFIX + "av_read_frame", _two)
_seek = types.ExternalFunction(PREFIX + "av_seek_frame", types.intc(types.int64, types.intc, types.int64, types.intc))
_send = types.ExternalFunction(PREFIX + "avcodec_send_packet", _two)
_receive = types.ExternalFunction(PREFIX + "avcodec_receive_frame", _two)
_flush = types.ExternalFunction(PREFIX + "avcodec_flush_buffers", _nothing)
_drop_packet = types.ExternalFunction(PREFIX + "av_packet_unref", _nothing)
_side_data = types.ExternalFunction(PREFIX + "av_frame_get_side_data", types.int64(types.int64, types.intc))
_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


class Videos(NamedTuple):
    """N videos of an index."""

    paths: UInt8[np.ndarray, " _"]  # each ends with 0
    path: Int64[np.ndarray, " N"]  # where in `paths` each begins
    first: Int64[np.ndarray, " _"]  # (N + 1,); the frames of video i are those from first[i] to first[i + 1]
    pts: Int64[np.ndarray, " F"]  # rising in each video
    key: Bool[np.ndarray, " F"]
    height: Int32[np.ndarray, " N"]
    width: Int32[np.ndarray, " N"]
    full_range: Bool[np.ndarray, " N"]
    matrix: Int64[np.ndarray, " N"]  # rows of `matrices`
    matrices: Bool[np.ndarray, "K _"]  # by FFmpeg's number of one: whether it is this
    is_hdr: Bool[np.ndarray, " _"]  # by FFmpeg's number of a transfer function


class Frames(NamedTuple):
    """The frames of a video, as its index has them, and those that are wanted."""

    pts: Int64[np.ndarray, " F"]  # rising
    key: Bool[np.ndarray, " F"]
    wanted: Int64[np.ndarray, " n"]  # rising numbers
    place: Int64[np.ndarray, " F"]  # of a frame among those, else -1
    colours: Int64[np.ndarray, " 4"]  # that the container states: range, primaries, transfer, matrix
    seen: Int64[np.ndarray, " 4"]  # that the wanted frames so far state; -1 before the first one
    height: int  # of a frame in pixels, even
    width: int
    is_full_range: bool
    matrices: Bool[np.ndarray, " _"]  # by FFmpeg's number of one: whether it is the index's
    is_hdr: Bool[np.ndarray, " _"]  # as of Videos


class Clip(NamedTuple):
    """What is made of the wanted frames, one by one while they are in the cache, by the CPU's kernel."""

    pictures: Shaped[np.ndarray, "T S S 3"]  # as of planar.fused
    place: Int64[np.ndarray, " n"]  # of each wanted frame among them
    resize: planar.Resize
    parameters: Float32[np.ndarray, " P"]


@njit(nogil=True)
def read_planar(library, videos, video, numbers, planes):
    """Read frames of a video, each once, in their order; return False if that is for `read_frames`.

    Args:
        library: as of open_video.
        videos: as `Videos` says.
        video: its number.
        numbers: (T,) int64, of frames.
        planes: (n, 3 H / 2, W, 1) uint8, for n different ones.
    """
    return _read(library, videos, video, *_wanted(numbers, videos, video), planes)


@njit(nogil=True)
def read_clip(library, videos, video, numbers, pictures, parameters):
    """Write what planar.fused makes of frames of a video, (T, S, S, 3); else as `read_planar`."""
    wanted, place = _wanted(numbers, videos, video)
    first = np.empty(len(wanted), np.int64)
    for t in range(len(numbers) - 1, -1, -1):
        first[place[numbers[t]]] = t
    resize = planar.resize_of(videos.height[video], videos.width[video], pictures.shape[1], parameters)
    if not _read(library, videos, video, wanted, place, Clip(pictures, first, resize, parameters)):
        return False
    begin, size = pictures.ctypes.data, pictures.itemsize * pictures.size // len(pictures)
    for t in range(len(numbers)):
        known = first[place[numbers[t]]]
        if known != t:
            _memcpy(begin + size * t, begin + size * known, size)
    return True


@njit(nogil=True)
def _wanted(numbers, videos, video):
    """Return which frames these are, each once and rising, and for each frame of the video its place there, else -1."""
    place, wanted, count = np.full(videos.first[video + 1] - videos.first[video], -1), np.empty_like(numbers), 0
    for number in numbers:
        if not 0 <= number < len(place):
            raise IndexError("the video has no such frame")
        place[number] = 0
    for number in range(len(place)):
        if place[number] == 0:
            wanted[count], place[number] = number, count
            count += 1
    return wanted[:count], place


@njit(nogil=True)
def _read(library, videos, video, wanted, place, out):
    """Read frames of a video into `out` of `decode`; return False if that is for `read_frames`."""
    height, width = np.int64(videos.height[video]), np.int64(videos.width[video])
    begin, end = videos.first[video], videos.first[video + 1]
    pts, key = videos.pts[begin:end], videos.key[begin:end]
    if len(wanted) == 0 or not key.any() or height % 2 or width % 2:
        return False
    colours, seen, objects = np.zeros(4, np.int64), np.full(4, -1), np.zeros(6, np.int64)
    decoder = open_video(library, videos.paths.ctypes.data + videos.path[video], objects, colours)
    looks = height, width, videos.full_range[video], videos.matrices[videos.matrix[video]], videos.is_hdr
    known = Frames(pts, key, wanted, place, colours, seen, *looks)
    done = decoder.setting != 0 and decode(decoder, known, out)
    close_video(objects)
    return done


@njit(nogil=True)
def decode(decoder, frames, out):
    """Decode what the wanted frames need; return False if it is for `read_frames`.

    `out` takes them: an array, (n, 3 H / 2, W, 1), as they are, or a Clip.
    """
    sent, taken = np.zeros(len(frames.pts), np.bool_), np.zeros(len(frames.wanted), np.bool_)
    first = 0
    while first < len(frames.wanted):
        start, behind = _start_of(frames, frames.wanted[first]), first + 1
        while behind < len(frames.wanted) and _start_of(frames, frames.wanted[behind]) == start:
            behind += 1
        at_start = False
        if start >= 0 and not sent[start]:
            if not _drain(decoder, frames, out, taken) or not _go_to(decoder, frames.pts[start]):
                return False
            at_start = True
        unsent = 0
        for number in frames.wanted[first:behind]:
            unsent += int(not sent[number])
        while unsent > 0:
            if not at_start and not _next_packet(decoder):
                return False
            at_start = False
            number = _number_of(frames.pts, int64_at(decoder.packet + _PACKET_PTS))
            place = frames.place[number] if number >= 0 else -1
            set_int32(decoder.setting, 0 if place >= 0 else decoder.skip)
            failed = _send(decoder.codec, decoder.packet)
            _drop_packet(decoder.packet)
            if failed or not _take_frames(decoder, frames, out, taken):
                return False
            if number >= 0 and not sent[number]:
                sent[number] = True
                unsent -= int(first <= place < behind)
        first = behind
    return _drain(decoder, frames, out, taken) and taken.all()


@njit(nogil=True)
def _start_of(frames, number):
    """Return the last keyframe up to a frame; -1 for the first one, before which nothing is looked for."""
    while number >= 0 and not frames.key[number]:
        number -= 1
    for earlier in range(number - 1, -1, -1):
        if frames.key[earlier]:
            return number
    return -1


@njit(nogil=True)
def _next_packet(decoder):
    """Read the next packet of the stream; return False if there is none, or it is not whole."""
    while _read_packet(decoder.container, decoder.packet) >= 0:
        if int32_at(decoder.packet + _PACKET_STREAM) == decoder.stream:
            if int32_at(decoder.packet + _PACKET_SIZE) > 0 and not int32_at(decoder.packet + _PACKET_FLAGS) & _CORRUPT:
                return True
            break  # an empty packet would tell the decoder that this is the end
        _drop_packet(decoder.packet)
    _drop_packet(decoder.packet)
    return False


@njit(nogil=True)
def _go_to(decoder, pts):
    """Read on from the keyframe at a time, whose packet is the current one then; return False if it does not come."""
    if _seek(decoder.container, decoder.stream, pts, _BACKWARD) < 0:
        return False
    _flush(decoder.codec)
    while _next_packet(decoder):
        time, is_key = int64_at(decoder.packet + _PACKET_PTS), int32_at(decoder.packet + _PACKET_FLAGS) & _KEY
        if is_key and time == pts:
            return True
        _drop_packet(decoder.packet)
        if is_key and (time > pts or time == np.iinfo(np.int64).min):
            return False
    return False


@njit(nogil=True)
def _drain(decoder, frames, out, taken):
    """Take what the decoder still holds."""
    _send(decoder.codec, 0)
    return _take_frames(decoder, frames, out, taken)


@njit(nogil=True)
def _take_frames(decoder, frames, out, taken):
    """Copy the wanted ones of the frames that are decoded; return False if one is not plain, or there was an error."""
    while True:
        code = _receive(decoder.codec, decoder.frame)
        if code < 0:
            return code in (_NOT_YET, _END)
        if not _take(decoder.frame, frames, out, taken):
            return False


@njit(nogil=True)
def _take(frame, frames, out, taken):
    # FFmpeg has patched over missing data.
    if int32_at(frame + _ERRORS) != 0 or int32_at(frame + _FLAGS) & _CORRUPT_FRAME:
        return False
    number = _number_of(frames.pts, int64_at(frame + _PTS))
    place = frames.place[number] if number >= 0 else -1
    if place < 0:
        return True
    if int32_at(frame + _HEIGHT) != frames.height or int32_at(frame + _WIDTH) != frames.width:
        return False
    if not _is_plain(frame, frames):
        return False
    for plane in range(3):
        if int32_at(frame + _LINES + 4 * plane) < (frames.width if plane == 0 else frames.width // 2):
            return False  # lines that run upwards
    put(frame, frames.height, frames.width, out, place)
    taken[place] = True
    return True


def put(frame, height, width, out, place) -> None:
    """Give a frame to `out` of `decode`. Compiled code only: `_put_as` implements it."""


@overload(put, jit_options={"nogil": True})
def _put_as(frame, height, width, out, place):
    def copy(frame, height, width, out, place):
        to = out[place].ctypes.data
        for plane in range(3):
            rows, columns = (height, width) if plane == 0 else (height // 2, width // 2)
            line, step = int64_at(frame + 8 * plane), int32_at(frame + _LINES + 4 * plane)
            for _ in range(rows):
                _memcpy(to, line, columns)
                to += columns
                line += step

    def write(frame, height, width, out, place):
        luma, cb, cr = _plane(frame, 0, height), _plane(frame, 1, height // 2), _plane(frame, 2, height // 2)
        planar.write(out.pictures[out.place[place]], luma, cb, cr, out.resize, out.parameters)

    return copy if isinstance(out, types.Array) else write


@njit(nogil=True)
def _plane(frame, number, rows):
    """Return a plane of a frame where FFmpeg has it, with what fills its lines up."""
    shape = rows, int32_at(frame + _LINES + 4 * number)
    return carray(pointer(int64_at(frame + 8 * number)), shape, np.uint8)


@njit(nogil=True)
def _is_plain(frame, frames):
    """Return whether a frame is planar, shown as it is stored, and in the colours of the index."""
    kind = int32_at(frame + _FORMAT)
    if (kind != _YUV420P and kind != _YUVJ420P) or _side_data(frame, _DISPLAY_MATRIX) != 0:
        return False
    # What the stream does not state, the container may.
    colours = np.empty(4, np.int64)
    for i in range(4):
        colours[i] = int32_at(frame + _COLOURS + 4 * i)
        if frames.seen[i] != -1 and frames.seen[i] != colours[i]:
            return False
        frames.seen[i] = colours[i]
        if colours[i] == (0 if i == 0 else _UNSPECIFIED):
            colours[i] = frames.colours[i]
    if (colours[0] == _FULL_RANGE or kind == _YUVJ420P) != frames.is_full_range:
        return False
    if 0 <= colours[2] < len(frames.is_hdr) and frames.is_hdr[colours[2]]:
        return False
    return 0 <= colours[3] < len(frames.matrices) and frames.matrices[colours[3]]


@njit(nogil=True)
def _number_of(pts, time):
    """Return which frame is shown at a time, -1 if none is."""
    number = np.searchsorted(pts, time)
    return number if number < len(pts) and pts[number] == time else -1
