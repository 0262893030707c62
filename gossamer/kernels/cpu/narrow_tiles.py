"""The register tile of products in bfloat16: runs of one row group times a few vectors of positions.

A dot-product instruction multiplies two bfloat16 numbers per lane with those of another register and adds them to a
float32. The weights of a run stand side by side, so one broadcast brings them; x lies as plain rows, of which the two
that a run names are interleaved in registers, once for all rows of the group.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu import activations
from gossamer.kernels.cpu.activations import Vector
from gossamer.kernels.cpu.expand import BFloat, dot_pairs
from gossamer.kernels.cpu.lanes import (
    _F32,
    _I16,
    _I32,
    _I64,
    _bf16_to_f32,
    _declare,
    _int,
    _load,
    _Loop,
    _n,
    _splat,
    _store,
)

# Independent sums that cover the six cycles of two dot products started per cycle.
_CHAINS = 12


def _shuffle(b, x, y, pattern):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(pattern)), list(pattern)))


def _interleaved(b, x, y):
    """x0 y0 x1 y1 ... of two vectors of n, as two vectors of n."""
    n = x.type.count
    order = [place for lane in range(n) for place in (lane, n + lane)]
    return [_shuffle(b, x, y, order[:n]), _shuffle(b, x, y, order[n:])]


class Bfloat16Dot:
    """AVX-512's bfloat16 dot product, on two rows of x."""

    DEPTH = 2

    @staticmethod
    def vectors_of(b, rows, vectors: int, lanes: int):
        """Both rows of x interleaved, one vector of pairs for each vector of positions."""
        out = []
        for v in range(0, vectors - 1, 2):
            kind = ir.VectorType(_I16, 2 * lanes)
            out += _interleaved(b, *(_load(b, b.add(row, _n(2 * lanes * v)), kind, 2) for row in rows))
        if vectors % 2:
            kind, order = ir.VectorType(_I16, lanes), [p for i in range(lanes) for p in (i, lanes + i)]
            out.append(
                _shuffle(b, *(_load(b, b.add(row, _n(2 * lanes * (vectors - 1))), kind, 2) for row in rows), order)
            )
        return out

    @staticmethod
    def weights(b, word, lanes: int):
        return b.bitcast(_splat(b, word, lanes), ir.VectorType(_I16, 2 * lanes))

    @staticmethod
    def add(b, total, weights, x):
        return dot_pairs(b, total, weights, x)


class Bfloat16Wide:
    """Two multiply-adds in float32 on any processor: a bfloat16 is the upper half of a float32."""

    DEPTH = 2

    @staticmethod
    def vectors_of(b, rows, vectors: int, lanes: int):
        kind = ir.VectorType(_I16, lanes)
        return [
            [_bf16_to_f32(b, _load(b, b.add(row, _n(2 * lanes * v)), kind, 2), lanes) for row in rows]
            for v in range(vectors)
        ]

    @staticmethod
    def weights(b, word, lanes: int):
        low, high = b.shl(word, ir.Constant(_I32, 16)), b.and_(word, ir.Constant(_I32, -65536))
        return [_splat(b, b.bitcast(half, _F32), lanes) for half in (low, high)]

    @staticmethod
    def add(b, total, weights, x):
        fma = _declare(b, f"llvm.fmuladd.v{total.type.count}f32", total.type, *[total.type] * 3)
        for w, each in zip(weights, x):
            total = b.call(fma, [w, each, total])
        return total


# By whether the processor has a dot product.
WAYS = (Bfloat16Wide, Bfloat16Dot)


def _rounded(b, x, lanes: int, native: bool):
    """float32 as bfloat16 in 16-bit integers, to nearest, ties to even; NaN stays."""
    if native:
        kind = ir.VectorType(BFloat(), lanes)
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        return b.bitcast(b.call(_declare(b, name, kind, x.type), [x]), ir.VectorType(_I16, lanes))
    wide, short = ir.VectorType(_I32, lanes), ir.VectorType(_I16, lanes)
    bits = b.bitcast(x, wide)

    def const(n: int):
        return ir.Constant(wide, [n] * lanes)

    odd = b.and_(b.lshr(bits, const(16)), const(1))
    up = b.select(b.fcmp_unordered("uno", x, x), const(0x7FC00000), b.add(bits, b.add(odd, const(0x7FFF))))
    return b.trunc(b.lshr(up, const(16)), short)


@intrinsic(prefer_literal=True)
def narrow_tile(
    typing, native, rows, widest, lanes, index_bytes, code, out_bytes,
    vectors, stop, start, index, value, panel, unit, y, y_row, present, bias, bias_step,
):  # fmt: skip
    """y[r, :] = act(bias[r] + sum over runs e and their columns j of value[e, r, j] * panel[index[e, j] * unit, :]).

    `vectors` (1 to `widest`) is chosen at run time. Only the first `present` rows of the group are written, and only
    their biases read. Strides are in bytes.
    """
    N, G, W, L, B = (t.literal_value for t in (native, rows, widest, lanes, index_bytes))
    code_, size = code.literal_value, out_bytes.literal_value

    def gen(ctx, b, sig, args):
        vectors, *rest = args[7:]
        for V in range(1, W + 1):
            with b.if_then(b.icmp_signed("==", vectors, _n(V))):
                _Tile(b, WAYS[N], G, V, L, B).emit(*rest, code=code_, size=size)
        return ctx.get_dummy_value()

    return types.void(native, rows, widest, lanes, index_bytes, code, out_bytes, *[_int] * 12), gen


class _Tile:
    """G rows times V vectors of sums in registers."""

    def __init__(self, b, way, G: int, V: int, L: int, B: int):
        self.b, self.way, self.G, self.V, self.L, self.B = b, way, G, V, L, B
        self.chains = max(1, min(4, _CHAINS // (G * V)))

    def emit(self, stop, start, index, value, panel, unit, y, y_row, present, bias, bias_step, *, code: int, size: int):
        """All runs, then bias, activation and rounding."""
        b, G, V, L = self.b, self.G, self.V, self.L
        sums = self.product(stop, start, index, value, panel, unit)
        for r in range(G):
            with b.if_then(b.icmp_signed("<", _n(r), present), likely=True):
                add = _splat(b, _load(b, b.add(bias, b.mul(bias_step, _n(r))), _F32, 4), L)
                for v in range(V):
                    x = activations.emit(Vector(b, L), code, b.fadd(sums[r * V + v], add))
                    x = x if size == 4 else _rounded(b, x, L, self.way is Bfloat16Dot)
                    _store(b, x, b.add(b.add(y, b.mul(y_row, _n(r))), _n(size * L * v)), size)

    def product(self, stop, start, index, value, panel, unit) -> list:
        """The sums of all runs, several at once where a tile alone would wait for its own sums."""
        b, chains, count = self.b, self.chains, self.G * self.V
        zero = ir.Constant(ir.VectorType(_F32, self.L), None)
        loop, now = _Loop(b, start, stop, chains, [zero] * (count * chains)), []
        for c in range(chains):
            now += self.run(b.add(loop.i, _n(c)), index, value, panel, unit, loop.values[c * count : (c + 1) * count])
        sums = loop.close(now)
        if chains > 1:
            loop = _Loop(b, loop.i, stop, 1, sums)
            sums = loop.close(self.run(loop.i, index, value, panel, unit, loop.values[:count]) + loop.values[count:])
        for c in range(1, chains):
            sums = [b.fadd(sums[k], sums[c * count + k]) for k in range(count)] + sums[count:]
        return sums

    def run(self, e, index, value, panel, unit, sums) -> list:
        """Add the columns of one run to the sums."""
        b, way, size = self.b, self.way, self.B
        at = b.add(index, b.mul(e, _n(way.DEPTH * size)))
        columns = [
            b.zext(_load(b, b.add(at, _n(size * j)), ir.IntType(8 * size), size), _I64) for j in range(way.DEPTH)
        ]
        xs = way.vectors_of(b, [b.add(panel, b.mul(column, unit)) for column in columns], self.V, self.L)
        weights, out = b.add(value, b.mul(e, _n(4 * self.G))), []
        for r in range(self.G):
            w = way.weights(b, _load(b, b.add(weights, _n(4 * r)), _I32, 4), self.L)
            out += [way.add(b, total, w, x) for total, x in zip(sums[r * self.V : (r + 1) * self.V], xs)]
        return out
