"""Elementwise work on rows of floats as Numba intrinsics."""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu import activations
from gossamer.kernels.cpu.emit import Code

_int = types.int64
# How a second operand enters: not at all, added before the activation, multiplied after it, or as one factor before it.
ALONE, ADD, MULTIPLY, SCALE = range(4)


@intrinsic(prefer_literal=True)
def combine_row(typing, lanes, how, code, x, z, y, count):
    """y = act(x), act(x + z), act(x) * z or act(x * z[0]) for `count` floats, whole vectors; y may be x or z."""
    L, combine, act = lanes.literal_value, how.literal_value, code.literal_value

    def gen(ctx, b, sig, args):
        x, z, y, count = args[3:]
        c = Code(b, L)
        factor = c.splat(z) if combine == SCALE else None

        def vector(i, _):
            place = b.mul(i, c.n(4))
            value = c.load(b.add(x, place))
            if combine == ADD:
                value = b.fadd(value, c.load(b.add(z, place)))
            if combine == SCALE:
                value = b.fmul(value, factor)
            value = activations.emit(c, act, value)
            if combine == MULTIPLY:
                value = b.fmul(value, c.load(b.add(z, place)))
            c.store(value, b.add(y, place))
            return []

        c.repeat(c.n(0), count, L, [], vector)
        return ctx.get_dummy_value()

    return types.void(lanes, how, code, *[_int] * 4), gen


@intrinsic(prefer_literal=True)
def sum_three(typing, lanes, first, second, third, target, count):
    """target[:count] = (first + second) + third, any count."""
    L = lanes.literal_value

    def gen(ctx, b, sig, args):
        first, second, third, target, count = args[1:]

        def adding(c):
            def some(i, _):
                place = b.mul(i, c.n(4))
                total = b.fadd(c.load(b.add(first, place)), c.load(b.add(second, place)))
                c.store(b.fadd(total, c.load(b.add(third, place))), b.add(target, place))
                return []

            return some

        wide, one = Code(b, L), Code(b, 1)
        i, _ = wide.repeat(wide.n(0), count, L, [], adding(wide))
        one.repeat(i, count, 1, [], adding(one))
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 5), gen


@intrinsic(prefer_literal=True)
def rotate_column(typing, lanes, x, y, row, half, cos, sin, table_row):
    """Turn one vector of positions: features i and i + half are a point, turned by the angle of position and i.

    Features are `row` bytes apart in x and y, which may be the same; those of the tables are `table_row` bytes apart.
    """
    L = lanes.literal_value

    def gen(ctx, b, sig, args):
        x, y, row, half, cos, sin, table_row = args[1:]
        c = Code(b, L)
        across = b.mul(half, row)

        def pair(i, _):
            place, angle = b.mul(i, row), b.mul(i, table_row)
            low, high = b.add(x, place), b.add(y, place)
            first, second = c.load(low), c.load(b.add(low, across))
            cosine, sine = c.load(b.add(cos, angle)), c.load(b.add(sin, angle))
            c.store(b.fsub(b.fmul(first, cosine), b.fmul(second, sine)), high)
            c.store(c.fma(second, cosine, b.fmul(first, sine)), b.add(high, across))
            return []

        c.unrolled(half, 4, [], pair)
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 7), gen
