"""From what a decoder gives to what a player shows, in RGB: colours, display matrices, pixels that are not square."""

import struct
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import Float32, UInt8
from PIL import Image

from dfer.video.hdr import TRANSFERS, to_sdr

MAX_SIDE = 8192  # px; what a hostile header may claim is far more
MAX_ASPECT = 8  # of a pixel's sides; what is beyond is no shape of pixels, but a mistake
Matrix: TypeAlias = Literal["bt601", "bt709", "bt2020"]
# The weights of R and of B in Y, from the ITU-R recommendations.
_LUMA: dict[Matrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}
# FFmpeg's AVColorSpace. Others than these (RGB, FCC, SMPTE 240M, YCgCo ...) are left to swscale.
MATRICES: dict[int, Matrix] = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601", 9: "bt2020"}
UNSPECIFIED, HD = 2, 720  # px of height from which on players take pictures that state nothing for BT.709
_RESERVED, _BT2020 = 3, 9
UNKNOWN_MATRICES = frozenset({8, *range(10, 18)})  # YCgCo, ICtCp ...: those that swscale does not know either

# By default swscale repeats chroma samples and truncates: 10-bit colours come out up to 3 levels too dark.
EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

SQUARE = Fraction(1)
# Signs of a, b, c, d in a display matrix (x' = ax + cy, y' = bx + dy, y pointing down) -> what makes a frame upright.
_UPRIGHT = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # counter-clockwise, as all of Pillow's: a phone held upright
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_SIDEWAYS = (  # those that swap height and width
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)


def _unknown_type(cls: type[Type], value: object) -> Type:
    """Return a type of side data that PyAV does not know yet, such as EXIF, on which it raises."""
    unknown = object.__new__(cls)
    unknown._name_, unknown._value_ = f"UNKNOWN_{value}", value
    return unknown


Type._missing_ = classmethod(_unknown_type)  # pyright: ignore[reportAttributeAccessIssue]  # PyAV#2392


def yuv_to_rgb(matrix: Matrix, full_range: bool) -> Float32[np.ndarray, "3 4"]:
    """Return the map from (Y, Cb, Cr) in 0..255 to RGB in 0..255, not yet clamped: rgb = m[:, :3] @ yuv + m[:, 3].

    By ITU-R BT.601-7, BT.709-6 and BT.2020-2 (non-constant luminance), for 8 bits: with Y' = Kr R' + Kg G' + Kb B',
    Cb' = (B' - Y') / (2 - 2 Kb) and Cr' = (R' - Y') / (2 - 2 Kr), the samples are Y = 219 Y' + 16 and
    C = 224 C' + 128 or, in full range (JFIF), Y = 255 Y' and C = 255 C' + 128.
    """
    red, blue = _LUMA[matrix]
    green = 1 - red - blue
    colour = np.array(
        [
            [1, 0, 2 - 2 * red],
            [1, -(2 - 2 * blue) * blue / green, -(2 - 2 * red) * red / green],
            [1, 2 - 2 * blue, 0],
        ]
    )
    scale, zero = ((1, 1, 1), (0, 128, 128)) if full_range else ((255 / 219, 255 / 224, 255 / 224), (16, 128, 128))
    colour *= scale
    return np.column_stack([colour, -colour @ zero]).astype(np.float32)


def is_full_range(frame: av.VideoFrame) -> bool:
    """Return whether Y, Cb and Cr use 0..255, not 16..235 and 16..240."""
    return frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")


class Colours(NamedTuple):
    """FFmpeg's numbers of what is stated on colours."""

    colorspace: int
    color_trc: int
    color_primaries: int
    color_range: int


_NOTHING = Colours(UNSPECIFIED, UNSPECIFIED, UNSPECIFIED, 0)


def stated_colours(decoder: av.VideoCodecContext) -> Colours | None:
    """Return what a container states of a video's colours, by its decoder before it has decoded; None for nothing."""
    stated = Colours(*(int(getattr(decoder, name)) for name in Colours._fields))
    return None if stated == _NOTHING else stated


def fill_in(frame: av.VideoFrame, stated: Colours | None) -> Colours | None:
    """Have a frame state what its container states and its stream does not: HEVC's decoder forgets it.

    Returns what is to be filled into the next frame; None if this one lacked nothing.
    """
    if stated is None:
        return None
    lacking = [
        (name, value)
        for name, value, nothing in zip(Colours._fields, stated, _NOTHING, strict=True)
        if getattr(frame, name) == nothing != value
    ]
    for name, value in lacking:
        setattr(frame, name, value)
    return stated if lacking else None


def to_rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, width: int | None = None, height: int | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Return a frame's pixels in RGB by the matrix and range that it states, not turned; resized if a size is given.

    HDR is mapped to SDR.
    """
    if frame.colorspace == _RESERVED:  # swscale would refuse it; players take it for unspecified
        frame.colorspace = UNSPECIFIED
    transfer = TRANSFERS.get(frame.color_trc)
    if transfer is not None and frame.colorspace == UNSPECIFIED:
        frame.colorspace = _BT2020
    depth = "rgb24" if transfer is None else "gbrp16le"  # with these flags swscale's rgb48 is wrong
    pixels = reformatter.reformat(frame, width, height, format=depth, interpolation=EXACT, threads=1).to_ndarray()
    return pixels if transfer is None else to_sdr(pixels, transfer, frame.color_primaries)


def upright_image(frame: av.VideoFrame, reformatter: VideoReformatter, aspect: Fraction = SQUARE) -> Image.Image:
    """Return a frame in SDR's RGB, turned and mirrored as its display matrix says.

    `aspect` is a pixel's width by its height, as stored, before the turn: the shorter side is stretched.
    """
    size = () if aspect == SQUARE else square_size(frame.width, frame.height, aspect)
    image, turn = Image.fromarray(to_rgb(frame, reformatter, *size)), transposition(frame)
    return image if turn is None else image.transpose(turn)


def square_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Return the width and height in square pixels of a picture whose pixels are `aspect` times as wide as high."""
    wide, high = (width * aspect, Fraction(height)) if aspect > 1 else (Fraction(width), height / aspect)
    scale = min(Fraction(1), MAX_SIDE / max(wide, high))
    return max(round(wide * scale), 1), max(round(high * scale), 1)


def believed_aspect(aspect: Fraction | None) -> Fraction:
    """Return the shape of pixels that is stated, square ones if none is or if no screen has such."""
    return aspect if aspect and 1 / MAX_ASPECT <= aspect <= MAX_ASPECT else SQUARE


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Return the height and width of a frame in pixels once it is upright."""
    sideways = transposition(frame) in _SIDEWAYS
    return (frame.width, frame.height) if sideways else (frame.height, frame.width)


def shown_as_stored(frame: av.VideoFrame) -> bool:
    """Return whether a frame is neither turned nor HDR, so that decoders which know of nothing else may be used."""
    return frame.color_trc not in TRANSFERS and transposition(frame) is None


def transposition(frame: av.VideoFrame) -> Image.Transpose | None:
    """Return what makes a frame upright, None if it is. VideoFrame.rotation takes mirrored for upside down."""
    # Not frame.side_data, which refers to the frame that keeps it: then only the garbage collector, which counts
    # objects and not their size, would free frames, by the hundred.
    matrix = SideDataContainer(frame).get(Type.DISPLAYMATRIX)  # pyright: ignore[reportCallIssue]
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    return _UPRIGHT.get((_sign(a), _sign(b), _sign(c), _sign(d)))


def _sign(value: int) -> int:
    """Return the sign of a 16.16 fixed-point number, 0 up to a half: angles may be computed ones."""
    return (value > 2**15) - (value < -(2**15))
