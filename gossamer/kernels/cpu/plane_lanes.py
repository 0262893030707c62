"""Small vector loops on image planes: pooling, sums, elementwise sums and scales."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.activations import Vector
from gossamer.kernels.cpu.conv_lanes import bounded, columns_inside, gathered, strided_inside
from gossamer.kernels.cpu.lanes import (
    _F32,
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

MAX, MEAN, MEAN_INSIDE = range(3)
PLAIN, SIGMOID, HARD_SIGMOID = range(3)


@intrinsic(prefer_literal=True)
def pool_lines(
    typing, how, step, lanes,
    x, y, high, wide, out_high, out_wide, kernel_high, kernel_wide,
    stride_high, stride_wide, dilation_high, dilation_wide, top, left, column,
):  # fmt: skip
    """One vector of pooled columns, column.., for all output lines of a plane.

    MAX passes NaN on; MEAN divides by the whole window, MEAN_INSIDE by its pixels inside the image.
    """
    H, S, L = how.literal_value, step.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        (
            x, y, high, wide, out_high, out_wide, kernel_high, kernel_wide,
            stride_high, stride_wide, dilation_high, dilation_wide, top, left, column,
        ) = args[3:]  # fmt: skip
        v, wanted = Vector(b, L), _lane_mask(b, b.sub(out_wide, column), L)
        first = b.sub(b.mul(column, stride_wide), left)
        whole = _splat(b, b.sitofp(b.mul(kernel_high, kernel_wide), _F32), L)
        lines = _Loop(b, _n(0), out_high, 1, [])
        above = b.sub(b.mul(lines.i, stride_high), top)
        down = _Loop(b, _n(0), kernel_high, 1, [v.const(-float("inf") if H == MAX else 0.0), v.const(0.0)])
        row = b.add(above, b.mul(down.i, dilation_high))
        # Lines outside have no columns inside; they are read nowhere.
        real = b.icmp_unsigned("<", row, high)
        room, row = b.select(real, wide, _n(0)), b.select(real, row, _n(0))
        across = _Loop(b, _n(0), kernel_wide, 1, down.values)
        start = b.add(first, b.mul(across.i, dilation_wide))
        at = b.add(x, b.mul(b.add(b.mul(row, wide), start), _n(4)))
        if S == 1:
            inside = columns_inside(b, start, room, L)
            taken = _masked_load(b, at, inside, L)
        else:
            inside = strided_inside(b, start, stride_wide, room, L)
            taken = gathered(b, at, b.mul(stride_wide, _n(4)), inside, L)
        total, count = across.values
        if H == MAX:
            more = b.or_(b.fcmp_ordered(">", taken, total), b.fcmp_unordered("uno", taken, taken))
            total = b.select(b.and_(more, inside), taken, total)
        else:
            total = b.fadd(total, taken)
            count = b.fadd(count, b.select(inside, v.const(1.0), v.const(0.0)))
        total, count = down.close(across.close([total, count]))
        if H != MAX:
            total = b.fdiv(total, whole if H == MEAN else count)
        _masked_store(b, total, b.add(y, b.mul(b.add(b.mul(lines.i, out_wide), column), _n(4))), wanted, L)
        lines.close([])
        return ctx.get_dummy_value()

    return types.void(how, step, lanes, *[_int] * 15), gen


@intrinsic(prefer_literal=True)
def mean_row(typing, lanes, x, count, y):
    """y[0] = mean of x[:count], by four chains of additions."""
    L = lanes.literal_value
    kind = ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        x, count, y = args[1:]
        zero = ir.Constant(kind, None)
        total = _declare(b, f"llvm.vector.reduce.fadd.v{L}f32", _F32, _F32, kind)
        four = _Loop(b, _n(0), count, 4 * L, [zero] * 4)
        at = b.add(x, b.mul(four.i, _n(4)))
        chains = four.close([b.fadd(four.values[k], _load(b, b.add(at, _n(4 * L * k)), kind, 4)) for k in range(4)])
        one = _Loop(b, four.i, b.add(count, _n(L - 1)), L, chains[:1])
        at = b.add(x, b.mul(one.i, _n(4)))
        taken = _masked_load(b, at, _lane_mask(b, b.sub(count, one.i), L), L)
        chains[0] = one.close([b.fadd(one.values[0], taken)])[0]
        both = b.fadd(b.fadd(chains[0], chains[1]), b.fadd(chains[2], chains[3]))
        # `reassoc` lets the lanes be added as a tree.
        scalar = b.call(total, [ir.Constant(_F32, -0.0), both], fastmath=("reassoc",))
        _store(b, b.fdiv(scalar, b.sitofp(count, _F32)), y, 4)
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 3), gen


def _each(b, count, lanes: int, vector):
    """Call `vector(load, store)` on whole vectors of `count` floats and once, masked, on the rest."""
    kind = ir.VectorType(_F32, lanes)
    loop = _Loop(b, _n(0), count, lanes, [])
    offset = b.mul(loop.i, _n(4))
    vector(
        lambda base: _load(b, b.add(base, offset), kind, 4),
        lambda value, base: _store(b, value, b.add(base, offset), 4),
    )
    loop.close([])
    rest = b.sub(count, loop.i)
    with b.if_then(b.icmp_signed(">", rest, _n(0))):
        mask, end = _lane_mask(b, rest, lanes), b.mul(loop.i, _n(4))
        vector(
            lambda base: _masked_load(b, b.add(base, end), mask, lanes),
            lambda value, base: _masked_store(b, value, b.add(base, end), mask, lanes),
        )


@intrinsic(prefer_literal=True)
def add_row(typing, lanes, one, other, y, count, low, up):
    """y[i] = one[i] + other[i] within the bounds; y may be one of them."""
    L = lanes.literal_value

    def gen(ctx, b, sig, args):
        one, other, y, count, low, up = args[1:]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        _each(b, count, L, lambda load, store: store(bounded(b, b.fadd(load(one), load(other)), low, up), y))
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def scale_row(typing, lanes, gate, x, scale, y, count):
    """y[i] = x[i] * gate(scale[0]); y may be x."""
    L, gate_ = lanes.literal_value, gate.literal_value

    def gen(ctx, b, sig, args):
        x, scale, y, count = args[2:]
        v = Vector(b, L)
        factor = _splat(b, _load(b, scale, _F32, 4), L)
        if gate_ == SIGMOID:
            factor = v.sigmoid(factor)
        elif gate_ == HARD_SIGMOID:
            shifted = v.at_most(v.at_least(b.fadd(factor, v.const(3.0)), 0.0), 6.0)
            factor = b.fmul(shifted, v.const(1.0 / 6.0))
        _each(b, count, L, lambda load, store: store(b.fmul(load(x), factor), y))
        return ctx.get_dummy_value()

    return types.void(lanes, gate, *[_int] * 4), gen
