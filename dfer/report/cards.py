"""Make cards: a figure with its title and how to read it."""

import math
from html import escape
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64

from dfer.crf.layers import SIGMA_APPEARANCE, SIGMA_SMOOTHNESS, STATES_PER_CLASS, MeanFieldCRF
from dfer.lists.annotations import EMOTIONS
from dfer.report import charts
from dfer.report.figures import ACCENT, INK, MUTED, Figure, inline_svg
from dfer.report.records import Run
from dfer.report.statistics import calibration
from dfer.run.predictions import Predictions

# The title of each figure, and how to read it.
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
    "reliability": (
        "Reliability of the confidence",
        "Dot: how many of the clips of a confidence are right; bar: its 95 % interval (Wilson). On the dashed line the "
        "confidence is what it says; below it the model is too sure of itself. Expected calibration error (ECE): "
        "{error:.1f} points, the mean over the {bins} bins of |right - confidence|, weighted by their clips.",
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


class Card(NamedTuple):
    """A figure, or why there is none, with its title and caption."""

    name: str  # of the figure's file
    title: str
    caption: str  # HTML
    figure: Figure | str  # or why there is none

    def html(self) -> str:
        if isinstance(self.figure, str):
            reason = f'<p class="missing">Not drawn: {escape(self.figure)}.</p>'
            return f'<div class="card"><h3>{self.title}</h3>{reason}</div>'
        drawing = inline_svg(self.figure, self.name)
        drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{self.title}"', 1)
        return f'<div class="card"><h3>{self.title}</h3>{drawing}<p class="caption">{self.caption}</p></div>'


def _card(name: str, figure: Figure | str, suffix: str = "", **values: str | int | float) -> Card:
    """Return the card that TEXTS describes, with values for the gaps in its texts."""
    title, caption = TEXTS[name]
    return Card(name + suffix, title.format(**values), caption.format(**values), figure)


def training_cards(run: Run) -> list[Card]:
    """Return the curves of a training."""
    rates = {"throughput/compute_clips_per_s": ("computing alone", MUTED)}
    rates |= {"throughput/total_clips_per_s": ("with the wait", ACCENT)}
    waits = {"throughput/data_wait_share": ("wait", ACCENT)}
    losses = {"train/loss": ("training", MUTED), "val/loss": ("evaluation", ACCENT)}
    norms = charts.curves_chart(run, {"train/grad_norm": ("norm", ACCENT)}, log=True)
    return [
        _card("loss", charts.curves_chart(run, losses)),
        _card("war_uar", charts.curves_chart(run, {"val/WAR": ("WAR", INK), "val/UAR": ("UAR", ACCENT)})),
        _card("recalls", charts.recalls_chart(run)),
        _card("throughput", charts.throughput_chart(run, rates, waits)),
        _card("grad_norm", norms),
        _card("lr", charts.curves_chart(run, {"train/lr": ("rate", ACCENT)})),
    ]


def prediction_cards(counts: Int64[np.ndarray, "K K"] | Float64[np.ndarray, "K K"]) -> list[Card]:
    """Return the cards of a confusion matrix, or of the mean of several on the same clips."""
    wrong = [(round(float(n)), *at) for at, n in np.ndenumerate(counts) if n and at[0] != at[1]]
    worst = sorted(wrong, key=lambda entry: -entry[0])[:3]
    most = [f"{EMOTIONS[a]} taken for {EMOTIONS[b]}, {n} of {counts[a].sum():.0f}" for n, a, b in worst]
    return [
        _card("confusion", charts.confusion_chart(counts, False), most="; ".join(most) or "none is wrong"),
        _card("confusion_normalised", charts.confusion_chart(counts, True)),
        _card("recall", charts.recall_chart(counts)),
    ]


def reliability_card(predictions: Predictions) -> Card:
    """Return the card of a run's calibration."""
    found = calibration(predictions)
    return _card("reliability", charts.reliability_chart(found), error=found.error, bins=len(found.clips))


def crf_cards(
    run: Run, crf: MeanFieldCRF | None, energies: Float64[np.ndarray, " I"] | None, energy_clips: int
) -> list[Card]:
    """Return the curves of a CRF in training, and what it has learned.

    Args:
        run: the records.
        crf: with the weights that are shown; None if the model has none of this kind.
        energies: the free energy after 0, 1, ... iterations, nats per token.
        energy_clips: how many clips these are the mean of.
    """
    undecided = math.log(STATES_PER_CLASS * (len(EMOTIONS) + 1))
    cards = [
        _card("coupling", charts.curves_chart(run, {"crf/coupling": ("coupling", ACCENT)})),
        _card("entropy", charts.curves_chart(run, {"crf/entropy": ("entropy", ACCENT)}), undecided=undecided),
    ]
    cards = [card for card in cards if not isinstance(card.figure, str)]  # other CRFs do not log them
    if crf is None or not crf.iterations:
        return cards
    if energies is not None:
        figure = charts.energy_chart(energies, crf.iterations)
        cards.append(_card("free_energy", figure, clips=energy_clips, iterations=crf.iterations))
    return [*cards, *_compatibility_cards(crf), _widths_card(crf)]


def _compatibility_cards(crf: MeanFieldCRF) -> list[Card]:
    cards = []
    classes = crf.compatibility().detach().unflatten(2, (-1, STATES_PER_CLASS)).unflatten(1, (-1, STATES_PER_CLASS))
    couplings = (crf.max_coupling / 2 * crf.coupling_logit.detach().sigmoid()).tolist()
    for kernel, matrix, coupling in zip(("appearance", "smoothness"), classes.mean((2, 4)), couplings, strict=True):
        values = {"kernel": kernel, "states": STATES_PER_CLASS, "coupling": coupling, "most": crf.max_coupling / 2}
        cards.append(_card("compatibility", charts.compatibility_chart(matrix.numpy()), f"_{kernel}", **values))
    return cards


def _widths_card(crf: MeanFieldCRF) -> Card:
    learned = torch.cat([crf.log_sigma_appearance, crf.log_sigma_smoothness]).exp().tolist()
    axes = ("frames", "height", "width", "level")
    names = [f"{kernel}, {axis}" for kernel in ("appearance", "smoothness") for axis in axes]
    widths = list(zip(names, SIGMA_APPEARANCE + SIGMA_SMOOTHNESS, learned, strict=True))
    return _card("widths", charts.widths_chart(widths))
