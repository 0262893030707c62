"""The register tile of products in bfloat16 and 8-bit integers: runs of one row group times a few vectors of positions.

A dot-product instruction multiplies two bfloat16 (four 8-bit) numbers per lane with those of another register and adds
them to a sum of 32 bits. The weights of a run stand side by side, so one broadcast brings them; x lies as plain rows,
of which those that a run names are interleaved in registers, once for all rows of the group.
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
    _I8,
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


def _interleaved(b, x, y, lanes: int) -> list:
    """x0 y0 x1 y1 ... of two vectors, in one vector, or in two where one register of so many floats is too short."""
    n = x.type.count
    order = [place for lane in range(n) for place in (lane, n + lane)]
    if n * x.type.element.width < 32 * lanes:
        return [_shuffle(b, x, y, order)]
    return [_shuffle(b, x, y, order[:n]), _shuffle(b, x, y, order[n:])]


def _rows_of(b, rows, vectors: int, lanes: int, item):
    """The same positions of several rows of x: whole registers, then what is left over."""
    fit, done = 32 // item.width, 0
    while done < vectors:
        take = min(fit, vectors - done)
        take = take if take in (1, 2, 4) else 2
        kind, size = ir.VectorType(item, take * lanes), item.width // 8
        yield [_load(b, b.add(row, _n(size * lanes * done)), kind, size) for row in rows]
        done += take


class Bfloat16Dot:
    """AVX-512's bfloat16 dot product, on two rows of x."""

    DEPTH, BYTES, SUM = 2, 2, _F32

    @staticmethod
    def vectors_of(b, rows, vectors: int, lanes: int) -> list:
        """Rows of x interleaved, one vector for each vector of positions."""
        return [v for pair in _rows_of(b, rows, vectors, lanes, _I16) for v in _interleaved(b, *pair, lanes)]

    @staticmethod
    def weights(b, word, lanes: int):
        """The numbers of one row and run, ready to be multiplied."""
        return b.bitcast(_splat(b, word, lanes), ir.VectorType(_I16, 2 * lanes))

    @staticmethod
    def add(b, total, weights, x):
        """One more run added to the sums of one row and vector."""
        return dot_pairs(b, total, weights, x)


class Int8Dot:
    """AVX-512's dot product of unsigned and signed 8-bit integers, on four rows of x."""

    DEPTH, BYTES, SUM = 4, 1, _I32

    @staticmethod
    def vectors_of(b, rows, vectors: int, lanes: int) -> list:
        out = []
        for four in _rows_of(b, rows, vectors, lanes, _I8):
            halves = [_interleaved(b, *two, lanes) for two in (four[:2], four[2:])]
            for pair in zip(*halves):
                words = [b.bitcast(v, ir.VectorType(_I16, v.type.count // 2)) for v in pair]
                out += _interleaved(b, *words, lanes)
        return [b.bitcast(v, ir.VectorType(_I32, lanes)) for v in out]

    @staticmethod
    def weights(b, word, lanes: int):
        return _splat(b, word, lanes)

    @staticmethod
    def add(b, total, weights, x):
        kind = total.type
        return b.call(_declare(b, "llvm.x86.avx512.vpdpbusd.512", kind, kind, kind, kind), [total, x, weights])


class Bfloat16Wide:
    """Multiply-adds in float32 on any processor: a bfloat16 is the upper half of a float32."""

    DEPTH, BYTES, SUM = 2, 2, _F32

    @staticmethod
    def vectors_of(b, rows, vectors: int, lanes: int) -> list:
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


class Int8Wide:
    """Products of 32-bit integers, on any processor."""

    DEPTH, BYTES, SUM = 4, 1, _I32

    @staticmethod
    def vectors_of(b, rows, vectors: int, lanes: int) -> list:
        kind, wide = ir.VectorType(_I8, lanes), ir.VectorType(_I32, lanes)
        return [[b.zext(_load(b, b.add(row, _n(lanes * v)), kind, 1), wide) for row in rows] for v in range(vectors)]

    @staticmethod
    def weights(b, word, lanes: int):
        ends = [b.shl(word, ir.Constant(_I32, 24 - 8 * j)) for j in range(4)]
        return [_splat(b, b.ashr(end, ir.Constant(_I32, 24)), lanes) for end in ends]

    @staticmethod
    def add(b, total, weights, x):
        for w, each in zip(weights, x):
            total = b.add(total, b.mul(w, each))
        return total


# By 2 x (8-bit integers) + (the processor has the dot product).
WAYS = (Bfloat16Wide, Bfloat16Dot, Int8Wide, Int8Dot)


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
    typing, way, rows, widest, lanes, index_bytes, code, out_bytes, masked,
    vectors, stop, start, index, value, panel, unit, y, y_row, present, bias, bias_step, offset, scale, x_scale, mask,
):  # fmt: skip
    """y[r, :] = act(bias[r] + sum over runs e and their columns j of value[e, r, j] * panel[index[e, j] * unit, :]).

    `vectors` (1 to `widest`) is chosen at run time. Only the first `present` rows of the group are written, and only
    their biases read. Strides are in bytes. Integer sums start from offset[r] and are scaled by scale[r] * x_scale[:].
    `masked` results are zero wherever mask[:] is 0 rather than -1.
    """
    W = widest.literal_value
    shape = [t.literal_value for t in (lanes, index_bytes, code, out_bytes, masked)]

    def gen(ctx, b, sig, args):
        vectors, stop, start, index, value, panel, unit, *rest = args[8:]
        for V in range(1, W + 1):
            with b.if_then(b.icmp_signed("==", vectors, _n(V))):
                tile = _Tile(b, WAYS[way.literal_value], rows.literal_value, V, *shape)
                sums = tile.product(stop, start, index, value, panel, unit, rest[5])
                tile.finish(sums, *rest)
        return ctx.get_dummy_value()

    return types.void(way, rows, widest, lanes, index_bytes, code, out_bytes, masked, *[_int] * 16), gen


class _Tile:
    """G rows times V vectors of sums in registers."""

    def __init__(self, b, way, G: int, V: int, L: int, B: int, code: int, size: int, masked: int):
        self.b, self.way, self.G, self.V, self.L, self.B = b, way, G, V, L, B
        self.code, self.size, self.masked = code, size, masked
        self.chains = max(1, min(4, _CHAINS // (G * V)))

    def product(self, stop, start, index, value, panel, unit, offset) -> list:
        """The sums of all runs, several at once where a tile alone would wait for its own sums."""
        b, chains, count = self.b, self.chains, self.G * self.V
        zeros = [ir.Constant(ir.VectorType(self.way.SUM, self.L), None)] * count
        first = self.offsets(offset) if self.way.SUM is _I32 else zeros
        loop, now = _Loop(b, start, stop, chains, first + zeros * (chains - 1)), []
        for c in range(chains):
            now += self.run(b.add(loop.i, _n(c)), index, value, panel, unit, loop.values[c * count : (c + 1) * count])
        sums = loop.close(now)
        if chains > 1:
            loop = _Loop(b, loop.i, stop, 1, sums)
            sums = loop.close(self.run(loop.i, index, value, panel, unit, loop.values[:count]) + loop.values[count:])
        plus = b.add if self.way.SUM is _I32 else b.fadd
        for c in range(1, chains):
            sums = [plus(sums[k], sums[c * count + k]) for k in range(count)] + sums[count:]
        return sums[:count]

    def offsets(self, offset) -> list:
        """What integer sums start from."""
        b = self.b
        rows = [_splat(b, _load(b, b.add(offset, _n(4 * r)), _I32, 4), self.L) for r in range(self.G)]
        return [row for row in rows for _ in range(self.V)]

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

    def finish(self, sums, y, y_row, present, bias, bias_step, offset, scale, x_scale, mask) -> None:
        """Scales, bias, activation, mask and rounding, and the rows that exist written."""
        b, V = self.b, self.V
        for r in range(self.G):
            with b.if_then(b.icmp_signed("<", _n(r), present), likely=True):
                add = self.spread(bias, b.mul(bias_step, _n(r)))
                row = b.add(y, b.mul(y_row, _n(r)))
                for v in range(V):
                    x = sums[r * V + v]
                    if self.way.SUM is _I32:
                        by = b.fmul(self.spread(scale, _n(4 * r)), self.vector(x_scale, v, _F32))
                        x = b.fmul(b.sitofp(x, by.type), by)
                    x = activations.emit(Vector(b, self.L), self.code, b.fadd(x, add))
                    if self.masked:
                        keep = self.vector(mask, v, _I32)
                        x = b.bitcast(b.and_(b.bitcast(x, keep.type), keep), x.type)
                    x = x if self.size == 4 else _rounded(b, x, self.L, self.way is Bfloat16Dot)
                    _store(b, x, b.add(row, _n(self.size * self.L * v)), self.size)

    def spread(self, address, offset):
        """The float there, in every lane."""
        return _splat(self.b, _load(self.b, self.b.add(address, offset), _F32, 4), self.L)

    def vector(self, address, v: int, kind):
        """Vector v of the 32-bit numbers there."""
        return _load(self.b, self.b.add(address, _n(4 * self.L * v)), ir.VectorType(kind, self.L), 4)
