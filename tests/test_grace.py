"""How long a signal waits for the step: three of the longest, as --run.grace says, or at a terminal without an end."""

import pytest

from dfer.config import parse_config
from dfer.run import signals
from tests.conftest import run_python

# Takes steps of so many seconds and saves for 0.3 s when it is asked to stop. Signals come at the times that are given,
# from the second step's beginning.
RUN = """
import os, pty, signal, sys, threading, time
import torch
from dfer.run import signals
from dfer.run.distributed import World

at, steps, least, grace, terminal = eval(sys.argv[1])
signals.GRACE_S, signals._SAME_KEY_S = least, 0.3
if terminal:
    os.dup2(pty.openpty()[1], 0)
with signals.StopSignals(World(0, 1, 0, 1, torch.device("cpu")), grace=grace) as stop:
    for number, seconds in enumerate(steps):
        if number == 1:
            for when, name in at:
                threading.Timer(when, os.kill, (os.getpid(), getattr(signal, name))).start()
        time.sleep(seconds)
        stop.unsaved += 1
        if stop.requested():
            time.sleep(0.3)
            stop.saved = True
            print("stopped after step", number + 1, flush=True)
            os._exit(75)
"""

ONE, TWICE = [(0.1, "SIGINT")], [(0.1, "SIGINT"), (0.7, "SIGINT")]
FIRST = "the last checkpoint counts; steps lost since: 1"
CASES = {
    # signals, steps, least grace, --run.grace, terminal: what is said, exit code
    "a step as long as the longest": (([(0.1, "SIGTERM")], [0.4, 0.5, 9], 0.05, 0, False), "stopped after step 2", 75),
    "a longer one, and saving": (([(0.1, "SIGHUP")], [0.5, 1.2, 9], 0.05, 0, False), "stopped after step 2", 75),
    "a step that never ends": (([(0.1, "SIGTERM")], [0.1, 9], 0.2, 0, False), f"s of SIGTERM; {FIRST}", 70),
    "the option": (([(0.1, "SIGUSR1")], [0.3, 9], 0.05, 0.25, False), f"0.25 s of SIGUSR1; {FIRST}", 70),
    "the option at a terminal": ((ONE, [0.6, 9], 0.05, 0.25, True), "no step ended within 0.25 s of SIGINT", 70),
    "Ctrl-C": ((ONE, [0.1, 1.2, 9], 0.05, 0, True), "stopped after step 2", 75),
    "Ctrl-C without a terminal": ((ONE, [0.1, 9], 0.05, 0, False), "of SIGINT", 70),
    "Ctrl-C twice": ((TWICE, [0.1, 9], 0.05, 0, True), f"ended by a second Ctrl-C; {FIRST}", 70),
    "one that came twice": ((2 * ONE, [0.1, 1.2, 9], 0.05, 0, True), "stopped after step 2", 75),
    "Ctrl-C, and then the machine ends": (([*ONE, (0.6, "SIGTERM")], [0.1, 9], 0.05, 0, True), "s of SIGTERM", 70),
}


# Each takes a second of waiting: the others come with the slow tests.
USUAL = ("a step as long as the longest", "the option", "Ctrl-C twice")


@pytest.mark.parametrize("case", [c if c in USUAL else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_signal_waits_for_the_step(case):
    arguments, said, code = CASES[case]
    done = run_python("-c", RUN, repr(arguments), fresh=False, timeout=60)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr
    assert ("Ctrl-C once more ends it" in done.stderr) == (
        arguments[0][0][1] == "SIGINT" and arguments[3:] == (0, True)
    )


def test_a_launcher_presses_ctrl_c_itself(monkeypatch):
    monkeypatch.setattr("os.isatty", lambda number: True)
    assert signals._at_terminal()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not signals._at_terminal()


def test_the_option_belongs_to_the_command(tmp_path):
    words = ["debug", "--run.log-dir", str(tmp_path), "--run.name", "a"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(parse_config(words).to_json())
    (tmp_path / "a" / "metrics.jsonl").write_text("{}")
    assert parse_config([*words, "--run.grace", "8"]).run.grace == 8
