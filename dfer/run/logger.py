"""What a run tells: the terminal, `logs/<run>/log.txt` and `metrics.jsonl` (the record), Weights & Biases (a view)."""

import contextlib
import csv
import io
import json
import math
import netrc
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from dfer.cli import UserError
from dfer.config import Config
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import ClipIndex
from dfer.metrics import ConfusionMatrix, peak_memory
from dfer.report.records import Predictions, read_predictions
from dfer.run.checkpoint import write_whole

if TYPE_CHECKING:
    import wandb

# What W&B draws each row's values over: training by step, evaluations by epoch, which is the same for runs with other
# numbers of clips per step. Every row has both. No summary="max" here: a continued run forgets its maximum.
AXES = {"train/*": "step", "throughput/*": "step", "crf/*": "step", "val/*": "epoch"}
HARDEST = 50  # clips in W&B's table


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
        """A run is logged from `start_step` on, and from after its evaluation there if that is in the checkpoint."""
        self.run_dir, self._config = run_dir, config
        self._console = Console(highlight=False, quiet=run_dir is None)
        self._pending: tuple[int, dict[str, float], list[str], Tensor] | None = None
        self._total_steps, self._start_step, self._started = total_steps, start_step, time.perf_counter()
        self._wandb, self._wandb_next = None, 0
        self.wandb_id: str | None = wandb_id
        self._progress = None
        if run_dir is None:
            return
        try:
            earlier = _cut_back(run_dir / "metrics.jsonl", start_step, start_evaluated)
            self._text = open(run_dir / "log.txt", "a", buffering=1)  # noqa: SIM115 (closed in close)
            self._rows = open(run_dir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{run_dir}: cannot write ({error})") from None
        self._num_rows = len(earlier)
        self._open_wandb(earlier, wandb_id, done=start_evaluated and start_step == total_steps)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=start_step)
            self._progress.start()

    def _open_wandb(self, earlier: list[dict], wandb_id: str | None, done: bool) -> None:
        """Start W&B, or go on without: it must never prompt, block or stop a run.

        A row has the same number there as in metrics.jsonl. So a continued run skips what W&B has already, and sends
        what a killed process did not get there.
        """
        mode = self._config.run.wandb
        if mode == "off":
            return
        if mode == "auto":
            mode = "online" if has_wandb_key() else "offline"
        folders = list((self.run_dir / "wandb").glob("*run-*/"))  # of earlier processes
        unsent = [f for f in folders if f.name.startswith("offline-") and not list(f.glob("*.synced"))]
        if done and (unsent or mode == "offline"):
            return  # the folder of the process that ended the run has its tables
        import wandb  # its import costs a second, which a run without it need not pay

        id_file = self.run_dir / "wandb-id.txt"
        if not id_file.exists():
            # A sweep's agent has named the run already, and would not let another name pass.
            swept = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
            text = wandb_id or swept or secrets.token_hex(4)
            write_whole(id_file, lambda file: file.write(text.encode()))
        self.wandb_id = id_file.read_text()
        about = _grouping(self._config)
        fold = [f"fold{about['fold']}"] if about["fold"] else []
        options = {
            "project": "dfer",
            "group": "-".join([about["dataset"], *fold]),
            "job_type": "train",
            "tags": [about["dataset"], *fold, f"seed{self._config.seed}", self._config.model.name],
            "name": self.run_dir.name,
            "id": self.wandb_id,
            "dir": self.run_dir,
            "config": json.loads(self._config.to_json()) | about,
            "resume": "allow",
        }
        # Bounded delays at both ends; no terminal capture, no git or machine details beyond what the run logs itself.
        settings = wandb.Settings(init_timeout=30, finish_timeout=60, console="off", silent=True, disable_git=True)
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                run = wandb.init(mode=attempt, settings=settings, **options)
                for names, axis in AXES.items():
                    run.define_metric(names, step_metric=axis)
                # Nobody can say what a process got into its folder offline. Where W&B has all else, or nothing was sent
                # yet, this process records the rows again, and what is unsent goes where `wandb sync` does not look.
                # Otherwise that is taken for all rows up to the checkpoint.
                whole = attempt == "online" or unsent == folders
                for folder in unsent if whole else ():
                    (folder.parent / "replaced").mkdir(exist_ok=True)
                    folder.rename(folder.parent / "replaced" / folder.name)
            except Exception as error:  # network, key, disk: all of them mean "not this way"
                reason = str(error).strip().splitlines() or [type(error).__name__]
                self.say(
                    f"W&B cannot record {attempt} ({reason[0]}){'; recording offline' if attempt == 'online' else ''}"
                )
                wandb.teardown()  # its service still holds the run's id
                for folder in set((self.run_dir / "wandb").glob("run-*/")) - set(folders):  # nothing was sent from it
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            self._wandb = run
            self._wandb_next = run.starting_step if whole else len(earlier)
            for number, values in enumerate(earlier):
                self._to_wandb(number, values)
            return

    def _to_wandb(self, number: int, values: dict[str, int | float | None]) -> None:
        if number >= self._wandb_next:
            self._tell_wandb(lambda run: run.log(values, step=number))

    def _tell_wandb(self, work: Callable[["wandb.Run"], None]) -> None:
        """Whatever goes wrong there is said and ends the recording there, not the training."""
        if self._wandb is None:
            return
        try:
            work(self._wandb)
        except Exception as error:
            self._wandb = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.say(f"W&B failed ({reason[0]}); nothing more goes there, {self._rows.name} has everything")

    def say(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        if self.run_dir is not None:
            self._console.print(line, markup=False, soft_wrap=True)
            self._write(self._text, f"{time.strftime('%H:%M:%S')} {line}\n")

    def _write(self, file: TextIO, line: str) -> None:
        try:
            file.write(line)
        except OSError as error:
            raise UserError(f"{file.name}: cannot write ({error.strerror}); the last checkpoint counts") from None

    def row(self, step: int, values: dict[str, int | float]) -> None:
        """One row of metrics.jsonl, which W&B gets too. What is not finite is null there."""
        if self.run_dir is None:
            return
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._write(self._rows, json.dumps(row) + "\n")
        self._to_wandb(self._num_rows, row)
        self._num_rows += 1

    def secure(self) -> None:
        """Put all rows so far on the disk: those before a checkpoint are not written again."""
        self.flush()
        if self.run_dir is not None:
            try:
                os.fsync(self._rows.fileno())
            except OSError as error:
                raise UserError(f"{self._rows.name}: cannot write ({error.strerror})") from None

    def train_row(self, step: int, epoch: int, values: dict[str, float], tensors: dict[str, Tensor]) -> None:
        """A row with values that still lie on the GPU. They are copied without waiting and written one row later."""
        self.flush()
        if self.run_dir is None:
            return
        stacked = torch.stack([t.detach().float() for t in tensors.values()])
        values = values | {"throughput/memory_gb": peak_memory(stacked.device) / 1e9}
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (step, {"epoch": epoch, **values}, list(tensors), host)
            self._event = event
        else:
            self._event = None
            self._pending = (step, {"epoch": epoch, **values}, list(tensors), stacked)
            self.flush()

    def flush(self) -> None:
        """Write the row that waits for its GPU values."""
        if self._pending is None:
            return
        step, values, names, host = self._pending
        self._pending = None
        if self._event is not None:
            self._event.synchronize()  # recorded a whole row ago: done long since
        values |= dict(zip(names, host.tolist(), strict=True))
        self.row(step, values)
        line = (
            f"epoch {values['epoch']}  step {step}/{self._total_steps}  loss {values['train/loss']:.3f}  "
            f"{values['throughput/total_clips_per_s']:.1f} clips/s  "
            f"data wait {100 * values['throughput/data_wait_share']:.0f} %"
        )
        if self._progress is not None:
            self._progress.update(self._task, description=line)
            self._write(self._text, f"{time.strftime('%H:%M:%S')} {line}\n")
        else:
            done = step - self._start_step
            left = (time.perf_counter() - self._started) / done * (self._total_steps - step)
            self.say(f"{line}  {int(left) // 60}:{int(left) % 60:02d} left")

    def step_done(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def best(self, best: dict[str, list[int | float]]) -> None:
        """Tell W&B, which by itself forgets the best value of a run that is continued."""
        values = {f"best/{name}": value for name, (value, _) in best.items()}
        self._tell_wandb(lambda run: run.summary.update(values))

    def result(
        self, confusion: ConfusionMatrix, throughput: dict[str, float], best: dict[str, list[int | float]]
    ) -> None:
        """The last thing printed: WAR, UAR, recall per class, clips/s, where everything lies."""
        if self.run_dir is None:
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
        path, last_row = self.run_dir / "predictions.csv", self._num_rows - 1  # W&B has no row more than metrics.jsonl
        self._tell_wandb(lambda run: run.log(_tables(confusion, read_predictions(path)), step=last_row))

    def close_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Stop the terminal's progress and close the files; W&B gets at most a minute."""
        if self.run_dir is None:
            return
        self.close_progress()
        self._tell_wandb(lambda run: run.finish())
        for file in (self._text, self._rows):
            with contextlib.suppress(OSError):  # said when it was written
                file.close()


def print_result(title: str, confusion: ConfusionMatrix) -> None:
    """A small table: WAR, UAR, recall and clips per class."""
    table = Table(title=title, title_justify="left", show_header=True)
    for column in ("WAR", "UAR", *EMOTIONS):
        table.add_column(column, justify="right", no_wrap=True)
    recalls = ["-" if math.isnan(r) else f"{r:.1f}" for r in confusion.per_class_recall().tolist()]
    table.add_row(f"{confusion.war():.2f}", f"{confusion.uar():.2f}", *recalls)
    counts = [str(n) for n in confusion.counts.sum(1).tolist()]
    table.add_row("clips", str(confusion.total()), *counts, style="dim")
    Console(highlight=False).print(table)


def _tables(confusion: ConfusionMatrix, predictions: Predictions) -> dict[str, "wandb.plot.CustomChart | wandb.Table"]:
    """What W&B shows of the last evaluation. Clips are told by their line: a person's name may be what they are called.

    The hardest clips are those whose own class got the lowest probability.
    """
    import wandb

    counts = confusion.counts.cpu().numpy()
    labels, predicted = np.nonzero(counts)
    repeats = counts[labels, predicted]
    plot = wandb.plot.confusion_matrix(
        y_true=np.repeat(labels, repeats).tolist(),
        preds=np.repeat(predicted, repeats).tolist(),
        class_names=list(EMOTIONS),
    )
    table = wandb.Table(["line of predictions.csv", "label", "prediction", "p(label)", "p(prediction)"])
    p_label = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
    for i in np.argsort(p_label, kind="stable")[:HARDEST].tolist():
        label, prediction = EMOTIONS[predictions.labels[i]], EMOTIONS[predictions.predicted[i]]
        table.add_data(i + 2, label, prediction, float(p_label[i]), float(predictions.probabilities[i].max()))
    return {"val/confusion_matrix": plot, "val/hardest_clips": table}


def _grouping(config: Config) -> dict[str, str | int | None]:
    """The data set, as the folder of its lists is called, and the fold if these are the lists of one."""
    path = config.data.train_list.absolute()
    folder = path.parent.parent if path.parent.name == "lists" else path.parent  # logs/NAME/lists of crossval.py
    fold = re.match(r"set_(\d+)_", path.name)
    return {"dataset": folder.name[:50] or "data", "fold": int(fold[1]) if fold else None}  # a tag may have 64 letters


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(re.search(r"wandb|coreweave", host) for host in hosts)


def _cut_back(path: Path, step: int, evaluated: bool) -> list[dict]:
    """Drop the rows after the checkpoint that a run continues from: they will be written again. Return those kept.

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
    write_whole(path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in kept).encode()))
    return kept


def write_predictions(
    path: Path, index: ClipIndex, ids: Sequence[int], probabilities: Sequence[Sequence[float]]
) -> None:
    """Write `clip,label,prediction,p_<emotion> ...` rows, whole or not at all.

    Raises:
        UserError: in one line, if they cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["clip", "label", "prediction", *(f"p_{e}" for e in EMOTIONS)])
    for video, p in zip(ids, probabilities, strict=True):
        record = index.records[video]
        writer.writerow([record.name, record.label, int(np.argmax(p)), *(f"{x:.6f}" for x in p)])
    try:
        write_whole(path, lambda file: file.write(text.getvalue().encode()))
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error})") from None
