"""Backends of the CRF: which there are, which is taken, and the pairs that each makes of a batch.

dense: matrix products, as many clips at once as fit the cache (`dense.py`); the default on a CPU.
triton: kernels that never write a pair to memory (`triton.py`); the default on a GPU.
sdpa: torch's attention, differentiated by autograd (`sdpa.py`): a cross-check that shares neither sweeps nor gradients
with the others, and plain operators for exporters.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dfer.cli import say_once
from dfer.crf.dense import DensePairs, dense_groups
from dfer.crf.pairs import DifferentiablePairs
from dfer.files import reason

Backend = Literal["auto", "dense", "triton", "sdpa"]
NO_GPU = "there is no GPU here"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: Backend, gpu: bool = False) -> Literal["dense", "triton", "sdpa"]:
    """Return the backend that "auto" stands for, any other as it is: on a GPU Triton's kernels, where it is installed.

    Whether they run there, their first call finds out.
    """
    if backend != "auto":
        return backend
    return "triton" if gpu and _HAS_TRITON else "dense"


@functools.cache
def triton_runs(device: torch.device, operands: torch.dtype) -> bool:
    """Return whether Triton's kernels are taken on a device; the first time it is said if it cannot run them.

    On a CPU they are not, without a word: a model that was trained on a GPU is looked at there.
    """
    why = trouble(device, operands)
    if why not in (None, NO_GPU):
        say_once(f"--model.crf-backend triton: {why}; dense is taken")
    return why is None


@functools.cache
def trouble(device: torch.device, operands: torch.dtype) -> str | None:
    """Return why Triton's kernels cannot be trusted on a device with operands of a type.

    They are compiled there, which takes a C compiler, and do with a few points what dense pairs do.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return NO_GPU
    try:
        off = _distance(device, operands)
    except Exception as error:  # of Triton, its compiler and the driver, which raise different classes
        return f"its kernels do not run here ({reason(error)})"
    # A term of a sum has two rounded factors or three, and terms that cancel are a few times as large as their sum.
    # Exponents are float32 always: the logarithm of a pair is off by some units of its half norms.
    allowed = 8 * torch.finfo(operands).eps / 2 + 1e-5
    return None if off <= allowed else f"its kernels are {off:.1e} off dense pairs"


def _distance(device: torch.device, operands: torch.dtype) -> float:
    """Return how far a step and a gradient are from dense pairs in float64, as a share of the largest element."""
    from dfer.crf.triton import TritonPairs  # here, because Triton is not installed everywhere

    # Several blocks of tokens; states and values of the default model, which are no multiples of anything.
    shape, num_states, num_ranks = (2, 66, 28), 7, 20
    points = torch.arange(math.prod(shape)).view(shape).mul(0.7).sin().mul(0.5)
    points = points.to(operands).double()  # they are rounded anyway
    waves, shares = torch.arange(2 * 66 * 64).view(2, 66, 64).mul(0.3).cos().double(), points.flip(0).abs()
    states, values = waves[..., :num_states], waves.flip(1)
    compatibility, eta = shares[0, :num_states, :num_states], torch.tensor([1.0, 0.6]).double()
    step = (states.softmax(-1), states, states.flip(0), shares[..., :num_states], compatibility, eta, values)
    left, right = waves[..., :num_ranks], shares[..., :num_ranks]
    dense = DensePairs(points, torch.float64, torch.float64, None, None)
    gradient = (left, right, (right * dense.sweep(left)).sum(-1))
    pairs = TritonPairs(points.float().to(device), operands, None)
    want = [*dense.step(*step), *dense.sweep_both(states, values), dense.sweep(states), dense.gradient(*gradient)]
    step, gradient = ([x.float().to(device) for x in given] for given in (step, gradient))
    both = states.float().to(device), values.float().to(device)
    got = [*pairs.step(*step), *pairs.sweep_both(*both), pairs.sweep(both[0]), pairs.gradient(*gradient)]
    apart = [(a.double().cpu() - b).abs().max() / b.abs().max() for a, b in zip(got, want, strict=True)]
    return float(torch.stack(apart).nan_to_num(torch.inf).max())


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
    if backend == "triton" and triton_runs(points.device, operands):
        from dfer.crf.triton import TritonPairs  # here too

        yield slice(None), TritonPairs(points, operands, scale)
        return
    yield from dense_groups(points, operands, accumulate, scale)
