"""Draw the timeline of a video: a lane for each emotion, filled as high as its probability."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from dfer.lists.annotations import EMOTIONS
from dfer.report.figures import ACCENT, GRID, INK, MUTED, Axes, Figure, thin

TICKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 86400)


@dataclass(frozen=True)
class Lanes:
    """The layout of a timeline in pixels: a lane for each emotion, its name on the left and a bar on the right."""

    width: int  # of the whole
    unit: int | float  # what 1 px is at the size that one reads

    def px(self, length: int | float) -> int:
        return round(length * self.unit)

    @property
    def lane(self) -> int:
        return self.px(22)

    @property
    def top(self) -> int:
        return self.px(24)

    @property
    def height(self) -> int:
        """Return the height of the whole, which is even."""
        return (self.top + self.lane * len(EMOTIONS) + self.px(42)) // 2 * 2

    @property
    def extent(self) -> tuple[int, int]:
        """Return the columns where the lanes begin and end."""
        return self.px(78), self.bar[0] - self.px(20)

    @property
    def bar(self) -> tuple[int, int]:
        """Return the columns where a bar begins, and where it ends at 100 %; its number follows."""
        return self.width - self.px(118), self.width - self.px(52)


def lanes_figure(
    lanes: Lanes, edges: Float64[np.ndarray, " E"], probabilities: Float64[np.ndarray, "N K"], bars: str
) -> Figure:
    """Draw the probabilities of the N frames of a video over time.

    Args:
        lanes: where things lie.
        edges: N + 1 times in seconds, rising: where the frames begin, and where the last one ends.
        probabilities: nan in frames without a face.
        bars: what is written above the bars, which the caller draws.
    """
    (left, right), bottom = lanes.extent, lanes.height - lanes.top - lanes.lane * len(EMOTIONS)
    width, height = lanes.width, lanes.height
    figure = Figure(figsize=(width / 100 / lanes.unit, height / 100 / lanes.unit), dpi=100 * lanes.unit)
    box = (left / width, bottom / height, (right - left) / width, lanes.lane * len(EMOTIONS) / height)
    axes = figure.add_axes(box)
    size = -(-len(probabilities) // (right - left))  # frames of a column of pixels
    edges = np.append(edges[:-1:size], edges[-1])
    means = np.stack([thin(column, size) for column in probabilities.T])  # (K, chunks)
    _fill(axes, edges, means)
    long = edges[-1] - edges[0]
    _mark_gaps(axes, edges, ~np.isfinite(means[0]), long / (right - left), lanes.px(60))
    _time_axis(axes, edges[0], long, max(2, (right - left) / lanes.px(60)))
    axes.set_yticks(np.arange(len(EMOTIONS)) + 0.5, EMOTIONS, color=INK)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(len(EMOTIONS), 0))
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.text(lanes.bar[0] / width, 1 - 0.55 * lanes.top / height, bars, color=MUTED, va="center")
    return figure


def _fill(axes: Axes, edges: Float64[np.ndarray, " E"], means: Float64[np.ndarray, "K C"]) -> None:
    """Fill each lane as high as its probability, in colour where it is the highest of all."""
    has_face, likeliest = np.isfinite(means[0]), np.nan_to_num(means).argmax(0)
    for k in range(len(EMOTIONS)):
        for colour, alpha, mine in ((ACCENT, 1.0, likeliest == k), (MUTED, 0.5, likeliest != k)):
            height = np.where(mine & has_face, k + 1 - 0.92 * means[k], np.nan)
            axes.stairs(height, edges, baseline=k + 1, fill=True, color=colour, alpha=alpha, linewidth=0)
    axes.hlines(np.arange(len(EMOTIONS)) + 1, edges[0], edges[-1], color=GRID, linewidth=0.7, zorder=0.5)


def _mark_gaps(
    axes: Axes, edges: Float64[np.ndarray, " E"], gaps: Bool[np.ndarray, " C"], s_per_px: float, labelled_px: int
) -> None:
    """Shade the times without a face; those wider than `labelled_px` pixels are labelled too."""
    for first, end in _stretches(gaps):
        axes.axvspan(edges[first], edges[end], color=GRID, alpha=0.7, linewidth=0, zorder=0.4)
        if (edges[end] - edges[first]) / s_per_px > labelled_px:
            middle = (edges[first] + edges[end]) / 2, len(EMOTIONS) / 2
            axes.text(*middle, "no face", ha="center", va="center", color=MUTED)


def _time_axis(axes: Axes, start_s: float, long_s: float, most: float) -> None:
    """Put at most `most` ticks below the lanes, counted from the beginning of the video."""
    tick = next((t for t in TICKS_S if long_s / t <= most), TICKS_S[-1])
    at = np.arange(0, long_s + 1e-9, tick)
    clock = [f"{int(t) // 60}:{int(t) % 60:02d}" for t in at] if long_s >= 60 else [f"{t:g}" for t in at.round(1)]
    axes.set_xticks(start_s + at, clock)
    axes.set_xlabel("minutes" if long_s >= 60 else "seconds", labelpad=1)


def _stretches(mask: Bool[np.ndarray, " N"]) -> list[tuple[int, int]]:
    """Return where the mask is true: (first, one after the last) of each stretch."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
