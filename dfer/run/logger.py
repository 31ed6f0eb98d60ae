"""What a run says: the terminal, `logs/<run>/log.txt` and `metrics.jsonl` (the record); W&B and TensorBoard view it."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from dfer.batch import Batch
from dfer.cli import UserError
from dfer.config import Config
from dfer.evaluation import Evaluation
from dfer.files import write_whole
from dfer.lists.annotations import EMOTIONS
from dfer.metrics import ConfusionMatrix, flop_share, peak_memory
from dfer.plan.balance import describe_draws
from dfer.recipes import deviations
from dfer.run import distributed
from dfer.run.console import show_table
from dfer.run.continuing import continuing_command
from dfer.run.predictions import read_predictions
from dfer.run.resolving import busy_beside, in_words, short_of_cores
from dfer.run.tensorboard_log import TensorBoardLog
from dfer.run.wandb_log import WandbLog
from dfer.state import Job

TIME = "time"  # of a row: when it was written


class _Pending(NamedTuple):
    """A row some of whose values are still on their way from the GPU."""

    step: int
    values: dict[str, float]
    names: list[str]
    tensors: Tensor  # float32, on the host
    arrived: torch.cuda.Event | None


class Logger:
    """One per process; only rank 0's (the one with a run_dir) says or writes anything."""

    def __init__(
        self,
        run_dir: Path | None,
        config: Config,
        total_steps: int,
        start_step: int = 0,
        start_evaluated: bool = False,
        wandb_id: str | None = None,
    ):
        """Log a run from `start_step` on, and from after its evaluation there if that is in the checkpoint.

        Raises:
            UserError: if its files cannot be written.
        """
        self.run_dir = run_dir
        self._console = Console(highlight=False, quiet=run_dir is None)
        self._pending: _Pending | None = None
        self._total_steps, self._start_step, self._started = total_steps, start_step, time.perf_counter()
        self._wandb: WandbLog | None = None
        self._tensorboard: TensorBoardLog | None = None
        self._anew = False  # an earlier start left rows and no checkpoint
        self._progress: Progress | None = None
        if run_dir is None:
            return
        try:
            rows = run_dir / "metrics.jsonl"
            self._anew = start_step == 0 and rows.exists() and rows.stat().st_size > 0
            earlier = _cut_back(rows, start_step, start_evaluated)
            name = run_dir / "log.txt"
            self._text = open(name, "a", buffering=1, errors="backslashreplace")  # noqa: SIM115 (closed in close)
            self._rows = open(rows, "a", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{run_dir}: cannot write ({error})") from None
        self._num_rows = len(earlier)
        if config.run.tensorboard:
            self._tensorboard = TensorBoardLog(run_dir, earlier, self.say)
        earlier = [{k: v for k, v in row.items() if k != TIME} for row in earlier]
        done = start_evaluated and start_step == total_steps
        self._wandb = WandbLog(run_dir, config, earlier, wandb_id, done, self.say)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[unit]} {task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=start_step, unit="step")
            self._progress.start()

    @property
    def wandb_id(self) -> str | None:
        """Return the run's id in W&B, if it has one."""
        return self._wandb.id if self._wandb is not None else None

    def say(self, line: str) -> None:
        """Write one line to the terminal and to log.txt."""
        if self.run_dir is not None:
            self._write(self._text, f"{_now(' ')} {line}\n")  # first: it is the record
            self._console.print(line, markup=False, soft_wrap=True)

    def _write(self, file: TextIO, line: str) -> None:
        try:
            file.write(line)
        except OSError as error:
            raise UserError(f"{file.name}: cannot write ({error.strerror}); the last checkpoint counts") from None

    def row(self, step: int, values: dict[str, int | float]) -> None:
        """Write one row of metrics.jsonl, which W&B gets too, with a time of its own. Non-finite values are null."""
        if self.run_dir is None or self._wandb is None:
            return
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        timed = row | {TIME: _now()}
        self._write(self._rows, json.dumps(timed) + "\n")
        if self._tensorboard is not None:
            self._tensorboard.row(timed)
        self._wandb.row(self._num_rows, row)
        self._num_rows += 1

    def secure(self) -> None:
        """Put all rows so far on the disk: those before a checkpoint are not written again."""
        self.flush()
        if self.run_dir is not None:
            try:
                os.fsync(self._rows.fileno())
            except OSError as error:
                raise UserError(f"{self._rows.name}: cannot write ({error.strerror})") from None

    def announce(self, job: Job, damage: list[str], changes: list[str] | None) -> None:
        """Say what is trained on what, and what is odd about it.

        `damage` says why newer checkpoints than the one that the run continues from are not used, `changes` what is not
        as when it began; None for a run that begins.
        """
        config, data, world = job.config, job.config.data, job.world
        train_index, val_index = job.train_loader.index, job.val_loader.index
        num_parameters = sum(p.numel() for p in job.state.model.parameters())
        self.say(
            f"{config.preset}: {len(train_index)} train and {len(val_index)} validation clips ({train_index.source}), "
            f"{job.train_loader.sampler.clip_length} frames of {data.size} px; {config.model.name} with "
            f"{num_parameters / 1e6:.1f} M parameters on {world.size} x {world.device.type}"
        )
        self.say(in_words(config, world))
        for note in (short_of_cores(config, world), busy_beside(config)):
            if note is not None:
                self.say(note)
        if job.state.started:
            self.say(f"starts from {job.state.started}")
        if changes is None and config.recipe != "none":
            for line in deviations(config.recipe, config, world.size):
                self.say(line)
        if data.balance != "none":
            self.say(describe_draws(train_index.labels, data.balance, EMOTIONS))
        for name, index in (("train", train_index), ("validation", val_index)):
            if index.num_miscounted():
                self.say(f"{index.num_miscounted()} {name} clips hold another number of frames than listed; disk used")
        if note := endless_warm_up(config):
            self.say(note)
        for line in damage:
            self.say(f"{line}; an older checkpoint is used")
        if self._anew:
            self.say("an earlier start ended before its first checkpoint: the run begins anew")
        for line in changes or ():
            self.say(line)
        if changes is not None and job.state.evaluated < config.optim.epochs:
            self.say(
                f"{self.run_dir}: continuing from step {job.state.step}, with {data.batch_size} clips per step on each "
                f"of {world.size} processes"
            )

    def steps(self, job: Job, grad_norm: Tensor, diagnostics: dict[str, Tensor], rates: dict[str, float]) -> None:
        """Log the mean loss since the last row; learning rate, gradient norm and diagnostics are the last step's.

        `rates` are of all ranks.
        """
        state, world, steps_per_epoch = job.state, job.world, job.schedule.steps_per_epoch
        clips_per_step = job.config.data.batch_size * world.size * job.config.optim.accumulate
        rates = rates | {
            "per_gpu_clips_per_s": rates["total_clips_per_s"] / world.size,
            "step_ms": 1000 * clips_per_step / rates["total_clips_per_s"],
        }
        if world.device.type == "cpu":  # which works whenever it does not wait
            rates["busy"] = 1 - rates["data_wait_share"]
        flops_a_clip = job.step.flops_a_clip if job.step is not None else None
        if (share := flop_share(flops_a_clip, rates["per_gpu_clips_per_s"], world.device)) is not None:
            rates["mfu"] = share
        epoch = (state.step - 1) // steps_per_epoch + 1
        values = {"epoch": epoch, "train/lr": state.optimizer.param_groups[0]["lr"]}
        values |= {f"throughput/{k}": v for k, v in rates.items()}
        tensors = {"train/loss": state.losses[0] / state.losses[1], "train/grad_norm": grad_norm}
        self._train_row(state.step, values, tensors | {"train/skipped_steps": state.guard.skipped[0]} | diagnostics)
        state.losses.zero_()

    def evaluation(self, job: Job, result: Evaluation) -> str:
        """Write the row of the evaluation after an epoch, and return the line for `evaluated`."""
        epoch, epochs = job.state.evaluated + 1, job.config.optim.epochs
        war, uar, train_index = result.confusion.war(), result.confusion.uar(), job.train_loader.index
        recalls = zip(EMOTIONS, result.confusion.per_class_recall().tolist(), strict=True)
        self.row(
            job.state.step,
            {"epoch": epoch, "val/WAR": war, "val/UAR": uar, "val/loss": result.loss}
            | {f"val/recall/{emotion}": recall for emotion, recall in recalls if recall == recall}
            | {f"val/{k}": v for k, v in result.throughput.items()},
        )
        if left_out := distributed.count_distinct(job.train_loader.bad_clips, len(train_index), job.world):
            self.say(f"{left_out} of {len(train_index)} training clips could not be read and were left out so far")
        return f"epoch {epoch}/{epochs}  WAR {war:.2f}  UAR {uar:.2f}  loss {result.loss:.3f}"

    def _train_row(self, step: int, values: dict[str, float], tensors: dict[str, Tensor]) -> None:
        """Write a row with values that may lie on the GPU: those are copied without a sync, and written a row later."""
        self.flush()
        if self.run_dir is None:
            return
        stacked = torch.stack([t.detach().float() for t in tensors.values()])
        values = values | {"throughput/memory_gb": peak_memory(stacked.device) / 1e9}
        if not stacked.is_cuda:
            self._pending = _Pending(step, values, list(tensors), stacked, None)
            self.flush()
            return
        host = torch.empty(stacked.shape, pin_memory=True)
        host.copy_(stacked, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = _Pending(step, values, list(tensors), host, arrived)

    def flush(self) -> None:
        """Write the row that waits for its GPU values."""
        if self._pending is None:
            return
        step, values, names, host, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()  # recorded a whole row ago: done long since
        values |= dict(zip(names, host.tolist(), strict=True))
        self.row(step, values)
        rates = (
            f"loss {values['train/loss']:.3f}  {values['throughput/total_clips_per_s']:.1f} clips/s  "
            f"data wait {100 * values['throughput/data_wait_share']:.0f} %"
        )
        if "throughput/busy" in values:
            rates += f"  busy {100 * values['throughput/busy']:.0f} %"
        if "throughput/mfu" in values:
            rates += f"  {100 * values['throughput/mfu']:.0f} % of the GPU's FLOP/s"
        line = f"epoch {values['epoch']}  step {step}/{self._total_steps}  {rates}"
        if self._progress is not None:  # which counts the steps by itself
            self._progress.update(self._task, description=f"epoch {values['epoch']}  {rates}")
            self._write(self._text, f"{_now(' ')} {line}\n")
        else:
            done = step - self._start_step
            left = (time.perf_counter() - self._started) / done * (self._total_steps - step)
            self.say(f"{line}  {int(left) // 60}:{int(left) % 60:02d} left")

    def step_done(self, step: int) -> None:
        """Move the terminal's progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def evaluating(self, batches: Iterable[Batch], total: int) -> Iterator[Batch]:
        """Pass the batches of an evaluation on, under a progress bar of their own on a terminal."""
        if self._progress is None:
            yield from batches
            return
        task = self._progress.add_task("evaluating", total=total, unit="batch")
        try:
            for batch in batches:
                yield batch
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def evaluated(self, line: str, best: dict[str, list[int | float]]) -> None:
        """Say what an evaluation found, and send the best values to W&B. Call it once a checkpoint has them.

        `line` is from `evaluation`.
        """
        self.say(line)
        if self._wandb is not None:
            self._wandb.best(best)

    def stopped(self, step: int) -> None:
        """Say that a signal has ended the run, which is saved, and by which command it goes on."""
        self.close_progress()
        if self.run_dir is not None:
            self.say(f"stopped by a signal after step {step}; it goes on by: {continuing_command(self.run_dir)}")

    def result(
        self, confusion: ConfusionMatrix, throughput: dict[str, float], best: dict[str, list[int | float]]
    ) -> None:
        """Print the result of a run: WAR, UAR, recall per class, clips/s, where everything lies."""
        if self.run_dir is None or self._wandb is None:
            return
        self.close_progress()
        print_result(f"{self.run_dir.name}: last epoch", confusion)
        self.say(f"best epoch (picked on this list): WAR {best['WAR'][0]:.2f}, UAR {best['UAR'][0]:.2f}")
        self.say(
            f"training: {throughput['total_clips_per_s']:.1f} clips/s "
            f"({throughput['compute_clips_per_s']:.1f} without the {100 * throughput['data_wait_share']:.1f} % "
            f"waiting for data)"
        )
        self.say(
            f"everything lies in {self.run_dir}/: metrics.jsonl predictions.csv config.json log.txt checkpoints/ "
            "best_WAR.safetensors best_UAR.safetensors"
        )
        path = self.run_dir / "predictions.csv"
        self._wandb.result(confusion, lambda: read_predictions(path), self._num_rows - 1)

    def close_progress(self) -> None:
        """Stop the terminal's progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Stop the progress bar, end W&B's recording and close the files."""
        if self.run_dir is None or self._wandb is None:
            return
        self.close_progress()
        self._wandb.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for file in (self._text, self._rows):
            with contextlib.suppress(OSError):  # what could not be written was said when it was
                file.close()


def endless_warm_up(config: Config) -> str | None:
    """Return what is to be said of a warm-up that the run does not outlast; None of any other."""
    optim = config.optim
    if optim.warmup_epochs < optim.epochs:
        return None
    return (
        f"--optim.warmup-epochs {optim.warmup_epochs:g}: as long as the run of {optim.epochs} epochs: the learning "
        "rate does nothing but rise; lower it"
    )


def print_result(title: str, confusion: ConfusionMatrix) -> None:
    """Print a small table: WAR, UAR, recall and clips per class, below each other where the terminal is narrow."""
    values = [confusion.war(), confusion.uar(), *confusion.per_class_recall().tolist()]
    shares = ["-" if math.isnan(v) else f"{v:.2f}" if i < 2 else f"{v:.1f}" for i, v in enumerate(values)]
    names = ("WAR", "UAR", *EMOTIONS)
    counts = ["clips", str(confusion.total()), *(str(n) for n in confusion.counts.sum(1).tolist())]
    wide, narrow = (Table(title=title, title_justify="left", show_header=heads) for heads in (True, False))
    for name in names:
        wide.add_column(name, justify="right", no_wrap=True)
    wide.add_row(*shares)
    wide.add_row(*counts, style="dim")
    for _ in range(3):
        narrow.add_column(justify="right", no_wrap=True)
    for row in zip(names, shares, counts, strict=True):
        narrow.add_row(*row)
    show_table(wide, narrow)


def _now(between: str = "T") -> str:
    """Return date, time and zone."""
    return datetime.now().astimezone().isoformat(between, "seconds")


def _cut_back(path: Path, step: int, evaluated: bool) -> list[dict]:
    """Drop the rows after the checkpoint that a run continues from, which are written again. Return those kept.

    A row that a kill has torn is dropped too: rows are on the disk before a checkpoint that counts on them.
    """
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            at = row["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if at < step or (at == step and step and (evaluated or "val/WAR" not in row)):
            kept.append(row)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
