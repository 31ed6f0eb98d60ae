"""Write the results of a cross-validation as one page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dfer.lists.annotations import EMOTIONS
from dfer.report import figures
from dfer.report.cards import Card, prediction_cards
from dfer.report.charts import folds_chart
from dfer.report.markup import document, grid, interval_text, notes_box, section, settings_section, table, tiles
from dfer.report.page import write_page
from dfer.report.published import published_section
from dfer.report.records import Run


def write_folds_report(folder: Path, results: dict[str, Any], runs: Sequence[Run]) -> Path:
    """Write FOLDER/report.html about a cross-validation and return its path. Arguments as of `folds_page`.

    Raises:
        UserError: if it cannot be written.
    """
    path = folder / "report.html"
    with figures.style():
        text = folds_page(results, runs)
    write_page(path, text)
    return path


def folds_page(results: dict[str, Any], runs: Sequence[Run]) -> str:
    """Return the HTML.

    Args:
        results: the content of results.json, see `dfer.report.fold_results.collect`.
        runs: whose curves are drawn.
    """
    body = [_headline(results)]
    if results["notes"]:
        body.append(notes_box(results["notes"]))
    lead = (
        "Each clip is tested in one fold, by a model that was not trained on it. The last epoch is the headline; the "
        "best epoch has seen the test fold, as its weights were picked there. Intervals: bootstrap over the clips, of "
        "WAR over all of them, of UAR within each class; they do not know what another seed would change."
    )
    body += [section("Folds", lead, _folds_table(results)), _recognition(results)]
    if results["published"]:
        body.append(published_section(results))
    caption = "Thin: each run; thick: their mean."
    curves = [Card(f"folds_{k}", f"{k}, %", caption, folds_chart(runs, f"val/{k}")) for k in ("WAR", "UAR")]
    lead = "On each run's own test fold. The page of each run lies in its folder."
    body.append(section("Over the epochs", lead, grid([card.html() for card in curves], wide=True)))
    summary = f"all flags of {escape(runs[0].name)}; the others differ in lists, seed and name"
    body.append(settings_section(runs[0].config, summary))
    several = len(results["seeds"]) > 1
    numbers = ", ".join(map(str, results["seeds"]))
    lead = f"{results['preset']}, {results['folds']} folds of {results['lists']}, seed{'s' * several} {numbers}, "
    lead += f"{results['epochs']} epoch{'s' * (results['epochs'] > 1)}"
    return document(results["name"], lead, body, "scripts/crossval.py")


def _headline(results: dict[str, Any]) -> str:
    """Return tiles with the main numbers."""
    seeds, last, best = len(results["seeds"]), results["last"], results["best"]
    contents = []
    for name in ("WAR", "UAR"):
        mean = last["mean_of_folds"][name]
        text = f"{name}, %: last epoch, mean of {results['folds']} folds{f' and {seeds} seeds' if seeds > 1 else ''}"
        contents.append(("main", f"{mean['mean']:.2f}", f"{text}; ± {mean['sd_of_folds']:.2f} over the folds"))
    for name in ("WAR", "UAR"):
        value = last["pooled"][name]
        text = f"{name}, %: last epoch, pooled; 95 % (bootstrap): {interval_text(*value['interval'])}"
        contents.append(("", f"{value['mean']:.2f}", text))
    for name in ("WAR", "UAR"):
        text = f"{name}, %: best epoch, mean of folds; picked on the test folds by WAR"
        contents.append(("", f"{best['mean_of_folds'][name]['mean']:.2f}", text))
    return tiles(contents)


def _folds_table(results: dict[str, Any]) -> str:
    """Return a row per run, and below them means and spreads, as HTML."""
    rows = []
    for row in results["runs"]:
        last, best = row["last"], row["best"]
        name = f"fold {row['fold']}" if len(results["seeds"]) == 1 else f"seed {row['seed']}, fold {row['fold']}"
        cells = [last["WAR"], last["UAR"], best["WAR"], best["UAR"]]
        rows.append([name, str(last["clips"]), *(f"{cell:.2f}" for cell in cells), str(best["epoch"])])
    columns = [(kind, name) for kind in ("last", "best") for name in ("WAR", "UAR")]
    of_folds = [results[kind]["mean_of_folds"][name] for kind, name in columns]
    of_pool = [results[kind]["pooled"][name] for kind, name in columns]
    means = [f"<b>{v['mean']:.2f}</b><small>± {v['sd_of_folds']:.2f}</small>" for v in of_folds]
    pooled = [f"<b>{v['mean']:.2f}</b><small>{interval_text(*v['interval'])}</small>" for v in of_pool]
    clips = str(sum(recall["clips"] for recall in results["last"]["recall"].values()))
    rows.append(["mean of the folds<small>± standard deviation of the folds</small>", "", *means, ""])
    rows.append(["all clips pooled<small>95 % interval</small>", clips, *pooled, ""])
    if len(results["seeds"]) > 1:
        for text, part in (("mean of the folds", of_folds), ("pooled", of_pool)):
            spreads = [f"± {v['sd_of_seeds']:.2f}" for v in part]
            rows.append([f"standard deviation of the seeds<small>{text}</small>", "", *spreads, ""])
    head = ["", "clips", "last WAR", "UAR", "best WAR", "UAR", "epoch"]
    return f'<div class="card">{table(head, rows, "runs")}</div>'


def _recognition(results: dict[str, Any]) -> str:
    """Return the section about the classes: confusions of the last epoch, recalls of the last and the best."""
    last, seeds = results["last"], len(results["seeds"])
    rows = []
    for emotion in EMOTIONS:
        recalls = [results[kind]["recall"][emotion] for kind in ("last", "best")]
        cells = []
        for r in recalls:
            cells.append(f"{r['mean']:.1f}<small>{interval_text(*r['interval'])}</small>" if r["clips"] else "-")
        rows.append([emotion, str(recalls[0]["clips"]), *cells])
    numbers = table(["class", "clips", "last, %", "best, %"], rows, "runs")
    cards = [card.html() for card in prediction_cards(np.mean(last["confusion_per_seed"], axis=0))]
    cards.append(f'<div class="card"><h3>In numbers</h3>{numbers}</div>')
    clips = sum(recall["clips"] for recall in last["recall"].values())
    lead = f"The last epoch on all {clips:,} clips{'' if seeds == 1 else f', mean of {seeds} seeds'}."
    return section("What is recognised", lead, grid(cards, wide=True))
