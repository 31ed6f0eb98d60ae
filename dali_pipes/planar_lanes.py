"""Vectors for planar.py: blocks of as many lines as a vector has values, whose values lie side by side.

The pixels do not depend on how many that are, to the bit.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any  # llvmlite has no types

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# By what is compiled for, as numba's cache of machine code tells targets apart, not machines.
_TARGET: Any = cpu_target.target_context
_FEATURES = str(_TARGET.codegen().magic_tuple()[2]).split(",")
LANES = 16 if "+avx512f" in _FEATURES else 8
_VECTOR, _INTEGER = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)


@intrinsic
def blend_tile(typingctx, to, rows, weights, i, taps):
    """Set to[LANES * j + k] to column j of the rows of line k, blended, for i <= j < i + LANES.

    `to`, `rows` and `weights`, both (taps, LANES), are addresses, and `rows` has addresses.
    """

    def codegen(context, builder, signature, args):
        to, rows, weights, first, taps = args
        pixels = ir.VectorType(ir.IntType(8), LANES)
        rows = builder.inttoptr(rows, _INTEGER.as_pointer())
        weights = builder.inttoptr(weights, ir.FloatType().as_pointer())
        totals = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES)) for _ in range(LANES)]
        with cgutils.for_range(builder, taps) as loop:
            place = builder.mul(loop.index, _INTEGER(LANES))
            for lane, total in enumerate(totals):
                here = builder.add(place, _INTEGER(lane))
                address = builder.add(builder.load(builder.gep(rows, [here])), first)
                values = builder.load(builder.inttoptr(address, pixels.as_pointer()))
                values.align = 1
                weight = _repeated(builder, builder.load(builder.gep(weights, [here])))
                product = builder.fmul(builder.uitofp(values, _VECTOR), weight, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        columns = _transposed(builder, [builder.load(total) for total in totals])
        to = builder.add(to, builder.mul(first, _INTEGER(4 * LANES)))
        for place, column in enumerate(columns):
            _store(builder, column, builder.add(to, _INTEGER(4 * LANES * place)))
        return context.get_dummy_value()

    return types.void(to, rows, weights, i, taps), codegen


@intrinsic
def blend_lanes(typingctx, to, source, weights, taps):
    """Set to[k] to the sum over j < taps of weights[j] * source[LANES * j + k], for k < LANES; all are addresses."""

    def codegen(context, builder, signature, args):
        to, source, weights, taps = args
        weights = builder.inttoptr(weights, ir.FloatType().as_pointer())
        total = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES))
        with cgutils.for_range(builder, taps) as loop:
            values = _load(builder, builder.add(source, builder.mul(loop.index, _INTEGER(4 * LANES))))
            weight = _repeated(builder, builder.load(builder.gep(weights, [loop.index])))
            product = builder.fmul(values, weight, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        _store(builder, builder.load(total), to)
        return context.get_dummy_value()

    return types.void(to, source, weights, taps), codegen


@intrinsic
def deal_tile(typingctx, lines, planes, x, size):
    """Write the pixels from the x-th on, LANES of each line, as planar.py's `_deal` does."""

    def codegen(context, builder, signature, args):
        lines, planes, x, size = args
        begin = builder.add(planes, builder.mul(x, _INTEGER(4 * LANES)))
        length, channels = builder.mul(size, _INTEGER(4 * LANES)), []
        for channel in range(3):
            start = builder.add(begin, builder.mul(length, _INTEGER(channel)))
            columns = [_load(builder, builder.add(start, _INTEGER(4 * LANES * place))) for place in range(LANES)]
            channels.append(_transposed(builder, columns))
        to, pitch = builder.add(lines, builder.mul(x, _INTEGER(12))), builder.mul(size, _INTEGER(12))
        for red, green, blue in zip(*channels, strict=True):
            for part in range(3):
                values = range(part * LANES, (part + 1) * LANES)
                both = _shuffled(builder, red, green, [v // 3 + LANES * (v % 3 == 1) for v in values])
                three = [v // 3 + LANES if v % 3 == 2 else place for place, v in enumerate(values)]
                _store(builder, _shuffled(builder, both, blue, three), builder.add(to, _INTEGER(4 * LANES * part)))
            to = builder.add(to, pitch)
        return context.get_dummy_value()

    return types.void(lines, planes, x, size), codegen


def _transposed(builder: Any, lines: list[Any]) -> list[Any]:
    """Return vectors of which the k-th has the k-th values of these.

    Bit by bit: value k of vector j changes places with value j of vector k where the bit of j and that of k differ.
    """
    bit = 1
    while bit < LANES:
        found, number = list(lines), range(LANES)
        for a, b in ((a, a | bit) for a in number if not a & bit):
            found[a] = _shuffled(builder, lines[a], lines[b], [LANES + (k ^ bit) if k & bit else k for k in number])
            found[b] = _shuffled(builder, lines[a], lines[b], [LANES + k if k & bit else k ^ bit for k in number])
        lines, bit = found, 2 * bit
    return lines


def _shuffled(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    """Return the values in these places of two vectors, of which the second one's are counted on from the first's."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), places))


def _repeated(builder: Any, value: Any) -> Any:
    """Return a vector of one value."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    return _shuffled(builder, builder.insert_element(undefined, value, ir.IntType(32)(0)), undefined, [0] * LANES)


def _load(builder: Any, address: Any) -> Any:
    """Return the vector at an address."""
    values = builder.load(builder.inttoptr(address, _VECTOR.as_pointer()))
    values.align = 4
    return values


def _store(builder: Any, values: Any, address: Any) -> None:
    """Write a vector to an address."""
    store = builder.store(values, builder.inttoptr(address, _VECTOR.as_pointer()))
    store.align = 4
