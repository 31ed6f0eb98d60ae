"""What a process uses, and what the others take from it: figures count only from a quiet machine."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.10  # cores that other processes may take


def counts_others(cores: int) -> bool:
    """Whether /proc/stat counts the cores of this machine only: in a container it has those of the whole host."""
    lines = Path("/proc/stat").read_text().splitlines()
    return os.cpu_count() == cores == sum(1 for line in lines if line[:3] == "cpu" and line[3].isdigit())


@dataclass(frozen=True)
class Usage:
    """CPU seconds since the start, of this process with its children, and of the whole machine."""

    at: float
    own: float
    busy: float

    @staticmethod
    def now() -> "Usage":
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        )
        own = sum(sum(map(int, stat[11:15])) for stat in family().values())
        tick = os.sysconf("SC_CLK_TCK")
        # Stolen time is what a virtual machine's host gave to others.
        return Usage(time.perf_counter(), own / tick, (user + nice + system + irq + softirq + steal) / tick)

    def since(self, start: "Usage") -> dict[str, float]:
        seconds = self.at - start.at
        own, busy = self.own - start.own, self.busy - start.busy
        return {"seconds": seconds, "cpu_s": own, "foreign_cores": max(busy - own, 0.0) / seconds}


def family() -> dict[int, list[str]]:
    """The fields of /proc/PID/stat after the name, of this process and all that descend from it."""
    stats = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                stats[int(entry.name)] = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
    own = {os.getpid()}
    while more := {pid for pid, stat in stats.items() if int(stat[1]) in own} - own:
        own |= more
    return {pid: stats[pid] for pid in own}


def memory_mib() -> float:
    """Memory of this process and its children, what they share counted once and mapped files not at all."""
    kib = 0
    for pid in family():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    kib += int(line.split()[1])
    return kib / 1024


def wait_for_quiet(patience: float) -> None:
    """Return when other processes take less than QUIET cores, or after `patience` seconds."""
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        start = Usage.now()
        time.sleep(0.5)
        if Usage.now().since(start)["foreign_cores"] < QUIET:
            return
