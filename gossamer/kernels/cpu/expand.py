"""Products of bitmask tiles with a few tokens, as vector code: sixteen outputs are the lanes of one register.

A tile is sixteen rows by two columns. Its mask spreads the next packed values over lanes, its inputs are broadcast,
and the count of its bits moves on. Several sums per output hide the latency of the multiplier.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.lanes import (
    _F32,
    _I1,
    _I8,
    _I16,
    _I32,
    _I64,
    _at,
    _bf16_to_f32,
    _declare,
    _int,
    _load,
    _Loop,
    _n,
    _splat,
    _store,
)

LANES = 16
# How far ahead of the multiplier memory is asked for, in bytes. Without it a product takes more than twice as long; of
# 2, 4, 6, 8 and 12 KiB these measured best, for values behind a mask and for values that all are kept.
AHEAD_VALUES, AHEAD_WHOLE, AHEAD_BITS = 8192, 4096, 2048
_VECTOR = ir.VectorType(_F32, LANES)


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


_BFLOATS = ir.VectorType(BFloat(), 2 * LANES)


class _Volatile(ir.LoadInstr):
    """A load that LLVM must not fold into the expand that follows: expanding from memory measured half as fast."""

    def descr(self, buf) -> None:
        text: list[str] = []
        super().descr(text)
        buf.append("".join(text).replace("load ", "load volatile ", 1))


def _load_apart(b, address, kind, align: int):
    load = _Volatile(b.block, _at(b, address, kind))
    load.align = align
    b._insert(load)
    return load


def prefetch(b, address) -> None:
    """Ask for the cache line at an address; any address is allowed."""
    function = _declare(b, "llvm.prefetch.p0", ir.VoidType(), _I8.as_pointer(), _I32, _I32, _I32)
    b.call(function, [_at(b, address, _I8), *(ir.Constant(_I32, n) for n in (0, 3, 1))])


def dot_pairs(b, sums, left, right):
    """sums[i] += left[2i] right[2i] + left[2i + 1] right[2i + 1] for bfloat16 numbers held as 16-bit integers."""
    function = _declare(b, "llvm.x86.avx512bf16.dpbf16ps.512", _VECTOR, _VECTOR, _BFLOATS, _BFLOATS)
    return b.call(function, [sums, b.bitcast(left, _BFLOATS), b.bitcast(right, _BFLOATS)])


def _bits_of(b, word):
    count = _declare(b, f"llvm.ctpop.i{word.type.width}", word.type, word.type)
    return b.zext(b.call(count, [word]), _I64)


def _lanes(b, x, first: int, count: int):
    """Lanes first to first + count of a vector."""
    if (first, count) == (0, x.type.count):
        return x
    return b.shuffle_vector(x, x, ir.Constant(ir.VectorType(_I32, count), list(range(first, first + count))))


def _added(b, sums):
    """Vectors summed as a tree."""
    while len(sums) > 1:
        sums = [b.fadd(x, y) for x, y in zip(sums[::2], sums[1::2])] + sums[len(sums) // 2 * 2 :]
    return sums[0]


class _Walk:
    """The loop over a row group's tiles: `unroll` at a time with prefetching, then one by one."""

    def __init__(self, b, bits, values, pairs, unroll: int, lines: int, at_once: int = 2):
        self.b, self.bits, self.values, self.pairs = b, bits, values, pairs
        self.unroll, self.lines, self.at_once = unroll, lines, at_once
        self.ahead = AHEAD_VALUES if at_once else AHEAD_WHOLE

    def words(self, p, count: int) -> list:
        """The masks of one or two tiles from p, as (word, flags); None where nothing is masked.

        Two are loaded and moved to the mask registers at once, which measured a tenth faster for tiles that are used
        whole, and slower for tiles that are used in halves.
        """
        b, at = self.b, self.b.add(self.bits, self.b.mul(p, _n(4)))
        if not self.at_once:
            return [None] * count
        both = _load(b, at, _I32, 4) if count == 1 else _load_apart(b, at, _I64, 4)
        flags = b.bitcast(both, ir.VectorType(_I1, both.type.width))
        words = [both] if count == 1 else [b.trunc(b.lshr(both, _n(shift)), _I32) for shift in (0, 32)]
        return [(word, _lanes(b, flags, 32 * n, 32)) for n, word in enumerate(words)]

    def run(self, tile, sums):
        """`tile(p, place, (word, flags), sums, chain)` multiplies one tile and returns (next place, sums)."""
        b = self.b
        loop = _Loop(b, _n(0), self.pairs, self.unroll, [self.values, *sums])
        place, sums = loop.values[0], list(loop.values[1:])
        if self.at_once:
            prefetch(b, b.add(b.add(self.bits, b.mul(loop.i, _n(4))), _n(AHEAD_BITS)))
        for line in range(self.lines):
            prefetch(b, b.add(place, _n(self.ahead + 64 * line)))
        step = self.at_once or 1
        for u in range(0, self.unroll, step):
            p = b.add(loop.i, _n(u))
            for n, mask in enumerate(self.words(p, step)):
                place, sums = tile(b.add(p, _n(n)), place, mask, sums, u + n)
        place, *sums = loop.close([place, *sums])
        rest = _Loop(b, loop.i, self.pairs, 1, [place, *sums])
        place, now = tile(rest.i, rest.values[0], self.words(rest.i, 1)[0], list(rest.values[1:]), 0)
        return rest.close([place, *now])[1:]


@intrinsic(prefer_literal=True)
def expand_dot(typing, tokens, most, bits, values, x, pairs, y, y_row):
    """y[t, r] = sum over kept (r, k) of w[r, k] x[t, k], bfloat16 values by bfloat16 inputs, for sixteen rows.

    x holds [pairs, tokens] pairs of bfloat16, which must be finite: a pruned weight multiplies as zero. `most` is how
    many values a tile keeps at most, 16 or 32; with 16, half as much is loaded per tile. 0 says that every tile keeps
    all of its entries, so that no mask is read.
    """
    T, limit = tokens.literal_value, most.literal_value
    # The dot product answers after six cycles and two can start in each: sixteen sums in the registers, eight at least.
    chains = min(8, 16 // T)
    words, half = ir.VectorType(_I16, 2 * LANES), ir.VectorType(_I16, LANES)
    zero = ir.Constant(_VECTOR, None)

    def gen(ctx, b, sig, args):
        bits, values, x, pairs, y, y_row = args[2:]
        flags = ir.VectorType(_I1, 2 * LANES)
        expand = _declare(b, "llvm.x86.avx512.mask.expand.v32i16", words, words, words, flags)
        wide = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(2 * LANES)))

        def tile(p, place, mask, sums, chain):
            packed = _load_apart(b, place, half if limit == 16 else words, 2)
            if limit == 16:
                packed = b.shuffle_vector(packed, ir.Constant(half, None), wide)
            w = b.call(expand, [packed, ir.Constant(words, None), mask[1]]) if limit else packed
            for t in range(T):
                pair = _load(b, b.add(x, b.mul(b.add(b.mul(p, _n(T)), _n(t)), _n(4))), _I32, 4)
                at = t * chains + chain % chains
                sums[at] = dot_pairs(b, sums[at], w, _splat(b, pair, LANES))
            return b.add(place, b.shl(_bits_of(b, mask[0]), _n(1)) if limit else _n(64)), sums

        walk = _Walk(b, bits, values, pairs, 8, {32: 5, 16: 2, 0: 8}[limit], at_once=2 if limit else 0)
        sums = walk.run(tile, [zero] * (T * chains))
        for t in range(T):
            _store(b, _added(b, sums[t * chains : (t + 1) * chains]), b.add(y, b.mul(y_row, _n(t))), 4)
        return ctx.get_dummy_value()

    return types.void(tokens, most, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def expand_fma(typing, tokens, value_bytes, bits, values, x, pairs, y, y_row):
    """y[t, r] = sum over kept (r, k) of w[r, k] x[t, k] in float32, for sixteen rows.

    x holds [pairs, tokens] pairs of float32. Columns that are not kept are masked out of the sum, so an infinity
    there does not spread.
    """
    T, B = tokens.literal_value, value_bytes.literal_value
    chains = max(1, 4 // T)
    raw = _VECTOR if B == 4 else ir.VectorType(_I16, LANES)
    zero = ir.Constant(_VECTOR, None)

    def gen(ctx, b, sig, args):
        bits, values, x, pairs, y, y_row = args[2:]
        flags, half_word = ir.VectorType(_I1, LANES), ir.IntType(16)
        expand = _declare(b, "llvm.x86.avx512.mask.expand.v16f32", _VECTOR, _VECTOR, _VECTOR, flags)
        fma = _declare(b, "llvm.fma.v16f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR)

        def tile(p, place, mask, sums, chain):
            inputs = []
            for t in range(T):
                pair = _load(b, b.add(x, b.mul(b.add(b.mul(p, _n(T)), _n(t)), _n(8))), _I64, 4)
                inputs.append(b.bitcast(_splat(b, pair, LANES // 2), _VECTOR))
            for half in range(2):
                part = b.trunc(b.lshr(mask[0], ir.Constant(_I32, 16 * half)), half_word)
                packed = _load_apart(b, place, raw, B)
                packed = packed if B == 4 else _bf16_to_f32(b, packed, LANES)
                kept = b.bitcast(part, flags)
                w = b.call(expand, [packed, zero, kept])
                for t in range(T):
                    at = (t * chains + chain % chains) * 2 + half
                    sums[at] = b.select(kept, b.call(fma, [w, inputs[t], sums[at]]), sums[at])
                place = b.add(place, b.mul(_bits_of(b, part), _n(B)))
            return place, sums

        walk = _Walk(b, bits, values, pairs, 4, 5 if B == 4 else 3, at_once=1)
        sums = walk.run(tile, [zero] * (2 * T * chains))
        for t in range(T):
            low, high = (_added(b, sums[2 * t * chains : 2 * (t + 1) * chains][half::2]) for half in range(2))
            even, odd = (ir.Constant(ir.VectorType(_I32, LANES), list(range(c, 32, 2))) for c in range(2))
            total = b.fadd(b.shuffle_vector(low, high, even), b.shuffle_vector(low, high, odd))
            _store(b, total, b.add(y, b.mul(y_row, _n(t))), 4)
        return ctx.get_dummy_value()

    return types.void(tokens, value_bytes, *[_int] * 6), gen
