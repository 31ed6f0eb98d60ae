"""What a clip from a video costs: `python benchmarks/video_cost.py LIST [--rounds N]`

CPU seconds of this process for a clip, from the file to normalised float32, T x 3 x size x size, on one thread each:
ours, the field's ways, and FFmpeg alone, which decodes the same frames and converts nothing. They take turns, forwards
and backwards, and medians over the rounds are printed: CPU seconds say something on a machine that others use too,
clips/s do not. The ceiling is FFmpeg when it skips what no wanted frame needs, and nothing of one that is needed: its
loop filter stays on. Its packets pass through PyAV, as ours do not: it is a yardstick, not a bound.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import peers
from benchmarks.peers import Cuts, Task
from dali_pipes import kernels
from dali_pipes.video_files import VideoFiles
from dfer.cli import Parser, in_range
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from dfer.video.decode import best_stream, open_quickly

CEILING, OURS = "FFmpeg, skipping", "dfer"
READERS = {
    "torchcodec": peers.torchcodec_video,
    "OpenCV": peers.cv2_video,
    "PyAV": peers.pyav_video,
    "decord": peers.decord_video,
}
Work = Callable[[int], object]  # of one video


def decode_needed(path: Path, times: set[int]) -> list[int]:
    """Decode what the frames at these times need, and return the times of all that were decoded."""
    found, left = [], set(times)
    with open_quickly(path) as container:
        video = best_stream(container)
        decoder = video.codec_context
        for packet in container.demux(video):
            decoder.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
            found += [frame.pts for frame in decoder.decode(packet)]
            left.discard(packet.pts)
            if not left:
                break
        found += [frame.pts for frame in decoder.decode()]
    return found


def decode_whole(path: Path) -> None:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode(video=0):
            pass


def ways(task: Task) -> tuple[dict[str, Work], dict[str, str]]:
    """Return what is measured, and why some of it is not."""
    index, cuts, source = task.index, Cuts(task), VideoFiles(task.index)
    store, yuv, plan = source.store, source.yuv(), cuts.plan(0)

    def times(video: int) -> set[int]:
        return set(store.pts[store.first[video] + plan.frames[video]].tolist())

    # As by the loader: memory is used again, and what a batch needs is looked up at once.
    memory = np.empty((plan.frames.shape[1], task.size, task.size, 3), dtype=np.float32)
    table = kernels.parameters(plan, np.arange(len(index)), yuv=yuv)

    def ours(video: int) -> object:
        source.write(video, plan.frames[video], memory, table[video])
        return memory

    found: dict[str, Work] = {
        CEILING: lambda video: decode_needed(index.records[video].path, times(video)),
        "FFmpeg, whole": lambda video: decode_whole(index.records[video].path),
        "dfer, decoding alone": lambda video: source.fetch(video, plan.frames[video]),
        OURS: ours,
    }
    missing = {}
    for name, open_reader in READERS.items():
        try:
            read = open_reader(task, task.folder)
            read(0, plan.frames[0].tolist())
        except (ImportError, ValueError) as error:
            missing[name] = str(error)
            continue

        def clip(video: int, read: peers.Reader = read) -> object:
            return peers.cv2_tail(read(video, plan.frames[video].tolist()), cuts.cut(0, video), task.size)

        found[name] = clip
    return found, missing


def measure(work: dict[str, Work], count: int, rounds: int) -> dict[str, list[float]]:
    """Return ms of CPU a clip, by round; one round before them is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-1, rounds):
        for name in list(work) if number % 2 else reversed(work):
            began = time.process_time()
            for video in range(count):
                work[name](video)
            if number >= 0:
                spent[name].append(1000 * (time.process_time() - began) / count)
    return spent


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = Parser("video_cost.py", __doc__)
    parser.add_argument("list", type=Path, help="a list of videos that state when their frames are shown (mp4, mkv)")
    parser.add_argument("--clips", type=in_range(int, 1, 10**6), default=64, help="the first ones of the list")
    parser.add_argument("--rounds", type=in_range(int, 1, 1000), default=5)
    parser.add_argument("--frames", type=in_range(int, 1, 1024), default=16)
    parser.add_argument("--size", type=in_range(int, 32, 1024), default=112)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    sampler = ClipSampler(0, args.frames, augmentation=Augmentation(min_crop_area=0.08))
    task = Task(args.list.parent, sampler, 1, args.size, 1, "cpu", args.list.stem)
    work, missing = ways(task)
    spent = measure(work, min(args.clips, len(task.index)), args.rounds)
    table = Table(title="CPU of a clip")
    for column in ("", "ms", "its share of the ceiling", "dfer is faster by"):
        table.add_column(column, justify="right")
    for name, values in spent.items():
        share = statistics.median(c / v for c, v in zip(spent[CEILING], values, strict=True))
        ratio = statistics.median(v / o for o, v in zip(spent[OURS], values, strict=True))
        table.add_row(name, f"{statistics.median(values):.2f}", f"{share:.2f}", f"{ratio:.2f}")
    for name, why in missing.items():
        table.add_row(name, "-", why, "-")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
