"""Work in threads with results in the order of the items. What is waited for is the disk, or code without the GIL."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_DISK_THREADS = 8


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield the result of each item. At most 4 * workers items are under way or done and not yet taken."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_chunks(work: Callable[[Item], Result], items: Sequence[Item], size: int = 256) -> Generator[Result, None, None]:
    """Yield the result of each item, for work so short that handing over one item at a time would cost more than it.

    The items not yet begun are dropped when the caller stops or the work fails.
    """
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    pool = ThreadPoolExecutor(_DISK_THREADS)
    try:
        for results in pool.map(lambda chunk: [work(item) for item in chunk], chunks):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)
