"""The loop over a video's packets in compiled code, without Python's lock: see ffmpeg.py, which opens the file.

Nothing here may be called before `ffmpeg.why_not` has told where FFmpeg's functions are: the process would end.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped
from numba import carray, types
from numba.extending import overload

from dali_pipes import planar
from dali_pipes.compiling import njit, pointer

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

PREFIX = "dfer_"  # of the names under which compiled code finds the functions of PyAV's FFmpeg, not of another
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


class Decoder(NamedTuple):
    """Addresses of FFmpeg's objects for one file, and what is needed to use them."""

    container: int
    codec: int
    packet: int
    frame: int
    stream: int  # number of it
    skip_frame: int  # address of the decoder's setting
    skip: int  # what it is for packets that nobody wants


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
    is_hdr: Bool[np.ndarray, " _"]  # by FFmpeg's number of a transfer function


class Clip(NamedTuple):
    """What is made of the wanted frames, one by one while they are in the cache, by the CPU's kernel."""

    pictures: Shaped[np.ndarray, "T S S 3"]  # as of planar.fused
    place: Int64[np.ndarray, " n"]  # of each wanted frame among them
    resize: planar.Resize
    parameters: Float32[np.ndarray, " P"]


@njit(nogil=True)
def decode_clip(decoder, frames, pictures, place, parameters):
    """Decode what the wanted frames need and make pictures of them, as `Clip` says; return as `decode`."""
    resize = planar.resize_of(frames.height, frames.width, pictures.shape[1], parameters)
    return decode(decoder, frames, Clip(pictures, place, resize, parameters))


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
            number = _number_of(frames.pts, _int64(decoder.packet + _PACKET_PTS))
            place = frames.place[number] if number >= 0 else -1
            _set_int32(decoder.skip_frame, 0 if place >= 0 else decoder.skip)
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
        if _int32(decoder.packet + _PACKET_STREAM) == decoder.stream:
            if _int32(decoder.packet + _PACKET_SIZE) > 0 and not _int32(decoder.packet + _PACKET_FLAGS) & _CORRUPT:
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
        time, is_key = _int64(decoder.packet + _PACKET_PTS), _int32(decoder.packet + _PACKET_FLAGS) & _KEY
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
    if _int32(frame + _ERRORS) != 0 or _int32(frame + _FLAGS) & _CORRUPT_FRAME:  # FFmpeg has patched over missing data
        return False
    number = _number_of(frames.pts, _int64(frame + _PTS))
    place = frames.place[number] if number >= 0 else -1
    if place < 0:
        return True
    if _int32(frame + _HEIGHT) != frames.height or _int32(frame + _WIDTH) != frames.width:
        return False
    if not _is_plain(frame, frames):
        return False
    for plane in range(3):
        if _int32(frame + _LINES + 4 * plane) < (frames.width if plane == 0 else frames.width // 2):
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
            line, step = _int64(frame + 8 * plane), _int32(frame + _LINES + 4 * plane)
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
    shape = rows, _int32(frame + _LINES + 4 * number)
    return carray(pointer(_int64(frame + 8 * number)), shape, np.uint8)


@njit(nogil=True)
def _is_plain(frame, frames):
    """Return whether a frame is planar, shown as it is stored, and in the colours of the index."""
    kind = _int32(frame + _FORMAT)
    if (kind != _YUV420P and kind != _YUVJ420P) or _side_data(frame, _DISPLAY_MATRIX) != 0:
        return False
    # What the stream does not state, the container may.
    colours = np.empty(4, np.int64)
    for i in range(4):
        colours[i] = _int32(frame + _COLOURS + 4 * i)
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


@njit(nogil=True)
def _int64(address):
    return carray(pointer(address), (1,), np.int64)[0]


@njit(nogil=True)
def _int32(address):
    return np.int64(carray(pointer(address), (1,), np.int32)[0])


@njit(nogil=True)
def _set_int32(address, value):
    carray(pointer(address), (1,), np.int32)[0] = value
