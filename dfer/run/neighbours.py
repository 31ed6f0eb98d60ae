"""The processes of one machine, whose GPUs read each other's memory."""

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from dfer.cli import UserError
from dfer.files import reason
from dfer.run.distributed import World

Found = TypeVar("Found")

REMEDY = "; --data.cache off reads the clips instead of holding them"


def can_share(local_size: int) -> bool:
    """Return whether each of the first GPUs of this machine, one for each process, reads the memory of all others."""
    gpus = range(min(local_size, torch.cuda.device_count()))
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


class Neighbours:
    """The processes of this machine, of which this is number `rank` of `size`.

    All processes of the run make one at the same time, and call each method at the same time.

    Args:
        world: the processes of the run.
        timeout: how long one of them waits for the others.
    """

    def __init__(self, world: World, timeout: timedelta = timedelta(minutes=10)):
        self._world, self._handles = world, []
        own = world.rank - world.local_rank  # the first of this machine's, whose ranks follow each other
        firsts = _gathered(own, world.size)
        self.rank, self.size = world.local_rank, firsts.count(own)
        # Each group is made by all processes of the run, whatever their machine. Gloo's errors say who is missing.
        groups = {
            first: dist.new_group(list(range(first, first + firsts.count(first))), backend="gloo", timeout=timeout)
            for first in sorted(set(firsts))
            if world.size > 1
        }
        self._group: Any = groups.get(own)

    def memory(self, num_bytes: int) -> list[UInt8[Tensor, " _"]]:
        """Return memory of each process's GPU, in their order, as this one's GPU reads it.

        It lasts as long as this object does. `num_bytes` is the same for all.

        Raises:
            UserError: if there is not so much memory, or the GPUs do not share it.
        """
        if self.size == 1:
            return [torch.empty(num_bytes, dtype=torch.uint8, device=self._world.device)]
        # Memory of torch's own allocator is mapped for copies between GPUs, not for kernels. Multicast, which NVSwitch
        # has, is not needed, and others report that it fails on some machines.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        from torch.distributed import _symmetric_memory as symmetric

        own, why = None, None
        try:
            own = symmetric.empty(num_bytes, dtype=torch.uint8, device=self._world.device)
        except RuntimeError as error:
            why = (
                f"--data.cache shares: no {num_bytes / 2**30:.1f} GiB of GPU memory to share ({reason(error)}){REMEDY}"
            )
        self.agree(why)  # before one waits for another's memory
        assert own is not None
        try:
            handle: Any = symmetric.rendezvous(own, self._group)
            parts = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self.size)]
        except dist.DistError:
            raise  # of a process that is gone
        except RuntimeError as error:
            raise UserError(
                f"--data.cache shares: the GPUs of this machine do not share memory ({reason(error)}){REMEDY}"
            ) from None
        self._handles.append((own, handle))  # which keep what is mapped
        assert parts[self.rank].data_ptr() == own.data_ptr()
        return parts

    def agree(self, why: str | None) -> None:
        """Wait for all processes of the run, and for what this one's GPU is doing.

        Raises:
            UserError: in all of them, if there is a reason `why` one of them fails.
        """
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        whys = _gathered(why, self._world.size)
        failed = next((rank for rank, why in enumerate(whys) if why is not None), None)
        if failed is not None:
            raise UserError(f"rank {failed}: {whys[failed]}" if self._world.size > 1 else whys[failed])

    def each(self, found: Found) -> list[Found]:
        """Return what each process of this machine has found."""
        return _gathered(found, self.size, self._group)


def _gathered(found: Found, size: int, group: Any = None) -> list[Found]:
    """Return what each of the processes of a group has."""
    if size == 1:
        return [found]
    everywhere: list[Any] = [None] * size
    dist.all_gather_object(everywhere, found, group=group)
    return everywhere
