"""Balance: which videos an epoch takes, where classes of few videos are to come more often."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

Balance = Literal["none", "sqrt", "full"]
POWERS: dict[Balance, float] = {"none": 0.0, "sqrt": -0.5, "full": -1.0}


def expected_times(labels: Int64[np.ndarray, " N"], balance: Balance) -> Float64[np.ndarray, " N"]:
    """Return how often an epoch of N clips takes each video on average: as (videos of its class)^-1/2 or ^-1."""
    weights = np.bincount(labels).astype(np.float64)[labels] ** POWERS[balance]
    return weights * (len(labels) / weights.sum())


def balanced_videos(
    times: Float64[np.ndarray, " N"], order: Int64[np.ndarray, " N"], u: float
) -> Int64[np.ndarray, " N"]:
    """Return the video of each of N rows of a plan, by systematic sampling: as often as expected, rounded up or down.

    A video that is drawn keeps its own row; its repeats get the rows of videos that are not drawn, and with them frames
    and augmentation of their own: no clip comes twice.

    Args:
        times: how often each video is expected; they sum to N.
        order: a random order of the videos, in which every N-th part of the sum of `times` draws one.
        u: a uniform in [0, 1), the offset of these N points.
    """
    num_videos = len(order)
    edges = np.cumsum(times[order])
    hit = np.searchsorted(edges, np.arange(num_videos) + u, side="right").clip(max=num_videos - 1)
    taken = np.bincount(order[hit], minlength=num_videos)
    video = np.arange(num_videos)
    video[taken == 0] = np.repeat(video, np.maximum(taken - 1, 0))
    return video


def describe_draws(labels: Int64[np.ndarray, " N"], balance: Balance, classes: Sequence[str]) -> str:
    """Return in a line what an epoch takes of each class, and how many videos there are."""
    drawn = np.bincount(labels, expected_times(labels, balance), minlength=len(classes))
    there = np.bincount(labels, minlength=len(classes))
    parts = (f"{name} {round(n)} of {has}" for name, n, has in zip(classes, drawn, there, strict=True) if has)
    return f"balance {balance}: clips that an epoch takes, of so many videos: {', '.join(parts)}"
