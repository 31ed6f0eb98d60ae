"""The processes of a run: one under plain python, several under torchrun. How they start, exchange data, and end."""

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfer.batch import Batch
from dfer.cli import EXIT_PEER, UserError, say_error, usable_cores
from dfer.run.launchers import LauncherError, find_place, number

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class World:
    """The place of this process among those of a run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: dist.Store | None = None  # outlives the processes under torchrun: what a restarted one has to know

    @property
    def is_main(self) -> bool:
        """Return whether this process writes what the run leaves."""
        return self.rank == 0

    def own_cores(self) -> int:
        """Return the cores for each process on this machine, one at least."""
        return max(usable_cores() // self.local_size, 1)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for what is allocated next, where it can be told to (glibc).

    A step on a CPU frees its activations and asks for as much again. Given back to the system in between, their pages
    come back empty, one fault each: some 30,000 in a step of 16 clips at 48 px, 100,000 of 8 clips at 112 px.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)  # what is smaller comes from the heap


def setup(device: Literal["auto", "cpu", "cuda"], timeout: timedelta = timedelta(minutes=10)) -> World:
    """Find rank and device, and join the others if there are any (NCCL on GPUs, gloo on CPUs).

    `timeout` is how long one process waits for another; it must cover the slowest first step (compilation).

    Raises:
        UserError: if a GPU is asked for that is not there, or the launcher's environment is damaged.
    """
    rank, size, local_rank, local_size = find_place()
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not available:
        raise UserError(
            "--run.device cuda: no NVIDIA GPU is visible here; --run.device cpu does without, and goes on with "
            "a run that began on one, in other roundings"
        )
    here = max(local_size, local_rank + 1)
    if device != "cpu" and 0 < available < here:
        raise UserError(f"{here} processes for {available} GPUs: lower --nproc_per_node or --run.device cpu")
    use_gpu = device != "cpu" and available > 0
    torch_device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(torch_device)
    else:
        keep_freed_memory()
    if size == 1:
        return World(rank, size, local_rank, local_size, torch_device)
    address, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", None)
    try:
        # torchrun keeps the store and its content when it restarts the processes
        is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(address, port, is_master=is_master, timeout=timeout)
        # Each attempt prefixes its keys: else it would wait at the addresses of the one before, whose processes died.
        attempt = dist.PrefixStore(f"attempt-{_attempt()}", store)
        backend = "nccl" if use_gpu else "gloo"
        # What NCCL waits for ends the process when its time is up, without a word: others, who name it, speak first.
        patience = timeout + timedelta(minutes=1) if use_gpu else timeout
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=patience)
    except dist.DistError as error:
        raise LauncherError(
            f"rank {rank} finds not all {size} processes by {address}:{port} ({str(error).splitlines()[0][:150]}); is "
            "the address right and the port free, and were all processes started? torchrun sees to that"
        ) from None
    return World(rank, size, local_rank, local_size, torch_device, store)


def _attempt() -> int:
    return number("TORCHELASTIC_RESTART_COUNT", 0)


def remembered(world: World, key: str, value: str) -> str:
    """Return what an earlier attempt of this torchrun stored under `key`, else store and return `value`.

    To be called by one rank only.
    """
    if world.store is None:
        return value
    if _attempt() and world.store.check([key]):
        return world.store.get(key).decode()
    world.store.set(key, value)
    return value


def share(content: bytes | None, world: World, source: int = 0) -> bytes | None:
    """Return on all ranks what one of them has."""
    if world.size == 1:
        return content
    size = torch.tensor(-1 if content is None else len(content), device=world.device)
    dist.broadcast(size, src=source)
    if size < 0:
        return None
    shared = torch.empty(int(size), dtype=torch.uint8, device=world.device)
    if content is not None:
        shared.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(shared, src=source)
    return shared.cpu().numpy().tobytes()


@contextlib.contextmanager
def peers_named(world: World, patience: float = 3.0) -> Iterator[None]:
    """End the run with one line that names the rank that hangs or has died, instead of a library's error.

    All ranks that wait for it notice within moments of each other and write a note to the store. A rank without a note
    after `patience` seconds is the one that they wait for.
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
        say_error(line)
        if silent is None:
            _exit_with_launcher(world)
        raise SystemExit(EXIT_PEER) from None


def _silent_ranks(world: World, patience: float) -> list[int] | None:
    """Return the ranks that write no note within `patience` seconds; None if the store does not answer."""
    store, found = world.store, []
    assert store is not None

    def ask() -> None:
        try:
            notes = [f"attempt-{_attempt()}/{rank} waited in vain" for rank in range(world.size)]
            store.set(notes[world.rank], "")
            time.sleep(patience)
            found.append([rank for rank, note in enumerate(notes) if not store.check([note])])
        except RuntimeError:  # the store itself is gone, and rank 0 with it
            found.append([0])

    # A store that cannot be reached any more is waited for until TCP gives up, which takes a quarter of an hour.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * patience)
    return found[0] if found else None


def _exit_with_launcher(world: World) -> NoReturn:
    """Exit, and kill torchrun if it is blocked on the dead store: that wait has no timeout and ignores signals.

    It would not even notice that its processes have ended.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        launcher = os.getppid()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_PEER))  # if torchrun reacts, it ends its processes
        # One local rank after the other, as torchrun stumbles over a second signal: the first one mostly suffices.
        for wait, number in ((4.0 * world.local_rank, signal.SIGTERM), (2.0, signal.SIGKILL)):
            give_up = time.monotonic() + wait
            while os.getppid() == launcher and time.monotonic() < give_up:
                time.sleep(0.05)
            if os.getppid() == launcher:
                os.kill(launcher, number)
    os._exit(EXIT_PEER)  # not by the interpreter's ways, as a thread still waits for the store


def first_failure(why: str | None, world: World) -> str | None:
    """Return on all ranks, once all have come here, why the first of those that failed did; None if none has."""
    failed = gather(torch.tensor([why is not None], dtype=torch.uint8, device=world.device), world).tolist()
    if not any(failed):
        return None
    rank = failed.index(1)
    said = share(why.encode() if why is not None else None, world, rank)
    assert said is not None
    return f"rank {rank}: {said.decode()}"


def parallel(model: nn.Module, world: World) -> DistributedDataParallel:
    """Return a model whose gradients are the means over all ranks. All of them call it, and it becomes rank 0's."""
    on = [world.local_rank] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=on, gradient_as_bucket_view=True)


class Exchange:
    """The mean of the gradients of all ranks, taken between two graphs, of which no exchange is a part.

    DDP exchanges while it computes gradients; here all of them are there first. A graph that held an exchange might
    leave ranks waiting for one that could not capture it.
    """

    def __init__(self, model: nn.Module, world: World):
        """Give all ranks rank 0's weights and batch statistics. All of them call it."""
        for tensor in (*model.parameters(), *model.buffers()):
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, src=0)
            tensor.detach().copy_(dense)
        self._parameters, self._world_size = [p for p in model.parameters() if p.requires_grad], world.size
        self._flat = torch.zeros(sum(p.numel() for p in self._parameters), device=world.device)
        parts = self._flat.split([p.numel() for p in self._parameters])
        self._means = [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, self._parameters, strict=True)]
        self._collected: list[Tensor | None] = []  # the means of those that have gradients

    def collect(self) -> None:
        """Put the gradients of this rank in one piece of memory. A graph can capture it."""
        grads = [p.grad for p in self._parameters]
        self._collected = [None if g is None else mean for g, mean in zip(grads, self._means, strict=True)]
        torch._foreach_copy_([m for m in self._collected if m is not None], [g for g in grads if g is not None])

    def run(self) -> None:
        """Take the mean of what all ranks have collected: as DDP does, shares first, so that none overflows."""
        self._flat /= self._world_size
        dist.all_reduce(self._flat)

    def show(self) -> None:
        """Have the parameters' gradients be the means."""
        for parameter, mean in zip(self._parameters, self._collected, strict=True):
            parameter.grad = mean

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Have the parameters' gradients be the means, and those of this rank again afterwards: graphs add to them."""
        mine = [p.grad for p in self._parameters]
        self.show()
        try:
            yield
        finally:
            for parameter, grad in zip(self._parameters, mine, strict=True):
                parameter.grad = grad


def settle_buckets(ddp: DistributedDataParallel, batch: Batch, loss_of: Callable[[Batch], Tensor]) -> None:
    """Run one backward pass without effect, before the first step of a process.

    DDP then sorts the gradients into buckets anew, and a sum over three or more ranks depends on its place in a bucket.
    Without this the first step of a continued run would round like the first step of a run, and not like the step that
    it is.
    """
    buffers = [b.clone() for b in ddp.module.buffers()]
    ddp.train()
    loss_of(batch).backward()
    ddp.zero_grad()
    for buffer, before in zip(ddp.module.buffers(), buffers, strict=True):
        buffer.copy_(before)


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the batch statistics of rank 0, so that they evaluate one and the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def count_distinct(rows: Iterable[int], num_rows: int, world: World) -> int:
    """Return how many of the rows 0 .. num_rows - 1 any rank has."""
    own = torch.zeros(num_rows, dtype=torch.uint8, device=world.device)
    own[list(rows)] = 1
    return int(gather(own, world).view(world.size, num_rows).amax(0).sum())


def gather(tensor: Tensor, world: World) -> Tensor:
    """Return the equally shaped tensors of all ranks, concatenated along the first axis."""
    if world.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
