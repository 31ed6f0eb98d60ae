"""Frames of a video by FFmpeg in one call of compiled code, where PyAV takes Python's lock twice for each packet.

It does what `dfer.video.random_access.read_frames` does, by the FFmpeg that PyAV brings, but only what is plain: planar
frames of 8 bits and 4:2:0 with even sides, shown as they are stored, in the colours of the index, of MP4 and Matroska
files whose index has keyframes. Whatever is not as it should be, or only unusual, is left to `read_frames`, which finds
out what it is.
"""

# numba's types describe Python's side of compiled functions, not the functions.
# pyright: reportArgumentType=false

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float32, Int64, Shaped, UInt8
from llvmlite import binding

from dali_pipes import ffmpeg_loop, ffmpeg_open
from dali_pipes.ffmpeg_loop import Videos
from dali_pipes.ffmpeg_open import Library
from dali_pipes.native import texts
from dfer.cli import say_once
from dfer.lists.scan import VideoFiles as VideoStore
from dfer.video.colour import MATRICES
from dfer.video.decode import LIMITS, QUICK
from dfer.video.hdr import TRANSFERS
from dfer.video.random_access import CAN_SKIP

# In the structures of these versions fields lie where compiled code reads them; they do not move before the next.
_VERSIONS = {"avutil": 60, "avcodec": 62, "avformat": 62}
_OPTION_OFFSET = 16  # of AVOption, libavutil/opt.h
_IS_HDR = np.isin(np.arange(max(TRANSFERS) + 1), list(TRANSFERS))  # by FFmpeg's number of a transfer function


@functools.cache
def why_not() -> str | None:
    """Return why the FFmpeg that PyAV brings is not used by compiled code; None if it is."""
    try:
        found = _libraries()
        for name, version in _VERSIONS.items():
            major = found[name][f"{name}_version"]() >> 16
            if major != version:
                return f"PyAV's lib{name} is of version {major}, not {version}"
        for module in (ffmpeg_open, ffmpeg_loop):
            for name, functions in module.FUNCTIONS.items():
                for function in functions:
                    address = ctypes.cast(found[name][function], ctypes.c_void_p).value
                    binding.add_symbol(ffmpeg_open.PREFIX + function, address)
        _library()
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
def _library() -> Library:
    """Return what compiled code has to know of FFmpeg. Its options are never given back."""
    libraries = _libraries()

    def call(library: str, name: str, *arguments: object) -> int:
        function = libraries[library][name]
        function.restype = ctypes.c_void_p
        return function(*arguments) or 0

    def options(values: dict[str, str]) -> int:
        dictionary = ctypes.c_void_p()
        for name, value in values.items():
            call("avutil", "av_dict_set", ctypes.byref(dictionary), name.encode(), value.encode(), 0)
        return dictionary.value or 0

    def codec(name: str) -> int:
        found = call("avcodec", "avcodec_descriptor_get_by_name", name.encode())
        return ctypes.c_int.from_address(found).value if found else 0

    decoder = ctypes.c_void_p(call("avcodec", "avcodec_alloc_context3", None))
    option = call("avutil", "av_opt_find", decoder, b"skip_frame", None, 0, 0)
    skip_frame = ctypes.c_int.from_address(option + _OPTION_OFFSET).value if option else 0
    call("avcodec", "avcodec_free_context", ctypes.byref(decoder))
    found = Library(
        mov=call("avformat", "av_find_input_format", b"mov"),
        matroska=call("avformat", "av_find_input_format", b"matroska"),
        container_options=options(QUICK),
        decoder_options=options({**LIMITS, "threads": "1"}),
        skip_frame=skip_frame,
        hevc=codec("hevc"),
        can_skip=np.array([codec(name) for name in CAN_SKIP if name != "hevc"]),
    )
    if not all(found[:-1]):
        raise OSError(f"not all of {found} is there")
    return found


def videos_of(paths: Sequence[Path], store: VideoStore) -> Videos:
    """Return videos, and what is known of them, as compiled code takes them."""
    names, matrix = np.unique(store.matrix, return_inverse=True)
    numbers, here = range(max(MATRICES) + 1), os.getcwd()
    return Videos(
        # FFmpeg takes "a:b.mp4" for a protocol.
        *texts(os.path.join(here, path) for path in paths),
        first=store.first.astype(np.int64),
        pts=np.ascontiguousarray(store.pts, np.int64),
        key=np.ascontiguousarray(store.key),
        height=store.height.astype(np.int32),
        width=store.width.astype(np.int32),
        full_range=np.ascontiguousarray(store.full_range),
        matrix=matrix.astype(np.int64),
        matrices=np.array([[MATRICES.get(number) == name for number in numbers] for name in names.tolist()]),
        is_hdr=_IS_HDR,
    )


def _new(shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    return np.empty(shape, np.uint8)


def read_planar(
    videos: Videos,
    video: int,
    frames: Int64[np.ndarray, " T"],
    allocate: Callable[[tuple[int, ...]], UInt8[np.ndarray, "..."]] = _new,
) -> tuple[UInt8[np.ndarray, "n rows W 1"], Int64[np.ndarray, " T"]] | None:
    """Return the frames as `read_frames` does, each once, and which one each of T is.

    None if that is for `read_frames` to do: all must be planar, and nothing unusual.

    Args:
        videos: as `videos_of` makes them.
        video: number of one.
        frames: their numbers.
        allocate: memory of a shape.
    """
    if not _is_there():
        return None
    height, width = int(videos.height[video]), int(videos.width[video])
    numbers, which = np.unique(frames, return_inverse=True)
    planes = allocate((len(numbers), height * 3 // 2, width, 1))
    return (planes, which) if ffmpeg_loop.read_planar(_library(), videos, video, frames, planes) else None


def read_clip(
    videos: Videos,
    video: int,
    frames: Int64[np.ndarray, " T"],
    out: Shaped[np.ndarray, "T S S 3"],
    parameters: Float32[np.ndarray, " P"],
) -> bool:
    """Write what planar.fused makes of the frames to `out`; return False where `read_planar` returns None.

    Each is resized where FFmpeg has decoded it: it is not copied, and still in the cache.

    Args:
        videos: as of `read_planar`, and so are `video` and `frames`.
        out: as of planar.fused, for each.
        parameters: see there.
    """
    return _is_there() and ffmpeg_loop.read_clip(_library(), videos, video, frames, out, parameters)


def _is_there() -> bool:
    if (why := why_not()) is not None:
        say_once(f"{why}: videos are decoded packet by packet, which holds Python's lock")
    return why is None
