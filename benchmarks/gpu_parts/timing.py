"""Rates: windows of some seconds, the card waited for at both ends, in turns where things are compared."""

import threading
import time
from collections.abc import Callable, Mapping

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.setting import Setting


def wait(setting: Setting) -> None:
    """Return when the card has done all that it was told."""
    if setting.gpu:
        cuda.synchronize()


def window(setting: Setting, run: Callable[[], int]) -> float:
    """Units per second of `run`, which says how many it did, over at least `seconds`.

    After four runs those before them are waited for: the card always has work, and the host is never more than eight
    runs ahead. Without that it could queue seconds of work in a window of less than one.
    """
    wait(setting)
    began, units, before = time.perf_counter(), 0, None
    while True:
        for _ in range(4 if setting.seconds else 1):
            units += run()
        if setting.gpu:
            queued = cuda.Event()
            queued.record()
            if before is not None:
                before.synchronize()
            before = queued
        if time.perf_counter() - began >= setting.seconds:
            break
    wait(setting)
    return units / (time.perf_counter() - began)


def repeated(setting: Setting, run: Callable[[], int]) -> list[float]:
    """The rates of `repeats` windows, after a warm-up."""
    for _ in range(setting.warm_up):
        run()
    return [window(setting, run) for _ in range(setting.repeats)]


def in_turns(setting: Setting, runs: Mapping[str, Callable[[], int]]) -> dict[str, list[float]]:
    """The same for several, forwards and backwards in turn, since the speed of a machine drifts.

    Each window has a warm-up of its own, which uses up what a loader had made ahead while another one was measured.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(setting.repeats):
        for name in runs if number % 2 == 0 else reversed(runs):
            for _ in range(setting.warm_up):
                runs[name]()
            found[name].append(window(setting, runs[name]))
    return found


def ratios(found: Mapping[str, list[float]], name: str, base: str) -> list[float]:
    """Round by round: the rate of one over that of another."""
    return [a / b for a, b in zip(found[name], found[base], strict=True)]


def at_once(
    setting: Setting, runs: Mapping[str, Callable[[], int]], beside: Callable[[], int] | None = None
) -> tuple[dict[str, float], float]:
    """Units per second of several that run at the same time, each in a thread, and of what this thread does beside.

    Each is counted from its first to its last whole turn.
    """
    stop, rates, errors = threading.Event(), {}, []

    def turn(name: str, run: Callable[[], int]) -> None:
        try:
            run()
            began, units = time.perf_counter(), 0
            while True:
                units += run()
                now = time.perf_counter()
                if stop.is_set():
                    break
            rates[name] = units / (now - began)
        except BaseException as error:  # in a thread it would only be printed
            errors.append(error)

    threads = [threading.Thread(target=turn, args=item, daemon=True) for item in runs.items()]
    for thread in threads:
        thread.start()
    rate = during(setting, beside)
    stop.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return rates, rate


def during(setting: Setting, beside: Callable[[], int] | None) -> float:
    """Units per second of `beside` for `seconds`; with none, sleep so long."""
    if beside is not None:
        return window(setting, beside)
    time.sleep(setting.seconds)
    return 0.0
