"""Threads that fetch clips ahead of the graph."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Readers:
    """Threads that read ahead. The process does not wait for one that hangs when it ends, unlike those of a pool."""

    def __init__(self, num_threads: int):
        self._jobs: SimpleQueue = SimpleQueue()
        self._num_threads = num_threads
        self._closed = False
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True, name="clip reader").start()

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True  # what is waiting is not begun any more
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        future: Future = Future()
        self._jobs.put((future, function, args))
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function, args = job
            if self._closed:
                continue
            try:
                future.set_result(function(*args))
            except BaseException as error:  # whatever it is, the consumer gets it
                future.set_exception(error)
