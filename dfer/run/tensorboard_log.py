"""TensorBoard, a view of metrics.jsonl: event files in `logs/<run>/tensorboard/`, if --run.tensorboard asks for it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dfer.cli import UserError
from dfer.files import reason

FOLDER = "tensorboard"
_NO_SCALARS = {"step", "epoch", "time"}


def check_tensorboard(asked_for: bool) -> None:
    """Check that event files can be written, before a run begins.

    Raises:
        UserError: if they are asked for and TensorBoard is not installed.
    """
    if not asked_for:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401 (a second, which a run without it need not pay)
    except ImportError as error:
        raise UserError(
            f"--run.tensorboard: TensorBoard is not there ({error}): pip install tensorboard, or leave it out"
        ) from None


class TensorBoardLog:
    """The rows of a run as scalars. What goes wrong there is said once and ends only that.

    A start writes all rows so far anew, and the files of earlier starts go: nothing is lost or doubled where a run was
    killed and goes on from an earlier step.

    Args:
        run_dir: the run's folder.
        rows: those of metrics.jsonl so far.
        say: takes a line for the user.
    """

    def __init__(self, run_dir: Path, rows: Sequence[dict[str, Any]], say: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self._say, self._writer = say, None
        with self._guarded():
            for stale in (run_dir / FOLDER).glob("events.out.tfevents.*"):
                stale.unlink()
            self._writer = SummaryWriter(run_dir / FOLDER, flush_secs=30)
        for row in rows:
            self.row(row)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Say what goes wrong in the block, and write nothing from then on."""
        try:
            yield
        except Exception as error:  # a full disk, mostly; its writer is a thread, whose errors come with a later row
            self._writer = None
            self._say(f"TensorBoard's files end here: they cannot be written ({reason(error)})")

    def row(self, row: dict[str, Any]) -> None:
        """Write a row of metrics.jsonl; values that are not finite (null there) are left out."""
        if self._writer is None:
            return
        with self._guarded():
            for name, value in row.items():
                if name not in _NO_SCALARS and value is not None:
                    self._writer.add_scalar(name, value, row["step"], _walltime(row))

    def close(self) -> None:
        """Write what waits, and end."""
        if self._writer is not None:
            with self._guarded():
                self._writer.close()
            self._writer = None


def _walltime(row: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(row["time"]).timestamp()
    except (KeyError, ValueError, TypeError):  # a row of an older version
        return time.time()
