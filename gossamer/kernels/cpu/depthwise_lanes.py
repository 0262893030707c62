"""Depthwise convolution of one plane, as vector code.

`walk` goes down the lines of the input once: a line that is loaded adds to every output line it touches, whose sums
wait in registers; `stride` does so for stride 2. `slide` computes one vector of outputs after the other and takes any
stride and dilation. `depthwise_small` has more for small planes.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.conv_lanes import bounded, columns_inside, gathered, strided_inside
from gossamer.kernels.cpu.lanes import (
    _F32,
    _I1,
    _I32,
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


def at_most(b, x, high):
    """The smaller of two integers."""
    return b.select(b.icmp_signed(">", x, high), high, x)


def deliver(b, total, place, y, residual, wanted, low, up):
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
    a mask; narrow ones (out_wide < lanes) mask everything, and where a vector holds a whole line (`narrow` is 2) it
    is loaded once and moved by lanes for the other taps. `left` and `right` are the padding there.
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
        firsts = [column] if small else [at_most(b, b.add(column, _n(L * v)), last) for v in range(V)]
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
                deliver(b, total, place, y, residual if adding else None, wanted, low, up)

        # Slot 0 is the output line that this input line completes, slot K - 1 the one it begins.
        size = V * parts
        loop = _Loop(b, _n(0), high, 1, fresh * V * K)
        sums = list(loop.values)
        line = b.add(x, b.mul(b.mul(loop.i, wide), _n(4)))
        whole = _masked_load(b, line, columns_inside(b, _n(0), wide, L), L) if small == 2 else None
        for j in range(K):
            for v in range(V):
                at, mask = b.add(line, b.add(offsets[v], _n(4 * j))), masks[v][j]
                if whole is not None:
                    columns = (lane + j - left_ for lane in range(L))
                    taken = b.shuffle_vector(whole, zero, lane_numbers([c if 0 <= c < L else L for c in columns]))
                else:
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
    typing, kernel, left, lanes, narrow, add,
    x, y, w, bias, residual, nothing, high, wide, out_high, out_wide, top, column, low, up,
):  # fmt: skip
    """`walk` of one vector for stride 2: two input lines a step; a pair of loads gives their even and odd columns.

    Taps further left or right are those columns moved by a lane, for loads that cross cache lines are dear. Outputs
    wait in the order in which columns are cheapest to take apart (`_apart`). Lines above and below the image are read
    from `nothing`, a line of zeros.
    """
    K, left_, L, small, adding = (t.literal_value for t in (kernel, left, lanes, narrow, add))
    slots, parts, kind = (K + 1) // 2, 3, ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        x, y, w, bias, residual, nothing, high, wide, out_high, out_wide, top, column, low, up = args[5:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        weights = [[_splat(b, _load(b, b.add(w, _n(4 * (K * i + j))), _F32, 4), L) for j in range(K)] for i in range(K)]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, zero = _splat(b, _load(b, bias, _F32, 4), L), ir.Constant(kind, None)
        first = column if small else at_most(b, column, b.sub(out_wide, _n(L)))
        wanted = _lane_mask(b, out_wide, L) if small else None
        reads, y_offset = b.mul(first, _n(2)), b.mul(first, _n(4))

        def mask_of(half):
            # The second load may reach beyond the line.
            if not small and half == 0:
                return None
            return columns_inside(b, b.add(reads, _n(half * L)), wide, L)

        masks, order = [mask_of(half) for half in range(2)], _apart(L)
        # How many outputs aside the column of each tap stands, and where the one that enters a vector comes from.
        asides = [divmod(j - left_, 2) for j in range(K)]
        entering = {
            (aside, odd): b.add(reads, _n((-2 if aside < 0 else 2 * L) + odd))
            for aside, odd in asides
            if aside and not small
        }
        inside = {key: b.icmp_unsigned("<", place, wide) for key, place in entering.items()}
        places = {key: b.mul(b.select(inside[key], place, _n(0)), _n(4)) for key, place in entering.items()}
        bits = ir.VectorType(_I1, L)
        entry = {aside: [j + aside in (-1, L) for j in order] for aside in (-1, 1)}
        enters = {
            key: b.select(inside[key], ir.Constant(bits, entry[key[0]]), ir.Constant(bits, [False] * L))
            for key in entering
        }
        fresh = [start] + [zero] * (parts - 1)

        def taken(line, half):
            at, mask = b.add(line, b.mul(b.add(reads, _n(half * L)), _n(4))), masks[half]
            return _load(b, at, kind, 4) if mask is None else _masked_load(b, at, mask, L)

        def moved(line, columns, aside, odd):
            """The columns next to these; what enters from beyond a narrow image is zero or does not matter."""
            if not aside:
                return columns
            near = [order.index(j + aside) if 0 <= j + aside < L else L for j in order]
            columns = b.shuffle_vector(columns, zero, lane_numbers(near))
            if small:
                return columns
            entered = _splat(b, _load(b, b.add(line, places[aside, odd]), _F32, 4), L)
            return b.select(enters[aside, odd], entered, columns)

        loop = _Loop(b, _n(0), b.add(out_high, _n(slots - 1)), 1, fresh * slots)
        sums = list(loop.values)
        for phase in range(2):
            row = b.sub(b.add(b.mul(loop.i, _n(2)), _n(phase)), top)
            real = b.icmp_unsigned("<", row, high)
            line = b.select(real, b.add(x, b.mul(b.mul(row, wide), _n(4))), nothing)
            both = [taken(line, half) for half in range(2)]
            halves = [b.shuffle_vector(*both, lane_numbers([2 * j + odd for j in order])) for odd in range(2)]
            for j, (aside, odd) in enumerate(asides):
                column_of_x = moved(line, halves[odd], aside, odd)
                for i in range(phase, K, 2):
                    k = (slots - 1 - i // 2) * parts + j % parts
                    sums[k] = b.call(fma, [weights[i][j], column_of_x, sums[k]])
        done = b.sub(loop.i, _n(slots - 1))
        with b.if_then(b.icmp_signed(">=", done, _n(0)), likely=True):
            total = sums[0]
            for p in range(1, parts):
                total = b.fadd(total, sums[p])
            total = b.shuffle_vector(total, zero, lane_numbers([order.index(j) for j in range(L)]))
            place = b.add(b.mul(b.mul(done, out_wide), _n(4)), y_offset)
            deliver(b, total, place, y, residual if adding else None, wanted, low, up)
        loop.close(sums[parts:] + fresh)
        return ctx.get_dummy_value()

    return types.void(kernel, left, lanes, narrow, add, *[_int] * 14), gen


def _apart(lanes: int) -> list[int]:
    """Outputs in the order that shuffles within 128 bits give: two of the first vector of pixels, two of the second."""
    return [2 * q + half * (lanes // 2) + odd for q in range(lanes // 4) for half in range(2) for odd in range(2)]


def lane_numbers(numbers):
    """The constant by which `shuffle_vector` takes these lanes."""
    return ir.Constant(ir.VectorType(_I32, len(numbers)), list(numbers))


def _ceil_div(b, x, y):
    """ceil(x / y) for x >= 0."""
    return b.sdiv(b.add(x, b.sub(y, _n(1))), y)


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
        k1 = at_most(b, _ceil_div(b, _at_least(b, b.sub(high, above), _n(0)), dilation_high), kernel_high)
        down = _Loop(b, k0, k1, 1, [start])
        at = b.mul(b.add(above, b.mul(down.i, dilation_high)), wide)
        line = b.add(x, b.mul(b.add(at, first), _n(4)))
        weights = b.add(w, b.mul(b.mul(down.i, kernel_wide), _n(4)))
        total = down.close([taps(line, weights, down.values[0])])[0]
        place = b.mul(b.add(b.mul(lines.i, out_wide), column), _n(4))
        deliver(b, total, place, y, residual if adding else None, wanted, low, up)
        lines.close([])
        return ctx.get_dummy_value()

    return types.void(step, lanes, add, *[_int] * 20), gen
