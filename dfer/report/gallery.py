"""Show clips of a run: frames with emotion maps below, and the share of each emotion frame by frame."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dfer.cli import printable
from dfer.lists.annotations import EMOTIONS
from dfer.report.charts import shares_chart
from dfer.report.figures import ACCENT, SECOND, inline_svg
from dfer.report.inspection import Clip, Fed, Inspection
from dfer.report.markup import grid, section
from dfer.run.predictions import Predictions

NUM_FRAMES, TILE = 8, 96  # frames of a clip that are shown, and their size in pixels
BAND, SMALL = 4, 72  # the same, where many clips are
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
        uri = _jpeg(np.concatenate(pictures), TILE, TILE * len(pictures))
        cells.append(f'<figure><img src="{uri}" alt="frame {t + 1}"><figcaption>{t + 1}</figcaption></figure>')
    return f'<div class="strip">{"".join(cells)}</div>', peaks


def _jpeg(pixels: UInt8[np.ndarray, "H W 3"], width: int, height: int) -> str:
    """Return a picture of that size, as a data: address."""
    content, image = io.BytesIO(), Image.fromarray(pixels)
    image.resize((width, height), Image.Resampling.BICUBIC).save(content, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def band(frames: UInt8[np.ndarray, "T H W 3"], alt: str) -> str:
    """Show a few frames of a clip side by side, in one small picture."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, BAND).round().astype(int))
    uri = _jpeg(np.concatenate(list(frames[chosen]), axis=1), SMALL * len(chosen), SMALL)
    return f'<img class="band" src="{uri}" alt="{alt}" style="max-width: {SMALL * BAND}px">'


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


def mistakes_card(predictions: Predictions, mistakes: Sequence[Clip]) -> str:
    """Return a card with a few of the surest mistakes."""
    rows = [_mistake(clip, predictions) for clip in mistakes]
    return f'<div class="card"><h3>Surest mistakes</h3><div class="minis">{"".join(rows)}</div></div>'


def _mistake(clip: Clip, predictions: Predictions) -> str:
    label, predicted = int(predictions.labels[clip.row]), int(predictions.predicted[clip.row])
    share, name = predictions.probabilities[clip.row, predicted], escape(printable(predictions.clips[clip.row]))
    return (
        f'<figure class="mini" data-label="{label}" data-seen="{predicted}" data-share="{share:.6f}">'
        f'{band(clip.frames, name)}<figcaption><span class="label">{EMOTIONS[label]}</span>, taken for '
        f'<span class="seen">{EMOTIONS[predicted]}</span>, {100 * share:.0f} %<small>{name}</small></figcaption>'
        "</figure>"
    )


def mistakes_section(predictions: Predictions, mistakes: Sequence[Clip]) -> str:
    """Return the section with all wrong clips that were read, which the page's script sorts and filters."""
    wrong = int((predictions.labels != predictions.predicted).sum())
    present = sorted({int(predictions.labels[clip.row]) for clip in mistakes})
    choices = "".join(f'<option value="{k}">{EMOTIONS[k]}</option>' for k in present)
    controls = (
        '<p class="controls" hidden><label>Sorted by <select data-sort><option value="share">confidence</option>'
        '<option value="label">class</option><option value="seen">what they were taken for</option></select></label> '
        f'<label>Class <select data-filter><option value="">all</option>{choices}</select></label></p>'
    )
    minis = "".join(_mistake(clip, predictions) for clip in mistakes)
    lead = f"{len(mistakes)} of the {wrong} wrong clips: the surest of each pair of classes before the next of any."
    return section("Mistakes", lead, f'<div class="sortable">{controls}<div class="minis">{minis}</div></div>')


def fed_section(fed: Sequence[Fed]) -> str:
    """Return the section about what the loader hands to training."""
    cards = []
    for clip in fed:
        name = escape(printable(clip.name))
        cards.append(
            f'<figure class="card mini fed"><figcaption><span class="label">{escape(clip.text)}</span><small>{name}'
            f"</small></figcaption>{band(clip.frames, f'{name}, as trained on')}"
            f"{band(clip.plain, f'{name}, as evaluated')}</figure>"
        )
    lead = (
        "The first clips of the first epoch, with the labels that came with them. Above: as training gets them, "
        "augmented. Below: the same video as evaluation would get it. Faces that are cut off, wrong labels, swapped "
        "colours and clips that stand still are seen here first."
    )
    return section("What the loader fed", lead, f'<div class="minis">{"".join(cards)}</div>')


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
