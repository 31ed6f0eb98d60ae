"""HDR pictures to those of SDR: from PQ or HLG (ITU-R BT.2100) to sRGB with the primaries of BT.709.

The simple way of the ITU's reports. Light is counted in nits (cd/m2). A sheet of white paper has 203 nits in HDR
(BT.2408), which is the brightest that SDR shows. What is darker than about 90 nits keeps its brightness; what is
brighter, up to PEAK, is rolled off by the curve of BT.2390 (its EETF). The curve is applied to the brightest of R, G
and B, and the others are scaled with it, so that hues stay. HLG is shown as on a screen of 1000 nits. What a file says
of its brightest picture is not looked at: cameras and phones grade for 1000 nits.
"""

import functools
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32, Float64, Shaped, UInt8, UInt16

Transfer: TypeAlias = Literal["PQ", "HLG"]
TRANSFERS: dict[int, Transfer] = {16: "PQ", 18: "HLG"}  # FFmpeg's AVColorTransferCharacteristic
WHITE, PEAK = 203.0, 1000.0  # nits

# From linear RGB with other primaries, by FFmpeg's AVColorPrimaries, to BT.709's. HDR without any has BT.2020's.
_BT709 = 1
_TO_BT709 = {
    9: [[1.6604910, -0.5876411, -0.0728499], [-0.1245505, 1.1328999, -0.0083494], [-0.0181508, -0.1005789, 1.1187297]],
    12: [[1.2249402, -0.2249402, 0.0], [-0.0420570, 1.0420570, 0.0], [-0.0196376, -0.0786361, 1.0982735]],  # P3, D65
}
_LUMA = (0.2627, 0.6780, 0.0593)  # of BT.2020
_LEVELS = 65536
_ROWS = 2**14  # pixels that are converted at once, which a processor's cache holds


def to_sdr(pixels: UInt16[np.ndarray, "H W 3"], transfer: Transfer, primaries: int) -> UInt8[np.ndarray, "H W 3"]:
    """Return the SDR picture of an HDR one.

    Args:
        pixels: R'G'B' in 0..65535, coded by `transfer`.
        transfer: from code to light.
        primaries: FFmpeg's number of them.
    """
    table = _tables(transfer)
    matrix = np.eye(3) if primaries == _BT709 else np.array(_TO_BT709.get(primaries, _TO_BT709[9]))
    matrix = np.ascontiguousarray(matrix.T * (_LEVELS - 1), dtype=np.float32)
    flat = pixels.reshape(-1, 3)
    out = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), _ROWS):
        codes = flat[start : start + _ROWS]
        light = table.light.take(codes)  # of 0..PEAK as 0..1
        if transfer == "HLG":
            light *= (light @ np.array(_LUMA, np.float32))[:, None] ** np.float32(0.2)  # BT.2100's OOTF
            gain = table.gain.take((_brightest(light) * (_LEVELS - 1)).astype(np.uint16))
        else:
            gain = table.gain.take(_brightest(codes))
        light *= gain[:, None]
        shown = np.clip(light @ matrix, 0, _LEVELS - 1).astype(np.uint16)
        out[start : start + _ROWS] = table.srgb.take(shown)
    return out.reshape(pixels.shape)


def _brightest(pixels: Shaped[np.ndarray, "N 3"]) -> Shaped[np.ndarray, " N"]:
    """Return the largest channel of each pixel, fifty times faster than `max(axis=1)`."""
    return np.maximum(np.maximum(pixels[:, 0], pixels[:, 1]), pixels[:, 2])


class _Tables(NamedTuple):
    light: Float32[np.ndarray, " 65536"]  # of a code: of 0..1 (PQ: 0..10, HLG: of the scene)
    gain: Float32[np.ndarray, " 65536"]  # by the brightest channel's code (HLG: light): from light to 0..1 of SDR
    srgb: UInt8[np.ndarray, " 65536"]  # of linear light in 0..1


@functools.cache
def _tables(transfer: Transfer) -> _Tables:
    share = np.arange(_LEVELS) / (_LEVELS - 1)
    if transfer == "PQ":
        light = pq_to_nits(share) / PEAK
        brightest = light
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073  # BT.2100, table 5
        light = np.where(share <= 0.5, share**2 / 3, (np.exp((share - c) / a) + b) / 12)
        brightest = share
    nits = np.maximum(brightest * PEAK, 1e-6)
    gain = roll_off(nits) / nits * PEAK / WHITE
    srgb = np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055)
    return _Tables(light.astype(np.float32), gain.astype(np.float32), np.rint(255 * srgb).astype(np.uint8))


def roll_off(nits: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return light of 0..PEAK as light of 0..WHITE, by BT.2390's EETF; what is over PEAK as PEAK."""
    peak, white = nits_to_pq(np.array([PEAK, WHITE]))
    most = white / peak
    knee = 1.5 * most - 0.5
    signal = np.minimum(nits_to_pq(nits) / peak, 1)
    t = np.maximum((signal - knee) / (1 - knee), 0)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return pq_to_nits(np.where(signal < knee, signal, curve) * peak)


_M1, _M2 = 2610 / 16384, 2523 / 32  # SMPTE ST 2084
_C1, _C2, _C3 = 107 / 128, 2413 / 128, 2392 / 128


def pq_to_nits(signal: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return the light of PQ signals in 0..1."""
    root = signal ** (1 / _M2)
    return 10000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def nits_to_pq(nits: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return the PQ signals, in 0..1, of light."""
    root = (nits / 10000) ** _M1
    return ((_C1 + _C2 * root) / (1 + _C3 * root)) ** _M2
