"""What all commands share: parsing, errors that are one line, exit codes."""

import argparse
import contextlib
import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

Item = TypeVar("Item")

EXIT_PROBLEMS = 1  # the work is done, and what is wrong with its input was named
EXIT_USAGE = 2  # something is to be changed, which one line says; what was saved before stays
EXIT_PEER = 69  # EX_UNAVAILABLE: another process of a run died or hangs
EXIT_GAVE_UP = 70  # stopped by a signal, but the step did not end in time: the last checkpoint counts
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, everything is saved, the same command continues


# What the system answers where nothing in the program can be wrong: rights, full and lost disks, names, limits.
_SYSTEM = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),
}


class UserError(ValueError):
    """What a user can cause and put right. Its message is one line: what is wrong, in which file, what to do."""


def one_line_errors(program: str, work: Callable[[], int | None]) -> int:
    """Do the work and return its exit code; a UserError becomes one line on stderr and exit code 2.

    So does an error of the machine that nobody expected there: a folder that may not be looked into, a full disk. Any
    other error is a defect of ours and keeps its traceback.
    """
    try:
        return work() or 0
    except Exception as error:
        line = error if isinstance(error, UserError) else _of_the_system(error)
        if line is None:
            raise
        # What is wrong before the ranks have joined is wrong on all of them: one says it.
        if _joined() or os.environ.get("RANK", "0") == "0":
            say_error(f"{program}: {printable(line)}")
        return EXIT_USAGE
    finally:
        if _joined():
            sys.modules["torch.distributed"].destroy_process_group()


def _of_the_system(error: Exception) -> str | None:
    """Return the line for an error of the machine, whichever library has wrapped it; None for any other."""
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return (f"{error.filename}: " if error.filename is not None else "") + os.strerror(error.errno)
    # safetensors, HDF5 and ONNX have classes of their own, whose text has the system's.
    text = " ".join(str(error).split())
    return text if any(os.strerror(number) in text for number in _SYSTEM) else None


def say_error(line: str) -> None:
    """Write a line to stderr in one piece: print() writes its end apart, so that the lines of several ranks mix."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@functools.cache
def say_once(line: str) -> None:
    """Write a line to stderr that is no error, once in a process, and of several ranks by the first alone."""
    if os.environ.get("RANK", "0") == "0":
        say_error(f"note: {printable(line)}")


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
    found = re.fullmatch(r"(--[\w.-]+=)?((~[^/]*)(/.*)?)", word, re.DOTALL)
    if found is None:
        return word
    flag, path, home = found[1] or "", found[2], found[3]
    whole = os.path.expanduser(path)
    if whole == path and (home == "~" or (path != home and not os.path.lexists(home))):
        whose = f"of a user {home[1:]}" if home[1:] else "of this user"
        raise UserError(f"{word}: the home folder {whose} is not known; write ./{path} for a folder called {home}")
    return flag + whole


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and whose ~ is the home folder."""

    def __init__(self, program: str, description: str | None):
        super().__init__(program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

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
