"""Signals that ask a run to stop, which all ranks obey at the same step."""

import contextlib
import math
import os
import select
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dfer.cli import EXIT_GAVE_UP, EXIT_STOPPED, say_error
from dfer.run.distributed import World

# From a signal to the end of the process, whatever it is waiting for: so many seconds, or as long as three of its
# longest steps if that is more. Slurm, torchrun and Kubernetes kill what has not ended 30 s after SIGTERM.
GRACE_S, LONGEST_STEPS = 25.0, 3
_SAME_KEY_S = 1.0  # a launcher hands on the Ctrl-C that its processes have got from the terminal too
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


def _at_terminal() -> bool:
    """Return whether Ctrl-C is from a user who can press it again; torchrun sends its processes a second one itself."""
    return "TORCHELASTIC_RUN_ID" not in os.environ and (os.isatty(0) or os.isatty(2))


def _end(number: int, frame: object) -> None:
    """End a process whose run is done: what is left of it only tells."""
    raise SystemExit(EXIT_STOPPED)


class StopSignals:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask a run to stop, and all ranks learn of it at the same step.

    One byte per step is reduced over a gloo group of its own, in the background: the step itself waits for nothing, and
    a GPU is not asked. The answer is read one step later. Where a step does not end (a dead peer, a device that hangs)
    the process ends all the same, after a while: if it is ours (`ends`), and not a notebook's or another program's,
    which gets its handlers back. After a Ctrl-C at a terminal it waits for the step, and a second one ends it.

    Args:
        world: the processes.
        timeout: how long one of them waits for the others.
        ends: this process is ours to end.
        grace: seconds from a signal to the end of the process; 0 = as GRACE_S says.
    """

    def __init__(
        self,
        world: World,
        timeout: timedelta = timedelta(minutes=10),
        ends: bool = True,
        grace: float = 0.0,
    ):
        # A time-out of its own, since during an evaluation this group alone is waited for.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._received, self._ends, self._grace = False, ends, grace
        self._called_at, self._longest, self._stopping_at = time.monotonic(), 0.0, 0.0
        self._sum, self._pending = torch.zeros(1, dtype=torch.uint8), None
        self.unsaved = 0  # steps that the last checkpoint lacks
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
            for number in self._before.keys() - {signal.SIGINT}:  # which is a KeyboardInterrupt again
                signal.signal(number, _end)

    def _note(self, number: int, frame: object) -> None:
        self._received = True

    def _end_in_time(self) -> None:
        number = self._next_signal(math.inf)
        if number is None:
            os.close(self._read)
            return
        began = time.monotonic()
        patient = number == signal.SIGINT and self._grace == 0 and _at_terminal()
        if patient:
            self._say("stops when this step has ended and is saved; Ctrl-C once more ends it at once")
        why = ""
        while not why:
            left = math.inf if patient else began + self._grace_s(began) - time.monotonic()
            again = self._next_signal(left)
            if again is None and left <= 0:
                why = f"no step ended within {self._grace_s(began):.3g} s of {signal.Signals(number).name}"
            elif again is None:  # meanwhile a step may have ended
                continue
            elif patient and again != signal.SIGINT:  # the machine ends, or a scheduler
                patient, began, number = False, time.monotonic(), again
            elif patient and time.monotonic() - began > _SAME_KEY_S:
                why = "ended by a second Ctrl-C"
        if not self.saved:
            self._say(f"{why}; the last checkpoint counts; steps lost since: {self.unsaved}")
        os._exit(EXIT_STOPPED if self.saved else EXIT_GAVE_UP)

    def _next_signal(self, seconds: float) -> int | None:
        """Wait for one of SIGNALS; return None when the time is up, or when no more are listened to."""
        while True:
            if not select.select([self._read], [], [], None if seconds == math.inf else max(seconds, 0))[0]:
                return None
            content = os.read(self._read, 1)
            if not content or content[0] in SIGNALS:
                return content[0] if content else None

    def _grace_s(self, began: float) -> float:
        """Return the seconds between a signal and the end of the process, whatever it is waiting for."""
        if self._grace:
            return self._grace
        # Saving has as much time as the step before it.
        saving = self._stopping_at - began if self._stopping_at > began else 0
        return saving + max(GRACE_S, LONGEST_STEPS * self._longest)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            say_error(f"train.py: {line}")

    def requested(self) -> bool:
        """Return whether to stop here. All ranks call it equally often and get the same answer."""
        now = time.monotonic()
        self._longest, self._called_at = max(self._longest, now - self._called_at), now
        stops = self._stops()
        self._stopping_at = now if stops else 0.0
        return stops

    def _stops(self) -> bool:
        if self._group is None:
            return self._received
        if self._pending is not None:
            self._pending.wait()
            if int(self._sum):
                return True
        self._sum = torch.tensor([self._received], dtype=torch.uint8)
        self._pending = dist.all_reduce(self._sum, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False
