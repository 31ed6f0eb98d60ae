"""Mean-field inference of a dense CRF: exact sums over all pairs of tokens, in O(N) memory for the backward pass.

Call `meanfield`. The backward pass is written by hand: as S is symmetric, the adjoint of one sweep is a sweep, and the
gradient of the points is one pass over all pairs, of rank I*L + C, whatever the number I of iterations. It keeps the
inputs and one number per token, never an N x N matrix, and computes the marginals of each iteration again. With 16-bit
operands the inputs take half the room, and the last marginals are kept in the room that is saved.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dfer.crf.backends import Backend, grouped, resolve_backend
from dfer.crf.pairs import DifferentiablePairs, Pairs, Smoothness, adjoint_sweep, adjoint_sweep_both, rounded
from dfer.crf.sdpa import SdpaPairs


class Features(NamedTuple):
    """Points and factors that the two kernels are made of. N = T*P tokens, token (t, c) at row t*P + c."""

    points: Float[Tensor, "B N d"]  # z: the appearance kernel is computed from these
    frames: Float[Tensor, "B T T"] | None = None  # the smoothness kernel is frames (x) cells, each normalised with its
    cells: Float[Tensor, "P P"] | None = None  # diagonal; the message of a token to itself is subtracted again


class Sums(NamedTuple):
    """How `meanfield` computes: neither backend nor operands change more than the rounding of what it returns."""

    backend: Backend = "auto"  # see backends.py
    # Type to which operands of matrix products are rounded (points, marginals, values); that of `unary` if not given.
    # The kernel is that of the rounded points, so every guarantee holds for it.
    operands: torch.dtype | None = None
    diagnosed: bool = True  # residual and energies are made: some passes over the marginals of all iterations


class MeanField(NamedTuple):
    """The result of `meanfield`. Only marginals and values carry a gradient."""

    marginals: Float[Tensor, "B N L"]
    values: Float[Tensor, "B N C"] | None  # S values: one sweep of the appearance kernel
    scale: Float[Tensor, "B N"]  # 1 / sqrt(degree) in the appearance kernel
    damping: Float[Tensor, " B"]
    residual: Float[Tensor, " B"] | None  # largest change of a marginal in the last iteration; None: not diagnosed
    energies: Float[Tensor, "B I"] | None  # free energy before each iteration, in nats; None: not diagnosed


def meanfield(
    unary: Float[Tensor, "B N L"],
    features: Features,
    compatibility: Float[Tensor, "H L L"],
    iterations: int,
    damping: Float[Tensor, " B"] | Literal["certified", "indefinite"] = "certified",
    values: Float[Tensor, "B N C"] | None = None,
    sums: Sums | None = None,
) -> MeanField:
    """Return the marginals after parallel updates, damped in log space (proximal in Kullback-Leibler divergence).

    q = softmax(a);  a <- (1 - eta) a + eta (unary + sum_h S^h q M^h),  eta = 1 / (1 + damping), one for each clip.
    Differentiable once, with respect to unary, features, compatibility and values.

    Args:
        unary: log-potentials, higher is likelier; float32 (or float64). Sums, degrees and softmax have this type.
        features: the points of the appearance kernel and the factors of the smoothness kernel.
        compatibility: M^h, symmetric: appearance and, if `features` has one, smoothness.
        iterations: I >= 0; 0 leaves softmax(unary).
        damping: rho >= 0 of each clip; or the least one under which the free energy provably never increases, for
            positive semi-definite ("certified") or for any symmetric M ("indefinite").
        values: swept once by the appearance kernel.
        sums: how it is computed, if not as `Sums` has it by default.
    """
    assert iterations >= 0 and len(compatibility) == (1 if features.frames is None else 2)
    sums = Sums() if sums is None else sums
    backend = resolve_backend(sums.backend, unary.is_cuda and unary.dtype is torch.float32)  # whose kernels sum in it
    operands = unary.dtype if sums.operands is None else sums.operands
    given = None if isinstance(damping, str) else damping
    bounds = curvature_bounds(compatibility.detach(), indefinite=damping == "indefinite" if given is None else False)
    points, frames, cells = features
    if backend == "sdpa":
        problem = _Problem(unary, frames, cells, compatibility, values, iterations, operands, sums.diagnosed)
        outputs = _infer(SdpaPairs(points, operands), problem, given, bounds)
    else:
        outputs = _meanfield_op(
            unary, points, frames, cells, compatibility, given, bounds, values,
            iterations, backend, operands, sums.diagnosed,
        )  # fmt: skip
    marginals, swept, *others = outputs
    scale, rho, residual, energies = (x.detach() for x in others)
    swept = swept if values is not None else None
    if not sums.diagnosed:
        return MeanField(marginals, swept, scale, rho, None, None)
    return MeanField(marginals, swept, scale, rho, residual, energies)


def curvature_bounds(compatibility: Float[Tensor, "H L L"], indefinite: bool) -> Float[Tensor, "H 2"]:
    """Return bounds on the largest eigenvalue of each M and on the negative of the smallest, without a decomposition.

    ||M||_inf bounds the first; Gershgorin's discs the second, which is 0 for positive semi-definite M.
    """
    largest = compatibility.abs().sum(-1).amax(-1)
    if not indefinite:
        return torch.stack([largest, torch.zeros_like(largest)], dim=1)
    diagonal = compatibility.diagonal(dim1=-2, dim2=-1)
    reach = (compatibility.abs().sum(-1) - diagonal.abs() - diagonal).amax(-1).clamp(min=0)
    return torch.stack([largest, reach], dim=1)


def certified_damping(max_self: Float[Tensor, "B H"], bounds: Float[Tensor, "H 2"]) -> Float[Tensor, " B"]:
    """Return the least damping rho of each clip under which the free energy provably never increases; usually 0.

    The spectrum of S with its diagonal lies in [0, 1], so without it in [-max_i 1/d_i, 1], and the curvature of the
    pairwise term is at least -lam, lam = sum_h max(mu_+ max_i 1/d_i, mu_-) with the extreme eigenvalues mu of M^h.
    Pinsker's inequality then asks for rho >= (lam - 2) / 4.

    Args:
        max_self: max_i 1/d_i of each clip and kernel.
        bounds: those of `curvature_bounds`.
    """
    lam = torch.maximum(max_self * bounds[:, 0], bounds[:, 1]).sum(1)
    return ((lam - 2) / 4).clamp(min=0)


def free_energy(
    unary: Float[Tensor, "B *#I N L"], q: Float[Tensor, "B *#I N L"], message: Float[Tensor, "B *#I N L"]
) -> Float[Tensor, "B *#I"]:
    """Return F(q) in nats, given message = sum_h S^h q M^h."""
    per_token = (torch.special.xlogy(q, q) - q * (unary + 0.5 * message)).sum(-1)
    return per_token.sum(-1)


_Outputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Problem(NamedTuple):
    """The inputs of the inference but the points, of all clips or of one group."""

    unary: Tensor
    frames: Tensor | None
    cells: Tensor | None
    compatibility: Tensor
    values: Tensor | None
    iterations: int
    operands: torch.dtype
    diagnosed: bool = False

    def group(self, clips: slice) -> "_Problem":
        frames, values = (None if x is None else x[clips] for x in (self.frames, self.values))
        return self._replace(unary=self.unary[clips], frames=frames, values=values)

    def smoothness(self) -> Smoothness | None:
        return None if self.frames is None or self.cells is None else Smoothness(self.frames, self.cells)


def _infer(pairs: Pairs, problem: _Problem, damping: Tensor | None, bounds: Tensor) -> _Outputs:
    """Return the fields of MeanField, in order, the last two of no element if they are not to be diagnosed.

    Torch operators throughout, so that autograd can follow `sdpa`.
    """
    unary, compatibility, values = problem.unary.contiguous(), problem.compatibility, problem.values
    smoothness = problem.smoothness()
    with torch.no_grad():
        if damping is None:
            max_self = [pairs.scale.square().amax(1)]
            if smoothness is not None:
                max_self.append(smoothness.to_itself.amax((1, 2)))
            damping = certified_damping(torch.stack(max_self, dim=1), bounds)
        eta = 1 / (1 + damping)
    if values is not None:
        values = rounded(values, problem.operands, unary.dtype)
    logits, q = unary, unary.softmax(-1)
    swept, energies = None, unary.new_zeros(unary.shape[0], 0)
    marginals, messages = [], []
    for iteration in range(problem.iterations):
        smooth = None if smoothness is None else smoothness.sweep(q) @ compatibility[1]
        first = values if iteration == 0 else None
        if problem.diagnosed:
            marginals.append(q)
        logits, q, message, swept_now = pairs.step(q, logits, unary, smooth, compatibility[0], eta, first)
        if problem.diagnosed:
            messages.append(message)
        swept = swept_now if iteration == 0 else swept
    if values is not None and problem.iterations == 0:
        swept = pairs.sweep(values)
    residual = unary.new_zeros(unary.shape[0] if problem.diagnosed else 0)
    if marginals:
        with torch.no_grad():
            residual = (q - marginals[-1]).abs().amax((1, 2))
            energies = free_energy(unary[:, None], torch.stack(marginals, dim=1), torch.stack(messages, dim=1))
    swept = unary.new_zeros(*unary.shape[:2], 0) if swept is None else swept
    return q, swept, pairs.scale, damping, residual, energies


# One operator forward and one backward: autocast, DDP and torch.compile see their shapes only. A schema cannot hold a
# struct, so these alone have as many parameters as there are tensors.


@torch.library.custom_op("dfer::meanfield", mutates_args=())
def _meanfield_op(
    unary: torch.Tensor,
    points: torch.Tensor,
    frames: torch.Tensor | None,
    cells: torch.Tensor | None,
    compatibility: torch.Tensor,
    damping: torch.Tensor | None,
    bounds: torch.Tensor,
    values: torch.Tensor | None,
    iterations: int,
    backend: str,
    operands: torch.dtype,
    diagnosed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `_infer` does, of all clips."""
    problem = _Problem(unary, frames, cells, compatibility, values, iterations, operands, diagnosed)
    parts = []
    with torch.autocast(points.device.type, enabled=False):
        for clips, pairs in grouped(backend, points, operands, unary.dtype):
            parts.append(_infer(pairs, problem.group(clips), None if damping is None else damping[clips], bounds))
    marginals, swept, scale, rho, residual, energies = (torch.cat(part) for part in zip(*parts, strict=True))
    return marginals, swept, scale, rho, residual, energies


@_meanfield_op.register_fake
def _(*inputs):
    unary, *_, values, iterations, _backend, _operands, diagnosed = inputs
    batch, num_tokens, _ = unary.shape
    width = 0 if values is None else values.shape[-1]
    per_clip = unary.new_empty(batch)
    return (
        torch.empty_like(unary, memory_format=torch.contiguous_format),
        unary.new_empty(batch, num_tokens, width),
        unary.new_empty(batch, num_tokens),
        per_clip,
        torch.empty_like(per_clip) if diagnosed else unary.new_empty(0),
        unary.new_empty(batch, iterations if diagnosed else 0),
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
    scale: torch.Tensor,
    damping: torch.Tensor,
    values: torch.Tensor | None,
    iterations: int,
    backend: str,
    operands: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of unary, points, frames, cells, compatibility and values; empty for what was not given.

    `result`: the marginals that forward has returned, if they were kept.
    """
    problem = _Problem(unary, frames, cells, compatibility, values, iterations, operands)
    parts = []
    with torch.autocast(points.device.type, enabled=False):  # the backward pass may be called from under it
        for clips, pairs in grouped(backend, points, operands, unary.dtype, scale):
            to_swept_here, kept = (None if x is None else x[clips].contiguous() for x in (to_swept, result))
            adjoints = to_marginals[clips].contiguous(), to_swept_here
            parts.append(_differentiate(pairs, problem.group(clips), damping[clips], adjoints, kept))
        to_unary, to_points, to_values, q, steps, *swept = (torch.cat(part) for part in zip(*parts, strict=True))
        # As S is symmetric, (S q)^T step is q^T (S step).
        to_compatibility = [q.flatten(0, 2).mT @ x.flatten(0, 2) for x in swept[: len(compatibility)]]
        to_frames, to_cells = (unary.new_zeros(0) if x is None else torch.zeros_like(x) for x in (frames, cells))
        if iterations and frames is not None and cells is not None:
            left = (steps @ compatibility[1].mT).flatten(2)
            to_frames, to_cells = Smoothness(frames, cells).gradient(left, q.flatten(2))
    return to_unary, to_points, to_frames, to_cells, torch.stack(to_compatibility), to_values


@_meanfield_backward_op.register_fake
def _(*inputs):
    _, _, _, unary, points, frames, cells, compatibility, _scale, _damping, values, *_ = inputs
    like = (unary, points.to(unary.dtype), frames, cells, compatibility, values)
    nothing = unary.new_empty(0)
    return tuple(torch.empty_like(nothing if x is None else x, memory_format=torch.contiguous_format) for x in like)


def _differentiate(
    pairs: DifferentiablePairs,
    problem: _Problem,
    damping: Tensor,
    adjoints: tuple[Tensor, Tensor | None],
    result: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the adjoint of `_infer` for one group of clips. The forward pass is done again, except a kept `result`.

    `adjoints` are the gradients of the marginals and of S values (None without values).

    Returns:
        The gradients of unary, points and values; then what the other gradients are made of, (B, N, I, L) each: the
        marginals that were swept, the steps (gradients of what an iteration adds to the logits), S steps, S^0 steps.
    """
    adjoint, to_swept = adjoints
    unary, compatibility, values = problem.unary.contiguous(), problem.compatibility, problem.values
    smoothness, eta = problem.smoothness(), (1 / (1 + damping))[:, None, None]
    *marginals, q = _trajectory(pairs, problem, damping, result)

    to_logits = to_unary = torch.zeros_like(unary)  # to_logits: gradient of the logits after the iteration
    steps, swept_steps, smooth_steps = [], [], []
    columns = unary.new_zeros(unary.shape[:2])
    to_values = unary.new_zeros(0)
    exact_values = None if values is None else rounded(values, problem.operands, unary.dtype)
    for before in reversed(marginals):
        to_logits = _softmax_adjoint(q, adjoint) + (1 - eta) * to_logits
        step = eta * to_logits
        to_unary = to_unary + step
        if to_swept is not None and not steps:  # the values are swept together with the first step
            swept, to_values = adjoint_sweep_both(pairs, step, to_swept, problem.operands)
        else:
            swept = adjoint_sweep(pairs, step, problem.operands)
        adjoint = swept @ compatibility[0].mT
        columns += (adjoint * before).sum(-1)
        steps.append(step)
        swept_steps.append(swept)
        if smoothness is not None:
            smooth_steps.append(smoothness.sweep(step))
            adjoint = adjoint + smooth_steps[-1] @ compatibility[1].mT
        q = before
    to_unary = to_unary + _softmax_adjoint(q, adjoint) + (1 - eta) * to_logits

    nothing = unary.new_zeros(*unary.shape[:2], 0, unary.shape[2])
    by_iteration = [
        torch.stack(x, dim=2) if x else nothing for x in (marginals[::-1], steps, swept_steps, smooth_steps)
    ]
    right, left = by_iteration[0].flatten(2), (by_iteration[1] @ compatibility[0].mT).flatten(2)
    if values is not None and exact_values is not None and to_swept is not None:
        if not marginals:
            to_values = adjoint_sweep(pairs, to_swept, problem.operands)
        columns += (to_values * exact_values).sum(-1)
        left, right = torch.cat([left, to_swept], dim=-1), torch.cat([right, exact_values], dim=-1)
        to_values = to_values.to(values.dtype)
    to_points = pairs.gradient(left, right, columns) if left.shape[-1] else torch.zeros_like(pairs.points)
    return to_unary, to_points, to_values, *by_iteration


def _trajectory(pairs: Pairs, problem: _Problem, damping: Tensor, result: Tensor | None) -> list[Tensor]:
    """Return the marginals before the first iteration and after each; the last ones are `result` if it was kept."""
    unary, compatibility = problem.unary.contiguous(), problem.compatibility
    smoothness, eta = problem.smoothness(), 1 / (1 + damping)
    logits, marginals = unary, [unary.softmax(-1)]
    for iteration in range(problem.iterations):
        q = marginals[-1]
        if iteration == problem.iterations - 1 and result is not None:
            marginals.append(result)
            break
        smooth = None if smoothness is None else smoothness.sweep(q) @ compatibility[1]
        logits, q, _, _ = pairs.step(q, logits, unary, smooth, compatibility[0], eta, None)
        marginals.append(q)
    return marginals


def _softmax_adjoint(q: Tensor, adjoint: Tensor) -> Tensor:
    """Return the gradient of logits whose softmax is q, from that of q."""
    return q * (adjoint - (q * adjoint).sum(-1, keepdim=True))


def _keep(ctx, inputs, output):
    unary, points, frames, cells, compatibility, _, _, values, *options, _ = inputs
    result, _, scale, damping, residual, energies = output
    short = options[-1].itemsize < unary.dtype.itemsize
    points = points.to(options[-1])  # the kernel is that of the rounded points
    ctx.save_for_backward(
        result if short else None, unary, points, frames, cells, compatibility, scale, damping, values
    )
    ctx.options = options
    ctx.mark_non_differentiable(scale, damping, residual, energies)


def _backward(ctx, to_marginals, to_swept, *_):
    result, unary, points, frames, cells, compatibility, scale, damping, values = ctx.saved_tensors
    to_unary, to_points, to_frames, to_cells, to_compatibility, to_values = _meanfield_backward_op(
        to_marginals, None if values is None else to_swept, result, unary, points, frames, cells, compatibility,
        scale, damping, values, *ctx.options,
    )  # fmt: skip
    to_frames, to_cells = (None, None) if frames is None else (to_frames, to_cells)
    to_values = None if values is None else to_values
    return to_unary, to_points, to_frames, to_cells, to_compatibility, None, None, to_values, None, None, None, None


_meanfield_op.register_autograd(_backward, setup_context=_keep)
