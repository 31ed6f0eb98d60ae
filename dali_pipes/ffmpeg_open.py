"""Opening a video file by FFmpeg in compiled code, as dfer.video.decode.open_quickly does: see ffmpeg.py.

In Python it took a twentieth of the time of a clip: after each one that is decoded, the processor's caches have none of
Python's code left.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import os
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numba import carray, types

from dali_pipes.compiling import njit, pointer

# Places of the fields that are read, in the structures of FFmpeg 8: libavformat/avformat.h and libavcodec/codec_par.h.
_NUM_STREAMS, _STREAMS = 44, 48  # AVFormatContext
_CODEC_PARAMETERS, _DISCARD = 16, 68  # AVStream
_CODEC, _EXTRADATA, _EXTRADATA_SIZE = 4, 16, 24  # AVCodecParameters
_COLOURS = 100  # range, primaries, transfer, matrix
_ALL, _UNREFERENCED = 48, 8  # AVDISCARD_ALL, AVDISCARD_NONREF

PREFIX = "dfer_"  # of the names under which compiled code finds the functions of PyAV's FFmpeg, not of another
FUNCTIONS = {
    "avformat": ("avformat_open_input", "av_find_best_stream", "avformat_close_input"),
    "avcodec": (
        *("avcodec_find_decoder", "avcodec_alloc_context3", "avcodec_parameters_to_context", "avcodec_open2"),
        *("avcodec_free_context", "av_packet_alloc", "av_packet_free"),
    ),
    "avutil": ("av_frame_alloc", "av_frame_free", "av_dict_copy", "av_dict_free"),
}
_address, _int = types.int64, types.intc


def _function(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    return types.ExternalFunction(PREFIX + name, result(*arguments))


_open_input = _function("avformat_open_input", _int, *[_address] * 4)
_best_stream = _function("av_find_best_stream", _int, _address, _int, _int, _int, _address, _int)
_close_input = _function("avformat_close_input", types.void, _address)
_find_decoder = _function("avcodec_find_decoder", _address, _int)
_alloc_context = _function("avcodec_alloc_context3", _address, _address)
_parameters_to_context = _function("avcodec_parameters_to_context", _int, _address, _address)
_open_decoder = _function("avcodec_open2", _int, _address, _address, _address)
_free_context = _function("avcodec_free_context", types.void, _address)
_alloc_packet, _alloc_frame = _function("av_packet_alloc", _address), _function("av_frame_alloc", _address)
_free_packet = _function("av_packet_free", types.void, _address)
_free_frame = _function("av_frame_free", types.void, _address)
_copy_options = _function("av_dict_copy", _int, _address, _address, _int)
_free_options = _function("av_dict_free", types.void, _address)

# The C library's.
_open = types.ExternalFunction("open", _int(types.uintp, _int))
_pread = types.ExternalFunction("pread", types.intp(_int, types.uintp, types.uintp, types.int64))
_close = types.ExternalFunction("close", _int(_int))
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is not waited for
# What MP4 and QuickTime files begin with, behind four bytes, and Matroska files.
_ATOMS = tuple(int.from_bytes(name, "little") for name in (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free"))
_EBML = int.from_bytes(b"\x1a\x45\xdf\xa3", "little")


class Library(NamedTuple):
    """What is the same for all files: addresses, and numbers of FFmpeg's."""

    mov: int  # formats
    matroska: int
    container_options: int
    decoder_options: int
    skip_frame: int  # where a decoder has this setting
    hevc: int
    can_skip: Int64[np.ndarray, " _"]  # codecs that are as `random_access.can_skip` wants them, but for HEVC


class Decoder(NamedTuple):
    """Addresses of FFmpeg's objects for one file, and what is needed to use them."""

    container: int
    codec: int
    packet: int
    frame: int
    stream: int  # number of it
    setting: int  # address of the decoder's skip_frame; 0 if the file could not be opened
    skip: int  # what that is for packets that nobody wants


@njit(nogil=True)
def open_video(library, path, objects, colours):
    """Return the Decoder of the video stream of a file.

    Args:
        library: as `Library` says.
        path: address of its name, which ends with 0.
        objects: (6,) int64, zeros; for close_video, which must be called in any case.
        colours: (4,) int64; becomes what the container states: range, primaries, transfer, matrix.
    """
    none = Decoder(0, 0, 0, 0, 0, 0, 0)
    memory = objects.ctypes.data
    kind = _format_of(library, path, memory + 40)
    if kind == 0:
        return none
    if _copy_options(memory + 32, library.container_options, 0) < 0:
        return none
    failed = _open_input(memory, path, kind, memory + 32)
    _free_options(memory + 32)
    if failed < 0:
        return none
    stream = np.int64(_best_stream(objects[0], 0, -1, -1, 0, 0))
    if stream < 0:
        return none
    streams, parameters = int64_at(objects[0] + _STREAMS), 0
    for i in range(int32_at(objects[0] + _NUM_STREAMS)):
        if i == stream:
            parameters = int64_at(int64_at(streams + 8 * i) + _CODEC_PARAMETERS)
        else:
            set_int32(int64_at(streams + 8 * i) + _DISCARD, _ALL)
    for i in range(4):
        colours[i] = int32_at(parameters + _COLOURS + 4 * i)
    codec = _find_decoder(int32_at(parameters + _CODEC))
    objects[1] = _alloc_context(codec) if codec else 0
    if objects[1] == 0 or _parameters_to_context(objects[1], parameters) < 0:
        return none
    if _copy_options(memory + 32, library.decoder_options, 0) < 0:
        return none
    failed = _open_decoder(objects[1], codec, memory + 32)
    _free_options(memory + 32)
    objects[2], objects[3] = _alloc_packet(), _alloc_frame()
    if failed < 0 or objects[2] == 0 or objects[3] == 0:
        return none
    skip = _UNREFERENCED if _can_skip(library, parameters) else 0
    return Decoder(objects[0], objects[1], objects[2], objects[3], stream, objects[1] + library.skip_frame, skip)


@njit(nogil=True)
def close_video(objects):
    """Close what `open_video` has opened."""
    memory = objects.ctypes.data  # each takes the address of the address, and does nothing where that is 0
    _free_options(memory + 32)
    _free_frame(memory + 24)
    _free_packet(memory + 16)
    _free_context(memory + 8)
    _close_input(memory)


@njit(nogil=True)
def _format_of(library, path, memory):
    """Return the address of a file's format; 0 if it is none of those that are read here, or no file.

    `memory`: address of room for an int64.
    """
    file = _open(path, _FLAGS)
    if file < 0:
        return 0
    length = _pread(file, memory, 8, 0)
    _close(file)
    if length != 8:  # also of a pipe
        return 0
    for atom in _ATOMS:
        if int32_at(memory + 4) == atom:
            return library.mov
    return library.matroska if int32_at(memory) & 0xFFFFFFFF == _EBML else 0


@njit(nogil=True)
def _can_skip(library, parameters):
    """Return whether frames that the decoder takes for non-reference ones are such: as random_access.can_skip."""
    codec = int32_at(parameters + _CODEC)
    if codec == library.hevc:
        record, size = int64_at(parameters + _EXTRADATA), int32_at(parameters + _EXTRADATA_SIZE)
        return size > 21 and uint8_at(record) == 1 and uint8_at(record + 21) >> 3 & 7 == 1
    return (library.can_skip == codec).any()


@njit(nogil=True)
def int64_at(address):
    return carray(pointer(address), (1,), np.int64)[0]


@njit(nogil=True)
def int32_at(address):
    return np.int64(carray(pointer(address), (1,), np.int32)[0])


@njit(nogil=True)
def uint8_at(address):
    return np.int64(carray(pointer(address), (1,), np.uint8)[0])


@njit(nogil=True)
def set_int32(address, value):
    carray(pointer(address), (1,), np.int32)[0] = value
