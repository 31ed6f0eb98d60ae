"""Work in processes with results in the order of the items, for work that would hold the GIL in threads."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dfer.cli import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_MEMORY = 2**30  # bytes of results that are under way, or done and not yet taken


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int], workers: int, memory: int = _MEMORY
) -> Generator[Result, None, None]:
    """Yield the result of each item. One worker, or one item, needs no process but this one.

    Args:
        work: pickled, as are the items and the results; what it raises is raised here.
        items: what is done in this order, so that a long item keeps no process waiting for it.
        sizes: bytes that each result is expected to take.
        workers: number of processes.
        memory: an item is begun only while the expected results that are not yet taken fit into so many bytes; as many
            items as there are workers are begun in any case.

    Raises:
        UserError: if a process was killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    # Not forked from this process, which may have threads: their locks would stay locked in the child.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(work, "func", work).__module__])  # once, and not in each process
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        waiting, held = deque(), 0
        try:
            for item, size in zip(items, sizes, strict=True):
                while len(waiting) >= workers and held + size > memory:
                    future, taken = waiting.popleft()
                    held -= taken
                    yield future.result()
                waiting.append((pool.submit(work, item), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, as happens where memory runs out: lower --workers") from None
        finally:
            for future, _ in waiting:
                future.cancel()


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, which lets the items under way end, and end at once when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
