"""Whether the bytes of a video file are all there, from how its container is built."""

import mmap
import os

# Matroska's elements that hold others; all others are passed over as a whole.
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # of the object that holds the file's size


def all_there(path: str, container: str) -> bool | None:
    """Return whether the parts of a file follow each other without a gap, up to where it says that it ends.

    None if there is no gap, but the file does not say where it ends, as of recordings and streams. False also of
    containers that are not known here.

    Args:
        path: the file.
        container: FFmpeg's name of its format.

    Raises:
        OSError: if the file cannot be read.
    """
    walk = _WALKS.get(container)
    if walk is None or not os.path.getsize(path):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return walk(data)


def _matroska(data: mmap.mmap) -> bool | None:
    place, size, end = 0, len(data), None
    while place < (size if end is None else end):
        identity, place = _ebml_number(data, place, marked=True)
        length, place = _ebml_number(data, place, marked=False)
        if identity is None or place > size:
            return False
        if identity == _SEGMENT and end is None:
            end = None if length is None else place + length
            if end is not None and end > size:
                return False
        elif identity != _CLUSTER:
            if length is None:
                return False
            place += length
    return (None if end is None else True) if place == (size if end is None else end) else False


def _ebml_number(data: mmap.mmap, place: int, marked: bool) -> tuple[int | None, int]:
    """Return a number of variable length, with or without the bit that marks its length, and the place behind it.

    None: it is none, or, of a size, one that is not known.
    """
    first = data[place] if place < len(data) else 0
    length = 9 - first.bit_length()
    if length > 8:
        return None, len(data) + 1
    value = int.from_bytes(data[place : place + length], "big")
    if not marked:
        value &= (1 << 7 * length) - 1
        if value == (1 << 7 * length) - 1:
            return None, place + length
    return value, place + length


def _avi(data: mmap.mmap) -> bool | None:
    place, size = 0, len(data)
    while data[place : place + 4] == b"RIFF":  # large files have several
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        if length in (0, 0xFFFFFFFF):  # of a stream
            return None
        if place + 8 + length > size:
            return False
        place += 8 + length + length % 2  # some leave the last padding out
    return place > 0


def _mov(data: mmap.mmap) -> bool | None:
    place, size, end_known = 0, len(data), True
    while place < size:
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if length == 0:
            length = size - place
        elif length == 1:
            length = int.from_bytes(data[place + 8 : place + 16], "big")
        end_known &= kind != b"moof"  # there may be any number of fragments
        place += length if length >= 8 else size + 1
    return (True if end_known else None) if place == size else False


def _flv(data: mmap.mmap) -> bool | None:
    place, size = int.from_bytes(data[5:9], "big") + 4, len(data)
    while place < size:
        length = 11 + int.from_bytes(data[place + 1 : place + 4], "big")
        place += length + 4
        if int.from_bytes(data[place - 4 : place], "big") != length:
            return False
    return None if place == size else False


def _asf(data: mmap.mmap) -> bool | None:
    place = data.find(_ASF_PROPERTIES)
    if place < 0:
        return False
    stated = int.from_bytes(data[place + 40 : place + 48], "little")
    return None if stated == 0 else stated <= len(data)


def _mpegts(data: mmap.mmap) -> bool | None:
    """Return False if the file ends within a packet. It may begin within one, and hold anything between two."""
    end = len(data)
    for size, lead in ((188, 0), (192, 4), (204, 0)):  # what precedes a packet's first byte, which is 0x47
        for rest in range(min(size, end - 5 * size)):
            starts = range(end - rest - 5 * size + lead, end - rest, size)
            if all(data[start] == 0x47 for start in starts):
                return False if rest > lead and data[end - rest + lead] == 0x47 else None
    return None


def _ogg(data: mmap.mmap) -> bool | None:
    """Return False if the last page is not all there."""
    page, size = data.rfind(b"OggS"), len(data)
    if page < 0 or page + 27 > size:
        return None if page < 0 else False
    body = page + 27 + data[page + 26]
    return False if body + sum(data[page + 27 : body]) > size else None


_WALKS = {
    "matroska,webm": _matroska,
    "avi": _avi,
    "mov,mp4,m4a,3gp,3g2,mj2": _mov,
    "flv": _flv,
    "asf": _asf,
    "mpegts": _mpegts,
    "ogg": _ogg,
}
