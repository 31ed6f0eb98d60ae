"""Read back what a run has left in its folder."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from dfer.cli import UserError, printable
from dfer.files import check_visible
from dfer.run.predictions import Predictions, read_predictions
from dfer.run.provenance import describe_starts, read_starts, trained_on


class Run(NamedTuple):
    """The records of a run."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    predictions: Predictions | None
    notes: list[str]  # what is missing, and why
    starts: Sequence[dict[str, Any]] = ()  # code, machine and data of each start, if they were noted

    @property
    def made_by(self) -> str:
        """Return code and machines in a line, "" if nothing is known."""
        return printable(describe_starts(list(self.starts)))

    @property
    def trained_on(self) -> str:
        """Return in a line what it was trained on."""
        data = self.config.get("data")
        train_list = data.get("train_list", "?") if isinstance(data, dict) else "?"
        return printable(trained_on(self.starts[-1].get("faces") if self.starts else None, str(train_list)))

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return printable(self.path.resolve().name)

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
        check_visible(path)
        raise UserError(f"{path}: no such run (a folder that train.py made, such as logs/NAME)")
    config = _read_config(path)
    rows, notes = _read_rows(path / "metrics.jsonl")
    predictions = None
    try:
        predictions = read_predictions(path / "predictions.csv")
    except UserError as error:
        notes.append(f"no confusion matrix, recall or gallery: {error}")
    notes += _said(path / "log.txt")
    return Run(path, config, rows, predictions, notes, read_starts(path))


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


def _said(path: Path) -> list[str]:
    """Return what the log says of the recipe and of the balance of classes, each line once; nothing without a log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    said = (re.sub(r"^(\d{4}-\d\d-\d\d )?\S+ ", "", line) for line in lines)  # date (of late) and time
    return list(dict.fromkeys(line for line in said if line.startswith(("recipe ", "balance "))))


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
