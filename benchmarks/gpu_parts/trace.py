"""What the card does in a step, from a trace: how long it is busy, how many launches, what a named range costs."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import wait

ON_CARD = ("kernel", "gpu_memcpy", "gpu_memset")
CRF_RANGES = ("dfer::meanfield", "dfer::meanfield_backward")
Event = dict[str, Any]


class Work(NamedTuple):
    """The card's work of one step."""

    busy_s: float  # union of the intervals of all kernels, copies and fillings
    kernels_s: float  # their sum
    launches: float
    crf_s: float  # sum of what is launched within the CRF's operators


def traced(setting: Setting, step: Callable[[], object], steps: int = 5) -> Work:
    """Trace some steps. Kernels take as long as without a trace; the host takes longer, so its time is not used."""
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda.is_available()]
    steps = steps if setting.seconds else 1
    wait(setting)
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(steps):
            step()
        wait(setting)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return work(events, steps)


def work(events: Sequence[Event], steps: int) -> Work:
    """Read the events of a Chrome trace, whose times are in us."""
    on_card = [event for event in events if event.get("cat") in ON_CARD]
    launched_at = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    ranges = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "cpu_op" and e["name"] in CRF_RANGES]
    in_crf = 0.0
    for event in on_card:
        at = launched_at.get(event["args"].get("correlation"), -1.0)
        in_crf += event["dur"] * any(start <= at < end for start, end in ranges)
    scale = 1e-6 / steps
    busy = union([(event["ts"], event["ts"] + event["dur"]) for event in on_card])
    return Work(busy * scale, sum(e["dur"] for e in on_card) * scale, len(on_card) / steps, in_crf * scale)


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of what at least one interval covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
