"""The CPU kernel for planar 4:2:0 YUV, as videos have it: what kernels.py does to RGB, one frame at a time.

Each plane is resized at its own resolution: what interpolates chroma to the positions of luma, and what resizes that,
are one sum for each output. A block of lines is made at a time: their rows are blended, and then lie side by side,
value by value; so columns and colours are contiguous vector code too.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import NamedTuple

import numpy as np
from numba import carray

from dali_pipes.compiling import njit, pointer
from dali_pipes.kernels import (
    BOX,
    CHROMA_LEFT,
    COLOUR,
    FAST,
    MIRROR,
    YUV,
    cut,
    erase,
    finish,
    put,
    touches_geometry,
    triangles,
)
from dali_pipes.planar_lanes import LANES, blend_lanes, blend_tile, deal_tile


class Resize(NamedTuple):
    """How the frames of a clip are cut and resized, and memory for what lies between."""

    height: int
    top: int
    left: int
    columns: int
    begin: int  # first column of chroma that is needed
    samples: int  # columns of chroma that are needed
    y: tuple[np.ndarray, np.ndarray]  # rows of luma and their weights, as `_by_blocks` has them
    x: tuple[np.ndarray, np.ndarray]  # for each column of the output first one of luma, weights
    v: tuple[np.ndarray, np.ndarray]  # of chroma, as y
    u: tuple[np.ndarray, np.ndarray]  # of chroma, as x
    addresses: np.ndarray  # of a block's rows
    lanes: np.ndarray  # a block of lines whose rows are blended
    planes: np.ndarray  # and its columns
    lines: np.ndarray  # as rows of pixels
    picture: np.ndarray


# Inner functions are given addresses: whoever has an array counts it, and each count waits for all that was written.


class _Plane(NamedTuple):
    """A plane of a frame."""

    start: int  # address of the first column that is needed, in the first row
    pitch: int  # bytes from row to row
    length: int  # columns that are needed


class _Table(NamedTuple):
    """Where y, x, v or u of a Resize lie."""

    places: int  # address
    weights: int  # address
    number: int
    taps: int


class _Memory(NamedTuple):
    """Where memory of a Resize lies."""

    lanes: int
    addresses: int


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
    for i in range(size):
        u[0][i] -= begin
    y, v = _by_blocks(top + y[0], y[1], height - 1), _by_blocks(v[0], v[1], height // 2 - 1)
    addresses = np.empty(LANES * max(y[0].shape[1], v[0].shape[1]), np.int64)
    longest = max(columns + x[1].shape[1], samples + u[1].shape[1])
    lanes, planes = np.zeros(longest * LANES, np.float32), np.empty((3, size * LANES), np.float32)
    lines = np.empty((LANES, 3 * size), np.float32)
    picture = np.empty((size if touches_geometry(p) else 0, 3 * size), np.float32)
    return Resize(height, top, left, columns, begin, samples, y, x, v, u, addresses, lanes, planes, lines, picture)


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
    size, geometry = out.shape[0], touches_geometry(p)
    y, x, v, u = _table(r.y), _table(r.x), _table(r.v), _table(r.u)
    of_luma = _Plane(luma.ctypes.data + r.left, luma.shape[1], r.columns)
    of_cb = _Plane(cb.ctypes.data + r.begin, cb.shape[1], r.samples)
    of_cr = _Plane(cr.ctypes.data + r.begin, cr.shape[1], r.samples)
    memory = _Memory(r.lanes.ctypes.data, r.addresses.ctypes.data)
    planes, lines, plane = r.planes.ctypes.data, r.lines.ctypes.data, 4 * LANES * size
    for first in range(0, size, LANES):
        block, count = first // LANES, min(LANES, size - first)
        _blend(planes, of_luma, y, block, x, memory)
        for number in (1, 2):  # one call, as each takes time to compile
            _blend(planes + number * plane, of_cb if number == 1 else of_cr, v, block, u, memory)
        if geometry:
            _to_rgb(r.planes, p[YUV:CHROMA_LEFT])
        else:
            _to_colours(r.planes, p[YUV:CHROMA_LEFT], p[COLOUR:YUV])
        _deal(lines, planes, size)
        if geometry:
            _put_lines(r.picture, first, count, lines)
        else:
            _put_lines(out, first, count, lines)
    if geometry:
        finish(out, r.picture, p)
    erase(out, p)


@njit(**FAST)
def _put_lines(out, first, count, lines):
    """Set `count` rows of `out` to lines of pixels, in its type."""
    number = out.size // len(out)
    for k in range(count):
        row = carray(pointer(out.ctypes.data + out.itemsize * number * (first + k)), (number,), out.dtype)
        line = carray(pointer(lines + 4 * number * k), (number,), np.float32)
        for i in range(number):
            put(row, i, line[i])


@njit(**FAST)
def _table(table):
    """Return where a table of a Resize lies."""
    places, weights = table
    return _Table(places.ctypes.data, weights.ctypes.data, len(weights), weights.shape[1])


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
def _by_blocks(first, weights, last):
    """Return the rows that are blended to each line, `last` at most, and their weights: both (blocks, taps, LANES).

    What fills up the last block is as the last line.
    """
    blocks, taps = -(-len(first) // LANES), weights.shape[1]
    rows, found = np.empty((blocks, taps, LANES), np.int64), np.empty((blocks, taps, LANES), np.float32)
    for block in range(blocks):
        for tap in range(taps):
            for lane in range(LANES):
                line = min(block * LANES + lane, len(first) - 1)
                rows[block, tap, lane] = min(first[line] + tap, last)
                found[block, tap, lane] = weights[line, tap]
    return rows, found


@njit(**FAST)
def _blend(to, plane, y, block, x, memory):
    """Write a block of lines of a plane, resized: LANES values of each column side by side, column after column."""
    number = LANES * y.taps
    rows = carray(pointer(y.places + 8 * block * number), (number,), np.int64)
    addresses = carray(pointer(memory.addresses), (number,), np.int64)
    for i in range(number):
        addresses[i] = plane.start + rows[i] * plane.pitch
    weights = y.weights + 4 * block * number
    _blend_rows(memory, weights, y.taps, plane.length)
    if x.taps == 2:  # a constant number is compiled into straight code
        _blend_columns(to, memory.lanes, x, 2)
    elif x.taps == 4:
        _blend_columns(to, memory.lanes, x, 4)
    elif x.taps == 6:
        _blend_columns(to, memory.lanes, x, 6)
    else:
        _blend_columns(to, memory.lanes, x, x.taps)


@njit(**FAST)
def _blend_rows(memory, weights, taps, length):
    """Set lanes[LANES * i + k] to column i of the rows of line k of a block, blended."""
    if length >= LANES:
        for i in range(0, length, LANES):  # the last one may overlap that before
            blend_tile(memory.lanes, memory.addresses, weights, min(i, length - LANES), taps)
        return
    shape = taps, LANES
    rows, shares = carray(pointer(memory.addresses), shape, np.int64), carray(pointer(weights), shape, np.float32)
    out = carray(pointer(memory.lanes), (length, LANES), np.float32)
    for i in range(length):
        for k in range(LANES):
            total = np.float32(0)
            for tap in range(taps):
                total += shares[tap, k] * np.float32(carray(pointer(rows[tap, k] + i), (1,), np.uint8)[0])
            out[i, k] = total


@njit(**FAST, inline="always")
def _blend_columns(to, lanes, table, taps):
    """Write LANES values for each column of the output: the weighted sum of those of some columns."""
    places = carray(pointer(table.places), (table.number,), np.int64)
    for x in range(table.number):
        blend_lanes(to + 4 * LANES * x, lanes + 4 * LANES * places[x], table.weights + 4 * taps * x, taps)


@njit(**FAST)
def _deal(lines, planes, size):
    """Write a block of lines, whose values lie side by side in three planes, as rows of pixels; all float32."""
    if size >= LANES:
        for x in range(0, size, LANES):
            deal_tile(lines, planes, min(x, size - LANES), size)
        return
    out = carray(pointer(lines), (LANES, size, 3), np.float32)
    values = carray(pointer(planes), (3, size, LANES), np.float32)
    for k in range(LANES):
        for x in range(size):
            for c in range(3):
                out[k, x, c] = values[c, x, k]


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
