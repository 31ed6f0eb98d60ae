"""predictions.csv: what a run predicts for each clip of its evaluation list, written and read back."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64

from dfer.cli import UserError
from dfer.files import write_whole
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import ClipIndex
from dfer.metrics import ConfusionMatrix


class Predictions(NamedTuple):
    """The rows of a predictions.csv: one for each clip of an evaluation."""

    clips: list[str]
    labels: Int64[np.ndarray, " N"]
    predicted: Int64[np.ndarray, " N"]
    probabilities: Float64[np.ndarray, "N K"]

    def confusion(self) -> ConfusionMatrix:
        """Return their confusion matrix."""
        return confusion_matrix(self.labels, self.predicted)


def confusion_matrix(labels: Int64[np.ndarray, " N"], predicted: Int64[np.ndarray, " N"]) -> ConfusionMatrix:
    """Return the confusion matrix of labels and predictions."""
    matrix = ConfusionMatrix(len(EMOTIONS))
    valid = torch.ones(len(labels), dtype=torch.bool)
    matrix.update(torch.from_numpy(np.ascontiguousarray(predicted)), torch.from_numpy(labels), valid)
    return matrix


def write_predictions(
    path: Path, index: ClipIndex, ids: Sequence[int], probabilities: Sequence[Sequence[float]]
) -> None:
    """Write `clip,label,prediction,p_<emotion> ...` rows, whole or not at all.

    Raises:
        UserError: if they cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["clip", "label", "prediction", *(f"p_{e}" for e in EMOTIONS)])
    for video, p in zip(ids, probabilities, strict=True):
        record = index.records[video]
        writer.writerow([record.name, record.label, int(np.argmax(p)), *(f"{x:.6f}" for x in p)])
    try:
        write_whole(path, text.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error})") from None


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
