"""The CPU kernel for planar 4:2:0 YUV, as videos have it: what kernels.py does to RGB, one frame at a time.

Each plane is resized at its own resolution: what interpolates chroma to the positions of luma, and what resizes that,
are one sum for each output. Rows are blended with contiguous vector code; then columns, of eight lines at once, whose
values lie side by side.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dali_pipes.compiling import njit
from dali_pipes.kernels import (
    BOX,
    CHROMA_LEFT,
    COLOUR,
    FAST,
    MIRROR,
    YUV,
    blend_rows,
    cut,
    erase,
    finish,
    put,
    touches_geometry,
    triangles,
)

_LANES = 8  # lines whose columns are blended together
_VECTOR = ir.VectorType(ir.FloatType(), _LANES)


class Resize(NamedTuple):
    """How the frames of a clip are cut and resized, and memory for what lies between."""

    height: int
    top: int
    left: int
    columns: int
    begin: int  # first column of chroma that is needed
    samples: int  # columns of chroma that are needed
    y: tuple[np.ndarray, np.ndarray]  # for each line of the output first line of luma, weights
    x: tuple[np.ndarray, np.ndarray]
    v: tuple[np.ndarray, np.ndarray]  # of chroma, as u
    u: tuple[np.ndarray, np.ndarray]
    line: np.ndarray
    lanes: np.ndarray
    planes: np.ndarray
    picture: np.ndarray


@njit(**FAST)
def resize_of(height, width, size, p):
    """Return the Resize of frames of a height and a width, which are even; `p` as of kernels.fused."""
    top, rows = cut(p[BOX], p[BOX + 2], height)
    left, columns = cut(p[BOX + 1], p[BOX + 3], width)
    y, x = triangles(rows, size, False), triangles(columns, size, p[MIRROR] != 0)
    v = _of_chroma(top + y[0], y[1], height // 2 - 1, False)
    u = _of_chroma(left + x[0], x[1], width // 2 - 1, p[CHROMA_LEFT] != 0)
    begin = max((left - 1) // 2, 0)
    samples = min((left + columns) // 2 + 1, width // 2) - begin
    u[0][:] -= begin
    longest = max(columns, samples)
    line = np.empty((_LANES, longest), np.float32)
    lanes = np.zeros((longest + max(x[1].shape[1], u[1].shape[1])) * _LANES, np.float32)
    planes = np.empty((3, size * _LANES), np.float32)
    picture = np.empty((size if touches_geometry(p) else 0, 3 * size), np.float32)
    return Resize(height, top, left, columns, begin, samples, y, x, v, u, line, lanes, planes, picture)


@njit(**FAST)
def fused(out, pixels, p):
    """Write one frame to `out`; `out` and `p` as of kernels.fused.

    `pixels` is uint8, (3 H / 2, W, 1): H rows of Y, then Cb and Cr, H/2 x W/2 each; H and W are even.
    """
    height, width = len(pixels) // 3 * 2, pixels.shape[1]
    chroma = pixels[height:].reshape(2, height // 2, width // 2)
    luma = pixels[:height].reshape(height, width)
    write(out, luma, chroma[0], chroma[1], resize_of(height, width, out.shape[0], p), p)


@njit(**FAST)
def write(out, luma, cb, cr, r, p):
    """Write one frame to `out` as `fused` does, from its planes, whose lines may be longer than the frame is wide."""
    size, last = out.shape[0], r.height // 2 - 1
    planes, line, lanes = r.planes, r.line, r.lanes
    geometry = touches_geometry(p)
    for y in range(0, size, _LANES):
        count = min(_LANES, size - y)
        for k in range(count):
            blend_rows(line[k], luma, r.top + r.y[0][y + k], r.height - 1, r.left, r.columns, r.y[1][y + k])
        _side_by_side(lanes, line, r.columns)
        _blend_columns(planes[0], lanes, *r.x)
        for plane in range(2):
            source = cb if plane == 0 else cr
            for k in range(count):
                blend_rows(line[k], source, r.v[0][y + k], last, r.begin, r.samples, r.v[1][y + k])
            _side_by_side(lanes, line, r.samples)
            _blend_columns(planes[1 + plane], lanes, *r.u)
        if geometry:
            _to_rgb(planes, p[YUV:CHROMA_LEFT])
            _deal(r.picture[y : y + count], planes)
        else:
            _to_colours(planes, p[YUV:CHROMA_LEFT], p[COLOUR:YUV])
            _deal(out[y : y + count].reshape(count, 3 * size), planes)
    if geometry:
        finish(out, r.picture, p)
    erase(out, p)


@njit(**FAST)
def _of_chroma(first, weights, last, even):
    """Return first sample and weights on samples of chroma, 0 to `last`, for those on positions of luma.

    A sample of luma takes three quarters of the chroma sample that is nearest, and a quarter of the next one: they lie
    a quarter of their distance beside luma's. `even`: they lie on even samples of luma instead.
    """
    taps = weights.shape[1] // 2 + 2
    taps += taps % 2
    begin, found = np.empty(len(first), np.int64), np.zeros((len(first), taps), np.float32)
    for i in range(len(first)):
        begin[i] = max((first[i] - 1) // 2, 0)
        for k in range(weights.shape[1]):
            place = first[i] + k
            near, odd = place // 2, place % 2
            share = np.float32((0.5 if odd else 1.0) if even else 0.75)
            if weights[i, k] != 0:
                far = min(max(near + (1 if odd else -1), 0), last)
                found[i, near - begin[i]] += share * weights[i, k]
                found[i, far - begin[i]] += (1 - share) * weights[i, k]
    return begin, found


@njit(**FAST)
def _side_by_side(out, lines, length):
    """Set out[_LANES * i + k] to lines[k, i]; written out for eight, as only so it becomes vector code."""
    a, b, c, d, e, f, g, h = lines[0], lines[1], lines[2], lines[3], lines[4], lines[5], lines[6], lines[7]
    for i in range(length):
        out[8 * i] = a[i]
        out[8 * i + 1] = b[i]
        out[8 * i + 2] = c[i]
        out[8 * i + 3] = d[i]
        out[8 * i + 4] = e[i]
        out[8 * i + 5] = f[i]
        out[8 * i + 6] = g[i]
        out[8 * i + 7] = h[i]


@njit(**FAST)
def _blend_columns(out, source, first, weights):
    """Set out[_LANES * x :], _LANES values, to weights[x] @ the samples of `source` from first[x] on."""
    taps, flat = weights.shape[1], weights.reshape(weights.size)
    if taps == 2:  # a constant number is compiled into straight code
        for x in range(len(first)):
            _blend_lanes(out, _LANES * x, source, _LANES * first[x], flat, 2 * x, 2)
    elif taps == 4:
        for x in range(len(first)):
            _blend_lanes(out, _LANES * x, source, _LANES * first[x], flat, 4 * x, 4)
    elif taps == 6:
        for x in range(len(first)):
            _blend_lanes(out, _LANES * x, source, _LANES * first[x], flat, 6 * x, 6)
    else:
        for x in range(len(first)):
            _blend_lanes(out, _LANES * x, source, _LANES * first[x], flat, taps * x, taps)


@intrinsic
def _blend_lanes(typingctx, out, o, source, j, weights, i, taps):
    """Set _LANES values from out[o] on to the sum over k < taps of weights[i + k] * those from source[j + _LANES k] on.

    All float32 and flat. What a target has no vectors for, LLVM makes of narrower ones.
    """

    def codegen(context, builder, signature, args):
        def start(number: int) -> ir.Value:
            array = context.make_array(signature.args[number])(context, builder, args[number])
            return builder.gep(array.data, [args[number + 1]])

        target, samples, weights = start(0), start(2), start(4)
        total = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * _LANES))
        undefined, zeros = ir.Constant(_VECTOR, ir.Undefined), ir.VectorType(ir.IntType(32), _LANES)
        with cgutils.for_range(builder, args[6]) as loop:
            weight = builder.load(builder.gep(weights, [loop.index]))
            weight = builder.insert_element(undefined, weight, ir.IntType(32)(0))
            weight = builder.shuffle_vector(weight, undefined, ir.Constant(zeros, [0] * _LANES))
            place = builder.gep(samples, [builder.mul(loop.index, loop.index.type(_LANES))])
            values = builder.load(builder.bitcast(place, _VECTOR.as_pointer()))
            values.align = 4
            product = builder.fmul(values, weight, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        store = builder.store(builder.load(total), builder.bitcast(target, _VECTOR.as_pointer()))
        store.align = 4
        return context.get_dummy_value()

    return types.void(out, o, source, j, weights, i, taps), codegen


@njit(**FAST)
def _to_rgb(planes, m):
    """Make YUV RGB, 0 to 255, in place; m is (3, 4), flat."""
    low, high = np.float32(0), np.float32(255)
    a, b, c = planes[0], planes[1], planes[2]
    for i in range(len(a)):
        x, y, z = a[i], b[i], c[i]
        a[i] = min(max(m[0] * x + m[1] * y + m[2] * z + m[3], low), high)
        b[i] = min(max(m[4] * x + m[5] * y + m[6] * z + m[7], low), high)
        c[i] = min(max(m[8] * x + m[9] * y + m[10] * z + m[11], low), high)


@njit(**FAST)
def _to_colours(planes, m, n):
    """Make YUV RGB as `_to_rgb` does, and set each pixel to n @ (pixel, 1) in place; n is (3, 4), flat."""
    low, high = np.float32(0), np.float32(255)
    a, b, c = planes[0], planes[1], planes[2]
    for i in range(len(a)):
        x, y, z = a[i], b[i], c[i]
        red = min(max(m[0] * x + m[1] * y + m[2] * z + m[3], low), high)
        green = min(max(m[4] * x + m[5] * y + m[6] * z + m[7], low), high)
        blue = min(max(m[8] * x + m[9] * y + m[10] * z + m[11], low), high)
        a[i] = n[0] * red + n[1] * green + n[2] * blue + n[3]
        b[i] = n[4] * red + n[5] * green + n[6] * blue + n[7]
        c[i] = n[8] * red + n[9] * green + n[10] * blue + n[11]


@njit(**FAST)
def _deal(out, planes):
    """Write lines that lie side by side as rows of pixels, (n, 3 S) in the type of `out`."""
    a, b, c = planes[0], planes[1], planes[2]
    for k in range(len(out)):
        row = out[k]
        for x in range(len(row) // 3):
            put(row, 3 * x, a[_LANES * x + k])
            put(row, 3 * x + 1, b[_LANES * x + k])
            put(row, 3 * x + 2, c[_LANES * x + k])
