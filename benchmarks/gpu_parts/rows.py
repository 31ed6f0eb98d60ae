"""The results of a run: a file of JSON lines, written through, of which the table is made whenever it is asked for."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quiet import counts_others

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "nvidia-dali-cuda120", "triton", "torchvision", "av", "numpy", "simplejpeg", "torchcodec")
SOURCES = ("train.py", "dfer", "dali_pipes", "scripts", "benchmarks")
MIXED, CONTROL = "mixed batches", "control"  # how the rows of benchmarks/gpu_parts/mixing.py begin
OTHERS_UNKNOWN = "cannot be told here"
LOUD = 1.0  # cores that others may take: a child's start and end are counted with its cases
TABLE_COLUMNS = ("part", "case", "what", "value", "unit", "n", "low to high", "beside it")
HIDDEN = {"event", "part", "case", "at", "what", "value", "unit", "n", "low", "high", "right"}

Row = dict[str, Any]


def figure(what: str, values: float | Sequence[float], unit: str, **more: object) -> Row:
    """Make a row: the median of the repeats, with their number and range. `right`: whether a check was passed."""
    repeats = [float(v) for v in ([values] if isinstance(values, int | float) else values)]
    ends = {"low": min(repeats), "high": max(repeats)} if len(repeats) > 1 else {}
    return {"what": what, "value": statistics.median(repeats), "unit": unit, "n": len(repeats), **ends, **more}


def append(path: Path, row: Row) -> None:
    """Add a row in one write that reaches the disk: whatever happens next, it is there and whole."""
    line = json.dumps({name: _rounded(value) for name, value in row.items()}) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path, start: int = 0) -> tuple[list[Row], int]:
    """Read the whole lines from byte `start` on, and where the next one will begin. A line that is no row is left out.

    Someone who dies while writing may leave a part of a line.
    """
    if not path.exists():
        return [], start
    with open(path, "rb") as file:
        file.seek(start)
        whole, newline, _ = file.read().rpartition(b"\n")
    rows = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows, start + len(whole) + len(newline)


def machine() -> Row:
    """Describe what figures depend on, without touching the card: its driver's own tool is asked."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    cards = [line.split(", ") for line in _output(query).splitlines() if line.count(", ") == 2]
    unnamed = "a card that nvidia-smi does not name" if Path("/dev/nvidiactl").exists() else None
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]).strip()
    changed = bool(_output(["git", "-C", str(ROOT), "status", "--porcelain"]).strip()) if commit else None
    cores = len(os.sched_getaffinity(0))
    return {
        "card": cards[0][0] if cards else unnamed,
        "driver": cards[0][1] if cards else None,
        "card_memory": cards[0][2] if cards else None,
        "cores": cores,
        "others": "counted" if counts_others(cores) else OTHERS_UNKNOWN,
        "cpu": _cpu(),
        "beside_core_0": _siblings(),
        "python": platform.python_version(),
        **versions,
        "commit": commit or "no git here",
        "changed": changed,
        "source": source_hash(),
    }


def source_hash() -> str:
    """Identify the program where there is no git: the same for the same Python files, on every machine."""
    digest = hashlib.sha256()
    for name in SOURCES:
        found = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py"))
        for path in found:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def headline(about: Row) -> str:
    """Say in one line on what and with what the figures of a file were made."""
    shown = {name: value for name, value in about.items() if name not in ("event", "at")}
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in shown.items())


def table(rows: Sequence[Row]) -> str:
    """Make the table, in Markdown: machine, figures, then all that failed or was left out."""
    lines = [f"{headline(row)}\n" for row in rows if row.get("event") == "machine"]
    lines += [" | ".join(TABLE_COLUMNS), " | ".join("---" for _ in TABLE_COLUMNS)]
    lines += [" | ".join(_cells(row)) for row in rows if row.get("event") == "figure"]
    for event in ("failed", "left out"):
        told = [row for row in rows if row.get("event") == event]
        lines += [f"\n{event}:\n"] * bool(told)
        lines += [f"- {row['part']}, {row['case']}: {row['reason']}" for row in told]
    lines += about_mixing(rows)
    unknown = any(row.get("others") == OTHERS_UNKNOWN for row in rows)
    lines += [f"\nWhether others used the cores {OTHERS_UNKNOWN}: the system counts the whole host's."] * unknown
    loud = [row for row in rows if row.get("foreign_cores", 0.0) > LOUD and not unknown]
    lines += [f"\nNOT QUIET, do not quote: other processes took more than {LOUD:g} of the cores:\n"] * bool(loud)
    lines += [f"- {row['part']}, {row['case']}: {row['foreign_cores']:.2f} cores" for row in loud]
    wrong = [row for row in rows if row.get("right") is False]
    lines += ["\nWRONG:\n"] * bool(wrong)
    lines += [f"- {row['part']}, {row['case']}: {row['what']}: {_number(row['value'])} {row['unit']}" for row in wrong]
    return "\n".join(lines) + "\n"


def about_mixing(rows: Sequence[Row]) -> list[str]:
    """Say what "0 mixed batches" is worth here: something only if the card mixed where it could be seen."""
    if not any(row.get("what", "").startswith(MIXED) for row in rows):
        return []
    controls = [row["value"] for row in rows if row.get("what", "").startswith(CONTROL)]
    seen = f"{sum(value > 0 for value in controls)} of {len(controls)} controls mixed" if controls else "no control ran"
    return [f"\n0 {MIXED} say something of a card only if one of the controls is above 0; here {seen}."]


def write_table(out: Path) -> str:
    """Write the table beside the results, whole or not at all, and return it."""
    text = table(read(out / "results.jsonl")[0])
    partial = out / "table.md.partial"
    partial.write_text(text)
    os.replace(partial, out / "table.md")
    return text


def _cells(row: Row) -> list[str]:
    low, high = row.get("low"), row.get("high")
    spread = f"{_number(low)} to {_number(high)}" if low is not None else ""
    more = ", ".join(f"{name} {_number(value)}" for name, value in row.items() if name not in HIDDEN)
    verdict = {True: "right", False: "WRONG"}.get(row.get("right"), "")
    beside = ", ".join(filter(None, (verdict, more)))
    value = _number(row["value"])
    return [row["part"], row["case"], row["what"], value, row["unit"], str(row["n"]), spread, beside]


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _siblings() -> str:
    """The cores that share a core's units with the first, itself among them: as 0,8 where 16 are threads of 8."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return "not told"


def _output(command: list[str]) -> str:
    """What a command prints; nothing if it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()
