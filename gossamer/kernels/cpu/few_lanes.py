"""Ranking the few competitors of many pools at once, as a Numba intrinsic: a lane is a pool.

Shapes: m competitors of a pool; L lanes.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.lanes import _F32, _I1, _I8, _I32, _declare, _lane_mask, _load, _masked_load, _n, _store

_int = types.int64


def _vector(kind, lanes: int):
    return ir.VectorType(kind, lanes)


def _numbers(values):
    return ir.Constant(_vector(_I32, len(values)), list(values))


def _won(b, scores, k: int, absolute: int, lanes: int):
    """For each competitor whether it is among the k best, as bytes of 1 and 0. Ties go to the one that comes first."""
    bytes_, kind = _vector(_I8, lanes), _vector(_F32, lanes)
    if absolute:
        size_of = _declare(b, f"llvm.fabs.v{lanes}f32", kind, kind)
        scores = [b.call(size_of, [score]) for score in scores]
    ranks = [ir.Constant(bytes_, [j] * lanes) for j in range(len(scores))]
    for late in range(1, len(scores)):
        for early in range(late):
            lost = b.zext(b.fcmp_ordered(">", scores[late], scores[early]), bytes_)
            ranks[early] = b.add(ranks[early], lost)
            ranks[late] = b.sub(ranks[late], lost)
    return [b.zext(b.icmp_unsigned("<", rank, ir.Constant(bytes_, [k] * lanes)), bytes_) for rank in ranks]


def _joined(b, vectors, lanes: int):
    """Vectors of a power of two in number, one after the other in one."""
    while len(vectors) > 1:
        both = _numbers(range(2 * lanes))
        vectors = [b.shuffle_vector(x, y, both) for x, y in zip(vectors[::2], vectors[1::2])]
        lanes *= 2
    return vectors[0]


@intrinsic(prefer_literal=True)
def rank_neighbours(typing, lanes, size, kept, absolute, scores, winners):
    """L pools whose m competitors are neighbours, m a power of two: winners[L, m] of scores[L, m]."""
    L, m, k, size_only = (t.literal_value for t in (lanes, size, kept, absolute))

    def gen(ctx, b, sig, args):
        scores, winners = args[4:]
        kind = _vector(_F32, L)
        whole = _joined(b, [_load(b, b.add(scores, _n(4 * L * j)), kind, 4) for j in range(m)], L)
        lanes_of = lambda j: _numbers([m * lane + j for lane in range(L)])
        won = _won(b, [b.shuffle_vector(whole, whole, lanes_of(j)) for j in range(m)], k, size_only, L)
        places = _numbers([L * (i % m) + i // m for i in range(m * L)])
        side_by_side = _joined(b, won, L)
        _store(b, b.shuffle_vector(side_by_side, side_by_side, places), winners, 1)
        return ctx.get_dummy_value()

    return types.void(lanes, size, kept, absolute, _int, _int), gen


@intrinsic(prefer_literal=True)
def rank_columns(typing, lanes, size, kept, absolute, scores, winners, row, count):
    """Up to L pools side by side, of which `count` exist: their j-th competitors stand `row` entries further each."""
    L, m, k, size_only = (t.literal_value for t in (lanes, size, kept, absolute))

    def gen(ctx, b, sig, args):
        scores, winners, row, count = args[4:]
        mask = _lane_mask(b, count, L)
        at = lambda start, j, size: b.add(start, b.mul(row, _n(size * j)))
        won = _won(b, [_masked_load(b, at(scores, j, 4), mask, L) for j in range(m)], k, size_only, L)
        pointer = _vector(_I8, L).as_pointer()
        shape = ir.FunctionType(ir.VoidType(), [_vector(_I8, L), pointer, _I32, _vector(_I1, L)])
        name = f"llvm.masked.store.v{L}i8.p0"
        store = b.module.globals.get(name) or ir.Function(b.module, shape, name)
        for j, value in enumerate(won):
            b.call(store, [value, b.inttoptr(at(winners, j, 1), pointer), ir.Constant(_I32, 1), mask])
        return ctx.get_dummy_value()

    return types.void(lanes, size, kept, absolute, *[_int] * 4), gen
