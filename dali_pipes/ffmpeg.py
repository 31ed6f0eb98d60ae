"""Frames of a video by FFmpeg in one call of compiled code, where PyAV takes Python's lock twice for each packet.

It does what `dfer.video.random_access.read_frames` does, by the FFmpeg that PyAV brings, but only what is plain: planar
frames of 8 bits and 4:2:0 with even sides, shown as they are stored, in the colours of the index, of files whose index
has keyframes. Whatever is not as it should be, or only unusual,
is left to `read_frames`, which finds out what it is.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
from llvmlite import binding

from dali_pipes import ffmpeg_loop
from dfer.cli import say_once
from dfer.video.colour import MATRICES, Matrix
from dfer.video.decode import LIMITS, QUICK, format_of
from dfer.video.hdr import TRANSFERS
from dfer.video.random_access import can_skip

# Places of the fields that are read, here and in ffmpeg_loop.py, in the structures of FFmpeg 8, whose fields do not
# move before the next of these versions: libavformat/avformat.h, libavcodec/codec_par.h and libavutil/opt.h.
_VERSIONS = {"avutil": 60, "avcodec": 62, "avformat": 62}
_NUM_STREAMS, _STREAMS = 44, 48  # AVFormatContext
_CODEC_PARAMETERS, _DISCARD = 16, 68  # AVStream
_CODEC_ID, _EXTRADATA, _EXTRADATA_SIZE = 4, 16, 24  # AVCodecParameters
_COLOURS_OF_STREAM = 100  # range, primaries, transfer, matrix
_OPTION_OFFSET = 16  # AVOption
_ALL, _UNREFERENCED = 48, 8  # AVDISCARD_ALL, AVDISCARD_NONREF

_IS_HDR = np.isin(np.arange(max(TRANSFERS) + 1), list(TRANSFERS))  # by FFmpeg's number of a transfer function

_ADDRESS, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_SIGNATURES: dict[str, tuple] = {  # library, result, arguments
    "av_find_input_format": ("avformat", _ADDRESS, _TEXT),
    "avformat_open_input": ("avformat", _INT, _ADDRESS, _TEXT, _ADDRESS, _ADDRESS),
    "av_find_best_stream": ("avformat", _INT, _ADDRESS, _INT, _INT, _INT, _ADDRESS, _INT),
    "avformat_close_input": ("avformat", None, _ADDRESS),
    "avcodec_find_decoder": ("avcodec", _ADDRESS, _INT),
    "avcodec_get_name": ("avcodec", _TEXT, _INT),
    "avcodec_alloc_context3": ("avcodec", _ADDRESS, _ADDRESS),
    "avcodec_parameters_to_context": ("avcodec", _INT, _ADDRESS, _ADDRESS),
    "avcodec_open2": ("avcodec", _INT, _ADDRESS, _ADDRESS, _ADDRESS),
    "avcodec_free_context": ("avcodec", None, _ADDRESS),
    "av_packet_alloc": ("avcodec", _ADDRESS),
    "av_packet_free": ("avcodec", None, _ADDRESS),
    "av_frame_alloc": ("avutil", _ADDRESS),
    "av_frame_free": ("avutil", None, _ADDRESS),
    "av_opt_find": ("avutil", _ADDRESS, _ADDRESS, _TEXT, _TEXT, _INT, _INT),
    "av_dict_set": ("avutil", _INT, _ADDRESS, _TEXT, _TEXT, _INT),
    "av_dict_free": ("avutil", None, _ADDRESS),
}


@functools.cache
def why_not() -> str | None:
    """Return why the FFmpeg that PyAV brings is not used by compiled code; None if it is."""
    try:
        found = _libraries()
        for name, version in _VERSIONS.items():
            major = found[name][f"{name}_version"]() >> 16
            if major != version:
                return f"PyAV's lib{name} is of version {major}, not {version}"
        for name, functions in ffmpeg_loop.FUNCTIONS.items():
            for function in functions:
                address = ctypes.cast(found[name][function], ctypes.c_void_p).value
                binding.add_symbol(ffmpeg_loop.PREFIX + function, address)
        _functions()
    except (OSError, AttributeError) as error:
        return f"PyAV's FFmpeg is not where it is looked for ({error})"
    return None


def _libraries() -> dict[str, ctypes.CDLL]:
    folder = Path(av.__file__).resolve().parent.parent / "av.libs"
    found = {}
    for name in _VERSIONS:
        files = sorted(folder.glob(f"lib{name}-*.so*"))
        if len(files) != 1:
            raise OSError(f"{len(files)} files in {folder} are lib{name}")
        found[name] = ctypes.CDLL(str(files[0]))
    return found


@functools.cache
def _functions() -> SimpleNamespace:
    """Return the functions of FFmpeg that open a file and close it. They are called without Python's lock."""
    libraries, found = _libraries(), SimpleNamespace()
    for name, (library, result, *arguments) in _SIGNATURES.items():
        function = libraries[library][name]
        function.restype, function.argtypes = result, arguments
        setattr(found, name, function)
    return found


def _new(shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    return np.empty(shape, np.uint8)


class Wanted(NamedTuple):
    """Frames of a video."""

    path: Path
    pts: Int64[np.ndarray, " F"]  # of its scan, as key, matrix and full_range
    key: Bool[np.ndarray, " F"]
    frames: Int64[np.ndarray, " T"]  # their numbers
    size: tuple[int, int]  # height and width of a frame in pixels
    matrix: Matrix
    full_range: bool


def read_planar(
    wanted: Wanted, allocate: Callable[[tuple[int, ...]], UInt8[np.ndarray, "..."]] = _new
) -> tuple[UInt8[np.ndarray, "n rows W 1"], Int64[np.ndarray, " T"]] | None:
    """Return the frames as `read_frames` does, each once, and which one each of T is.

    None if that is for `read_frames` to do: all must be planar, and nothing unusual.

    Args:
        wanted: the frames.
        allocate: memory of a shape.
    """
    if not _can_read(wanted):
        return None
    height, width = wanted.size
    numbers, which = np.unique(wanted.frames, return_inverse=True)
    planar = allocate((len(numbers), height * 3 // 2, width, 1))
    with _Opened(wanted.path) as opened:
        known = _known(wanted, numbers, opened.colours)
        if opened.decoder is None or not ffmpeg_loop.decode(opened.decoder, known, planar):
            return None
    return planar, which


def read_clip(wanted: Wanted, out: Shaped[np.ndarray, "T S S 3"], parameters: Float32[np.ndarray, " P"]) -> bool:
    """Write what planar.fused makes of the frames to `out`; return False where `read_planar` returns None.

    Each is resized where FFmpeg has decoded it: it is not copied, and still in the cache.

    Args:
        wanted: the frames.
        out: as of planar.fused, for each.
        parameters: see there.
    """
    if not _can_read(wanted):
        return False
    numbers, first, which = np.unique(wanted.frames, return_index=True, return_inverse=True)
    with _Opened(wanted.path) as opened:
        known = _known(wanted, numbers, opened.colours)
        if opened.decoder is None or not ffmpeg_loop.decode_clip(opened.decoder, known, out, first, parameters):
            return False
    again = np.flatnonzero(first[which] != np.arange(len(which)))
    out[again] = out[first[which[again]]]
    return True


def _can_read(wanted: Wanted) -> bool:
    if (why := why_not()) is not None:
        say_once(f"{why}: videos are decoded packet by packet, which holds Python's lock")
        return False
    return bool(wanted.key.any()) and not (wanted.size[0] % 2 or wanted.size[1] % 2) and len(wanted.frames) > 0


def _known(wanted: Wanted, numbers: Int64[np.ndarray, " n"], colours: Int64[np.ndarray, " 4"]) -> ffmpeg_loop.Frames:
    """Return what compiled code has to know of the frames; `colours` are those that the container states."""
    place = np.full(len(wanted.pts), -1)
    place[numbers] = np.arange(len(numbers))
    matrices = np.array([MATRICES.get(number) == wanted.matrix for number in range(max(MATRICES) + 1)])
    pts, key, seen = np.ascontiguousarray(wanted.pts), np.ascontiguousarray(wanted.key), np.full(4, -1)
    looks = (*wanted.size, wanted.full_range, matrices, _IS_HDR)
    return ffmpeg_loop.Frames(pts, key, numbers, place, colours, seen, *looks)


class _Opened:
    """A video file whose decoder is open, as a context; `decoder` is None if that cannot be done."""

    def __init__(self, path: Path):
        self._path, self._ffmpeg = path, _functions()
        self._objects = (ctypes.c_void_p * 4)()  # container, decoder, packet, frame
        self.decoder: ffmpeg_loop.Decoder | None = None
        self.colours = np.zeros(4, np.int64)

    def __enter__(self) -> "_Opened":
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ffmpeg, container = self._ffmpeg, ctypes.addressof(self._objects)
        # Each takes the address of the address, and does nothing where that is 0.
        ffmpeg.av_frame_free(container + 24)
        ffmpeg.av_packet_free(container + 16)
        ffmpeg.avcodec_free_context(container + 8)
        ffmpeg.avformat_close_input(container)

    def _open(self) -> None:
        ffmpeg = self._ffmpeg
        parameters, stream = self._open_container()
        if not parameters:
            return
        self.colours[:] = [_number(parameters + _COLOURS_OF_STREAM + 4 * i, _INT) for i in range(4)]
        kind = _number(parameters + _CODEC_ID, _INT)
        codec = ffmpeg.avcodec_find_decoder(kind)
        self._objects[1] = decoder = ffmpeg.avcodec_alloc_context3(codec) if codec else None
        if not decoder or ffmpeg.avcodec_parameters_to_context(decoder, parameters) < 0:
            return
        with _Options({**LIMITS, "threads": "1"}) as options:
            if ffmpeg.avcodec_open2(decoder, codec, options.address) < 0:
                return
        self._objects[2], self._objects[3] = packet, frame = ffmpeg.av_packet_alloc(), ffmpeg.av_frame_alloc()
        option = ffmpeg.av_opt_find(decoder, b"skip_frame", None, 0, 0)
        if not (packet and frame and option):
            return
        size = _number(parameters + _EXTRADATA_SIZE, _INT)
        record = ctypes.string_at(_number(parameters + _EXTRADATA, _ADDRESS), size) if size else b""
        skip = _UNREFERENCED if can_skip(ffmpeg.avcodec_get_name(kind).decode(), record) else 0
        setting = decoder + _number(option + _OPTION_OFFSET, _INT)
        self.decoder = ffmpeg_loop.Decoder(int(self._objects[0] or 0), decoder, packet, frame, stream, setting, skip)

    def _open_container(self) -> tuple[int, int]:
        """Return the address of the video stream's parameters, 0 if there is none, and the stream's number."""
        ffmpeg = self._ffmpeg
        if not os.path.isfile(self._path):  # a pipe would never end
            return 0, 0
        name = format_of(self._path)
        kind = None if name is None else ffmpeg.av_find_input_format(name.encode())
        file = os.fsencode(os.path.abspath(self._path))  # FFmpeg takes "a:b.mp4" for a protocol
        with _Options(QUICK) as options:
            if ffmpeg.avformat_open_input(ctypes.addressof(self._objects), file, kind, options.address) < 0:
                return 0, 0
        container = int(self._objects[0] or 0)
        stream = ffmpeg.av_find_best_stream(container, 0, -1, -1, None, 0)
        if stream < 0:
            return 0, 0
        table = _number(container + _STREAMS, _ADDRESS)
        streams = [_number(table + 8 * i, _ADDRESS) for i in range(_number(container + _NUM_STREAMS, ctypes.c_uint))]
        for place, other in enumerate(streams):
            if place != stream:
                _INT.from_address(other + _DISCARD).value = _ALL
        return _number(streams[stream] + _CODEC_PARAMETERS, _ADDRESS), stream


class _Options:
    """A dictionary of FFmpeg's, as a context."""

    def __init__(self, options: dict[str, str]):
        self._options, self._pointer = options, ctypes.c_void_p()
        self.address = ctypes.addressof(self._pointer)

    def __enter__(self) -> "_Options":
        for name, value in self._options.items():
            _functions().av_dict_set(self.address, name.encode(), value.encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        _functions().av_dict_free(self.address)


def _number(address: int, kind: type) -> int:
    """Return the number or the address that lies at an address."""
    return kind.from_address(address).value or 0
