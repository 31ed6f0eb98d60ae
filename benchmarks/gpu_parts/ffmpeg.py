"""FFmpeg in a process on each core. Nothing heavy is imported here: each process imports it again."""

import itertools
import multiprocessing
import time
from collections.abc import Sequence

import av


class FFmpeg:
    """Processes that decode whole videos over and over and count them, from entering to leaving."""

    def __init__(self, paths: Sequence[str], processes: int):
        context = multiprocessing.get_context("spawn")  # forked ones would hold the card's context
        self._count = context.Value("q", 0)
        self._seen = 0
        self._processes = [
            context.Process(target=decode, args=(list(paths), self._count, i), daemon=True) for i in range(processes)
        ]

    def __enter__(self) -> "FFmpeg":
        for process in self._processes:
            process.start()
        while self._count.value < len(self._processes):
            time.sleep(0.01)
            for process in self._processes:
                if process.exitcode is not None:
                    raise RuntimeError(f"FFmpeg's process ended with exit code {process.exitcode}")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def decoded(self) -> int:
        """How many videos were decoded since the last call; some of a second are waited for."""
        time.sleep(0.1)
        count = self._count.value
        new, self._seen = count - self._seen, count
        return new


def decode(paths: Sequence[str], count: object, first: int) -> None:
    """Decode from the `first` video on, converting nothing."""
    for path in itertools.islice(itertools.cycle(paths), first, None):
        with av.open(path) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for _ in container.decode(video=0):
                pass
        with count.get_lock():
            count.value += 1
