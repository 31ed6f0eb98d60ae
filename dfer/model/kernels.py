"""Triton kernels of batch norm with what follows it, and of the stem's max-pool, for channels-last maps on a GPU.

Maps are matrices here, (R, C): a row for each cell of each frame. Sums are float32 whatever the type of the maps, and
have one order: a program adds up a part of the rows, and another kernel the parts, without atomics. The number of parts
depends on the shape alone, so that another card rounds alike.

Statistics take one pass, by shifted sums: each program subtracts the mean of its first rows before it squares. That
needs no reduction within its loop, as Welford's update would, and loses no digits where the mean is much larger than
the standard deviation. Parts are merged by Chan's formula.

With TRITON_INTERPRET=1 everything runs on a CPU. Bounds of loops are compile-time constants, and `no_type_check` is
there, for the reasons that dfer/crf/triton.py gives.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _tile(rows, columns, R, C: tl.constexpr):
    """Places of a tile in a (R, C) matrix, and which of them lie in it."""
    return rows.to(tl.int64)[:, None] * C + columns[None, :], (rows < R)[:, None] & (columns < C)[None, :]


@triton.jit
@no_type_check
def _of_channels(pointer, columns, C: tl.constexpr):
    return tl.load(pointer + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _inverse_std(spread, columns, eps, C: tl.constexpr, EVALUATING: tl.constexpr):
    """1 / std of each channel; in evaluation `spread` holds variances."""
    value = _of_channels(spread, columns, C)
    return tl.rsqrt(value + eps) if EVALUATING else value


@triton.jit
@no_type_check
def _rectified(x):
    """max(x, 0), and NaN where x is NaN."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
@no_type_check
def parts_kernel(
    x, means, squares, R,
    C: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean of each channel over a part of the rows, and the sum of squared distances from it."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = part * (STEPS * ROWS)
    rows = first + tl.arange(0, ROWS)
    at, inside = _tile(rows, columns, R, C)
    head = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.sum(head, axis=0) / tl.minimum(R - first, ROWS).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        at, inside = _tile(rows + step * ROWS, columns, R, C)
        off = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - shift[None, :]
        off = tl.where(inside, off, 0.0)
        total += off
        square += off * off
    count = tl.minimum(R - first, STEPS * ROWS).to(tl.float32)
    sums = tl.sum(total, axis=0)
    tl.store(means + part * C + columns, shift + sums / count, mask=columns < C)
    tl.store(squares + part * C + columns, tl.sum(square, axis=0) - sums * sums / count, mask=columns < C)


@triton.jit
@no_type_check
def merge_kernel(
    means, squares, running_mean, running_var, tracked, mean_out, inverse_std_out, R, momentum, eps,
    C: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / std of each channel over all rows, and the running statistics as torch updates them."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    parts = tl.arange(0, ROWS)
    shift = _of_channels(means, columns, C)  # the first part's
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PARTS, ROWS):
        at, inside = _tile(first + parts, columns, PARTS, C)
        count = tl.minimum(R - (first + parts) * PART, PART).to(tl.float32)
        off = tl.load(means + at, mask=inside, other=0.0) - shift[None, :]
        total += tl.where(inside, off * count[:, None], 0.0)
    mean = shift + tl.sum(total, axis=0) / R
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PARTS, ROWS):
        at, inside = _tile(first + parts, columns, PARTS, C)
        count = tl.minimum(R - (first + parts) * PART, PART).to(tl.float32)
        off = tl.load(means + at, mask=inside, other=0.0) - mean[None, :]
        square = tl.load(squares + at, mask=inside, other=0.0) + off * off * count[:, None]
        total += tl.where(inside, square, 0.0)
    square = tl.sum(total, axis=0)
    tl.store(mean_out + columns, mean, mask=columns < C)
    tl.store(inverse_std_out + columns, tl.rsqrt(square / R + eps), mask=columns < C)
    before = _of_channels(running_mean, columns, C)
    tl.store(running_mean + columns, momentum * mean + (1 - momentum) * before, mask=columns < C)
    before = _of_channels(running_var, columns, C)
    tl.store(running_var + columns, momentum * (square / (R - 1)) + (1 - momentum) * before, mask=columns < C)
    if tl.program_id(1) == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
@no_type_check
def normalise_kernel(
    x, shortcut, mean, spread, weight, bias, y, R, eps,
    C: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, EVALUATING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = relu(batch norm of x + shortcut)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = _tile(rows, columns, R, C)
    slope = _inverse_std(spread, columns, eps, C, EVALUATING) * _of_channels(weight, columns, C)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - _of_channels(mean, columns, C)[None, :]
    value = value * slope[None, :] + _of_channels(bias, columns, C)[None, :]
    if ADD:
        value += tl.load(shortcut + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = _rectified(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _unpooled(
    to_z, index, rows, columns, R, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of cells, from those of the at most four windows in which each may be the largest, row by row."""
    out_h: tl.constexpr = (H - 1) // 2 + 1
    out_w: tl.constexpr = (W - 1) // 2 + 1
    frame, i, j = rows // (H * W), (rows // W) % H, rows % W
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for window in tl.static_range(4):
        out_i, out_j = (i + window // 2) // 2, (j + window % 2) // 2
        # Of an even row there is one window only; so of columns.
        there = (rows < R) & (out_i < out_h) & (out_j < out_w) & (i % 2 >= window // 2) & (j % 2 >= window % 2)
        tap = (i - 2 * out_i + 1) * 3 + j - 2 * out_j + 1
        at = ((frame * out_h + out_i) * out_w + out_j).to(tl.int64)[:, None] * C + columns[None, :]
        inside = there[:, None] & (columns < C)[None, :]
        chosen = tl.load(index + at, mask=inside, other=-1).to(tl.int32)
        slope = tl.load(to_z + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(chosen == tap[:, None], slope, 0.0)
    return total


@triton.jit
@no_type_check
def _slopes(
    to_y, index, y, off, slope, shift, rows, columns, at, inside, R,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    POOL: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of what batch norm returns, from that of what follows it.

    Where the ReLU had nothing added, what it was given is computed again instead of read.
    """
    if POOL:
        to_norm = _unpooled(to_y, index, rows, columns, R, H, W, C, ROWS, COLUMNS)
    else:
        to_norm = tl.load(to_y + at, mask=inside, other=0.0).to(tl.float32)
    if ADD and RELU:
        to_norm = tl.where(tl.load(y + at, mask=inside, other=0.0) <= 0, 0.0, to_norm)
    elif RELU:
        to_norm = tl.where(off * slope[None, :] + shift[None, :] <= 0, 0.0, to_norm)
    return to_norm


@triton.jit
@no_type_check
def gradient_parts_kernel(
    to_y, index, x, y, mean, inverse_std, weight, bias, to_shortcut, weights, biases, R,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
    POOL: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the rows, which make the gradients of weight and bias; with ADD also that of the shortcut."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    centre, scale = _of_channels(mean, columns, C), _of_channels(inverse_std, columns, C)
    slope, shift = scale * _of_channels(weight, columns, C), _of_channels(bias, columns, C)
    to_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    to_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        rows = part * (STEPS * ROWS) + step * ROWS + tl.arange(0, ROWS)
        at, inside = _tile(rows, columns, R, C)
        off = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[None, :]
        to_norm = _slopes(
            to_y, index, y, off, slope, shift, rows, columns, at, inside, R, H, W, C, POOL, ADD, RELU, ROWS, COLUMNS
        )
        if ADD:
            tl.store(to_shortcut + at, to_norm.to(to_shortcut.dtype.element_ty), mask=inside)
        to_bias += to_norm  # 0 beyond the edges, as all that is loaded there
        to_weight += to_norm * off
    tl.store(weights + part * C + columns, tl.sum(to_weight, axis=0) * scale, mask=columns < C)
    tl.store(biases + part * C + columns, tl.sum(to_bias, axis=0), mask=columns < C)


@triton.jit
@no_type_check
def input_gradient_kernel(
    to_y, index, x, mean, inverse_std, weight, bias, to_weight, to_bias, to_x, R,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    POOL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of x. Without POOL and RELU `to_y` is the gradient of what batch norm returns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = _tile(rows, columns, R, C)
    scale = _of_channels(inverse_std, columns, C)
    slope, shift = scale * _of_channels(weight, columns, C), _of_channels(bias, columns, C)
    off = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - _of_channels(mean, columns, C)[None, :]
    to_norm = _slopes(
        to_y, index, x, off, slope, shift, rows, columns, at, inside, R, H, W, C, POOL, False, RELU, ROWS, COLUMNS
    )
    along = _of_channels(to_weight, columns, C) * scale / R
    to_norm = to_norm - _of_channels(to_bias, columns, C)[None, :] / R - off * along[None, :]
    tl.store(to_x + at, (to_norm * slope[None, :]).to(to_x.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def pool_kernel(
    x, mean, spread, weight, bias, z, index, R, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, EVALUATING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest cell of each 3x3 window, and which it is: the first of several, the last NaN, as torch has it.

    With NORM x goes through batch norm and ReLU first, and is rounded, as it would be if it were written.
    """
    out_h: tl.constexpr = (H - 1) // 2 + 1
    out_w: tl.constexpr = (W - 1) // 2 + 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    frame, i, j = rows // (out_h * out_w), (rows // out_w) % out_h, rows % out_w
    if NORM:
        centre, shift = _of_channels(mean, columns, C), _of_channels(bias, columns, C)
        slope = _inverse_std(spread, columns, eps, C, EVALUATING) * _of_channels(weight, columns, C)
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    chosen = tl.zeros([ROWS, COLUMNS], tl.int32) + (tl.where(i == 0, 3, 0) + tl.where(j == 0, 1, 0))[:, None]
    for tap in tl.static_range(9):
        in_i, in_j = 2 * i - 1 + tap // 3, 2 * j - 1 + tap % 3
        there = (rows < R) & (in_i >= 0) & (in_i < H) & (in_j >= 0) & (in_j < W)
        inside = there[:, None] & (columns < C)[None, :]
        at = ((frame * H + in_i) * W + in_j).to(tl.int64)[:, None] * C + columns[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value = _rectified((value - centre[None, :]) * slope[None, :] + shift[None, :])
            value = value.to(x.dtype.element_ty).to(tl.float32)
        better = inside & ((value > best) | (value != value))
        best = tl.where(better, value, best)
        chosen = tl.where(better, tap, chosen)
    at, inside = _tile(rows, columns, R, C)
    tl.store(z + at, best.to(z.dtype.element_ty), mask=inside)
    tl.store(index + at, chosen.to(tl.int8), mask=inside)


@triton.jit
@no_type_check
def unpool_kernel(
    to_z, index, to_x, R,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the pool's input."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = _tile(rows, columns, R, C)
    slopes = _unpooled(to_z, index, rows, columns, R, H, W, C, ROWS, COLUMNS)
    tl.store(to_x + at, slopes.to(to_x.dtype.element_ty), mask=inside)
