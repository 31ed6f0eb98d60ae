"""Triton kernels of the appearance kernel: no pair is ever written to memory.

A program owns a block of tokens (rows) of one clip and goes over all the others (columns), so that there are no atomics
and results are the same to the bit every time. The logits of a Gaussian are at most 0: no running maximum and no
rescaling, which attention needs. One launch per iteration: message, compatibility, damping and softmax in one.

Sums, logits, degrees and softmax are float32, operands of the products what the caller says. With TRITON_INTERPRET=1
everything runs on a CPU. The number of tokens is a compile-time constant: Triton 3.6's interpreter cannot loop to a
runtime bound under NumPy 2.4. `no_type_check`: an import hook that checks types would wrap the kernels, and Triton
would look for their names in the module of the wrapper.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dfer.crf.pairs import DifferentiablePairs, rounded

NEVER = 1e5  # a log-distance at which exp is 0 in every type
# Tokens, both ways. Compiled for compute capabilities 7.5 to 9.0, these need at most 48 KiB of shared memory, and no
# bf16 kernel spills. With 64, 16-bit operands are multiplied on an H100 or H200 by whole groups of four warps, and what
# Triton 3.6 made of that was wrong there: a sweep of 7 or 16 columns came out four times too large, or read memory that
# was not its own, while those of 64 and more, and the steps, were right (seen on an H200).
BLOCK = 32
COLUMNS = 128  # of x at a time
RANKS = 32  # of the gradient pass at a time
STAGES = 1

# The interpreter multiplies bf16 by its bits, as integers: there operands are widened, after they were rounded.
WIDEN = triton.knobs.runtime.interpret  # type: ignore[attr-defined]


@triton.jit
@no_type_check
def _dot(a, b, total, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, summed in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
@no_type_check
def _tokens(points, half_norm, first, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NEVER: tl.constexpr):
    """Points and half norms of a block of one clip; what lies beyond the last token is far from everything."""
    tokens = first + tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    z = tl.load(points + tokens[:, None] * D + dims[None, :], mask=(tokens < N)[:, None], other=0.0)
    h = tl.load(half_norm + tokens, mask=tokens < N, other=NEVER)
    return tokens, z, h


@triton.jit
@no_type_check
def _pairs(
    rows, z_i, h_i, columns, z_j, h_j, BLOCK: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """K_ij of two blocks, zero on the diagonal. Rounding could make an exponent positive where two tokens coincide."""
    logits = _dot(z_i, tl.trans(z_j), tl.zeros([BLOCK, BLOCK], tl.float32), WIDEN, PRECISION)
    logits = logits - h_i[:, None] - h_j[None, :]
    return tl.where(rows[:, None] == columns[None, :], 0.0, tl.exp(tl.minimum(logits, 0.0)))


@triton.jit
@no_type_check
def _block(pointer, tokens, first, WIDTH: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr):
    """Rows `tokens`, columns first, first + 1, ... of a (N, WIDTH) matrix; zero beyond its edges."""
    columns = first + tl.arange(0, PADDED)
    inside = (tokens < N)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + tokens[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _store(pointer, tokens, x, WIDTH: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr):
    columns = tl.arange(0, PADDED)
    inside = (tokens < N)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + tokens[:, None] * WIDTH + columns[None, :], x, mask=inside)


@triton.jit
@no_type_check
def _scale_kernel(
    points, half_norm, scale,
    N: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, NEVER: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale_i = 1 / sqrt(d_i)."""
    clip = tl.program_id(1).to(tl.int64)
    points += clip * N * D
    half_norm += clip * N
    rows, z_i, h_i = _tokens(points, half_norm, tl.program_id(0) * BLOCK, N, D, BLOCK, NEVER)
    total = tl.full([BLOCK], 1.0, tl.float32)  # K_ii, exactly
    for first in range(0, N, BLOCK):
        columns, z_j, h_j = _tokens(points, half_norm, first, N, D, BLOCK, NEVER)
        total += tl.sum(_pairs(rows, z_i, h_i, columns, z_j, h_j, BLOCK, WIDEN, PRECISION), axis=1)
    tl.store(scale + clip * N + rows, tl.rsqrt(total), mask=rows < N)


@triton.jit
@no_type_check
def _sweep_kernel(
    points, half_norm, scale, x, out,
    N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, C_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, NEVER: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale K x, x being scaled already."""
    clip = tl.program_id(1).to(tl.int64)
    points += clip * N * D
    half_norm += clip * N
    x += clip * N * C
    rows, z_i, h_i = _tokens(points, half_norm, tl.program_id(0) * BLOCK, N, D, BLOCK, NEVER)
    filtered = tl.zeros([BLOCK, C_PADDED], tl.float32)
    for first in range(0, N, BLOCK):
        columns, z_j, h_j = _tokens(points, half_norm, first, N, D, BLOCK, NEVER)
        pairs = _pairs(rows, z_i, h_i, columns, z_j, h_j, BLOCK, WIDEN, PRECISION)
        x_j = _block(x, columns, 0, C, C_PADDED, N)
        filtered = _dot(pairs.to(x_j.dtype), x_j, filtered, WIDEN, PRECISION)
    scale_i = tl.load(scale + clip * N + rows, mask=rows < N, other=0.0)
    _store(out + clip * N * C, rows, filtered * scale_i[:, None], C, C_PADDED, N)


@triton.jit
@no_type_check
def _step_kernel(
    points, half_norm, scale, x, values, unary, smooth, logits, compatibility, eta,
    new_logits, new_q, message_out, swept_out,
    N: tl.constexpr, D: tl.constexpr, L: tl.constexpr, L_PADDED: tl.constexpr,
    C: tl.constexpr, C_PADDED: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr, NEVER: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One iteration; x and values are scaled already. C = 0: no values."""
    clip = tl.program_id(1).to(tl.int64)
    points += clip * N * D
    half_norm += clip * N
    x += clip * N * L
    values += clip * N * C
    rows, z_i, h_i = _tokens(points, half_norm, tl.program_id(0) * BLOCK, N, D, BLOCK, NEVER)
    filtered = tl.zeros([BLOCK, L_PADDED], tl.float32)
    swept = tl.zeros([BLOCK, C_PADDED], tl.float32)
    for first in range(0, N, BLOCK):
        columns, z_j, h_j = _tokens(points, half_norm, first, N, D, BLOCK, NEVER)
        x_j = _block(x, columns, 0, L, L_PADDED, N)
        pairs = _pairs(rows, z_i, h_i, columns, z_j, h_j, BLOCK, WIDEN, PRECISION).to(x_j.dtype)
        filtered = _dot(pairs, x_j, filtered, WIDEN, PRECISION)
        if C > 0:
            v_j = _block(values, columns, 0, C, C_PADDED, N)
            swept = _dot(pairs, v_j, swept, WIDEN, PRECISION)
    scale_i = tl.load(scale + clip * N + rows, mask=rows < N, other=0.0)
    if C > 0:
        _store(swept_out + clip * N * C, rows, swept * scale_i[:, None], C, C_PADDED, N)

    states = tl.arange(0, L_PADDED)
    inside = (states < L)[:, None] & (states < L)[None, :]
    m = tl.load(compatibility + states[:, None] * L + states[None, :], mask=inside, other=0.0)
    message = tl.dot(filtered * scale_i[:, None], m, input_precision="ieee")
    if SMOOTH:
        message += _block(smooth + clip * N * L, rows, 0, L, L_PADDED, N)
    _store(message_out + clip * N * L, rows, message, L, L_PADDED, N)
    eta_b = tl.load(eta + clip)
    target = _block(unary + clip * N * L, rows, 0, L, L_PADDED, N) + message
    a = (1 - eta_b) * _block(logits + clip * N * L, rows, 0, L, L_PADDED, N) + eta_b * target
    _store(new_logits + clip * N * L, rows, a, L, L_PADDED, N)
    a = tl.where((states < L)[None, :], a, float("-inf"))
    q = tl.exp(a - tl.max(a, axis=1)[:, None])
    _store(new_q + clip * N * L, rows, q / tl.sum(q, axis=1)[:, None], L, L_PADDED, N)


@triton.jit
@no_type_check
def _gradient_kernel(
    points, half_norm, left, right, slope, out,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, NEVER: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j Y_ij (z_j - z_i),  Y_ij = K_ij (<left_i, right_j> + <right_i, left_j> - slope_i - slope_j)."""
    clip = tl.program_id(1).to(tl.int64)
    points += clip * N * D
    half_norm += clip * N
    left += clip * N * R
    right += clip * N * R
    slope += clip * N
    rows, z_i, h_i = _tokens(points, half_norm, tl.program_id(0) * BLOCK, N, D, BLOCK, NEVER)
    slope_i = tl.load(slope + rows, mask=rows < N, other=0.0)
    total = tl.zeros([BLOCK, D], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        columns, z_j, h_j = _tokens(points, half_norm, first, N, D, BLOCK, NEVER)
        slope_j = tl.load(slope + columns, mask=columns < N, other=0.0)
        product = tl.zeros([BLOCK, BLOCK], tl.float32)
        for rank in tl.static_range(0, R, RANKS):
            left_i, right_i = _block(left, rows, rank, R, RANKS, N), _block(right, rows, rank, R, RANKS, N)
            left_j, right_j = _block(left, columns, rank, R, RANKS, N), _block(right, columns, rank, R, RANKS, N)
            product = _dot(left_i, tl.trans(right_j), product, WIDEN, GRADIENT_PRECISION)
            product = _dot(right_i, tl.trans(left_j), product, WIDEN, GRADIENT_PRECISION)
        pairs = _pairs(rows, z_i, h_i, columns, z_j, h_j, BLOCK, WIDEN, PRECISION)
        y = pairs * (product - slope_i[:, None] - slope_j[None, :])
        weight += tl.sum(y, axis=1)
        # y carries the loss scale: it stays float32, whatever the operands of the rest.
        total = tl.dot(y, z_j.to(tl.float32), total, input_precision=GRADIENT_PRECISION)
    _store(out + clip * N * D, rows, total - weight[:, None] * z_i.to(tl.float32), D, D, N)


class TritonPairs(DifferentiablePairs):
    """The pairs of all clips of a batch at once; float32 in, float32 out."""

    def __init__(
        self,
        points: Float[Tensor, "B N d"],
        operands: torch.dtype,
        scale: Float[Tensor, "B N"] | None,
    ):
        assert points.dtype is not torch.float64, "the kernels sum in float32"
        self.operands, self.width = operands, points.shape[-1]
        exact = rounded(points, operands, torch.float32)
        # Products of matrices want a power of two, 16 or more: zeros change no distance.
        self.points = torch.nn.functional.pad(exact, (0, _padded(self.width) - self.width)).to(operands).contiguous()
        self.half_norm = (0.5 * exact.square().sum(-1)).contiguous()
        if scale is None:
            scale = torch.empty_like(self.half_norm)
            self._launch(_scale_kernel, scale)
        self.scale = scale.contiguous()

    def _launch(self, kernel: triton.JITFunction, *tensors: Tensor, **constants) -> None:
        batch, num_tokens, dim = self.points.shape
        with torch.cuda.device_of(self.points):
            kernel[(triton.cdiv(num_tokens, BLOCK), batch)](
                self.points, self.half_norm, *tensors, N=num_tokens, D=dim, BLOCK=BLOCK, NEVER=NEVER, WIDEN=WIDEN,
                PRECISION="ieee", **constants, num_stages=STAGES,
            )  # fmt: skip

    def _scaled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.scale[..., None] * x).to(dtype).contiguous()

    def sweep(self, x: Tensor) -> Tensor:
        if x.shape[-1] > COLUMNS:
            return torch.cat([self.sweep(part) for part in x.split(COLUMNS, dim=-1)], dim=-1)
        x = self._scaled(x, self.operands)
        out = torch.empty_like(x, dtype=torch.float32)
        self._launch(_sweep_kernel, self.scale, x, out, C=x.shape[-1], C_PADDED=_padded(x.shape[-1]))
        return out

    def step(self, q, logits, unary, smooth, compatibility, eta, values):
        unary = unary.contiguous()
        outputs = [torch.empty_like(unary) for _ in range(3)]
        width = 0 if values is None else values.shape[-1]
        swept = None if values is None else torch.empty_like(values, memory_format=torch.contiguous_format)
        self._launch(
            _step_kernel,
            self.scale,
            self._scaled(q, self.operands),
            unary if values is None else self._scaled(values, self.operands),  # unary: a pointer that is not followed
            unary,
            unary if smooth is None else smooth.contiguous(),
            logits.contiguous(),
            compatibility.contiguous(),
            eta.contiguous(),
            *outputs,
            unary if swept is None else swept,
            L=unary.shape[-1],
            L_PADDED=_padded(unary.shape[-1]),
            C=width,
            C_PADDED=_padded(width),
            SMOOTH=smooth is not None,
        )
        return *outputs, swept

    def gradient(self, left: Tensor, right: Tensor, columns: Tensor) -> Tensor:
        rows = (left * self.sweep(right)).sum(-1)
        slope = 0.5 * (rows + columns) * self.scale.square()
        # The left side carries the loss scale, too much for fp16: tf32 has its precision and float32's range.
        exact = self.operands is torch.float32
        operands = torch.bfloat16 if self.operands is torch.bfloat16 else torch.float32
        left, right = self._scaled(left, operands), self._scaled(right, operands)
        out = torch.empty_like(self.points, dtype=torch.float32)
        self._launch(
            _gradient_kernel, left, right, slope.contiguous(), out,
            R=left.shape[-1], RANKS=RANKS, GRADIENT_PRECISION="ieee" if exact else "tf32",
        )  # fmt: skip
        return out[..., : self.width]


def _padded(width: int) -> int:
    return max(1 << (width - 1).bit_length(), 16)
