"""Vector instructions that everything on image planes shares: bounds, masks, activations in place.

Results are bounded from both sides in registers, which serves "none", "relu" and "relu6" alike; other activations are
applied to finished rows in place, while they are still in the first-level cache.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.core.errors import unknown
from gossamer.kernels.cpu import activations
from gossamer.kernels.cpu.activations import Vector
from gossamer.kernels.cpu.lanes import (
    _F32,
    _I1,
    _I32,
    _I64,
    _declare,
    _int,
    _lane_mask,
    _load,
    _Loop,
    _masked_load,
    _masked_store,
    _n,
    _splat,
    _store,
)

# What is applied to finished rows; the names before it are bounds.
BOUNDED, GELU, GELU_TANH, SILU, HARD_SWISH = range(5)
_NO = float("inf")
ACTIVATIONS = {
    "none": (BOUNDED, -_NO, _NO),
    "relu": (BOUNDED, 0.0, _NO),
    "relu6": (BOUNDED, 0.0, 6.0),
    "gelu": (GELU, -_NO, _NO),
    "gelu_tanh": (GELU_TANH, -_NO, _NO),
    "silu": (SILU, -_NO, _NO),
    "hard_swish": (HARD_SWISH, -_NO, _NO),
}


def finish_of(activation: str) -> tuple[int, float, float]:
    """What to apply in place, and the bounds. Raises UnknownName for another name."""
    found = ACTIVATIONS.get(activation)
    if found is None:
        raise unknown("activation", activation, ACTIVATIONS)
    return found


def bounded(b, x, low, high):
    """min(max(x, low), high), which passes NaN on."""
    x = b.select(b.fcmp_ordered("<", x, low), low, x)
    return b.select(b.fcmp_ordered(">", x, high), high, x)


def columns_inside(b, first, wide, lanes: int):
    """Mask of the lanes i with 0 <= first + i < wide."""
    numbers = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
    columns = b.add(_splat(b, b.trunc(first, _I32), lanes), numbers)
    return b.icmp_unsigned("<", columns, _splat(b, b.trunc(wide, _I32), lanes))


def every_second(b, low, high, odd: int, lanes: int):
    """The even (or odd) ones of 2 x lanes floats."""
    pick = ir.Constant(ir.VectorType(_I32, lanes), [2 * i + odd for i in range(lanes)])
    return b.shuffle_vector(low, high, pick)


def gathered(b, address, step, mask, lanes: int):
    """Floats `step` bytes apart, zero where the mask is off."""
    kind, wide = ir.VectorType(_F32, lanes), ir.VectorType(_I64, lanes)
    pointers = ir.VectorType(_F32.as_pointer(), lanes)
    numbers = ir.Constant(wide, list(range(lanes)))
    places = b.add(_splat(b, address, lanes), b.mul(_splat(b, step, lanes), numbers))
    name = f"llvm.masked.gather.v{lanes}f32.v{lanes}p0"
    gather = _declare(b, name, kind, pointers, _I32, ir.VectorType(_I1, lanes), kind)
    return b.call(gather, [b.inttoptr(places, pointers), ir.Constant(_I32, 4), mask, ir.Constant(kind, None)])


def strided_inside(b, first, step, wide, lanes: int):
    """Mask of the lanes i with 0 <= first + i * step < wide."""
    numbers = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
    steps = b.mul(_splat(b, b.trunc(step, _I32), lanes), numbers)
    columns = b.add(_splat(b, b.trunc(first, _I32), lanes), steps)
    return b.icmp_unsigned("<", columns, _splat(b, b.trunc(wide, _I32), lanes))


_CODES = {
    GELU: activations.GELU,
    GELU_TANH: activations.GELU_TANH,
    SILU: activations.SILU,
    HARD_SWISH: activations.HARD_SWISH,
}


@intrinsic(prefer_literal=True)
def activate_row(typing, lanes, code, y, count):
    """y[i] = activation(y[i]) for `count` floats."""
    L, act = lanes.literal_value, _CODES[code.literal_value]

    def gen(ctx, b, sig, args):
        y, count = args[2:]
        kind = ir.VectorType(_F32, L)
        loop = _Loop(b, _n(0), count, L, [])
        at = b.add(y, b.mul(loop.i, _n(4)))
        _store(b, activations.emit(Vector(b, L), act, _load(b, at, kind, 4)), at, 4)
        loop.close([])
        rest = b.sub(count, loop.i)
        with b.if_then(b.icmp_signed(">", rest, _n(0))):
            mask, at = _lane_mask(b, rest, L), b.add(y, b.mul(loop.i, _n(4)))
            _masked_store(b, activations.emit(Vector(b, L), act, _masked_load(b, at, mask, L)), at, mask, L)
        return ctx.get_dummy_value()

    return types.void(lanes, code, _int, _int), gen
