"""Depthwise convolution of one plane, as vector code.

`walk` goes down the lines of the input once: a line that is loaded adds to every output line it touches, whose sums
wait in registers; `stride` does so for stride 2. `fold` takes several lines of a narrow image into one vector. `slide`
computes one vector of outputs after the other and takes any stride and dilation.
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
        whole = _masked_load(b, line, columns_inside(b, _n(0), wide, L), L) if small == 2 else None
        for j in range(K):
            for v in range(V):
                at, mask = b.add(line, b.add(offsets[v], _n(4 * j))), masks[v][j]
                if whole is not None:
                    columns = (lane + j - left_ for lane in range(L))
                    taken = b.shuffle_vector(whole, zero, _mask([c if 0 <= c < L else L for c in columns]))
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
    typing, kernel, left, vectors, lanes, narrow, add,
    x, y, w, bias, residual, nothing, high, wide, out_high, out_wide, top, column, low, up,
):  # fmt: skip
    """`walk` for stride 2: two input lines a step, of which a pair of loads gives the even and the odd columns.

    Taps further left or right are those columns moved by a lane, for loads that cross cache lines are dear. Outputs
    wait in the order in which columns are cheapest to take apart (`_apart`). Lines above and below the image are read
    from `nothing`, a line of zeros.
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
        reads = [b.mul(first, _n(2)) for first in firsts]

        def mask_of(v, half):
            # The second load of the last vector may reach beyond the line.
            if not small and (v < V - 1 or half == 0):
                return None
            return columns_inside(b, b.add(reads[v], _n(half * L)), wide, L)

        masks = {(v, half): mask_of(v, half) for v in range(V) for half in range(2)}
        order = _apart(L)
        # How many outputs aside the column of each tap stands, and where the one that enters a vector comes from.
        asides = [divmod(j - left_, 2) for j in range(K)]
        entering = {
            (v, aside, odd): b.add(reads[v], _n((-2 if aside < 0 else 2 * L) + odd))
            for v in range(V) for aside, odd in asides if aside and not small
        }  # fmt: skip
        inside = {key: b.icmp_unsigned("<", place, wide) for key, place in entering.items()}
        places = {key: b.mul(b.select(inside[key], place, _n(0)), _n(4)) for key, place in entering.items()}
        bits = ir.VectorType(_I1, L)
        entry = {aside: [j + aside in (-1, L) for j in order] for aside in (-1, 1)}
        enters = {
            key: b.select(inside[key], ir.Constant(bits, entry[key[1]]), ir.Constant(bits, [False] * L))
            for key in entering
        }
        y_offsets = [b.mul(first, _n(4)) for first in firsts]
        fresh = [start] + [zero] * (parts - 1)

        def taken(line, v, half):
            at, mask = b.add(line, b.mul(b.add(reads[v], _n(half * L)), _n(4))), masks[v, half]
            return _load(b, at, kind, 4) if mask is None else _masked_load(b, at, mask, L)

        def moved(line, v, columns, aside, odd):
            """The columns next to these; what enters from beyond a narrow image is zero or does not matter."""
            if not aside:
                return columns
            near = [order.index(j + aside) if 0 <= j + aside < L else L for j in order]
            columns = b.shuffle_vector(columns, zero, _mask(near))
            if small:
                return columns
            entered = _splat(b, _load(b, b.add(line, places[v, aside, odd]), _F32, 4), L)
            return b.select(enters[v, aside, odd], entered, columns)

        size = V * parts
        loop = _Loop(b, _n(0), b.add(out_high, _n(slots - 1)), 1, fresh * V * slots)
        sums = list(loop.values)
        for phase in range(2):
            row = b.sub(b.add(b.mul(loop.i, _n(2)), _n(phase)), top)
            real = b.icmp_unsigned("<", row, high)
            line = b.select(real, b.add(x, b.mul(b.mul(row, wide), _n(4))), nothing)
            for v in range(V):
                both = [taken(line, v, half) for half in range(2)]
                halves = [b.shuffle_vector(*both, _mask([2 * j + odd for j in order])) for odd in range(2)]
                for j, (aside, odd) in enumerate(asides):
                    column_of_x = moved(line, v, halves[odd], aside, odd)
                    for i in range(phase, K, 2):
                        k = (slots - 1 - i // 2) * size + v * parts + j % parts
                        sums[k] = b.call(fma, [weights[i][j], column_of_x, sums[k]])
        done = b.sub(loop.i, _n(slots - 1))
        with b.if_then(b.icmp_signed(">=", done, _n(0)), likely=True):
            for v in range(V):
                total = sums[v * parts]
                for p in range(1, parts):
                    total = b.fadd(total, sums[v * parts + p])
                total = b.shuffle_vector(total, zero, _mask([order.index(j) for j in range(L)]))
                place = b.add(b.mul(b.mul(done, out_wide), _n(4)), y_offsets[v])
                _deliver(b, total, place, y, residual if adding else None, wanted, low, up)
        loop.close(sums[size:] + fresh * V)
        return ctx.get_dummy_value()

    return types.void(kernel, left, vectors, lanes, narrow, add, *[_int] * 14), gen


def _apart(lanes: int) -> list[int]:
    """Outputs in the order that shuffles within 128 bits give: two of the first vector of pixels, two of the second."""
    return [2 * q + half * (lanes // 2) + odd for q in range(lanes // 4) for half in range(2) for odd in range(2)]


def _mask(numbers):
    return ir.Constant(ir.VectorType(_I32, len(numbers)), list(numbers))


@intrinsic(prefer_literal=True)
def flat(
    typing, kernel, high, wide, out_high, top, left, lanes, add,
    x, y, w, bias, residual, begin, end, low, up,
):  # fmt: skip
    """Vectors begin..end - 1 of the output of one small plane, stride 1, output lines as wide as the input's.

    Pixels follow each other, so that a tap is the plane moved by a fixed number of them: aligned vectors are moved by
    lanes. Taps to the left (right) must not see the last (first) columns: those load them as zeros.
    """
    K, H, W, OH, top_, left_, L, adding = (
        t.literal_value for t in (kernel, high, wide, out_high, top, left, lanes, add)
    )
    kind, bits = ir.VectorType(_F32, L), ir.VectorType(_I1, L)

    def real(vector: int, shift: int) -> list[bool]:
        """Which pixels of an input vector a tap `shift` columns aside may see."""
        pixels = range(vector * L, (vector + 1) * L)
        return [0 <= p < H * W and 0 <= p % W - shift < W for p in pixels]

    def gen(ctx, b, sig, args):
        x, y, w, bias, residual, begin, end, low, up = args[8:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        weights = [[_splat(b, _load(b, b.add(w, _n(4 * (K * i + j))), _F32, 4), L) for j in range(K)] for i in range(K)]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, zero = _splat(b, _load(b, bias, _F32, 4), L), ir.Constant(kind, None)

        def loaded(vector, shift):
            seen = real(vector, shift)
            if not any(seen):
                return None
            at = b.add(x, _n(4 * L * vector))
            return _load(b, at, kind, 4) if all(seen) else _masked_load(b, at, ir.Constant(bits, seen), L)

        for number in range(-(-OH * W // L)):
            here = b.and_(b.icmp_signed("<=", begin, _n(number)), b.icmp_signed("<", _n(number), end))
            with b.if_then(here, likely=True):
                sums, taken = [start, zero, zero], {}
                for i in range(K):
                    for j in range(K):
                        shift = j - left_
                        vector, lane = divmod(number * L + (i - top_) * W + shift, L)
                        for needed in range(vector, vector + (2 if lane else 1)):
                            if (needed, shift) not in taken:
                                taken[needed, shift] = loaded(needed, shift)
                        both = [taken.get((n, shift)) for n in (vector, vector + 1)]
                        if both[0] is None and (not lane or both[1] is None):
                            continue
                        pixels = both[0]
                        if lane:
                            pixels = b.shuffle_vector(*(p or zero for p in both), _mask(range(lane, lane + L)))
                        sums[j % 3] = b.call(fma, [weights[i][j], pixels, sums[j % 3]])
                total = b.fadd(b.fadd(sums[0], sums[1]), sums[2])
                room = OH * W - number * L
                wanted = None if room >= L else ir.Constant(bits, [lane < room for lane in range(L)])
                _deliver(b, total, _n(4 * L * number), y, residual if adding else None, wanted, low, up)
        return ctx.get_dummy_value()

    return types.void(kernel, high, wide, out_high, top, left, lanes, add, *[_int] * 9), gen


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
