"""Draw with matplotlib: the style of all figures, their building blocks, and SVG, PNG and pixels of them.

This is the one module that imports matplotlib. Colours are those of COLOURS only, so that a page can make variables of
them, with a light and a dark value; shades are opacity, which looks right on both.
"""

import contextlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.typing import RcKeyType

COLOURS = {
    "ink": "#20262e",
    "muted": "#66717e",
    "grid": "#dde2e8",
    "accent": "#c2410c",
    "second": "#0c8599",
    "on-accent": "#fffffe",  # not quite white, so that it is no other white
}
INK, MUTED, GRID, ACCENT, SECOND, ON_ACCENT = COLOURS.values()
STYLE: dict[RcKeyType, Any] = {
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
MAX_HOVERS = 120  # texts of a curve or a map
_HOVER, _BETWEEN = "hover: ", "|"  # the texts of marks travel as their id
Point = tuple[int | float, int | float, str]
MAX_POINTS = 300  # of a curve; more rows than that are averaged


def style() -> contextlib.AbstractContextManager[None]:
    """Return the context in which figures are drawn and written."""
    return matplotlib.rc_context(STYLE)


def panel(xlabel: str = "", height: float = 2.5, left: float = 0.11, bottom: float = 0.42) -> tuple[Figure, Axes]:
    """Return a figure of one plot, `height` inches high.

    Margins are given (left as a share, bottom in inches): matplotlib's own layout doubles the time to draw.
    """
    figure = Figure(figsize=(4.0, height))
    axes = figure.add_axes((left, bottom / height, 0.97 - left, 0.93 - bottom / height))
    axes.set_xlabel(xlabel)
    return figure, axes


def integer_ticks(axis: Axis, few: bool = False, most: int = 6) -> None:
    """Put ticks at whole numbers; with `few`, at `most` of them and at round ones."""
    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]) if few else MaxNLocator(integer=True))


def log_ticks(axis: Axis) -> None:
    """Put ticks at 0.1, 0.2, 0.5, 1 ...: matplotlib's own are powers of ten only, and in its formula language."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")


def thin(column: Float64[np.ndarray, " R"], size: int | None = None) -> Float64[np.ndarray, " P"]:
    """Return means of `size` rows each, leaving out nan; without `size`, of so many that MAX_POINTS remain at most."""
    size = size or -(-len(column) // MAX_POINTS) or 1
    chunks = [column[start : start + size] for start in range(0, len(column), size)]
    return np.array([np.nanmean(c) if np.isfinite(c).any() else math.nan for c in chunks], dtype=np.float64)


def heat_map(
    axes: Axes,
    values: Float64[np.ndarray, "R C"],
    peak: int | float,
    rows: Sequence[str],
    columns: Sequence[str] = (),
    texts: Sequence[Sequence[str]] | None = None,
    hovers: Sequence[Sequence[str]] = (),
) -> None:
    """Draw cells whose opacity is |value| / peak, in another colour below 0; nan stays empty.

    `texts` stand in the cells, `hovers` are said where somebody points at them.
    """
    height, width = values.shape
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 0.96 + 0.02
    cells = [(r, c) for r in range(height) for c in range(width) if np.isfinite(values[r, c])]
    colours = [(ACCENT if values[at] >= 0 else SECOND, min(float(abs(values[at])) / peak, 1.0)) for at in cells]
    squares = [corners + np.array([c, r]) for r, c in cells]
    axes.add_collection(PolyCollection(squares, facecolors=colours, linewidths=0))
    if texts is not None:
        for (r, c), (_, alpha) in zip(cells, colours, strict=True):
            ink = ON_ACCENT if alpha > 0.75 else INK
            axes.text(c + 0.5, r + 0.52, texts[r][c], ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlim=(0, width), ylim=(height, 0))
    if hovers:
        box = axes.get_window_extent()
        side = 72 / 100 * min(box.width / width, box.height / height)  # in points, at matplotlib's 100 dpi
        hover(axes, [(c + 0.5, r + 0.5, hovers[r][c]) for r, c in cells], "s", 0.95 * side)
    axes.set_yticks(np.arange(height) + 0.5, rows, color=INK)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor", color=INK)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def hover(axes: Axes, points: Sequence[Point], marker: str = "o", size: int | float = 9) -> None:
    """Let a page say a text where its reader points at (x, y): SVG's <title> of a mark that is not seen.

    The points lie within the axes and are finite; `size` is in points of print. More than MAX_HOVERS would weigh more
    than the drawing, and are left out.
    """
    if not 0 < len(points) <= MAX_HOVERS:
        return
    x, y, texts = zip(*points, strict=True)
    assert not any(_BETWEEN in text for text in texts)
    mark = {"alpha": 0, "color": INK, "markersize": size, "markeredgewidth": 0, "linestyle": "none", "clip_on": False}
    axes.plot(x, y, marker=marker, gid=_HOVER + _BETWEEN.join(texts), scalex=False, scaley=False, **mark)


def pixels(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """Return the figure in RGB, on white, at its own size."""
    figure.set_facecolor("white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3].copy()


def inline_svg(figure: Figure, name: str) -> str:
    """Return SVG to stand in a page: colours and font are the page's, and its ids, made of `name`, are unique there."""
    text = io.StringIO()
    undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=undated)
    code = text.getvalue()
    code = code[code.index("<svg") :]
    code = _titled(code)
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


def _titled(svg: str) -> str:
    """Return SVG in which the marks of `hover` carry their texts."""

    def with_titles(group: re.Match[str]) -> str:
        texts = iter(group[1].split(_BETWEEN))
        titled = re.sub(r"(<use [^>]*)/>", lambda mark: f"{mark[1]}><title>{next(texts)}</title></use>", group[2])
        assert next(texts, None) is None, "a mark was not drawn"
        return f"<g>{titled}</g>"

    return re.sub(rf'<g id="{_HOVER}([^"]*)">(.*?)</g>', with_titles, svg, flags=re.DOTALL)


def picture(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """Return the content of an .svg or .png file, on white."""
    content = io.BytesIO()
    undated = {"Date": None} if kind == "svg" else {}
    figure.savefig(content, format=kind, dpi=200, facecolor="white", metadata=undated)
    return _titled(content.getvalue().decode()).encode() if kind == "svg" else content.getvalue()
