"""Depthwise convolution of one plane, as vector code.

`walk` goes down the lines of the input once: a line that is loaded adds to every output line it touches, whose sums
wait in registers; `stride` does so for stride 2. `fold` takes several lines of a narrow image into one vector. `slide`
computes one vector of outputs after the other and takes any stride and dilation.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.conv_lanes import bounded, columns_inside, every_second, gathered, strided_inside
from gossamer.kernels.cpu.lanes import (
    _F32,
    _I1,
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


def _parts(kernel: int, vectors: int) -> int:
    """Partial sums per output, so that chains of additions (four cycles each) do not set the pace."""
    if vectors == 1:
        return {3: 3, 5: 2}.get(kernel, 1)
    return 2 if (kernel, vectors) == (3, 2) else 1


def _at_least(b, x, low):
    return b.select(b.icmp_signed("<", x, low), low, x)


def _at_most(b, x, high):
    return b.select(b.icmp_signed(">", x, high), high, x)


def _deliver(b, total, place, y, residual, wanted, low, up):
    """Add the residual, bound, and store one vector of outputs at byte `place`; all lanes, or the wanted ones."""
    kind, L = total.type, total.type.count
    if residual is not None:
        at = b.add(residual, place)
        total = b.fadd(total, _load(b, at, kind, 4) if wanted is None else _masked_load(b, at, wanted, L))
    total, at = bounded(b, total, low, up), b.add(y, place)
    if wanted is None:
        _store(b, total, at, 4)
    else:
        _masked_store(b, total, at, wanted, L)


@intrinsic(prefer_literal=True)
def walk(
    typing, kernel, left, right, vectors, lanes, narrow, add,
    x, y, w, bias, residual, high, wide, out_high, out_wide, top, column, low, up,
):  # fmt: skip
    """Output columns column.. of one plane, `vectors` of them, for a square kernel of stride 1.

    Wide images end in a full vector that may overlap its neighbour, so that only taps that reach over the edge need
    a mask; narrow ones (out_wide < lanes) mask everything. `left` and `right` are the padding there.
    """
    K, left_, right_, V, L, small, adding = (
        t.literal_value for t in (kernel, left, right, vectors, lanes, narrow, add)
    )
    parts, kind = _parts(K, V), ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        x, y, w, bias, residual, high, wide, out_high, out_wide, top, column, low, up = args[7:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        weights = [[_splat(b, _load(b, b.add(w, _n(4 * (K * i + j))), _F32, 4), L) for j in range(K)] for i in range(K)]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, zero = _splat(b, _load(b, bias, _F32, 4), L), ir.Constant(kind, None)
        last = b.sub(out_wide, _n(L))
        firsts = [column] if small else [_at_most(b, b.add(column, _n(L * v)), last) for v in range(V)]
        wanted = _lane_mask(b, out_wide, L) if small else None

        def mask_of(v, j):
            edge = (v == 0 and j < left_) or (v == V - 1 and j >= K - right_)
            if not (small or edge):
                return None
            return columns_inside(b, b.add(firsts[v], _n(j - left_)), wide, L)

        masks = [[mask_of(v, j) for j in range(K)] for v in range(V)]
        offsets = [b.mul(b.sub(first, _n(left_)), _n(4)) for first in firsts]
        y_offsets = [b.mul(first, _n(4)) for first in firsts]
        fresh = [start] + [zero] * (parts - 1)

        def store(sums, line):
            for v in range(V):
                total = sums[v * parts]
                for p in range(1, parts):
                    total = b.fadd(total, sums[v * parts + p])
                place = b.add(b.mul(b.mul(line, out_wide), _n(4)), y_offsets[v])
                _deliver(b, total, place, y, residual if adding else None, wanted, low, up)

        # Slot 0 is the output line that this input line completes, slot K - 1 the one it begins.
        size = V * parts
        loop = _Loop(b, _n(0), high, 1, fresh * V * K)
        sums = list(loop.values)
        line = b.add(x, b.mul(b.mul(loop.i, wide), _n(4)))
        for j in range(K):
            for v in range(V):
                at, mask = b.add(line, b.add(offsets[v], _n(4 * j))), masks[v][j]
                taken = _load(b, at, kind, 4) if mask is None else _masked_load(b, at, mask, L)
                for i in range(K):
                    k = (K - 1 - i) * size + v * parts + j % parts
                    sums[k] = b.call(fma, [weights[i][j], taken, sums[k]])
        done = b.add(loop.i, b.sub(top, _n(K - 1)))
        wants = b.and_(b.icmp_signed(">=", done, _n(0)), b.icmp_signed("<", done, out_high))
        with b.if_then(wants, likely=True):
            store(sums[:size], done)
        sums = loop.close(sums[size:] + fresh * V)
        for s in range(K - 1):
            done = b.add(b.add(high, top), _n(s - (K - 1)))
            wants = b.and_(b.icmp_signed(">=", done, _n(0)), b.icmp_signed("<", done, out_high))
            with b.if_then(wants):
                store(sums[s * size : (s + 1) * size], done)
        return ctx.get_dummy_value()

    return types.void(kernel, left, right, vectors, lanes, narrow, add, *[_int] * 13), gen


@intrinsic(prefer_literal=True)
def stride(
    typing, kernel, left, vectors, lanes, narrow, add,
    x, y, w, bias, residual, nothing, high, wide, out_high, out_wide, top, column, low, up,
):  # fmt: skip
    """`walk` for stride 2: two input lines a step, of which a pair of loads gives the even and the odd columns.

    Lines above and below the image are read from `nothing`, a line of zeros.
    """
    K, left_, V, L, small, adding = (t.literal_value for t in (kernel, left, vectors, lanes, narrow, add))
    slots, parts, kind = (K + 1) // 2, 3 if vectors.literal_value == 1 else 1, ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        x, y, w, bias, residual, nothing, high, wide, out_high, out_wide, top, column, low, up = args[6:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        weights = [[_splat(b, _load(b, b.add(w, _n(4 * (K * i + j))), _F32, 4), L) for j in range(K)] for i in range(K)]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, zero = _splat(b, _load(b, bias, _F32, 4), L), ir.Constant(kind, None)
        last = b.sub(out_wide, _n(L))
        firsts = [column] if small else [_at_most(b, b.add(column, _n(L * v)), last) for v in range(V)]
        wanted = _lane_mask(b, out_wide, L) if small else None
        reads = [b.sub(b.mul(first, _n(2)), _n(left_)) for first in firsts]

        def mask_of(v, q, half):
            # The second load of the last vector may reach one column beyond what its taps need.
            edge = (v == 0 and half == 0 and q < left_) or (v == V - 1 and half == 1)
            if not (small or edge):
                return None
            return columns_inside(b, b.add(reads[v], _n(q + half * L)), wide, L)

        masks = {(v, q, half): mask_of(v, q, half) for v in range(V) for q in range(0, K, 2) for half in range(2)}
        offsets = [b.mul(read, _n(4)) for read in reads]
        y_offsets = [b.mul(first, _n(4)) for first in firsts]
        fresh = [start] + [zero] * (parts - 1)

        def taken(line, v, q, half):
            at, mask = b.add(line, b.add(offsets[v], _n(4 * (q + half * L)))), masks[v, q, half]
            return _load(b, at, kind, 4) if mask is None else _masked_load(b, at, mask, L)

        size = V * parts
        loop = _Loop(b, _n(0), b.add(out_high, _n(slots - 1)), 1, fresh * V * slots)
        sums = list(loop.values)
        for phase in range(2):
            row = b.sub(b.add(b.mul(loop.i, _n(2)), _n(phase)), top)
            real = b.icmp_unsigned("<", row, high)
            line = b.select(real, b.add(x, b.mul(b.mul(row, wide), _n(4))), nothing)
            for v in range(V):
                for q in range(0, K, 2):
                    both = [taken(line, v, q, half) for half in range(2)]
                    for odd in range(min(2, K - q)):
                        column_of_x = every_second(b, *both, odd, L)
                        for i in range(phase, K, 2):
                            k = (slots - 1 - i // 2) * size + v * parts + (q + odd) % parts
                            sums[k] = b.call(fma, [weights[i][q + odd], column_of_x, sums[k]])
        done = b.sub(loop.i, _n(slots - 1))
        with b.if_then(b.icmp_signed(">=", done, _n(0)), likely=True):
            for v in range(V):
                total = sums[v * parts]
                for p in range(1, parts):
                    total = b.fadd(total, sums[v * parts + p])
                place = b.add(b.mul(b.mul(done, out_wide), _n(4)), y_offsets[v])
                _deliver(b, total, place, y, residual if adding else None, wanted, low, up)
        loop.close(sums[size:] + fresh * V)
        return ctx.get_dummy_value()

    return types.void(kernel, left, vectors, lanes, narrow, add, *[_int] * 14), gen


def _ceil_div(b, x, y):
    """ceil(x / y) for x >= 0."""
    return b.sdiv(b.add(x, b.sub(y, _n(1))), y)


@intrinsic(prefer_literal=True)
def fold(
    typing, kernel, lanes, add,
    room, y, w, bias, residual, masks, left, wide, together, out_high, low, up,
):  # fmt: skip
    """One plane of narrow images, stride 1: a vector holds `together` output lines, one after the other.

    room holds the plane, as wide as the output, with its padding above and below; masks holds the bits of the lanes
    whose column is real for each kx.
    """
    K, L, adding = kernel.literal_value, lanes.literal_value, add.literal_value
    parts, kind, bits = min(K, 3), ir.VectorType(_F32, L), ir.VectorType(_I1, L)

    def gen(ctx, b, sig, args):
        room, y, w, bias, residual, masks, left, wide, together, out_high, low, up = args[3:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        weights = [[_splat(b, _load(b, b.add(w, _n(4 * (K * i + j))), _F32, 4), L) for j in range(K)] for i in range(K)]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, zero = _splat(b, _load(b, bias, _F32, 4), L), ir.Constant(kind, None)
        real = [b.bitcast(_load(b, b.add(masks, _n(8 * j)), ir.IntType(L), 2), bits) for j in range(K)]
        first, line = b.sub(room, b.mul(left, _n(4))), b.mul(wide, _n(4))
        loop = _Loop(b, _n(0), b.sdiv(b.add(out_high, b.sub(together, _n(1))), together), 1, [])
        top = b.mul(loop.i, together)
        at = b.add(first, b.mul(top, line))
        sums = [start] + [zero] * (parts - 1)
        for i in range(K):
            for j in range(K):
                taken = _masked_load(b, b.add(at, _n(4 * j)), real[j], L)
                sums[j % parts] = b.call(fma, [weights[i][j], taken, sums[j % parts]])
            at = b.add(at, line)
        total = sums[0]
        for more in sums[1:]:
            total = b.fadd(total, more)
        rows = _at_most(b, b.sub(out_high, top), together)
        wanted = _lane_mask(b, b.mul(rows, wide), L)
        _deliver(b, total, b.mul(top, line), y, residual if adding else None, wanted, low, up)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(kernel, lanes, add, *[_int] * 12), gen


@intrinsic(prefer_literal=True)
def slide(
    typing, step, lanes, add,
    x, y, w, bias, residual, high, wide, out_high, out_wide, kernel_high, kernel_wide,
    stride_high, stride_wide, dilation_high, dilation_wide, top, left, column, low, up,
):  # fmt: skip
    """One vector of output columns, column.., for all output lines of a plane, with any window.

    `step` is 1 for columns that follow each other, 0 for any stride.
    """
    S, L, adding = (t.literal_value for t in (step, lanes, add))
    kind = ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        (
            x, y, w, bias, residual, high, wide, out_high, out_wide, kernel_high, kernel_wide,
            stride_high, stride_wide, dilation_high, dilation_wide, top, left, column, low, up,
        ) = args[3:]  # fmt: skip
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, wanted = _splat(b, _load(b, bias, _F32, 4), L), _lane_mask(b, b.sub(out_wide, column), L)
        first = b.sub(b.mul(column, stride_wide), left)

        def taps(line, weights, total):
            loop = _Loop(b, _n(0), kernel_wide, 1, [total])
            reach = b.mul(loop.i, dilation_wide)
            at = b.add(line, b.mul(reach, _n(4)))
            if S == 1:
                taken = _masked_load(b, at, columns_inside(b, b.add(first, reach), wide, L), L)
            else:
                inside = strided_inside(b, b.add(first, reach), stride_wide, wide, L)
                taken = gathered(b, at, b.mul(stride_wide, _n(4)), inside, L)
            weight = _splat(b, _load(b, b.add(weights, b.mul(loop.i, _n(4))), _F32, 4), L)
            return loop.close([b.call(fma, [weight, taken, loop.values[0]])])[0]

        lines = _Loop(b, _n(0), out_high, 1, [])
        above = b.sub(b.mul(lines.i, stride_high), top)
        k0 = _ceil_div(b, _at_least(b, b.neg(above), _n(0)), dilation_high)
        k1 = _at_most(b, _ceil_div(b, _at_least(b, b.sub(high, above), _n(0)), dilation_high), kernel_high)
        down = _Loop(b, k0, k1, 1, [start])
        at = b.mul(b.add(above, b.mul(down.i, dilation_high)), wide)
        line = b.add(x, b.mul(b.add(at, first), _n(4)))
        weights = b.add(w, b.mul(b.mul(down.i, kernel_wide), _n(4)))
        total = down.close([taps(line, weights, down.values[0])])[0]
        place = b.mul(b.add(b.mul(lines.i, out_wide), column), _n(4))
        _deliver(b, total, place, y, residual if adding else None, wanted, low, up)
        lines.close([])
        return ctx.get_dummy_value()

    return types.void(step, lanes, add, *[_int] * 20), gen
