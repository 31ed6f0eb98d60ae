"""Pictures of a prediction: a frame with the box and the emotion in it, above the probabilities and their timeline."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

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
LIVE_LONGEST = 960  # px; a camera's picture is drawn while the next one comes
LIVE_FACES = 4  # whose bars stand below it; the others have their likeliest emotion in the picture


class SeenFace(NamedTuple):
    """A face in a picture that was just taken."""

    number: int
    box: Float64[np.ndarray, " 4"] | None  # as in dfer/video/faces.py; None: the whole picture
    probabilities: Float64[np.ndarray, " K"] | None  # None: too little was seen of it


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(figures.FONT), size)


def bar_chart(
    lanes: Lanes,
    panel: Image.Image,
    probabilities: Float64[np.ndarray, " K"],
    columns: tuple[int, int] | None = None,
) -> None:
    """Draw bars and percentages into a panel of `lanes`, the likeliest in colour; none where they are nan.

    `columns`: where the bars begin and end, if not where `lanes` has them.
    """
    draw, font = ImageDraw.Draw(panel), _font(lanes.px(12))
    (left, right), best = columns or lanes.bar, int(np.nan_to_num(probabilities).argmax())
    for k, p in enumerate(probabilities.tolist()):
        top, bottom = lanes.top + k * lanes.lane + lanes.px(5), lanes.top + (k + 1) * lanes.lane - lanes.px(4)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=GRID)
        if p == p:
            if round(p * (right - left)):
                filled = left + round(p * (right - left)) - 1
                draw.rectangle((left, top, filled, bottom - 1), fill=ACCENT if k == best else MUTED)
            place = right + lanes.px(6), (top + bottom) / 2
            draw.text(place, f"{100 * p:.0f} %", INK if k == best else MUTED, font, anchor="lm")


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

    def draw(self, number: int, frame: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
        """Return frame `number` of the video, annotated."""
        whole = Image.new("RGB", (self._lanes.width, self._size[1] + self._lanes.height), "black")
        picture = frame.resize(self._size, Image.Resampling.BILINEAR, reducing_gap=1.0)
        p = self._probabilities[number]
        for face, box, q in self._others.get(number, ()):
            corners = box_corners(box) * self._scale
            outline(picture, corners, SECOND, self._lanes)
            left, top = corners.min(0)
            tag(picture, f"{face}  {likeliest(q)}", (left, top), SECOND, self._lanes)
        if np.isnan(p[0]):
            tag(picture, "no face", (0.0, 0.0), MUTED, self._lanes)
        else:
            left, top = 0.0, 0.0
            if self._boxes is not None:
                corners = box_corners(self._boxes[number]) * self._scale
                outline(picture, corners, ACCENT, self._lanes)
                left, top = corners.min(0)
            tag(picture, likeliest(p), (left, top), ACCENT, self._lanes)
        whole.paste(picture, (self._left, 0))
        panel = self._panel.copy()
        bar_chart(self._lanes, panel, p)
        self._cursor(panel, number)
        whole.paste(panel, (0, self._size[1]))
        return np.asarray(whole)

    def _cursor(self, panel: Image.Image, number: int) -> None:
        """Draw a line at the middle of the frame's time."""
        (left, right), edges = self._lanes.extent, self._edges
        now = (edges[number] + edges[number + 1]) / 2
        x = left + (right - left) * (now - edges[0]) / (edges[-1] - edges[0])
        bottom = self._lanes.top + self._lanes.lane * len(EMOTIONS)
        ImageDraw.Draw(panel).line((x, self._lanes.top, x, bottom), INK, max(self._lanes.px(1.5), 1))


def live_picture(frame: UInt8[np.ndarray, "H W 3"], faces: Sequence[SeenFace], status: str) -> Image.Image:
    """Return a camera's picture with its faces, their seven numbers below it, and a line of small print."""
    height, width = frame.shape[:2]
    scale = min(max(max(height, width), LONG_SIDE[0]), LIVE_LONGEST) / max(height, width)
    size = round(scale * width), round(scale * height)
    lanes = Lanes(max(size[0], NARROWEST), max(1.0, max(size[0], NARROWEST) / 800))
    picture = Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, reducing_gap=1.0)
    if not faces:
        tag(picture, "no face", (0.0, 0.0), MUTED, lanes)
    for face in faces:
        corner = (0.0, 0.0)
        if face.box is not None:
            corners = box_corners(face.box) * np.array(size) / (width, height)
            outline(picture, corners, ACCENT, lanes)
            corner = tuple(corners.min(0).tolist())
        tag(picture, _live_words(face), corner, ACCENT, lanes)
    whole = Image.new("RGB", (lanes.width, size[1] + lanes.height), "white")
    whole.paste(picture, ((lanes.width - size[0]) // 2, 0))
    whole.paste(_live_panel(lanes, faces[:LIVE_FACES], status), (0, size[1]))
    return whole


def _live_words(face: SeenFace) -> str:
    return f"{face.number}  " + ("..." if face.probabilities is None else likeliest(face.probabilities))


def _live_panel(lanes: Lanes, faces: Sequence[SeenFace], status: str) -> Image.Image:
    """Return the bars of some faces side by side, as of a video's timeline, with the names of the emotions."""
    panel = Image.new("RGB", (lanes.width, lanes.height), "white")
    draw, font = ImageDraw.Draw(panel), _font(lanes.px(12))
    for k, name in enumerate(EMOTIONS):
        middle = lanes.top + (k + 0.5) * lanes.lane
        draw.text((lanes.extent[0] - lanes.px(8), middle), name, INK, font, anchor="rm")
    width = (lanes.width - lanes.extent[0]) // max(len(faces), 1)
    for place, face in enumerate(faces):
        column = Image.new("RGB", (width, lanes.height), "white")
        ImageDraw.Draw(column).text((0, lanes.top / 2), _live_words(face), ACCENT, font, anchor="lm")
        nothing = np.full(len(EMOTIONS), np.nan)
        bars = nothing if face.probabilities is None else face.probabilities
        bar_chart(lanes, column, bars, (0, width - lanes.px(60)))
        panel.paste(column, (lanes.extent[0] + place * width, 0))
    draw.text((lanes.px(8), lanes.height - lanes.px(20)), status, MUTED, font, anchor="lm")
    return panel


def likeliest(probabilities: Float64[np.ndarray, " K"]) -> str:
    """Return the likeliest emotion and its probability in words."""
    return f"{EMOTIONS[int(probabilities.argmax())]}  {100 * probabilities.max():.0f} %"


def outline(picture: Image.Image, corners: Float64[np.ndarray, "4 2"], colour: str, lanes: Lanes) -> None:
    """Draw a square that stands out on dark and on light pictures."""
    draw, ring = ImageDraw.Draw(picture), [tuple(c) for c in (*corners, *corners[:2])]
    draw.line(ring, "white", lanes.px(4), joint="curve")
    draw.line(ring, colour, lanes.px(2), joint="curve")


def tag(picture: Image.Image, text: str, corner: tuple[float, float], colour: str, lanes: Lanes) -> None:
    """Draw text on a ground of its own, which ends at the corner's height, or begins where the picture does."""
    font = _font(lanes.px(16))
    pad, draw, (left, top) = lanes.px(5), ImageDraw.Draw(picture), corner
    width, height = round(draw.textlength(text, font)) + 2 * pad, lanes.px(16) + 2 * pad
    left = round(min(max(left, 0), max(picture.width - width, 0)))
    top = round(min(max(top - height, 0), picture.height))
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
    draw.text((left + pad, top + height / 2), text, "white", font, anchor="lm")


def box_corners(box: Float64[np.ndarray, " 4"]) -> Float64[np.ndarray, "4 2"]:
    """Return the corners (x, y) of a square (x, y, side, tilt), clockwise from where the upper left one would be."""
    x, y, side, tilt = box
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2 @ turn.T + (x, y)
