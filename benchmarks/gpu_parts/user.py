"""`python train.py`, as somebody types it: begun, stopped by a signal in its second epoch, and continued."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_parts.rows import ROOT, Row, figure, read
from benchmarks.gpu_parts.setting import Setting

TRAIN = [sys.executable, "train.py"]
STOPPED = 75  # its exit code after a signal, with everything saved
EPOCHS = 2
POLL_S = 0.01
RATE = "throughput/total_clips_per_s"
TOLD = ("busy", "mfu", "data_wait_share", "step_ms", "memory_gb")  # beside it, where the run knows of it


def as_user(setting: Setting, batch: int | None = None) -> Iterator[Row]:
    """What a run logs last of its speed, with the batch that it takes by itself or another one, and how it ends.

    Right if it is stopped with everything saved, goes on by the same command, and has then evaluated each epoch once.

    Raises:
        RuntimeError: if it ends before it can be stopped.
    """
    run = setting.data / "user" / (f"B{batch}" if batch else "as-it-is")  # not where results lie: it weighs 500 MB
    shutil.rmtree(run, ignore_errors=True)
    command = [*TRAIN, *words_of(setting, run, batch)]
    stopped = stopped_in_second_epoch(command, run / "metrics.jsonl")
    ended = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode
    found, _ = read(run / "metrics.jsonl")
    size = json.loads((run / "config.json").read_text())["data"]["batch_size"]
    if speeds := [row for row in found if RATE in row]:
        last = {name.removeprefix("throughput/"): value for name, value in speeds[-1].items()}
        more = {name: last[name] for name in TOLD if name in last}
        yield figure(f"train.py as a user, B={size}", speeds[-1][RATE], "clips/s", step=last["step"], **more)
    epochs = [row["epoch"] for row in found if "val/WAR" in row]
    right = (stopped, ended, epochs) == (STOPPED, 0, [*range(1, EPOCHS + 1)])
    what = f"train.py stopped in its second epoch, B={size}"
    yield figure(what, stopped, "exit code", right=right, of_the_same_again=ended, evaluated_epochs=str(epochs))


def words_of(setting: Setting, run: Path, batch: int | None) -> list[str]:
    """The command's words but for the defaults, which are what is to be seen."""
    faces = setting.data / "faces"
    words = ["faces", "--data.train-list", str(faces / "long.txt"), "--data.val-list", str(faces / "test.txt")]
    words += ["--optim.epochs", str(EPOCHS), "--optim.steps-per-epoch", str(setting.user_steps)]
    words += ["--optim.warmup-epochs", "0.5", "--run.wandb", "off", "--run.log-dir", str(run.parent)]
    return [*words, "--run.name", run.name, *(["--data.batch-size", str(batch)] if batch else []), *setting.user_words]


def stopped_in_second_epoch(command: list[str], metrics: Path) -> int:
    """Begin a run, send it SIGTERM when the first evaluation is done, and return its exit code."""
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL) as process:
        while not any("val/WAR" in row for row in read(metrics)[0]):
            if process.poll() is not None:
                raise RuntimeError(f"train.py ended with exit code {process.returncode} before its second epoch")
            time.sleep(POLL_S)
        process.send_signal(signal.SIGTERM)
        return process.wait()
