"""Cuts: where one shot of a video ends and the next begins."""

import cv2
import numpy as np
from jaxtyping import UInt8

# Both must hold at a cut: lights that go on change the colours but not the structure; noise, the structure only.
MAX_CUT_CORRELATION = 0.75  # within shots 0.86 and up, between shots 0.7 and down
MIN_CUT_COLOURS = 0.3  # share of the picture that changes its colour


def thumbnail(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "32 32 3"]:
    """Return the small picture of a frame that `is_cut` compares."""
    return cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA)


def is_cut(before: UInt8[np.ndarray, "32 32 3"], after: UInt8[np.ndarray, "32 32 3"]) -> bool:
    """Return whether two consecutive frames show different shots, from their thumbnails. Fades are no cuts."""
    a, b = (image.mean(axis=2) - image.mean() for image in (before, after))
    correlation = (a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-9)
    first, second = (
        np.bincount((image.reshape(-1, 3) >> 5) @ np.array([64, 8, 1]), minlength=512) for image in (before, after)
    )
    colours = np.abs(first - second).sum() / (2 * first.sum())
    return bool(correlation < MAX_CUT_CORRELATION and colours > MIN_CUT_COLOURS)
