"""What all commands share: parsing, errors that are one line, exit codes."""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

Item = TypeVar("Item")

EXIT_PROBLEMS = 1  # the work is done, and what is wrong with its input was named
EXIT_USAGE = 2  # something is to be changed, which one line says; what was saved before stays
EXIT_PEER = 69  # EX_UNAVAILABLE: another process of a run died or hangs
EXIT_GAVE_UP = 70  # stopped by a signal, but the step did not end in time: the last checkpoint counts
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, everything is saved, the same command continues


class UserError(ValueError):
    """What a user can cause and put right. Its message is one line: what is wrong, in which file, what to do."""


def one_line_errors(program: str, work: Callable[[], int | None]) -> int:
    """Do the work and return its exit code; a UserError becomes one line on stderr and exit code 2.

    Any other error is a defect of ours and keeps its traceback.
    """
    try:
        return work() or 0
    except UserError as error:
        # What is wrong before the ranks have joined is wrong on all of them: one says it.
        if _joined() or os.environ.get("RANK", "0") == "0":
            say_error(f"{program}: {printable(error)}")
        return EXIT_USAGE
    finally:
        if _joined():
            sys.modules["torch.distributed"].destroy_process_group()


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


def check_ranges(section: Any, prefix: str) -> None:
    """Check the numbers of a configuration against the ranges that stand at its fields; `prefix` begins its flags.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        value: Any = getattr(section, name)
        if dataclasses.is_dataclass(type(value)):
            check_ranges(value, f"{flag}.")
            continue
        for limits in (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)):
            for number in value if isinstance(value, tuple) else (value,):
                if not math.isfinite(number) or not limits.low <= number <= limits.high:
                    raise UserError(f"{flag} {number}: must be between {limits.low} and {limits.high}")


def restored(kind: Any, saved: Any, flag: str) -> Any:
    """Return a value of a field's type from what JSON has of it.

    Raises:
        TypeError, ValueError: if it is of another type, or none of the choices.
    """
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        start = flag if flag == "--" else f"{flag}."
        known = {k: restored(hints[k], v, start + k.replace("_", "-")) for k, v in saved.items() if k in hints}
        return cast(type, kind)(**(dict(saved) | known))  # an unknown key is a TypeError
    if get_origin(kind) is tuple and isinstance(saved, list):
        return tuple(restored(get_args(kind)[0], value, flag) for value in saved)
    if get_origin(kind) is Literal:
        fits = saved in get_args(kind)
    elif get_origin(kind) is UnionType:  # a type, or None
        return None if saved is None else restored(get_args(kind)[0], saved, flag)
    elif kind is Path:
        fits = isinstance(saved, str) and "\0" not in saved
        saved = Path(saved) if fits else saved
    else:
        fits = isinstance(saved, int | float if kind is float else kind) and isinstance(saved, bool) == (kind is bool)
    if not fits:
        raise ValueError(f"{flag} is {saved!r}")
    return saved


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def __init__(self, program: str, description: str | None):
        super().__init__(program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {printable(message)}\n")


def first_sentence(panel: str) -> str:
    """Return in one line what is wrong, and what may be meant, from the panel that tyro draws."""
    words = re.sub(r"[╭╮╰╯│]|─{3,}[^\n]*?(?=\n)", "", panel)
    words = re.split(r"For full helptext|Argument helptext", words)[0]
    return re.sub(r"\s+", " ", words.replace("Perhaps you meant:", "- perhaps you meant")).strip()


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
