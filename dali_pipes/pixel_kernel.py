"""The GPU's kernel: frames as they lie in memory -> crop, resize, mirror, colour and normalise, erase, in one pass.

A program makes a block of pixels of one frame; each of them gathers what it is blended from, which neighbours have left
in the cache: a byte comes from memory once, and the clip is written once, in its final type. What `kernels.fused` does
on a CPU, with the same rules, but for warp and blur, which torch_stages.py does.

The weights of the antialiased resize are whole numbers. With source length N and output length S, M = max(N, S), the
triangle of output i at pixel j is 1 - |j - centre| S / M where centre = ((2 i + 1) N / S - 1) / 2; times 2 M that is
2 M - |2 S j - (2 i + 1) N + S|: exact in int32 as long as 2 S N is below 2^31. Only the colours are summed in float32.

With TRITON_INTERPRET=1 it runs on a CPU. Loops are `while`, as Triton 3.6's interpreter has no `range` to a runtime
bound under NumPy 2.4. `no_type_check`: see dfer/crf/triton.py.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dali_pipes.kernels import COLOUR, ERASE, MIRROR, NUM_PARAMETERS

BLOCK = 256  # pixels of a program


@triton.jit
@no_type_check
def _first_tap(i, length, SIZE: tl.constexpr):
    """Of output pixels i: the first source pixel with a weight, and 2 S (its distance from the centre)."""
    longest = tl.maximum(length, SIZE)
    centre = (2 * i + 1) * length - SIZE  # times 2 S; floor division needs a number above 0
    up = longest // SIZE + 2
    first = (centre - 2 * longest + up * (2 * SIZE)) // (2 * SIZE) - up + 1
    return first, first * (2 * SIZE) - centre


@triton.jit
@no_type_check
def _edge(share, SIZE: tl.constexpr):
    """The product in float32, rounded half to even: by a number so large that its own fraction has no bits.

    In float64, as a product and a sum of one type become one instruction, in which the product is not rounded.
    """
    product = (share.to(tl.float64) * SIZE).to(tl.float32).to(tl.float64)
    return ((product + 6755399441055744.0) - 6755399441055744.0).to(tl.float32)


@triton.jit
@no_type_check
def _resized(source, pitch, height, width, y, x, SIZE: tl.constexpr):
    """Red, green and blue of the pixels (y, x) of a picture that is resized to SIZE x SIZE, in 0..255."""
    first_y, begin_y = _first_tap(y, height, SIZE)
    first_x, begin_x = _first_tap(x, width, SIZE)
    longer_y = tl.maximum(height, SIZE)
    longer_x = tl.maximum(width, SIZE)
    taps_y = 2 * ((longer_y + SIZE - 1) // SIZE)
    taps_x = 2 * ((longer_x + SIZE - 1) // SIZE)
    red = (y * 0).to(tl.float32)
    green = red
    blue = red
    total_y = y * 0
    total_x = y * 0
    ky = taps_y * 0
    while ky < taps_y:
        weight_y = tl.maximum(2 * longer_y - tl.abs(begin_y + ky * (2 * SIZE)), 0)
        total_y += weight_y
        # Beyond the edge of the crop its edge pixel is repeated.
        line = source + tl.minimum(tl.maximum(first_y + ky, 0), height - 1) * pitch
        r = (y * 0).to(tl.float32)
        g = r
        b = r
        total_x = y * 0
        kx = taps_x * 0
        while kx < taps_x:
            weight_x = tl.maximum(2 * longer_x - tl.abs(begin_x + kx * (2 * SIZE)), 0)
            total_x += weight_x
            at = line + 3 * tl.minimum(tl.maximum(first_x + kx, 0), width - 1)
            w = weight_x.to(tl.float32)
            r += w * tl.load(at).to(tl.float32)
            g += w * tl.load(at + 1).to(tl.float32)
            b += w * tl.load(at + 2).to(tl.float32)
            kx += 1
        w = weight_y.to(tl.float32)
        red += w * r
        green += w * g
        blue += w * b
        ky += 1
    total = total_y.to(tl.float32) * total_x.to(tl.float32)
    return red / total, green / total, blue / total


@triton.jit
@no_type_check
def _clips_kernel(
    out, rows, cuts, parameters,
    T: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, MIRROR: tl.constexpr, ERASE: tl.constexpr,
    COLOUR: tl.constexpr, FINISHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Frame f of the output is frame f % T of clip rows[f // T]. FINISHED: with colours and erased, else in 0..255."""
    frame = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + frame // T)
    cut = cuts + (row * T + frame % T) * 4
    source = tl.load(cut).to(tl.pointer_type(tl.uint8))
    p = parameters + row * P
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    y = tl.minimum(pixel // SIZE, SIZE - 1)  # what lies outside reads the last line again
    x = pixel % SIZE
    column = tl.where(tl.load(p + MIRROR) != 0, SIZE - 1 - x, x)
    height, width = tl.load(cut + 2).to(tl.int32), tl.load(cut + 3).to(tl.int32)
    red, green, blue = _resized(source, tl.load(cut + 1), height, width, y, column, SIZE)
    to = out + (frame * (SIZE * SIZE) + pixel) * 3
    if FINISHED:
        top = _edge(tl.load(p + ERASE), SIZE)
        left = _edge(tl.load(p + ERASE + 1), SIZE)
        bottom = _edge(tl.load(p + ERASE) + tl.load(p + ERASE + 2), SIZE)
        right = _edge(tl.load(p + ERASE + 1) + tl.load(p + ERASE + 3), SIZE)
        kept = (y < top) | (y >= bottom) | (x < left) | (x >= right)
        m = p + COLOUR
        for c in tl.static_range(3):
            value = tl.load(m + 4 * c) * red + tl.load(m + 4 * c + 1) * green + tl.load(m + 4 * c + 2) * blue
            value = tl.where(kept, value + tl.load(m + 4 * c + 3), 0.0)
            tl.store(to + c, value.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(to, red, mask=inside)
        tl.store(to + 1, green, mask=inside)
        tl.store(to + 2, blue, mask=inside)


def clips(
    rows: Int64[Tensor, " B"],
    cuts: Int64[Tensor, "N T 4"],
    parameters: Float32[Tensor, "N P"],
    size: int,
    dtype: torch.dtype | None,
) -> Float[Tensor, "B T S S 3"]:
    """Return clips, made by one launch on the current stream; the memory that `cuts` points into has to be kept.

    Args:
        rows: of `cuts` and `parameters`.
        cuts: as `pixels.cut_out` makes them.
        parameters: as `kernels.parameters` makes them; boxes, warps and blurs are not looked at.
        size: S.
        dtype: float32, bfloat16 or float16; None: float32 without colours and erasing, in 0..255.
    """
    num_frames = cuts.shape[1]
    assert parameters.shape[1] == NUM_PARAMETERS and cuts.is_contiguous() and parameters.is_contiguous()
    shape = (len(rows), num_frames, size, size, 3)
    out = torch.empty(shape, dtype=dtype or torch.float32, device=rows.device)
    with torch.cuda.device_of(out):
        _clips_kernel[(len(rows) * num_frames, triton.cdiv(size * size, BLOCK))](
            out, rows, cuts, parameters, T=num_frames, SIZE=size, P=NUM_PARAMETERS, MIRROR=MIRROR, ERASE=ERASE,
            COLOUR=COLOUR, FINISHED=dtype is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return out
