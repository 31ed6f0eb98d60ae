"""What the card does in a step, from a trace: how long it is busy, how many launches, what a named range costs."""

import bisect
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.setting import NotHere, Setting
from benchmarks.gpu_parts.timing import wait

ON_CARD = ("kernel", "gpu_memcpy", "gpu_memset")
CRF_RANGES = ("dfer::meanfield", "dfer::meanfield_backward")
CALL = "call "  # and its number, in a trace
Event = dict[str, Any]


class Work(NamedTuple):
    """The card's work of one step."""

    busy_s: float  # union of the intervals of all kernels, copies and fillings
    kernels_s: float  # their sum
    launches: float
    crf_s: float  # sum of what is launched within the CRF's operators


def traced(setting: Setting, step: Callable[[], object], steps: int = 5) -> Work:
    """Trace some steps. Kernels take as long as without a trace; the host takes longer, so its time is not used."""
    steps = steps if setting.seconds else 1
    return work(recorded(setting, step, steps), steps)


def recorded(setting: Setting, step: Callable[[], object], steps: int) -> list[Event]:
    """The events of the trace of some steps.

    Raises:
        NotHere: if it knows nothing of what the card did, as where an earlier trace of the process was empty.
    """
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda.is_available()]
    wait(setting)
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(steps):
            step()
        wait(setting)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    if setting.device == "cuda" and not any(event.get("cat") in ON_CARD for event in events):
        raise NotHere("the trace has no kernels")
    return events


def work(events: Sequence[Event], steps: int) -> Work:
    """Read the events of a Chrome trace, whose times are in us."""
    on_card, launched_at = [event for event in events if event.get("cat") in ON_CARD], launches(events)
    ranges = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "cpu_op" and e["name"] in CRF_RANGES]
    in_crf = 0.0
    for event in on_card:
        at = launched_at.get(event["args"].get("correlation"), -1.0)
        in_crf += event["dur"] * any(start <= at < end for start, end in ranges)
    scale = 1e-6 / steps
    busy = union([(event["ts"], event["ts"] + event["dur"]) for event in on_card])
    return Work(busy * scale, sum(e["dur"] for e in on_card) * scale, len(on_card) / steps, in_crf * scale)


def launches(events: Sequence[Event]) -> dict[int, float]:
    """When the host launched what the card did: correlation -> us."""
    return {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }


class Operator(NamedTuple):
    """What the card does in a step for all calls of an operator."""

    name: str
    kernels_s: float
    moved: float  # bytes of its inputs and outputs
    launches: float
    longest: str  # the kernel that takes most of it


class Numbered(TorchDispatchMode):
    """Marks each call of an operator in a trace by its number, and keeps its name and the bytes of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with record_function(f"{CALL}{len(self.calls)}"):
            out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.calls.append((func.name(), 0 if func.is_view else sum(x.numel() * x.element_size() for x in tensors)))
        return out


def traced_operators(setting: Setting, step: Callable[[], object]) -> list[Operator]:
    """Trace a step, and tell what each operator of it is."""

    def numbered() -> None:
        with calls:
            step()

    calls = Numbered()
    return by_operator(recorded(setting, numbered, 1), calls.calls)


def by_operator(events: Sequence[Event], calls: Sequence[tuple[str, int]]) -> list[Operator]:
    """Sum up what the card did for each operator, by the numbered ranges within which it was launched."""
    launched_at = launches(events)
    marked = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(CALL)]
    ranges = sorted((e["ts"], e["ts"] + e["dur"], int(e["name"].removeprefix(CALL))) for e in marked)
    starts = [start for start, _, _ in ranges]
    taken: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    count: dict[str, int] = defaultdict(int)
    for event in events:
        at = launched_at.get(event.get("args", {}).get("correlation"), -1.0)
        place = bisect.bisect_right(starts, at) - 1
        if event.get("cat") in ON_CARD and place >= 0 and at < ranges[place][1]:
            name = calls[ranges[place][2]][0]
            taken[name][event["name"]] += 1e-6 * event["dur"]
            count[name] += 1
    moved: dict[str, float] = defaultdict(float)
    for name, size in calls:
        moved[name] += size
    return [
        Operator(name, sum(kernels.values()), moved[name], count[name], max(kernels, key=kernels.__getitem__)[:80])
        for name, kernels in taken.items()
    ]


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of what at least one interval covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
