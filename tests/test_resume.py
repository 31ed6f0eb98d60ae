"""Killed, stopped and continued runs are the unbroken run, bit for bit."""

import os
import subprocess
import sys

import pytest
import torch

from dfer.checkpoint import load_checkpoint
from tests.conftest import ROOT
from tests.test_train import losses, rows

# A CRF, batch statistics and dropout, as the full model has them, at a fraction of its size; 5 steps of 4 clips.
SMALL = [
    "debug", "--data.size", "32", "--data.num-segments", "2", "--data.batch-size", "2", "--model.dim", "16",
    "--model.backbone", "test_resnet", "--optim.epochs", "2", "--optim.steps-per-epoch", "5", "--optim.accumulate", "2",
    "--optim.ema", "0.5", "--run.log-every", "2", "--run.device", "cpu", "--run.amp", "off", "--run.save-minutes", "0",
]  # fmt: skip

# Plays train.py once per word of its first argument, in a process each, imported once: a fork has nothing else in it.
# "3" kills it in its third batch, "3s" while it saves for the third time, "3e" in the third batch of an evaluation,
# "-" never; other letters of the alphabet send a signal in the batch of that number.
DRIVER = """
import os, signal, sys
import torch
import train, dfer.checkpoint
from dfer.config import parse_config

torch.set_num_threads(1)
SENT = {"t": signal.SIGTERM, "i": signal.SIGINT, "u": signal.SIGUSR1}

def at(number, function, then):
    calls = 0
    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            then()
        return function(*args, **kwargs)
    return counting

def prepare(word):
    if word == "-":
        return
    kind = word.lstrip("0123456789")
    number = int(word.removesuffix(kind))
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if kind == "s":
        dfer.checkpoint.os.replace = at(number, os.replace, kill)
    elif kind == "e":
        train.StopSignals.requested = at(number, train.StopSignals.requested, kill)
    else:
        send = kill if not kind else lambda: os.kill(os.getpid(), SENT[kind])
        train.training_loss = at(number, train.training_loss, send)

codes = []
for word in sys.argv[1].split(","):
    child = os.fork()
    if not child:
        prepare(word)
        code = train.one_line_errors("train.py", lambda: train.main(parse_config(sys.argv[2:])))
        sys.stdout.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("codes", *codes)
"""


def play(words, clips, log_dir, name, *extra):
    """The exit codes of the processes, and what they printed."""
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    command = [sys.executable, "-c", DRIVER, words, *SMALL, *lists, "--run.log-dir", str(log_dir), "--run.name", name]
    done = subprocess.run(
        [*command, *extra],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(c) for c in done.stdout.splitlines()[-1].split()[1:]], done.stdout + done.stderr


def what_was_computed(run_dir):
    """All rows without the clock's, floats as bits; weights, averages and moments."""
    kept = [{k: v for k, v in row.items() if "throughput" not in k and "per_s" not in k and "wait" not in k}
            for row in rows(run_dir)]  # fmt: skip
    state = load_checkpoint(run_dir)
    del state["config"]  # which folder the run has is of no interest
    return [{k: float(v).hex() for k, v in row.items()} for row in kept], state


def assert_same(a, b, name="state"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}.{i}")
    else:
        assert a == b, name


@pytest.fixture(scope="module")
def unbroken(clips, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("unbroken")
    play("-", clips, log_dir, "x")
    computed = what_was_computed(log_dir / "x")
    assert len(computed[0]) == 8 and len(losses(log_dir / "x")) == 6
    return computed


@pytest.mark.parametrize(
    "words",
    [
        "4,1,3,2,5,-",  # batches, two per step: the second epoch begins with the fourth process
        "5s,3s,4s,2s,7s,2e,10e,-",  # in the middle of saving, before and in an evaluation
    ],
)
def test_killed_runs_end_as_the_unbroken_one(unbroken, clips, tmp_path, words):
    codes, printed = play(words, clips, tmp_path, "x")
    assert codes == [-9] * (len(codes) - 1) + [0], printed
    found = what_was_computed(tmp_path / "x")
    assert found[0] == unbroken[0]
    assert_same(found[1], unbroken[1])
