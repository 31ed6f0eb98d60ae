"""WAR and UAR from one confusion matrix; throughput with the wait for data as its own number; memory."""

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dfer.batch import Batch


class ConfusionMatrix:
    """Counts (label, prediction) pairs in int64, so sums over batches and ranks are exact in any order."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.counts: Int64[Tensor, "K K"] = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    @classmethod
    def pooled(cls, matrices: Sequence["ConfusionMatrix"]) -> "ConfusionMatrix":
        """Return the matrix of all their clips together."""
        total = cls(len(matrices[0].counts))
        for matrix in matrices:
            total.counts += matrix.counts
        return total

    def update(self, predictions: Int64[Tensor, " B"], labels: Int64[Tensor, " B"], valid: Bool[Tensor, " B"]) -> None:
        """Count the valid clips. Does not wait for the GPU."""
        k = len(self.counts)
        self.counts.view(-1).scatter_add_(0, labels * k + predictions, valid.long())

    def all_reduce(self) -> None:
        """Sum over all ranks."""
        if dist.is_initialized():
            dist.all_reduce(self.counts)

    def total(self) -> int:
        """Return the number of clips."""
        return int(self.counts.sum())

    def war(self) -> float:
        """Return the weighted average recall, that is accuracy, in percent."""
        return 100 * int(self.counts.trace()) / max(self.total(), 1)

    def per_class_recall(self) -> Float[Tensor, " K"]:
        """Return the recall of each class in percent; nan for a class without clips."""
        counts = self.counts.double().cpu()
        return 100 * counts.diag() / counts.sum(1)

    def uar(self) -> float:
        """Return the unweighted average recall in percent: the mean over the classes that have clips."""
        return float(self.per_class_recall().nanmean())


class DeviceClock:
    """Seconds that a GPU works on what is queued between two events, without waiting for it.

    What a stream waits for between them counts as work: it is to be one launch, such as a graph.
    """

    def __init__(self):
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is queued in here."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._pairs.append((start, end))
        self._collect()  # else there would be more and more of them between two rows of the log

    def seconds(self) -> float:
        """Return the seconds of all that is done; what is still queued counts later."""
        self._collect()
        return self._seconds

    def _collect(self) -> None:
        while self._pairs and self._pairs[0][1].query():
            start, end = self._pairs.popleft()
            self._seconds += start.elapsed_time(end) / 1000


class Snapshot(NamedTuple):
    num_clips: int
    wait_s: float
    total_s: float
    worked_s: float | None = None  # of the device; None: not known


BEGINNING = Snapshot(0, 0.0, 0.0)


class Throughput:
    """Clips per second of all ranks, with and without the time spent waiting for the loader.

    The clock runs inside `timed` loops. A batch counts once it is handed out.
    """

    def __init__(self, world_size: int = 1, worked_s: Callable[[], float | None] = lambda: None):
        """Count from now on; `worked_s` returns the seconds that the device has worked so far, where that is known."""
        self._world_size, self._num_clips, self._wait_s = world_size, 0, 0.0
        self._worked_s = worked_s
        self._total_s, self._running_since = 0.0, None

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, and clock how long each one was waited for."""
        self._running_since = time.perf_counter()
        try:
            iterator = iter(batches)
            while True:
                asked = time.perf_counter()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                finally:
                    self._wait_s += time.perf_counter() - asked
                self._num_clips += len(batch.labels) * self._world_size
                yield batch
        finally:
            self._total_s += time.perf_counter() - self._running_since
            self._running_since = None

    def snapshot(self) -> Snapshot:
        """Return what was counted and clocked so far."""
        running_s = time.perf_counter() - self._running_since if self._running_since is not None else 0.0
        return Snapshot(self._num_clips, self._wait_s, self._total_s + running_s, self._worked_s())

    def read(self, since: Snapshot = BEGINNING) -> dict[str, float]:
        """Return the rates since a snapshot, or since the beginning.

        "busy", the share of the time in which the device worked, is there where both know of the device.
        """
        now = self.snapshot()
        num_clips, wait_s, total_s = (a - b for a, b in zip(now[:3], since[:3], strict=True))
        total_s = max(total_s, 1e-9)
        rates = {
            "total_clips_per_s": num_clips / total_s,
            "compute_clips_per_s": num_clips / max(total_s - wait_s, 1e-9),
            "data_wait_share": wait_s / total_s,
        }
        if now.worked_s is not None and since.worked_s is not None:
            # A step that is done here may have begun before.
            rates["busy"] = min((now.worked_s - since.worked_s) / total_s, 1.0)
        return rates


# Dense bf16 FLOP/s of the datasheets, by what a driver calls the card; the first that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
}


def peak_flops(name: str, known: Mapping[str, float] = PEAK_FLOPS) -> float | None:
    """Return the dense bf16 FLOP/s of a card; None where no datasheet was looked up."""
    return next((flops for part, flops in known.items() if part in name), None)


def flop_share(flops_a_clip: float | None, clips_per_s: float, device: torch.device) -> float | None:
    """Return the share of a GPU's peak that a model computes at; None where its FLOP or its peak are not known."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if flops_a_clip is None or peak is None else flops_a_clip * clips_per_s / peak


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: of the GPU (by torch), else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage: that is also of the process that started this one
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
