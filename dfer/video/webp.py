"""Animated WebP, which FFmpeg does not decode."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dfer.files import reason
from dfer.images import upright


class BadWebP(Exception):
    """A WebP file that cannot be used. The message says why, without the file's name."""


def is_webp(path: Path) -> bool:
    """Return whether a file begins like a WebP file.

    Raises:
        OSError: if it cannot be read.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb", buffering=0) as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def is_animated(path: Path) -> bool:
    """Return whether a WebP file says in its header that it has several frames; False if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(21)
    except OSError:
        return False
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) == 21 and bool(head[20] & 2)


def webp_frames(path: Path, max_side: int) -> Iterator[tuple[int, Image.Image]]:
    """Yield all frames with their times in ms, upright, in RGB; what is transparent is shown without being so.

    Raises:
        BadWebP: if the file is truncated or damaged, or has more than `max_side` pixels on a side.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        stated, there = 8 + int.from_bytes(file.read(8)[4:], "little"), os.fstat(file.fileno()).st_size
        if there < stated:
            raise BadWebP(f"truncated: {there:,} of {stated:,} bytes")
        file.seek(0)
        number = 0
        try:
            with Image.open(file, formats=("WEBP",)) as image:
                if max(image.size) > max_side:
                    raise BadWebP(f"{image.width} x {image.height} pixels, more than {max_side} on a side")
                for number in range(getattr(image, "n_frames", 1)):
                    image.seek(number)
                    picture = upright(image)
                    yield image.info.get("timestamp", 0), picture
        except BadWebP:
            raise
        except Exception as error:  # Pillow raises errors of many kinds on damaged files, even MemoryError
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadWebP(f"damaged after {number} frames ({reason(error)})") from None
