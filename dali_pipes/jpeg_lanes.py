"""What decoding a JPEG file does to many numbers at once, as vectors that LLVM does not find by itself.

To the bits of libjpeg-turbo's accurate integer transform (Loeffler, Ligtenberg, Moschytz 1989), its interpolating
chroma upsampling and its colours, which are those of all decoders that the field uses. Addresses are int64.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence
from typing import Any  # llvmlite has no types

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WIDTH = 32  # pixels that `paint` makes at a time

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LINE = ir.VectorType(_I32, 8)
_SCALE = 2**13  # of the transform's constants
# Steps of the transposition of 8 lines: which lines are joined, and which of their numbers make the first and second.
_TRANSPOSITION = (
    (1, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    (2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    (4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
)


@intrinsic
def load_bits(typingctx, address):
    """Return the 64 bits at an address, the first byte's first."""

    def codegen(context, builder, signature, args):
        return builder.bswap(_load(builder, args[0], _I64))

    return types.uint64(types.int64), codegen


@intrinsic
def load(typingctx, address, index):
    """Return number `index` of those of 32 bits at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], _I32.as_pointer()), [args[1]]))

    return types.int32(types.int64, index), codegen


@intrinsic
def store(typingctx, address, index, value):
    """Set number `index` of those of 32 bits at an address."""

    def codegen(context, builder, signature, args):
        place = builder.gep(builder.inttoptr(args[0], _I32.as_pointer()), [args[1]])
        builder.store(builder.trunc(args[2], _I32), place)
        return context.get_dummy_value()

    return types.void(types.int64, index, types.int64), codegen


@intrinsic
def clear(typingctx, block):
    """Set the 64 numbers of 32 bits at an address to 0."""

    def codegen(context, builder, signature, args):
        for row in range(8):
            _store(builder, _all(_LINE, 0), args[0], 32 * row)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def transform(typingctx, block, out, stride):
    """Write the 8 x 8 uint8 samples of a block's coefficients, int32 by rows, which become 0.

    `stride`: bytes from a row of samples to the next.
    """

    def codegen(context, builder, signature, args):
        rows = [_load(builder, args[0], _LINE, 32 * row) for row in range(8)]
        for row in range(8):
            _store(builder, _all(_LINE, 0), args[0], 32 * row)
        # Two bits of fractions are kept between the directions; samples lie around 128, and are scaled by 8.
        columns = _transposed(builder, _transformed(builder, rows, 13 - 2))
        rows = _transposed(builder, _transformed(builder, columns, 13 + 2 + 3))
        for row, values in enumerate(rows):
            samples = _clamped(builder, builder.add(values, _all(_LINE, 128)))
            _store(builder, samples, builder.add(args[1], builder.mul(args[2], _I64(row))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _painter(across: int, down: int) -> Any:
    """Return a function that writes WIDTH RGB pixels where a sample of chroma stands for so many pixels of luma."""

    @intrinsic
    def paint(typingctx, out, luma, near, far, plane):
        """Write WIDTH pixels, (WIDTH, 3) uint8.

        Args:
            out: where to.
            luma: where their luma begins.
            near: where the blue chroma of the first begins, in the nearer of the two rows; `across` divides the pixel.
            far: the same in the other row.
            plane: bytes from blue chroma to red.
        """

        def codegen(context, builder, signature, args):
            out, luma, near, far, plane = args
            pixels = ir.VectorType(_I16, WIDTH)
            blue = _chroma(builder, near, far, across, down)
            red = _chroma(builder, builder.add(near, plane), builder.add(far, plane), across, down)
            y = builder.zext(_load(builder, luma, ir.VectorType(_I8, WIDTH)), pixels)
            centre = _all(pixels, 128)
            _write_rgb(builder, out, y, builder.sub(blue, centre), builder.sub(red, centre))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return paint


paint_420, paint_422, paint_444 = _painter(2, 2), _painter(2, 1), _painter(1, 1)


def _all(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _load(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    value = builder.load(builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer()))
    value.align = 1
    return value


def _store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    place = builder.inttoptr(builder.add(address, _I64(offset)), value.type.as_pointer())
    builder.store(value, place).align = 1


def _shuffled(builder: Any, first: Any, second: Any, order: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_I32, len(order)), list(order))
    return builder.shuffle_vector(first, second, mask)


def _clamped(builder: Any, values: Any) -> Any:
    """Return signed numbers as uint8, what is out of 0..255 as the end that is nearer."""
    for comparison, end in (("<", 0), (">", 255)):
        limit = _all(values.type, end)
        values = builder.select(builder.icmp_signed(comparison, values, limit), limit, values)
    return builder.trunc(values, ir.VectorType(_I8, values.type.count))


def _transposed(builder: Any, lines: list[Any]) -> list[Any]:
    for step, first, second in _TRANSPOSITION:
        joined = list(lines)
        for i in range(8):
            if not i & step:
                pair = lines[i], lines[i + step]
                joined[i], joined[i + step] = _shuffled(builder, *pair, first), _shuffled(builder, *pair, second)
        lines = joined
    # The steps leave line i where the two lower bits of i are exchanged.
    return [lines[(i & 4) | (i & 1) << 1 | (i & 2) >> 1] for i in range(8)]


def _transformed(builder: Any, x: list[Any], shift: int) -> list[Any]:
    """Return the inverse transform over 8 lines, divided by 2 ** shift and rounded, as in libjpeg's jidctint.c."""

    def times(value: Any, factor: float) -> Any:
        return builder.mul(value, _all(_LINE, round(factor * _SCALE)))

    def plus(*values: Any) -> Any:
        total = values[0]
        for value in values[1:]:
            total = builder.add(total, value)
        return total

    def whole(value: Any) -> Any:
        scaled = builder.shl(value, _all(_LINE, 13))
        return builder.add(scaled, _all(_LINE, 1 << shift - 1))

    z = times(plus(x[2], x[6]), 0.541196100)
    low, high = plus(z, times(x[6], -1.847759065)), plus(z, times(x[2], 0.765366865))
    total, difference = whole(builder.add(x[0], x[4])), whole(builder.sub(x[0], x[4]))
    even = [plus(total, high), plus(difference, low), builder.sub(difference, low), builder.sub(total, high)]
    z3, z4 = plus(x[7], x[3]), plus(x[5], x[1])
    z5 = times(plus(z3, z4), 1.175875602)
    z1, z2 = times(plus(x[7], x[1]), -0.899976223), times(plus(x[5], x[3]), -2.562915447)
    z3, z4 = plus(times(z3, -1.961570560), z5), plus(times(z4, -0.390180644), z5)
    odd = [
        plus(times(x[1], 1.501321110), z1, z4),
        plus(times(x[3], 3.072711026), z2, z3),
        plus(times(x[5], 2.053119869), z2, z4),
        plus(times(x[7], 0.298631336), z1, z3),
    ]
    lines = [builder.add(e, o) for e, o in zip(even, odd, strict=True)]
    lines += [builder.sub(e, o) for e, o in zip(even[::-1], odd[::-1], strict=True)]
    return [builder.ashr(line, _all(_LINE, shift)) for line in lines]


def _chroma(builder: Any, near: Any, far: Any, across: int, down: int) -> Any:
    """Return WIDTH numbers of 16 bits: samples blended with the nearest in either direction, 3 to 1."""
    samples = ir.VectorType(_I16, WIDTH // across)
    stored = ir.VectorType(_I8, samples.count)

    def column(offset: int) -> Any:
        value = builder.zext(_load(builder, near, stored, offset), samples)
        if down == 1:
            return value
        other = builder.zext(_load(builder, far, stored, offset), samples)
        return builder.add(builder.mul(value, _all(samples, 3)), other)

    here = column(0)
    if across == 1:
        return here
    here = builder.mul(here, _all(samples, 3))
    # Halves are rounded down and up in turns.
    bits, before, after = (4, 8, 7) if down == 2 else (2, 1, 2)
    sums = [
        builder.add(builder.add(here, column(offset)), _all(samples, rounding))
        for offset, rounding in ((-1, before), (1, after))
    ]
    even, odd = (builder.lshr(value, _all(samples, bits)) for value in sums)
    half = samples.count
    return _shuffled(builder, even, odd, [i // 2 + half * (i % 2) for i in range(WIDTH)])


def _write_rgb(builder: Any, out: Any, y: Any, blue: Any, red: Any) -> None:
    """Write WIDTH pixels of JFIF's colours in libjpeg-turbo's 16 bits: factors less a whole number, in 1 / 2 ** 16."""
    kind, wide = y.type, ir.VectorType(_I32, WIDTH)

    def scaled(value: Any, factor: float) -> Any:
        """Return value times a factor below 1/2, rounded: twice the value times the factor, then halved."""
        twice = builder.sext(builder.add(value, value), wide)
        product = builder.ashr(builder.mul(twice, _all(wide, round(factor * 2**16))), _all(wide, 16))
        one = _all(kind, 1)
        return builder.ashr(builder.add(builder.trunc(product, kind), one), one)

    r = builder.add(builder.add(y, red), scaled(red, 0.402))
    b = builder.add(builder.add(y, builder.add(blue, blue)), scaled(blue, -0.228))
    of_blue = builder.mul(builder.sext(blue, wide), _all(wide, round(-0.34414 * 2**16)))
    of_red = builder.mul(builder.sext(red, wide), _all(wide, round(0.28586 * 2**16)))
    both = builder.add(builder.add(of_blue, of_red), _all(wide, 2**15))
    g = builder.add(builder.sub(y, red), builder.trunc(builder.ashr(both, _all(wide, 16)), kind))
    r, g, b = (_clamped(builder, value) for value in (r, g, b))
    pair = _shuffled(builder, r, g, range(2 * WIDTH))
    rest = _shuffled(builder, b, b, range(2 * WIDTH))
    for part in range(3):
        order = [WIDTH * (i % 3) + i // 3 for i in range(part * WIDTH, (part + 1) * WIDTH)]
        _store(builder, _shuffled(builder, pair, rest, order), out, part * WIDTH)
