"""float32 panels to 8-bit integers: one vector of positions after the other, in Numba."""

from __future__ import annotations

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.integers import LEVELS, SMALLEST, ZERO_POINT
from gossamer.kernels.cpu.lanes import _F32, _I8, _I32, _declare, _int, _load, _Loop, _n, _store, address_of, get, take
from gossamer.kernels.cpu.launch import ADDRESSES, NEXT
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

X, CODES, SCALES, PANELS, VECTORS, FEATURES, WIDTH = range(ADDRESSES, ADDRESSES + 56, 8)
LANES = lanes()
_INFINITY, _MAGIC = 0x7F800000, 12582912.0


@intrinsic(prefer_literal=True)
def quantise_vector(typing, lanes, x, codes, scale, features, row):
    """The scale and the codes of one vector of positions; `row` is in numbers."""
    L = lanes.literal_value
    kind, ints = ir.VectorType(_F32, L), ir.VectorType(_I32, L)

    def gen(ctx, b, sig, args):
        _, x, codes, scale, features, row = args

        def const(value: float):
            return ir.Constant(kind, [ir.Constant(_F32, value)] * L)

        # As integers without a sign, numbers are in order of size, with infinity and NaN above all.
        loop = _Loop(b, _n(0), features, 1, [ir.Constant(ints, None)])
        bits = _load(b, b.add(x, b.mul(loop.i, b.mul(row, _n(4)))), ints, 4)
        size = b.and_(bits, ir.Constant(ints, [0x7FFFFFFF] * L))
        (most,) = loop.close([b.select(b.icmp_signed(">", size, loop.values[0]), size, loop.values[0])])
        finite = b.icmp_signed("<", most, ir.Constant(ints, [_INFINITY] * L))
        most = b.bitcast(most, kind)
        enough = b.and_(finite, b.fcmp_ordered(">=", most, const(SMALLEST)))
        most = b.select(enough, most, const(0.0))
        _store(b, b.select(finite, b.fdiv(most, const(LEVELS)), const(float("nan"))), scale, 4)
        inverse = b.select(enough, b.fdiv(const(LEVELS), most), const(0.0))
        # Adding 1.5 x 2^23 leaves the nearest integer in the low bits. Where a number is not finite any code will do,
        # for its scale is NaN.
        loop = _Loop(b, _n(0), features, 1, [])
        value = _load(b, b.add(x, b.mul(loop.i, b.mul(row, _n(4)))), kind, 4)
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        shifted = b.call(fma, [value, inverse, const(_MAGIC)])
        low = b.trunc(b.bitcast(shifted, ints), ir.VectorType(_I8, L))
        _store(b, b.xor(low, ir.Constant(low.type, [-ZERO_POINT] * L)), b.add(codes, b.mul(loop.i, row)), 1)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 5), gen


@functools.cache
def kernel() -> Entry:
    """The compiled kernel; a task is one vector of positions of one panel."""
    L = LANES

    def quantise_kernel(pointer):
        args = address_of(pointer)
        vectors, features, width = get(args + VECTORS), get(args + FEATURES), get(args + WIDTH)
        while True:
            task = take(args + NEXT)
            if task >= get(args + PANELS) * vectors:
                break
            panel, first = task // vectors, L * (task % vectors)
            at = panel * features * width + first
            quantise_vector(
                L, get(args + X) + 4 * at, get(args + CODES) + at, get(args + SCALES) + 4 * (panel * width + first),
                features, width,
            )  # fmt: skip

    return Entry(compile_kernel(quantise_kernel, "8-bit quantisation of panels"))
