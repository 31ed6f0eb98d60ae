"""What an image file claims to be, read before anything is decoded: a few bytes can claim gigabytes.

Decoders, ours (jpeg.py) and DALI's, are given files of plain headers alone. While DALI's parses the headers of a batch,
it shares the work with its threads; if the part that it does itself fails, it leaves without waiting for them, and they
go on in memory that is not theirs any more. So one refused header among more than a dozen files can end the process.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

import numpy as np
from jaxtyping import UInt8
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dali_pipes.compiling import njit
from dfer.images import MAX_PIXELS


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0xEDB88320 if byte & 1 else 0)
    return byte


_PNG = (0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A)
_IHDR = (0, 0, 0, 13, 0x49, 0x48, 0x44, 0x52)
_memchr = types.ExternalFunction("memchr", types.intp(types.intp, types.intc, types.uintp))  # the C library's
_LANES = 64  # bytes of a scan that are looked at together
_CRC_32 = np.array([_crc_of_byte(byte) for byte in range(256)], dtype=np.uint32)


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


@njit(nogil=True)
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
        return number_at(data, 20, 4) * number_at(data, 16, 4)
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
            most = max(most, number_at(data, place + 3, 2) * number_at(data, place + 5, 2))
        place += max(number_at(data, place, 2), 2)


@njit(nogil=True)
def is_plain(data):
    """Return whether a file is a JPEG or PNG file of MAX_PIXELS at most that DALI reads as `decode_image` does.

    Plain is what cameras and tools write: whole, 8 bits a channel, gray or YCbCr (in PNG also RGB, RGBA or the colours
    of a palette), nothing between the headers, and turned, if at all, by a proper EXIF block. What is not may be good.
    Damage of the pixels' data is not looked for. It takes a microsecond for each 40 kB of a JPEG file.
    """
    if len(data) >= 4 and data[0] == 0xFF and data[1] == 0xD8:
        return _is_plain_jpeg(data)
    return len(data) >= 57 and data[0] == _PNG[0] and _is_plain_png(data)


@njit(nogil=True)
def _is_plain_jpeg(data):
    size, place, frames, exifs, several = len(data), 2, 0, 0, False
    channels = 0
    while True:
        if place + 4 > size or data[place] != 0xFF:
            return False
        marker, start, end = data[place + 1], place + 4, place + 2 + number_at(data, place + 2, 2)
        if end < start or end > size:
            return False
        place = end
        if marker == 0xDA:
            if end == start:
                return False
            several |= channels != data[start]
            break
        if 0xC0 <= marker <= 0xC2:
            frames += 1
            if not _is_plain_frame(data, start, end):
                return False
            channels, several = data[start + 5], marker == 0xC2
        elif marker == 0xDB:
            while start < end:  # tables of 8 or 16 bits
                start += 65 if data[start] < 16 else 129
            if start != end:
                return False
        elif marker == 0xE1 and starts(data, start, end, b"Exif\0\0"):
            exifs += 1
            if not _is_plain_exif(data[start + 6 : end]):
                return False
        elif 0xE0 <= marker <= 0xEF:
            if not _is_plain_segment(data, marker, start, end):
                return False
        elif marker != 0xC4 and marker != 0xDD and marker != 0xFE:  # Huffman tables, restarts, a comment
            return False
    return frames == 1 and exifs <= 1 and _ends_well(data, place, several)


@njit(nogil=True)
def _ends_well(data, place, several):
    """Return whether nothing but pixels' data, and restarts, stands between `place`, in a scan, and the end mark.

    `several`: whether there may be further scans, with their headers.
    """
    size, address = len(data), data.ctypes.data
    while place < size:
        while place + _LANES < size and not _has_marker(address + place):
            place += _LANES
        found = _memchr(address + place, 0xFF, size - place)
        place = found - address
        if found == 0 or place + 2 > size:
            return False
        marker = data[place + 1]
        place += 2
        if marker == 0xD9:
            return True
        if marker == 0 or 0xD0 <= marker <= 0xD7:
            continue
        if not several or marker not in (0xC4, 0xDA, 0xDD, 0xFE) or place + 2 > size:
            return False
        place += max(number_at(data, place, 2), 2)
    return False


@intrinsic
def _has_marker(typingctx, address):
    """Return whether one of _LANES bytes at an address begins a marker, with its byte behind, that is no restart."""

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(8), _LANES)

        def all_lanes(value):
            return ir.Constant(kind, [value] * _LANES)

        def load(offset):
            place = builder.add(args[0], ir.IntType(64)(offset))
            loaded = builder.load(builder.inttoptr(place, kind.as_pointer()))
            loaded.align = 1
            return loaded

        begins = builder.icmp_unsigned("==", load(0), all_lanes(0xFF))
        then = load(1)
        stuffed = builder.icmp_unsigned("==", then, all_lanes(0))
        restart = builder.icmp_unsigned("==", builder.and_(then, all_lanes(0xF8)), all_lanes(0xD0))
        found = builder.and_(begins, builder.not_(builder.or_(stuffed, restart)))
        bits = builder.bitcast(found, ir.IntType(_LANES))
        return builder.icmp_unsigned("!=", bits, ir.IntType(_LANES)(0))

    return types.boolean(types.int64), codegen


@njit(nogil=True)
def _is_plain_frame(data, start, end):
    """Return whether a frame header is of 8 bits, and of one channel, or of three with the first at full resolution."""
    if end - start < 9 or data[start] != 8:
        return False
    channels, pixels = data[start + 5], number_at(data, start + 1, 2) * number_at(data, start + 3, 2)
    if (channels != 1 and channels != 3) or end - start != 6 + 3 * channels or not 0 < pixels <= MAX_PIXELS:
        return False
    first = data[start + 7]
    if channels == 1:
        return first == 0x11
    if data[start + 6] == 0x52:  # R, where libjpeg takes the channels for RGB
        return False
    # FFmpeg writes 4:2:2 and 4:4:4 as 22/12/12 and 12/12/12.
    chroma, across, down = data[start + 10], first >> 4, first & 15
    return chroma == data[start + 13] and 0 < chroma >> 4 <= across <= 2 and 0 < chroma & 15 <= down <= 2


@njit(nogil=True)
def _is_plain_segment(data, marker, start, end):
    """Return whether an application segment, no EXIF, changes nothing and is as long as its name demands."""
    if marker == 0xE0 and starts(data, start, end, b"JFIF"):
        return end - start >= 14
    if marker == 0xE1 and starts(data, start, end, b"http"):
        for place in range(start, end):
            if data[place] == 0x3A and starts(data, place, end, b":Orientation"):
                return False
    if marker == 0xE2 and starts(data, start, end, b"ICC_PROFILE"):
        return end - start >= 14
    if marker == 0xE2 and starts(data, start, end, b"MPF"):
        return False
    if marker == 0xED and starts(data, start, end, b"Photoshop"):
        return False
    if marker == 0xEE and starts(data, start, end, b"Adobe"):
        return end - start >= 12 and data[start + 11] == 1  # YCbCr
    return True


@njit(nogil=True)
def _is_plain_exif(tiff):
    """Return whether an EXIF block is in order as far as the orientation of the picture depends on it."""
    size = len(tiff)
    if size < 14:
        return False
    little = starts(tiff, 0, size, b"II*\0\x08\0\0\0")
    if not little and not starts(tiff, 0, size, b"MM\0*\0\0\0\x08"):
        return False
    entries, orientations = ordered_at(tiff, 8, 2, little), 0
    if 10 + 12 * entries > size:
        return False
    for place in range(10, 10 + 12 * entries, 12):
        tag, kind, count = (
            ordered_at(tiff, place, 2, little),
            ordered_at(tiff, place + 2, 2, little),
            ordered_at(tiff, place + 4, 4, little),
        )
        if kind < 1 or kind > 12:
            return False
        length = count * (8 if kind in (5, 10, 12) else 4 if kind in (4, 9, 11) else 2 if kind in (3, 8) else 1)
        if length > 4 and ordered_at(tiff, place + 8, 4, little) + length > size:
            return False
        if tag == 0x0112:
            orientations += 1
            if kind != 3 or count != 1 or not 1 <= ordered_at(tiff, place + 8, 2, little) <= 8:
                return False
        # DALI expects fractions there, or text, and gives the whole block up if it finds others.
        if tag in (0x011A, 0x011B, 0x013E, 0x013F, 0x0211, 0x0214) and kind != 5:
            return False
        if tag in (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298) and kind != 2:
            return False
    return orientations <= 1


@njit(nogil=True)
def _is_plain_png(data):
    for i in range(8):
        if data[i] != _PNG[i] or data[8 + i] != _IHDR[i]:
            return False
    colours, size, place = data[25], len(data), 8
    if data[24] != 8 or not 0 < number_at(data, 16, 4) * number_at(data, 20, 4) <= MAX_PIXELS:
        return False
    if colours != 0 and colours != 2 and colours != 3 and colours != 6:
        return False
    while place + 12 <= size:
        length = number_at(data, place, 4)
        end = place + 12 + length
        if end > size:
            return False
        pixels = starts(data, place + 4, size, b"IDAT")
        if not pixels and _crc_32(data, place + 4, end - 4) != number_at(data, end - 4, 4):
            return False
        if starts(data, place + 4, size, b"IEND"):
            return True
        known = pixels or starts(data, place + 4, size, b"IHDR") or starts(data, place + 4, size, b"PLTE")
        if not known and not _is_plain_chunk(data, place + 4, place + 8, length):
            return False
        place = end
    return False


@njit(nogil=True)
def _is_plain_chunk(data, place, start, length):
    """Return whether an ancillary chunk says nothing of orientation, and is as long as it has to be."""
    size = len(data)
    if starts(data, place, size, b"pHYs"):
        return length == 9
    if starts(data, place, size, b"gAMA"):
        return length == 4
    if starts(data, place, size, b"cHRM"):
        return length == 32
    if starts(data, place, size, b"sRGB"):
        return length == 1
    if starts(data, place, size, b"tIME"):
        return length == 7
    if starts(data, place, size, b"tEXt"):  # else "Raw profile type exif"
        return length > 0 and data[start] != 0x52 and data[start] != 0x58
    return (
        starts(data, place, size, b"bKGD") or starts(data, place, size, b"sBIT") or starts(data, place, size, b"cICP")
    )


@njit(nogil=True)
def _crc_32(data, start, end):
    value = np.uint32(0xFFFFFFFF)
    for place in range(start, end):
        value = _CRC_32[(value ^ data[place]) & np.uint32(0xFF)] ^ (value >> np.uint32(8))
    return np.int64(value ^ np.uint32(0xFFFFFFFF))


@njit(nogil=True)
def starts(data, place, end, text):
    """Return whether `text` stands at `place`, before `end`."""
    if end - place < len(text):
        return False
    for i in range(len(text)):  # noqa: SIM110
        if data[place + i] != text[i]:
            return False
    return True


@njit(nogil=True)
def ordered_at(data, place, size, little):
    """Return the number of `size` bytes at `place`, little-endian or big-endian."""
    if not little:
        return number_at(data, place, size)
    value = 0
    for i in range(size):
        value |= np.int64(data[place + i]) << 8 * i
    return value


@njit(nogil=True)
def number_at(data, place, size):
    """Return the big-endian number of `size` bytes at `place`."""
    value = 0
    for i in range(size):
        value = value << 8 | np.int64(data[place + i])
    return value
