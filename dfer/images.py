"""Image files as the frames of a video: their names and order, the limits of what is decoded, decoding.

`dali_pipes/headers.py` reads the same limits from headers in compiled code, for the loader.
"""

import io
import os
import re
import stat
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dfer.cli import UserError
from dfer.files import is_data, reason

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PIXELS = 4096 * 4096  # of a frame: a header may claim any size, and memory is taken before the data is seen
MAX_BYTES = 4 * MAX_PIXELS  # of an image file: no JPEG or PNG file of 8-bit colours needs more
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel or less


class BadImage(UserError):
    """An image file that cannot or must not be decoded. The message says why, without the file's name."""


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that reads digits as numbers: DFEW's 16-frame folders are 1.jpg .. 16.jpg, not zero-padded."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def frame_names(folder: str | Path) -> list[str]:
    """Return the names of a folder's frames in natural order (2.jpg before 10.jpg).

    What is no data (see files.is_data) is left out: macOS leaves a `._1.jpg` beside each 1.jpg on foreign disks.

    Raises:
        OSError: if the folder cannot be read.
    """
    names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES) and is_data(name)]
    return sorted(names, key=natural_key)


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open a JPEG or PNG file, or its bytes, and read its header. The caller closes it.

    Raises:
        BadImage: if it is no such file, is empty, or claims more than MAX_PIXELS or has more than MAX_BYTES.
        OSError: if the file cannot be read.
    """
    if isinstance(source, bytes):
        size, file = len(source), io.BytesIO(source)
    else:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise BadImage("not a file")
        size, file = status.st_size, source
    if not size:
        raise BadImage("zero bytes")
    if size > MAX_BYTES:
        raise BadImage(f"more than {MAX_BYTES:,} bytes")
    try:
        image = Image.open(file, formats=("JPEG", "PNG"))
    except UnidentifiedImageError:
        raise BadImage("neither JPEG nor PNG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"claims more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises errors of many kinds on damaged files; those of the system have a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadImage(reason(error)) from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise BadImage(f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def decode_image(source: str | Path | bytes) -> Image.Image:
    """Return the pixels of a JPEG or PNG file, or of its bytes, in RGB and upright.

    They are to the bit those that the trainer's decoder gives on a CPU.

    Raises:
        BadImage: as `open_image`, if it is damaged, or if its pixels have more than 8 bits.
        OSError: if the file cannot be read.
    """
    with open_image(source) as image:
        if image.mode not in _MODES:
            raise BadImage(f"its pixels are {image.mode}, more than 8 bits")
        try:
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
        except Exception as error:  # even MemoryError
            raise BadImage(reason(error)) from None
