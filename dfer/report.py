"""A run as one page: figures and HTML from its records, and what its model makes of a few clips.

The page is one file without scripts, and nothing in it is loaded from elsewhere: its Content-Security-Policy forbids
both. Figures are drawn once, in COLOURS; in the page (report.html) those are variables with a light and a dark value.
"""

import base64
import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from dfer.annotations import EMOTIONS
from dfer.checkpoint import load_checkpoint, write_whole
from dfer.commandline import shown
from dfer.config import config_from_json
from dfer.crf import SIGMA_APPEARANCE, SIGMA_SMOOTHNESS, STATES_PER_CLASS, MeanFieldCRF
from dfer.distributed import World
from dfer.index import load_index
from dfer.optim import build_ema
from dfer.records import Predictions, Run, bootstrap, choose, interval, same_clips, wilson
from dfer.sampling import IMAGENET_MEAN, IMAGENET_STD

COLOURS = {"ink": "#20262e", "muted": "#66717e", "grid": "#dde2e8", "accent": "#d9480f", "second": "#0c8599"}
INK, MUTED, GRID, ACCENT, SECOND = COLOURS.values()
STYLE = {
    "svg.hashsalt": "dfer",  # the same records give the same bytes
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
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
MAX_POINTS = 300  # of a curve; more rows than that are averaged
NUM_FRAMES, TILE = 8, 96  # frames of a clip that are shown, and their size in pixels


# ---- What the model shows


class Clip(NamedTuple):
    row: int  # of predictions.csv
    frames: UInt8[np.ndarray, "T H W 3"]
    maps: Float[np.ndarray, "T K h w"] | None  # of the fine level
    course: Float[np.ndarray, "T K"] | None  # the share of each emotion in a frame's cells, background left out


class Look(NamedTuple):
    notes: list[str]
    clips: list[Clip]
    stride: int = 1  # pixels between two cells of the maps
    crf: MeanFieldCRF | None = None
    energies: Float[np.ndarray, "C I"] | None = None  # of each clip before each iteration, nats per token


@torch.inference_mode()
def look(run: Run, num_clips: int, build_loader: Callable[..., Any], build_model: Callable[..., nn.Module]) -> Look:
    """Load the run's newest checkpoint and up to `num_clips` right and as many wrong clips, on the CPU in float32.

    `build_loader` and `build_model` are train.py's. What cannot be had is noted.
    """
    try:
        state = load_checkpoint(run.path)
        config = config_from_json(state["config"], run.path)
        data = dataclasses.replace(config.data, batch_size=1, cache="off", views=1, mirror_views=False)
        settings = dataclasses.replace(config.model, weights=None, crf_backend="auto")
        config = dataclasses.replace(config, data=data, model=settings)
        model = build_model(settings, data.num_segments * data.frames_per_segment)
    except ValueError as error:
        return Look([f"nothing about the CRF, and no gallery: {error}"], [])
    if state["ema"] is not None:
        averaged = build_ema(model, config.optim.ema)
        averaged.load_state_dict(state["ema"])
        model = averaged.module
    else:
        model.load_state_dict(state["model"])
    model.eval()
    notes, crf = [], getattr(model, "crf", None)
    steps, _ = run.series("val/WAR")
    if len(steps) and state["step"] != steps[-1]:
        notes.append(
            f"the weights shown are those of step {state['step']}, the predictions those of step {steps[-1]:g}"
        )
    if not isinstance(crf, MeanFieldCRF):
        what = f"its CRF ({settings.crf}) has no labels" if crf is not None else f"{settings.name} has no CRF"
        notes.append(f"no emotion maps, no course, no compatibility: {what}; --model.crf meanfield has")
        crf = None
    if num_clips == 0 or run.predictions is None:
        return Look(notes, [], crf=crf)

    found, levels = [], []
    try:
        index = load_index(data.val_list, data.root, data.source)
        rows = {record.name: row for row, record in enumerate(index.records)}
        loader = build_loader(config, index, "eval", World(0, 1, 0, 1, torch.device("cpu")))
        if crf is not None:
            crf.register_forward_pre_hook(lambda _, inputs: levels.append(inputs[0]))
        for right in (False, True):
            for row in choose(run.predictions, right, num_clips):
                name = run.predictions.clips[row]
                if name not in rows:
                    raise ValueError(f"{data.val_list}: clip {name} is not in it any more")
                clip = next(loader(0, rows[name])).clips  # of one clip per batch, in the order of the list
                pixels = clip[0].permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN
                frames = (255 * pixels).round().clip(0, 255).astype(np.uint8)
                maps, course = None, None
                if crf is not None:
                    parts = model.emotion_maps(clip)
                    in_frame = sum(part[0].sum((2, 3)) for part in parts)  # (T, K)
                    maps, course = parts[0][0].numpy(), (in_frame / in_frame.sum(1, keepdim=True)).numpy()
                found.append(Clip(row, frames, maps, course))
    except ValueError as error:
        notes.append(f"no gallery: {error}")
        return Look(notes, [], crf=crf)
    energies = None
    if crf is not None and crf.iterations:
        trained, energies = crf.iterations, []
        for clip_levels in levels[: len(found)]:  # the calls below append to it
            energies.append([])
            for crf.iterations in range(1, max(2 * trained, 6) + 2):  # "free_energy" is that before the last one
                energies[-1].append(crf(clip_levels)[1].diagnostics["crf/free_energy"].item())
        crf.iterations = trained
    stride = model.backbone.strides[0]
    return Look(notes, found, stride, crf, None if energies is None else np.array(energies))


# ---- Figures


def _panel(xlabel: str = "", ylabel: str = "", width: float = 4.0, height: float = 2.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def thin(*columns: Float64[np.ndarray, " R"]) -> list[Float64[np.ndarray, " P"]]:
    """At most MAX_POINTS points: means of as many rows each, of those that are not nan."""
    size = -(-len(columns[0]) // MAX_POINTS) or 1
    starts = range(0, len(columns[0]), size)
    chunks = [[column[s : s + size] for s in starts] for column in columns]
    means = [[np.nanmean(c) if np.isfinite(c).any() else math.nan for c in column] for column in chunks]
    return [np.array(column, dtype=np.float64) for column in means]


def curves(run: Run, keys: dict[str, tuple[str, str]], ylabel: str = "", log: bool = False, scale: float = 1) -> Any:
    """Figure of rows over steps; key -> (name, colour). Why not, where there is nothing to draw."""
    figure, axes = _panel("step", ylabel)
    drawn = False
    for key, (name, colour) in keys.items():
        steps, values = thin(*run.series(key))
        if not np.isfinite(values).any():
            continue
        drawn = True
        few = np.isfinite(values).sum() <= 40
        axes.plot(steps, scale * values, color=colour, label=name, marker="o" if few else None, markersize=2.5)
    if not drawn:
        return f"metrics.jsonl holds no finite value of {' or '.join(keys)}"
    if log and all((line.get_ydata()[np.isfinite(line.get_ydata())] > 0).all() for line in axes.lines):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    if len(keys) > 1:
        axes.legend(loc="best", handlelength=1.2)
    return figure


def heat(
    axes: Axes,
    values: Float64[np.ndarray, "R C"],
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Cells whose opacity is |value| as a share of the largest, so that they look right on light and on dark."""
    height, width = values.shape
    peak = max(np.nanmax(np.abs(values), initial=0), 1e-9)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 0.96 + 0.02
    cells = [(r, c) for r in range(height) for c in range(width) if np.isfinite(values[r, c])]
    colours = [(ACCENT if values[cell] >= 0 else SECOND, float(abs(values[cell]) / peak)) for cell in cells]
    axes.add_collection(PolyCollection([corners + (c, r) for r, c in cells], facecolors=colours, linewidths=0))
    for (r, c), (_, alpha) in zip(cells, colours, strict=True) if texts is not None else ():
        colour = "#ffffff" if alpha > 0.6 else INK
        axes.text(c + 0.5, r + 0.5, texts[r][c], ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_yticks(np.arange(height) + 0.5, rows, color=INK)
    if columns:
        axes.set_xticks(np.arange(width) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor", color=INK)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def confusion_figure(counts: Int64[np.ndarray, "K K"], normalised: bool) -> Figure:
    with np.errstate(invalid="ignore"):
        shares = 100 * counts / counts.sum(1, keepdims=True)
    # A class without clips has no row of shares: its cells stay empty.
    texts = [[f"{v:.0f}" if np.isfinite(v) else "" for v in row] for row in (shares if normalised else counts)]
    figure, axes = _panel("predicted", "label", height=3.5)
    heat(axes, shares if normalised else counts.astype(np.float64), EMOTIONS, EMOTIONS, texts)
    return figure


def recall_figure(counts: Int64[np.ndarray, "K K"]) -> Figure:
    figure, axes = _panel("recall, %", height=3.5)
    for row, (right, total) in enumerate(zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)):
        if total:
            axes.plot(wilson(right, total), [row, row], color=ACCENT, alpha=0.45, linewidth=5, solid_capstyle="butt")
            axes.plot(100 * right / total, row, "o", color=ACCENT, markersize=5)
    ticks = [f"{emotion} ({total})" for emotion, total in zip(EMOTIONS, counts.sum(1).tolist(), strict=True)]
    axes.set_yticks(range(len(EMOTIONS)), ticks, color=INK)
    axes.set(xlim=(0, 100), ylim=(len(EMOTIONS) - 0.5, -0.5))
    return figure


def recall_course_figure(run: Run) -> Figure | str:
    steps, _ = run.series("val/WAR")
    if not len(steps):
        return "no epoch is evaluated yet"
    by_step = [dict(zip(*(c.tolist() for c in run.series(f"val/recall/{e}")), strict=True)) for e in EMOTIONS]
    recalls = [thin(np.array([of_class.get(step, math.nan) for step in steps]))[0] for of_class in by_step]
    figure, axes = _panel("evaluation, the first on the left")
    heat(axes, np.array(recalls), EMOTIONS, [])
    return figure


def compatibility_figure(matrix: Float[np.ndarray, "C C"]) -> Figure:
    names = [*EMOTIONS, "Background"]
    figure, axes = _panel(height=3.5)
    heat(axes, matrix.astype(np.float64), names, names, [[f"{v:.2f}" for v in row] for row in matrix])
    return figure


def widths_figure(crf: MeanFieldCRF) -> Figure:
    figure, axes = _panel("width (sigma), logarithmic", height=2.9)
    kernels = {"appearance": ("log_sigma_appearance", SIGMA_APPEARANCE)}
    kernels |= {"smoothness": ("log_sigma_smoothness", SIGMA_SMOOTHNESS)}
    rows = []
    for kernel, (name, start) in kernels.items():
        if not hasattr(crf, name):
            continue
        now = getattr(crf, name).exp().tolist()
        for axis, begun, learned in zip(("frames", "height", "width", "level"), start, now, strict=True):
            axes.plot([begun, learned], [len(rows)] * 2, color=ACCENT, alpha=0.45, linewidth=3)
            axes.plot(begun, len(rows), "o", color=MUTED, markersize=5, markerfacecolor="none")
            axes.plot(learned, len(rows), "o", color=ACCENT, markersize=5)
            rows.append(f"{kernel}: {axis}  {learned:.2f}")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), rows, color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def energy_figure(energies: Float[np.ndarray, "C I"], trained: int) -> Figure:
    figure, axes = _panel("iterations done", "nats per token")
    fallen = energies - energies[:, :1]
    axes.plot(fallen.T, color=MUTED, alpha=0.4, linewidth=0.8)
    axes.plot(fallen.mean(0), color=ACCENT, marker="o", markersize=3)
    axes.axvline(trained, color=SECOND, linestyle="--", linewidth=1)
    return figure


def course_figure(clip: Clip, predicted: int, label: int) -> Figure:
    figure, axes = _panel("frame of the clip", "share", height=1.5, width=5.4)
    at = np.arange(1, len(clip.course) + 1)
    for k in sorted(range(len(EMOTIONS)), key=lambda k: (k in (predicted, label), k == predicted)):
        colour = ACCENT if k == predicted else SECOND if k == label else MUTED
        axes.plot(at, clip.course[:, k], color=colour, linewidth=2 if k in (predicted, label) else 0.8)
        axes.annotate(EMOTIONS[k], (at[-1], clip.course[-1, k]), (3, -3), textcoords="offset points", color=colour,
                      fontsize=7) if k in (predicted, label) else None  # fmt: skip
    axes.set_ylim(bottom=0)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Inline SVG: colours and font are the page's, and ids are its own among all figures."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    code = text.getvalue()
    code = code[code.index("<svg") :]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', code))
    code = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", code)
    code = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", code)
    code = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", code)
    code = re.sub(r'(<svg[^>]*?) height="[^"]*"| width="[0-9.]+pt"', r"\1", code, count=2)
    for variable, colour in COLOURS.items():
        code = code.replace(colour, f"var(--{variable})")
    return code.replace("<svg ", '<svg role="img" ', 1)


def strip(clip: Clip, stride: int, layers: Sequence[tuple[int, str]]) -> tuple[str, list[float]]:
    """HTML of frames with, below each, one picture per layer (class, colour); and the value that has full colour."""
    num_frames, size = len(clip.frames), clip.frames.shape[1]
    peaks = [float(clip.maps[:, k].max()) for k, _ in layers]
    # Cell c lies on pixel c * stride (dfer/crf.py::cell_positions); beyond the last one its value goes on.
    weights = clip.maps is not None and np.stack(
        [np.interp(np.arange(size) / stride, np.arange(clip.maps.shape[2]), row) for row in np.eye(clip.maps.shape[2])]
    )
    cells = []
    for t in np.unique(np.linspace(0, num_frames - 1, min(num_frames, NUM_FRAMES)).round().astype(int)):
        tiles = [clip.frames[t]]
        grey = clip.frames[t].mean(-1, keepdims=True)
        for (k, colour), peak in zip(layers, peaks, strict=True):
            share = 0.8 * (weights.T @ clip.maps[t, k] @ weights)[..., None] / max(peak, 1e-9)
            rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
            tiles.append((grey * (1 - share) + rgb * share).astype(np.uint8))
        picture = Image.fromarray(np.concatenate(tiles)).resize((TILE, TILE * len(tiles)), Image.Resampling.BICUBIC)
        content = io.BytesIO()
        picture.save(content, format="JPEG", quality=82)
        uri = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
        cells.append(f'<figure><img src="{uri}" alt="frame {t + 1}"><figcaption>{t + 1}</figcaption></figure>')
    return f'<div class="strip">{"".join(cells)}</div>', peaks


# ---- Page


class Card(NamedTuple):
    name: str  # of the figure's file
    title: str
    content: Figure | str  # or why there is none
    caption: str


def _card(card: Card) -> str:
    if isinstance(card.content, str):
        return f'<div class="card"><h3>{card.title}</h3><p class="missing">Not drawn: {escape(card.content)}.</p></div>'
    drawing = svg(card.content, card.name).replace("<svg ", f'<svg aria-label="{card.title}" ', 1)
    return f'<div class="card"><h3>{card.title}</h3>{drawing}<p class="caption">{card.caption}</p></div>'


def _section(title: str, lead: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p>{content}</section>'


def _grid(cards: Sequence[str], wide: bool = False) -> str:
    return f'<div class="grid{" wide" * wide}">{"".join(cards)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """The cells are HTML."""
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{lines}</tbody></table></div>'


def _range(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{low:.1f} to {high:.1f}"


def training_cards(run: Run) -> list[Card]:
    averaged = "" if len(run.rows) <= MAX_POINTS else " Long curves are means of neighbouring rows."
    war_uar = {"val/WAR": ("WAR", INK), "val/UAR": ("UAR", ACCENT)}
    loss = {"train/loss": ("training", MUTED), "val/loss": ("evaluation", ACCENT)}
    rate = {"throughput/compute_clips_per_s": ("computing alone", MUTED)}
    rate |= {"throughput/total_clips_per_s": ("with the wait for data", ACCENT)}
    wait = {"throughput/data_wait_share": ("wait", ACCENT)}
    return [
        Card("loss", "Loss", curves(run, loss),
             "Training: the objective, with label smoothing and the CRF's own term. Evaluation: plain cross-entropy, so "
             f"the two differ even without overfitting; watch whether one rises while the other falls.{averaged}"),
        Card("war_uar", "WAR and UAR, %", curves(run, war_uar),
             "WAR is accuracy; UAR is the mean of the classes' recalls. A gap between them: rare classes are missed."),
        Card("recalls", "Recall of each class over time", recall_course_figure(run),
             "The fuller the colour, the higher the recall; the fullest is the highest that any class has reached. "
             "A row that stays empty is a class that is never found."),
        Card("grad_norm", "Norm of the gradient", curves(run, {"train/grad_norm": ("norm", ACCENT)}, log=True),
             "Before clipping, logarithmic. Peaks come from single steps; a steady climb calls for a lower rate."),
        Card("lr", "Learning rate", curves(run, {"train/lr": ("rate", ACCENT)}), "Warm-up, then half a cosine."),
        Card("throughput", "Clips per second", curves(run, rate),
             "Where the two lines part, training waits for data."),
        Card("data_wait", "Waiting for data, % of the time", curves(run, wait, scale=100),
             "The first row includes the start of the loader. More than a few percent later on: docs/speed.md."),
    ]  # fmt: skip


def prediction_cards(predictions: Predictions | None) -> list[Card]:
    if predictions is None:
        return []
    counts = predictions.confusion().counts.numpy()
    wrong = counts * (1 - np.eye(len(EMOTIONS), dtype=np.int64))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:3]
    worst = [(wrong[at], *at) for at in (np.unravel_index(p, wrong.shape) for p in pairs) if wrong[at]]
    most = "; ".join(
        f"{EMOTIONS[label]} taken for {EMOTIONS[taken]}: {n} of {counts[label].sum()}" for n, label, taken in worst
    )
    return [
        Card("confusion", "Confusion matrix, clips", confusion_figure(counts, False),
             f"Rows are what the clips are, columns what they were taken for. Most frequent: {most or 'none is wrong'}."),
        Card("confusion_normalised", "Confusion matrix, % of each row", confusion_figure(counts, True),
             "The diagonal is the recall of each class; a full column off the diagonal is a class that others end in."),
        Card("recall", "Recall of each class", recall_figure(counts),
             "Dot: recall; bar: 95 % confidence interval (Wilson); in brackets the number of clips. Where two bars "
             "overlap widely, the clips do not tell which class is recognised better."),
    ]  # fmt: skip


def crf_cards(run: Run, seen: Look) -> list[Card]:
    coupling = {"crf/coupling": ("coupling", ACCENT)}
    cards = [
        Card("coupling", "Coupling during training", curves(run, coupling),
             "How strongly cells pull at each other (of a Gaussian CRF: beta). Up to 2 a mean-field CRF has one optimum."),
        Card("entropy", "Entropy of the marginals, nats", curves(run, {"crf/entropy": ("entropy", ACCENT)}),
             f"How undecided the cells are: {math.log(STATES_PER_CLASS * (len(EMOTIONS) + 1)):.2f} is a toss-up among "
             "all states, 0 certainty."),
        Card("residual", "Change in the last iteration", curves(run, {"crf/residual": ("residual", ACCENT)}),
             "The largest change of any marginal. Small: the iterations are enough. Large: they stop on the way."),
    ]  # fmt: skip
    crf = seen.crf
    if crf is None:
        return cards
    if crf.iterations:
        blocks = crf.compatibility().detach().unflatten(2, (-1, STATES_PER_CLASS)).unflatten(1, (-1, STATES_PER_CLASS))
        shares = crf.max_coupling / 2 * crf.coupling_logit.detach().sigmoid()
        for kernel, matrix, share in zip(
            ("appearance", "smoothness"), blocks.mean((2, 4)), shares.tolist(), strict=True
        ):
            caption = (
                f"Orange: cells that the {kernel} kernel joins are rewarded for this pair of classes; teal: they are "
            )
            caption += f"punished. Means over the {STATES_PER_CLASS} x {STATES_PER_CLASS} states of each pair. "
            caption += f"This kernel's coupling is {share:.2f} of at most {crf.max_coupling / 2:g}."
            title = f"Compatibility of the classes, {kernel} kernel"
            cards.append(Card(f"compatibility_{kernel}", title, compatibility_figure(matrix.numpy()), caption))
    if hasattr(crf, "log_sigma_appearance"):
        caption = "How far each kernel reaches: frames of the clip; height and width as shares of the picture; level, "
        caption += "whose two values are 1 apart. Ring: at the start; dot: learned. Narrower than the distance between "
        caption += "neighbours means that they hardly hear each other along that axis."
        cards.append(Card("widths", "Widths of the kernels", widths_figure(crf), caption))
    if seen.energies is not None:
        caption = (
            "What mean field minimises, less its value at the start; a thin line for each clip of the gallery, the "
        )
        caption += (
            f"thick one is their mean. It may never rise. Dashed: the {crf.iterations} iterations of this model; "
        )
        caption += "what falls beyond them is what more would bring."
        figure = energy_figure(seen.energies, crf.iterations)
        cards.append(Card("free_energy", "Free energy per iteration", figure, caption))
    return cards


def comparison(run: Run, others: Sequence[Run]) -> str:
    """A table of the other runs against this one, on the same draws of clips."""
    mine, rows, notes = run.predictions, [], []
    for other in (run, *others):
        if other.predictions is None:
            notes.append(f"{other.name}: no predictions, so no row")
            continue
        confusion = other.predictions.confusion()
        cells = [escape(other.name), str(confusion.total()), f"{confusion.war():.2f}", f"{confusion.uar():.2f}"]
        order = None if other is run or mine is None else same_clips(mine, other.predictions)
        if order is None:
            if other is not run:
                notes.append(f"{other.name}: evaluated on other clips than {run.name}, so not compared clip by clip")
            rows.append([*cells, "", ""])
            continue
        theirs = (other.predictions.labels == other.predictions.predicted)[order]
        samples = bootstrap(mine.labels, np.column_stack([mine.labels == mine.predicted, theirs]))
        for now, drawn in zip((confusion.war(), confusion.uar()), samples, strict=True):
            before = mine.confusion().war() if drawn is samples[0] else mine.confusion().uar()
            low, high = interval(drawn[:, 1] - drawn[:, 0])
            text = f"{now - before:+.2f} ({low:+.2f} to {high:+.2f})"
            cells.append(f'<span class="beyond">{text}</span>' if low > 0 or high < 0 else text)
        rows.append(cells)
    lead = (
        f"Differences are a run's value less that of {escape(run.name)}, in percentage points, with the 95 % interval "
    )
    lead += (
        "of a paired bootstrap over the clips. In orange where it leaves out 0: more than the choice of test clips. "
    )
    lead += "Another seed moves the values too, which this cannot see."
    table = _table(["run", "clips", "WAR", "UAR", "WAR, difference", "UAR, difference"], rows)
    remarks = "".join(f'<p class="caption">{escape(note)}.</p>' for note in notes)
    return _section("Compared", lead, f'<div class="card">{table}{remarks}</div>')


def _clip_card(number: int, clip: Clip, predictions: Predictions, stride: int) -> str:
    predicted, label = int(predictions.predicted[clip.row]), int(predictions.labels[clip.row])
    layers = [] if clip.maps is None else list(dict.fromkeys([(predicted, ACCENT), (label, SECOND)]))
    layers = layers[: 1 + (predicted != label)]
    pictures, peaks = strip(clip, stride, layers)
    p = predictions.probabilities[clip.row, predicted]
    verdict = f'taken for <span class="seen">{EMOTIONS[predicted]}</span> with {100 * p:.0f} %'
    if predicted != label:
        verdict += f', is <span class="label">{EMOTIONS[label]}</span>'
    text = f"<h3>{escape(shown(predictions.clips[clip.row]))}</h3><p>{verdict}</p>{pictures}"
    if clip.maps is not None:
        kinds = zip(layers, peaks, ("orange", "teal"), strict=False)
        scales = "; ".join(f"{EMOTIONS[k]} in {colour}, full colour is {peak:.2f}" for (k, _), peak, colour in kinds)
        drawing = svg(course_figure(clip, predicted, label), f"clip{number}")
        text += f'<p class="caption">Below each frame, where it is seen: {scales}.</p>{drawing}'
    return f'<article class="card clip">{text}</article>'


def gallery(run: Run, seen: Look) -> str:
    if not seen.clips:
        return ""
    lead = "<strong>These are faces of your data.</strong> The page lies on your disk only: nothing of it is uploaded, "
    lead += "also not to W&amp;B. Mind the data's licence before you pass it on; <code>scripts/report.py RUN --clips 0</code> "
    lead += "writes it without faces. Shown are the clips that the model is surest of, different confusions first. "
    if seen.crf is not None:
        lead += (
            "Maps: the CRF's marginal probability of an emotion at each cell of the fine level. Course: the share of "
        )
        lead += "each emotion in all cells of a frame, background left out; the gray lines are the other emotions."
    parts = []
    for title, right in (("Wrong", False), ("Right", True)):
        cards = [
            _clip_card(number, clip, run.predictions, seen.stride)
            for number, clip in enumerate(seen.clips)
            if (run.predictions.labels[clip.row] == run.predictions.predicted[clip.row]) == right
        ]
        parts.append(f"<h3>{title}</h3>" + (_grid(cards, wide=True) if cards else '<p class="missing">None.</p>'))
    return _section("Clips", lead, "".join(parts))


def tiles(run: Run) -> str:
    made = []
    if run.predictions is not None:
        confusion = run.predictions.confusion()
        right, total = int(confusion.counts.trace()), confusion.total()
        hits = (run.predictions.labels == run.predictions.predicted)[:, None]
        ranges = _range(*wilson(right, total)), _range(*interval(bootstrap(run.predictions.labels, hits)[1][:, 0]))
        made.append(
            ("main", f"{confusion.war():.2f}", f"WAR, %, last evaluation; {right} of {total} clips; 95 %: {ranges[0]}")
        )
        made.append(("main", f"{confusion.uar():.2f}", f"UAR, %, last evaluation; 95 % (bootstrap): {ranges[1]}"))
    for name in ("WAR", "UAR"):
        steps, values = run.series(f"val/{name}")
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            made.append(
                (
                    "",
                    f"{values[best]:.2f}",
                    f"best {name}, %: evaluation {best + 1} of {len(steps)}, picked on this list",
                )
            )
    _, rates = run.series("throughput/total_clips_per_s")
    _, waits = run.series("throughput/data_wait_share")
    if np.isfinite(rates).any():
        wait = f"{100 * np.nanmedian(waits):.1f} % of the time waiting for data" if np.isfinite(waits).any() else ""
        made.append(("", f"{np.nanmedian(rates):.1f}", f"clips/s in training (median of the rows); {wait}"))
    cards = [f'<div class="card tile {kind}"><b>{number}</b><span>{text}</span></div>' for kind, number, text in made]
    return f'<div class="tiles">{"".join(cards)}</div>' if cards else ""


def _settings(config: dict[str, Any], prefix: str = "--") -> list[list[str]]:
    rows = []
    for key, value in config.items():
        name = f"{prefix}{key}".replace("_", "-")
        rows += (
            _settings(value, f"{name}.") if isinstance(value, dict) else [[escape(shown(name)), escape(shown(value))]]
        )
    return rows


def page(run: Run, others: Sequence[Run], seen: Look) -> tuple[str, list[Card]]:
    """The HTML and the cards with its figures; `others` are compared with the run."""
    training, predicted, crf = training_cards(run), prediction_cards(run.predictions), crf_cards(run, seen)
    notes = [*run.notes, *seen.notes]
    _, skipped = run.series("train/skipped_steps")
    if len(skipped) and np.nanmax(skipped, initial=0):
        notes.append(f"{np.nanmax(skipped):g} steps were skipped, as their loss or gradient was not finite")
    empty = [card.title for card in (*training, *crf) if isinstance(card.content, str)]
    body = [tiles(run)]
    if notes:
        items = "".join(f"<li>{escape(shown(note))}</li>" for note in notes)
        body.append(f'<div class="notes"><strong>Missing, or to be known</strong><ul>{items}</ul></div>')
    if others:
        body.append(comparison(run, others))
    if predicted:
        counts = run.predictions.confusion().counts
        rows = [
            [e, str(total), str(right), f"{100 * right / total:.1f}" if total else "-", _range(*wilson(right, total))]
            for e, right, total in zip(EMOTIONS, counts.diag().tolist(), counts.sum(1).tolist(), strict=True)
        ]
        table = _table(["class", "clips", "right", "recall, %", "95 %"], rows)
        cards = [*map(_card, predicted), f'<div class="card"><h3>In numbers</h3>{table}</div>']
        body.append(_section("What is recognised", "On predictions.csv: every clip counts once.", _grid(cards)))
    lead = "Over optimizer steps, from metrics.jsonl; evaluations are where their epoch ended."
    body.append(_section("Training", lead, _grid([_card(card) for card in training])))
    if len(empty) < len(training) + len(crf) and any(not isinstance(card.content, str) for card in crf):
        lead = "Every cell of every frame has beliefs about the emotion and hears all other cells of the clip (docs/crf.md)."
        body.append(_section("What the CRF did", lead, _grid([_card(card) for card in crf])))
    body.append(gallery(run, seen))
    settings = _table([], _settings(run.config), "settings")
    body.append(
        f'<h2>Settings</h2><details><summary>all flags of this run</summary><div class="card">{settings}</div></details>'
    )
    epochs = len(run.series("val/WAR")[0])
    planned = run.config.get("optim", {}).get("epochs", "?") if isinstance(run.config.get("optim"), dict) else "?"
    text = Template((Path(__file__).with_suffix(".html")).read_text(encoding="utf-8")).substitute(
        title=escape(run.name),
        lead=escape(
            shown(
                f"{run.config.get('preset', 'a run')}, {epochs} of {planned} epochs evaluated, seed {run.config.get('seed', '?')}"
            )
        ),
        body="\n".join(body),
        footer="Written by scripts/report.py from the files beside it. It loads nothing and sends nothing.",
    )
    return text, [*training, *predicted, *crf]


def write_report(
    run: Run,
    build_loader: Callable[..., Any],
    build_model: Callable[..., nn.Module],
    others: Sequence[Run] = (),
    num_clips: int = 6,
    figures: Path | None = None,
) -> Path:
    """Write report.html into the run's folder, and its figures as .svg and .png into a folder if one is given.

    Raises:
        ValueError: in one line, if it cannot be written.
    """
    seen = look(run, num_clips, build_loader, build_model)
    with matplotlib.rc_context(STYLE):
        text, cards = page(run, others, seen)
        path = run.path / "report.html"
        try:
            write_whole(path, lambda file: file.write(text.encode()))
            if figures is not None:
                figures.mkdir(parents=True, exist_ok=True)
            for card in cards if figures is not None else ():
                for kind in ("svg", "png") if isinstance(card.content, Figure) else ():
                    content = io.BytesIO()
                    dated = {"Date": None} if kind == "svg" else {}
                    card.content.savefig(content, format=kind, dpi=200, facecolor="white", metadata=dated)
                    write_whole(figures / f"{card.name}.{kind}", lambda file, c=content: file.write(c.getvalue()))
        except OSError as error:
            raise ValueError(f"{error.filename or path}: cannot write the report ({error.strerror})") from None
    return path
