"""Memory: what is free, and what to change where there is not enough."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from dfer.cli import UserError
from dfer.config import Config


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free now, on the GPU or in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return 1024 * int(found[1])


@contextlib.contextmanager
def memory_advice(config: Config, begun: bool = False) -> Iterator[None]:
    """Turn an error of memory that runs out into one that says which numbers to change.

    Of a run that has `begun` these cannot be changed: they would make another run of it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        data = config.data
        advice = (
            "halve --data.batch-size and double --optim.accumulate, or lower "
            f"--data.num-segments ({data.num_segments}) or --data.size"
        )
        if begun:
            advice = "a run keeps its step: continue it on more processes, which share the batch, or with more memory"
        raise UserError(
            f"out of memory with {data.batch_size} clips of T = {data.num_segments * data.frames_per_segment} frames "
            f"of {data.size} px per process: {advice}"
        ) from None
