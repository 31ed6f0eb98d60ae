"""The processes of one machine, whose GPUs read each other's memory."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from dfer.cli import UserError
from dfer.files import reason
from dfer.run.distributed import World

Found = TypeVar("Found")


def can_share(local_size: int) -> bool:
    """Return whether each of the first GPUs of this machine, one for each process, reads the memory of all others."""
    gpus = range(local_size)
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


class Neighbours:
    """The processes of this machine, of which this is number `rank` of `size`.

    All processes of the run make one at the same time, and call each method at the same time.
    """

    def __init__(self, world: World):
        self._world, self._handles = world, []
        self.rank, self.size = world.local_rank, world.local_size
        # Each group is made by all processes of the run, whatever their machine.
        first = world.rank - world.local_rank  # the ranks of a machine follow each other
        machines = sorted({*_gathered((first, world.local_size), world.size)}) if world.size > 1 else []
        groups = {begin: dist.new_group(list(range(begin, begin + size))) for begin, size in machines}
        self._group: Any = groups.get(first)

    def memory(self, num_bytes: int) -> tuple[UInt8[Tensor, " _"], list[int]]:
        """Return memory of this GPU, of as many bytes in each process, and where this GPU finds that of each of them.

        It lasts as long as this object does.

        Raises:
            UserError: if the GPUs do not share memory.
        """
        if self.size == 1:
            alone = torch.empty(num_bytes, dtype=torch.uint8, device=self._world.device)
            return alone, [alone.data_ptr()]
        # Unlike the memory of torch's allocator, it is mapped for the other GPUs' kernels, not for copies alone.
        from torch.distributed import _symmetric_memory as symmetric

        try:
            own = symmetric.empty(num_bytes, dtype=torch.uint8, device=self._world.device)
            handle: Any = symmetric.rendezvous(own, self._group)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"--data.cache shares: the GPUs of this machine do not share memory ({reason(error)}); "
                "--data.cache off reads the clips instead"
            ) from None
        self._handles.append(handle)  # which keeps what is mapped
        addresses = [int(address) for address in handle.buffer_ptrs]
        assert addresses[self.rank] == own.data_ptr()
        return own, addresses

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
