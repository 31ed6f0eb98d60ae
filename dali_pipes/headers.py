"""What an image file claims to be, read before anything is decoded: a few bytes can claim gigabytes."""

import numpy as np
from jaxtyping import UInt8
from numba import njit

from dfer.images import MAX_PIXELS

_PNG = (0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A)
_IHDR = (0, 0, 0, 13, 0x49, 0x48, 0x44, 0x52)


def refusal(data: UInt8[np.ndarray, " _"]) -> str | None:
    """Return why an image file must not be decoded, or None; damage behind the header is not looked for.

    It takes a third of a microsecond, where decoding a frame takes two hundred.
    """
    pixels = claimed_pixels(data)
    if 0 < pixels <= MAX_PIXELS:
        return None
    if pixels > MAX_PIXELS:
        return f"claims {pixels:,} pixels, more than {MAX_PIXELS:,}"
    if not len(data):
        return "zero bytes"
    return "neither JPEG nor PNG" if pixels < 0 else "cannot be decoded: its header states no size"


@njit(cache=True, nogil=True)
def claimed_pixels(data):
    """Return height x width of a JPEG or PNG file's header; 0 if it states none, -1 for any other kind of file.

    Of several frame headers before the first scan, which no decoder should accept, the largest counts.
    """
    size = len(data)
    if size >= 24 and data[0] == _PNG[0]:
        for i in range(8):
            if data[i] != _PNG[i]:
                return -1
        for i in range(8):
            if data[8 + i] != _IHDR[i]:
                return 0
        return _number(data, 20, 4) * _number(data, 16, 4)
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return -1
    most, place = 0, 2
    while True:
        # As in libjpeg, bytes that are no marker are skipped, and a marker may follow any number of 0xFF.
        while place < size and data[place] != 0xFF:
            place += 1
        while place < size and data[place] == 0xFF:
            place += 1
        if place + 2 >= size:
            return most
        marker = data[place]
        place += 1
        if marker == 0xDA or marker == 0xD9:  # scan, end
            return most
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            continue
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            if place + 7 > size:
                return most
            most = max(most, _number(data, place + 3, 2) * _number(data, place + 5, 2))
        place += max(_number(data, place, 2), 2)


@njit(cache=True, nogil=True)
def _number(data, place, size):
    """Return the big-endian number of `size` bytes at `place`."""
    value = 0
    for i in range(size):
        value = value << 8 | np.int64(data[place + i])
    return value
