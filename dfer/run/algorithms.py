"""How torch computes: with how many threads, and by those algorithms that are the fastest or always round alike."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from dfer.cli import UserError
from dfer.config import RunConfig

_WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, with which its sums have one order


@contextlib.contextmanager
def chosen_algorithms(run: RunConfig) -> Iterator[None]:
    """Let torch take what --run.deterministic and --run.threads say. Enter before anything is computed on a GPU.

    Without it cuDNN measures its algorithms for each shape and keeps the fastest: which one may be another in the next
    process, so that a continued run rounds otherwise than the unbroken one would have.

    Raises:
        UserError: on the way out, if the run needs an operator for which torch has no such algorithm.
    """
    if run.deterministic and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _WORKSPACES[0]  # cuBLAS reads it when it is first called
    before, threads = _settings(), torch.get_num_threads()
    torch.set_num_threads(run.threads or threads)  # another number sums in another order
    # Of the kernels of attention the memory-efficient one alone has a gradient that is an atomic sum. Nothing here
    # reads memory before it is written: filling it first would cost as much as work.
    _set(run.deterministic, run.deterministic, not run.deterministic, not run.deterministic, False)
    try:
        yield
    except RuntimeError as error:
        named = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if named is None:
            raise
        raise UserError(
            f"--run.deterministic: torch has no algorithm for {named[1]} that rounds alike each time; leave it out, or "
            "choose another model"
        ) from None
    finally:
        _set(*before)
        torch.set_num_threads(threads)


def _settings() -> tuple[bool, bool, bool, bool, bool]:
    """Return what `_set` sets."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def _set(fixed: bool, cudnn_fixed: bool, cudnn_benchmark: bool, efficient_attention: bool, fill: bool) -> None:
    torch.use_deterministic_algorithms(fixed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn_fixed, cudnn_benchmark
    torch.backends.cuda.enable_mem_efficient_sdp(efficient_attention)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
