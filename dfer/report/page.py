"""Write a run as one page: what its records say, and what its model makes of a few clips.

The page is one file, and nothing in it is loaded from elsewhere: its Content-Security-Policy forbids that, and all
scripts but the one that sorts its clips. What is missing is said on it.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from torch import nn

from dfer.cli import UserError
from dfer.files import reason, write_whole
from dfer.report import figures
from dfer.report.cards import Card, crf_cards, prediction_cards, reliability_card, training_cards
from dfer.report.facts import classes_card, made_section, scenes_section
from dfer.report.gallery import fed_section, gallery_section, mistakes_card, mistakes_section
from dfer.report.inspection import ENERGY_CLIPS, Inspection, inspect_model
from dfer.report.markup import document, folded, grid, interval_text, notes_box, section, settings_section, table, tiles
from dfer.report.records import Run
from dfer.report.statistics import bootstrap, calibration, interval, precision_and_f1, wilson
from dfer.run.predictions import Predictions, align

SUREST = 6  # mistakes beside the confusion matrix


def write_report(
    run: Run,
    build_loader: Callable[..., Any],
    load_trained: Callable[..., nn.Module],
    others: Sequence[Run] = (),
    num_clips: int = 4,
    folder: Path | None = None,
) -> Path:
    """Write report.html into the run's folder, and its figures as .svg and .png into `folder`. Return the page's path.

    Args:
        run: the records.
        build_loader: as of `inspect_model`.
        load_trained: as of `inspect_model`.
        others: runs that are compared with this one.
        num_clips: how many right clips are shown, and as many wrong ones.
        folder: is made if it is not there.

    Raises:
        UserError: if they cannot be written.
    """
    inspection = inspect_model(run, num_clips, build_loader, load_trained)
    path = run.path / "report.html"
    with figures.style():
        text, cards = page(run, others, inspection)
        if folder is not None:
            _write_figures(cards, folder)
    write_page(path, text)
    return path


def _write_figures(cards: Sequence[Card], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for card in cards:
            if isinstance(card.figure, str):
                continue
            for kind in ("svg", "png"):
                write_whole(folder / f"{card.name}.{kind}", figures.picture(card.figure, kind))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the report ({reason(error)})") from None


def write_page(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot write the report ({reason(error)})") from None


def write_records(run: Run) -> None:
    """Write the page about a run that goes on: of its records alone, without looking at a clip.

    Raises:
        UserError: if it cannot be written.
    """
    goes_on = Inspection(["the run goes on: clips, and what the CRF has learned, come at its end"], [])
    with figures.style():
        text, _ = page(run, (), goes_on)
    write_page(run.path / "report.html", text)


def page(run: Run, others: Sequence[Run], inspection: Inspection) -> tuple[str, list[Card]]:
    """Return the HTML, and the cards whose figures are in it; `others` are compared with the run."""
    energy_clips = min(len(inspection.clips), ENERGY_CLIPS)
    training, crf = training_cards(run), crf_cards(run, inspection.crf, inspection.energies, energy_clips)
    predicted, body = [], [_headline(run)]
    if run.predictions is not None:
        counts = run.predictions.confusion().counts.numpy()
        predicted = [*prediction_cards(counts), reliability_card(run.predictions)]
        body.append(_recognition(run.predictions, predicted, inspection))
    if notes := [*run.notes, *inspection.notes, *_skipped(run)]:
        body.append(notes_box(notes))
    if others:
        body.append(_comparison(run, others))
    if run.predictions is not None:
        body += _clips(run.predictions, inspection)
    lead = "From metrics.jsonl, over optimizer steps. Points of long curves are means of neighbouring rows."
    body.append(section("Training", lead, grid([card.html() for card in training])))
    if inspection.fed:
        body.append(fed_section(inspection.fed))
    body.append(made_section(run))
    if crf:
        lead = "Every cell of every frame has probabilities of the emotions and gets messages from all the others."
        body.append(folded("What the CRF did", lead, grid([card.html() for card in crf])))
    body.append(settings_section(run.config, "all flags of this run"))
    optim = run.config.get("optim")
    planned = optim.get("epochs", "?") if isinstance(optim, dict) else "?"
    lead = f"{run.config.get('preset', 'run')}, {len(run.series('val/WAR')[0])} of {planned} epochs evaluated"
    lead += f", seed {run.config.get('seed', '?')}; {run.trained_on}"
    text = document(run.name, lead, body, "scripts/report.py")
    return text, [*predicted, *training, *crf]


def _skipped(run: Run) -> list[str]:
    _, skipped = run.series("train/skipped_steps")
    if not np.nansum(skipped):
        return []
    return [f"{np.nanmax(skipped):g} steps were skipped, as their loss or gradient was not finite"]


def _clips(predictions: Predictions, inspection: Inspection) -> list[str]:
    """Return the sections with clips, and that about scenes."""
    parts = [gallery_section(predictions, inspection)] if inspection.clips else []
    if inspection.mistakes:
        parts.append(mistakes_section(predictions, inspection.mistakes))
    scenes = scenes_section(predictions)
    return parts if scenes is None else [*parts, scenes]


def _headline(run: Run) -> str:
    """Return tiles with the main numbers: WAR and UAR, last and best, and the speed."""
    contents = []
    if run.predictions is not None:
        confusion, right = run.predictions.confusion(), run.predictions.labels == run.predictions.predicted
        _, uars = bootstrap(run.predictions.labels, right[:, None])
        span = interval_text(*wilson(int(right.sum()), len(right)))
        war = f"WAR, %: {right.sum()} of {len(right)} clips; 95 %: {span}"
        uar = f"UAR, %; 95 % (bootstrap): {interval_text(*interval(uars[:, 0]))}"
        contents += [("main", f"{confusion.war():.2f}", war), ("main", f"{confusion.uar():.2f}", uar)]
        _, f1 = precision_and_f1(confusion.counts.numpy())
        contents.append(("", f"{np.nanmean(f1):.2f}", "F1, %, mean of the classes"))
        error = calibration(run.predictions).error
        contents.append(("", f"{error:.1f}", "ECE, points: confidence against what is right"))
    for name in ("WAR", "UAR"):
        _, values = run.series(f"val/{name}")
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            text = f"best {name}, %: evaluation {best + 1} of {len(values)}, picked on this list"
            contents.append(("", f"{values[best]:.2f}", text))
    (_, rates), (_, waits) = (run.series(f"throughput/{k}") for k in ("total_clips_per_s", "data_wait_share"))
    if np.isfinite(rates).any():
        contents.append(("", f"{np.nanmedian(rates):.1f}", "clips/s in training (median)"))
    if np.isfinite(waits).any():
        contents.append(("", f"{100 * np.nanmedian(waits):.1f} %", "of it waiting for data (median)"))
    for key, what in (("busy", "of the time the device worked (median)"), ("mfu", "of the GPU's peak FLOP/s (median)")):
        _, shares = run.series(f"throughput/{key}")
        told = shares.shape == waits.shape and np.allclose(shares + waits, 1, atol=0.01, equal_nan=True)  # on a CPU
        if np.isfinite(shares).any() and not told:
            contents.append(("", f"{100 * np.nanmedian(shares):.1f} %", what))
    return tiles(contents)


def _recognition(predictions: Predictions, cards: Sequence[Card], inspection: Inspection) -> str:
    """Return the section about the last evaluation: its cards, the surest mistakes and the numbers of each class."""
    first, *rest = (card.html() for card in cards)
    surest = [mistakes_card(predictions, inspection.mistakes[:SUREST])] if inspection.mistakes else []
    lead = "From predictions.csv, of the last evaluation: every clip counts once."
    return section("What is recognised", lead, grid([first, *surest, *rest, classes_card(predictions)], wide=True))


def _differences(mine: Predictions, theirs: Predictions, order: Int64[np.ndarray, " N"]) -> list[str]:
    """Return HTML of theirs less mine, for WAR and UAR; `order`: rows of theirs in the order of mine."""
    right = np.column_stack([mine.labels == mine.predicted, (theirs.labels == theirs.predicted)[order]])
    one, other = mine.confusion(), theirs.confusion()
    texts = []
    for difference, drawn in zip(
        (other.war() - one.war(), other.uar() - one.uar()), bootstrap(mine.labels, right), strict=True
    ):
        low, high = interval(drawn[:, 1] - drawn[:, 0])
        kind = ' class="beyond"' if low > 0 or high < 0 else ""
        texts.append(f"<small{kind}>{difference:+.2f}<br>({low:+.1f} to {high:+.1f})</small>")
    return texts


def _comparison(run: Run, others: Sequence[Run]) -> str:
    """Return a table of the other runs against this one, on the same draws of the same clips."""
    rows, notes = [], []
    for other in (run, *others):
        if other.predictions is None:
            notes.append(f"{other.name} has no predictions")
            continue
        confusion = other.predictions.confusion()
        values, differences = (confusion.war(), confusion.uar()), ["", ""]
        if other is not run and run.predictions is not None:
            order = align(run.predictions, other.predictions)
            if order is None:
                notes.append(f"{other.name} was evaluated on other clips or labels than {run.name}: no difference")
            else:
                differences = _differences(run.predictions, other.predictions, order)
        cells = [f"{value:.2f}{difference}" for value, difference in zip(values, differences, strict=True)]
        rows.append([f"{escape(other.name)}<small>{confusion.total()} clips</small>", *cells])
    rows_table = table(["run", "WAR, %", "UAR, %"], rows, "runs")
    remarks = "".join(f'<p class="caption">{escape(note)}.</p>' for note in notes)
    lead = (
        f"Below each value: its difference to that of {escape(run.name)}, in percentage points, with the 95 % interval "
        "of a paired bootstrap over the clips; in orange where it leaves out 0. What another seed would change, it "
        "cannot see."
    )
    return section("Compared", lead, f'<div class="card">{rows_table}{remarks}</div>')
