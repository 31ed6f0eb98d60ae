"""Starts scripts of the repository in forked processes, so that their libraries are imported once and not each time.

Of the five seconds of a small run of train.py, three are imports. A fork has nothing else in it: its own working
directory, environment, standard streams and exit code; `python FILE` itself is what the tests with `fresh=True` start.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SERVER = """
import atexit, contextlib, importlib, json, os, runpy, sys, threading, traceback
import torch, timm, tyro
from torch.distributed.run import main as torchrun
import dali_pipes.build, dfer.evaluation, dfer.run.logger, dfer.run.folder
for name in ("matplotlib.pyplot", "dfer.report.page", "onnxruntime"):  # the ends of runs, and export
    with contextlib.suppress(ImportError):  # on a machine for a GPU's tests there are few packages
        importlib.import_module(name)

torch.set_num_threads(1)
ROOT = os.getcwd()
with contextlib.suppress(ImportError):
    import wandb.sdk.data_types._private as media  # timm has imported it
    # One folder for all children, which the first to end would delete.
    media.MEDIA_TMP._finalizer.detach()
    atexit.unregister(media.MEDIA_TMP.cleanup)

def play(order):
    os.setsid()
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number, name in enumerate((os.devnull, order["stdout"], order["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = open(0), open(1, "w")
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__ = sys.stdin, sys.stdout
    if not order["report"] and "dfer.report.page" in sys.modules:
        dfer.report.page.write_report = lambda run, *_: f"{run.path}/report.html, not written for this test"
    sys.path.remove(ROOT)  # a script finds it itself
    sys.path[:0] = ["", *filter(None, order["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv, sys.path[0] = order["words"], os.path.dirname(os.path.abspath(order["words"][0]))
    code = 0
    try:
        if order["words"][0] == "-c":
            exec(compile(sys.argv.pop(1), "-c", "exec"), {"__name__": "__main__"})
        elif order["words"][0] == "-m":
            sys.argv = ["torchrun", *order["words"][2:]]
            torchrun(sys.argv[1:])  # its processes are fresh ones: it has threads, beside which forks may hang
        else:
            runpy.run_path(order["words"][0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if not child:
        play(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def python_path() -> str:
    """Return a PYTHONPATH: the repository, and behind it what there is already, where libraries may lie."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


class Nursery:
    """One process that has imported what scripts import, and forks for each of them."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def run(
        self, words: list[str], env: dict[str, str], timeout: float, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess:
        """Run `python WORDS`: a script, -c CODE or -m torch.distributed.run.

        Training writes no report: that takes half of a small run.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
            order = {"words": words, "env": env, "cwd": str(cwd), "report": "scripts/" in words[0], **names}
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
            child = int(self._server.stdout.readline())
            try:
                code = self._wait(timeout)
            except BaseException as error:  # also SIGINT, which the child, in a group of its own, does not get
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                if not isinstance(error, TimeoutError):
                    raise
                self._server.stdout.readline()
                raise subprocess.TimeoutExpired(words, timeout) from None
            printed = (Path(name).read_text(errors="replace") for name in names.values())
            return subprocess.CompletedProcess(words, code, *printed)

    def _wait(self, timeout: float) -> int:
        def expired(*_):
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            return int(self._server.stdout.readline())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def close(self) -> None:
        """End the process."""
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()
