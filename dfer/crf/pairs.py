"""The pairs of a clip's tokens: kernels, and how each backend applies them (`x -> S x`) and differentiates them.

*Appearance* is dense and normalised symmetrically, a token sends itself nothing:

    K_ij = exp(-|z_i - z_j|^2 / 2),   d_i = sum_j K_ij,   S_ij = K_ij / sqrt(d_i d_j) for i != j,   S_ii = 0.

*Smoothness* is the product of one factor over frames and one over the cells of a frame.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Backend = Literal["auto", "dense", "triton", "sdpa"]

# Pairs in memory at a time, as float32: on a CPU 10 MB, which its caches hold, on a GPU half a gigabyte.
PAIRS_AT_ONCE = {"cpu": 5 * 2**19, "cuda": 2**27}
LOG2_E = math.log2(math.e)
NEVER = 1e5  # a log-distance at which exp is 0 in every type


def resolve_backend(backend: Backend) -> str:
    # The Triton kernels have run in the interpreter only: they become a GPU's default when they were measured on one.
    return "dense" if backend == "auto" else backend


def normalised_kernel(
    z: Float[Tensor, "*batch N d"], valid: Bool[Tensor, "*batch N"] | None = None
) -> Float[Tensor, "*batch N N"]:
    """K_ij / sqrt(d_i d_j) with the diagonal in, S_ii = 1/d_i; invalid rows and columns are zero and in no degree."""
    half_norm = 0.5 * z.square().sum(-1)
    # Rounding could make the exponent positive where two tokens coincide.
    kernel = (z @ z.mT - half_norm[..., :, None] - half_norm[..., None, :]).clamp(max=0).exp()
    if valid is not None:
        kernel = kernel * valid[..., None, :]
    scale = kernel.sum(-1).clamp(min=1).rsqrt()
    if valid is not None:
        scale = scale * valid
    return scale[..., :, None] * kernel * scale[..., None, :]


class Pairs(ABC):
    """The appearance kernel of some clips, by one backend."""

    scale: Float[Tensor, "B N"]  # 1 / sqrt(d), 0 for invalid tokens

    @abstractmethod
    def sweep(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """S x."""

    def sweep_both(
        self, states: Float[Tensor, "B N L"], values: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B N L"], Float[Tensor, "B N C"]]:
        """S states and S values, whose sums may be rounded as operands are: what takes them on rounds them anyway."""
        swept = self.sweep(torch.cat([states, values], dim=-1))
        return swept[..., : states.shape[-1]], swept[..., states.shape[-1] :]

    def step(
        self,
        q: Float[Tensor, "B N L"],
        logits: Float[Tensor, "B N L"],
        unary: Float[Tensor, "B N L"],
        smooth: Float[Tensor, "B N L"] | None,
        compatibility: Float[Tensor, "L L"],
        eta: Float[Tensor, " B"],
        values: Float[Tensor, "B N C"] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One iteration: the new logits, their softmax, the message that made them (S q M and `smooth`), and S values.

        `smooth` is what the smoothness kernel has to say, compatibility applied.
        """
        heard, swept = (self.sweep(q), None) if values is None else self.sweep_both(q, values)
        message = heard @ compatibility
        if smooth is not None:
            message = message + smooth
        logits = torch.lerp(logits, unary + message, eta[:, None, None])
        return logits, logits.softmax(-1), message, swept


class DifferentiablePairs(Pairs):
    """Pairs whose gradient is written by hand; through those of `sdpa` goes autograd."""

    @abstractmethod
    def gradient(
        self, left: Float[Tensor, "B N R"], right: Float[Tensor, "B N R"], columns: Float[Tensor, "B N"]
    ) -> Float[Tensor, "B N d"]:
        """Gradient of sum_ij S_ij <left_i, right_j> with respect to the points, degrees included.

        `columns` are the column sums sum_i S_ij <left_i, right_j>, which the adjoint sweeps have left behind.
        """


class Smoothness:
    """The smoothness kernel S^0 of some clips: the product kernel, factor by factor, less the messages to itself.

    Exact, and never N x N.
    """

    def __init__(self, frames: Float[Tensor, "B T T"], cells: Float[Tensor, "P P"]):
        self.frames, self.cells = frames, cells
        own_frame, own_cell = frames.diagonal(dim1=-2, dim2=-1), cells.diagonal()
        self.to_itself = (own_frame[:, :, None] * own_cell).flatten(1)[..., None]  # (B, N, 1)

    def sweep(self, q: Float[Tensor, "B N L"]) -> Float[Tensor, "B N L"]:
        """S^0 q."""
        return self.over_cells(self.over_frames(q)) - self.to_itself * q

    def over_frames(self, q: Tensor) -> Tensor:
        batch, num_frames = self.frames.shape[:2]
        return torch.bmm(self.frames, q.reshape(batch, num_frames, -1)).view_as(q)

    def over_cells(self, q: Tensor) -> Tensor:
        num_cells = len(self.cells)
        every_frame = q.reshape(-1, num_cells, q.shape[-1])
        return torch.bmm(self.cells.expand(every_frame.shape[0], -1, -1), every_frame).view_as(q)

    def gradient(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of sum <left_i, (S^0 right)_i> with respect to frames and cells; left and right are (B, N, R)."""
        batch, num_frames, num_cells = *self.frames.shape[:2], len(self.cells)
        by_frame = left.reshape(batch, num_frames, -1), self.over_cells(right).reshape(batch, num_frames, -1)
        by_cell = (x.reshape(-1, num_cells, x.shape[-1]) for x in (left, self.over_frames(right)))
        to_frames, to_cells = (torch.bmm(a, b.mT) for a, b in (by_frame, by_cell))
        to_itself = (left * right).sum(-1).view(batch, num_frames, num_cells)
        own_frame, own_cell = self.frames.diagonal(dim1=-2, dim2=-1), self.cells.diagonal()
        to_frames = to_frames - torch.diag_embed(to_itself @ own_cell)
        to_cells = to_cells.sum(0) - torch.diag((own_frame[:, :, None] * to_itself).sum((0, 1)))
        return to_frames, to_cells


def rounded(x: Tensor, valid: Tensor, operands: torch.dtype, accumulate: torch.dtype) -> Tensor:
    """What a matrix product sees of x: zero for invalid tokens, whatever they hold, and rounded to `operands`."""
    return torch.where(valid[..., None], x, 0).to(operands).to(accumulate)


class DensePairs(DifferentiablePairs):
    """All pairs of a few clips in memory. A product's operands are rounded; its sum has the type of `accumulate`."""

    def __init__(
        self,
        points: Float[Tensor, "B N d"],
        valid: Bool[Tensor, "B N"],
        operands: torch.dtype,
        accumulate: torch.dtype,
        scale: Float[Tensor, "B N"] | None,
        workspace: Float[Tensor, "G N N"] | None,
    ):
        self.operands, self.accumulate = operands, accumulate
        self.points = rounded(points, valid, operands, accumulate)
        scaled = math.sqrt(LOG2_E) * self.points  # e^x = 2^(x log2 e)
        half_norm = torch.where(valid, 0.5 * scaled.square().sum(-1), NEVER)
        if self.on_tensor_cores:
            kernel = self.product(self.points, self.points.mT).mul_(LOG2_E)
            kernel.sub_(half_norm[:, :, None]).sub_(half_norm[:, None, :])
        else:  # the norms are two more columns of the product, which cost less than two more passes over all pairs
            norm, one = half_norm[..., None], torch.ones_like(half_norm)[..., None]
            left, right = torch.cat([scaled, -norm, one], dim=-1), torch.cat([scaled, one, -norm], dim=-1)
            kernel = torch.bmm(left, right.mT, out=None if workspace is None else workspace[: len(points)])
        kernel = kernel.exp2_()  # on a CPU a third of the time of exp_; where two tokens coincide 1 up to rounding
        kernel.diagonal(dim1=-2, dim2=-1).zero_()  # a token sends itself nothing
        self.scale = (1 + kernel.sum(-1)).rsqrt() * valid if scale is None else scale
        self.kernel = kernel.to(operands) if self.on_tensor_cores else kernel

    @property
    def on_tensor_cores(self) -> bool:
        return self.points.is_cuda and self.operands in (torch.bfloat16, torch.float16)

    @property
    def rounds_sums(self) -> bool:
        """A CPU multiplies bf16 two to three times as fast as float32, but has no product that keeps the sum."""
        return not self.points.is_cuda and self.operands is torch.bfloat16

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b. A CPU has no product of short operands with a long sum: it multiplies the rounded ones as they are."""
        if self.on_tensor_cores:
            return torch.bmm(a.to(self.operands), b.to(self.operands), out_dtype=torch.float32)
        return torch.bmm(a, b, out=out)

    def sweep(self, x: Tensor) -> Tensor:
        scaled = self.scale[..., None] * x
        if not self.on_tensor_cores and self.operands is not self.accumulate:
            scaled = scaled.to(self.operands).to(self.accumulate)
        return self.scale[..., None] * self.product(self.kernel, scaled)

    def sweep_both(self, states: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.rounds_sums:
            return super().sweep_both(states, values)
        scaled = (self.scale[..., None] * values).to(self.operands)
        swept = torch.bmm(self.kernel.to(self.operands), scaled).to(self.accumulate)
        return self.sweep(states), self.scale[..., None] * swept

    def gradient(self, left: Tensor, right: Tensor, columns: Tensor) -> Tensor:
        """With P_ij = S_ij <left_i, right_j> and e_i = (row sum + column sum of P)_i / 2 d_i, what the degree is worth:
        G = P - e_i K_ij,  dz_i = -sum_j (G_ij + G_ji) (z_i - z_j). Rows come in blocks that fit the cache.
        """
        batch, num_tokens, _ = self.points.shape
        left, right = self.scale[..., None] * left, self.scale[..., None] * right
        kernel = self.kernel.to(self.accumulate)
        if self.rounds_sums:  # these sums are operands next: of the products with the points
            left, right = left.to(self.operands), right.to(self.operands)
        to_points, weight = torch.zeros_like(self.points), torch.zeros_like(columns)  # (G + G^T) z, (G + G^T) 1
        blocks = -(-batch * num_tokens**2 // PAIRS_AT_ONCE[self.points.device.type])
        rows = -(-num_tokens // blocks)
        for block in (slice(i, i + rows) for i in range(0, num_tokens, rows)):
            pairs = torch.bmm(left[:, block], right.mT).to(self.accumulate).mul_(kernel[:, block])
            row, to_itself = pairs.sum(-1), self.scale[:, block].square()  # 1 / d
            worth = 0.5 * (row + columns[:, block])  # e d
            pairs.addcmul_(kernel[:, block], (worth * to_itself)[..., None], value=-1)
            to_points[:, block] += torch.bmm(pairs, self.points)
            to_points.baddbmm_(pairs.mT, self.points[:, block])
            weight[:, block] += row - worth * (1 - to_itself)  # a row of K sums to d - 1
            weight += pairs.sum(-2)
        return to_points - weight[..., None] * self.points


class SdpaPairs(Pairs):
    """Sweeps by attention over augmented points: exp(z_i.z_j - |z_i|^2/2 - |z_j|^2/2) = K_ij, and softmax divides by
    the row's sum. One more key, whose K is 1 for every query and whose value is 0, makes that sum 1 + d_i; where its
    value is 1 and all others' is 0, the degree itself can be read. |z|^2/2 goes in two parts, or bf16 would lose it.
    """

    def __init__(self, points: Float[Tensor, "B N d"], valid: Bool[Tensor, "B N"], operands: torch.dtype):
        self.accumulate = points.dtype
        z = torch.where(valid[..., None], points, 0).to(operands)
        half_norm = 0.5 * z.to(self.accumulate).square().sum(-1, keepdim=True)
        bias = torch.where(valid[..., None], -half_norm, -NEVER if operands is not torch.float16 else -6e4)
        zero, one = torch.zeros_like(z[..., :1]), torch.ones_like(z[..., :1])
        self.query = torch.cat([z, one, one, *_two_parts(half_norm, operands)], dim=-1)
        keys = torch.cat([z, *_two_parts(bias, operands), zero, zero], dim=-1)
        sink = torch.zeros_like(keys[:, :1])
        sink[..., -2:] = 1
        self.keys = torch.cat([keys, sink], dim=1)
        to_sink = torch.zeros(*keys.shape[:2], 1, dtype=operands, device=z.device)
        share = self._attend(torch.cat([to_sink, one[:, :1]], dim=1))[..., 0]  # 1 / (1 + d)
        self.total = 1 / share
        self.scale = (self.total - 1).clamp(min=1).rsqrt() * valid

    def _attend(self, values: Tensor) -> Tensor:
        query, keys, values = (x[:, None] for x in (self.query, self.keys, values))  # one head
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0)[:, 0].to(self.accumulate)

    def sweep(self, x: Tensor) -> Tensor:
        scaled = (self.scale[..., None] * x).to(self.keys.dtype)
        attended = self._attend(torch.cat([scaled, torch.zeros_like(scaled[:, :1])], dim=1))
        return self.scale[..., None] * (self.total[..., None] * attended - scaled)  # less the message to itself


def _two_parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


def grouped(
    backend: str,
    points: Tensor,
    valid: Tensor,
    operands: torch.dtype,
    accumulate: torch.dtype,
    scale: Tensor | None = None,
) -> Iterator[tuple[slice, DifferentiablePairs]]:
    """The clips that are worked on together and their kernel: all, or as many as may have their pairs in memory."""
    if backend == "triton":
        from dfer.crf.triton import TritonPairs  # not everybody has Triton

        yield slice(None), TritonPairs(points, valid, operands, scale)
        return
    batch, num_tokens, _ = points.shape
    size = min(max(PAIRS_AT_ONCE[points.device.type] // num_tokens**2, 1), batch)
    # One buffer for all groups: fresh pages cost a CPU more than all the sums.
    workspace = None if points.is_cuda else points.new_empty(size, num_tokens, num_tokens, dtype=accumulate)
    for first in range(0, batch, size):
        clips = slice(first, first + size)
        own_scale = None if scale is None else scale[clips]
        yield clips, DensePairs(points[clips], valid[clips], operands, accumulate, own_scale, workspace)


def adjoint_sweep(pairs: Pairs, x: Tensor, operands: torch.dtype) -> Tensor:
    """S x for a gradient, which carries the loss scale: each clip's is brought near 1 before it is rounded to fp16."""
    if operands is not torch.float16:
        return pairs.sweep(x)
    size = _size(x)
    return pairs.sweep(x / size) * size


def adjoint_sweep_both(pairs: Pairs, x: Tensor, values: Tensor, operands: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for `sweep_both`."""
    if operands is not torch.float16:
        return pairs.sweep_both(x, values)
    sizes = _size(x), _size(values)
    swept = pairs.sweep_both(x / sizes[0], values / sizes[1])
    return swept[0] * sizes[0], swept[1] * sizes[1]


def _size(x: Tensor) -> Tensor:
    largest = x.abs().amax((1, 2), keepdim=True)
    return torch.where(largest > 0, largest, 1)
