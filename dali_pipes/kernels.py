"""The fused CPU kernel: crop -> resize -> mirror -> warp -> blur -> colour and normalise -> erase, one frame at a time.

DALI's own CPU operators do the same in several passes, each of which costs as much as decoding the frame. This kernel
runs inside the DALI graph (of videos where they are decoded), in threads without Python, and passes over the memory
once: rows are blended with contiguous vector code, columns one pixel at a time (in four lanes, of which the last is not
used) for a few lines at once, and the colours of a line are mixed while it is in the cache. Nothing is rounded in
between.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from dali_pipes.compiling import njit, pointer
from dfer.plan.sampling import EpochPlan
from dfer.plan.transforms import IMAGENET_MEAN, IMAGENET_STD

# The parameters of a frame are one vector of float32. Names of its parts:
BOX, MIRROR, WARP, BLUR, ERASE, COLOUR = 0, 4, 5, 11, 12, 16  # as in EpochPlan; booleans are 0 or 1
YUV, CHROMA_LEFT = 28, 40  # (3, 4) map from YUV to RGB, 0..255; chroma samples lie on even columns (else between)
FILL = 41  # (3,) what is erased becomes
NUM_PARAMETERS = 44

# "contract" lets a product and a sum become one instruction; sums are never reordered.
FAST = {"fastmath": {"contract"}, "nogil": True, "error_model": "numpy"}
_F4 = ir.VectorType(ir.FloatType(), 4)
_LINES = 4  # whose columns are blended together: 8 are slower


def parameters(
    plan: EpochPlan,
    videos: Int64[np.ndarray, " B"],
    *,
    crop: bool = True,
    yuv: Float32[np.ndarray, "B 13"] | None = None,
    normalised: bool = True,
) -> Float32[np.ndarray, "B P"]:
    """Return the parameters of some videos of a plan.

    Args:
        plan: of the epoch.
        videos: rows of the plan.
        crop: False if the decoder has cut the box out already.
        yuv: YUV and CHROMA_LEFT, for planar pictures.
        normalised: False if colours stay in 0..255.
    """
    p = np.zeros((len(videos), NUM_PARAMETERS), dtype=np.float32)
    p[:, BOX:MIRROR] = plan.box[videos] if crop else (0, 0, 1, 1)
    p[:, MIRROR] = plan.mirror[videos]
    p[:, WARP:BLUR] = plan.warp[videos].reshape(-1, 6)
    p[:, BLUR] = plan.blur[videos]
    p[:, ERASE:COLOUR] = plan.erase[videos]
    if yuv is not None:
        p[:, YUV:FILL] = yuv
    colour = plan.colour[videos]
    if not normalised:
        mean = (255 * IMAGENET_MEAN).astype(np.float32)
        colour = colour * (255 * IMAGENET_STD[:, None]).astype(np.float32)
        colour[:, :, 3] += mean
        p[:, FILL:] = mean
    p[:, COLOUR:YUV] = colour.reshape(-1, 12)
    return p


class Resize(NamedTuple):
    """How crops of one size are resized, and memory for what lies between."""

    rows: int
    columns: int
    y: tuple[np.ndarray, np.ndarray]  # for each line of the output first row of the crop, weights
    x: tuple[np.ndarray, np.ndarray]
    blended: np.ndarray
    lines: np.ndarray
    picture: np.ndarray


@njit(**FAST)
def resize_of(rows, columns, size, p):
    """Return the Resize of crops of so many rows and columns; `p` as of `fused`."""
    y, x = triangles(rows, size, False), triangles(columns, size, p[MIRROR] != 0)
    blended = np.zeros((_LINES, 3 * columns + 3 * x[1].shape[1] + 4), np.float32)
    lines = np.zeros((_LINES, 3 * size + 4), np.float32)
    picture = np.empty((size if touches_geometry(p) else 0, 3 * size), np.float32)
    return Resize(rows, columns, y, x, blended, lines, picture)


@njit(**FAST)
def fitting(r, rows, columns, size, p):
    """Return the Resize of crops of so many rows and columns: r itself, that of the frame before, if it is one."""
    return r if rows == r.rows and columns == r.columns else resize_of(rows, columns, size, p)


@njit(**FAST)
def fused(out, pixels, p):
    """Write one frame to `out`, (S, S, 3) float32, uint16 (the bits of bfloat16) or uint8 (rounded, clamped to 0..255).

    `pixels` is uint8 RGB, (H, W, 3); `p` as `parameters` makes it.
    """
    top, left, rows, columns = crop(p, pixels.shape[0], pixels.shape[1])
    write(out, pixels, top, left, resize_of(rows, columns, out.shape[0], p), p)


@njit(**FAST)
def crop(p, height, width):
    """Return the crop of a frame: first row and column, and how many there are."""
    top, rows = cut(p[BOX], p[BOX + 2], height)
    left, columns = cut(p[BOX + 1], p[BOX + 3], width)
    return top, left, rows, columns


@njit(**FAST)
def write(out, pixels, top, left, r, p):
    """As `fused`, of the crop that begins at a pixel and has the size of `r`, not of the box in `p`."""
    size, geometry = out.shape[0], touches_geometry(p)
    flat = pixels.reshape(pixels.shape[0], 3 * pixels.shape[1])
    for y in range(size):
        if y % _LINES == 0:
            for k in range(min(_LINES, size - y)):
                row, weights = top + r.y[0][y + k], r.y[1][y + k]
                blend_rows(r.blended[k], flat, row, top + r.rows - 1, 3 * left, 3 * r.columns, weights)
            _blend_columns(r.lines, r.blended, *r.x)
        line = r.lines[y % _LINES]
        if geometry:
            r.picture[y] = line[: 3 * size]
        else:
            _mix(out[y].reshape(3 * size), line, p[COLOUR:YUV])
    if geometry:
        finish(out, r.picture, p)
    erase(out, p)


@njit(**FAST)
def touches_geometry(p):
    """Return whether a frame is warped or blurred."""
    return _warps(p) or p[BLUR] > 0


@njit(**FAST)
def _warps(p):
    warps = False
    for i in range(6):
        warps |= p[WARP + i] != (1 if i == 0 or i == 4 else 0)
    return warps


@njit(**FAST)
def finish(out, picture, p):
    """Warp, blur and colour a frame, (S, 3 S) float32, 0 to 255, into `out` of `fused`."""
    size = len(picture)
    if _warps(p):
        picture = _warp(picture, p[WARP:BLUR])
    if p[BLUR] > 0:
        _blur(picture, p[BLUR] * np.float32(size))
    for y in range(size):
        _mix(out[y].reshape(3 * size), picture[y], p[COLOUR:YUV])


@njit(**FAST)
def erase(out, p):
    """Fill what is to be erased of a frame."""
    size = out.shape[0]
    y0, y1 = _edges(p[ERASE], p[ERASE + 2], size)
    x0, x1 = _edges(p[ERASE + 1], p[ERASE + 3], size)
    for y in range(y0, y1):
        for x in range(x0, x1):
            for c in range(3):
                put(out[y, x], c, p[FILL + c])


@njit(**FAST)
def _edges(start, length, size):
    """Return the pixels [a, b) of shares of a side, in float32, rounded half to even, as EpochPlan says of `erase`."""
    n = np.float32(size)
    return int(np.rint(start * n)), int(np.rint((start + length) * n))


@njit(**FAST)
def cut(start, length, size):
    """Return first pixel and number of pixels of a crop, at least one. As in DALI: float64, halves are rounded up."""
    first = min(math.floor(np.float64(start) * size + 0.5), size - 1)
    last = min(math.floor((np.float64(start) + np.float64(length)) * size + 0.5), size)
    return first, max(last - first, 1)


@njit(**FAST)
def triangles(source, size, mirror):
    """Return the antialiased linear resize of a line: for each output the first source pixel and weights from there.

    The filter is a triangle as wide as an output pixel but never narrower than an input one; beyond the edge the edge
    pixel is repeated, as in DALI. The number of weights is a multiple of 2, filled up with zeros.
    """
    scale = source / size
    support = max(scale, 1.0)
    reach = 2 * math.ceil(support)
    taps = min(reach, source)
    taps += taps % 2
    first = np.empty(size, np.int64)
    weights = np.zeros((size, taps), np.float32)
    for i in range(size):
        centre = (i + 0.5) * scale - 0.5
        low = math.floor(centre - support) + 1  # the first pixel with a weight
        begin = max(min(low, source - taps), 0)
        o = size - 1 - i if mirror else i
        first[o] = begin
        total = 0.0
        for j in range(low, low + reach):
            weight = max(1 - abs(j - centre) / support, 0.0)
            weights[o, min(max(j, 0), source - 1) - begin] += np.float32(weight)
            total += weight
        scale_down = np.float32(1 / total)
        for k in range(taps):
            weights[o, k] *= scale_down
    return first, weights


@njit(**FAST)
def blend_rows(out, source, row, last, start, length, weights):
    """Set out[:length] to weights @ source[row : row + len(weights), start : start + length]; rows end at `last`."""
    # By addresses: a slice of an array takes longer than to blend some twenty values.
    taps, pitch, base = len(weights), source.shape[1], source.ctypes.data + start
    while taps > 2 and weights[taps - 1] == 0 and weights[taps - 2] == 0:  # they would add nothing
        taps -= 2
    for k in range(0, taps, 4):
        a = carray(pointer(base + min(row + k, last) * pitch), (length,), np.uint8)
        b = carray(pointer(base + min(row + k + 1, last) * pitch), (length,), np.uint8)
        v, w = weights[k], weights[k + 1]
        if k + 2 < taps:
            c = carray(pointer(base + min(row + k + 2, last) * pitch), (length,), np.uint8)
            d = carray(pointer(base + min(row + k + 3, last) * pitch), (length,), np.uint8)
            x, y = weights[k + 2], weights[k + 3]
            if k == 0:
                for i in range(length):
                    out[i] = v * np.float32(a[i]) + w * np.float32(b[i]) + x * np.float32(c[i]) + y * np.float32(d[i])
            else:
                for i in range(length):
                    out[i] += v * np.float32(a[i]) + w * np.float32(b[i]) + x * np.float32(c[i]) + y * np.float32(d[i])
        elif k == 0:
            for i in range(length):
                out[i] = v * np.float32(a[i]) + w * np.float32(b[i])
        else:
            for i in range(length):
                out[i] += v * np.float32(a[i]) + w * np.float32(b[i])


@intrinsic
def _blend_pixels(typingctx, out, o, source, j, weights, i, taps):
    """Set out[:, o : o + 4] to the sum over k < taps of weights[i + k] * source[:, j + 3 k : j + 3 k + 4].

    All float32: `out` and `source` of _LINES rows, which share the loads of the weights, and `weights` flat. LLVM does
    not find this by itself. Every target has some form of four-lane vectors.
    """

    def codegen(context, builder, signature, args):
        def pointers(number: int, lines: int) -> list[ir.Value]:
            array = context.make_array(signature.args[number])(context, builder, args[number])
            width = builder.extract_value(array.shape, 1) if lines > 1 else args[number + 1]
            starts = [builder.add(builder.mul(width, width.type(line)), args[number + 1]) for line in range(lines)]
            return [builder.gep(array.data, [start]) for start in starts]

        targets, pixels, (weights,) = pointers(0, _LINES), pointers(2, _LINES), pointers(4, 1)
        totals = [cgutils.alloca_once_value(builder, ir.Constant(_F4, [0.0] * 4)) for _ in range(_LINES)]
        with cgutils.for_range(builder, args[6]) as loop:
            step = builder.mul(loop.index, loop.index.type(3))
            weight = builder.load(builder.gep(weights, [loop.index]))
            undefined = ir.Constant(_F4, ir.Undefined)
            weight = builder.insert_element(undefined, weight, ir.IntType(32)(0))
            weight = builder.shuffle_vector(weight, undefined, ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4))
            for total, start in zip(totals, pixels, strict=True):
                pixel = builder.load(builder.bitcast(builder.gep(start, [step]), _F4.as_pointer()))
                pixel.align = 4
                product = builder.fmul(pixel, weight, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        for total, target in zip(totals, targets, strict=True):
            store = builder.store(builder.load(total), builder.bitcast(target, _F4.as_pointer()))
            store.align = 4
        return context.get_dummy_value()

    return types.void(out, o, source, j, weights, i, taps), codegen


@njit(**FAST)
def _blend_columns(out, source, first, weights):
    """Set out[:, 3 x : 3 x + 3] to weights[x] @ pixels of `source` from first[x] on; after the last comes garbage."""
    taps, flat = weights.shape[1], weights.reshape(weights.size)
    if taps == 2:  # a constant number is compiled into straight code
        for x in range(len(first)):
            _blend_pixels(out, 3 * x, source, 3 * first[x], flat, 2 * x, 2)
    elif taps == 4:
        for x in range(len(first)):
            if flat[4 * x + 2] == 0 and flat[4 * x + 3] == 0:  # they would add nothing
                _blend_pixels(out, 3 * x, source, 3 * first[x], flat, 4 * x, 2)
            else:
                _blend_pixels(out, 3 * x, source, 3 * first[x], flat, 4 * x, 4)
    elif taps == 6:
        for x in range(len(first)):
            _blend_pixels(out, 3 * x, source, 3 * first[x], flat, 6 * x, 6)
    else:
        for x in range(len(first)):
            _blend_pixels(out, 3 * x, source, 3 * first[x], flat, taps * x, taps)


@njit(**FAST)
def _mix(out, source, m):
    """Set out to m @ (pixel, 1) for interleaved pixels, in the type of `out`, another array; m is (3, 4), flat."""
    for x in range(len(out) // 3):
        r, g, b = source[3 * x], source[3 * x + 1], source[3 * x + 2]
        put(out, 3 * x, m[0] * r + m[1] * g + m[2] * b + m[3])
        put(out, 3 * x + 1, m[4] * r + m[5] * g + m[6] * b + m[7])
        put(out, 3 * x + 2, m[8] * r + m[9] * g + m[10] * b + m[11])


def put(out, i, value) -> None:
    """Set out[i] to value in the type of `out`. Compiled code only: `_put_as` implements it."""


@overload(put, jit_options=FAST, inline="always")
def _put_as(out, i, value):
    if out.dtype == types.float32:

        def put(out, i, value):
            out[i] = value
    elif out.dtype == types.uint16:  # bfloat16, rounded half to even

        def put(out, i, value):
            bits = np.float32(value).view(np.uint32)
            out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    else:

        def put(out, i, value):
            out[i] = np.uint8(min(max(np.rint(value), np.float32(0)), np.float32(255)))

    return put


@njit(**FAST)
def _warp(picture, m):
    """Return the (S, 3 S) picture, bilinearly sampled where the affine map m, (2, 3) flat, sends it; edges repeat."""
    size = len(picture)
    n, half, last = np.float32(size), np.float32(0.5), np.float32(size - 1)
    out = np.empty_like(picture)
    for y in range(size):
        py = (np.float32(y) + half) / n - half
        for x in range(size):
            px = (np.float32(x) + half) / n - half
            sx = min(max((m[0] * px + m[1] * py + m[2] + half) * n - half, np.float32(0)), last)
            sy = min(max((m[3] * px + m[4] * py + m[5] + half) * n - half, np.float32(0)), last)
            x0, y0 = int(sx), int(sy)
            x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
            fx, fy = sx - np.float32(x0), sy - np.float32(y0)
            for c in range(3):
                above = picture[y0, 3 * x0 + c] + fx * (picture[y0, 3 * x1 + c] - picture[y0, 3 * x0 + c])
                below = picture[y1, 3 * x0 + c] + fx * (picture[y1, 3 * x1 + c] - picture[y1, 3 * x0 + c])
                out[y, 3 * x + c] = above + fy * (below - above)
    return out


@njit(**FAST)
def _blur(picture, sigma):
    """Blur a (S, 3 S) picture by a Gaussian in place, cut off at 3 sigma; the border mirrors about the edge pixel."""
    size = len(picture)
    radius = min(math.ceil(3 * sigma), size - 1)
    weights = np.empty(2 * radius + 1, np.float32)
    for k in range(len(weights)):
        weights[k] = math.exp(-0.5 * ((k - radius) / sigma) ** 2)
    weights /= weights.sum()
    columns = np.empty_like(picture)
    padded = np.empty(3 * (size + 2 * radius), np.float32)
    for y in range(size):
        for x in range(-radius, size + radius):
            mirrored = size - 1 - abs(size - 1 - abs(x))
            for c in range(3):
                padded[3 * (x + radius) + c] = picture[y, 3 * mirrored + c]
        columns[y] = 0
        for k in range(len(weights)):
            w, moved = weights[k], padded[3 * k : 3 * (k + size)]
            for i in range(3 * size):
                columns[y, i] += w * moved[i]
    for y in range(size):
        picture[y] = 0
        for k in range(len(weights)):
            w, row = weights[k], columns[size - 1 - abs(size - 1 - abs(y + k - radius))]
            for i in range(3 * size):
                picture[y, i] += w * row[i]
