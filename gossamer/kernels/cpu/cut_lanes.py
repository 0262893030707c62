"""Values on a support and others off it, as Numba intrinsics on float32.

Shapes: V vectors of L lanes; a support is one byte per value.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.lanes import _F32, _I8, _I32, _declare, _load, _n, _splat, _store

_int = types.int64
# y = x or +0; y = x or a part of it; x or +0 in the same place; y + a part of x.
CUT, FADE, CLEAR, ADD = range(4)


def _inside(b, kept, lanes: int):
    bytes_ = ir.VectorType(_I8, lanes)
    return b.icmp_unsigned("!=", _load(b, kept, bytes_, 1), ir.Constant(bytes_, None))


@intrinsic(prefer_literal=True)
def write_vectors(typing, lanes, vectors, form, x, kept, factor, y):
    """y = x where kept, else +0 (CUT) or factor·x (FADE); ADD: y += factor·x where kept, as one rounded operation."""
    L, V, how = lanes.literal_value, vectors.literal_value, form.literal_value

    def gen(ctx, b, sig, args):
        x, kept, factor, y = args[3:]
        kind = ir.VectorType(_F32, L)
        zero = ir.Constant(kind, None)
        scale = None if how == CUT else _splat(b, _load(b, factor, _F32, 4), L)
        fma = _declare(b, f"llvm.fma.v{L}f32", kind, kind, kind, kind) if how == ADD else None
        for v in range(V):
            at = b.add(y, _n(4 * L * v))
            inside, value = _inside(b, b.add(kept, _n(L * v)), L), _load(b, b.add(x, _n(4 * L * v)), kind, 4)
            if how == ADD:
                before = _load(b, at, kind, 4)
                result = b.select(inside, b.call(fma, [scale, value, before]), before)
            else:
                result = b.select(inside, value, b.fmul(value, scale) if how == FADE else zero)
            _store(b, result, at, 4)
        return ctx.get_dummy_value()

    return types.void(lanes, vectors, form, *[_int] * 4), gen


@intrinsic(prefer_literal=True)
def clear_vectors(typing, lanes, vectors, x, kept):
    """x = +0 where not kept; memory that is right already is only read."""
    L, V = lanes.literal_value, vectors.literal_value

    def gen(ctx, b, sig, args):
        x, kept = args[2:]
        bits = ir.VectorType(_I32, L)
        wrong, right = ir.Constant(bits, None), []
        for v in range(V):
            before = _load(b, b.add(x, _n(4 * L * v)), bits, 4)
            after = b.select(_inside(b, b.add(kept, _n(L * v)), L), before, ir.Constant(bits, None))
            wrong = b.or_(wrong, b.xor(before, after))
            right.append(after)
        whole = b.bitcast(wrong, ir.IntType(32 * L))
        with b.if_then(b.icmp_unsigned("!=", whole, ir.Constant(whole.type, 0)), likely=False):
            for v, after in enumerate(right):
                _store(b, after, b.add(x, _n(4 * L * v)), 4)
        return ctx.get_dummy_value()

    return types.void(lanes, vectors, _int, _int), gen
