"""When the page about a run is written: while it goes on, from its records alone, and once it is done, with clips."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dfer.cli import command_of
from dfer.files import reason
from dfer.report.records import read_run

SHARE = 0.02  # of the time of a run that its page may take while it goes on
FIRST_S = 3.0  # what the first page is taken to cost: matplotlib is loaded, and seven figures are drawn


class LivePage:
    """The page while a run goes on. `run` is None in processes that write nothing."""

    def __init__(self, run: Path | None, say: Callable[[str], None]):
        self._run, self._say = run, say
        self._cost_s, self._ended = FIRST_S, time.perf_counter()

    def write(self) -> None:
        """Write the page, unless that would take more than SHARE of the time since it was last written.

        Whatever goes wrong with it costs one line, and the page until the end of the run.
        """
        began = time.perf_counter()
        if self._run is None or self._cost_s > SHARE * (began - self._ended):
            return
        try:
            from dfer.report.page import write_records  # with its libraries

            write_records(read_run(self._run))
        except Exception as error:
            self._say(f"no report before the end of the run ({reason(error)})")
            self._run = None
        self._ended = time.perf_counter()
        self._cost_s = self._ended - began


def print_report(run: Path, build_loader: Callable[..., Any], load_trained: Callable[..., nn.Module]) -> None:
    """Write the page about a run that is done: whatever goes wrong with it costs one line, not the run."""
    try:
        from dfer.report.page import write_report  # with its libraries half a second, which only the end pays

        print(f"report: {write_report(read_run(run), build_loader, load_trained)}")
    except (Exception, KeyboardInterrupt) as error:
        file = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        print(f"no report ({file}{reason(error)}); {command_of('report')} {run} tries again", file=sys.stderr)
