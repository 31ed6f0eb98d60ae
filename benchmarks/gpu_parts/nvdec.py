"""What NVDEC can decode, as its driver says: how many engines there are, and the smallest pictures of each codec."""

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import NotHere, Setting

CODECS = {"h264": 4, "hevc": 8, "vp9": 10, "av1": 11}  # cudaVideoCodec in cuviddec.h
YUV_420 = 1


class Limit(NamedTuple):
    codec: str
    engines: int
    width: int  # px, smallest
    height: int


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS of cuviddec.h."""

    _fields_ = [
        ("codec", ctypes.c_int), ("chroma", ctypes.c_int), ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3), ("supported", ctypes.c_ubyte), ("engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort), ("max_width", ctypes.c_uint), ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint), ("min_width", ctypes.c_ushort), ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte), ("counter_bits", ctypes.c_ubyte), ("max_bins", ctypes.c_ushort),
        ("reserved3", ctypes.c_uint * 10),
    ]  # fmt: skip


def limits(setting: Setting, library: str = "libnvcuvid.so.1") -> list[Limit]:
    """Ask the driver. Empty where it cannot be asked."""
    try:
        ask = ctypes.CDLL(library).cuvidGetDecoderCaps
    except (OSError, AttributeError):
        return []
    torch.zeros(1, device=setting.device)  # it wants a context
    found = []
    for name, codec in CODECS.items():
        caps = _Caps(codec=codec, chroma=YUV_420)
        if ask(ctypes.byref(caps)) == 0 and caps.supported:
            found.append(Limit(name, caps.engines, caps.min_width, caps.min_height))
    return found


def rows(found: Sequence[Limit]) -> Iterator[Row]:
    for limit in found:
        yield figure(f"NVDEC: least side of {limit.codec}", min(limit.width, limit.height), "px", engines=limit.engines)


def told(setting: Setting) -> Iterator[Row]:
    """What the driver says of NVDEC.

    Raises:
        NotHere: if it says nothing.
    """
    found = limits(setting)
    if not found:
        raise NotHere("the driver's library of NVDEC does not answer")
    yield from rows(found)
