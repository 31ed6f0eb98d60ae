"""Collect the results of a cross-validation: what results.json holds."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfer.cli import UserError
from dfer.lists.annotations import EMOTIONS, read_annotations
from dfer.metrics import ConfusionMatrix
from dfer.report.published import published_results
from dfer.report.records import Run, read_run
from dfer.report.statistics import Pool, pool, wilson
from dfer.run.folds import BEST, FoldRun
from dfer.run.predictions import Predictions, read_predictions


class FinishedRun(NamedTuple):
    """A run that is trained and evaluated."""

    seed: int
    fold: int  # 1 ..
    run: Run
    last: Predictions
    best: Predictions
    best_epoch: int
    best_war: float  # in training


def read_finished(run: FoldRun) -> FinishedRun:
    """Read what a run has predicted.

    Raises:
        UserError: if that is damaged or not of the clips of its test list.
    """
    path, data = run.path, run.config.data
    records = read_run(path)
    wanted = sorted((r.name, r.label) for r in read_annotations(data.val_list, data.root))

    def read(file: Path) -> Predictions:
        try:
            predictions = read_predictions(file)
        except UserError as error:
            raise UserError(f"{file}: {error}; remove {path} to train this fold again") from None
        if sorted(zip(predictions.clips, predictions.labels.tolist(), strict=True)) != wanted:
            raise UserError(f"{file}: not the clips and labels of {data.val_list}, which has changed")
        return predictions

    last, best = read(path / "predictions.csv"), read(path / BEST)
    _, wars = records.series("val/WAR")
    if not len(wars):
        raise UserError(f"{path / 'metrics.jsonl'}: holds no evaluation; remove {path} to train this fold again")
    epoch = int(np.argmax(wars))
    return FinishedRun(run.seed, run.fold, records, last, best, epoch + 1, float(wars[epoch]))


def collect(runs: Sequence[FinishedRun], notes: Sequence[str]) -> dict[str, Any]:
    """Return all of results.json but the command and the name.

    Args:
        runs: all seeds and folds, seed by seed.
        notes: what is to be said besides.
    """
    config = runs[0].run.config
    seeds, num_folds = sorted({run.seed for run in runs}), max(run.fold for run in runs)
    by_seed = [[run for run in runs if run.seed == seed] for seed in seeds]
    rows = [_row(run, config["optim"]["epochs"]) for run in runs]
    tested = [[sum(line) for line in row["last"]["confusion"]] for row in rows[:num_folds]]
    published, note = published_results(tested)
    return {
        "preset": config["preset"],
        "lists": str(Path(config["data"]["val_list"]).parent),
        "folds": num_folds,
        "seeds": seeds,
        "epochs": config["optim"]["epochs"],
        "classes": list(EMOTIONS),
        "last": summary(pool([[run.last for run in folds] for folds in by_seed])),
        "best": summary(pool([[run.best for run in folds] for folds in by_seed])),
        "runs": rows,
        "published": published,
        "notes": [*notes, *_notes(runs, rows, num_folds), *([note] if note else [])],
    }


def _row(run: FinishedRun, epochs: int) -> dict[str, Any]:
    last = {"epoch": epochs, **_scores(run.last.confusion())}
    best = {"epoch": run.best_epoch, **_scores(run.best.confusion())}
    return {"seed": run.seed, "fold": run.fold, "run": run.run.name, "last": last, "best": best}


def _scores(matrix: ConfusionMatrix) -> dict[str, Any]:
    recalls = [None if math.isnan(r) else r for r in matrix.per_class_recall().tolist()]
    scores = {"clips": matrix.total(), "WAR": matrix.war(), "UAR": matrix.uar()}
    return scores | {"recall": dict(zip(EMOTIONS, recalls, strict=True)), "confusion": matrix.counts.tolist()}


def _notes(runs: Sequence[FinishedRun], rows: Sequence[dict[str, Any]], num_folds: int) -> list[str]:
    notes = []
    for run, row in zip(runs, rows, strict=True):
        if abs(row["best"]["WAR"] - run.best_war) > 1e-6:
            notes.append(
                f"{run.run.name}: the best epoch's weights have WAR {row['best']['WAR']:.2f} when evaluated again, "
                f"{run.best_war:.2f} in training"
            )
    for row in rows[:num_folds]:
        absent = [emotion for emotion, recall in row["last"]["recall"].items() if recall is None]
        if absent:
            notes.append(f"fold {row['fold']} tests no clip of {', '.join(absent)}: its UAR is of the other classes")
    return notes


def summary(predictions: Pool) -> dict[str, Any]:
    """Return what holds of all folds and seeds together: percentages, and sample standard deviations."""
    matrices = predictions.confusions()
    pooled = [ConfusionMatrix.pooled(folds) for folds in matrices]
    found: dict[str, Any] = {"mean_of_folds": {}, "pooled": {}}
    intervals = predictions.intervals()
    for name in ("WAR", "UAR"):
        values = np.array([[getattr(fold, name.lower())() for fold in folds] for folds in matrices])  # (seeds, folds)
        means = values.mean(1).tolist()
        found["mean_of_folds"][name] = {
            "mean": statistics.mean(means),
            "sd_of_folds": _deviation(values.mean(0).tolist()),
            "sd_of_seeds": _deviation(means),
            "per_seed": means,
        }
        totals = [getattr(matrix, name.lower())() for matrix in pooled]
        found["pooled"][name] = {
            "mean": statistics.mean(totals),
            "interval": list(intervals[name]),
            "sd_of_seeds": _deviation(totals),
            "per_seed": totals,
        }
    right = np.mean([matrix.counts.diag().tolist() for matrix in pooled], axis=0).tolist()
    clips = pooled[0].counts.sum(1).tolist()
    found["recall"] = {
        emotion: {"clips": n, "mean": 100 * r / n, "interval": list(wilson(r, n))} if n else {"clips": 0}
        for emotion, r, n in zip(EMOTIONS, right, clips, strict=True)
    }
    found["confusion_per_seed"] = [matrix.counts.tolist() for matrix in pooled]
    return found


def _deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None
