"""The pieces of attention as Numba intrinsics: scores, softmax and weighted sums of one tile of queries.

A tile is V vectors of queries side by side, one query a lane, so that keys and values enter as broadcasts, maxima and
sums run down the rows, and nothing is transposed. Rows of scratch memory are V vectors; rows of panels are `panel_row`
bytes apart. Scores are in units of log2 e, so that weights are powers of two.
"""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.emit import Code

_int = types.int64
# Scores below this count as masked: far below any real score, and far above what masks add in float32.
LOWEST = -1e30
LOG2_E = 1.4426950408889634


@intrinsic(prefer_literal=True)
def take_queries(typing, vectors, lanes, source, panel_row, depth, real, scale, query, sums):
    """query[d, :] = source[d, :] * scale[0] and sums[d, :] = 0, for one of the tile's vectors of `depth` rows.

    Lanes from `real` on are padding and count as zero, whatever they hold.
    """
    V, L = vectors.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        source, panel_row, depth, real, scale, query, sums = args[2:]
        c = Code(b, L)
        factor, zero, mask = c.splat(scale), c.const(0.0), c.below(real)

        def row(d, _):
            x = c.load(b.add(source, b.mul(d, panel_row)))
            place = b.mul(d, c.n(4 * L * V))
            c.store(b.select(mask, b.fmul(x, factor), zero), b.add(query, place))
            c.store(zero, b.add(sums, place))
            return []

        c.unrolled(depth, 4, [], row)
        return ctx.get_dummy_value()

    return types.void(vectors, lanes, *[_int] * 7), gen


@intrinsic(prefer_literal=True)
def take_mask(typing, lanes, mask, count, target, width):
    """target[:count] = mask[:count] * log2 e and target[count:width] = 0, one float a key."""
    L = lanes.literal_value

    def gen(ctx, b, sig, args):
        mask, count, target, width = args[1:]
        c = Code(b, L)

        def zeros(t, _):
            c.store(c.const(0.0), b.add(target, b.mul(t, c.n(4))))
            return []

        c.repeat(c.n(0), width, L, [], zeros)
        one = Code(b, 1)

        def key(t, _):
            place = b.mul(t, c.n(4))
            one.store(b.fmul(one.load(b.add(mask, place)), one.const(LOG2_E)), b.add(target, place))
            return []

        c.repeat(c.n(0), count, 1, [], key)
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 4), gen


@intrinsic(prefer_literal=True)
def score(typing, rows, vectors, lanes, query, key, panel_row, depth, start, target):
    """target[t, :] = start[t] + sum_d key[d, t] * query[d, :] for `rows` keys t."""
    R, V, L = rows.literal_value, vectors.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        query, key, panel_row, depth, start, target = args[3:]
        c = Code(b, L)
        sums = [c.splat(start, 4 * r) for r in range(R) for _ in range(V)]

        def feature(d, sums):
            q_at, k_at = b.add(query, b.mul(d, c.n(4 * L * V))), b.add(key, b.mul(d, panel_row))
            qs = [c.load(q_at, 4 * L * v) for v in range(V)]
            ks = [c.splat(k_at, 4 * r) for r in range(R)]
            return [c.fma(ks[i // V], qs[i % V], sums[i]) for i in range(R * V)]

        sums = c.unrolled(depth, 2, sums, feature)
        for i, total in enumerate(sums):
            c.store(total, target, 4 * L * i)
        return ctx.get_dummy_value()

    return types.void(rows, vectors, lanes, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def hide_later(typing, vectors, lanes, scores, count, first):
    """Causal mask: scores[t, lane] = -inf where the lane's query comes before key t, that is lane < first + t."""
    V, L = vectors.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        scores, count, first = args[2:]
        c = Code(b, L)

        def key(t, _):
            row, limit = b.add(scores, b.mul(t, c.n(4 * L * V))), b.add(first, t)
            for v in range(V):
                kept = b.select(c.below(limit, L * v), c.const(float("-inf")), c.load(row, 4 * L * v))
                c.store(kept, row, 4 * L * v)
            return []

        c.repeat(c.n(0), count, 1, [], key)
        return ctx.get_dummy_value()

    return types.void(vectors, lanes, *[_int] * 3), gen


@intrinsic(prefer_literal=True)
def soften(typing, vectors, lanes, scores, count, state):
    """Scores of some more keys become weights 2^(score - largest), in place.

    `state` is three rows: the largest score so far, the sum of weights, and by what older sums must be multiplied now
    that the largest score may have grown.
    """
    V, L = vectors.literal_value, lanes.literal_value
    row_bytes = 4 * L * V

    def gen(ctx, b, sig, args):
        scores, count, state = args[2:]
        c = Code(b, L)
        tops = [c.load(state, 4 * L * v) for v in range(V)]

        def largest(t, now):
            row = b.add(scores, b.mul(t, c.n(row_bytes)))
            return [c.larger(c.load(row, 4 * L * v), now[v]) for v in range(V)]

        highest = c.unrolled(count, 2, tops, largest)
        sums = []
        for v in range(V):
            shrink = c.exp2(b.fsub(tops[v], highest[v]))
            c.store(highest[v], state, 4 * L * v)
            c.store(shrink, state, 2 * row_bytes + 4 * L * v)
            sums.append(b.fmul(shrink, c.load(state, row_bytes + 4 * L * v)))

        def weight(t, sums):
            row = b.add(scores, b.mul(t, c.n(row_bytes)))
            weights = [c.exp2(b.fsub(c.load(row, 4 * L * v), highest[v])) for v in range(V)]
            for v in range(V):
                c.store(weights[v], row, 4 * L * v)
            return [b.fadd(total, w) for total, w in zip(sums, weights)]

        for v, total in enumerate(c.unrolled(count, 2 if V < 3 else 1, sums, weight)):
            c.store(total, state, row_bytes + 4 * L * v)
        return ctx.get_dummy_value()

    return types.void(vectors, lanes, *[_int] * 3), gen


@intrinsic(prefer_literal=True)
def weigh(typing, rows, vectors, lanes, value, panel_row, last, weights, count, shrink, sums):
    """sums[d, :] = shrink[:] * sums[d, :] + sum_t value[min(d, last), t] * weights[t, :] for `rows` features d.

    Features beyond the last real one repeat it; their sums are written but never read.
    """
    R, V, L = rows.literal_value, vectors.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        value, panel_row, last, weights, count, shrink, sums_at = args[3:]
        c = Code(b, L)
        shrinks = [c.load(shrink, 4 * L * v) for v in range(V)]
        sums = [b.fmul(shrinks[i % V], c.load(sums_at, 4 * L * i)) for i in range(R * V)]
        lines = []
        for r in range(R):
            inside = b.icmp_signed("<", c.n(r), last)
            lines.append(b.add(value, b.mul(panel_row, b.select(inside, c.n(r), last))))

        def key(t, sums):
            row, place = b.add(weights, b.mul(t, c.n(4 * L * V))), b.mul(t, c.n(4))
            ws = [c.load(row, 4 * L * v) for v in range(V)]
            vs = [c.splat(b.add(line, place)) for line in lines]
            return [c.fma(vs[i // V], ws[i % V], sums[i]) for i in range(R * V)]

        for i, total in enumerate(c.unrolled(count, 2, sums, key)):
            c.store(total, sums_at, 4 * L * i)
        return ctx.get_dummy_value()

    return types.void(rows, vectors, lanes, *[_int] * 7), gen


@intrinsic(prefer_literal=True)
def begin(typing, vectors, lanes, state):
    """The state of `soften` before any key: no score, no weight."""
    V, L = vectors.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        c = Code(b, L)
        for v in range(V):
            c.store(c.const(LOWEST), args[2], 4 * L * v)
            c.store(c.const(0.0), args[2], 4 * L * (V + v))
        return ctx.get_dummy_value()

    return types.void(vectors, lanes, _int), gen


@intrinsic(prefer_literal=True)
def give(typing, vectors, lanes, sums, total, depth, target, panel_row):
    """target[d, :] = sums[d, :] / total[:] for one of the tile's vectors; zero where no key had any weight."""
    V, L = vectors.literal_value, lanes.literal_value

    def gen(ctx, b, sig, args):
        sums, total, depth, target, panel_row = args[2:]
        c = Code(b, L)
        weight = c.load(total)
        none = b.fcmp_ordered("==", weight, c.const(0.0))
        factor = b.fdiv(c.const(1.0), b.select(none, c.const(1.0), weight))

        def row(d, _):
            x = c.load(b.add(sums, b.mul(d, c.n(4 * L * V))))
            c.store(b.fmul(x, factor), b.add(target, b.mul(d, panel_row)))
            return []

        c.unrolled(depth, 4, [], row)
        return ctx.get_dummy_value()

    return types.void(vectors, lanes, *[_int] * 5), gen
