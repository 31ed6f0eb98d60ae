"""The crop of a JPEG file, decoded in compiled code: what most time of loading frames goes to.

The pixels are libjpeg-turbo's to the bit. It takes some two thirds of the time that DALI's decoder takes for a crop of
half the picture: blocks outside of it are read over, and no picture is copied on its way. It decodes what cameras and
tools write, if it is whole: baseline, one scan, 8 bits, gray or YCbCr, with chroma at full resolution, at half of it
across, or across and down. All else is left to DALI. Nothing is read or written out of bounds, whatever the file.

The format: ITU-T T.81 (1992), F.2; jpeg_header.py has the header.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from numba import types

from dali_pipes.compiling import njit
from dali_pipes.headers import number_at
from dali_pipes.jpeg_header import (
    BEHIND,
    END,
    LOOK,
    NUMBER,
    PLACES,
    SYMBOLS,
    TABLE,
    Tables,
    entry_of,
    read_frame,
    read_header,
)
from dali_pipes.jpeg_lanes import WIDTH, clear, load, load_bits, paint_420, paint_422, paint_444, store, transform
from dali_pipes.kernels import cut

# The sum of a block's magnitudes up to which no decoder's 16 bits overflow, as 4 x 1.387 x 5,900 < 2 ** 15. Above it
# their pixels may differ. What pictures give is below; noise of black and white alone is not.
_MOST = 5900
_LONGEST = 16 + 11  # bits of a code and the number behind it
_AHEAD = 8  # bytes behind the last one that may be looked at
_MARGIN = 2 * WIDTH  # bytes around rows of samples, as they are read by vectors
_ODD = np.int64(2**40)  # no difference of a block's mean

_memchr = types.ExternalFunction("memchr", types.intp(types.intp, types.intc, types.uintp))  # the C library's
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))


class _Planes(NamedTuple):
    """The samples of blocks; each row has _MARGIN more before and behind it."""

    luma: UInt8[np.ndarray, "1 H W"]
    chroma: UInt8[np.ndarray, "C h w"]  # C is 2 or, of a gray picture, 0
    needed: Int64[np.ndarray, "2 4"]  # of luma and chroma: first and last block in y and x


def _zigzag() -> np.ndarray:
    """Return where each coefficient stands in a block by rows; what is behind the last stands behind the block."""
    diagonals = sorted((y + x, y if (y + x) % 2 else x, 8 * y + x) for y in range(8) for x in range(8))
    return np.array([place for _, _, place in diagonals] + [64] * END, np.int32)


_ZIGZAG = _zigzag()


@njit(nogil=True)
def crop_shape(data, box):
    """Return what `decode_crop` writes of a file: rows and columns; and its crop's first column, and number of columns.

    All are 0 if the file's first frame header is not of the kind that is decoded here.
    """
    frame, used = np.zeros(5, np.int64), np.zeros((3, 3), np.int64)
    size, place = len(data), 2
    while place + 4 <= size and data[place] == 0xFF and data[place + 1] != 0xDA:
        start, end = place + 4, place + 2 + number_at(data, place + 2, 2)
        if end < start or end > size:
            break
        if data[place + 1] == 0xC0:
            if not read_frame(data, start, end, frame, used):
                break
            left, columns = cut(box[1], box[3], frame[1])
            first = left % frame[4]
            return cut(box[0], box[2], frame[0])[1], -(-(first + columns) // WIDTH) * WIDTH, first, columns
        place = end
    return 0, 0, 0, 0


@njit(nogil=True)
def of_other_kinds(data, lengths):
    """Return the places of files that are not decoded here, as far as their frame headers say.

    Args:
        data: (F, L) uint8.
        lengths: (F, 1) int32, of the files.
    """
    whole = np.array([0, 0, 1, 1], np.float32)
    places, number = np.empty(len(data), np.int64), 0
    for i in range(len(data)):
        if crop_shape(data[i, : lengths[i, 0]], whole)[0] == 0:
            places[number] = i
            number += 1
    return places[:number]


@njit(nogil=True)
def decode_crop(data, box, pixels):
    """Decode a part of a JPEG file of a plain header (headers.is_plain); return False if it is damaged, or not decoded.

    Args:
        data: uint8; behind the end of the file may stand anything.
        box: (4,) float32, first y and x, height and width as shares of the picture.
        pixels: (H, W, 3) uint8, of the shape that `crop_shape` returns.
    """
    tables = Tables(np.zeros((4, PLACES), np.int32), np.zeros((4, TABLE), np.int32), np.zeros((3, 3), np.int64))
    frame = np.zeros(5, np.int64)
    place = read_header(data, tables, frame)
    if place == 0:
        return False
    bits = np.empty(len(data) - place + 2 * _AHEAD, np.uint8)
    length = _unstuff(data, place, bits)
    if length < 0:
        return False
    top, rows = cut(box[0], box[2], frame[0])
    left, columns = cut(box[1], box[3], frame[1])
    first = left - left % frame[4]
    if pixels.shape[0] != rows or pixels.shape[1] < left - first + columns or pixels.shape[1] % WIDTH != 0:
        return False
    planes = _planes_of(frame, top, rows, left, columns)
    # Not made there: what only an address is taken of has no owner behind that.
    block = np.zeros(65, np.int32)
    if not _read_planes(bits, length, tables, frame, planes, block):
        return False
    _extend(planes, frame)
    _paint(pixels, planes, frame, top, first)
    return True


@njit(nogil=True)
def _planes_of(frame, top, rows, left, columns):
    """Return planes of the blocks that a crop needs, with the neighbours that chroma is blended with."""
    height, width, channels, down, across = frame[0], frame[1], frame[2], frame[3], frame[4]
    samples = np.empty((2, 4), np.int64)
    samples[0, 0], samples[0, 1], samples[0, 2], samples[0, 3] = top, top + rows - 1, left, left + columns - 1
    samples[1, 0] = max(top // down - (down - 1), 0)
    samples[1, 1] = min((top + rows - 1) // down + (down - 1), -(-height // down) - 1)
    samples[1, 2] = max(left // across - (across - 1), 0)
    samples[1, 3] = min((left + columns - 1) // across + (across - 1), -(-width // across) - 1)
    needed = samples // 8
    return _Planes(_plane(needed[0], 1), _plane(needed[1], channels - 1), needed)


@njit(nogil=True)
def _plane(needed, number):
    rows, columns = 8 * (needed[1] - needed[0] + 1), 8 * (needed[3] - needed[2] + 1)
    return np.empty((number, rows, columns + 2 * _MARGIN), np.uint8)


@njit(nogil=True)
def _long_entry(buffer, table):
    """Return what a code of more than LOOK bits says; 0 if there is no such code."""
    code, length = np.int64(buffer >> np.uint64(48)), LOOK + 1
    while code >= load(table, BEHIND + length):
        length += 1
    if length > 16:
        return 0
    number = load(table, NUMBER + length) + (code >> (16 - length))
    return entry_of(np.int64(load(table, SYMBOLS + (number & 255))), length)


@njit(nogil=True)
def _unstuff(data, place, bits):
    """Copy a scan without the zeros behind 0xFF; return its length, or -1 if it is not one scan without restarts."""
    size, address, out, length = len(data), data.ctypes.data, bits.ctypes.data, 0
    while True:
        found = _memchr(address + place, 0xFF, size - place)
        run = found - address - place
        if found == 0 or place + run + 2 > size:
            return -1
        _memcpy(out + length, address + place, run)
        length, place = length + run, place + run + 2
        if data[place - 1] == 0xD9:
            break
        if data[place - 1] != 0:
            return -1
        bits[length] = 0xFF
        length += 1
    bits[length : length + 2 * _AHEAD] = 0
    return length


@njit(nogil=True)
def _read_planes(bits, length, tables, frame, planes, block):
    """Decode the blocks that are needed, and read over the others; return False if the scan is damaged."""
    channels, down, across, needed = frame[2], frame[3], frame[4], planes.needed
    begin, zigzag = bits.ctypes.data, _ZIGZAG.ctypes.data
    reader = np.zeros(3, np.int64)  # bits that are read but not used, how many, where the next ones are
    reader[2] = begin
    means = np.zeros(3, np.int64)
    stop, scratch = begin + length + _AHEAD, block.ctypes.data
    last = needed[0, 1] // down
    if channels == 3:
        last = max(last, needed[1, 1])
    num_x = -(-frame[1] // (8 * across))
    for y in range(last + 1):
        for x in range(num_x):
            for c in range(channels):
                own = min(c, 1)
                plane = planes.luma[0] if c == 0 else planes.chroma[c - 1]
                quantiser = tables.quantisers[tables.used[c, 0]].ctypes.data
                table_of_means = tables.huffman[tables.used[c, 1] >> 4].ctypes.data
                table = tables.huffman[2 + (tables.used[c, 1] & 15)].ctypes.data
                wide, high = (across, down) if c == 0 else (1, 1)
                for i in range(wide * high):
                    row, column = y * high + i // wide, x * wide + i % wide
                    change = _read_block(reader, stop, table_of_means, table, quantiser, zigzag, scratch, means[c])
                    if change == _ODD:
                        return False
                    means[c] += change
                    row, column = row - needed[own, 0], column - needed[own, 2]
                    in_rows = 0 <= row <= needed[own, 1] - needed[own, 0]
                    if in_rows and 0 <= column <= needed[own, 3] - needed[own, 2]:
                        to = plane.ctypes.data + 8 * row * plane.shape[1] + _MARGIN + 8 * column
                        transform(scratch, to, plane.shape[1])
                    else:
                        clear(scratch)
    return 8 * (reader[2] - begin) - reader[1] <= 8 * length


@njit(nogil=True)
def _read_block(reader, stop, table_of_means, table, quantiser, zigzag, block, mean):
    """Read the coefficients of a block; return how its mean differs from that of the last, or _ODD if it is damaged."""
    buffer, count, place = np.uint64(reader[0]), reader[1], reader[2]
    buffer, count, place, entry = _next_entry(buffer, count, place, stop, table_of_means)
    change = _number_of(buffer, entry)
    buffer <<= np.uint64(entry & 63)
    count -= entry & 63
    value = (mean + change) * load(quantiser, 0)
    store(block, 0, value)
    total, k = abs(value), 0
    while k < 63 and entry != 0:
        buffer, count, place, entry = _next_entry(buffer, count, place, stop, table)
        k += (entry >> 12) & 255
        value = _number_of(buffer, entry) * load(quantiser, k)
        buffer <<= np.uint64(entry & 63)
        count -= entry & 63
        total += abs(value)
        store(block, np.int64(load(zigzag, k)), value)
    if entry == 0:
        return _ODD
    if total > _MOST or 63 < k < END:
        return _ODD
    reader[0], reader[1], reader[2] = np.int64(buffer), count, place
    return change


@njit(nogil=True)
def _next_entry(buffer, count, place, stop, table):
    """Return the bits to go on with, how many, where the next ones are, and what the first code says; 0 if none."""
    if count < _LONGEST:
        if place > stop:
            return buffer, count, place, np.int64(0)
        buffer |= load_bits(place) >> np.uint64(count)
        place += (63 - count) >> 3
        count |= 56
    entry = np.int64(load(table, buffer >> np.uint64(64 - LOOK)))
    return buffer, count, place, entry if entry != 0 else _long_entry(buffer, table)


@njit(nogil=True)
def _number_of(buffer, entry):
    """Return the number behind a code: if its first bit is 0 it is negative (T.81, F.2.2.1)."""
    bits, rest = (entry >> 8) & 15, buffer << np.uint64(entry >> 24)
    number = np.int64((rest >> np.uint64(1)) >> np.uint64(63 - bits))
    return number - (((1 << bits) - 1) & ~(np.int64(rest) >> 63))


@njit(nogil=True)
def _extend(planes, frame):
    """Repeat the first and the last sample of each row of chroma where they are the picture's."""
    chroma, needed, width = planes.chroma, planes.needed[1], -(-frame[1] // frame[4])
    first = _MARGIN - 8 * needed[2]
    for c in range(len(chroma)):
        for row in range(chroma.shape[1]):
            if needed[2] == 0:
                chroma[c, row, first - 1] = chroma[c, row, first]
            if 8 * (needed[3] + 1) >= width:
                chroma[c, row, first + width] = chroma[c, row, first + width - 1]


@njit(nogil=True)
def _paint(pixels, planes, frame, top, left):
    """Write the rows of a crop from `top` and `left` on, where a sample of chroma begins."""
    luma, chroma, needed, down, across = planes.luma, planes.chroma, planes.needed, frame[3], frame[4]
    gray = np.full(WIDTH, 128, np.uint8)
    last = -(-frame[0] // down) - 1
    for row in range(pixels.shape[0]):
        y, out = top + row, pixels[row].ctypes.data
        of_luma = luma[0, y - 8 * needed[0, 0]].ctypes.data + _MARGIN + left - 8 * needed[0, 2]
        near, far, step, plane = gray.ctypes.data, gray.ctypes.data, 0, 0
        if len(chroma):
            first = chroma.ctypes.data + _MARGIN + left // across - 8 * needed[1, 2]
            nearest = y // down
            other = min(max(nearest + (1 if y & 1 else -1), 0), last) if down == 2 else nearest
            near = first + (nearest - 8 * needed[1, 0]) * chroma.shape[2]
            far = first + (other - 8 * needed[1, 0]) * chroma.shape[2]
            step, plane = WIDTH // across, chroma.shape[1] * chroma.shape[2]
        for i in range(pixels.shape[1] // WIDTH):
            to, a, b, c = out + 3 * WIDTH * i, of_luma + WIDTH * i, near + step * i, far + step * i
            if across == 1:
                paint_444(to, a, b, c, plane)
            elif down == 1:
                paint_422(to, a, b, c, plane)
            else:
                paint_420(to, a, b, c, plane)
