"""The dense backend: all pairs of a few clips in memory, matrix products."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dfer.crf.pairs import DifferentiablePairs, rounded

# Pairs in memory at a time, as float32: on a CPU 10 MB, which its caches hold, on a GPU half a gigabyte.
PAIRS_AT_ONCE = {"cpu": 5 * 2**19, "cuda": 2**27}
_LOG2_E = math.log2(math.e)


class DensePairs(DifferentiablePairs):
    """All pairs of a few clips in memory. Operands of a product are rounded, its sum has the type of `accumulate`.

    Args:
        points: z of the appearance kernel.
        operands: type to which operands are rounded.
        accumulate: type of sums, degrees and the kernel.
        scale: 1 / sqrt(degree) if it is known already, from the forward pass.
        workspace: memory for the kernel.
    """

    def __init__(
        self,
        points: Float[Tensor, "B N d"],
        operands: torch.dtype,
        accumulate: torch.dtype,
        scale: Float[Tensor, "B N"] | None,
        workspace: Float[Tensor, "G N N"] | None,
    ):
        self.operands, self.accumulate = operands, accumulate
        self.points = rounded(points, operands, accumulate)
        scaled = math.sqrt(_LOG2_E) * self.points  # e^x = 2^(x log2 e)
        half_norm = 0.5 * scaled.square().sum(-1)
        if self.on_tensor_cores:
            kernel = self.product(self.points, self.points.mT).mul_(_LOG2_E)
            kernel.sub_(half_norm[:, :, None]).sub_(half_norm[:, None, :])
        else:  # the norms are two more columns of the product, which cost less than two more passes over all pairs
            norm, one = half_norm[..., None], torch.ones_like(half_norm)[..., None]
            left, right = torch.cat([scaled, -norm, one], dim=-1), torch.cat([scaled, one, -norm], dim=-1)
            kernel = torch.bmm(left, right.mT, out=None if workspace is None else workspace[: len(points)])
        kernel = kernel.exp2_()  # on a CPU a third of the time of exp_; where two tokens coincide 1 up to rounding
        kernel.diagonal(dim1=-2, dim2=-1).zero_()  # a token sends itself no message
        self.scale = (1 + kernel.sum(-1)).rsqrt() if scale is None else scale
        self.kernel = kernel.to(operands) if self.on_tensor_cores else kernel

    @property
    def on_tensor_cores(self) -> bool:
        """Return whether products take 16-bit operands and sum in float32, as tensor cores do."""
        return self.points.is_cuda and self.operands in (torch.bfloat16, torch.float16)

    @property
    def rounds_sums(self) -> bool:
        """Return whether sums may be rounded to bf16: a CPU is two to three times as fast then."""
        return not self.points.is_cuda and self.operands is torch.bfloat16

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b. A CPU has no product of 16-bit operands with a float32 sum, so there a and b stay long."""
        if self.on_tensor_cores:
            return torch.bmm(a.to(self.operands), b.to(self.operands), out_dtype=torch.float32)
        return torch.bmm(a, b)

    def sweep(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        scaled = self.scale[..., None] * x
        if not self.on_tensor_cores and self.operands is not self.accumulate:
            scaled = scaled.to(self.operands).to(self.accumulate)
        return self.scale[..., None] * self.product(self.kernel, scaled)

    def sweep_both(
        self, states: Float[Tensor, "B N L"], values: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B N L"], Float[Tensor, "B N C"]]:
        if not self.rounds_sums:
            return super().sweep_both(states, values)
        scaled = (self.scale[..., None] * values).to(self.operands)
        swept = torch.bmm(self.kernel.to(self.operands), scaled).to(self.accumulate)
        return self.sweep(states), self.scale[..., None] * swept

    def gradient(
        self, left: Float[Tensor, "B N R"], right: Float[Tensor, "B N R"], columns: Float[Tensor, "B N"]
    ) -> Float[Tensor, "B N d"]:
        """Return the gradient as the base class says, in blocks of rows that fit the cache.

        With P_ij = S_ij <left_i, right_j> and e_i = (row sum + column sum of P)_i / 2 d_i, the gradient of the degree:
        G = P - e_i K_ij,  dz_i = -sum_j (G_ij + G_ji) (z_i - z_j).
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
            to_degree = 0.5 * (row + columns[:, block])  # e d
            pairs.addcmul_(kernel[:, block], (to_degree * to_itself)[..., None], value=-1)
            to_points[:, block] += torch.bmm(pairs, self.points)
            to_points.baddbmm_(pairs.mT, self.points[:, block])
            weight[:, block] += row - to_degree * (1 - to_itself)  # a row of K sums to d - 1
            weight += pairs.sum(-2)
        return to_points - weight[..., None] * self.points


def dense_groups(
    points: Float[Tensor, "B N d"],
    operands: torch.dtype,
    accumulate: torch.dtype,
    scale: Float[Tensor, "B N"] | None,
) -> Iterator[tuple[slice, DensePairs]]:
    """Yield as many clips at a time as may have their pairs in memory.

    All groups share one buffer for their kernels, because fresh pages cost a CPU more than all the sums: a group is
    valid until the next one is asked for.
    """
    batch, num_tokens, _ = points.shape
    size = min(max(PAIRS_AT_ONCE[points.device.type] // num_tokens**2, 1), batch)
    workspace = None if points.is_cuda else points.new_empty(size, num_tokens, num_tokens, dtype=accumulate)
    for first in range(0, batch, size):
        clips = slice(first, first + size)
        yield clips, DensePairs(points[clips], operands, accumulate, None if scale is None else scale[clips], workspace)
