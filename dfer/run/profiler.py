"""Where the time of a step goes: a trace of a few training steps, and a table of the ranges that are named in it."""

import gzip
import itertools
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, record_function

from dfer.cli import UserError
from dfer.files import write_whole

Item = TypeVar("Item")

TRACE = "trace.json.gz"
WARM_UP = 3  # steps before those that are recorded: memory, machine code, and the profiler's own beginnings
# The named ranges: how the trace calls them -> how the table does. The CRF's are operators, which torch.compile does
# not look into: they are there in both passes, compiled or not, and cost nothing when nobody looks.
RANGES = {
    "loading": "loading",
    "reading": "  waiting for files",
    "DALI": "  waiting for DALI",
    "exchange": "exchanging gradients",
    "graph": "all below, as graphs",
    "forward": "forward",
    "dfer::meanfield": "  CRF",
    "dfer::gaussian_field": "  CRF",
    "backward": "backward",
    "dfer::meanfield_backward": "  CRF",
    "dfer::gaussian_field_backward": "  CRF",
    "optimizer": "optimizer",
}


class Profiler:
    """Record a trace of one process, once: of `num_steps` steps in a row of one epoch, after WARM_UP others.

    What is named in the trace uses torch's `record_function`; what each step of a graph and each batch passes, its fast
    one. Where nothing is recorded these take 130 and 15 us, when other code has filled the caches (warm 10 and 0.2).

    Args:
        num_steps: how many, 0 = none: then batches are passed through untouched.
        accumulate: batches per step.
        path: where the Chrome trace (gzip) goes; None where another process records.
        say: takes the lines of the table.
    """

    def __init__(self, num_steps: int, accumulate: int, path: Path | None, say: Callable[[str], None]):
        self.num_steps = 0 if path is None else num_steps  # still to be recorded
        self._accumulate, self._path, self._say = accumulate, path, say

    def watch(self, batches: Iterable[Item], num_steps: int) -> Iterable[Item]:
        """Return the batches of `num_steps` steps. If those are enough, their steps are recorded as they pass.

        A step is what happens from asking for its first batch to asking for that of the next. The trace of a run that
        ends before is not written.

        Raises:
            UserError: while passing batches through, if the trace cannot be written.
        """
        enough = self.num_steps and num_steps >= WARM_UP + self.num_steps
        return self._watched(batches) if enough else batches

    def finish(self) -> None:
        """Say so if what was to be recorded was not."""
        if self.num_steps:
            self._say(f"no trace: no epoch had --profile {self.num_steps} and {WARM_UP} more steps left")

    def _watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        assert self._path is not None, "another process records"
        batches, last = self._loading(batches), (WARM_UP + self.num_steps) * self._accumulate
        schedule = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=self.num_steps, repeat=1)
        if not torch.cuda.is_available():
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or it prints, as an error, that there is no GPU
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profile:
            for micro, batch in enumerate(itertools.islice(batches, last), start=1):
                yield batch
                if micro % self._accumulate == 0:
                    profile.step()
        self.num_steps = 0
        for line in (*_written(profile, self._path), f"{self._path}: for ui.perfetto.dev or chrome://tracing"):
            self._say(line)
        yield from batches

    def _loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        iterator = iter(batches)
        while True:
            with record_function("loading"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch


def check_steps(num_steps: int, steps_per_epoch: int) -> None:
    """Check that an epoch has as many steps as are to be recorded, and those before them.

    Raises:
        UserError: if it has not.
    """
    if num_steps and WARM_UP + num_steps > steps_per_epoch:
        raise UserError(
            f"--profile {num_steps}: an epoch has {steps_per_epoch} steps, of which the first {WARM_UP} warm up"
        )


def _written(profile: torch.profiler.profile, path: Path) -> list[str]:
    """Write the trace and return its table."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(plain))
            content = plain.read_bytes()
        lines = table(json.loads(content)["traceEvents"])
        packed = gzip.compress(content, compresslevel=5)
        write_whole(path, packed)
    except (OSError, json.JSONDecodeError) as error:  # torch does not say when the disk was full: the file is cut off
        reason = getattr(error, "strerror", "torch could not write it")
        raise UserError(f"{path}: cannot write the trace ({reason})") from None
    return lines


def table(events: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of the time of each range per step, from a Chrome trace (its times are in us).

    On the host it is the time from a range's beginning to its end. On a GPU it is that of all kernels, copies and
    fillings that were launched meanwhile, by whatever thread: autograd's is another one than that which waits for it.
    """
    spans, launched_at, kernels = defaultdict(list), {}, []
    for event in events:
        category, correlation = event.get("cat"), event.get("args", {}).get("correlation")
        if category in ("user_annotation", "cpu_op"):
            name = "step" if event["name"].startswith("ProfilerStep#") else event["name"]
            spans[name].append((event["ts"], event["ts"] + event["dur"]))
        elif category in ("cuda_runtime", "cuda_driver"):
            launched_at[correlation] = event["ts"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append((correlation, event["dur"]))
    num_steps, rows = len(spans["step"]), [("step", "step"), *RANGES.items()]
    on_gpu = dict.fromkeys((name for name, _ in rows), 0.0)
    for correlation, duration in kernels:
        at = launched_at.get(correlation, -1.0)
        for name in on_gpu:
            on_gpu[name] += duration * any(start <= at < end for start, end in spans[name])
    host = {name: sum(end - start for start, end in spans[name]) for name, _ in rows}
    lines = [f"{num_steps} steps:{'ms':>23}{'share':>8}" + f"{'on GPU: ms':>14}{'share':>8}" * bool(kernels)]
    for name, shown in rows:
        if spans[name]:
            columns = (host, on_gpu) if kernels else (host,)
            numbers = [f"{c[name] / num_steps / 1000:12.2f}{100 * c[name] / host['step']:6.1f} %" for c in columns]
            lines.append(f"{shown:20}" + "  ".join(numbers))
    return lines
