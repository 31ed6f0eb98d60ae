"""Shots: where a video cuts or dissolves from one picture to another.

PySceneDetect proposes cuts. What returns to the same picture, or changes its light alone, is none: a flash, a lamp.
"""

import bisect
from collections import deque

import cv2
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from dfer.cli import UserError

_SEEN, _COMPARED = (64, 36), (32, 18)  # px of the thumbnails for PySceneDetect and for us, whatever the picture's shape
# A cut changes the picture by so much (the mean of PySceneDetect's hue, saturation and luma), and by this factor more
# than the frames around it. Another person before the same wall changes it by 10 and more, a hand that waves by 5.
MIN_CHANGE, MIN_RATIO = 6.0, 2.0
FLASH = 4  # frames at most
SAME_PICTURE = 0.9  # correlation of the luma; of flashes, lamps and shaking cameras it is 0.95 and up
DISSOLVE_S = (0.25, 0.5)  # what is half way between the pictures so long before and after it is part of a dissolve
MAX_RESIDUE = 0.2  # what the half way may be off, as a share of the change; motion is off by more
DISSOLVED = 15.0  # levels of luma that a dissolve changes at least

_Thumbnail = UInt8[np.ndarray, "36 64 3"]
_Luma = Float32[np.ndarray, "18 32"]


class ShotDetector:
    """Frames come one by one; in the end `starts` says where shots begin. A second of thumbnails is held.

    Raises:
        UserError: if PySceneDetect is not installed.
    """

    def __init__(self):
        try:
            from scenedetect import FrameTimecode  # here, as what only reads videos does not need it
            from scenedetect.detectors import AdaptiveDetector
        except ImportError as error:
            raise UserError(
                f"PySceneDetect, which finds cuts in videos, is not there ({error}): pip install scenedetect-headless"
            ) from None
        self._timecode = FrameTimecode
        self._adaptive = AdaptiveDetector(MIN_RATIO, min_scene_len=1, min_content_val=MIN_CHANGE)
        self._recent: deque[tuple[float, _Luma]] = deque()  # times and pictures, the newest last
        self._last: deque[_Thumbnail] = deque(maxlen=3)
        self._count = 0  # frames
        self._shape: tuple[int, ...] | None = None
        self._proposed: list[int] = []
        self._starts: list[int] = []
        self._dissolving: list[tuple[float, int, float]] = []  # residue, frame and time, while one goes on

    def add(self, time: float, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Take the next frame; `time` in seconds, rising."""
        if self._shape not in (None, frame.shape):
            self._starts.append(self._count)
        self._shape = frame.shape
        thumbnail = cv2.resize(frame, _SEEN, interpolation=cv2.INTER_AREA)[:, :, ::-1].copy()  # BGR
        self._last.append(thumbnail)
        small = cv2.resize(thumbnail, _COMPARED, interpolation=cv2.INTER_AREA)
        self._recent.append((time, small.mean(axis=2, dtype=np.float32)))
        while len(self._recent) > 2 * FLASH + 2 and self._recent[1][0] < time - 2 * DISSOLVE_S[-1]:
            self._recent.popleft()
        self._propose(self._count, thumbnail)
        self._count += 1
        while self._proposed and self._proposed[0] + FLASH < self._count:
            self._judge(self._proposed.pop(0))
        self._look_for_dissolve(time)

    def starts(self) -> Int64[np.ndarray, " S"]:
        """Return the first frame of each shot but the first, rising, once all frames were added."""
        # It compares a frame with two on each side. Behind the end the video goes backwards.
        for ahead, thumbnail in enumerate(list(self._last)[-2::-1]):
            self._propose(self._count + ahead, thumbnail)
        for cut in self._proposed:
            self._judge(cut)
        self._end_dissolve()
        return np.unique(np.array(self._starts, np.int64))

    def _propose(self, number: int, thumbnail: _Thumbnail) -> None:
        cuts = self._adaptive.process_frame(self._timecode(number, 25.0), thumbnail)
        self._proposed += [cut.frame_num for cut in cuts]

    def _luma(self, number: int) -> _Luma:
        """Return a frame's picture, or the nearest that is held."""
        oldest = self._count - len(self._recent)
        return self._recent[min(max(number - oldest, 0), len(self._recent) - 1)][1]

    def _judge(self, cut: int) -> None:
        """Keep a proposed cut unless a picture before it is one after it, in whatever light."""
        pairs = [(cut - 1 - i, cut + j) for i in range(FLASH + 1) for j in range(FLASH + 1 - i)]
        if all(_correlation(self._luma(i), self._luma(j)) < SAME_PICTURE for i, j in pairs):
            self._starts.append(cut)

    def _look_for_dissolve(self, time: float) -> None:
        """Compare the frame of half a second ago with the mean of those before and after it."""
        reach = DISSOLVE_S[-1]
        if self._recent[0][0] > time - 2 * reach:
            return
        times = [moment for moment, _ in self._recent]
        middle = bisect.bisect_left(times, time - reach)
        residues = []
        for away in DISSOLVE_S:
            before = self._recent[max(bisect.bisect_right(times, times[middle] - away) - 1, 0)][1]
            after = self._recent[min(bisect.bisect_left(times, times[middle] + away), len(times) - 1)][1]
            change = float(np.abs(after - before).mean())
            if change > DISSOLVED and _correlation(before, after) < SAME_PICTURE:
                half = np.abs(self._recent[middle][1] - (before + after) / 2)
                residues.append(float(half.mean()) / change)
        if residues and min(residues) < MAX_RESIDUE:
            self._dissolving.append((min(residues), self._count - len(times) + middle, times[middle]))
        elif self._dissolving and self._dissolving[-1][2] < times[middle] - reach:
            self._end_dissolve()

    def _end_dissolve(self) -> None:
        """Have the new shot begin where the dissolve was half over."""
        if self._dissolving:
            self._starts.append(min(self._dissolving)[1])
        self._dissolving = []


def _correlation(before: _Luma, after: _Luma) -> float:
    """Return how alike the structure of two pictures is: 1 where one is the other in another light."""
    a, b = before - before.mean(), after - after.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-9))
