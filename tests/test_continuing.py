"""--resume without a name finds the run that is meant, and a stopped run says by which command it goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dfer.cli import UserError
from dfer.config import parse_config
from dfer.run.continuing import continuing_command, parse_command
from tests.conftest import ROOT
from tests.test_train import TINY


@pytest.fixture
def leave(tmp_path):
    """A function that leaves a run of some words, the newest so far: stopped after `step`, of 8, or finished."""
    written = iter(range(10**9, 2 * 10**9))

    def leave(name, *words, step=3, evaluated=None):
        folder = tmp_path / "logs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.json").write_text(parse_config(list(words)).to_json())
        rows = [{"step": step, "train/loss": 1.0}]
        if evaluated is not None:
            rows.append({"step": step, "epoch": evaluated, "val/WAR": 50.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "checkpoints" / f"step-{step:08d}.json").touch()
        os.utime(folder / "checkpoints", (0, next(written)))

    return leave


def resumed(tmp_path, *words):
    return parse_command([*words, "--resume", "--run.log-dir", str(tmp_path / "logs")]).run.name


def test_the_newest_unfinished_run_of_the_same_configuration(leave, tmp_path):
    leave("older", "debug")
    leave("first epoch done", "debug", step=4, evaluated=1)
    leave("all done", "debug", step=8, evaluated=2)
    leave("another rate", "debug", "--optim.lr", "0.01")
    leave("another preset", "faces")
    leave("another list", "debug", "--data.train-list", "fold2.txt")
    (tmp_path / "logs" / "no run").mkdir()
    (tmp_path / "logs" / "torn" / "checkpoints").mkdir(parents=True)
    (tmp_path / "logs" / "torn" / "checkpoints" / "step-00000001.json").touch()
    (tmp_path / "logs" / "torn" / "config.json").write_text("{")
    (tmp_path / "logs" / "a file").touch()
    assert resumed(tmp_path, "debug") == "first epoch done"
    assert resumed(tmp_path) == "another preset"
    assert resumed(tmp_path, "debug", "--optim.lr", "1e-2") == "another rate"
    assert resumed(tmp_path, "debug", "--data.train-list", f"{os.getcwd()}/fold2.txt") == "another list"
    free = ("--run.wandb", "offline", "--run.save-minutes", "1", "--data.batch-size", "4")
    assert resumed(tmp_path, "debug", *free) == "first epoch done"


def test_an_evaluation_that_was_not_saved_is_not_the_end(leave, tmp_path):
    leave("evaluated", "debug", step=8, evaluated=2)
    (tmp_path / "logs" / "evaluated" / "checkpoints" / "step-00000008.json").rename(
        tmp_path / "logs" / "evaluated" / "checkpoints" / "step-00000007.json"
    )
    assert resumed(tmp_path, "debug") == "evaluated"


def test_where_there_is_none_the_nearest_is_named(leave, tmp_path):
    with pytest.raises(UserError, match="has no unfinished run of this configuration; say which"):
        resumed(tmp_path, "debug")
    leave("a", "debug", "--seed", "3")
    with pytest.raises(UserError, match="; a is another: --seed was 3, is 0; say which with"):
        resumed(tmp_path, "debug")


def test_rank_0_alone_looks(leave, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert resumed(tmp_path, "debug") is None


@pytest.mark.parametrize(
    ("argv", "env", "log_dir", "command"),
    [
        ("train.py", {}, "logs", "{python} train.py --run.name 'a b'"),
        ("/app/train.py", {}, "/d/runs", "{python} /app/train.py --run.name 'a b' --run.log-dir /d/runs"),
        ("/usr/bin/dfer", {}, "logs", "dfer train --run.name 'a b'"),
        ("train.py", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}, "logs",
         "torchrun --nproc_per_node=4 train.py --run.name 'a b'"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on(monkeypatch, argv, env, log_dir, command):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", [argv])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert continuing_command(Path(log_dir) / "a b") == command.format(python="/usr/bin/python3")
    monkeypatch.setattr(sys, "executable", f"{os.getcwd()}/.venv/bin/python")
    assert continuing_command(Path(log_dir) / "a b") == command.format(python=".venv/bin/python")


@pytest.mark.slow
@pytest.mark.parametrize("again", ["the command that it has said", "--resume"])
def test_a_run_without_a_name_is_stopped_and_goes_on(clips, tmp_path, again):
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    words = [sys.executable, str(ROOT / "train.py"), *TINY, *lists, "--optim.epochs", "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "  step 1/" in line:
                process.send_signal(signal.SIGHUP)
    assert process.returncode == 75 and "it goes on by: " in line
    command = shlex.split(line.split("it goes on by: ")[1]) if again != "--resume" else [*words, "--resume"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    (run,) = (tmp_path / "logs").iterdir()
    assert done.returncode == 0 and f"logs/{run.name}: continuing from step" in done.stdout, done.stdout + done.stderr
