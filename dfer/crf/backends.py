"""Backends of the CRF: which there are, which is taken, and the pairs that each makes of a batch.

dense: matrix products, as many clips at once as fit the cache (`dense.py`); the default.
triton: kernels that never write a pair to memory, for GPUs (`triton.py`).
sdpa: torch's attention, differentiated by autograd (`sdpa.py`): a cross-check that shares neither sweeps nor gradients
with the others, and plain operators for exporters.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dfer.crf.dense import dense_groups
from dfer.crf.pairs import DifferentiablePairs

Backend = Literal["auto", "dense", "triton", "sdpa"]


def resolve_backend(backend: Backend) -> Literal["dense", "triton", "sdpa"]:
    """Return the backend that "auto" stands for, any other as it is.

    "auto" is dense on a GPU too, until the Triton kernels are the fastest there by measurement.
    """
    return "dense" if backend == "auto" else backend


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
    if backend == "triton":
        from dfer.crf.triton import TritonPairs  # here, because Triton is not installed everywhere

        yield slice(None), TritonPairs(points, operands, scale)
        return
    yield from dense_groups(points, operands, accumulate, scale)
