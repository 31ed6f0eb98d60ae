"""What all commands share: parsing, errors that are one line, exit codes."""

import argparse
import contextlib
import errno
import faulthandler
import functools
import gc
import importlib.metadata
import io
import math
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar

Item = TypeVar("Item")

EXIT_PROBLEMS = 1  # the work is done, and what is wrong with its input was named
EXIT_USAGE = 2  # something is to be changed, which one line says; what was saved before stays
EXIT_PEER = 69  # EX_UNAVAILABLE: another process of a run died or hangs
EXIT_GAVE_UP = 70  # stopped by a signal, but the step did not end in time: the last checkpoint counts
EXIT_INTERRUPTED = 130  # by Ctrl-C, where nothing is to be saved; as shells say it
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, everything is saved, the same command continues


# What the system answers where nothing in the program can be wrong: rights, full and lost disks, names, limits.
_SYSTEM = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),
}


# Where train.py and scripts/ lie: inside an installed package, beside it in the repository.
_INSTALLED = Path(__file__).resolve().with_name("_app")
APP = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1]


class UserError(ValueError):
    """What a user can cause and put right. Its message is one line: what is wrong, in which file, what to do."""

    said_by_all = False  # processes of a run; else the first one speaks for those that have not joined yet


def command_of(name: str) -> str:
    """Return how the user of this process starts a command of ours, as `python scripts/make_faces.py`.

    It is `dfer make-faces` where the project is installed or that command has started the process.

    Args:
        name: of the command's file, without the suffix: train, make_faces.
    """
    own = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]  # without the words of the command itself
    if _INSTALLED.is_dir() or "dfer" in {Path(word).name for word in own}:
        return f"dfer {name.replace('_', '-')}"
    return "python train.py" if name == "train" else f"python scripts/{name}.py"


def missing_packages(*packages: str) -> list[str]:
    """Return those of some packages, by their names in pyproject.toml, that are not installed."""
    missing = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return missing


# How often a thread of libgomp, torch's pool on Linux, looks whether the others are done before it sleeps. Its own
# 300,000 hold a core for milliseconds, in which a thread that is waited for could run, if other work has its core.
_SPINS = "6000"
_GONE = "the folder that this was started in is gone: cd to another"


def begin(program: str, loads: str = "") -> None:
    """Make a process ready to be a command: to be called before it loads its libraries, and by nobody else.

    Whatever becomes of standard output and error (closed, a full disk, a reader or a terminal that is gone), what the
    command does is not ended by it: what cannot be told is dropped.

    Args:
        program: its name.
        loads: the libraries that take seconds to load, which is said at once; "" if none does.
    """
    for descriptor in range(3):  # a file that is opened later must not be taken for a stream that was closed
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    sys.stdout = _heedless(sys.stdout, "standard output")
    sys.stderr = _heedless(sys.stderr, "standard error")
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, functools.partial(_interrupted_at_the_start, program))
    faulthandler.enable(all_threads=False)  # the last word of a process that dies of SIGBUS or SIGSEGV
    if loads and sys.flags.optimize > 1:
        say_error(f"{program}: DALI needs docstrings: leave out -OO or PYTHONOPTIMIZE=2 (-O is fine)")
        sys.exit(EXIT_USAGE)
    if loads:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read when torch is loaded
        gc.disable()  # a quarter of the imports' time would go into looking for garbage among what they make for good
        try:
            os.getcwd()
        except FileNotFoundError:  # in which Intel's library would end the process with words of its own
            say_error(f"{program}: {_GONE}")
            sys.exit(EXIT_USAGE)
    if loads and "torch" not in sys.modules and _is_first():
        print(f"{program}: loading {loads}", flush=True)  # not on stderr, which is for what is wrong


def _interrupted_at_the_start(program: str, *_: object) -> NoReturn:
    """End the process by Ctrl-C while libraries are loaded, whose code may take an exception for one of theirs."""
    with contextlib.suppress(OSError):
        os.write(2, f"{program}: interrupted\n".encode())
    os._exit(EXIT_INTERRUPTED)


def _heedless(stream: TextIO | None, name: str) -> TextIO:
    """Return a stream that writes where `stream` does and never fails; None was closed when Python started."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Heedless(stream.fileno(), name)),
        encoding=stream.encoding,
        errors="backslashreplace",  # a name or a table's line that the terminal has no letters for
        line_buffering=stream.line_buffering,  # type: ignore[attr-defined]
        write_through=stream.write_through,  # type: ignore[attr-defined]
    )


class _Heedless(io.FileIO):
    """A descriptor that takes all that is written, whether anybody gets it or not."""

    def __init__(self, descriptor: int, name: str):
        super().__init__(descriptor, "w", closefd=False)
        self._what, self._said = name, False

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # set not to block, by whoever else has it
                select.select([], [self], [])
            return written
        except OSError as error:
            # A reader or a terminal that has gone wants no word. A disk that is full does.
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET) and not self._said:
                self._said = True
                note = f"note: {self._what} cannot be written ({error.strerror}): what is said is lost\n"
                with contextlib.suppress(OSError):
                    os.write(2, note.encode())
            return memoryview(data).nbytes


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many cores the processes of this command may use together, of however many the machine has.

    By the affinity (taskset, cpusets), the quotas of control groups (`docker --cpus`, Kubernetes' limits), which may be
    parts of a core, and what Slurm has given, which it does not enforce everywhere.
    """
    limits: list[float] = [len(os.sched_getaffinity(0))]
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2: one tree
                limits += _quotas(groups, path, "cpu.max")
            elif "cpu" in controllers.split(","):
                limits += _quotas(groups / "cpu", path, "cpu.cfs_quota_us", "cpu.cfs_period_us")
    if per_task := _slurm("CPUS_PER_TASK"):
        # A step is a task. A batch script that starts all processes of a node itself has the cores of all its tasks.
        limits.append(per_task * (1 if "SLURM_STEP_ID" in os.environ else _slurm("NTASKS_PER_NODE") or 1))
    if on_node := _slurm("CPUS_ON_NODE"):
        limits.append(on_node)
    return max(math.ceil(min(limits)), 1)


def _slurm(name: str) -> int:
    """Return a number that Slurm has left in the environment; 0 if there is none."""
    text = os.environ.get(f"SLURM_{name}", "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def _quotas(tree: Path, path: str, *names: str) -> Iterator[float]:
    """Yield the cores that a control group and those around it allow, where they limit them."""
    group = tree / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(tree):
            return
        with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit: "max", -1
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if float(quota) > 0:
                yield float(quota) / float(period)


def one_line_errors(program: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work and return its exit code; a UserError becomes one line on stderr and exit code 2, Ctrl-C one and 130.

    So does an error of the machine that nobody expected there: a folder that may not be looked into, a full disk. Any
    other error is a defect of ours and keeps its traceback. `interrupted` is the line for Ctrl-C: what is kept then.
    """
    if getattr(signal.getsignal(signal.SIGINT), "func", None) is _interrupted_at_the_start:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():  # since `begin`
        gc.enable()
        gc.freeze()  # what the imports have made is not scanned again
    ended, code = False, 1
    try:
        _use_no_more_cores()
        code, ended = work() or 0, True
    except KeyboardInterrupt:
        say_error(f"{program}: {interrupted}")
        code = EXIT_INTERRUPTED
    except Exception as error:
        line = error if isinstance(error, UserError) else system_error(error)
        if line is None:
            raise
        # What is wrong before the ranks have joined is wrong on all of them: one says it.
        if getattr(error, "said_by_all", False) or _joined() or _is_first():
            say_error(f"{program}: {printable(line)}")
        code = EXIT_USAGE
    finally:
        if _joined():
            leave(ended, code)
    return code


def leave(ended: bool = True, code: int = 0) -> None:
    """Leave the processes that this one has joined, as the last thing before it ends.

    NCCL leaves together: who has not `ended` as the others do would wait for them, and they for it. It exits at once.
    """
    if not ended and sys.modules["torch.distributed"].get_backend() == "nccl":
        if isinstance(error := sys.exception(), SystemExit):
            code = error.code if isinstance(error.code, int) else bool(error.code)  # as sys.exit takes it
        elif error is not None:
            traceback.print_exc()
        sys.stdout.flush()  # what does not go out is dropped, as ever
        os._exit(code)
    sys.modules["torch.distributed"].destroy_process_group()
    # gloo's threads outlive the group, which a DistributedDataParallel of torch 2.10 never lets go. One that frees the
    # last exchange's tensors needs the interpreter, and would abort the process if that were ending: it gets it now.
    time.sleep(0.2)


def system_error(error: Exception) -> str | None:
    """Return the line for an error of the machine, whichever library has wrapped it; None for any other."""
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return (f"{error.filename}: " if error.filename is not None else "") + os.strerror(error.errno)
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except FileNotFoundError:
            return _GONE
    # safetensors, HDF5 and ONNX have classes of their own, whose text has the system's.
    text = " ".join(str(error).split())
    return text if any(os.strerror(number) in text for number in _SYSTEM) else None


def _use_no_more_cores() -> None:
    """Have torch, where it is loaded, use the cores that there are: by itself it knows of the affinity alone."""
    torch = sys.modules.get("torch")
    if torch is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def say_error(line: str) -> None:
    """Write a line to stderr in one piece: print() writes its end apart, so that the lines of several ranks mix."""
    if sys.stderr is not None:  # closed, in a process that is no command of ours
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@functools.cache
def say_once(line: str) -> None:
    """Write a line to stderr that is no error, once in a process, and of several ranks by the first alone."""
    if _is_first():
        say_error(f"note: {printable(line)}")


def _is_first() -> bool:
    """Return whether this process speaks for those of its run. A rank alone, as a shell may inherit it, is no run."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") in ("", "1")


def _joined() -> bool:
    """Return whether this process has joined others; a command that never loaded torch pays nothing for the answer."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def printable(text: object) -> str:
    """Return a path or a message as one printable line, whatever a file is called."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Range(NamedTuple):
    """The values that a number of the configuration may have; stands at its field: Annotated[int, Range(1, 9)]."""

    low: int | float
    high: int | float


def expand_home(words: Iterable[str]) -> list[str]:
    """Return the words of a command with ~ and ~NAME as the home folder, behind `--flag=` too, where a shell leaves it.

    Raises:
        UserError: if that folder is not known. A folder called ~ would be made, which `rm -rf ~` does not remove.
    """
    return [_expanded(word) for word in words]


def _expanded(word: str) -> str:
    found = re.fullmatch(r"((?:--[\w.-]+=)?(?:backbone:)?)((~[^/]*)(/.*)?)", word, re.DOTALL)  # of --model.init
    if found is None:
        return word
    flag, path, home = found[1], found[2], found[3]
    whole = os.path.expanduser(path)
    if whole == path and (home == "~" or (path != home and not os.path.lexists(home))):
        whose = f"of a user {home[1:]}" if home[1:] else "of this user"
        raise UserError(f"{word}: the home folder {whose} is not known; write ./{path} for a folder called {home}")
    return flag + whole


def _as_installed(text: str) -> str:
    """Return a text in which commands of ours are called as the user of this process starts them."""
    return re.sub(r"python (?:scripts/)?(\w+)\.py", lambda found: command_of(found[1]), text)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and whose ~ is the home folder."""

    def __init__(self, program: str, description: str | None):
        super().__init__(
            program, description=_as_installed(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # parse_args calls it
        try:
            return super().parse_known_args(expand_home(sys.argv[1:] if args is None else args), namespace)
        except UserError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {printable(message)}\n")


def in_range(kind: type[int] | type[float], low: int | float, high: int | float) -> Callable[[str], int | float]:
    """Return the type of an argument: a number of that kind from `low` to `high`."""
    name = "whole number" if kind is int else "number"

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if text.isascii() and low <= kind(text) <= high:  # int() takes the digits of all scripts
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {low:,} to {high:,}")

    return parse


def progress(
    items: Iterable[Item], total: int, what: str, done: int = 0, to_stderr: bool = False, quiet_s: int = 0
) -> Generator[Item, None, None]:
    """Pass items on and show how many of `total` are done, how many a second, and the time left.

    On a terminal it is a bar, elsewhere a line at each tenth of them.

    Args:
        items: what is still to be done.
        total: how many there are with those that were done before.
        what: what they are called, in the plural.
        done: how many were done before.
        to_stderr: show it there, as what is printed is the result.
        quiet_s: seconds before the first line where there is no terminal, so that short work says nothing.
    """
    stream, start, began = sys.stderr if to_stderr else sys.stdout, done, time.monotonic()
    if stream.isatty():
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn

        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        with Progress(*columns, console=Console(file=stream)) as bar:
            task = bar.add_task(what, total=total, completed=done, speed="")
            for done, item in enumerate(items, start=start + 1):
                speed = (done - start) / max(time.monotonic() - began, 1e-3)
                bar.update(task, completed=done, speed=f"{speed:,.1f} {what}/s")
                yield item
        return
    for done, item in enumerate(items, start=start + 1):
        elapsed = time.monotonic() - began
        if elapsed >= quiet_s and done * 10 // total > (done - 1) * 10 // total:
            speed = (done - start) / max(elapsed, 1e-3)
            left = f", about {(total - done) / speed:,.0f} s left" if done < total else ""
            print(f"{done:,}/{total:,} {what}, {speed:,.1f} {what}/s{left}", file=stream, flush=True)
        yield item
