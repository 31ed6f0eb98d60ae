"""Mean-field inference of a dense CRF: exact sums over all pairs of tokens, in O(N) memory for the backward pass.

`meanfield` is the door. The backward pass is written by hand: as S is symmetric, the adjoint of one sweep is a sweep,
and the gradient of the points is one pass over all pairs, of rank I*L + C, whatever the number I of iterations. It
keeps the inputs and one number per token, never an N x N matrix, and computes the marginals of each iteration again;
short operands take half the room of the inputs, and what that spares the last marginals take.

Backends, which differ only in how they sweep (dfer/crf/pairs.py):
    dense: matrix products, as many clips at once as fit the cache; the default.
    triton: kernels that never write a pair to memory, for GPUs (dfer/crf/triton.py).
    sdpa: torch's scaled_dot_product_attention over augmented points, differentiated by autograd: a cross-check that
        shares neither sweeps nor gradients with the others, and plain operators for exporters.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfer.crf.pairs import (
    Backend,
    DifferentiablePairs,
    Pairs,
    SdpaPairs,
    Smoothness,
    adjoint_sweep,
    adjoint_sweep_both,
    grouped,
    resolve_backend,
    rounded,
)


class Features(NamedTuple):
    """What the two kernels of a batch of clips compare. N = T*P tokens, token (t, c) at row t*P + c."""

    points: Float[Tensor, "B N d"]  # z: the appearance kernel is computed from these
    frames: Float[Tensor, "B T T"] | None = None  # the smoothness kernel is frames (x) cells, both normalised with
    cells: Float[Tensor, "P P"] | None = None  # their diagonals in; the token's message to itself is taken out again


class MeanField(NamedTuple):
    """All but the first two come without gradient."""

    marginals: Float[Tensor, "B N L"]
    values: Float[Tensor, "B N C"] | None  # S values: one sweep of the appearance kernel
    scale: Float[Tensor, "B N"]  # 1 / sqrt(degree) in the appearance kernel; 0 for invalid tokens
    damping: Float[Tensor, " B"]
    residual: Float[Tensor, " B"]  # largest change of a marginal in the last iteration
    energies: Float[Tensor, "B I"]  # free energy before each iteration, in nats


def meanfield(
    unary: Float[Tensor, "B N L"],
    features: Features,
    compatibility: Float[Tensor, "H L L"],
    valid: Bool[Tensor, "B N"],
    iterations: int,
    damping: Float[Tensor, " B"] | Literal["certified", "indefinite"] = "certified",
    values: Float[Tensor, "B N C"] | None = None,
    backend: Backend = "auto",
    operands: torch.dtype | None = None,
) -> MeanField:
    """Parallel mean-field updates, damped in log space (a proximal step in Kullback-Leibler divergence).

    q = softmax(a);  a <- (1 - eta) a + eta (unary + sum_h S^h q M^h),  eta = 1 / (1 + damping), the same for all of a
    clip. Differentiable once, with respect to unary, features, compatibility and values. Invalid tokens send nothing,
    count in no degree and get the uniform distribution; what they hold does not matter, nan included.

    Args:
        unary: log-potentials, higher is likelier; float32 (or float64). Sums, degrees and softmax have this type.
        features: the points of the appearance kernel and the factors of the smoothness kernel.
        compatibility: M^h, symmetric: appearance and, if `features` has one, smoothness.
        valid: tokens that take part; whole frames where there is a smoothness kernel, whose factor over frames then has
            zero rows and columns for the others.
        iterations: I >= 0; 0 leaves softmax(unary).
        damping: rho >= 0 of each clip; or the least one under which the free energy provably never increases, for
            positive semi-definite ("certified") or for any symmetric M ("indefinite").
        values: swept once by the appearance kernel.
        backend: "auto" takes dense.
        operands: type to which what enters a matrix product is rounded (points, marginals, values); that of `unary` if
            not given. The kernel is that of the rounded points, so that every guarantee survives.
    """
    assert iterations >= 0 and len(compatibility) == (1 if features.frames is None else 2)
    backend = resolve_backend(backend)
    operands = unary.dtype if operands is None else operands
    given = None if isinstance(damping, str) else damping
    bounds = curvature_bounds(compatibility.detach(), indefinite=damping == "indefinite" if given is None else False)
    points, *factors = features
    rest = (*factors, compatibility, valid, given, bounds, values, iterations)
    if backend == "sdpa":
        outputs = _infer(SdpaPairs(points, valid, operands), unary, *rest, operands)
    else:
        outputs = _meanfield_op(unary, points, *rest, backend, operands)
    marginals, swept, *diagnostics = outputs
    return MeanField(marginals, swept if values is not None else None, *(x.detach() for x in diagnostics))


def curvature_bounds(compatibility: Float[Tensor, "H L L"], indefinite: bool) -> Float[Tensor, "H 2"]:
    """Bounds on the largest eigenvalue of each M and on the negative of the smallest, without a decomposition.

    ||M||_inf bounds the first; Gershgorin's discs the second, which is 0 for positive semi-definite M.
    """
    largest = compatibility.abs().sum(-1).amax(-1)
    if not indefinite:
        return torch.stack([largest, torch.zeros_like(largest)], dim=1)
    diagonal = compatibility.diagonal(dim1=-2, dim2=-1)
    reach = (compatibility.abs().sum(-1) - diagonal.abs() - diagonal).amax(-1).clamp(min=0)
    return torch.stack([largest, reach], dim=1)


def certified_damping(max_self: Float[Tensor, "B H"], bounds: Float[Tensor, "H 2"]) -> Float[Tensor, " B"]:
    """The least damping rho under which the free energy provably never increases; usually 0.

    The spectrum of S with its diagonal lies in [0, 1], so without it in [-max_i 1/d_i, 1], and the curvature of the
    pairwise term is at least -lam, lam = sum_h max(mu_+ max_i 1/d_i, mu_-) with the extreme eigenvalues mu of M^h.
    Pinsker's inequality then asks for rho >= (lam - 2) / 4.
    """
    lam = torch.maximum(max_self * bounds[:, 0], bounds[:, 1]).sum(1)
    return ((lam - 2) / 4).clamp(min=0)


def free_energy(
    unary: Float[Tensor, "B *#I N L"],
    q: Float[Tensor, "B *#I N L"],
    message: Float[Tensor, "B *#I N L"],
    valid: Bool[Tensor, "B *#I N"],
) -> Float[Tensor, "B *#I"]:
    """F(q) in nats, given message = sum_h S^h q M^h; invalid tokens do not count."""
    per_token = (torch.special.xlogy(q, q) - q * (unary + 0.5 * message)).sum(-1)
    return torch.where(valid, per_token, 0).sum(-1)


def _infer(
    pairs: Pairs,
    unary: Tensor,
    frames: Tensor | None,
    cells: Tensor | None,
    compatibility: Tensor,
    valid: Tensor,
    damping: Tensor | None,
    bounds: Tensor,
    values: Tensor | None,
    iterations: int,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    """The fields of MeanField, in order; torch operators throughout, so that autograd can follow `sdpa`."""
    smoothness = None if frames is None else Smoothness(frames, cells)
    with torch.no_grad():
        if damping is None:
            max_self = [pairs.scale.square().amax(1)]
            if smoothness is not None:
                max_self.append(smoothness.to_itself.amax((1, 2)))
            damping = certified_damping(torch.stack(max_self, dim=1), bounds)
        eta = 1 / (1 + damping)
    unary = torch.where(valid[..., None], unary, 0)
    if values is not None:
        values = rounded(values, valid, operands, unary.dtype)
    logits, q = unary, unary.softmax(-1)
    swept, energies = None, unary.new_zeros(unary.shape[0], 0)
    marginals, messages = [], []
    for iteration in range(iterations):
        smooth = None if smoothness is None else smoothness.sweep(q) @ compatibility[1]
        first = values if iteration == 0 else None
        marginals.append(q)
        logits, q, message, carried = pairs.step(q, logits, unary, smooth, compatibility[0], eta, first)
        messages.append(message)
        swept = carried if iteration == 0 else swept
    if values is not None and iterations == 0:
        swept = pairs.sweep(values)
    with torch.no_grad():
        residual = (q - (marginals[-1] if iterations else q)).abs().amax((1, 2))
        if iterations:
            each = torch.stack(marginals, dim=1), torch.stack(messages, dim=1)
            energies = free_energy(unary[:, None], *each, valid[:, None])
    swept = unary.new_zeros(*unary.shape[:2], 0) if swept is None else swept
    return q, swept, pairs.scale, damping, residual, energies


# One operator forward and one backward, opaque to autocast, DDP and torch.compile, which see their shapes only.


@torch.library.custom_op("dfer::meanfield", mutates_args=())
def _meanfield_op(
    unary: torch.Tensor,
    points: torch.Tensor,
    frames: torch.Tensor | None,
    cells: torch.Tensor | None,
    compatibility: torch.Tensor,
    valid: torch.Tensor,
    damping: torch.Tensor | None,
    bounds: torch.Tensor,
    values: torch.Tensor | None,
    iterations: int,
    backend: str,
    operands: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = []
    with torch.autocast(points.device.type, enabled=False):
        for clips, pairs in grouped(backend, points, valid, operands, unary.dtype):
            own = [None if x is None else x[clips] for x in (frames, damping, values)]
            parts.append(
                _infer(
                    pairs, unary[clips], own[0], cells, compatibility, valid[clips], own[1], bounds, own[2],
                    iterations, operands,
                )
            )  # fmt: skip
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@_meanfield_op.register_fake
def _(unary, points, frames, cells, compatibility, valid, damping, bounds, values, iterations, backend, operands):
    batch, num_tokens, _ = unary.shape
    width = 0 if values is None else values.shape[-1]
    per_clip = unary.new_empty(batch)
    return (
        torch.empty_like(unary, memory_format=torch.contiguous_format),
        unary.new_empty(batch, num_tokens, width),
        unary.new_empty(batch, num_tokens),
        per_clip,
        torch.empty_like(per_clip),
        unary.new_empty(batch, iterations),
    )


@torch.library.custom_op("dfer::meanfield_backward", mutates_args=())
def _meanfield_backward_op(
    to_marginals: torch.Tensor,
    to_swept: torch.Tensor | None,
    result: torch.Tensor | None,
    unary: torch.Tensor,
    points: torch.Tensor,
    frames: torch.Tensor | None,
    cells: torch.Tensor | None,
    compatibility: torch.Tensor,
    valid: torch.Tensor,
    scale: torch.Tensor,
    damping: torch.Tensor,
    values: torch.Tensor | None,
    iterations: int,
    backend: str,
    operands: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of unary, points, frames, cells, compatibility and values; empty for what was not given.

    `result`: the marginals that forward has returned, if they were kept.
    """
    parts = []
    with torch.autocast(points.device.type, enabled=False):  # the backward pass may be called from under it
        for clips, pairs in grouped(backend, points, valid, operands, unary.dtype, scale):
            own = [None if x is None else x[clips] for x in (frames, values, to_swept, result)]
            parts.append(
                _differentiate(
                    pairs, to_marginals[clips], own[2], own[3], unary[clips], own[0], cells, compatibility,
                    valid[clips], damping[clips], own[1], iterations, operands,
                )
            )  # fmt: skip
        to_unary, to_points, to_values, q, steps, *swept = (torch.cat(part) for part in zip(*parts, strict=True))
        # As S is symmetric, (S q)^T step is q^T (S step).
        to_compatibility = [q.flatten(0, 2).mT @ x.flatten(0, 2) for x in swept[: len(compatibility)]]
        to_frames, to_cells = (unary.new_zeros(0) if x is None else torch.zeros_like(x) for x in (frames, cells))
        if iterations and frames is not None:
            left = (steps @ compatibility[1].mT).flatten(2)
            to_frames, to_cells = Smoothness(frames, cells).gradient(left, q.flatten(2))
    return to_unary, to_points, to_frames, to_cells, torch.stack(to_compatibility), to_values


@_meanfield_backward_op.register_fake
def _(to_marginals, to_swept, result, unary, points, frames, cells, compatibility, valid, scale, damping, values, *_):
    like = (unary, points.to(unary.dtype), frames, cells, compatibility, values)
    nothing = unary.new_empty(0)
    return tuple(torch.empty_like(nothing if x is None else x, memory_format=torch.contiguous_format) for x in like)


def _differentiate(
    pairs: DifferentiablePairs,
    to_marginals: Tensor,
    to_swept: Tensor | None,
    result: Tensor | None,
    unary: Tensor,
    frames: Tensor | None,
    cells: Tensor | None,
    compatibility: Tensor,
    valid: Tensor,
    damping: Tensor,
    values: Tensor | None,
    iterations: int,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    """The adjoint of `_infer`, for the clips of one group. What forward did is done again, except a kept `result`.

    Gradients of unary, points and values; and what the others are made of, (B, N, I, L) each: the marginals that were
    swept, the steps, which are the gradients of what an iteration adds to the logits, S steps, and S^0 steps.
    """
    eta = 1 / (1 + damping)
    unary = torch.where(valid[..., None], unary, 0)
    logits, q = unary, unary.softmax(-1)
    smoothness = None if frames is None else Smoothness(frames, cells)
    marginals = []
    for iteration in range(iterations):
        marginals.append(q)
        if iteration == iterations - 1 and result is not None:
            q = result
            break
        smooth = None if smoothness is None else smoothness.sweep(q) @ compatibility[1]
        logits, q, _, _ = pairs.step(q, logits, unary, smooth, compatibility[0], eta, None)
    eta = eta[:, None, None]

    adjoint = torch.where(valid[..., None], to_marginals, 0)
    carried = to_unary = torch.zeros_like(unary)  # carried: gradient of the logits of one iteration later
    steps, swept_steps, smooth_steps = [], [], []
    columns = unary.new_zeros(unary.shape[:2])
    to_values = unary.new_zeros(0)
    if values is not None:
        to_swept = torch.where(valid[..., None], to_swept, 0)
        exact_values = rounded(values, valid, operands, unary.dtype)
    for before in reversed(marginals):
        carried = _softmax_adjoint(q, adjoint) + (1 - eta) * carried
        step = eta * carried
        to_unary = to_unary + step
        if values is not None and not steps:  # the values' sweep rides along
            swept, to_values = adjoint_sweep_both(pairs, step, to_swept, operands)
        else:
            swept = adjoint_sweep(pairs, step, operands)
        adjoint = swept @ compatibility[0].mT
        columns += (adjoint * before).sum(-1)
        steps.append(step)
        swept_steps.append(swept)
        if smoothness is not None:
            smooth_steps.append(smoothness.sweep(step))
            adjoint = adjoint + smooth_steps[-1] @ compatibility[1].mT
        q = before
    to_unary = to_unary + _softmax_adjoint(q, adjoint) + (1 - eta) * carried

    nothing = unary.new_zeros(*unary.shape[:2], 0, unary.shape[2])
    by_iteration = [
        torch.stack(x, dim=2) if x else nothing for x in (marginals[::-1], steps, swept_steps, smooth_steps)
    ]
    right, left = by_iteration[0].flatten(2), (by_iteration[1] @ compatibility[0].mT).flatten(2)
    if values is not None:
        if not iterations:
            to_values = adjoint_sweep(pairs, to_swept, operands)
        columns += (to_values * exact_values).sum(-1)
        left, right = torch.cat([left, to_swept], dim=-1), torch.cat([right, exact_values], dim=-1)
        to_values = to_values.to(values.dtype)
    to_points = pairs.gradient(left, right, columns) if left.shape[-1] else torch.zeros_like(pairs.points)
    return to_unary, to_points, to_values, *by_iteration


def _softmax_adjoint(q: Tensor, adjoint: Tensor) -> Tensor:
    return q * (adjoint - (q * adjoint).sum(-1, keepdim=True))


def _keep(ctx, inputs, output):
    unary, points, frames, cells, compatibility, valid, _, _, values, *options = inputs
    result, _, scale, damping, residual, energies = output
    short = options[-1].itemsize < unary.dtype.itemsize
    points = points.to(options[-1])  # the kernel is that of the rounded points
    ctx.save_for_backward(
        result if short else None, unary, points, frames, cells, compatibility, valid, scale, damping, values
    )
    ctx.options = options
    ctx.mark_non_differentiable(scale, damping, residual, energies)


def _backward(ctx, to_marginals, to_swept, *_):
    result, unary, points, frames, cells, compatibility, valid, scale, damping, values = ctx.saved_tensors
    to_unary, to_points, to_frames, to_cells, to_compatibility, to_values = _meanfield_backward_op(
        to_marginals, None if values is None else to_swept, result, unary, points, frames, cells, compatibility, valid,
        scale, damping, values, *ctx.options,
    )  # fmt: skip
    to_frames, to_cells = (None, None) if frames is None else (to_frames, to_cells)
    to_values = None if values is None else to_values
    return to_unary, to_points, to_frames, to_cells, to_compatibility, None, None, None, to_values, None, None, None


_meanfield_op.register_autograd(_backward, setup_context=_keep)
