"""Read back what a run has left in its folder."""

import csv
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64

from dfer.cli import UserError, shown
from dfer.lists.annotations import EMOTIONS
from dfer.metrics import ConfusionMatrix


class Predictions(NamedTuple):
    """The rows of a predictions.csv: one for each clip of an evaluation."""

    clips: list[str]
    labels: Int64[np.ndarray, " N"]
    predicted: Int64[np.ndarray, " N"]
    probabilities: Float64[np.ndarray, "N K"]

    def confusion(self) -> ConfusionMatrix:
        return confusion_matrix(self.labels, self.predicted)


def confusion_matrix(labels: Int64[np.ndarray, " N"], predicted: Int64[np.ndarray, " N"]) -> ConfusionMatrix:
    matrix = ConfusionMatrix(len(EMOTIONS))
    valid = torch.ones(len(labels), dtype=torch.bool)
    matrix.update(torch.from_numpy(np.ascontiguousarray(predicted)), torch.from_numpy(labels), valid)
    return matrix


class Run(NamedTuple):
    """The records of a run."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    predictions: Predictions | None
    notes: list[str]  # what is missing, and why

    @property
    def name(self) -> str:
        return shown(self.path.resolve().name)

    def series(self, key: str) -> tuple[Float64[np.ndarray, " R"], Float64[np.ndarray, " R"]]:
        """Return steps and values of the rows that have the key; nan where the value is not a finite number."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        values = [v if isinstance(v, int | float) and math.isfinite(v) else math.nan for _, v in found]
        return np.array([step for step, _ in found], dtype=np.float64), np.array(values, dtype=np.float64)


def read_run(path: Path) -> Run:
    """Read the records in a run's folder. What is missing or damaged there is noted, not an error.

    Raises:
        UserError: if there is no such folder or it is not a run's.
    """
    if not os.path.isdir(path):  # unlike Path.is_dir, it raises nothing, whatever a user gives
        raise UserError(f"{path}: no such run (a folder that train.py made, such as logs/NAME)")
    config = _read_config(path)
    rows, notes = _read_rows(path / "metrics.jsonl")
    predictions = None
    try:
        predictions = read_predictions(path / "predictions.csv")
    except UserError as error:
        notes.append(f"no confusion matrix, recall or gallery: {error}")
    return Run(path, config, rows, predictions, notes)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not a run: it holds no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a run's configuration ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a run's configuration (no settings in it)")
    return config


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of metrics.jsonl that can be read, and notes about the others."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        return [], [f"no curves: metrics.jsonl cannot be read ({error.strerror})"]
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            continue  # torn by a crash, or not a row
    torn = len(lines) - len(rows)
    notes = [f"{torn} of {len(lines)} rows of metrics.jsonl cannot be read and are left out"] if torn else []
    return rows, notes


def read_predictions(path: Path) -> Predictions:
    """Read what `dfer.run.logger.write_predictions` wrote.

    Raises:
        UserError: if it is missing or damaged.
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
        parsed = _parse_prediction(row)
        if parsed is None:
            raise UserError(f"predictions.csv is damaged in line {number}")
        clips.append(str(row["clip"]))
        numbers.append(parsed)
    if not clips:
        raise UserError("predictions.csv holds no clips")
    table = np.array(numbers)
    return Predictions(clips, table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:])


def _parse_prediction(row: dict[str, str]) -> list[int | float] | None:
    """Return label, prediction and probabilities of a row; None if it is damaged."""
    try:
        label, predicted = int(row["label"]), int(row["prediction"])
        probabilities = [float(row[f"p_{emotion}"]) for emotion in EMOTIONS]
    except (ValueError, KeyError, TypeError):
        return None
    known = 0 <= label < len(EMOTIONS) and 0 <= predicted < len(EMOTIONS)
    if not known or not all(map(math.isfinite, probabilities)) or "clip" not in row:
        return None
    return [label, predicted, *probabilities]


def align(one: Predictions, other: Predictions) -> Int64[np.ndarray, " N"] | None:
    """Return the rows of `other` in the order of `one`; None if they are not the same clips with the same labels."""
    orders = [sorted(range(len(p.clips)), key=lambda i, p=p: (p.clips[i], p.labels[i])) for p in (one, other)]
    names = [[(p.clips[i], p.labels[i]) for i in order] for p, order in zip((one, other), orders, strict=True)]
    if names[0] != names[1]:
        return None
    rows = np.empty(len(one.clips), dtype=np.int64)
    rows[orders[0]] = orders[1]
    return rows
