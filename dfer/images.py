"""Image files as the frames of a video: their names and order, the limits of what is decoded, decoding.

`dali_pipes/headers.py` reads the same limits from headers in compiled code, for the loader.
"""

import io
import os
import re
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dfer.cli import UserError
from dfer.files import is_data, reason

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PIXELS = 4096 * 4096  # of a frame: a header may claim any size, and memory is taken before the data is seen
MAX_BYTES = 4 * MAX_PIXELS  # of an image file: no JPEG or PNG file of 8-bit colours needs more
_UPRIGHT = {  # by orientation, as EXIF counts them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# On odd files; what matters is raised. Not where they are read, as threads share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    return sorted(names) if _are_padded(names) else sorted(names, key=natural_key)


def _are_padded(names: list[str]) -> bool:
    """Return whether names are numbers of one length, as in 00001.jpg: sorted letter by letter they come the same."""
    if len({len(name) for name in names}) != 1:
        return False
    return all(name[:-4].isdecimal() for name in names) and "".join(names).isascii()


def is_image(path: str | Path) -> bool:
    """Return whether a file is an image by its name: as a clip, a still of one frame."""
    return os.fspath(path).lower().endswith(FRAME_SUFFIXES)


def frame_file(clip: str | Path, name: str) -> str:
    """Return the file of a frame in a clip's folder; of a still, whose one frame has no name, the clip itself."""
    return os.path.join(clip, name) if name else os.fspath(clip)


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
    """Return the pixels of a JPEG or PNG file, or of its bytes, in RGB and upright. Of 16 bits the upper 8 are taken.

    They are to the bit those that the trainer's decoder gives on a CPU.

    Raises:
        BadImage: as `open_image`, or if it is damaged.
        OSError: if the file cannot be read.
    """
    with open_image(source) as image:
        try:
            return upright(image)
        except Exception as error:  # even MemoryError
            raise BadImage(reason(error)) from None


def upright(image: Image.Image) -> Image.Image:
    """Return the pixels of an open image in RGB, turned as its EXIF block says, or else its XMP packet.

    Raises:
        Exception: of any kind, if the image is damaged. If those blocks are, the picture is left as it lies.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        orientation = None
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    method = None if orientation is None else _UPRIGHT.get(orientation)
    return (image if method is None else image.transpose(method)).convert("RGB")


def encode_plain(image: Image.Image) -> bytes:
    """Return a PNG file of an RGB picture, without compression, which takes a tenth of the time."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()
