"""What `--validate-only` measures in a few steps, and what the whole run will take by that."""

import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dfer.cli import UserError
from dfer.config import Config
from dfer.metrics import BEGINNING, Snapshot, Throughput
from dfer.run.checkpoint import KEPT
from dfer.run.logger import Logger

STEPS = 5  # of training; the first, which allocates and compiles, is not measured where there are others
KEPT_AT_MOST = KEPT + 3  # checkpoints: those of the best WAR and UAR, and the one being written
BATCHES = 2  # of evaluation, on each process; twice, and measured the second time


class Clock(Logger):
    """A logger that says and writes nothing, and knows when the first step had ended."""

    def __init__(self, config: Config, throughput: Throughput, device: torch.device):
        super().__init__(None, config, STEPS)
        self.warm: Snapshot = BEGINNING
        self._throughput, self._device = throughput, device

    def step_done(self, step: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a step has ended when the GPU has, not when it was told all
        if step == 1:
            self.warm = self._throughput.snapshot()


class Rehearsal(NamedTuple):
    """What was measured of a few steps. Clips are those of all processes together, memory is in bytes."""

    epochs: int
    steps_per_epoch: int
    clips_per_step: int
    clips_per_evaluation: int  # each view counts
    training: dict[str, float]  # as Throughput.read has it
    evaluation: dict[str, float]
    skipped: int  # steps that were not finite
    peak: int  # of memory, of the process that took most
    free: int  # memory beside it
    checkpoint: int
    disk: int  # free there

    def step_s(self) -> float:
        return self.clips_per_step / self.training["total_clips_per_s"]

    def evaluation_s(self) -> float:
        return self.clips_per_evaluation / self.evaluation["total_clips_per_s"]

    def run_s(self) -> float:
        """From the first step to the end of the last evaluation."""
        return self.epochs * (self.steps_per_epoch * self.step_s() + self.evaluation_s())

    def rows(self) -> dict[str, str]:
        skipped = f"; {self.skipped} of the steps tried were skipped, as not finite" if self.skipped else ""
        return {
            "epochs": f"{self.epochs} of {self.steps_per_epoch:,} steps of {self.clips_per_step} clips",
            "step": f"{1000 * self.step_s():,.0f} ms ({self.training['total_clips_per_s']:.1f} clips/s), "
            f"{self.training['data_wait_share']:.0%} of it waiting for data{skipped}",
            "evaluation": f"{duration(self.evaluation_s())} ({self.evaluation['total_clips_per_s']:.1f} clips/s)",
            "whole run": f"about {duration(self.run_s())}",
            "memory": f"{self.peak / 1e9:.2f} GB at the peak of a process, {self.free / 1e9:.1f} GB are free beside it",
            "disk": f"{KEPT_AT_MOST * self.checkpoint / 1e9:.2f} GB for up to {KEPT_AT_MOST} checkpoints, "
            f"{self.disk / 1e9:.1f} GB are free",
        }


def padded(num_clips: int, clips_per_batch: int) -> int:
    """The clips of an evaluation with those that fill up its last batch."""
    return math.ceil(num_clips / clips_per_batch) * clips_per_batch


def free_memory(device: torch.device) -> int:
    """Bytes that are free now, on the GPU or in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1])


def free_disk(log_dir: Path, checkpoint: int) -> int:
    """Bytes that are free where `log_dir` is or would be made; `checkpoint` is the size of one.

    Raises:
        UserError: in one line, if it could not be written, or a run would find no room for two.
    """
    there = next(path for path in (log_dir, *log_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--run.log-dir: cannot write {there}")
    free = shutil.disk_usage(there).free
    if free < 2 * checkpoint:
        raise UserError(
            f"--run.log-dir: {free / 1e6:.0f} MB are free in {there}, and two checkpoints take "
            f"{2 * checkpoint / 1e6:.0f} MB; make room or choose another"
        )
    return free


def duration(seconds: float) -> str:
    """Seconds, minutes and hours, or days and hours: two units that matter."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.1f} s"
    if hours < 1:
        return f"{int(minutes)} min {int(seconds) % 60} s"
    return f"{int(hours)} h {int(minutes) % 60} min" if days < 1 else f"{int(days)} days {int(hours) % 24} h"


def print_rows(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    Console(highlight=False).print(table)
