"""How fast can clips be read and handed to the decoder? `python benchmarks/feed.py [--json FILE]`

All that the loader does but decoding and pixels: plans, bytes read, headers checked, tables made, one batch handed over
after the other. It is the limit that no decoder can pass, however fast. One core, the page cache warm; the sources take
turns, medians are printed. Files are copied more slowly where a machine's memory has come to be in pieces: as root,
`echo 1 > /proc/sys/vm/drop_caches` before it frees the page cache as a whole. "GIL": how long a clip keeps all other
Python from running, which is what a second core cannot help; of it the share of a training step is what the loader
takes from the trainer.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numba import carray, types
from nvidia.dali.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.storage import chill, files_of, prepare, prepare_frames, warm
from dali_pipes import graphs, native
from dali_pipes.compiling import cfunc
from dali_pipes.feeding import Feed
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.cli import Parser, in_range, one_line_errors
from dfer.lists.index import ClipIndex, Packed, load_index
from dfer.lists.scan import FrameFiles
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler

SOURCES = ("frames", "shards144", "raw128")
READS = ("read_files", "read_ranges", "find_pixels")


_addresses, _dimensions = types.CPointer(types.voidptr), types.CPointer(types.int32)
_shapes = types.CPointer(types.CPointer(types.int64))


@cfunc(types.void(_addresses, _shapes, _dimensions, types.int32, _addresses, _shapes, _dimensions, types.int32))
def _black(outs, out_shapes, out_dimensions, num_outs, ins, in_shapes, in_dimensions, num_ins):
    pixels = carray(outs[0], (3 * out_shapes[0][0],), np.float32)
    pixels[:] = 0


@cfunc(types.void(_shapes, _dimensions, types.int32, _shapes, _dimensions, types.int32, types.int32))
def _one_pixel(out_shapes, out_dimensions, num_outs, in_shapes, in_dimensions, num_ins, num_samples):
    for i in range(num_samples):
        out_shapes[i][0] = in_shapes[i][0]
        out_shapes[i][1] = out_shapes[i][2] = 1
        out_shapes[i][3] = 3


def inputs_alone(kind: str, max_samples: int, size: int, dtype: str, num_threads: int) -> Pipeline:
    """Build a graph that takes what ours takes, and makes a black pixel of each frame."""
    pipeline = Pipeline(max_samples, num_threads, None, prefetch_queue_depth=1)
    kinds = [graphs._UINT8 if kind == "images" else graphs._INT64, graphs._FLOAT]
    with pipeline:
        operator = graphs._Compiled(
            _black.address,
            [graphs._FLOAT],
            kinds,
            outs_ndim=[4],
            ins_ndim=[2, 1],
            setup_fn=_one_pixel.address,
        )
        pipeline.set_outputs(operator(graphs._input("source"), graphs._input("parameters")))
    pipeline.build()
    return pipeline


class WithoutPixels(Feed):
    """A feed that hands everything over, and gives black clips of one pixel."""

    def _outputs(self, started: Any) -> torch.Tensor:
        self._pipelines[started.pipeline].outputs()
        return self.zeros(self._options.batch_size)


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
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            name, _, rest = stat.read_text().rpartition(")")
            ticks += sum(map(int, rest.split()[11:13])) if "DALI" in name else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def repeated(index: ClipIndex, times: int) -> ClipIndex:
    """Return an index of the same clips over and over, so that an epoch is long."""
    rows, store = np.tile(np.arange(len(index)), times), index.store
    if isinstance(store, Packed):
        store = store.select(rows)
    else:
        assert isinstance(store, FrameFiles)
        store = FrameFiles([store.names[row] for row in rows])
    records = [index.records[row] for row in rows]
    return ClipIndex(records, index.num_frames[rows], index.labels[rows], store)


def measure(list_path: Path, batch_size: int, frames: int, seconds: float) -> dict[str, float]:
    """Return clips/s, by the clock and by the processor's time, and where the microseconds of a clip go."""
    sampler = ClipSampler(0, frames, augmentation=Augmentation(min_crop_area=0.5))
    with mock.patch.object(graphs, "fused", inputs_alone), mock.patch("dali_pipes.videos.Feed", WithoutPixels):
        index = load_index(list_path)
        index = repeated(index, -(-64 * batch_size // len(index)))
        loader = ClipLoader(index, sampler, LoaderOptions(batch_size, 1, num_threads=1))
    timed = [Timed(getattr(native, name)) for name in READS]
    with mock.patch.multiple(native, **dict(zip(READS, timed, strict=True))):
        list(loader(0))
        before = [sum(t.seconds for t in timed), of_dali(), time.process_time(), time.perf_counter()]
        clips, epoch = 0, 1
        while time.perf_counter() - before[3] < seconds:
            clips += sum(len(batch.ids) for batch in loader(epoch))
            epoch += 1
        after = [sum(t.seconds for t in timed), of_dali(), time.process_time(), time.perf_counter()]
    compiled, dali, cpu, clock = (b - a for a, b in zip(before, after, strict=True))
    us = 1e6 / clips
    parts = {"reading, us": us * compiled, "DALI, us": us * dali, "GIL, us": us * (cpu - compiled - dali)}
    return {"clips/s": clips / clock, "clips/s of a core": clips / cpu} | parts


def main(args: argparse.Namespace) -> int:
    """Measure and print; return the exit code."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    folder = prepare_frames(args.list, None, args.clips, Path("data/bench"))
    lists = {}
    for source in SOURCES:
        prepare(folder, source)
        files = [*files_of(folder, source)]
        chill(files)  # what was just written may lie in small pieces, which take longer to copy
        warm(files)
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
    parser.add_argument("--batch-size", type=in_range(int, 1, 10**4), default=64)
    parser.add_argument("--frames", type=in_range(int, 1, 10**3), default=16, help="of a clip")
    parser.add_argument("--seconds", type=in_range(float, 0.1, 10**4), default=4, help="of each measurement")
    parser.add_argument("--rounds", type=in_range(int, 1, 100), default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser


if __name__ == "__main__":
    sys.exit(one_line_errors("feed", lambda: main(parser().parse_args())))
