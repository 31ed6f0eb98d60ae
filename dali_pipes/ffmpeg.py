"""Frames of a video by FFmpeg in one call of compiled code, where PyAV takes Python's lock twice for each packet.

It does what `dfer.video.random_access.read_frames` does, by the FFmpeg that PyAV brings, but only what is plain: planar
frames, shown as they are stored, in the colours that the index knows. Whatever is not as it should be, or only unusual,
is left to `read_frames`, which finds out what it is.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from jaxtyping import Bool, Int64, UInt8
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
def _function(library: str, name: str, result: type | None, *arguments: type) -> Callable:
    """Return a function of FFmpeg, which is called without Python's lock."""
    function = _libraries()[library][name]
    function.restype, function.argtypes = result, arguments
    return function


def _new(shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    return np.empty(shape, np.uint8)


def read_planar(
    path: Path,
    pts: Int64[np.ndarray, " F"],
    key: Bool[np.ndarray, " F"],
    frames: Int64[np.ndarray, " T"],
    size: tuple[int, int],
    matrix: Matrix,
    full_range: bool,
    allocate: Callable[[tuple[int, ...]], UInt8[np.ndarray, "..."]] = _new,
) -> tuple[UInt8[np.ndarray, "n rows W 1"], Int64[np.ndarray, " T"]] | None:
    """Return some frames of a video as `read_frames` does, each once, and which one each of T is.

    None if that is for `read_frames` to do: all must be planar, and nothing unusual.

    Args:
        path: the file.
        pts: of its scan, as `key`, `matrix` and `full_range`.
        key: see there.
        frames: their numbers.
        size: height and width of a frame in pixels.
        matrix: see `pts`.
        full_range: see `pts`.
        allocate: memory of a shape.
    """
    height, width = size
    if (why := why_not()) is not None:
        say_once(f"{why}: videos are decoded packet by packet, which holds Python's lock")
        return None
    if not key.any() or height % 2 or width % 2 or not len(frames):
        return None
    wanted, which = np.unique(frames, return_inverse=True)
    place = np.full(len(pts), -1)
    place[wanted] = np.arange(len(wanted))
    matrices = np.array([MATRICES.get(number) == matrix for number in range(max(MATRICES) + 1)])
    is_hdr = np.isin(np.arange(max(TRANSFERS) + 1), list(TRANSFERS))
    planar = allocate((len(wanted), height * 3 // 2, width, 1))
    with _Opened(path) as opened:
        if opened.decoder is None:
            return None
        times, keys, seen = np.ascontiguousarray(pts), np.ascontiguousarray(key), np.full(4, -1)
        known = ffmpeg_loop.Frames(times, keys, wanted, place, opened.colours, seen, full_range, matrices, is_hdr)
        if not ffmpeg_loop.decode(opened.decoder, known, planar):
            return None
    return planar, which


class _Opened:
    """A video file whose decoder is open, as a context; `decoder` is None if that cannot be done."""

    def __init__(self, path: Path):
        self._path = path
        self._objects = (ctypes.c_void_p * 4)()  # container, codec, packet, frame
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
        names = ("avformat_close_input", "avcodec_free_context", "av_packet_free", "av_frame_free")
        libraries = ("avformat", "avcodec", "avcodec", "avutil")
        for place in (1, 2, 3, 0):
            if self._objects[place]:
                _function(libraries[place], names[place], None, ctypes.c_void_p)(self._at(place))

    def _at(self, place: int) -> int:
        return ctypes.addressof(self._objects) + 8 * place

    def _open(self) -> None:
        address, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        if not os.path.isfile(self._path):
            return
        name = format_of(self._path)
        kind = None if name is None else _function("avformat", "av_find_input_format", address, text)(name.encode())
        file = os.fsencode(os.path.abspath(self._path))
        open_input = _function("avformat", "avformat_open_input", number, address, text, address, address)
        with _Options(QUICK) as options:
            if open_input(self._at(0), file, kind, options.address) < 0:
                return
        container = self._objects[0]
        find = _function("avformat", "av_find_best_stream", number, address, number, number, number, address, number)
        stream = find(container, 0, -1, -1, None, 0)
        if stream < 0:
            return
        table = _number(container + _STREAMS, ctypes.c_void_p)
        for place in range(_number(container + _NUM_STREAMS, ctypes.c_uint)):
            if place != stream:
                other = _number(table + 8 * place, ctypes.c_void_p)
                ctypes.c_int.from_address(other + _DISCARD).value = _ALL
        parameters = _number(_number(table + 8 * stream, ctypes.c_void_p) + _CODEC_PARAMETERS, ctypes.c_void_p)
        self.colours[:] = [_number(parameters + _COLOURS_OF_STREAM + 4 * i, number) for i in range(4)]
        codec = _function("avcodec", "avcodec_find_decoder", address, number)(_number(parameters + _CODEC_ID, number))
        if not codec:
            return
        self._objects[1] = decoder = _function("avcodec", "avcodec_alloc_context3", address, address)(codec)
        fill = _function("avcodec", "avcodec_parameters_to_context", number, address, address)
        if not decoder or fill(decoder, parameters) < 0:
            return
        with _Options({**LIMITS, "threads": "1"}) as options:
            if _function("avcodec", "avcodec_open2", number, address, address, address)(
                decoder, codec, options.address
            ):
                return
        self._objects[2] = _function("avcodec", "av_packet_alloc", address)()
        self._objects[3] = _function("avutil", "av_frame_alloc", address)()
        find_option = _function("avutil", "av_opt_find", address, address, text, text, number, number)
        option = find_option(decoder, b"skip_frame", None, 0, 0)
        if not (self._objects[2] and self._objects[3] and option):
            return
        extra = _number(parameters + _EXTRADATA_SIZE, number)
        record = ctypes.string_at(_number(parameters + _EXTRADATA, ctypes.c_void_p), extra) if extra else b""
        named = _function("avcodec", "avcodec_get_name", text, number)(_number(parameters + _CODEC_ID, number))
        skip = _UNREFERENCED if can_skip(named.decode(), record) else 0
        setting = decoder + _number(option + _OPTION_OFFSET, number)
        container, codec, packet, frame = (int(found or 0) for found in self._objects)
        self.decoder = ffmpeg_loop.Decoder(container, codec, packet, frame, stream, setting, skip)


class _Options:
    """A dictionary of FFmpeg's, as a context."""

    def __init__(self, options: dict[str, str]):
        self._options, self._pointer = options, ctypes.c_void_p()
        self.address = ctypes.addressof(self._pointer)

    def __enter__(self) -> "_Options":
        put = _function(
            "avutil", "av_dict_set", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int
        )
        for name, value in self._options.items():
            put(self.address, name.encode(), value.encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        _function("avutil", "av_dict_free", None, ctypes.c_void_p)(self.address)


def _number(address: int, kind: type) -> int:
    """Return the number or the address that lies at an address."""
    return kind.from_address(address).value or 0
