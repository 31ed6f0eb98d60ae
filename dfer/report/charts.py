"""Draw the charts of a run and of a cross-validation: each function returns a figure, or why there is none."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64

from dfer.lists.annotations import EMOTIONS
from dfer.report.figures import (
    ACCENT,
    INK,
    MUTED,
    SECOND,
    Axes,
    Figure,
    heat_map,
    hover,
    integer_ticks,
    log_ticks,
    panel,
    thin,
)
from dfer.report.records import Run
from dfer.report.statistics import Calibration, wilson

Named = dict[str, tuple[str, str]]  # key of metrics.jsonl -> name, colour


def _draw_curves(axes: Axes, run: Run, named: Named, scale: int | float = 1) -> None:
    for key, (name, colour) in named.items():
        steps, values = (thin(column) for column in run.series(key))
        if np.isfinite(values).any():
            marker = "o" if np.isfinite(values).sum() <= 40 else None
            axes.plot(steps, scale * values, color=colour, label=name, marker=marker, markersize=2.5)
            points = zip(steps.tolist(), (scale * values).tolist(), strict=True)
            hover(axes, [(s, v, f"{name}, step {s:.0f}: {v:.4g}") for s, v in points if math.isfinite(v)])
    integer_ticks(axes.xaxis, few=True)
    if len(named) > 1:
        axes.legend(handlelength=1.2)


def _reason_missing(run: Run, named: Named) -> str | None:
    if not any(np.isfinite(run.series(key)[1]).any() for key in named):
        return f"metrics.jsonl holds no finite value of {' or '.join(named)}"
    return None


def curves_chart(run: Run, named: Named, log: bool = False) -> Figure | str:
    """Draw values over steps."""
    why_not = _reason_missing(run, named)
    if why_not:
        return why_not
    figure, axes = panel("step", left=0.14)
    _draw_curves(axes, run, named)
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    lowest, highest = np.nanmin(drawn), np.nanmax(drawn)
    if log and lowest > 0:
        axes.set_yscale("log", subs=[])
        log_ticks(axes.yaxis)
    else:
        axes.set_ylim(1.08 * min(lowest, 0), 1.08 * max(highest, 0) or 1)
    return figure


def throughput_chart(run: Run, rates: Named, waits: Named) -> Figure | str:
    """Draw clips/s, and below it the share of the time spent waiting, in percent."""
    why_not = _reason_missing(run, rates)
    if why_not:
        return why_not
    figure, lower = panel("step", left=0.14)
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


def confusion_chart(counts: Int64[np.ndarray, "K K"] | Float64[np.ndarray, "K K"], normalised: bool) -> Figure:
    """Draw labels as rows, predictions as columns; `normalised`: in percent of a row, which is empty without clips."""
    values = counts.astype(np.float64)
    if normalised:
        with np.errstate(invalid="ignore"):
            values = 100 * values / values.sum(1, keepdims=True)
    figure, axes = panel("predicted", height=3.6, left=0.21, bottom=0.85)
    texts = [[f"{v:.0f}" if np.isfinite(v) else "" for v in row] for row in values]
    hovers = [
        [
            f"{label} taken for {taken}: {n:.0f} of {row.sum():.0f}"
            for taken, n in zip(EMOTIONS, row.tolist(), strict=True)
        ]
        for label, row in zip(EMOTIONS, counts, strict=True)
    ]
    heat_map(axes, values, 100 if normalised else max(values.max(), 1), EMOTIONS, EMOTIONS, texts, hovers)
    axes.set_ylabel("label")
    return figure


def recall_chart(counts: Int64[np.ndarray, "K K"] | Float64[np.ndarray, "K K"]) -> Figure:
    """Draw the recall of each class, in percent, with its interval. Counts may be means of runs on the same clips."""
    figure, axes = panel("recall, %", height=3.0, left=0.28)
    totals = [round(total) for total in counts.sum(1).tolist()]
    for row, (right, total) in enumerate(zip(counts.diagonal().tolist(), totals, strict=True)):
        if total:
            low, high = wilson(right, total)
            axes.plot((low, high), [row, row], color=ACCENT, alpha=0.45, linewidth=5, solid_capstyle="butt")
            axes.plot(100 * right / total, row, "o", color=ACCENT, markersize=5, clip_on=False)
            said = f"{EMOTIONS[row]}: {right:.0f} of {total}, {100 * right / total:.1f} % ({low:.1f} to {high:.1f})"
            hover(axes, [(100 * right / total, row, said)])
    ticks = [f"{emotion} ({total})" for emotion, total in zip(EMOTIONS, totals, strict=True)]
    axes.set_yticks(range(len(EMOTIONS)), ticks, color=INK)
    axes.set(xlim=(0, 100), ylim=(len(EMOTIONS) - 0.5, -0.5))
    return figure


def reliability_chart(found: Calibration) -> Figure:
    """Draw how often predictions of each confidence are right, in percent, and below how many clips there are."""
    figure, lower = panel("confidence, %", height=3.6, left=0.14)
    box = lower.get_position()
    lower.set_position((box.x0, box.y0, box.width, 0.2 * box.height))
    axes = figure.add_axes((box.x0, box.y0 + 0.28 * box.height, box.width, 0.72 * box.height))
    axes.tick_params(labelbottom=False)
    axes.plot((0, 100), (0, 100), color=MUTED, linestyle="--", linewidth=1)
    edges = np.linspace(0, 100, len(found.clips) + 1)
    lower.bar(edges[:-1], found.clips, np.diff(edges) * 0.9, align="edge", color=MUTED)
    for clips, right, confidence in zip(*(column.tolist() for column in found), strict=True):
        if clips:
            x, y, (low, high) = 100 * confidence, 100 * right / clips, wilson(right, clips)
            axes.plot((x, x), (low, high), color=ACCENT, alpha=0.45, linewidth=4, solid_capstyle="butt")
            axes.plot(x, y, "o", color=ACCENT, markersize=5, clip_on=False)
            said = f"{clips} clips of {x:.0f} % confidence: {right} right, {y:.0f} % ({low:.0f} to {high:.0f})"
            hover(axes, [(x, y, said)])
    for each in (axes, lower):
        each.set_xlim(0, 100)
    axes.set(ylim=(0, 100), ylabel="right, %")
    integer_ticks(lower.yaxis, few=True, most=2)
    lower.set_ylabel("clips")
    return figure


def recalls_chart(run: Run) -> Figure | str:
    """Draw the recall of each class at each evaluation."""
    steps, _ = run.series("val/WAR")
    if not len(steps):
        return "no epoch is evaluated yet"
    by_step = [dict(zip(*(c.tolist() for c in run.series(f"val/recall/{e}")), strict=True)) for e in EMOTIONS]
    recalls = np.array([thin(np.array([recall.get(step, math.nan) for step in steps])) for recall in by_step])
    figure, axes = panel("evaluation", left=0.18)
    hovers = [
        [f"{e}, evaluation {n}: {r:.1f} %" for n, r in enumerate(row, 1)]
        for e, row in zip(EMOTIONS, recalls.tolist(), strict=True)
    ]
    heat_map(axes, recalls, 100, EMOTIONS, hovers=hovers if recalls.shape[1] == len(steps) else ())
    axes.set_xticks([0.5, recalls.shape[1] - 0.5][: len(steps)], ["1", str(len(steps))][: len(steps)])
    return figure


def folds_chart(runs: Sequence[Run], key: str) -> Figure | str:
    """Draw a value at each evaluation: thin for each run, thick for their mean."""
    curves = [run.series(key)[1] for run in runs]
    if len({len(curve) for curve in curves}) > 1 or not len(curves[0]):
        return f"the runs do not all hold {key} of the same number of evaluations"
    figure, axes = panel("evaluation", left=0.14)
    mean = np.mean(curves, axis=0)
    for curve, colour, width in (*((c, MUTED, 0.8) for c in curves), (mean, ACCENT, 2)):
        values = thin(curve)
        at = np.linspace(1, len(curve), len(values)) if len(values) > 1 else [1]
        axes.plot(at, values, color=colour, linewidth=width, marker="o" if len(curve) <= 40 else None, markersize=2.5)
    integer_ticks(axes.xaxis, few=True)
    axes.set(xlim=(0.5, len(mean) + 0.5), ylim=(0, max(1.08 * float(np.nanmax(curves)), 1)))
    return figure


def compatibility_chart(matrix: Float[np.ndarray, "C C"]) -> Figure:
    """Draw the matrix of the classes and of the background, which is the last."""
    names = [*EMOTIONS, "Background"]
    figure, axes = panel(height=3.6, left=0.23, bottom=0.85)
    texts = [[f"{v:.2f}".replace("-0.00", "0.00") for v in row] for row in matrix]
    heat_map(axes, matrix.astype(np.float64), max(float(np.abs(matrix).max()), 1e-9), names, names, texts)
    return figure


def widths_chart(widths: Sequence[tuple[str, float, float]]) -> Figure:
    """Draw rows of (name, at the start, learned) on a logarithmic axis."""
    figure, axes = panel("width (sigma)", height=3.6, left=0.42)
    for row, (_, start, learned) in enumerate(widths):
        axes.plot([start, learned], [row, row], color=ACCENT, alpha=0.45, linewidth=3)
        axes.plot(start, row, "o", color=MUTED, markersize=7, markerfacecolor="none")
        axes.plot(learned, row, "o", color=ACCENT, markersize=4)
    axes.set_xscale("log", subs=[])
    log_ticks(axes.xaxis)
    axes.set_yticks(range(len(widths)), [f"{name}  {learned:.2f}" for name, _, learned in widths], color=INK)
    axes.set_ylim(len(widths) - 0.5, -0.5)
    return figure


def energy_chart(energies: Float64[np.ndarray, " I"], trained: int) -> Figure:
    """Draw the free energy after 0, 1, ... iterations, less the first, and a line at the `trained` iterations."""
    figure, axes = panel("iterations done", left=0.14)
    integer_ticks(axes.xaxis)
    axes.plot(energies - energies[0], color=ACCENT, marker="o", markersize=3)
    axes.axvline(trained, color=SECOND, linestyle="--", linewidth=1)
    return figure


def shares_chart(shares: Float[np.ndarray, "T K"], predicted: int, label: int) -> Figure:
    """Draw the share of each emotion, frame by frame; the predicted one and the label stand out."""
    figure = Figure(figsize=(4.7, 1.5))
    axes = figure.add_axes((0.08, 0.29, 0.76, 0.66))
    frames = np.arange(1, len(shares) + 1)
    for k in sorted(range(len(EMOTIONS)), key=lambda k: (k in (predicted, label), k == predicted)):
        colour = ACCENT if k == predicted else SECOND if k == label else MUTED
        named = k in (predicted, label)
        axes.plot(frames, shares[:, k], color=colour, linewidth=2 if named else 0.8, alpha=1 if named else 0.6)
        if named:
            other = shares[-1, label if k == predicted else predicted]  # names do not lie on one another
            apart = 0 if abs(shares[-1, k] - other) > 0.2 * shares.max() or predicted == label else 5
            place = {"xytext": (4, -3 + math.copysign(apart, shares[-1, k] - other)), "textcoords": "offset points"}
            axes.annotate(EMOTIONS[k], (frames[-1], shares[-1, k]), color=colour, annotation_clip=False, **place)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("frame of the clip", labelpad=1)
    return figure
