"""Drawn people in drawn rooms, with what is true of each frame: where which face is, and where shots begin."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from scripts import make_faces as mf


@functools.cache
def person(identity: int, emotion: int = 0) -> np.ndarray:
    """A drawn face, (224, 224, 3) RGB; identities 0 to 11 are found by every detector that the tests use."""
    return next(mf.frames(mf.apex_script(0, identity, emotion)))[:, :, ::-1].copy()


def room(seed: int, height: int = 90, width: int = 160) -> np.ndarray:
    """A still picture without a face."""
    coarse = np.random.default_rng(seed).integers(30, 226, (4, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@dataclass(frozen=True)
class Actor:
    """A face that moves in a straight line through a scene, in shares of the picture's height; x from its left edge."""

    identity: int
    start: tuple[float, float]
    end: tuple[float, float]
    side: tuple[float, float]  # at the start and at the end
    frames: tuple[int, int] = (0, 10**6)  # first one where it is there, and the one behind the last

    def square(self, share: float, height: int) -> tuple[int, int, int]:
        """The left and top edges and the side of its drawing in pixels, at a share of the way."""
        x, y, side = (
            (1 - share) * a + share * b
            for a, b in zip((*self.start, self.side[0]), (*self.end, self.side[1]), strict=True)
        )
        return round((x - side / 2) * height), round((y - side / 2) * height), round(side * height)


def play(ground: np.ndarray, actors: Sequence[Actor], count: int) -> Iterator[np.ndarray]:
    """The frames of a scene; later actors stand in front. What of a drawing is outside of the picture is cut off."""
    faces = [person(actor.identity) for actor in actors]
    height, width = ground.shape[:2]
    for number in range(count):
        frame = ground.copy()
        for actor, face in zip(actors, faces, strict=True):
            if not actor.frames[0] <= number < actor.frames[1]:
                continue
            left, top, side = actor.square(number / max(count - 1, 1), height)
            drawing = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)
            low, high = np.maximum((left, top), 0), np.minimum((left + side, top + side), (width, height))
            if (high > low).all():
                frame[low[1] : high[1], low[0] : high[0]] = drawing[
                    low[1] - top : high[1] - top, low[0] - left : high[0] - left
                ]
        yield frame


def grain(frames: Sequence[np.ndarray], seed: int = 0, strength: float = 3) -> list[np.ndarray]:
    """The frames as a camera with noise would give them."""
    rng = np.random.default_rng(seed)
    noises = [rng.normal(0, strength, frames[0].shape).astype(np.float32) for _ in range(3)] if frames else []
    return [np.clip(f + noises[i % 3], 0, 255).astype(np.uint8) for i, f in enumerate(frames)]


def dissolve(before: Sequence[np.ndarray], after: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """One scene into the other, in `length` frames, which are of both."""
    mixed = [
        cv2.addWeighted(a, 1 - share, b, share, 0)
        for a, b, share in zip(before[-length:], after[:length], (np.arange(length) + 0.5) / length, strict=True)
    ]
    return [*before[:-length], *mixed, *after[length:]]
