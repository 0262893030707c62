"""The register tile of the sparse product: entries of one row group times a few vectors of positions.

A core loads two vectors a cycle and does two multiply-adds a cycle, so every load that is not a vector of x costs. Four
entries therefore share one load of their indices and one of their values, spread in registers.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.lanes import _F32, _I32, _I64, _declare, _int, _load, _Loop, _n, _splat, _store

# Entries whose indices and values are loaded together.
_TOGETHER = 4


def _kept_in_register(b, value, constraint: str):
    """The same value, which LLVM may no longer replace by a load per use: it would undo the sharing of loads."""
    return b.asm(ir.FunctionType(value.type, [value.type]), "", f"={constraint},0", [value], False)


def _places(b, index, e, size: int) -> list:
    """The indices of four entries from one or two 64-bit loads."""
    each, places = 8 // size, []
    for first in range(0, _TOGETHER, each):
        word = _load(b, b.add(index, b.mul(b.add(e, _n(first)), _n(size))), _I64, size)
        word = _kept_in_register(b, word, "r")
        places += [b.and_(b.lshr(word, _n(8 * size * u)), _n(2 ** (8 * size) - 1)) for u in range(each)]
    return places


def _weights(b, value, e, lanes: int) -> list:
    """The values of four entries, each spread over a vector: one load, then a shuffle within quarters for each."""
    four = ir.VectorType(_F32, 4)
    quads, undefined = max(1, lanes // 4), ir.Constant(four, ir.Undefined)
    numbers = ir.Constant(ir.VectorType(_I32, lanes), list(range(4)) * quads)
    loaded = b.shuffle_vector(_load(b, b.add(value, b.mul(e, _n(4))), four, 4), undefined, numbers)
    if lanes > 4:
        loaded = _kept_in_register(b, loaded, "v" if lanes == 16 else "x")
    nothing = ir.Constant(loaded.type, ir.Undefined)
    spread = [[4 * (lane // 4) + u for lane in range(lanes)] for u in range(_TOGETHER)]
    return [b.shuffle_vector(loaded, nothing, ir.Constant(ir.VectorType(_I32, lanes), p)) for p in spread]


def _start(b, bias, bias_step, base, y_row, kind, places: list, vectors: int, lanes: int) -> list:
    """Sums start from the bias of their row, plus what stands at `base` when that is not zero."""
    biases = [_splat(b, _load(b, b.add(bias, b.mul(bias_step, r)), _F32, 4), lanes) for r in places]
    before = b.block
    resume, ready = b.append_basic_block("resume"), b.append_basic_block("ready")
    b.cbranch(b.icmp_signed("!=", base, _n(0)), resume, ready)
    b.position_at_end(resume)
    at = [b.add(b.add(base, b.mul(y_row, r)), _n(4 * lanes * v)) for r in places for v in range(vectors)]
    loaded = [b.fadd(_load(b, place, kind, 4), biases[i // vectors]) for i, place in enumerate(at)]
    b.branch(ready)
    b.position_at_end(ready)
    sums = []
    for i, value in enumerate(loaded):
        phi = b.phi(kind)
        phi.add_incoming(biases[i // vectors], before)
        phi.add_incoming(value, resume)
        sums.append(phi)
    return sums


def _finish(b, sums, bounds, kind, lanes: int) -> list:
    """Sums between the two bounds at an address; NaN stays. No bounds when the address is zero."""
    before = b.block
    clamp, ready = b.append_basic_block("clamp"), b.append_basic_block("clamped")
    b.cbranch(b.icmp_signed("!=", bounds, _n(0)), clamp, ready)
    b.position_at_end(clamp)
    low, high = (_splat(b, _load(b, b.add(bounds, _n(4 * i)), _F32, 4), lanes) for i in (0, 1))
    inside = []
    for x in sums:
        x = b.select(b.fcmp_ordered("<", x, low), low, x)
        inside.append(b.select(b.fcmp_ordered(">", x, high), high, x))
    b.branch(ready)
    b.position_at_end(ready)
    out = []
    for x, bounded in zip(sums, inside):
        phi = b.phi(kind)
        phi.add_incoming(x, before)
        phi.add_incoming(bounded, clamp)
        out.append(phi)
    return out


@intrinsic(prefer_literal=True)
def product_tile(
    typing, rows, vectors, lanes, index_bytes, ordered,
    stop, start, index, value, panel, unit, y, y_row, base, bias, bias_step, bounds, order,
):  # fmt: skip
    """y[r, :] = clamp(bias[r] + base[r, :] + sum over entries e of value[e, r] * panel[index[e] * unit, :]).

    `base` (rows lie as far apart as those of y) and `bounds` (two floats) are left out when zero. Strides are in bytes.
    With `ordered` row r is row order[r] of y, base and bias (int64); else `order` is not read.
    """
    G, V, L, B, sorts = (t.literal_value for t in (rows, vectors, lanes, index_bytes, ordered))
    # Two multiply-adds start every cycle and each takes four: eight independent sums keep the core busy.
    chains = 1 if G > 1 or V > 5 else min(_TOGETHER, -(-8 // V))
    kind, size = ir.VectorType(_F32, L), G * V

    def gen(ctx, b, sig, args):
        stop, start, index, value, panel, unit, y, y_row, base, bias, bias_step, bounds, order = args[5:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)

        def add(sums, place, weights):
            x = b.add(panel, b.mul(place, unit))
            sums = list(sums)
            xs = [_load(b, b.add(x, _n(4 * L * v)), kind, 4) for v in range(V)]
            for r in range(G):
                for v in range(V):
                    sums[r * V + v] = b.call(fma, [weights[r], xs[v], sums[r * V + v]])
            return sums

        def weights_of(e):
            at = b.add(value, b.mul(e, _n(4 * G)))
            return [_splat(b, _load(b, b.add(at, _n(4 * r)), _F32, 4), L) for r in range(G)]

        at = [_load(b, b.add(order, _n(8 * r)), _I64, 8) if sorts else _n(r) for r in range(G)]
        sums = _start(b, bias, bias_step, base, y_row, kind, at, V, L)
        sums = sums + [ir.Constant(kind, None)] * (size * (chains - 1))
        loop = _Loop(b, start, stop, _TOGETHER, sums)
        now, places = list(loop.values), _places(b, index, loop.i, B)
        together = [[w] for w in _weights(b, value, loop.i, L)] if G == 1 else None
        for u in range(_TOGETHER):
            c = (u % chains) * size
            weights = together[u] if together else weights_of(b.add(loop.i, _n(u)))
            now[c : c + size] = add(now[c : c + size], places[u], weights)
        sums = loop.close(now)
        loop = _Loop(b, loop.i, stop, 1, sums)
        raw = _load(b, b.add(index, b.mul(loop.i, _n(B))), ir.IntType(8 * B), B)
        one = add(loop.values[:size], b.zext(raw, _I64), weights_of(loop.i))
        sums = loop.close(one + loop.values[size:])
        for c in range(1, chains):
            sums = [b.fadd(sums[k], sums[c * size + k]) for k in range(size)] + sums[size:]
        for i, x in enumerate(_finish(b, sums[:size], bounds, kind, L)):
            _store(b, x, b.add(b.add(y, b.mul(y_row, at[i // V])), _n(4 * L * (i % V))), 4)
        return ctx.get_dummy_value()

    return types.void(rows, vectors, lanes, index_bytes, ordered, *[_int] * 13), gen
