"""What an EpochPlan says, as stupidly as it can be said: the clip that every loader has to make of it."""

import functools
import math

import numpy as np

from dfer.plan.sampling import EpochPlan


def oracle_clip(pixels: list[np.ndarray], plan: EpochPlan, video: int, size: int) -> np.ndarray:
    """(T, 3, size, size) float64 from the T decoded frames `plan.frames[video]`, each (H, W, 3) uint8 RGB."""
    assert len(pixels) == plan.frames.shape[1]
    clip = []
    for frame in pixels:
        picture = resize(crop(frame, plan.box[video]), size)
        if plan.mirror[video]:
            picture = picture[:, ::-1]
        picture = blur(warp(picture, plan.warp[video]), plan.blur[video])
        colour = plan.colour[video].astype(np.float64)
        picture = picture @ colour[:, :3].T + colour[:, 3]
        clip.append(erase(picture, plan.erase[video]).transpose(2, 0, 1))
    return np.stack(clip)


def crop(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """DALI's rule: shares come in as float32, are multiplied in float64, and half a pixel is rounded up."""
    anchor, shape = np.float32(box[:2]).astype(np.float64), np.float32(box[2:]).astype(np.float64)
    slices = []
    for length, a, s in zip(frame.shape[:2], anchor, shape, strict=True):
        start = min(math.floor(a * length + 0.5), length - 1)
        slices.append(slice(start, max(math.floor((a + s) * length + 0.5), start + 1)))
    return frame[slices[0], slices[1]]


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    rows, columns = (resize_weights(n, size) for n in picture.shape[:2])
    return np.einsum("iy,jx,yxc->ijc", rows, columns, picture.astype(np.float64), optimize=True)


@functools.cache
def resize_weights(source: int, target: int) -> np.ndarray:
    """Antialiased linear interpolation: a triangle as wide as an output pixel, but never narrower than an input one."""
    scale = source / target
    support = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * scale - 0.5
        for j in range(math.floor(centre - support), math.ceil(centre + support) + 1):
            # beyond the edge lies the edge pixel again
            weights[i, min(max(j, 0), source - 1)] += max(0.0, 1 - abs(j - centre) / support)
    return weights / weights.sum(1, keepdims=True)


def warp(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    size = len(picture)
    if np.array_equal(matrix, np.eye(2, 3)):
        return picture
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    source_x, source_y = (
        np.clip((a * x + b * y + c + 0.5) * size - 0.5, 0, size - 1) for a, b, c in matrix.astype(np.float64)
    )
    left, top = (np.minimum(s.astype(int), size - 2) for s in (source_x, source_y))
    right_share, bottom_share = (source_x - left)[..., None], (source_y - top)[..., None]
    upper = picture[top, left] * (1 - right_share) + picture[top, left + 1] * right_share
    lower = picture[top + 1, left] * (1 - right_share) + picture[top + 1, left + 1] * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


def blur(picture: np.ndarray, share: np.float32) -> np.ndarray:
    size = len(picture)
    if share == 0:
        return picture
    sigma = np.float32(share) * np.float32(size)
    radius = min(math.ceil(np.float32(3) * sigma), size - 1)
    weights = {d: math.exp(-(d**2) / (2 * float(sigma) ** 2)) for d in range(-radius, radius + 1)}
    for axis in (0, 1):
        blurred = np.zeros_like(picture)
        for i in range(size):
            for d, weight in weights.items():
                j = abs(i + d)  # reflected at the first pixel ...
                j = j if j < size else 2 * (size - 1) - j  # ... or at the last one, which are not repeated
                if axis == 0:
                    blurred[i] += weight * picture[j]
                else:
                    blurred[:, i] += weight * picture[:, j]
        picture = blurred / sum(weights.values())
    return picture


def erase(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    size = np.float32(len(picture))
    top, left, height, width = np.float32(box)
    rows, columns = ((round(a * size), round((a + s) * size)) for a, s in ((top, height), (left, width)))
    erased = picture.copy()
    erased[slice(*rows), slice(*columns)] = 0
    return erased
