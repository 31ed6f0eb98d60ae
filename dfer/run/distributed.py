"""The processes of a run: one under plain python, several under torchrun. How they start, agree to stop, and end."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfer.cli import UserError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: dist.Store | None = None  # outlives the processes under torchrun: what a restarted one has to know

    @property
    def is_main(self) -> bool:
        return self.rank == 0


EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal, everything is saved, the same command continues
EXIT_PEER = 69  # EX_UNAVAILABLE: another process died or hangs
EXIT_GAVE_UP = 70  # stopped by a signal, but the step did not end in time: the last checkpoint counts
GRACE_S = 8.0  # from a signal to the end of the process, whatever it is waiting for
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Has the C library keep freed memory for what is allocated next, where it can be told to (glibc).

    A step on a CPU frees its activations and asks for as much again. Given back to the system in between, their pages
    come back empty, one fault each: some 30,000 in a step of 16 clips at 48 px, 100,000 of 8 clips at 112 px.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)  # what is smaller comes from the heap


def setup(device: Literal["auto", "cpu", "cuda"], timeout: timedelta = timedelta(minutes=10)) -> World:
    """Find rank and device, and join the others if there are any (NCCL on GPUs, gloo on CPUs).

    `timeout` is how long one process waits for another; it must cover the slowest first step (compilation).

    Raises:
        UserError: if a GPU is asked for that is not there.
    """
    rank, size = _from_launcher("RANK", 0), _from_launcher("WORLD_SIZE", 1)
    local_rank, local_size = _from_launcher("LOCAL_RANK", 0), _from_launcher("LOCAL_WORLD_SIZE", 1)
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not available:
        raise UserError("--run.device cuda: no NVIDIA GPU is visible here")
    if device != "cpu" and 0 < available < local_size:
        raise UserError(f"{local_size} processes for {available} GPUs: lower --nproc_per_node or --run.device cpu")
    use_gpu = device != "cpu" and available > 0
    torch_device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(torch_device)
    else:
        keep_freed_memory()
    if size == 1:
        return World(rank, size, local_rank, local_size, torch_device)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        _from_launcher("MASTER_PORT", 0),
        # torchrun keeps the store and its content when it restarts the processes
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    # Each attempt has its own names in it: else it would wait at the addresses of the one before, which are dead.
    attempt = dist.PrefixStore(f"attempt-{_attempt()}", store)
    backend = "nccl" if use_gpu else "gloo"
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank, local_size, torch_device, store)


def _from_launcher(name: str, default: int) -> int:
    """Return a number that torchrun has left in the environment."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"the environment's {name} is {text!r}, not a number: start several processes with torchrun")
    return int(text)


def _attempt() -> int:
    return _from_launcher("TORCHELASTIC_RESTART_COUNT", 0)


def remembered(world: World, key: str, value: str) -> str:
    """`value`, or what an earlier attempt of this torchrun called by that key. Of one rank only."""
    if world.store is None:
        return value
    if _attempt() and world.store.check([key]):
        return world.store.get(key).decode()
    world.store.set(key, value)
    return value


def share(content: bytes | None, world: World) -> bytes | None:
    """Give all ranks what rank 0 has."""
    if world.size == 1:
        return content
    size = torch.tensor(-1 if content is None else len(content), device=world.device)
    dist.broadcast(size, src=0)
    if size < 0:
        return None
    shared = torch.empty(int(size), dtype=torch.uint8, device=world.device)
    if world.is_main:
        shared.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(shared, src=0)
    return shared.cpu().numpy().tobytes()


@contextlib.contextmanager
def peers_named(world: World, patience: float = 3.0) -> Iterator[None]:
    """Where a rank hangs or has died, end the run with one line that says which, and not how a library noticed.

    All ranks that are waiting notice within moments of each other and leave word in the store: who does not within
    `patience` seconds is not waiting but the one that is waited for.
    """
    try:
        yield
    except RuntimeError as error:
        if world.store is None or not re.search(r"gloo|nccl|timed? ?out|connection", str(error), re.IGNORECASE):
            raise
        silent = _silent_ranks(world, patience)
        if silent == []:
            raise
        if silent is None:
            who = f"neither a rank nor the store on {os.environ['MASTER_ADDR']} answered within --run.timeout; is the "
            who += "network down?"
        else:
            who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))} of {world.size} died or did not "
            who += "answer within --run.timeout;"
        line = f"train.py: rank {world.rank}: {who} the same command continues from the last checkpoint"
        print(line, file=sys.stderr, flush=True)
        if silent is None:
            _end_with_launcher(world)
        raise SystemExit(EXIT_PEER) from None


def _silent_ranks(world: World, patience: float) -> list[int] | None:
    """Those who do not leave word in the store within `patience` seconds; None if the store does not answer."""
    found: list[list[int]] = []

    def look() -> None:
        try:
            notes = [f"attempt-{_attempt()}/{rank} waited in vain" for rank in range(world.size)]
            world.store.set(notes[world.rank], "")
            time.sleep(patience)
            found.append([rank for rank, note in enumerate(notes) if not world.store.check([note])])
        except RuntimeError:  # the store itself is gone, and rank 0 with it
            found.append([0])

    # A store that cannot be reached any more is waited for until TCP gives up, which takes a quarter of an hour.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(2 * patience)
    return found[0] if found else None


def _end_with_launcher(world: World) -> NoReturn:
    """End this process, and torchrun if it waits for the same store: that it does without a limit and deaf to signals.

    Nothing else would end it: it does not even notice that its processes have ended.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        launcher = os.getppid()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_PEER))  # if it hears, it ends its processes
        # One after the other, as torchrun stumbles over a second signal; all but the first mostly have nothing to do.
        for wait, number in ((4.0 * world.local_rank, signal.SIGTERM), (2.0, signal.SIGKILL)):
            give_up = time.monotonic() + wait
            while os.getppid() == launcher and time.monotonic() < give_up:
                time.sleep(0.05)
            if os.getppid() == launcher:
                os.kill(launcher, number)
    os._exit(EXIT_PEER)  # not by the interpreter's ways, as a thread still waits for the store


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 ask a run to stop, and all ranks learn of it at the same step.

    One byte per step is summed over a gloo group of its own, in the background: the step itself waits for nothing, and
    a GPU is not asked. The answer is looked at one step later. Where a step does not end (a dead peer, a device that
    hangs) the process ends all the same, `GRACE_S` after the signal, without another word to its peers.
    """

    def __init__(self, world: World, timeout: timedelta = timedelta(minutes=10)):
        # Its time-out is not that of the other group by itself: an evaluation waits for nothing but this.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._asked = False
        self._sum, self._pending = torch.zeros(1, dtype=torch.uint8), None
        self.saved = False  # what there is to save is saved: giving up costs nothing any more

    def __enter__(self) -> "StopSignals":
        # Python runs handlers between two bytecodes of the main thread, which may be waiting in a library for ever.
        # The wake-up pipe is written by the signal itself.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        threading.Thread(target=self._end_in_time, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._asked or kind is not None:
            return  # all that is left of the process is to end, and that stays bounded
        if self._pending is not None:
            self._pending.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True

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
                print(f"train.py: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_STOPPED if self.saved else EXIT_GAVE_UP)

    def requested(self) -> bool:
        """Whether to stop here. All ranks call it equally often and get the same answer."""
        if self._group is None:
            return self._asked
        if self._pending is not None:
            self._pending.wait()
            if int(self._sum):
                return True
        self._sum = torch.tensor([self._asked], dtype=torch.uint8)
        self._pending = dist.all_reduce(self._sum, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False


def cleanup() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the batch statistics of rank 0, so that they evaluate one and the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def count_distinct(rows: Iterable[int], num_rows: int, world: World) -> int:
    """How many of the rows 0 .. num_rows - 1 any rank has."""
    own = torch.zeros(num_rows, dtype=torch.uint8, device=world.device)
    own[list(rows)] = 1
    return int(gather(own, world).view(world.size, num_rows).amax(0).sum())


def gather(tensor: Tensor, world: World) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along the first axis."""
    if world.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
