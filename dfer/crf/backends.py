"""Backends of the CRF: which there are, which is taken, and the pairs that each makes of a batch.

dense: matrix products, as many clips at once as fit the cache (`dense.py`); the default on a CPU.
triton: kernels that never write a pair to memory (`triton.py`); the default on a GPU.
sdpa: torch's attention, differentiated by autograd (`sdpa.py`): a cross-check that shares neither sweeps nor gradients
with the others, and plain operators for exporters.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dfer.cli import say_once
from dfer.crf.dense import dense_groups
from dfer.crf.pairs import DifferentiablePairs
from dfer.files import reason

Backend = Literal["auto", "dense", "triton", "sdpa"]
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: Backend, gpu: bool = False) -> Literal["dense", "triton", "sdpa"]:
    """Return the backend that "auto" stands for, any other as it is: on a GPU Triton's kernels, where it is installed.

    Whether they run there, their first call finds out.
    """
    if backend != "auto":
        return backend
    return "triton" if gpu and _HAS_TRITON else "dense"


@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Return whether Triton's kernels can be trusted on a device; the first time it is said if they cannot.

    They are compiled there, which takes a C compiler, and sweep a few points as dense pairs do.
    """
    why = _trouble(device)
    if why is not None:
        say_once(f"--model.crf-backend triton: {why}; dense is taken")
    return why is None


def _trouble(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "there is no GPU here"
    points = torch.arange(2 * 70 * 8, device=device).view(2, 70, 8).mul(0.7).sin()
    try:
        from dfer.crf.triton import TritonPairs

        (_, dense), *_ = dense_groups(points, torch.float32, torch.float32, None)
        want = dense.sweep(points)
        off = float((TritonPairs(points, torch.float32, None).sweep(points)[: len(want)] - want).abs().max())
    except Exception as error:  # of Triton, its compiler and the driver, which raise different classes
        return f"its kernels do not run here ({reason(error)})"
    return None if off <= 1e-2 else f"its kernels are {off:.1e} off dense pairs"  # of sums of at most 1


def grouped(
    backend: str,
    points: Float[Tensor, "B N d"],
    operands: torch.dtype,
    accumulate: torch.dtype,
    scale: Float[Tensor, "B N"] | None = None,
) -> Iterator[tuple[slice, DifferentiablePairs]]:
    """Yield groups of clips that are worked on together, and their pairs ("dense" or "triton").

    A group's pairs are valid until the next group is asked for.

    Args:
        backend: "dense", or "triton", which takes all clips at once.
        points: z of the appearance kernel.
        operands: type to which operands of matrix products are rounded.
        accumulate: type of the sums.
        scale: 1 / sqrt(degree) if it is known already, from the forward pass.
    """
    if backend == "triton" and triton_runs(points.device):
        from dfer.crf.triton import TritonPairs  # here, because Triton is not installed everywhere

        yield slice(None), TritonPairs(points, operands, scale)
        return
    yield from dense_groups(points, operands, accumulate, scale)
