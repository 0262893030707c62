"""Normalisation over the features of a panel as Numba intrinsics: V vectors of positions at once, one a lane.

Sums run down the features, so that nothing is added across lanes.
"""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.emit import Code

_int = types.int64
# Features taken at once: enough independent sums to hide the latency of an addition.
_TURNS = {1: 4, 2: 4, 4: 2}


def _column_sums(c: Code, vectors: int, features, turns: int, term) -> list:
    """sum_k term(k, v) for each vector v, in `turns` independent sums that are added up at the end."""
    b, zero = c.b, c.const(0.0)

    def several(k, sums):
        terms = [term(c.at(k, turn), v) for turn in range(turns) for v in range(vectors)]
        return [b.fadd(total, x) for total, x in zip(sums, terms)]

    k, sums = c.repeat(c.n(0), features, turns, [zero] * (vectors * turns), several)
    first, rest = sums[:vectors], sums[vectors:]
    for v, total in enumerate(rest):
        first[v % vectors] = b.fadd(first[v % vectors], total)
    add = lambda k, sums: [b.fadd(sums[v], term(k, v)) for v in range(vectors)]
    return c.repeat(k, features, 1, first, add)[1]


@intrinsic(prefer_literal=True)
def normalise(typing, vectors, lanes, centred, added, x, residual, gamma, beta, y, features, row, constants):
    """y = (t - mean t) / sqrt(var t + eps) * gamma + beta over features `row` bytes apart, t = x or x + residual.

    `constants` holds 1 / features, eps, 1 and 0, eight bytes apart. Gamma or beta at address 0 is left out; y may be x
    or residual. Not `centred` leaves the mean out of both places, which is the root-mean-square norm.
    """
    V, L = vectors.literal_value, lanes.literal_value
    layer, adding = centred.literal_value, added.literal_value

    def gen(ctx, b, sig, args):
        x, residual, gamma, beta, y, features, row, constants = args[4:]
        c = Code(b, L)
        share, eps, one = (c.splat(constants, 8 * i) for i in range(3))

        def at(base, k, v):
            return c.at(b.add(base, b.mul(k, row)), 4 * L * v)

        def term(k, v):
            """t of one vector, kept in y when it is a sum."""
            z = c.load(at(x, k, v))
            if adding:
                z = b.fadd(z, c.load(at(residual, k, v)))
                c.store(z, at(y, k, v))
            return z

        t = y if adding else x
        means = [c.const(0.0)] * V
        if layer or adding:
            sums = _column_sums(c, V, features, _TURNS[V], term)
            means = [b.fmul(total, share) for total in sums] if layer else means

        def away(k, v):
            z = c.load(at(t, k, v))
            return b.fsub(z, means[v]) if layer else z

        squares = _column_sums(c, V, features, _TURNS[V], lambda k, v: (lambda z: b.fmul(z, z))(away(k, v)))
        scales = [b.fdiv(one, c.call("sqrt", c.fma(total, share, eps))) for total in squares]

        def parameter(address, stand_in: int):
            """Where a parameter starts and how far apart its floats lie; a missing one is one constant for all."""
            given = b.icmp_signed("!=", address, c.n(0))
            return b.select(given, address, c.at(constants, stand_in)), b.select(given, c.n(4), c.n(0))

        (gamma, gamma_step), (beta, beta_step) = parameter(gamma, 16), parameter(beta, 24)

        def apply(k, _):
            weight, shift = c.splat(b.add(gamma, b.mul(k, gamma_step))), c.splat(b.add(beta, b.mul(k, beta_step)))
            for v in range(V):
                c.store(c.fma(b.fmul(away(k, v), scales[v]), weight, shift), at(y, k, v))
            return []

        c.unrolled(features, 2, [], apply)
        return ctx.get_dummy_value()

    return types.void(vectors, lanes, centred, added, *[_int] * 8), gen
