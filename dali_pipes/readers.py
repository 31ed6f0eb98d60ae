"""Threads that fetch clips before the graph needs them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


def parts_of(num_clips: int, number: int) -> list[tuple[int, int]]:
    """Return first clip and end of each of `number` parts of a batch."""
    return [*pairwise(num_clips * part // number for part in range(number + 1))] if number else []


class Readers:
    """Threads that read ahead. Unlike those of a pool, they do not keep a process from ending while one hangs."""

    def __init__(self, num_threads: int):
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self.num_threads = num_threads
        self._closed = False
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True, name="clip reader").start()

    def close(self) -> None:
        """End the threads; one that is in a job ends after it."""
        self._closed = True  # jobs that wait are dropped
        for _ in range(self.num_threads):
            self._jobs.put(None)

    def submit(self, function: Callable[[*Arguments], Result], *args: *Arguments) -> Future[Result]:
        """Return the future result of a call, which the next free thread does."""
        future: Future[Result] = Future()
        self._jobs.put((future, function, args))
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._closed:
                _do(*job)
            del job  # a thread that waits must not hold the memory that its last job read into


def _do(future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        future.set_result(function(*args))
    except BaseException as error:  # of any kind: it is raised where the result is asked for
        future.set_exception(error)
