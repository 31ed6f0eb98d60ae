"""The header of a JPEG file, as far as jpeg.py decodes what follows: ITU-T T.81 (1992), B.2 and C."""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from dali_pipes.compiling import njit
from dali_pipes.headers import number_at, ordered_at, starts
from dfer.images import MAX_PIXELS

# A Huffman table is one line of int32: for all LOOK bits what the code that they begin with says, packed by `entry_of`,
# or 0 if it is longer; for each length, the first 16 bits behind its codes; for each length, what a code needs to be
# the number of its symbol; the symbols.
LOOK = 10
BEHIND, NUMBER, SYMBOLS = 2**LOOK, 2**LOOK + 18, 2**LOOK + 36
TABLE = SYMBOLS + 256
END = 128  # added to the place of a coefficient, it ends the block
PLACES = 64 + END  # of coefficients, if a broken file's run over the end


class Tables(NamedTuple):
    """What a header says of how coefficients are stored."""

    quantisers: Int32[np.ndarray, "4 P"]  # by place in the file's order; zeros behind the 64th
    huffman: Int32[np.ndarray, "4 L"]  # two tables of means, two of the other coefficients
    used: Int64[np.ndarray, "3 3"]  # of each channel: quantisers; tables of means (times 16) and others; its name


@njit(nogil=True)
def read_header(data, tables, frame):
    """Read all before the scan; return where that begins, or 0 if the file is not of the kind that is decoded here.

    `frame`, (5,) int64, becomes height, width, channels, and the pixels down and across that share a sample of chroma.
    """
    size, place, there = len(data), 2, 0
    while True:
        if place + 4 > size or data[place] != 0xFF:
            return 0
        marker, start, end = data[place + 1], place + 4, place + 2 + number_at(data, place + 2, 2)
        if end < start or end > size:
            return 0
        place = end
        if marker == 0xDA:
            break
        if marker == 0xC0:
            if frame[2] != 0 or not read_frame(data, start, end, frame, tables.used):
                return 0
        elif marker == 0xDB:
            while start < end:
                number = np.int64(data[start])
                if number > 3 or start + 65 > end:
                    return 0
                for i in range(64):
                    tables.quantisers[number, i] = data[start + 1 + i]
                there |= 1 << number
                start += 65
        elif marker == 0xC4:
            while start < end:
                kind = np.int64(data[start])
                number = (kind >> 4) * 2 + (kind & 15)
                if kind & 0xEE != 0 or start + 17 > end:
                    return 0
                start = _read_table(data, start + 1, end, tables.huffman[number], number >= 2)
                if start == 0:
                    return 0
                there |= 16 << number
        elif 0xC1 <= marker <= 0xCF or (marker == 0xE1 and _turns(data, start, end)):
            return 0  # another kind of frame
    channels, used = frame[2], tables.used
    if channels == 0 or end - start != 4 + 2 * channels or data[start] != channels:
        return 0
    for c in range(channels):
        kind = np.int64(data[start + 2 + 2 * c])
        used[c, 1], matches = kind, data[start + 1 + 2 * c] == used[c, 2]
        needed = 1 << used[c, 0] | 16 << (kind >> 4) | 64 << (kind & 15)
        if not matches or kind & 0xEE != 0 or there & needed != needed:
            return 0
    return place


@njit(nogil=True)
def read_frame(data, start, end, frame, used):
    """Read a frame header into `frame` and `used`, as of `read_header`; return False if it is not for jpeg.py."""
    if end - start < 6 or data[start] != 8:
        return False
    height, width, channels = number_at(data, start + 1, 2), number_at(data, start + 3, 2), np.int64(data[start + 5])
    if (channels != 1 and channels != 3) or end - start != 6 + 3 * channels or not 0 < height * width <= MAX_PIXELS:
        return False
    for c in range(channels):
        used[c, 2], used[c, 0] = data[start + 6 + 3 * c], data[start + 8 + 3 * c]
        if used[c, 0] > 3 or (c > 0 and data[start + 7 + 3 * c] != 0x11):
            return False
    factors = np.int64(data[start + 7])
    across, down = (factors >> 4, factors & 15) if channels == 3 else (1, 1)
    if not 1 <= down <= across <= 2 or (across == 2 and width <= 4):  # libjpeg does not blend so few samples
        return False
    frame[0], frame[1], frame[2], frame[3], frame[4] = height, width, channels, down, across
    return True


@njit(nogil=True)
def _turns(data, start, end):
    """Return whether a segment is an EXIF block, in order (headers.is_plain), that turns or mirrors the picture."""
    if not starts(data, start, end, b"Exif\0\0"):
        return False
    tiff = data[start + 6 : end]
    if len(tiff) < 14:
        return True
    little = tiff[0] == 0x49
    entries = ordered_at(tiff, 8, 2, little)
    if 10 + 12 * entries > len(tiff):
        return True
    for place in range(10, 10 + 12 * entries, 12):
        if ordered_at(tiff, place, 2, little) == 0x0112 and ordered_at(tiff, place + 8, 2, little) != 1:
            return True
    return False


@njit(nogil=True)
def _read_table(data, start, end, table, has_runs):
    """Read the lengths and the symbols of a Huffman table; return where it ends, or 0 if it is none."""
    most, bits = (10, 15) if has_runs else (11, 255)  # of a number, as of 8 bits a sample; what states it
    table[:SYMBOLS] = 0
    place, number, code = start + 16, 0, 0
    for length in range(1, 17):
        table[NUMBER + length] = number - code
        for _ in range(data[start + length - 1]):
            if number == 256 or place == end or code >= (1 << length) - 1 or data[place] & bits > most:
                return 0
            symbol = np.int64(data[place])
            table[SYMBOLS + number] = symbol
            if length <= LOOK:
                table[code << (LOOK - length) : (code + 1) << (LOOK - length)] = entry_of(symbol, length)
            place, number, code = place + 1, number + 1, code + 1
        table[BEHIND + length] = code << (16 - length)
        code <<= 1
    table[BEHIND + 17] = 2**17
    return place


@njit(nogil=True)
def entry_of(symbol, length):
    """Return what a code says: bits of itself and its number, bits of the number, coefficients to go on, its bits."""
    run, bits = symbol >> 4, symbol & 15
    return (length + bits) | bits << 8 | (run + 1 if bits > 0 or run == 15 else END) << 12 | length << 24
