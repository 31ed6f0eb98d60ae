"""predictions.csv: what a run predicts for each clip of its evaluation list."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dfer.cli import UserError
from dfer.files import write_whole
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import ClipIndex


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
