"""Inner products at chosen places, as one Numba intrinsic: the gradient of kept weights.

Sums stay in vectors over the tokens of a panel and are folded once, four at a time, by shuffles: a lone horizontal sum
costs as much as the products it ends.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.lanes import (
    _F32,
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
    _store,
)

_FOLD = 4


def _fold(b, vectors, lanes: int):
    """Add up the lanes of four vectors each: one vector of their four sums."""

    def shuffle(x, y, pattern):
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(pattern)), pattern))

    quarters = range(0, lanes, 4)
    low = [p for q in quarters for p in (q, lanes + q, q + 1, lanes + q + 1)]
    pair_low = [p for q in quarters for p in (q, q + 1, lanes + q, lanes + q + 1)]

    def halves(x, y, pattern):
        return b.fadd(shuffle(x, y, pattern), shuffle(x, y, [p + 2 for p in pattern]))

    x, y, z, w = vectors
    sums = halves(halves(x, y, low), halves(z, w, low), pair_low)
    width = lanes
    while width > 4:
        width //= 2
        sums = b.fadd(shuffle(sums, sums, list(range(width))), shuffle(sums, sums, list(range(width, 2 * width))))
    return sums


@intrinsic(prefer_literal=True)
def dots(typing, rows, vectors, lanes, index_bytes, add, start, stop, index, x, x_row, y, y_row, out):
    """out[e, r] = sum over tokens of x[index[e], token] * y[r, token] for entries start..stop and a group of rows.

    Tokens are `vectors` vectors; `add` non-zero adds to what out holds. `x_row` and `y_row` are in bytes.
    """
    G, V, L, B = (t.literal_value for t in (rows, vectors, lanes, index_bytes))
    # Entries of one step: four sums to fold together, or eight for groups of eight rows.
    N = max(1, _FOLD // G)
    kind, four = ir.VectorType(_F32, L), ir.VectorType(_F32, _FOLD)

    def gen(ctx, b, sig, args):
        add, start, stop, index, x, x_row, y, y_row, out = args[4:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        adding = b.icmp_signed("!=", add, _n(0))
        ys = [
            [_load(b, b.add(b.add(y, b.mul(y_row, _n(r))), _n(4 * L * v)), kind, 4) for v in range(V)] for r in range(G)
        ]

        def sums_of(entries):
            sums = []
            for e in entries:
                raw = _load(b, b.add(index, b.mul(e, _n(B))), ir.IntType(8 * B), B)
                place = b.add(x, b.mul(b.zext(raw, _I64), x_row))
                xs = [_load(b, b.add(place, _n(4 * L * v)), kind, 4) for v in range(V)]
                for r in range(G):
                    total = b.fmul(ys[r][0], xs[0])
                    for v in range(1, V):
                        total = b.call(fma, [ys[r][v], xs[v], total])
                    sums.append(total)
            return [_fold(b, sums[k : k + _FOLD], L) for k in range(0, len(sums), _FOLD)]

        def place_of(e, k):
            return b.add(out, b.add(b.mul(e, _n(4 * G)), _n(4 * _FOLD * k)))

        loop = _Loop(b, start, stop, N, [])
        for k, sums in enumerate(sums_of([b.add(loop.i, _n(n)) for n in range(N)])):
            old = b.select(adding, _load(b, place_of(loop.i, k), four, 4), ir.Constant(four, None))
            _store(b, b.fadd(sums, old), place_of(loop.i, k), 4)
        loop.close([])
        if N > 1:
            rest = b.sub(stop, loop.i)
            with b.if_then(b.icmp_signed(">", rest, _n(0))):
                last = b.sub(stop, _n(1))
                entries = [b.add(loop.i, _n(n)) for n in range(N)]
                entries = [b.select(b.icmp_signed("<", e, stop), e, last) for e in entries]
                (sums,) = sums_of(entries)
                mask, place = _lane_mask(b, b.mul(rest, _n(G)), _FOLD), place_of(loop.i, 0)
                old = b.select(adding, _masked_load(b, place, mask, _FOLD), ir.Constant(four, None))
                _masked_store(b, b.fadd(sums, old), place, mask, _FOLD)
        return ctx.get_dummy_value()

    return types.void(rows, vectors, lanes, index_bytes, *[_int] * 9), gen
