"""Matrices of what is done to a clip: affine maps of colours and of positions."""

import numpy as np
from jaxtyping import Complex128, Float32, Float64

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])
# RGB -> YIQ. The first row is BT.601's luma, as in DALI and torchvision; the others sum to 0: grey has no colour.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_LUMA = np.tile(_YIQ[0], (3, 1))
# A quarter turn of the colour plane, grey to black: red turns towards yellow, as in DALI and torchvision.
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ


def inverse_map(
    degrees: Float64[np.ndarray, " N"],
    shear: tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]] | None = None,
    move: tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]] | None = None,
) -> Float64[np.ndarray, "N 3 3"]:
    """Return the maps from a position of the output to its source, in centred shares of the side.

    At most one of the three is done to a clip. As y points down, a positive angle turns the picture counter-clockwise.

    Args:
        degrees: angle of a rotation.
        shear: along x and along y.
        move: along x and along y, in shares of the side.
    """
    zero, one = np.zeros(len(degrees)), np.ones(len(degrees))
    (shear_x, shear_y), (move_x, move_y) = shear or (zero, zero), move or (zero, zero)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    rows = [cos, shear_x - sin, move_x, shear_y + sin, cos, move_y, zero, zero, one]
    return np.stack(rows, axis=1).reshape(-1, 3, 3)


def colour_matrices(
    gain: Float64[np.ndarray, " N"], offset: Float64[np.ndarray, " N"], chroma: Complex128[np.ndarray, " N"]
) -> Float32[np.ndarray, "N 3 4"]:
    """Return a change of colour and ImageNet's normalisation as one affine map: `EpochPlan.colour`.

    Everything done to colours is affine, because nothing is clamped in between or after. Brightness f scales RGB by f;
    contrast f scales it about mid-grey 128, so a clip's brightness and contrast are one `gain` and one `offset` (in
    0..255). Saturation and hue leave BT.601's luma as it is and act on the two axes of colour of YIQ alone: saturation
    is the length of `chroma` and hue its angle; 0 is grey and 1 leaves the colour as it is.
    """
    gain, offset, stretch, turn = (x[:, None, None] for x in (gain, offset, np.real(chroma), np.imag(chroma)))
    matrix = gain * (stretch * np.eye(3) + (1 - stretch) * _LUMA + turn * _QUARTER_TURN)
    scale = 1 / (255 * IMAGENET_STD)[:, None]
    shift = (IMAGENET_MEAN / IMAGENET_STD)[:, None]
    return np.concatenate([matrix * scale, offset * scale - shift], axis=2).astype(np.float32)
