"""The job script, Slurm's commands played by small scripts: it launches, saves when told to leave, and requeues."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_resume import SMALL
from tests.test_train import losses

JOB = ROOT / "scripts" / "slurm" / "train.sbatch"


def job(tmp_path: Path, clips: Path, *words: str) -> subprocess.Popen:
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    for name, body in {
        # As srun does, it takes its own options, runs the command and hands signals on.
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@" & '
        'trap "kill -TERM $!" TERM; wait $!; code=$?; wait $! && exit 0; exit $code',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/scontrol.txt',
    }.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    port = str(20000 + os.getpid() % 20000)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node1", "JOB_NUM_NODES": "1", "GPUS_ON_NODE": "1", "CPUS_ON_NODE": "1"}
    lists = ["--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt"]
    with open(tmp_path / "out.txt", "a") as out:
        return subprocess.Popen(
            ["bash", str(JOB), *words, *lists, "--run.log-dir", str(tmp_path / "logs")],
            stdout=out, stderr=out, cwd=ROOT,
            env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "MASTER_PORT": port,
                 **{f"SLURM_{k}": v for k, v in slurm.items()}},
        )  # fmt: skip


@pytest.mark.slow
def test_a_job_that_must_leave_is_requeued_and_then_finishes(tmp_path, clips):
    words = [*SMALL, "--run.name", "x", "--optim.epochs", "3"]
    first = job(tmp_path, clips, *words)
    rows = tmp_path / "logs" / "x" / "metrics.jsonl"
    give_up = time.monotonic() + 90
    while not (rows.exists() and rows.read_bytes()) and first.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    first.send_signal(signal.SIGUSR1)
    said = (tmp_path / "out.txt").read_text
    assert first.wait(60) == 0, said()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n" and "stopped by a signal after step" in said()
    assert job(tmp_path, clips, *words).wait(120) == 0, said()
    assert "continuing from step" in said() and max(losses(tmp_path / "logs" / "x")) == 15


def test_a_job_needs_a_name(tmp_path, clips):
    assert job(tmp_path, clips, "debug").wait(20) == 2
    assert "--run.name NAME" in (tmp_path / "out.txt").read_text() and not (tmp_path / "logs").exists()
