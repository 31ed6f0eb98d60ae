"""What `--validate-only` measures in a few steps, and what the whole run will take by that."""

import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from dfer.cli import UserError
from dfer.config import Config, begun_config
from dfer.files import free_bytes
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import ClipIndex
from dfer.metrics import peak_memory
from dfer.plan.balance import describe_draws
from dfer.recipes import deviations
from dfer.run import distributed
from dfer.run.checkpoint import KEPT, decode_state, find_manifests, newest_checkpoint
from dfer.run.console import show_table
from dfer.run.continuing import differences
from dfer.run.distributed import World
from dfer.run.folder import continued_config
from dfer.run.graph import WARM_UP
from dfer.run.logger import endless_warm_up
from dfer.run.memory import free_memory
from dfer.run.resolving import settled_for
from dfer.state import Job

STEPS = 5  # of training; the first ones are not measured where there are others
KEPT_AT_MOST = KEPT + 3  # checkpoints: those of the best WAR and UAR, and the one being written
BATCHES = 2  # of evaluation, on each process; measured the last time of several


class DryRun(NamedTuple):
    """What was measured in a few steps. Clips are those of all processes together, memory is in bytes."""

    epochs: int
    steps_per_epoch: int
    clips_per_step: int
    clips_per_evaluation: int  # each view counts
    training: dict[str, float]  # as Throughput.read returns it
    evaluation: dict[str, float]
    skipped: int  # non-finite steps
    peak: int  # of memory, of the process that took most
    free: int  # memory beside it
    checkpoint: int
    disk: int | None  # free there; None if its file system cannot say

    def step_s(self) -> float:
        """Return the seconds of a step."""
        return self.clips_per_step / self.training["total_clips_per_s"]

    def evaluation_s(self) -> float:
        """Return the seconds of an evaluation."""
        return self.clips_per_evaluation / self.evaluation["total_clips_per_s"]

    def run_s(self) -> float:
        """Return the seconds from the first step to the end of the last evaluation."""
        return self.epochs * (self.steps_per_epoch * self.step_s() + self.evaluation_s())

    def rows(self) -> dict[str, str]:
        """Return what is printed: a name and a text for each row of the table."""
        skipped = f"; {self.skipped} of the steps tried were skipped, as not finite" if self.skipped else ""
        return {
            "epochs": f"{self.epochs} of {self.steps_per_epoch:,} steps of {self.clips_per_step} clips",
            "step": f"{1000 * self.step_s():,.0f} ms ({self.training['total_clips_per_s']:.1f} clips/s), "
            f"{self.training['data_wait_share']:.0%} of it waiting for data{skipped}",
            "evaluation": f"{duration(self.evaluation_s())} ({self.evaluation['total_clips_per_s']:.1f} clips/s)",
            "whole run": f"about {duration(self.run_s())}",
            "memory": f"{self.peak / 1e9:.2f} GB at the peak of a process, {self.free / 1e9:.1f} GB are free beside it",
            "disk": f"{KEPT_AT_MOST * self.checkpoint / 1e9:.2f} GB for up to {KEPT_AT_MOST} checkpoints, "
            + ("how much is free is unknown" if self.disk is None else f"{self.disk / 1e9:.1f} GB are free"),
        }


def warm_up(job: Job) -> int:
    """Return after how many steps they take as long as all others: one allocates and compiles, one is captured."""
    return 1 + WARM_UP if job.step is not None and job.step.graphs.active else 1


def num_steps(job: Job) -> int:
    """Return how many steps of training are taken, some of them to warm up."""
    return min(max(STEPS, warm_up(job) + 2), job.schedule.steps_per_epoch)


def evaluations(job: Job) -> int:
    """Return how often the validation batches are evaluated, so that the last time takes as long as all others."""
    return 2 + WARM_UP // BATCHES if job.step is not None and job.step.graphs.active else 2


def without_first_weights(config: Config, world: World) -> Config:
    """Return the configuration of a dry run: the checkpoint of a run that has begun has what else a file would give.

    Whether it has begun rank 0 sees, for all.
    """
    name = config.run.name
    begun = world.is_main and name and find_manifests(config.run.log_dir / name / "checkpoints")
    begun = distributed.share(b"begun" if begun else None, world)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, init="random")) if begun else config


def padded(num_clips: int, clips_per_batch: int) -> int:
    """Return the clips of an evaluation with those that fill up its last batch."""
    return math.ceil(num_clips / clips_per_batch) * clips_per_batch


def free_disk(log_dir: Path, checkpoint: int) -> int | None:
    """Return the bytes that are free where `log_dir` is or would be made, None if unknown.

    `checkpoint` is the size of one.

    Raises:
        UserError: if it could not be written, or a run would find no room for two.
    """
    there = next(path for path in (log_dir, *log_dir.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--run.log-dir: cannot write {there}")
    free = free_bytes(there)
    if free is not None and free < 2 * checkpoint:
        raise UserError(
            f"--run.log-dir: {free / 1e6:.0f} MB are free in {there}, and two checkpoints take "
            f"{2 * checkpoint / 1e6:.0f} MB; make room or choose another"
        )
    return free


def duration(seconds: float) -> str:
    """Return a time in its two units that matter: minutes and seconds, hours and minutes, or days and hours."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.1f} s"
    if hours < 1:
        return f"{int(minutes)} min {int(seconds) % 60} s"
    return f"{int(hours)} h {int(minutes) % 60} min" if days < 1 else f"{int(days)} days {int(hours) % 24} h"


def measured(
    job: Job, num_val_clips: int, training: dict[str, float], evaluation: dict[str, float], disk: int | None
) -> DryRun:
    """Return what a dry run has measured; all ranks call it.

    Args:
        job: what was run, whose evaluation list was cut short.
        num_val_clips: clips of the whole evaluation list.
        training, evaluation: their rates, as Throughput.read returns them.
        disk: bytes that are free there, None if unknown.
    """
    config, world = job.config, job.world
    global_batch = config.data.batch_size * world.size
    peak = distributed.gather(torch.tensor([peak_memory(world.device)], device=world.device), world)
    return DryRun(
        config.optim.epochs,
        job.schedule.steps_per_epoch,
        global_batch * config.optim.accumulate,
        padded(num_val_clips, global_batch) * job.val_loader.sampler.num_views,
        training,
        evaluation,
        skipped=int(job.state.guard.skipped[0]),
        peak=int(peak.max()),
        free=free_memory(world.device),
        checkpoint=job.state.num_bytes(),
        disk=disk,
    )


def print_table(job: Job, val_index: ClipIndex, result: DryRun) -> None:
    """Print what a dry run has measured."""
    config, train_index = job.config, job.train_loader.index
    title = f"{config.preset} on {job.world.size} x {job.world.device.type}: a run could begin; nothing was written"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("clips", f"{len(train_index):,} to train, {len(val_index):,} to evaluate ({train_index.source})")
    if job.state.started:
        table.add_row("starts from", job.state.started)
    if note := endless_warm_up(config):
        table.add_row("warm-up", note)
    for row in result.rows().items():
        table.add_row(*row)
    for line in deviations(config.recipe, config, job.world.size) if config.recipe != "none" else ():
        table.add_row("recipe", line.removeprefix(f"recipe {config.recipe}: "))
    if config.data.balance != "none":
        table.add_row("balance", describe_draws(train_index.labels, config.data.balance, EMOTIONS))
    if config.run.name and (begun := begun_config(config.run.log_dir / config.run.name)) is not None:
        differing = "; ".join(differences(settled_for(begun, config), config))
        outcome = f"is another configuration: {differing}" if differing else _continued(job, val_index)
        table.add_row("name", f"{config.run.name} has begun and {outcome}")
    show_table(table)


def _continued(job: Job, val_index: ClipIndex) -> str:
    """Return what would become of the run that has begun, by its checkpoint."""
    config = job.config
    folder = config.run.log_dir / str(config.run.name)
    try:
        content, _ = newest_checkpoint(folder / "checkpoints")
        if content is None:
            return "left no checkpoint: it would begin anew"
        data = job.train_loader.index, val_index, job.objective
        continued_config(decode_state(content, folder), config, data, job.world.size)
    except UserError as error:
        return f"cannot be continued: {error}"
    return "would be continued"
