"""Cases in children: whatever one of them does to its process or to the card costs that case and nothing else.

This process imports neither torch nor DALI, so that it cannot touch the card and outlives whoever does.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import rows

POLL_S = 0.02
ALL_CORES = 10**6  # of a case that is one of several, with fewer and fewer cores, but has all
ENDED_BY_BUDGET = "ended by the budget"
EXIT_S = 15.0  # for a child that has settled all its cases
SETTLED = ("end", "failed", "left out")
LAST_WORDS_S = 1.0  # from SIGABRT, at which faulthandler prints where all threads are, to SIGKILL


@dataclass(frozen=True)
class Case:
    """One thing to measure or to check; `module.function(setting, **options)` yields its rows."""

    part: str
    name: str  # unique in a plan
    module: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 30.0
    child: str | None = None  # neighbours that name the same one share it; None: one of its own
    gpu: bool = True  # needs a card
    cores: int | None = None  # that its child, which has to be its own, may use


def run_all(
    cases: Sequence[Case], out: Path, budget_s: float, command: Callable[[list[str]], list[str]], about: rows.Row
) -> None:
    """Run the cases in their order, a series of neighbours in one child; every end leaves a row, and a table.

    `command` makes the command of a child from the names of its cases. When the budget ends, so does the case that
    runs, and the others are left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    rows.append(results, {"event": "machine", **about})
    end = time.monotonic() + budget_s
    left = list(cases)
    try:
        while left:
            if time.monotonic() >= end:
                tell(results, left, "left out", f"the budget of {budget_s:g} s was used up")
                break
            group = _together(left)
            done = run_child(group, out, end, command, about)
            left = [case for case in left if case.name not in done]
            rows.write_table(out)
    except BaseException as error:  # also a signal: what is there is told, and then it goes on ending
        tell(results, left, "left out", f"ended by {type(error).__name__}")
        raise
    finally:
        rows.write_table(out)


def _together(cases: list[Case]) -> list[Case]:
    """The cases of the next child: one, or the series that it begins, or what a child that died has left of that."""
    if cases[0].child is None:
        return cases[:1]
    return list(itertools.takewhile(lambda case: case.child == cases[0].child, cases))


def run_child(
    group: list[Case], out: Path, end: float, command: Callable[[list[str]], list[str]], about: rows.Row
) -> set[str]:
    """Run a child on some cases until it ends or must; the names of those that are settled, at least one."""
    results = out / "results.jsonl"
    _, place = rows.read(results)
    log = out / "logs" / f"{re.sub('[^A-Za-z0-9.]+', '-', group[0].name)}.log"
    log.parent.mkdir(exist_ok=True)
    why, seen, since = None, -1, time.monotonic()
    with open(log, "a") as file:
        file.write(f"# {rows.headline(about)}\n")
        file.flush()
        # A group of processes of its own, so that nothing that it starts outlives it.
        process = subprocess.Popen(
            command([case.name for case in group]), cwd=rows.ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                settled, running, events = progress(rows.read(results, place)[0])
                now = time.monotonic()
                if events != seen:
                    seen, since = events, now
                if now >= end:
                    why = ENDED_BY_BUDGET
                    break
                limit = limit_of(group, settled, running)
                if now >= since + limit:
                    why = f"not done after {limit:g} s: killed"
                    break
                time.sleep(POLL_S)
        finally:
            kill(process)
    found = rows.read(results, place)[0]
    settled, running, _ = progress(found)
    unsettled = [case for case in group if case.name not in settled]
    if unsettled and not (why is None and ends_with_failure(found)):
        culprit = next((case for case in unsettled if case.name == running), unsettled[0])
        event = "left out" if why == ENDED_BY_BUDGET else "failed"  # no fault of its own
        tell(results, [culprit], event, f"{why or death(process.returncode)}{_last_line(log)}")
        settled.add(culprit.name)
    return settled


def progress(found: Sequence[rows.Row]) -> tuple[set[str], str | None, int]:
    """Of a child's rows: the cases that are settled, the one at work, and how many rows said so."""
    settled, running, events = set(), None, 0
    for row in found:
        if row.get("event") == "begin":
            running = row["case"]
        elif row.get("event") in SETTLED:
            settled.add(row["case"])
            running = None
        else:
            continue
        events += 1
    return settled, running, events


def limit_of(group: Sequence[Case], settled: set[str], running: str | None) -> float:
    """The seconds that the case at work may take, or the next one; a child that has done all soon ends."""
    left = [case for case in group if case.name not in settled]
    return next((case.limit_s for case in left if running in (None, case.name)), EXIT_S)


def ends_with_failure(found: Sequence[rows.Row]) -> bool:
    """Whether a child told of a failure itself: after one it ends, as the card may be of no use to it any more."""
    events = [row["event"] for row in found if row.get("event") in ("begin", *SETTLED)]
    return events[-1:] == ["failed"]


def kill(process: subprocess.Popen) -> None:
    """End a child and all that it has started; its last words go into its log."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be killed: go on
        process.wait(10)


def tell(results: Path, cases: Sequence[Case], event: str, reason: str) -> None:
    """Write why cases have no end of their own."""
    for case in cases:
        rows.append(results, {"event": event, "part": case.part, "case": case.name, "reason": reason})


def death(code: int | None) -> str:
    """Say how a process ended that has not done its work."""
    if code == 0:
        return "its process ended without it"
    if code is None:
        return "hangs in the driver and could not be killed"
    if code < 0:
        name = signal.Signals(-code).name
        return f"died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}"


def _last_line(log: Path) -> str:
    """What a child said last: where its main thread was, if faulthandler had to tell, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    stack = max((i for i, line in enumerate(lines) if line.startswith("Current thread")), default=None)
    places = [line for line in lines[stack:] if line.startswith("File ")] if stack is not None else []
    if places:
        return f": {places[0]}"
    return f": {lines[-1][:300]}" if lines and not lines[-1].startswith("#") else ""


def child_command(words: Sequence[str]) -> Callable[[list[str]], list[str]]:
    """The command of a child of the real plan, which takes the names of its cases as JSON."""
    return lambda names: [sys.executable, "-m", "benchmarks.gpu_parts.child", *words, "--cases", json.dumps(names)]
