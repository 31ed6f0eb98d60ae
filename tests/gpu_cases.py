"""Cases that do to their child what a card may do to it, and the command of a child that knows them."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_parts.child import do_cases
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.runner import Case
from benchmarks.gpu_parts.setting import NotHere, Setting, setting_of


def fine(setting: Setting, value: float = 1.0) -> Iterator[Row]:
    yield figure("something", [value, value + 1, value + 3], "clips/s", right=True, process=os.getpid())


def segfaults(setting: Setting) -> Iterator[Row]:
    yield figure("before it", 1.0, "clips/s")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(setting: Setting) -> Iterator[Row]:
    """With a process of its own that must not outlive it."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield figure("its process", sleeper.pid, "pid")
    time.sleep(600)


def raises(setting: Setting) -> Iterator[Row]:
    yield figure("before it", 2.0, "clips/s")
    raise ValueError("of no use:\nin two lines")


def exhausts_memory(setting: Setting) -> Iterator[Row]:
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    yield figure("adjusted", int(Path("/proc/self/oom_score_adj").read_text()), "points", core_file_bytes=core)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    blocks = []
    while True:
        blocks.append(bytearray(2**27))


def is_killed(setting: Setting) -> Iterator[Row]:
    """As the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield figure("never", 1.0, "clips/s")


def is_not_here(setting: Setting) -> Iterator[Row]:
    raise NotHere("no such library")
    yield


def leaves(setting: Setting) -> Iterator[Row]:
    """Ends its process as if all were done."""
    os._exit(0)
    yield


def is_wrong(setting: Setting) -> Iterator[Row]:
    yield figure("mixed batches", 3, "batches", right=False)


def sleeps(setting: Setting) -> Iterator[Row]:
    yield figure("before it sleeps", 1.0, "clips/s")
    time.sleep(60)


def case(function: str, child: str | None = "series", name: str = "", limit_s: float = 20.0) -> Case:
    return Case("part", name or function, "tests.gpu_cases", function, limit_s=limit_s, child=child)


CASES = [
    case("fine", name="first"),
    case("segfaults"),
    case("fine", name="after a segmentation fault"),
    case("raises"),
    case("fine", name="after an error"),
    case("is_not_here"),
    case("leaves"),
    case("is_wrong"),
    case("hangs", limit_s=1.5),
    case("fine", name="after a hang"),
    case("fine", child=None, name="alone"),
    case("exhausts_memory", child=None),
    case("is_killed", child=None),
    case("fine", child=None, name="last"),
    case("sleeps", child=None),
]


def command(out: Path):
    return lambda names: [sys.executable, "-m", "tests.gpu_cases", str(out), *names]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os._exit(do_cases(sys.argv[2:], {c.name: c for c in CASES}, setting_of("toy", folder, folder)))
