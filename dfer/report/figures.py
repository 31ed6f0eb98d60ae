"""Figures of a run, drawn once for the page and for files: the one place that knows matplotlib.

Colours are those of COLOURS only, so that a page can make variables of them, with a light and a dark value; shades are
opacity, which looks right on both.
"""

import contextlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from dfer.lists.annotations import EMOTIONS
from dfer.report.records import Run, wilson

COLOURS = {
    "ink": "#20262e",
    "muted": "#66717e",
    "grid": "#dde2e8",
    "accent": "#c2410c",
    "second": "#0c8599",
    "on-accent": "#fffffe",  # not quite white, so that it is no other white
}
INK, MUTED, GRID, ACCENT, SECOND, ON_ACCENT = COLOURS.values()
STYLE = {
    "svg.hashsalt": "dfer",  # the same records give the same bytes
    "svg.fonttype": "none",
    "axes.unicode_minus": False,
    "axes.formatter.limits": (-2, 5),  # other numbers share a factor, so that they fit into the margin
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
}
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
TICKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 86400)
MAX_POINTS = 300  # of a curve; more rows than that are averaged

# Of each figure: its title, and how to read it.
TEXTS = {
    "confusion": (
        "Confusion matrix, clips",
        "Rows are what the clips are, columns what they were taken for. Most frequent: {most}.",
    ),
    "confusion_normalised": (
        "Confusion matrix, % of each row",
        "The diagonal is the recall of each class. A column that is full off the diagonal: a class that others end in.",
    ),
    "recall": (
        "Recall of each class",
        "Dot: recall; bar: its 95 % confidence interval (Wilson); in brackets: clips. Where two bars overlap widely, "
        "these clips do not tell which class is recognised better.",
    ),
    "loss": (
        "Loss",
        "Training: the objective, with label smoothing and the CRF's own term. Evaluation: plain cross-entropy. Their "
        "distance says little; one rising while the other falls is overfitting.",
    ),
    "war_uar": (
        "WAR and UAR, %",
        "WAR is accuracy, UAR the mean of the classes' recalls. A gap between them: rare classes are missed.",
    ),
    "recalls": (
        "Recall of each class over time",
        "One column per evaluation; full colour is 100 %. A row that stays empty is a class that is never found.",
    ),
    "grad_norm": (
        "Norm of the gradient",
        "Before clipping, of the last step of each row. Peaks are single steps; a steady climb calls for a lower rate.",
    ),
    "lr": ("Learning rate", "Warm-up, then half a cosine."),
    "throughput": (
        "Throughput",
        "Where the two lines part, training waits for data; below, the share of the time that it waits. The first row "
        "includes the start of the loader. If it stays above a few percent: docs/speed.md.",
    ),
    "coupling": (
        "Coupling",
        "How strongly cells pull at each other (of a Gaussian CRF: its beta). Up to 2, mean field has one optimum.",
    ),
    "entropy": (
        "Entropy of the cells' beliefs, nats",
        "{undecided:.2f} is a toss-up among all states, 0 is certainty.",
    ),
    "compatibility": (
        "Compatibility of the classes, {kernel} kernel",
        "Orange: a pair of classes that is rewarded where the {kernel} kernel joins two cells; teal: one that is "
        "punished. Means over the {states} x {states} states of each pair. The kernel's coupling is {coupling:.2f} of "
        "at most {most:g}.",
    ),
    "widths": (
        "Widths of the kernels",
        "How far each kernel reaches: in frames, in shares of the picture's height and width, and between the two "
        "levels, which are 1 apart. Ring: at the start; dot and number: learned.",
    ),
    "free_energy": (
        "Free energy per iteration, nats per token",
        "What mean field minimises, less its value before the first iteration, mean of {clips} clips. It may never "
        "rise. Dashed: the {iterations} iterations of this model; what falls beyond them is what more would bring.",
    ),
}

Named = dict[str, tuple[str, str]]  # key of metrics.jsonl -> name, colour


def style() -> contextlib.AbstractContextManager[None]:
    """Everything below is to be called within."""
    return matplotlib.rc_context(STYLE)


def _panel(xlabel: str = "", height: float = 2.5, left: float = 0.11, bottom: float = 0.42) -> tuple[Figure, Axes]:
    """Margins are given (left as a share, bottom in inches), as matplotlib's own layout doubles the time to draw."""
    figure = Figure(figsize=(4.0, height))
    axes = figure.add_axes((left, bottom / height, 0.97 - left, 0.93 - bottom / height))
    axes.set_xlabel(xlabel)
    return figure, axes


def thin(column: Float64[np.ndarray, " R"], size: int | None = None) -> Float64[np.ndarray, " P"]:
    """Means of `size` rows each, of those that are not nan; if not given, for MAX_POINTS points at most."""
    size = size or -(-len(column) // MAX_POINTS) or 1
    chunks = [column[start : start + size] for start in range(0, len(column), size)]
    return np.array([np.nanmean(c) if np.isfinite(c).any() else math.nan for c in chunks], dtype=np.float64)


def _plain_log_ticks(axis: Axis) -> None:
    """0.1, 0.2, 0.5, 1 ...: matplotlib's own are powers of ten only, and in its formula language."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")


def _draw_curves(axes: Axes, run: Run, named: Named, scale: int | float = 1) -> None:
    for key, (name, colour) in named.items():
        steps, values = (thin(column) for column in run.series(key))
        if np.isfinite(values).any():
            marker = "o" if np.isfinite(values).sum() <= 40 else None
            axes.plot(steps, scale * values, color=colour, label=name, marker=marker, markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if len(named) > 1:
        axes.legend(handlelength=1.2)


def _nothing(run: Run, named: Named) -> str | None:
    if not any(np.isfinite(run.series(key)[1]).any() for key in named):
        return f"metrics.jsonl holds no finite value of {' or '.join(named)}"
    return None


def curves_figure(run: Run, named: Named, log: bool = False) -> Figure | str:
    """Values over steps; or why there is no figure."""
    why_not = _nothing(run, named)
    if why_not:
        return why_not
    figure, axes = _panel("step", left=0.14)
    _draw_curves(axes, run, named)
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    lowest, highest = np.nanmin(drawn), np.nanmax(drawn)
    if log and lowest > 0:
        axes.set_yscale("log", subs=[])
        _plain_log_ticks(axes.yaxis)
    else:
        axes.set_ylim(1.08 * min(lowest, 0), 1.08 * max(highest, 0) or 1)
    return figure


def throughput_figure(run: Run, rates: Named, waits: Named) -> Figure | str:
    """Clips/s, and below it the share of the time spent waiting, in percent."""
    why_not = _nothing(run, rates)
    if why_not:
        return why_not
    figure, lower = _panel("step", left=0.14)
    box = lower.get_position()
    lower.set_position((box.x0, box.y0, box.width, 0.3 * box.height))
    upper = figure.add_axes((box.x0, box.y0 + 0.4 * box.height, box.width, 0.6 * box.height))
    upper.tick_params(labelbottom=False)
    _draw_curves(upper, run, rates)
    _draw_curves(lower, run, waits, scale=100)
    upper.margins(y=0.1)
    upper.set_ylim(bottom=0)
    lower.set_ylim(0, max(5, lower.get_ylim()[1]))
    upper.set_ylabel("clips/s")
    lower.set_ylabel("wait, %")
    return figure


def _heat(
    axes: Axes,
    values: Float64[np.ndarray, "R C"],
    peak: int | float,
    rows: Sequence[str],
    columns: Sequence[str] = (),
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Cells whose opacity is |value| / peak, in another colour below 0; nan stays empty."""
    height, width = values.shape
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 0.96 + 0.02
    cells = [(r, c) for r in range(height) for c in range(width) if np.isfinite(values[r, c])]
    colours = [(ACCENT if values[at] >= 0 else SECOND, min(float(abs(values[at])) / peak, 1.0)) for at in cells]
    squares = [corners + np.array([c, r]) for r, c in cells]
    axes.add_collection(PolyCollection(squares, facecolors=colours, linewidths=0))
    for (r, c), (_, alpha) in zip(cells, colours, strict=True) if texts is not None else ():
        axes.text(
            *(c + 0.5, r + 0.52, texts[r][c]),
            ha="center",
            va="center",
            color=ON_ACCENT if alpha > 0.75 else INK,
            fontsize=8,
        )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_yticks(np.arange(height) + 0.5, rows, color=INK)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor", color=INK)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def confusion_figure(counts: Int64[np.ndarray, "K K"] | Float64[np.ndarray, "K K"], normalised: bool) -> Figure:
    """Rows are labels, columns predictions; `normalised`: in percent of the row, which is empty without clips."""
    values = counts.astype(np.float64)
    if normalised:
        with np.errstate(invalid="ignore"):
            values = 100 * values / values.sum(1, keepdims=True)
    figure, axes = _panel("predicted", height=3.6, left=0.21, bottom=0.85)
    texts = [[f"{v:.0f}" if np.isfinite(v) else "" for v in row] for row in values]
    _heat(axes, values, 100 if normalised else max(values.max(), 1), EMOTIONS, EMOTIONS, texts)
    axes.set_ylabel("label")
    return figure


def recall_figure(counts: Int64[np.ndarray, "K K"] | Float64[np.ndarray, "K K"]) -> Figure:
    """Recall of each class in percent, with its confidence interval. Counts may be means of runs on the same clips."""
    figure, axes = _panel("recall, %", height=3.0, left=0.28)
    totals = [round(total) for total in counts.sum(1).tolist()]
    for row, (right, total) in enumerate(zip(counts.diagonal().tolist(), totals, strict=True)):
        if total:
            axes.plot(wilson(right, total), [row, row], color=ACCENT, alpha=0.45, linewidth=5, solid_capstyle="butt")
            axes.plot(100 * right / total, row, "o", color=ACCENT, markersize=5, clip_on=False)
    ticks = [f"{emotion} ({total})" for emotion, total in zip(EMOTIONS, totals, strict=True)]
    axes.set_yticks(range(len(EMOTIONS)), ticks, color=INK)
    axes.set(xlim=(0, 100), ylim=(len(EMOTIONS) - 0.5, -0.5))
    return figure


def recalls_figure(run: Run) -> Figure | str:
    """Recall of each class at each evaluation; or why there is no figure."""
    steps, _ = run.series("val/WAR")
    if not len(steps):
        return "no epoch is evaluated yet"
    by_step = [dict(zip(*(c.tolist() for c in run.series(f"val/recall/{e}")), strict=True)) for e in EMOTIONS]
    recalls = np.array([thin(np.array([recall.get(step, math.nan) for step in steps])) for recall in by_step])
    figure, axes = _panel("evaluation", left=0.18)
    _heat(axes, recalls, 100, EMOTIONS)
    axes.set_xticks([0.5, recalls.shape[1] - 0.5][: len(steps)], ["1", str(len(steps))][: len(steps)])
    return figure


def folds_figure(runs: Sequence[Run], key: str) -> Figure | str:
    """A value at each evaluation, thin for each run, thick for their mean; or why there is no figure."""
    curves = [run.series(key)[1] for run in runs]
    if len({len(curve) for curve in curves}) > 1 or not len(curves[0]):
        return f"the runs do not all hold {key} of the same number of evaluations"
    figure, axes = _panel("evaluation", left=0.14)
    mean = np.mean(curves, axis=0)
    for curve, colour, width in (*((c, MUTED, 0.8) for c in curves), (mean, ACCENT, 2)):
        values = thin(curve)
        at = np.linspace(1, len(curve), len(values)) if len(values) > 1 else [1]
        axes.plot(at, values, color=colour, linewidth=width, marker="o" if len(curve) <= 40 else None, markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlim=(0.5, len(mean) + 0.5), ylim=(0, max(1.08 * float(np.nanmax(curves)), 1)))
    return figure


def compatibility_figure(matrix: Float[np.ndarray, "C C"]) -> Figure:
    """Between the classes, background last."""
    names = [*EMOTIONS, "Background"]
    figure, axes = _panel(height=3.6, left=0.23, bottom=0.85)
    texts = [[f"{v:.2f}".replace("-0.00", "0.00") for v in row] for row in matrix]
    _heat(axes, matrix.astype(np.float64), max(float(np.abs(matrix).max()), 1e-9), names, names, texts)
    return figure


def widths_figure(widths: Sequence[tuple[str, float, float]]) -> Figure:
    """Rows of (name, at the start, learned), on a logarithmic axis."""
    figure, axes = _panel("width (sigma)", height=3.6, left=0.42)
    for row, (_, start, learned) in enumerate(widths):
        axes.plot([start, learned], [row, row], color=ACCENT, alpha=0.45, linewidth=3)
        axes.plot(start, row, "o", color=MUTED, markersize=7, markerfacecolor="none")
        axes.plot(learned, row, "o", color=ACCENT, markersize=4)
    axes.set_xscale("log", subs=[])
    _plain_log_ticks(axes.xaxis)
    axes.set_yticks(range(len(widths)), [f"{name}  {learned:.2f}" for name, _, learned in widths], color=INK)
    axes.set_ylim(len(widths) - 0.5, -0.5)
    return figure


def energy_figure(energies: Float64[np.ndarray, " I"], trained: int) -> Figure:
    """Free energy after 0, 1, ... iterations, less the first; a mark at the iterations of the model."""
    figure, axes = _panel("iterations done", left=0.14)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(energies - energies[0], color=ACCENT, marker="o", markersize=3)
    axes.axvline(trained, color=SECOND, linestyle="--", linewidth=1)
    return figure


def course_figure(course: Float[np.ndarray, "T K"], predicted: int, label: int) -> Figure:
    """The share of each emotion, frame by frame; what was predicted and what it is stand out."""
    figure = Figure(figsize=(4.7, 1.5))
    axes = figure.add_axes((0.08, 0.29, 0.76, 0.66))
    frames = np.arange(1, len(course) + 1)
    for k in sorted(range(len(EMOTIONS)), key=lambda k: (k in (predicted, label), k == predicted)):
        colour = ACCENT if k == predicted else SECOND if k == label else MUTED
        named = k in (predicted, label)
        axes.plot(frames, course[:, k], color=colour, linewidth=2 if named else 0.8, alpha=1 if named else 0.6)
        if named:
            other = course[-1, label if k == predicted else predicted]  # names do not lie on one another
            apart = 0 if abs(course[-1, k] - other) > 0.2 * course.max() or predicted == label else 5
            place = {"xytext": (4, -3 + math.copysign(apart, course[-1, k] - other)), "textcoords": "offset points"}
            axes.annotate(EMOTIONS[k], (frames[-1], course[-1, k]), color=colour, annotation_clip=False, **place)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("frame of the clip", labelpad=1)
    return figure


@dataclass(frozen=True)
class Lanes:
    """Where things lie, in pixels, in a picture of a course: a lane for each emotion, with a name and a bar beside."""

    width: int  # of all
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
        """Of all; even."""
        return (self.top + self.lane * len(EMOTIONS) + self.px(42)) // 2 * 2

    @property
    def course(self) -> tuple[int, int]:
        """Columns where the lanes begin and end."""
        return self.px(78), self.bar[0] - self.px(20)

    @property
    def bar(self) -> tuple[int, int]:
        """Columns where a bar begins, and ends at 100 %; its number follows."""
        return self.width - self.px(118), self.width - self.px(52)


def lanes_figure(
    lanes: Lanes, edges: Float64[np.ndarray, " E"], probabilities: Float64[np.ndarray, "N K"], bars: str
) -> Figure:
    """The course of a video: how high a lane is filled is the probability; `bars` is what stands above the bars.

    `edges` are N + 1 times in seconds, rising, where frames begin and end; probabilities are nan without a face.
    """
    figure = Figure(figsize=(lanes.width / 100 / lanes.unit, lanes.height / 100 / lanes.unit), dpi=100 * lanes.unit)
    (left, right), bottom = lanes.course, lanes.height - lanes.top - lanes.lane * len(EMOTIONS)
    axes = figure.add_axes(
        (
            left / lanes.width,
            bottom / lanes.height,
            (right - left) / lanes.width,
            lanes.lane * len(EMOTIONS) / lanes.height,
        )
    )
    size = -(-len(probabilities) // (right - left))  # frames of a column of pixels
    edges = np.append(edges[:-1:size], edges[-1])
    means = np.stack([thin(column, size) for column in probabilities.T])  # (K, chunks)
    seen = np.isfinite(means[0])
    likeliest = np.nan_to_num(means).argmax(0)
    for k in range(len(EMOTIONS)):
        for colour, alpha, mine in ((ACCENT, 1.0, likeliest == k), (MUTED, 0.5, likeliest != k)):
            height = np.where(mine & seen, k + 1 - 0.92 * means[k], np.nan)
            axes.stairs(height, edges, baseline=k + 1, fill=True, color=colour, alpha=alpha, linewidth=0)
    axes.hlines(np.arange(len(EMOTIONS)) + 1, edges[0], edges[-1], color=GRID, linewidth=0.7, zorder=0.5)
    per_px = (edges[-1] - edges[0]) / (right - left)
    for first, end in _runs(~seen):
        axes.axvspan(edges[first], edges[end], color=GRID, alpha=0.7, linewidth=0, zorder=0.4)
        if (edges[end] - edges[first]) / per_px > lanes.px(60):
            middle = (edges[first] + edges[end]) / 2, len(EMOTIONS) / 2
            axes.text(*middle, "no face", ha="center", va="center", color=MUTED)
    long = edges[-1] - edges[0]
    most = max(2, (right - left) / lanes.px(60))
    tick = next((t for t in TICKS_S if long / t <= most), TICKS_S[-1])
    at = np.arange(0, long + 1e-9, tick)
    clock = [f"{int(t) // 60}:{int(t) % 60:02d}" for t in at] if long >= 60 else [f"{t:g}" for t in at.round(1)]
    axes.set_xticks(edges[0] + at, clock)
    axes.set_xlabel("minutes" if long >= 60 else "seconds", labelpad=1)
    axes.set_yticks(np.arange(len(EMOTIONS)) + 0.5, EMOTIONS, color=INK)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(len(EMOTIONS), 0))
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.text(lanes.bar[0] / lanes.width, 1 - 0.55 * lanes.top / lanes.height, bars, color=MUTED, va="center")
    return figure


def _runs(mask: Bool[np.ndarray, " N"]) -> list[tuple[int, int]]:
    """Where it is true: (first, one after the last)."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def pixels(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """The figure on white, at its own size."""
    figure.set_facecolor("white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3].copy()


def inline_svg(figure: Figure, name: str) -> str:
    """SVG to stand in a page: its colours and font are the page's, its ids its own among all figures."""
    text = io.StringIO()
    undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=undated)
    code = text.getvalue()
    code = code[code.index("<svg") :]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', code))
    code = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", code)
    code = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", code)
    code = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", code)
    head, rest = code.split(">", 1)  # the size is the page's too: only the view box stays
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    code = f"{head}>{rest}"
    for variable, colour in COLOURS.items():
        code = code.replace(colour, f"var(--{variable})")
    return code


def picture(figure: Figure, kind: str) -> bytes:
    """The content of an .svg or .png file, on white."""
    content = io.BytesIO()
    undated = {"Date": None} if kind == "svg" else {}
    figure.savefig(content, format=kind, dpi=200, facecolor="white", metadata=undated)
    return content.getvalue()
