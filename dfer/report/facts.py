"""Tables of a run in numbers: classes, the scenes of its clips, and by what, where and how fast it was made."""

import itertools
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dfer.cli import printable
from dfer.lists.annotations import EMOTIONS
from dfer.lists.orders import WORDS
from dfer.report.markup import interval_text, section, table
from dfer.report.records import Run
from dfer.report.statistics import precision_and_f1, wilson
from dfer.run.predictions import Predictions, confusion_matrix


def classes_card(predictions: Predictions) -> str:
    """Return recall, precision and F1 of each class."""
    counts = predictions.confusion().counts.numpy()
    rows = []
    for k, (precision, f1) in enumerate(zip(*precision_and_f1(counts), strict=True)):
        right, total = int(counts[k, k]), int(counts[k].sum())
        recall = 100 * right / total if total else np.nan
        shares = ["-" if np.isnan(value) else f"{value:.1f}" for value in (recall, precision, f1)]
        span = interval_text(*wilson(right, total))
        rows.append([EMOTIONS[k], str(total), str(right), shares[0], span, *shares[1:]])
    numbers = table(["class", "clips", "right", "recall, %", "95 %", "precision, %", "F1, %"], rows)
    return f'<div class="card"><h3>In numbers</h3>{numbers}</div>'


def scene_of(name: str) -> str | None:
    """Return the folder above the emotion's in a clip's name, as in FERV39k's Action/Happy/0267; None without one."""
    *_, scene, emotion, _ = ("", "", "", *PurePosixPath(name).parts)
    return scene or None if emotion.lower() in WORDS else None


def scenes_section(predictions: Predictions) -> str | None:
    """Return WAR and UAR of each scene; None if the names of the clips tell of fewer than two."""
    scenes = np.array([scene_of(name) or "" for name in predictions.clips])
    found = sorted(set(scenes.tolist()) - {""})
    if len(found) < 2:
        return None
    rows = []
    for scene in [*found, ""] if (scenes == "").any() else found:
        mine = scenes == scene
        confusion = confusion_matrix(predictions.labels[mine], predictions.predicted[mine])
        span = interval_text(*wilson(int(confusion.counts.trace()), confusion.total()))
        shares = [f"{confusion.war():.1f}", span, f"{confusion.uar():.1f}"]
        rows.append([escape(printable(scene or "none in its path")), str(confusion.total()), *shares])
    numbers = table(["scene", "clips", "WAR, %", "95 %", "UAR, %"], rows)
    lead = "By the folder above the emotion's. UAR is the mean over the classes that a scene has."
    return section("Scenes", lead, f'<div class="card">{numbers}</div>')


def epoch_seconds(run: Run) -> list[float]:
    """Return the seconds from each evaluation to the next, but where the run was stopped in between."""
    evaluated = [moment for row in run.rows if "val/WAR" in row and (moment := _moment(row)) is not None]
    starts = [moment for start in run.starts if (moment := _moment(start)) is not None]
    return [
        (after - before).total_seconds()
        for before, after in itertools.pairwise(evaluated)
        if not any(before < start <= after for start in starts)
    ]


def _moment(row: dict[str, Any]) -> datetime | None:
    try:
        return datetime.fromisoformat(row["time"]).astimezone()
    except (KeyError, TypeError, ValueError):  # a row of an older version
        return None


def made_section(run: Run) -> str:
    """Return by what code, on which machine, of which data and how fast a run was made, as far as it was noted."""
    rows = [["data", run.trained_on]]
    for start in run.starts[-1:]:
        code = f"dfer {start.get('version', '?')}, commit {start.get('commit') or 'unknown'}"
        rows.append(["code", code + ", with changes that are in no commit" * bool(start.get("changed"))])
        rows.append(["processes", f"{start.get('processes', '?')} x {start.get('gpu') or start.get('device', '?')}"])
        names = {"cpu": "processor", "cores": "cores", "driver": "driver", "python": "Python", "torch": "torch"}
        rows += [[name, str(start[key])] for key, name in names.items() if start.get(key)]
    if len(run.starts) > 1:
        rows.append(["starts", f"{len(run.starts)}, the last one above; by {run.made_by}"])
    if seconds := epoch_seconds(run):
        rows.append(["time per epoch", f"{_duration(np.median(seconds))}, evaluation included (median)"])
    cells = [[escape(printable(cell)) for cell in row] for row in rows]
    return section("How it was made", "From started.jsonl and metrics.jsonl.", _card(cells))


def _card(rows: Sequence[Sequence[str]]) -> str:
    return f'<div class="card">{table([], rows, "settings")}</div>'


def _duration(seconds: int | float) -> str:
    minutes, rest = divmod(round(float(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
