"""Killed, stopped and continued runs are the unbroken run, bit for bit."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfer.config import parse_config
from dfer.lists.index import load_index
from dfer.plan.sampling import ClipSampler
from dfer.run.checkpoint import load_checkpoint
from dfer.run.folder import same_global_batch
from tests.conftest import TORCHRUN, nursery, run_python
from tests.nursery import python_path
from tests.test_train import losses, rows

# A CRF, batch statistics and dropout, as the full model has them, at a fraction of its size; 5 steps of 4 clips.
SMALL = [
    "debug", "--data.size", "32", "--data.num-segments", "2", "--data.batch-size", "2", "--model.dim", "16",
    "--model.backbone", "test_resnet", "--optim.epochs", "2", "--optim.steps-per-epoch", "5", "--optim.accumulate", "2",
    "--optim.ema", "0.5", "--run.log-every", "2", "--run.device", "cpu", "--run.amp", "off", "--run.save-minutes", "0",
]  # fmt: skip

# Plays train.py once per word of its first argument, in a process each, imported once: a fork has nothing else in it.
# Under torchrun the word is that of the attempt, and happens to the last rank. "3" kills it in its third batch, "3s" at
# its third replacement of a file, "3e" at the third batch or step counted; "3t", "3i", "3u" send a signal in the third
# batch, "3v" at the third batch or step counted; "3n" makes all losses from the third on NaN, "3m" that one infinite;
# "3l" sends a signal and makes that step take 9 s; "3o" lets memory run out there, "3h" stops the process, which then
# neither ends nor answers, "3w" does so at the third batch or step counted; "-" lets it run.
DRIVER = """
import os, signal, sys, time
import torch
import train, dfer.files
from dfer.cli import one_line_errors
from dfer.config import parse_config
from dfer.optim.guard import NonFiniteGuard

torch.set_num_threads(1)
train.COMMAND = True
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

def send(number):
    return lambda: os.kill(os.getpid(), number)

def take_long():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)

def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")

train.print_report = lambda *_: None  # half of the time of a small run, and of no interest here

def prepare(word):
    NonFiniteGuard.LIMIT = 3
    if word == "-":
        return
    kind = word.lstrip("0123456789")
    number = int(word.removesuffix(kind))
    if kind == "s":
        dfer.files.os.replace = at(number, os.replace, send(signal.SIGKILL))
    elif kind in ("e", "v", "w"):
        then = send({"e": signal.SIGKILL, "v": signal.SIGTERM, "w": signal.SIGSTOP}[kind])
        train.StopSignals.requested = at(number, train.StopSignals.requested, then)
    elif kind in ("n", "m"):
        loss = train.training_loss
        calls = 0
        def poisoned(*args):
            nonlocal calls
            calls += 1
            value, diagnostics = loss(*args)
            if kind == "m" and calls == number:
                value = value + torch.inf  # the gradient is that of a loss as it should be
            return value * (torch.nan if kind == "n" and calls >= number else 1), diagnostics
        train.training_loss = poisoned
    else:
        then = {"": send(signal.SIGKILL), "h": send(signal.SIGSTOP), "o": out_of_memory, "l": take_long}.get(kind)
        then = then or send(SENT[kind])
        train.training_loss = at(number, train.training_loss, then)

def note_the_ids():
    loss = train.training_loss
    rank = os.environ.get("RANK", "0")
    def noting(job, batch):
        with open(f"{os.environ['IDS']}-{rank}", "a") as file:
            print(*batch.ids.tolist(), file=file)
        return loss(job, batch)
    train.training_loss = noting

loss_of_a_batch, settle = train.training_loss, train.distributed.settle_buckets

def settle_uncounted(*args):
    counted, train.training_loss = train.training_loss, loss_of_a_batch
    settle(*args)
    train.training_loss = counted

train.distributed.settle_buckets = settle_uncounted

def run():
    if "IDS" in os.environ:
        note_the_ids()
    return one_line_errors("train.py", lambda: train.main(parse_config(sys.argv[2:])))

words = sys.argv[1].split(",")
if "RANK" in os.environ:
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    prepare(words[int(os.environ["TORCHELASTIC_RESTART_COUNT"])] if last else "-")
    sys.exit(run())
codes = []
for word in words:
    child = os.fork()
    if not child:
        prepare(word)
        code = run()
        sys.stdout.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("codes", *codes)
"""


def play(words, clips, log_dir, *extra, **env):
    """The exit codes of the processes, and what they printed."""
    command, env = order([], words, clips, log_dir, extra, env)
    done = nursery().run(["-c", DRIVER, *command], env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(c) for c in done.stdout.splitlines()[-1].split()[1:]], done.stdout + done.stderr


def play_together(processes, words, clips, log_dir, *extra, **env):
    """The same under torchrun, which is to start the processes again for each further word."""
    (log_dir / "driver.py").write_text(DRIVER)
    launcher = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={words.count(',')}"]
    command, env = order([*TORCHRUN, *launcher, str(log_dir / "driver.py")], words, clips, log_dir, extra, env)
    return nursery().run(command, env, timeout=300)


def order(launcher, words, clips, log_dir, extra, env):
    """The words of a command, and its environment."""
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    command = [*launcher, words, *SMALL, *lists, "--run.log-dir", str(log_dir / "logs"), *extra]
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **env}


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


def assert_ends_as(run_dir, unbroken):
    found, state = what_was_computed(run_dir)
    assert found == unbroken[0]
    assert_same(state, unbroken[1])


# What draws or remembers anything of its own.
OTHERWISE = (
    "--optim.schedule", "multistep", "--optim.decay-epochs", "1", "--optim.min-lr", "1e-5", "--data.balance", "full",
    "--optim.layer-decay", "0.7", "--loss.kind", "logit-adjusted", "--data.augmentation.mixup", "0.8",
    "--data.augmentation.cutmix", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    play("-", clips, folder, "--run.name", "x")
    computed = what_was_computed(folder / "logs" / "x")
    assert len(computed[0]) == 8 and len(losses(folder / "logs" / "x")) == 6
    return computed


@pytest.mark.parametrize(
    "words",
    [
        "4,1,3,2,5,-",  # batches, two per step: five times in one epoch
        "5s,3s,4s,2s,7s,2e,10e,-",  # in the middle of saving, before and in an evaluation
    ],
)
def test_killed_runs_end_as_the_unbroken_one(unbroken, clips, tmp_path, words):
    codes, printed = play(words, clips, tmp_path, "--run.name", "x")
    assert codes == [-9] * (len(codes) - 1) + [0], printed
    assert_ends_as(tmp_path / "logs" / "x", unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "lion"])
def test_killed_runs_with_other_options_end_as_the_unbroken_one(clips, tmp_path, optimizer):
    extra = ("--run.name", "x", *OTHERWISE, "--optim.optimizer", optimizer)
    for folder in ("whole", "pieced"):
        (tmp_path / folder).mkdir()
    play("-", clips, tmp_path / "whole", *extra)
    codes, printed = play("4,3,2,-", clips, tmp_path / "pieced", *extra)
    assert codes == [-9, -9, -9, 0], printed
    assert printed.count("balance full: clips that an epoch takes, of so many videos: ") >= 3
    assert_ends_as(tmp_path / "pieced" / "logs" / "x", what_was_computed(tmp_path / "whole" / "logs" / "x"))


def test_stopped_runs_lose_no_step_and_end_as_the_unbroken_one(unbroken, clips, tmp_path):
    codes, printed = play("3t,1u,2i,3v,-", clips, tmp_path, "--run.name", "x", "--run.save-minutes", "1000")
    assert codes == [75, 75, 75, 75, 0], printed
    stops = re.findall(r"stopped by a signal after step (\d+); it goes on by: .* --run.name x", printed)
    assert stops == ["2", "3", "4", "5"]  # the last one is in the evaluation after the fifth step
    assert printed.count("continuing from step") == 4
    assert_ends_as(tmp_path / "logs" / "x", unbroken)


@pytest.mark.slow
def test_on_a_busy_machine_five_signals_lose_no_step(unbroken, clips, tmp_path):
    """Three processes that do nothing else beside it, and steps that take 9 s: where one had ended after 8."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        codes, printed = play("3l,1u,3i,2t,3v,-", clips, tmp_path, "--run.name", "x", "--run.save-minutes", "1000")
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert codes == [75, 75, 75, 75, 75, 0], printed
    stops = re.findall(r"stopped by a signal after step (\d+)", printed)
    assert re.findall(r"continuing from step (\d+)", printed) == stops and len(stops) == 5
    assert_ends_as(tmp_path / "logs" / "x", unbroken)


def test_a_damaged_checkpoint_costs_its_steps_and_a_torn_row_nothing(unbroken, clips, tmp_path):
    run_dir = tmp_path / "logs" / "x"
    play("9t", clips, tmp_path, "--run.name", "x")
    newest = max(run_dir.glob("checkpoints/*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/lo')
    codes, printed = play("-", clips, tmp_path, "--run.name", "x")
    assert codes == [0] and f"{newest}: damaged" in printed and "an older checkpoint is used" in printed
    assert_ends_as(run_dir, unbroken)


def five_kills(seed: int) -> str:
    """At random steps of an epoch of 5; the same step may be struck again."""
    steps = sorted(random.Random(seed).choices(range(1, 6), k=5))
    return "".join(f"{step - before + 1}," for before, step in itertools.pairwise([1, *steps])) + "-"


@pytest.mark.slow  # test_another_number_of_processes_takes_the_same_clips is not
@pytest.mark.parametrize(("processes", "words"), [(2, "2,-"), (2, "2,2t,-"), *((n, five_kills(n)) for n in (1, 2, 4))])
def test_processes_killed_and_started_again_end_as_unbroken_ones(clips, tmp_path, processes, words):
    """What happens to the last rank ends them all; torchrun starts them again, in the folder that nobody has named."""
    for folder in ("whole", "pieced"):
        (tmp_path / folder).mkdir()
        extra = ("--optim.accumulate", "1", "--data.batch-size", str(4 // processes))
        arguments = (words if folder == "pieced" else "-", clips, tmp_path / folder, *extra)
        if processes == 1:  # without torchrun, which would remember the name
            codes, printed = play(*arguments, "--run.name", "x")
        else:
            done = play_together(processes, *arguments)
            codes, printed = [done.returncode], done.stdout + done.stderr
        assert codes[-1] == 0, printed
    (whole,), (pieced,) = ((tmp_path / folder / "logs").iterdir() for folder in ("whole", "pieced"))
    all_words = words.split(",")
    (begun, *_) = (attempt for attempt, word in enumerate(all_words) if word != "1")  # the first that left a checkpoint
    assert printed.count("continuing from step") == len(all_words) - 1 - begun and len(losses(whole)) == 6
    assert_ends_as(pieced, what_was_computed(whole))


BALANCED = ("--data.balance", "full", "--data.augmentation.cutmix", "1")


@pytest.mark.parametrize(
    ("worlds", "more"),
    [
        ((2, 1), ()),
        pytest.param((4, 2, 1, 4), (), marks=pytest.mark.slow),
        pytest.param((1, 2, 1), BALANCED, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_takes_the_same_clips(clips, tmp_path, worlds, more):
    """Each but the last is stopped; that a signal of step 2 is known to all ranks at step 3 is no matter here."""
    extra = ("--run.name", "x", "--optim.accumulate", "1", "--data.batch-size", str(4 // worlds[0]), *more)
    found = []
    for part, processes in enumerate(worlds):
        word, ids = "-" if part == len(worlds) - 1 else "2t", str(tmp_path / f"ids {part}")
        arguments = (word, clips, tmp_path, *extra, "--run.save-minutes", "1000")
        if processes == 1:
            codes, printed = play(*arguments, IDS=ids)
            assert codes == [0 if word == "-" else 75], printed
        else:
            done = play_together(processes, *arguments, IDS=ids)
            printed = done.stdout + done.stderr
            assert (done.returncode, "exitcode  : 75" in printed) == ((0, False) if word == "-" else (1, True)), printed
        share = f"continuing from step {len(found)}, with {4 // processes} clips per step on each of {processes} proc"
        assert (share in printed) == (part > 0), printed
        ranks = [[r.split() for r in Path(f"{ids}-{rank}").read_text().splitlines()] for rank in range(processes)]
        found += [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)]
        assert len(found) < 10 or word == "-"

    config, index = parse_config([*SMALL, *more]).data, load_index(clips / "train.txt")
    shape = config.num_segments, config.frames_per_segment
    sampler = ClipSampler(0, *shape, "train", config.augmentation, balance=config.balance)
    plans = [sampler.plan(epoch, index.num_frames, index.labels) for epoch in (0, 1)]
    orders = [plan.video[plan.order].astype(str).tolist() for plan in plans]
    assert found == [order[i : i + 4] for order in orders for i in range(0, 20, 4)]


def test_a_run_keeps_its_clips_per_step():
    def shares(given: int, processes: int) -> int:
        command = parse_config([*SMALL, "--run.name", "x", "--data.batch-size", str(given)])
        state = {"config": parse_config(SMALL).to_json(), "global_batch": 4}
        return same_global_batch(command, state, processes).data.batch_size

    # begun with --data.batch-size 2 on two processes
    assert [shares(*case) for case in ((2, 2), (2, 1), (4, 1), (2, 4), (1, 4))] == [2, 4, 4, 1, 1]
    with pytest.raises(ValueError, match="x has 4 clips per step, which 3 processes cannot share evenly"):
        shares(2, 3)
    with pytest.raises(ValueError, match=r"--data\.batch-size 3: on 1 processes that is 3 clips per step, but x has 4"):
        shares(3, 1)


def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(clips, tmp_path):
    """The last rank's loss is infinite once: both ranks skip that step, and are one model afterwards."""
    done = play_together(2, "3m", clips, tmp_path, "--run.name", "x", "--optim.clip-norm", "0")
    assert done.returncode == 0, done.stderr
    written = rows(tmp_path / "logs" / "x")
    assert [r["train/skipped_steps"] for r in written if "train/loss" in r] == [1, 1]
    assert all(r["train/loss"] is not None for r in written if "train/loss" in r)
    state = load_checkpoint(tmp_path / "logs" / "x")
    assert state["skipped"].tolist() == [1, 0] and state["optimizer"]["state"][0]["step"] == state["step"] - 1


def test_nothing_but_skipped_steps_ends_the_run_and_spares_the_checkpoint(clips, tmp_path):
    codes, printed = play("5n", clips, tmp_path, "--run.name", "x")
    assert codes == [2]
    run_dir = tmp_path / "logs" / "x"
    (line,) = (line for line in printed.splitlines() if line.startswith("train.py: "))
    assert "step 5: 3 steps in a row were skipped" in line and str(run_dir / "skipped_steps.json") in line
    dump = json.loads((run_dir / "skipped_steps.json").read_text())
    assert dump["step"] == 5 and len(dump["clips"]) == 2 and "head.2.bias" in dump["gradients that are not finite"]
    assert not dump["weights that are not finite"]
    state = load_checkpoint(run_dir)
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["model"].values() if t.is_floating_point())


def test_memory_that_runs_out_is_one_line_that_says_what_to_change(clips, tmp_path):
    codes, printed = play("2o", clips, tmp_path, "--run.name", "x")
    (line,) = (line for line in printed.splitlines() if line.startswith("train.py: "))
    assert codes == [2] and "out of memory with 2 clips of T = 2 frames of 32 px per process" in line


BLOCKED = """
import ctypes, os, signal, sys, threading
import torch
from dfer.run import distributed, signals
signals.GRACE_S = 0.3
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
with signals.StopSignals(distributed.World(0, 1, 0, 1, torch.device("cpu"))) as stop:
    stop.saved = sys.argv[1] == "saved"
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, in a library: Python itself never sees the signal
"""


@pytest.mark.parametrize(("saved", "code"), [("saved", 75), ("not saved", 70)])
def test_a_process_that_cannot_stop_ends(saved, code):
    done = run_python("-c", BLOCKED, saved, timeout=60, fresh=False)
    assert done.returncode == code and ("the last checkpoint counts" in done.stderr) == (code == 70)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["4h", "4w"])
def test_a_rank_that_hangs_ends_the_run_by_name(clips, tmp_path, word):
    """In training and in an evaluation. torchrun itself takes half a minute to kill the process that hangs."""
    done = play_together(2, word, clips, tmp_path, "--run.name", "x", "--run.timeout", "15")
    assert done.returncode == 1
    assert "train.py: rank 0: rank 1 of 2 died or did not answer within --run.timeout" in done.stderr
    assert load_checkpoint(tmp_path / "logs" / "x")["step"] == 1


def test_a_rank_that_dies_is_named(clips, tmp_path):
    done = play_together(2, "5", clips, tmp_path, "--run.name", "x")
    assert done.returncode == 1
    assert "train.py: rank 0: rank 1 of 2 died or did not answer" in done.stderr, done.stderr
    assert load_checkpoint(tmp_path / "logs" / "x")["step"] == 2
