"""The register tile of convolutions by sparse weights, and the lines that they read, as vector code."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.conv_lanes import bounded, columns_inside, every_second, gathered, strided_inside
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


@intrinsic(prefer_literal=True)
def take_row(typing, step, lanes, source, first, stride, wide, target, width):
    """target[c] = source[first + c * stride] for c < width, 0 where that column is outside 0 <= column < wide.

    Whole vectors are written, so up to lanes - 1 floats beyond `width` become garbage: write lines in order. `step` is
    the literal stride where that is 1 or 2, else 0.
    """
    S, L = step.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        source, first, stride, wide, target, width = args[2:]
        loop = _Loop(b, _n(0), b.add(width, _n(L - 1)), L, [])
        column = b.add(first, b.mul(loop.i, stride))
        at = b.add(source, b.mul(column, _n(4)))
        if S == 1:
            taken = _masked_load(b, at, columns_inside(b, column, wide, L), L)
        elif S == 2:
            both = []
            for half in range(2):
                inside = columns_inside(b, b.add(column, _n(half * L)), wide, L)
                both.append(_masked_load(b, b.add(at, _n(4 * L * half)), inside, L))
            taken = every_second(b, *both, 0, L)
        else:
            inside = strided_inside(b, column, stride, wide, L)
            taken = gathered(b, at, b.mul(stride, _n(4)), inside, L)
        _store(b, taken, b.add(target, b.mul(loop.i, _n(4))), 4)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(step, lanes, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def conv_tile(
    typing, rows, vectors, lanes, pieces, add, ordered,
    first, last, stop, start, offset, value, panel, sums,
    y, y_row, places, residual, bias, bias_step, low, up, wanted, count, order,
):  # fmt: skip
    """Add entries start..stop of one row group into a register tile of rows x vectors; deliver it after the last block.

    Sums begin at the bias in the `first` block of channels and at `sums` otherwise; they go to `sums` unless this is
    the `last` block, else the first `count` vectors into the first `wanted` rows of y. Each vector is written in
    `pieces`: places holds for each the byte offset in a row of y and the bits of the lanes that belong there. With
    `ordered` row r is row order[r] of y, residual and bias (int64); else `order` is not read.
    """
    G, V, L, P, adding, sorts = (t.literal_value for t in (rows, vectors, lanes, pieces, add, ordered))
    # Enough independent chains of additions to cover a four-cycle latency at two additions per cycle.
    chains = max(1, min(4, 8 // (G * V)))
    unroll = max(chains, 2 if G * V <= 8 else 1)
    kind, bits = ir.VectorType(_F32, L), ir.VectorType(_I1, L)

    def gen(ctx, b, sig, args):
        (
            first, last, stop, start, offset, value, panel, sums,
            y, y_row, places, residual, bias, bias_step, low, up, wanted, count, order,
        ) = args[6:]  # fmt: skip
        numbers = [_load(b, b.add(order, _n(8 * r)), _I64, 8) if sorts else _n(r) for r in range(G)]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        held = [b.add(sums, _n(4 * L * k)) for k in range(G * V)]

        def entry(e, acc):
            x = b.add(panel, b.sext(_load(b, b.add(offset, b.mul(e, _n(4))), _I32, 4), _I64))
            xs = [_load(b, b.add(x, _n(4 * L * v)), kind, 4) for v in range(V)]
            w = b.add(value, b.mul(e, _n(4 * G)))
            acc = list(acc)
            for r in range(G):
                weight = _splat(b, _load(b, b.add(w, _n(4 * r)), _F32, 4), L)
                for v in range(V):
                    acc[r * V + v] = b.call(fma, [weight, xs[v], acc[r * V + v]])
            return acc

        acc = _begin(b, first, held, bias, bias_step, wanted, numbers, V, kind)
        size = G * V
        acc = acc + [ir.Constant(kind, None)] * (size * (chains - 1))
        if unroll > 1:
            loop = _Loop(b, start, stop, unroll, acc)
            now = list(loop.values)
            for u in range(unroll):
                c = (u % chains) * size
                now[c : c + size] = entry(b.add(loop.i, _n(u)), now[c : c + size])
            acc = loop.close(now)
            start = loop.i
        loop = _Loop(b, start, stop, 1, acc)
        acc = loop.close(entry(loop.i, loop.values[:size]) + loop.values[size:])
        for c in range(1, chains):
            acc = [b.fadd(acc[k], acc[c * size + k]) for k in range(size)] + acc[size:]

        def deliver(r, v, low, up):
            total, row = acc[r * V + v], b.mul(y_row, numbers[r])
            cells = []
            for p in range(P):
                cell = b.add(places, _n(16 * (v * P + p)))
                mask = _load(b, b.add(cell, _n(8)), ir.IntType(L), 2)
                cells.append((b.add(row, _load(b, cell, _I64, 8)), b.bitcast(mask, bits)))
            if adding:
                for at, mask in cells:
                    total = b.fadd(total, _masked_load(b, b.add(residual, at), mask, L))
            total = bounded(b, total, low, up)
            for at, mask in cells:
                _masked_store(b, total, b.add(y, at), mask, L)

        with b.if_else(b.icmp_signed("!=", last, _n(0))) as (finished, unfinished):
            with finished:
                bounds = [_splat(b, _load(b, at, _F32, 4), L) for at in (low, up)]
                for r in range(G):
                    for v in range(V):
                        real = b.and_(b.icmp_signed("<", _n(r), wanted), b.icmp_signed("<", _n(v), count))
                        with b.if_then(real, likely=True):
                            deliver(r, v, *bounds)
            with unfinished:
                for k in range(size):
                    _store(b, acc[k], held[k], 4)
        return ctx.get_dummy_value()

    return types.void(rows, vectors, lanes, pieces, add, ordered, *[_int] * 19), gen


def _begin(b, first, held, bias, bias_step, wanted, numbers: list, vectors: int, kind) -> list:
    """Sums as they start: the bias of each wanted row, or what the last block of channels left."""

    def place(r):
        # The bias ends with the last real row: a ragged group reads its first one again.
        row = b.select(b.icmp_signed("<", _n(r), wanted), numbers[r], numbers[0])
        return b.add(bias, b.mul(bias_step, row))

    fresh, resume, ready = (b.append_basic_block(n) for n in ("fresh", "resume", "ready"))
    b.cbranch(b.icmp_signed("!=", first, _n(0)), fresh, resume)
    b.position_at_end(fresh)
    starts = [_splat(b, _load(b, place(r), _F32, 4), kind.count) for r in range(len(numbers)) for _ in range(vectors)]
    b.branch(ready)
    b.position_at_end(resume)
    loaded = [_load(b, at, kind, 4) for at in held]
    b.branch(ready)
    b.position_at_end(ready)
    sums = []
    for one, other in zip(starts, loaded):
        phi = b.phi(kind)
        phi.add_incoming(one, fresh)
        phi.add_incoming(other, resume)
        sums.append(phi)
    return sums
