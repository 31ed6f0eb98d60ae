"""Pictures of a prediction: a frame with the box and the emotion in it, above the probabilities and their timeline."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from dfer.lists.annotations import EMOTIONS
from dfer.report import figures
from dfer.report.figures import ACCENT, GRID, INK, MUTED, SECOND
from dfer.report.lanes import Lanes, lanes_figure

LONG_SIDE = (480, 1280)  # px; the longer side of the picture is brought into this range, so that faces are legible
# Its number, its box as in dfer/video/faces.py, and its probabilities.
OtherFace: TypeAlias = tuple[int, Float64[np.ndarray, " 4"], Float64[np.ndarray, " K"]]
NARROWEST = 480  # px of the whole; names and bars need so much


def bar_chart(lanes: Lanes, panel: Image.Image, probabilities: Float64[np.ndarray, " K"]) -> None:
    """Draw bars and percentages into a panel of `lanes`, the likeliest in colour; none where they are nan."""
    draw, font = ImageDraw.Draw(panel), ImageFont.truetype(str(figures.FONT), lanes.px(12))
    (left, right), likeliest = lanes.bar, int(np.nan_to_num(probabilities).argmax())
    for k, p in enumerate(probabilities.tolist()):
        top, bottom = lanes.top + k * lanes.lane + lanes.px(5), lanes.top + (k + 1) * lanes.lane - lanes.px(4)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=GRID)
        if p == p:
            if round(p * (right - left)):
                filled = left + round(p * (right - left)) - 1
                draw.rectangle((left, top, filled, bottom - 1), fill=ACCENT if k == likeliest else MUTED)
            place = right + lanes.px(6), (top + bottom) / 2
            draw.text(place, f"{100 * p:.0f} %", INK if k == likeliest else MUTED, font, anchor="lm")


def timeline_picture(
    edges: Float64[np.ndarray, " E"], probabilities: Float64[np.ndarray, "N K"], width: int = 900, unit: int | float = 2
) -> Image.Image:
    """Return the timeline of a whole video with the mean of each emotion beside it.

    `edges` and `probabilities` as of `lanes_figure`; `width` in pixels at the size that one reads, each of
    which is `unit` pixels of the picture.
    """
    lanes = Lanes(round(width * unit), unit)
    with figures.style():
        panel = Image.fromarray(figures.pixels(lanes_figure(lanes, edges, probabilities, "mean")))
    bar_chart(lanes, panel, np.nanmean(probabilities, axis=0))
    return panel


class Overlay:
    """Annotated frames of one video, all of one even size.

    Args:
        height: of the video in pixels, upright, as `width`.
        width: see there.
        edges: as of `lanes_figure`, as `probabilities`.
        boxes: squares (x, y, side, tilt) as in dfer/video/faces.py; None to draw none.
        probabilities: see `edges`.
        longest: of the picture's sides, in pixels.
        others: the faces of a frame, by its number, that are drawn besides.
    """

    def __init__(
        self,
        height: int,
        width: int,
        edges: Float64[np.ndarray, " E"],
        boxes: Float64[np.ndarray, "N 4"] | None,
        probabilities: Float64[np.ndarray, "N K"],
        longest: int = LONG_SIDE[1],
        others: Mapping[int, Sequence[OtherFace]] | None = None,
    ):
        scale = min(max(max(height, width), LONG_SIDE[0]), longest) / max(height, width)
        self._size = max(round(scale * width / 2) * 2, 2), max(round(scale * height / 2) * 2, 2)
        whole = max(self._size[0], NARROWEST)
        self._left = (whole - self._size[0]) // 2
        self._scale = np.array(self._size) / (width, height)
        self._lanes = Lanes(whole, max(1.0, whole / 800))
        with figures.style():
            figure = lanes_figure(self._lanes, edges, probabilities, "now")
            self._panel = Image.fromarray(figures.pixels(figure))
        self._edges, self._boxes, self._probabilities = edges, boxes, probabilities
        self._others = others or {}
        self._font = ImageFont.truetype(str(figures.FONT), self._lanes.px(16))

    def draw(self, number: int, frame: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
        """Return frame `number` of the video, annotated."""
        whole = Image.new("RGB", (self._lanes.width, self._size[1] + self._lanes.height), "black")
        picture = frame.resize(self._size, Image.Resampling.BILINEAR, reducing_gap=1.0)
        p = self._probabilities[number]
        for face, box, q in self._others.get(number, ()):
            corners = box_corners(box) * self._scale
            self._outline(picture, corners, SECOND)
            left, top = corners.min(0)
            self._tag(picture, f"{face}  {EMOTIONS[int(q.argmax())]}  {100 * q.max():.0f} %", left, top, SECOND)
        if np.isnan(p[0]):
            self._tag(picture, "no face", 0.0, 0.0, MUTED)
        else:
            left, top = 0.0, 0.0
            if self._boxes is not None:
                corners = box_corners(self._boxes[number]) * self._scale
                self._outline(picture, corners, ACCENT)
                left, top = corners.min(0)
            self._tag(picture, f"{EMOTIONS[int(p.argmax())]}  {100 * p.max():.0f} %", left, top, ACCENT)
        whole.paste(picture, (self._left, 0))
        panel = self._panel.copy()
        bar_chart(self._lanes, panel, p)
        self._cursor(panel, number)
        whole.paste(panel, (0, self._size[1]))
        return np.asarray(whole)

    def _outline(self, picture: Image.Image, corners: Float64[np.ndarray, "4 2"], colour: str) -> None:
        """Draw a square that stands out on dark and on light pictures."""
        draw, ring = ImageDraw.Draw(picture), [tuple(c) for c in (*corners, *corners[:2])]
        draw.line(ring, "white", self._lanes.px(4), joint="curve")
        draw.line(ring, colour, self._lanes.px(2), joint="curve")

    def _tag(self, picture: Image.Image, text: str, left: float, top: float, colour: str) -> None:
        """Draw text on a ground of its own, which ends at `top`, or begins where the picture does."""
        pad, draw = self._lanes.px(5), ImageDraw.Draw(picture)
        width, height = round(draw.textlength(text, self._font)) + 2 * pad, self._lanes.px(16) + 2 * pad
        left = round(min(max(left, 0), max(picture.width - width, 0)))
        top = round(min(max(top - height, 0), picture.height))
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
        draw.text((left + pad, top + height / 2), text, "white", self._font, anchor="lm")

    def _cursor(self, panel: Image.Image, number: int) -> None:
        """Draw a line at the middle of the frame's time."""
        (left, right), edges = self._lanes.extent, self._edges
        now = (edges[number] + edges[number + 1]) / 2
        x = left + (right - left) * (now - edges[0]) / (edges[-1] - edges[0])
        bottom = self._lanes.top + self._lanes.lane * len(EMOTIONS)
        ImageDraw.Draw(panel).line((x, self._lanes.top, x, bottom), INK, max(self._lanes.px(1.5), 1))


def box_corners(box: Float64[np.ndarray, " 4"]) -> Float64[np.ndarray, "4 2"]:
    """Return the corners (x, y) of a square (x, y, side, tilt), clockwise from where the upper left one would be."""
    x, y, side, tilt = box
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2 @ turn.T + (x, y)
