"""The benchmark's own data, drawn in place: the same clips as frames, shards, raw pixels and videos."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_parts.rows import ROOT, Row, figure
from benchmarks.gpu_parts.setting import Setting

PACKS = {"shards144": ("--size", "144"), "raw128": ("--format", "raw", "--size", "128")}
HELD_TIMES = 8  # that the clips are in the list of those that the card holds: 2,800, or 6 GB


def prepare(setting: Setting) -> Iterator[Row]:
    """Draw and pack the clips, unless they lie there already, and write lists of DFEW's length."""
    data, began = setting.data, time.perf_counter()
    # DALI decodes H.264 on a card only; what a test walks through instead is Motion JPEG.
    codec = "h264" if setting.device == "cuda" or not setting.gpu else "mjpeg"
    made_of = {"share": setting.data_share, "rows": setting.list_length, "held": HELD_TIMES, "codec": codec}
    stamp = data / "made.json"
    if stamp.exists() and json.loads(stamp.read_text()) == made_of:
        yield figure("data", time.perf_counter() - began, "s", found=str(data))
        return
    shutil.rmtree(data, ignore_errors=True)  # what an interrupted run left
    data.mkdir(parents=True)
    faces = ["scripts/make_faces.py", "--size", str(setting.data_share), "--workers", str(setting.cores)]
    start([[*faces, "--out", str(data / "faces")]])
    drawn = str(data / "faces" / "train.txt")
    packs = [["scripts/pack.py", drawn, "--out", str(data / name), *words] for name, words in PACKS.items()]
    packs = [[*words, "--workers", str(setting.cores)] for words in packs]
    start([*packs, [*faces, "--out", str(data / "video"), "--video", codec]])
    shutil.copy(data / "video" / f"train_{codec}.txt", data / "video" / "train.txt")
    for source in ("faces", *PACKS, "video"):
        repeat(data / source / "train.txt", data / source / "short.txt", None)
        repeat(data / source / "train.txt", data / source / "long.txt", setting.list_length)
    short = data / "raw128" / "short.txt"
    repeat(short, data / "raw128" / "held.txt", HELD_TIMES * len(rows_of(short)))
    scan(setting)
    partial = stamp.with_suffix(".partial")
    partial.write_text(json.dumps(made_of))
    os.replace(partial, stamp)
    yield figure("data drawn and packed", time.perf_counter() - began, "s", cores=setting.cores)


def start(commands: Sequence[Sequence[str]]) -> None:
    """Run scripts of the project at the same time and wait for all.

    Raises:
        RuntimeError: with its last words, if one fails.
    """
    running = [
        subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for words in commands
    ]
    for words, process in zip(commands, running, strict=True):
        _, error = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{words[0]}: exit code {process.returncode}: {error.decode(errors='replace')[-300:]}")


def scan(setting: Setting) -> None:
    """Have every list read once, so that no case makes an index within its own time."""
    from benchmarks.gpu_parts.project import LISTS, index_of  # late: drawing needs neither torch nor DALI

    for source in LISTS:
        for listed in ("short", "long", *["held"] * (source == "raw128")):
            index_of(setting, source, listed)


def rows_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def repeat(source: Path, target: Path, length: int | None) -> None:
    """Write a list of `length` rows, those of another list over and over, or once each."""
    lines = source.read_text().splitlines()
    header = [line for line in lines if line.startswith("#") and "sha256:" not in line]
    rows = rows_of(source)
    chosen = rows if length is None else itertools.islice(itertools.cycle(rows), length)
    target.write_text("\n".join([*header, *chosen]) + "\n")
