"""How fast can clips be read and handed to the decoder? `python benchmarks/feed.py [--json FILE]`

All that the loader does but decoding and pixels: plans, bytes read, headers checked, tables made, one batch handed over
after the other. It is the limit that no decoder can pass, however fast. One core, the page cache warm; the sources take
turns, medians are printed. "GIL": how long a clip keeps all other Python from running, which is what a second core
cannot help; of it the share of a training step is what the loader takes from the trainer.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.storage import files_of, prepare, prepare_frames, warm
from dali_pipes import graphs, native
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.cli import Parser, in_range, one_line_errors
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler

SOURCES = ("frames", "shards144", "raw128")
READS = ("read_files", "read_ranges", "find_pixels")


def without_pixels(kind: str, max_frames: int, size: int, dtype: str, num_threads: int) -> Pipeline:
    """Build a graph that takes what ours takes and makes one black pixel for each frame."""
    pipeline = Pipeline(max_frames, num_threads, None, prefetch_queue_depth=1)
    with pipeline:
        source, pixel = graphs._input("source"), fn.slice(graphs._input("parameters"), 0, 3, axes=[0])
        if kind == "images":
            length = fn.cast(fn.shapes(graphs._file(source)), dtype=types.DALIDataType.FLOAT)
            crop = fn.slice(graphs._input("anchor") + graphs._input("shape"), 0, 1, axes=[0])
            pixel = 0 * (pixel + length + crop)
        else:
            pixel = 0 * (pixel + fn.slice(fn.cast(source, dtype=types.DALIDataType.FLOAT), 0, 1, axes=[0]))
        pipeline.set_outputs(fn.reshape(pixel, shape=[1, 1, 3]))
    pipeline.build()
    return pipeline


class Timed:
    """A compiled function, and the processor's time that was spent in it."""

    def __init__(self, function: Callable):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: object) -> None:
        began = time.thread_time()
        self.function(*args)
        self.seconds += time.thread_time() - began


def of_dali() -> float:
    """Return the seconds of processor time of DALI's threads."""
    ticks = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        name, _, rest = stat.read_text().rpartition(")")
        if "DALI" in name:
            ticks += sum(map(int, rest.split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(list_path: Path, batch_size: int, frames: int, seconds: float) -> dict[str, float]:
    """Return clips/s, by the clock and by the processor's time, and the microseconds of Python for a clip."""
    sampler = ClipSampler(0, frames, augmentation=Augmentation(min_crop_area=0.5))
    with mock.patch.object(graphs, "fused", without_pixels):
        loader = ClipLoader(load_index(list_path), sampler, LoaderOptions(batch_size, 1, num_threads=1))
    timed = [Timed(getattr(native, name)) for name in READS]
    with mock.patch.multiple(native, **dict(zip(READS, timed, strict=True))):
        list(loader(0))
        list(loader(1))
        before = [sum(t.seconds for t in timed), of_dali(), time.process_time(), time.perf_counter()]
        clips, epoch = 0, 2
        while time.perf_counter() - before[3] < seconds:
            clips += sum(len(batch.ids) for batch in loader(epoch))
            epoch += 1
        after = [sum(t.seconds for t in timed), of_dali(), time.process_time(), time.perf_counter()]
    compiled, dali, cpu, clock = (b - a for a, b in zip(before, after, strict=True))
    return {"clips/s": clips / clock, "clips/s of a core": clips / cpu, "GIL, us": 1e6 * (cpu - compiled - dali) / clips}


def main(args: argparse.Namespace) -> int:
    """Measure and print; return the exit code."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    folder = prepare_frames(args.list, None, args.clips, Path("data/bench"))
    lists = {}
    for source in SOURCES:
        prepare(folder, source)
        warm(files_of(folder, source))
        lists[source] = folder / "frames.txt" if source == "frames" else folder / source / "frames.txt"
    rows: dict[str, list[dict[str, float]]] = {source: [] for source in SOURCES}
    for _ in range(args.rounds):
        for source, path in lists.items():
            rows[source].append(measure(path, args.batch_size, args.frames, args.seconds))
    for source, found in rows.items():
        medians = {name: statistics.median(row[name] for row in found) for name in found[0]}
        print(f"{source:10}", *(f"{name} {value:9,.1f}" for name, value in medians.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def parser() -> Parser:
    parser = Parser("feed", __doc__)
    parser.add_argument("--list", type=Path, default=Path("data/faces/train.txt"), help="frames of which list")
    parser.add_argument("--clips", type=in_range(int, 1, 10**6), default=512, help="of the list")
    parser.add_argument("--batch-size", type=in_range(int, 1, 10**4), default=32)
    parser.add_argument("--frames", type=in_range(int, 1, 10**3), default=16, help="of a clip")
    parser.add_argument("--seconds", type=in_range(float, 0.1, 10**4), default=4, help="of each measurement")
    parser.add_argument("--rounds", type=in_range(int, 1, 100), default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser


if __name__ == "__main__":
    sys.exit(one_line_errors("feed", lambda: main(parser().parse_args())))
