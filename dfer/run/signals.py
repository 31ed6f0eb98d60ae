"""Signals that ask a run to stop, which all ranks obey at the same step."""

import contextlib
import os
import signal
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dfer.cli import EXIT_GAVE_UP, EXIT_STOPPED, say_error
from dfer.run.distributed import World

GRACE_S = 8.0  # from a signal to the end of the process, whatever it is waiting for
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # a session or a window was closed


def catchable() -> list[signal.Signals]:
    """Return those of SIGNALS that can be caught here: none in a thread, where Python sets no handlers.

    SIGHUP is not if it is ignored: that is what nohup does, and the run is to go on.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def restore(handlers: dict[signal.Signals, Any]) -> None:
    """Set the handlers that `signal.signal` has returned; one that is not Python's cannot be, and is None."""
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)


class StopSignals:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask a run to stop, and all ranks learn of it at the same step.

    One byte per step is reduced over a gloo group of its own, in the background: the step itself waits for nothing, and
    a GPU is not asked. The answer is read one step later. Where a step does not end (a dead peer, a device that hangs)
    the process ends all the same, `GRACE_S` after the signal: if it is ours (`ends`), and not a notebook's or another
    program's, which gets its handlers back.
    """

    def __init__(self, world: World, timeout: timedelta = timedelta(minutes=10), ends: bool = True):
        # A time-out of its own, since during an evaluation this group alone is waited for.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._received, self._ends = False, ends
        self._sum, self._pending = torch.zeros(1, dtype=torch.uint8), None
        self.saved = False  # everything is saved: giving up costs nothing any more

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in catchable()}
        if self._before and self._ends:
            # Python runs handlers between two bytecodes of the main thread, which may be waiting in a library for ever.
            # The wake-up pipe is written by the signal itself.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._end_in_time, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._ends and (self._received or kind is not None):
            return  # all that is left of the process is to end, and that stays bounded
        if self._pending is not None and kind is None:
            self._pending.wait()
        restore(self._before)
        if self._before and self._ends:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)

    def _note(self, number: int, frame: object) -> None:
        self._received = True

    def _end_in_time(self) -> None:
        while content := os.read(self._read, 1):
            if content[0] in SIGNALS:
                break
        else:
            os.close(self._read)
            return
        threading.Event().wait(GRACE_S)
        if not self.saved:
            line = (
                f"no step ended within {GRACE_S:g} s of {signal.Signals(content[0]).name}; the last checkpoint counts"
            )
            with contextlib.suppress(OSError):
                say_error(f"train.py: {line}")
        os._exit(EXIT_STOPPED if self.saved else EXIT_GAVE_UP)

    def requested(self) -> bool:
        """Return whether to stop here. All ranks call it equally often and get the same answer."""
        if self._group is None:
            return self._received
        if self._pending is not None:
            self._pending.wait()
            if int(self._sum):
                return True
        self._sum = torch.tensor([self._received], dtype=torch.uint8)
        self._pending = dist.all_reduce(self._sum, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False
