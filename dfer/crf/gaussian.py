"""The mode of a continuous Gaussian CRF over the appearance kernel, exactly, by conjugate gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from dfer.crf.backends import Backend, grouped, resolve_backend
from dfer.crf.pairs import Pairs, adjoint_sweep
from dfer.crf.sdpa import SdpaPairs


def gaussian_field(
    points: Float[Tensor, "B N d"],
    values: Float[Tensor, "B N C"],
    beta: Float[Tensor, ""],
    iterations: int = 8,
    backend: Backend = "auto",
    operands: torch.dtype | None = None,
) -> Float[Tensor, "B N C"]:
    """Return the mode of a continuous Gaussian CRF: x = argmin |x - values|^2 + beta x^T (I - S) x.

    It solves (I + beta (I - S)) x = values by conjugate gradients, each column for itself; the condition number is at
    most 1 + 2 beta, so 8 steps leave 1e-6 at beta = 1. The gradient is one more solve.

    Args:
        points: z of the appearance kernel; float32 (or float64), as which everything is summed.
        values: of any type.
        beta: >= 0.
        iterations: steps of conjugate gradients.
        backend: see backends.py.
        operands: type to which operands of matrix products are rounded; that of `points` if not given.
    """
    backend = resolve_backend(backend, points.is_cuda and points.dtype is torch.float32)
    operands = points.dtype if operands is None else operands
    if backend != "sdpa":
        return _gaussian_op(points, values, beta, iterations, backend, operands)[0]
    return _solve(SdpaPairs(points, operands), _precise(values, points), beta, iterations, operands)


def _precise(x: Tensor, points: Tensor) -> Tensor:
    """Return x in the type of the sums. Contiguous, as the order of a sum over tokens depends on its strides."""
    return x.to(points.dtype).contiguous()


def _solve(pairs: Pairs, values: Tensor, beta: Tensor, iterations: int, operands: torch.dtype) -> Tensor:
    """Return (I + beta (I - S))^-1 values."""

    def matrix(x: Tensor) -> Tensor:
        return (1 + beta) * x - beta * adjoint_sweep(pairs, x, operands)

    def ratio(a: Tensor, b: Tensor) -> Tensor:  # 0 for a column that is solved, so that it stays as it is
        return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)

    x = values
    residual = direction = values - matrix(values)
    squared = residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        image = matrix(direction)
        step = ratio(squared, (direction * image).sum(1, keepdim=True))
        x, residual = x + step * direction, residual - step * image
        before, squared = squared, residual.square().sum(1, keepdim=True)
        direction = residual + ratio(squared, before) * direction
    return x


@torch.library.custom_op("dfer::gaussian_field", mutates_args=())
def _gaussian_op(
    points: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    iterations: int,
    backend: str,
    operands: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the solution and 1 / sqrt(degree)."""
    solutions, scales = [], []
    with torch.autocast(points.device.type, enabled=False):
        for clips, pairs in grouped(backend, points, operands, points.dtype):
            solutions.append(_solve(pairs, _precise(values[clips], points), beta, iterations, operands))
            scales.append(pairs.scale)
    return torch.cat(solutions), torch.cat(scales)


@_gaussian_op.register_fake
def _(points, values, *_):
    return points.new_empty(values.shape), points.new_empty(points.shape[:2])


@torch.library.custom_op("dfer::gaussian_field_backward", mutates_args=())
def _gaussian_backward_op(
    to_solution: torch.Tensor,
    solution: torch.Tensor,
    points: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    scale: torch.Tensor,
    iterations: int,
    backend: str,
    operands: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of points, values and beta."""
    to_points, to_values, to_beta = [], [], torch.zeros_like(beta)
    with torch.autocast(points.device.type, enabled=False):
        for clips, pairs in grouped(backend, points, operands, points.dtype, scale):
            x, outer = solution[clips], to_solution[clips].contiguous()
            adjoint = _solve(pairs, outer, beta, iterations, operands)
            # S x and S adjoint follow from the equations that x and adjoint solve: no sweep is needed.
            to_beta += (adjoint * (x - values[clips])).sum() / beta
            columns = (((1 + beta) * adjoint - outer) * x).sum(-1)
            to_points.append(pairs.gradient(beta * adjoint, x, columns))
            to_values.append(adjoint.to(values.dtype))
    return torch.cat(to_points), torch.cat(to_values), to_beta


@_gaussian_backward_op.register_fake
def _(to_solution, solution, points, values, beta, *_):
    return torch.empty_like(points), torch.empty_like(values), torch.empty_like(beta)


def _keep_gaussian(ctx, inputs, output):
    points, values, beta, *options = inputs
    solution, scale = output
    ctx.save_for_backward(solution, points, values, beta, scale)
    ctx.options = options
    ctx.mark_non_differentiable(scale)


def _gaussian_backward(ctx, to_solution, _):
    gradients = _gaussian_backward_op(to_solution, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None


_gaussian_op.register_autograd(_gaussian_backward, setup_context=_keep_gaussian)
