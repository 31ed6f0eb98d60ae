"""Emotions over time: windows over a video's face, each predicted as one clip, and their weighted mean for each frame.

A window is a run of consecutive frames of one face. It is predicted as evaluation predicts a video of as many frames;
the probabilities of a frame are the mean over the windows that it lies in, weighted by a Hann window: those count most
that have it in their middle. Unweighted, windows that lie almost wholly before or after a change count as much for it
as those around it, which smears the change and moves it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from dfer.lists.annotations import EMOTIONS
from dfer.plan.sampling import ClipSampler

Prepared = TypeVar("Prepared")  # what is held of a picture
Prepare = Callable[[UInt8[np.ndarray, "H W 3"]], Prepared]
# Clips, each of T prepared pictures, and whether they are mirrored -> the probabilities of each.
Predict = Callable[[Sequence[Sequence[Prepared]], bool], Float64[np.ndarray, "B K"]]


def place_windows(track: Int64[np.ndarray, " N"], length: int, stride: int) -> Int64[np.ndarray, "W 2"]:
    """Return windows (first frame, frame after the last) that cover all frames with a face, and each one face only.

    `track[i]` is the face of frame i, -1 for none. Of each face's runs of frames, the windows of `length` frames
    start every `stride` frames, at most `length`, and one more ends with the run; a run that is not longer than
    `length` is one window. Both ends rise from window to window.
    """
    assert 1 <= stride <= length
    edges = [0, *(np.flatnonzero(np.diff(track)) + 1).tolist(), len(track)]
    windows = []
    for first, end in itertools.pairwise(edges):
        if first < end and track[first] >= 0:
            last = max(end - length, first)
            windows += [(start, min(start + length, end)) for start in [*range(first, last, stride), last]]
    return np.array(windows, np.int64).reshape(-1, 2)


class Timeline(Generic[Prepared]):
    """The probabilities of each frame, from pictures that come one by one; those that windows wait for are held.

    Args:
        num_frames: of the video.
        windows: as from `place_windows`.
        sampler: in mode "eval": which frames of a window make a clip; of its views the mean is taken.
        prepare: makes of a picture what is held of it.
        predict: the model.
        batch_size: windows that are predicted together.
    """

    def __init__(
        self,
        num_frames: int,
        windows: Int64[np.ndarray, "W 2"],
        sampler: ClipSampler,
        prepare: Prepare[Prepared],
        predict: Predict[Prepared],
        batch_size: int,
    ):
        self._windows, self._prepare, self._predict, self._batch_size = windows, prepare, predict, batch_size
        lengths = windows[:, 1] - windows[:, 0]
        plans = [sampler.plan(view, lengths) for view in range(sampler.num_views)] if len(windows) else []
        self._mirrors = [bool(plan.mirror.any()) for plan in plans]
        self._frames = np.zeros((0, 1, 1), np.int64)  # (W, V, T)
        if plans:
            self._frames = np.stack([plan.frames for plan in plans], axis=1) + windows[:, :1, None]
        self._complete = self._frames.max(axis=(1, 2), initial=0)  # frames that windows wait for, rising
        self._last_use = np.full(num_frames, -1, np.int64)  # window
        for window, frames in enumerate(self._frames):
            self._last_use[frames] = window
        self._held: dict[int, Prepared] = {}
        self._done = 0  # windows
        self._sum = np.zeros((num_frames, len(EMOTIONS)))
        self._weight = np.zeros(num_frames)

    def wants(self, frame: int) -> bool:
        """Return whether the frame is part of any window's clip."""
        return bool(self._last_use[frame] >= 0)

    def add(self, frame: int, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Take the next frame that is wanted; none may be left out."""
        self._held[frame] = self._prepare(picture)
        ready = int(np.searchsorted(self._complete, frame, side="right"))
        while ready - self._done >= self._batch_size or ready == len(self._windows) > self._done:
            batch = range(self._done, min(self._done + self._batch_size, ready))
            views = [
                self._predict([[self._held[f] for f in self._frames[w, view].tolist()] for w in batch], mirrored)
                for view, mirrored in enumerate(self._mirrors)
            ]
            for w, probabilities in zip(batch, np.mean(views, axis=0), strict=True):
                start, stop = self._windows[w]
                weights = np.hanning(stop - start + 2)[1:-1]  # all above 0
                self._sum[start:stop] += weights[:, None] * probabilities
                self._weight[start:stop] += weights
            self._done = batch.stop
            self._held = {f: held for f, held in self._held.items() if self._last_use[f] >= self._done}

    @property
    def complete(self) -> bool:
        """Return whether all windows were predicted."""
        return self._done == len(self._windows)

    def probabilities(self) -> Float64[np.ndarray, "N K"]:
        """Return the probabilities of each frame; nan where no face is."""
        with np.errstate(invalid="ignore"):
            return self._sum / self._weight[:, None]


def segments(track: Int64[np.ndarray, " N"], probabilities: Float64[np.ndarray, "N K"]) -> list[tuple[int, int, int]]:
    """Return runs of frames of one face with one likeliest emotion: (first frame, frame after the last, emotion)."""
    likeliest = np.where(track >= 0, np.nan_to_num(probabilities).argmax(1), -1)
    edges = np.flatnonzero((np.diff(track) != 0) | (np.diff(likeliest) != 0)) + 1
    runs = itertools.pairwise([0, *edges.tolist(), len(track)])
    return [(first, end, int(likeliest[first])) for first, end in runs if first < end and track[first] >= 0]
