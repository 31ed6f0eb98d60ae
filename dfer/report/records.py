"""The records of a run, read back, and what can be said from them with confidence."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from dfer.cli import UserError, shown
from dfer.lists.annotations import EMOTIONS
from dfer.metrics import ConfusionMatrix


class Predictions(NamedTuple):
    clips: list[str]
    labels: Int64[np.ndarray, " N"]
    predicted: Int64[np.ndarray, " N"]
    probabilities: Float64[np.ndarray, "N K"]

    def confusion(self) -> ConfusionMatrix:
        return _confusion(self.labels, self.predicted)


def _confusion(labels: Int64[np.ndarray, " N"], predicted: Int64[np.ndarray, " N"]) -> ConfusionMatrix:
    matrix = ConfusionMatrix(len(EMOTIONS))
    valid = torch.ones(len(labels), dtype=torch.bool)
    matrix.update(torch.from_numpy(np.ascontiguousarray(predicted)), torch.from_numpy(labels), valid)
    return matrix


class Run(NamedTuple):
    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    predictions: Predictions | None
    notes: list[str]  # what is missing, and why

    @property
    def name(self) -> str:
        return shown(self.path.resolve().name)

    def series(self, key: str) -> tuple[Float64[np.ndarray, " R"], Float64[np.ndarray, " R"]]:
        """Steps and values of the rows that have the key; nan where the value is not a finite number."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        values = [v if isinstance(v, int | float) and math.isfinite(v) else math.nan for _, v in found]
        return np.array([step for step, _ in found], dtype=np.float64), np.array(values, dtype=np.float64)


def read_run(path: Path) -> Run:
    """The records of a run's folder. What is missing or damaged there is noted, not an error.

    Raises:
        UserError: in one line, if there is no such folder or it is not a run's.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run (a folder that train.py made, such as logs/NAME)")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError("no settings in it")
    except FileNotFoundError:
        raise UserError(f"{path}: not a run: it holds no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'}: not a run's configuration ({error})") from None

    notes, rows, torn = [], [], 0
    try:
        for line in (path / "metrics.jsonl").read_bytes().splitlines():
            try:
                row = json.loads(line)
                rows.append(row | {"step": int(row["step"])})
            except (ValueError, KeyError, TypeError, OverflowError):
                torn += 1
    except OSError as error:
        notes.append(f"no curves: metrics.jsonl cannot be read ({error.strerror})")
    if torn:
        notes.append(f"{torn} of {torn + len(rows)} rows of metrics.jsonl cannot be read and are left out")
    predictions = None
    try:
        predictions = read_predictions(path / "predictions.csv")
    except UserError as error:
        notes.append(f"no confusion matrix, recall or gallery: {error}")
    return Run(path, config, rows, predictions, notes)


def read_predictions(path: Path) -> Predictions:
    """What `dfer.run.logger.write_predictions` wrote.

    Raises:
        UserError: in one line, if it is missing or damaged.
    """
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError("no predictions.csv: no epoch is evaluated yet") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"predictions.csv cannot be read ({error})") from None
    clips, numbers = [], []
    for number, row in enumerate(rows, start=2):
        try:
            label, predicted = int(row["label"]), int(row["prediction"])
            p = [float(row[f"p_{emotion}"]) for emotion in EMOTIONS]
            if not (0 <= label < len(EMOTIONS) and 0 <= predicted < len(EMOTIONS) and all(map(math.isfinite, p))):
                raise ValueError
            clips.append(str(row["clip"]))
            numbers.append([label, predicted, *p])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"predictions.csv is damaged in line {number}") from None
    if not clips:
        raise UserError("predictions.csv holds no clips")
    table = np.array(numbers)
    return Predictions(clips, table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:])


def wilson(right: int | float, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share, in percent, after Wilson: also for few clips, none or all of them right.

    `right` may be a mean over runs on the same clips.
    """
    if total == 0:
        return math.nan, math.nan
    z2 = 1.959964**2
    share = right / total
    centre, half = share + z2 / (2 * total), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total)
    low, high = (centre - half) / (1 + z2 / total), (centre + half) / (1 + z2 / total)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def bootstrap(
    labels: Int64[np.ndarray, " N"],
    right: Bool[np.ndarray, "N R"],
    resamples: int = 4000,
    within_classes: bool = False,
) -> tuple[Float64[np.ndarray, "S R"], Float64[np.ndarray, "S R"]]:
    """WAR and UAR in percent of R runs over `resamples` draws of N clips with replacement, the same for all runs.

    Both depend only on how many clips of each kind (label, which runs are right) were drawn, and those counts are
    multinomial: no clip needs to be drawn by itself. UAR is the mean over the classes that were drawn. With
    `within_classes` as many clips of each class are drawn as there are: what chance made of the classes' sizes, of
    which UAR does not speak, is left out.
    """
    table = np.column_stack([labels, right]).astype(np.int64)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    rng = np.random.Generator(np.random.Philox(0))
    groups = [counts[kinds[:, 0] == label] for label in np.unique(labels)] if within_classes else [counts]
    parts = [rng.multinomial(group.sum(), group / group.sum(), size=resamples) for group in groups]
    drawn = np.concatenate(parts, axis=1)  # (S, kinds), which are sorted by label
    recalls = []
    for label in np.unique(labels):
        mine = kinds[:, 0] == label
        with np.errstate(invalid="ignore"):
            recalls.append(drawn[:, mine] @ kinds[mine, 1:] / drawn[:, mine].sum(1, keepdims=True))
    return 100 * (drawn @ kinds[:, 1:]) / len(labels), 100 * np.nanmean(recalls, axis=0)


def interval(samples: Float64[np.ndarray, " S"]) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


class Pool(NamedTuple):
    """What was predicted on the test clips of all folds: each clip is in one fold, and predicted once per seed."""

    folds: Int64[np.ndarray, " N"]  # 0 .. F - 1
    labels: Int64[np.ndarray, " N"]
    predicted: Int64[np.ndarray, "N R"]  # a column per seed

    def confusions(self) -> list[list[ConfusionMatrix]]:
        """Of each seed and, within it, of each fold."""
        found = []
        for predicted in self.predicted.T:
            found.append([])
            for fold in range(int(self.folds.max()) + 1):
                mine = self.folds == fold
                found[-1].append(_confusion(self.labels[mine], predicted[mine]))
        return found

    def intervals(self, resamples: int = 4000) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals in percent of WAR (clips resampled) and UAR (within each class), pooled over folds.

        Of several seeds: of their mean. A clip that is drawn brings its predictions of all seeds, as three seeds do not
        make three clips of it.
        """
        right = self.predicted == self.labels[:, None]
        wars, _ = bootstrap(self.labels, right, resamples)
        _, uars = bootstrap(self.labels, right, resamples, within_classes=True)
        return {"WAR": interval(wars.mean(1)), "UAR": interval(uars.mean(1))}


def pool(runs: Sequence[Sequence[Predictions]]) -> Pool:
    """Put together what the runs of each seed predicted on each fold.

    Raises:
        UserError: in one line, if two seeds were not evaluated on the same clips and labels.
    """
    columns = []
    for seed in runs:
        columns.append([])
        for number, (first, fold) in enumerate(zip(runs[0], seed, strict=True), start=1):
            order = same_clips(first, fold)
            if order is None:
                raise UserError(f"fold {number} of two seeds was evaluated on other clips or labels")
            columns[-1].append(fold.predicted[order])
    return Pool(
        np.repeat(np.arange(len(runs[0])), [len(fold.labels) for fold in runs[0]]),
        np.concatenate([fold.labels for fold in runs[0]]),
        np.stack([np.concatenate(column) for column in columns], axis=1),
    )


def same_clips(one: Predictions, other: Predictions) -> Int64[np.ndarray, " N"] | None:
    """Rows of `other` in the order of `one`, None if they are not the same clips with the same labels."""
    orders = [sorted(range(len(p.clips)), key=lambda i, p=p: (p.clips[i], p.labels[i])) for p in (one, other)]
    names = [[(p.clips[i], p.labels[i]) for i in order] for p, order in zip((one, other), orders, strict=True)]
    if names[0] != names[1]:
        return None
    rows = np.empty(len(one.clips), dtype=np.int64)
    rows[orders[0]] = orders[1]
    return rows


def choose(predictions: Predictions, right: bool, count: int) -> list[int]:
    """The surest of the right or wrong clips: first one of each (label, prediction), then the next of each."""
    rows = np.flatnonzero((predictions.labels == predictions.predicted) == right)
    seen: dict[tuple[int, int], int] = {}
    ranked = []
    for row in sorted(rows.tolist(), key=lambda r: -predictions.probabilities[r].max()):
        kind = int(predictions.labels[row]), int(predictions.predicted[row])
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], len(ranked), row))
    return [row for *_, row in sorted(ranked)[:count]]
