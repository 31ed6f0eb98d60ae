"""Inference of the CRF, ours and its rivals, all called alike: written as one would at first, a window, a lattice."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfer.crf.layers import cell_positions
from dfer.crf.meanfield import Features, MeanField, Sums, certified_damping, curvature_bounds, meanfield
from dfer.crf.pairs import Smoothness, normalised_kernel

STATES, VALUES, ITERATIONS, WIDTH = 16, 64, 3, 256
# Frames and the sides of both levels' cells; as a picture, for those that know two dimensions only.
SHAPES = {
    104: (8, (3, 3), (2, 2)),
    256: (16, (3, 3), (7, 1)),
    784: (16, (6, 6), (13, 1)),
    1040: (16, (7, 7), (4, 4)),
    1568: (16, (7, 7), (7, 7)),
    3920: (16, (14, 14), (7, 7)),
}
PICTURES = {104: (8, 13), 256: (16, 16), 784: (28, 28), 1040: (26, 40), 1568: (28, 56), 3920: (56, 70)}
WINDOW = 11  # ConvCRF's own default


class Problem(NamedTuple):
    unary: Tensor  # (B, N, L)
    points: Tensor  # (B, N, 32)
    frames: Tensor  # (B, T, T)
    cells: Tensor  # (P, P)
    compatibility: Tensor  # (2, L, L)
    values: Tensor  # (B, N, C)

    def inputs(self) -> "Problem":
        return Problem(*(x.detach().requires_grad_() for x in self))


def make_problem(num_tokens: int, batch: int, device: str) -> Problem:
    """Random unary terms and embeddings, with the positions and kernel widths that the layer starts from."""
    generator = torch.Generator().manual_seed(num_tokens)
    num_frames, *sides = SHAPES[num_tokens]
    cells = cell_positions([torch.Size(side) for side in sides], (16, 32), torch.device("cpu"))
    time_ = torch.arange(num_frames, dtype=torch.float32)[:, None]
    embedding = 2 * F.normalize(torch.randn(batch, num_tokens, 28, generator=generator), dim=-1)
    over_time = (time_ / 4)[:, None].expand(-1, len(cells), -1)
    over_cells = (cells / torch.tensor([0.5, 0.5, 1.0])).expand(num_frames, -1, -1)
    position = torch.cat([over_time, over_cells], dim=-1).flatten(0, 1).expand(batch, -1, -1)
    problem = Problem(
        torch.randn(batch, num_tokens, STATES, generator=generator),
        torch.cat([embedding, position], dim=-1),
        normalised_kernel((time_ / 2).expand(batch, -1, -1)),
        normalised_kernel(cells / torch.tensor([0.15, 0.15, 1.0])),
        torch.eye(STATES).repeat(2, 1, 1),
        torch.randn(batch, num_tokens, VALUES, generator=generator),
    )
    return Problem(*(x.to(device) for x in problem))


def ours(problem: Problem, backend: str, operands: torch.dtype) -> tuple[Tensor, Tensor]:
    unary, points, frames, cells, compatibility, values = problem
    field = meanfield(
        unary,
        Features(points, frames, cells),
        compatibility,
        ITERATIONS,
        values=values,
        sums=Sums(backend, operands),
    )
    return field.marginals, field.values


def naive_meanfield(
    unary: Tensor,
    features: Features,
    compatibility: Tensor,
    iterations: int,
    values: Tensor | None = None,
    **_: object,
) -> MeanField:
    """`meanfield` as one would write it first: all pairs in memory, and whatever autograd keeps of them."""
    points, frames, cells = features
    kernel = normalised_kernel(points)
    to_itself = kernel.diagonal(dim1=-2, dim2=-1)
    kernel = kernel - torch.diag_embed(to_itself)
    smoothness = Smoothness(frames, cells)
    with torch.no_grad():
        max_self = torch.stack([to_itself.amax(1), smoothness.to_itself.amax((1, 2))], dim=1)
        damping = certified_damping(max_self, curvature_bounds(compatibility, indefinite=False))
    eta = (1 / (1 + damping))[:, None, None]
    logits, q, before, energies = unary, unary.softmax(-1), unary.softmax(-1), []
    for _ in range(iterations):
        before = q
        message = kernel @ q @ compatibility[0] + smoothness.sweep(q) @ compatibility[1]
        with torch.no_grad():
            energies.append((torch.special.xlogy(q, q) - q * (unary + 0.5 * message)).sum((1, 2)))
        logits = (1 - eta) * logits + eta * (unary + message)
        q = logits.softmax(-1)
    residual = (q - before).detach().abs().amax((1, 2))
    swept = None if values is None else kernel @ values.to(kernel.dtype)
    return MeanField(q, swept, to_itself.detach().sqrt(), damping, residual, torch.stack(energies, dim=1))


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    unary, points, frames, cells, compatibility, values = problem
    field = naive_meanfield(unary, Features(points, frames, cells), compatibility, ITERATIONS, values)
    return field.marginals, field.values


def window(problem: Problem) -> tuple[Tensor, Tensor]:
    """Messages from a window of cells of a picture, appearance kernel only, symmetric normalisation, without self."""
    num_tokens = problem.unary.shape[1]
    height, width = PICTURES[num_tokens]

    def unfolded(x: Tensor) -> Tensor:  # (B, N, C) -> (B, C, window, N)
        picture = x.mT.unflatten(-1, (height, width))
        return F.unfold(picture, WINDOW, padding=WINDOW // 2).unflatten(1, (x.shape[-1], -1))

    inside = unfolded(torch.ones_like(problem.points[..., :1]))[:, 0]
    distance = (unfolded(problem.points) - problem.points.mT[:, :, None]).square().sum(1)
    kernel = (-0.5 * distance).exp() * inside  # (B, window, N)
    scale = kernel.sum(1).rsqrt()[..., None]  # (B, N, 1)
    not_self = torch.ones(WINDOW**2, 1, device=kernel.device)
    not_self[WINDOW**2 // 2] = 0
    kernel = kernel * not_self

    def sweep(x: Tensor) -> Tensor:
        return scale * torch.einsum("bcwn,bwn->bnc", unfolded(scale * x), kernel)

    q = problem.unary.softmax(-1)
    for _ in range(ITERATIONS):
        q = (problem.unary + sweep(q) @ problem.compatibility[0]).softmax(-1)
    return q, sweep(problem.values)


def permutohedral(problem: Problem) -> None:
    """Krähenbühl's lattice through pydensecrf, picture by picture, position kernel only: it has no more dimensions."""
    import numpy as np
    import pydensecrf.densecrf as densecrf

    height, width = PICTURES[problem.unary.shape[1]]
    for unary in problem.unary.detach().numpy():
        field = densecrf.DenseCRF2D(width, height, STATES)
        field.setUnaryEnergy(np.ascontiguousarray(-unary.T))
        field.addPairwiseGaussian(sxy=3, compat=1, normalization=densecrf.NORMALIZE_SYMMETRIC)
        field.inference(ITERATIONS)


class AttentionLayer(nn.Module):
    """What else would let all tokens hear each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 8, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        return tokens + self.attention(normed, normed, normed, need_weights=False)[0]
