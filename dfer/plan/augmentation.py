"""Augmentation: what training may do to a clip, and how uniform draws become boxes, maps and strengths.

Every function here takes uniforms in [0, 1), a row for each video, and draws nothing itself.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float32, Float64

from dfer.cli import Range
from dfer.plan.transforms import colour_matrices, inverse_map

# SimCLR blurs with 0.1 to 2 pixels; here they are shares of the clip's side, for clips of 112 px.
BLUR_SIGMA = (0.1 / 112, 2.0 / 112)
# Area (share of the clip) and aspect ratio of an erased rectangle, as in timm and torchvision.
ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
# What RandAugment may draw. Strengths at magnitude 10 are timm's: 30 degrees, shear 0.3, a translation by 0.45 of the
# side, factors 1 +- 0.9; blur (BLUR_SIGMA's upper end) is the half of timm's sharpness that a Gaussian can express.
# Left out are posterize, solarize, equalize and autocontrast, which are no affine maps of colours, and invert, which
# does not suit a face.
RANDAUGMENT_OPS = (
    "identity", "rotate", "shear-x", "shear-y", "translate-x", "translate-y", "brightness", "contrast", "saturation",
    "blur",
)  # fmt: skip
MAX_RANDAUGMENT = 4  # operations; MAE-DFER's rand-m7-n4 is the longest of the field


@dataclass(frozen=True)
class Augmentation:
    """Ranges and probabilities of what training does to a clip: one draw per clip, the same for all its frames."""

    # share of the frame that a crop keeps, drawn from [min_crop_area, 1]
    min_crop_area: Annotated[float, Range(0.01, 1.0)] = 0.6
    # aspect ratio of the crop, drawn from [1/r, r], log-uniform
    max_crop_ratio: Annotated[float, Range(1.0, 4.0)] = 1.2
    # probability of a mirror image
    flip: Annotated[float, Range(0.0, 1.0)] = 0.5
    # brightness, contrast and saturation factors are drawn from [1-c, 1+c]
    colour: Annotated[float, Range(0.0, 0.99)] = 0.2
    # brightness alone: one more factor, drawn from [1-b, 1+b]
    brightness: Annotated[float, Range(0.0, 0.99)] = 0.0
    # largest turn of the hue as a share of the colour circle, in YIQ; drawn from [-h, h]
    hue: Annotated[float, Range(0.0, 0.5)] = 0.0
    # probability of a grey clip (BT.601 luma)
    grayscale: Annotated[float, Range(0.0, 1.0)] = 0.0
    # largest angle in degrees, drawn from [-r, r]; beyond the picture its edge is repeated
    rotation: Annotated[float, Range(0.0, 180.0)] = 0.0
    # probability of a Gaussian blur, sigma 0.1 to 2 px of 112
    blur: Annotated[float, Range(0.0, 1.0)] = 0.0
    # probability that a rectangle of 2 to 33 % of the area, ratio 0.3 to 3.3, turns mean grey
    erase: Annotated[float, Range(0.0, 1.0)] = 0.0
    # a clip is spread over 1/f of its video, f drawn from [1, speed], log-uniform: slower by f
    speed: Annotated[float, Range(1.0, 8.0)] = 1.0
    # probability that time runs backwards
    reverse: Annotated[float, Range(0.0, 1.0)] = 0.0
    # operations drawn per clip: geometry, colour or blur, but nothing non-linear; 0 = off
    randaugment: Annotated[int, Range(0, MAX_RANDAUGMENT)] = 0
    # strength of these operations, 0 to 10
    magnitude: Annotated[float, Range(0.0, 10.0)] = 7.0
    # neighbours are blended with weights of Beta(a, a), their labels too; 0 = off
    mixup: Annotated[float, Range(0.0, 100.0)] = 0.0
    # neighbours exchange a box of 1 - Beta(a, a) of the area, and that share of their labels; 0 = off
    cutmix: Annotated[float, Range(0.0, 100.0)] = 0.0


def rand_augment(u: Float64[np.ndarray, "N _"], augmentation: Augmentation) -> list[dict[str, np.ndarray]]:
    """Return the steps of RandAugment: for each operation, its signed strength (N,) float64, 1 at magnitude 10.

    One operation is drawn per step and clip, with equal chances for both signs; the strength of the others is 0.
    """
    steps = []
    for which, sign in u.T.reshape(-1, 2, len(u))[: augmentation.randaugment]:
        drawn = (which * len(RANDAUGMENT_OPS)).astype(np.int64)
        strength = np.where(sign < 0.5, -0.1, 0.1) * augmentation.magnitude
        steps.append({name: np.where(drawn == i, strength, 0.0) for i, name in enumerate(RANDAUGMENT_OPS)})
    return steps


def warps(
    u: Float64[np.ndarray, " N"], steps: list[dict[str, np.ndarray]], augmentation: Augmentation
) -> Float32[np.ndarray, "N 2 3"]:
    """Return `EpochPlan.warp`: the rotation, then the geometric steps of RandAugment."""
    warp = inverse_map(augmentation.rotation * (2 * u - 1))
    for step in steps:
        shear = 0.3 * step["shear-x"], 0.3 * step["shear-y"]
        move = 0.45 * step["translate-x"], 0.45 * step["translate-y"]
        # The last operation on the picture is the first one on the way from the output to the source.
        warp = warp @ inverse_map(30 * step["rotate"], shear, move)
    return warp[:, :2].astype(np.float32)


def blurs(
    u: Float64[np.ndarray, "N 2"], steps: list[dict[str, np.ndarray]], augmentation: Augmentation
) -> Float32[np.ndarray, " N"]:
    """Return `EpochPlan.blur`: the blur that is drawn, then those of RandAugment."""
    low, high = BLUR_SIGMA
    variance = np.where(u[:, 0] < augmentation.blur, low + (high - low) * u[:, 1], 0.0) ** 2
    for step in steps:  # a Gaussian after a Gaussian is one whose variance is the sum
        variance = variance + (high * step["blur"]) ** 2
    return np.sqrt(variance).astype(np.float32)


def colours(
    u: Float64[np.ndarray, "N 3"],
    later: Float64[np.ndarray, "N 3"],
    steps: list[dict[str, np.ndarray]],
    augmentation: Augmentation,
) -> Float32[np.ndarray, "N 3 4"]:
    """Return `EpochPlan.colour`: the factors that are drawn, then those of RandAugment."""
    brightness, contrast, saturation = (1 + augmentation.colour * (2 * u - 1)).T
    light, turn, grey = later.T
    chroma = saturation * np.exp(2j * np.pi * augmentation.hue * (2 * turn - 1))
    factors = [(brightness * (1 + augmentation.brightness * (2 * light - 1)), contrast)]
    for step in steps:
        factors.append((1 + 0.9 * step["brightness"], 1 + 0.9 * step["contrast"]))
        chroma = chroma * (1 + 0.9 * step["saturation"])
    gain, offset = np.ones(len(u)), np.zeros(len(u))
    for brightness, contrast in factors:
        gain, offset = gain * brightness * contrast, offset * brightness * contrast + 128 * (1 - contrast)
    return colour_matrices(gain, offset, np.where(grey < augmentation.grayscale, 0, chroma))


def crop_boxes(u: Float64[np.ndarray, "N 4"], augmentation: Augmentation) -> Float64[np.ndarray, "N 4"]:
    """Return `EpochPlan.box`."""
    area = augmentation.min_crop_area + (1 - augmentation.min_crop_area) * u[:, 0]
    ratio = augmentation.max_crop_ratio ** (2 * u[:, 1] - 1)
    return _boxes(area, ratio, u[:, 2:])


def erase_boxes(u: Float64[np.ndarray, "N 5"], augmentation: Augmentation) -> Float32[np.ndarray, "N 4"]:
    """Return `EpochPlan.erase`."""
    area = ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * u[:, 1]
    ratio = ERASE_RATIO[0] * (ERASE_RATIO[1] / ERASE_RATIO[0]) ** u[:, 2]
    return np.where(u[:, :1] < augmentation.erase, _boxes(area, ratio, u[:, 3:]), 0.0).astype(np.float32)


def _boxes(
    area: Float64[np.ndarray, " N"], ratio: Float64[np.ndarray, " N"], place: Float64[np.ndarray, "N 2"]
) -> Float64[np.ndarray, "N 4"]:
    """Return boxes of an area and a ratio of width to height, anywhere in the unit square, no side longer than 1."""
    height = np.minimum(np.sqrt(area / ratio), 1.0)
    width = np.minimum(np.sqrt(area * ratio), 1.0)
    return np.stack([place[:, 0] * (1 - height), place[:, 1] * (1 - width), height, width], axis=1)
