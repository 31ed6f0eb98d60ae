"""What the scripts' command lines share: an error is one line and exit code 2, and numbers have a range."""

import argparse
import contextlib
from collections.abc import Callable
from typing import NoReturn


def shown(text: object) -> str:
    """A path or a message as it is printed: in one line whatever a file is called."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def __init__(self, program: str, description: str | None):
        super().__init__(program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {shown(message)}\n")


def in_range(kind: type[int] | type[float], low: int | float, high: int | float) -> Callable[[str], int | float]:
    """An argument's type: a number of that kind from `low` to `high`."""
    name = "whole number" if kind is int else "number"

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if text.isascii() and low <= kind(text) <= high:  # int() takes the digits of all scripts
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {low:,} to {high:,}")

    return parse
