"""The register tile of convolutions whose taps come in runs, as vector code.

A run is up to three kept taps that stand below each other in one kernel. The tile is one vector wide and several output
lines high, so that the vector which a tap reads for one line is the one that the tap below it reads for the line above:
a run of k taps over R lines loads R + k - 1 vectors instead of k R.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.conv_lanes import bounded, columns_inside, every_second, gathered, strided_inside
from gossamer.kernels.cpu.conv_tile import _begin
from gossamer.kernels.cpu.lanes import (
    _F32,
    _I1,
    _I32,
    _I64,
    _declare,
    _int,
    _load,
    _Loop,
    _masked_load,
    _masked_store,
    _n,
    _splat,
    _store,
)

LONGEST = 3


@intrinsic(prefer_literal=True)
def take_column(typing, step, lanes, source, line, first, stride, wide, target, top, end, depth):
    """A column of vectors: line i of `target` is the floats first + c * stride, c < lanes, `i * line` bytes on.

    Zero where that is outside 0 <= column < wide, and in lines before `top` and from `end` to `depth`. `step` is the
    literal stride where that is 1 or 2, else 0.
    """
    S, L = step.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        source, line, first, stride, wide, target, top, end, depth = args[2:]
        if S:
            inside = [columns_inside(b, b.add(first, _n(half * L)), wide, L) for half in range(S)]
        else:
            inside = [strided_inside(b, first, stride, wide, L)]
        start = b.add(source, b.mul(first, _n(4)))

        def taken(i):
            at = b.add(start, b.mul(i, line))
            if S == 0:
                return gathered(b, at, b.mul(stride, _n(4)), inside[0], L)
            halves = [_masked_load(b, b.add(at, _n(4 * L * half)), inside[half], L) for half in range(S)]
            return halves[0] if S == 1 else every_second(b, *halves, 0, L)

        nothing = ir.Constant(ir.VectorType(_F32, L), None)
        for begin, stop, vector in (
            (_n(0), top, lambda i: nothing),
            (top, end, taken),
            (end, depth, lambda i: nothing),
        ):
            loop = _Loop(b, begin, stop, 1, [])
            _store(b, vector(loop.i), b.add(target, b.mul(loop.i, _n(4 * L))), 4)
            loop.close([])
        return ctx.get_dummy_value()

    return types.void(step, lanes, *[_int] * 9), gen


@intrinsic(prefer_literal=True)
def runs_tile(
    typing, high, lanes, add,
    first, last, starts, step, runs, value, panel, line, sums, y, places, place_step, residual, bias, low, up, count,
):  # fmt: skip
    """Add the runs of one row into a register tile of `high` lines; deliver it after the last block of channels.

    A run is int32: the byte offset of its first tap in the panel, then that of each tap's weight in `value`. `starts`
    holds, `step` bytes apart, where the row's runs of three, two and one tap begin in `runs`, and where they end.
    Sums begin at the bias in the `first` block of channels and at `sums` otherwise; they go to `sums` unless this is
    the `last` block, else the first `count` lines to y, as `places` says (see `conv_tile`); lines of the panel are
    `line` bytes apart, of places `place_step`.
    """
    R, L, adding = (t.literal_value for t in (high, lanes, add))
    kind, bits = ir.VectorType(_F32, L), ir.VectorType(_I1, L)

    def gen(ctx, b, sig, args):
        (
            first, last, starts, step, runs, value, panel, line, sums, y, places, place_step, residual, bias, low, up,
            count,
        ) = args[3:]  # fmt: skip
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        held = [b.add(sums, _n(4 * L * k)) for k in range(R)]

        def number(place, k):
            return b.sext(_load(b, b.add(place, b.mul(k, _n(4))), _I32, 4), _I64)

        edges = [b.sext(_load(b, b.add(starts, b.mul(step, _n(k))), _I32, 4), _I64) for k in range(LONGEST + 1)]
        acc = _begin(b, first, held, bias, _n(0), _n(1), [_n(0)], R, kind)
        for k in range(LONGEST):
            taps = LONGEST - k
            loop = _Loop(b, edges[k], edges[k + 1], taps + 1, acc)
            acc = list(loop.values)
            x = b.add(panel, number(runs, loop.i))
            weights = [b.add(value, number(runs, b.add(loop.i, _n(t + 1)))) for t in range(taps)]
            weights = [_splat(b, _load(b, at, _F32, 4), L) for at in weights]
            for j in range(R + taps - 1):
                xs = _load(b, b.add(x, b.mul(line, _n(j))), kind, 4)
                for t in range(taps):
                    if 0 <= j - t < R:
                        acc[j - t] = b.call(fma, [weights[t], xs, acc[j - t]])
            acc = loop.close(acc)

        def deliver(k, low, up):
            cell, total = b.add(places, b.mul(place_step, _n(k))), acc[k]
            mask = b.bitcast(_load(b, b.add(cell, _n(8)), ir.IntType(L), 2), bits)
            at = _load(b, cell, _I64, 8)
            if adding:
                total = b.fadd(total, _masked_load(b, b.add(residual, at), mask, L))
            _masked_store(b, bounded(b, total, low, up), b.add(y, at), mask, L)

        with b.if_else(b.icmp_signed("!=", last, _n(0))) as (finished, unfinished):
            with finished:
                limits = [_splat(b, _load(b, at, _F32, 4), L) for at in (low, up)]
                for k in range(R):
                    with b.if_then(b.icmp_signed("<", _n(k), count), likely=True):
                        deliver(k, *limits)
            with unfinished:
                for k in range(R):
                    _store(b, acc[k], held[k], 4)
        return ctx.get_dummy_value()

    return types.void(high, lanes, add, *[_int] * 17), gen
