"""Signals that ask a run to stop: which, where they can be caught, and what they leave in another program."""

import os
import signal
import threading

import pytest
import torch

from dfer.cli import EXIT_STOPPED
from dfer.run.distributed import World
from dfer.run.folds import drive
from dfer.run.signals import SIGNALS, StopSignals, restore
from tests.conftest import run_python
from tests.test_train import TINY

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


def state():
    """What of the process a library may not change."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    descriptors = len(os.listdir("/proc/self/fd"))
    return {n: signal.getsignal(n) for n in SIGNALS}, wakeup, threading.active_count(), descriptors


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_to_stop_and_leaves_no_trace_in_another_program(number):
    assert signal.SIGHUP in SIGNALS
    before = state()
    with StopSignals(WORLD, ends=False) as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert state() == before


def test_an_error_in_the_run_leaves_no_trace_either():
    before = state()
    with pytest.raises(ZeroDivisionError), StopSignals(WORLD, ends=False):
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_nobody_stops_leaves_no_trace(ends):
    before = state()
    with StopSignals(WORLD, ends=ends):
        threads = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    for thread in threads:
        thread.join(5)
    handlers, *others = state()
    restore(before[0])  # a process of our own keeps some, until it ends
    assert others == list(before[1:]) and (ends or handlers == before[0])


def test_a_hang_up_that_is_ignored_stays_so():
    """Under nohup the run is to go on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(WORLD, ends=False) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_thread_a_run_works_without_signals(tmp_path):
    found = []

    def work():
        with StopSignals(WORLD) as stop:
            found.append(stop.requested())
        found.append(drive([], [{}], tmp_path))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert found == [False, 0]


NOTEBOOK = """
import os, signal, sys, threading, time
import train
from dfer.config import parse_config
from dfer.run import signals
signals.GRACE_S = 0.3

def cell(name, *more):
    return train.main(parse_config([*sys.argv[1:], "--run.name", name, *more]))

def press_stop(of):
    step = of.train_epoch
    def stopped(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args)
    of.train_epoch = stopped

train.print_report = lambda *_: None
threads = [threading.Thread(target=lambda: codes.append(cell("thread", "--optim.epochs", "1")))]
codes = []
threads[0].start()
threads[0].join()
press_stop(train)
codes.append(cell("stopped"))
time.sleep(1)
print("codes", codes, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.slow
def test_a_notebook_outlives_the_runs_that_it_stops(clips, tmp_path):
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    done = run_python("-c", NOTEBOOK, *TINY, *lists, "--run.log-dir", str(tmp_path), timeout=120, fresh=False)
    assert done.returncode == 0 and "codes [0, 75] True" in done.stdout, done.stdout + done.stderr


FINISHED = """
import os, signal, sys
from dfer.cli import EXIT_STOPPED
from dfer.run.distributed import World
from dfer.run.signals import StopSignals
import torch
with StopSignals(World(0, 1, 0, 1, torch.device("cpu"))) as stop:
    stop.requested()
print("done", flush=True)
os.kill(os.getpid(), int(sys.argv[1]))
print("told", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_after_the_run_ends_the_process_as_one_that_has_saved(number):
    """Not as one that was killed: a scheduler would take the run for a failure."""
    done = run_python("-c", FINISHED, str(int(number)))
    assert (done.returncode, done.stdout) == (EXIT_STOPPED, "done\n"), done.stderr
