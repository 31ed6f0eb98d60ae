"""Show clips of a run: frames with emotion maps below, and the share of each emotion frame by frame."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float
from PIL import Image

from dfer.cli import printable
from dfer.lists.annotations import EMOTIONS
from dfer.report.charts import shares_chart
from dfer.report.figures import ACCENT, SECOND, inline_svg
from dfer.report.inspection import Clip, Inspection
from dfer.report.markup import grid, section
from dfer.run.predictions import Predictions

NUM_FRAMES, TILE = 8, 96  # frames of a clip that are shown, and their size in pixels
PRIVACY = (
    "<strong>These are faces of your data.</strong> The page lies on your disk only: nothing of it is uploaded, not to "
    "Weights &amp; Biases either. Mind the data's licence before you pass it on; "
    "<code>scripts/report.py RUN --clips 0</code> writes it without faces."
)


def strip(clip: Clip, stride: int, layers: Sequence[tuple[int, str]]) -> tuple[str, list[float]]:
    """Show frames of a clip, and below each a picture per layer, which is an emotion and its colour.

    Returns:
        HTML, and for each layer the probability that has full colour.
    """
    num_frames, size = len(clip.frames), clip.frames.shape[1]
    maps = clip.maps if clip.maps is not None else np.zeros((num_frames, 0, 1, 1))  # and then there are no layers
    peaks = [float(maps[:, k].max()) for k, _ in layers]
    cells = []
    for t in np.unique(np.linspace(0, num_frames - 1, min(num_frames, NUM_FRAMES)).round().astype(int)):
        pictures, grey = [clip.frames[t]], clip.frames[t].mean(-1, keepdims=True)
        for (k, colour), peak in zip(layers, peaks, strict=True):
            shade = 0.8 * upsample(maps[t, k], stride, size)[..., None] / max(peak, 1e-9)
            rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
            pictures.append((grey * (1 - shade) + rgb * shade).astype(np.uint8))
        image = Image.fromarray(np.concatenate(pictures))
        content = io.BytesIO()
        image.resize((TILE, TILE * len(pictures)), Image.Resampling.BICUBIC).save(content, format="JPEG", quality=82)
        uri = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
        cells.append(f'<figure><img src="{uri}" alt="frame {t + 1}"><figcaption>{t + 1}</figcaption></figure>')
    return f'<div class="strip">{"".join(cells)}</div>', peaks


def upsample(cells: Float[np.ndarray, "h w"], stride: int, size: int) -> Float[np.ndarray, "S S"]:
    """Put cell c on pixel c * stride, linear between; pixels behind the last cell get its value."""
    at = np.arange(size) / stride
    down = np.stack([np.interp(at, np.arange(len(cells)), column) for column in cells.T], axis=1)
    return np.stack([np.interp(at, np.arange(cells.shape[1]), row) for row in down])


def _clip_card(number: int, clip: Clip, predictions: Predictions, stride: int) -> str:
    predicted, label = int(predictions.predicted[clip.row]), int(predictions.labels[clip.row])
    layers = [(predicted, ACCENT), (label, SECOND)][: 1 + (predicted != label)] if clip.maps is not None else []
    pictures, peaks = strip(clip, stride, layers)
    probability = 100 * predictions.probabilities[clip.row, predicted]
    text = f'<span class="seen">{EMOTIONS[predicted]}</span>'
    if predicted == label:
        text += f", recognised with {probability:.0f} %"
    else:
        text = f'<span class="label">{EMOTIONS[label]}</span>, taken for {text} with {probability:.0f} %'
    text = f"<h3>{escape(printable(predictions.clips[clip.row]))}</h3><p>{text}</p>{pictures}"
    if clip.shares is not None:
        kinds = zip(layers, peaks, ("orange", "teal"), strict=False)
        scales = "; ".join(f"{EMOTIONS[k]} in {colour}, at most {peak:.2f}" for (k, _), peak, colour in kinds)
        drawing = inline_svg(shares_chart(clip.shares, predicted, label), f"clip{number}")
        text += f'<p class="caption">Where it is seen: {scales} (full colour).</p>{drawing}'
    return f'<article class="card">{text}</article>'


def gallery_section(predictions: Predictions, inspection: Inspection) -> str:
    """Return the section with the wrong and the right clips of an inspection."""
    lead = f"{PRIVACY} Shown are the clips that the model is surest of, each pair of classes once before any twice. "
    if inspection.crf is not None:
        lead += (
            "Maps: the CRF's marginal probability of an emotion at each cell of the fine level. Curves: the share of "
            "each emotion in all cells of a frame, background left out; the thin gray lines are the other emotions."
        )
    parts = []
    for title, right in (("Wrong", False), ("Right", True)):
        cards = [
            _clip_card(number, clip, predictions, inspection.stride)
            for number, clip in enumerate(inspection.clips)
            if (predictions.labels[clip.row] == predictions.predicted[clip.row]) == right
        ]
        parts.append(f"<h3>{title}</h3>" + (grid(cards, wide=True) if cards else '<p class="missing">None.</p>'))
    return section("Clips", lead, "".join(parts))
