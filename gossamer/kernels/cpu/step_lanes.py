"""What a decoder does between its products, as vector code: norms, gated activations, rotary turns, attention.

One token at a time, float32; results are written as float32 or rounded to bfloat16 for the next product.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu import activations
from gossamer.kernels.cpu.activations import SILU, Vector
from gossamer.kernels.cpu.expand import BFloat
from gossamer.kernels.cpu.lanes import _F32, _I16, _declare, _int, _lane_mask, _load, _Loop, _n, _splat, _store

LANES = 16
_VECTOR = ir.VectorType(_F32, LANES)


def _fma(b, x, y, z):
    kind = x.type
    return b.call(_declare(b, f"llvm.fma.v{kind.count}f32", kind, kind, kind, kind), [x, y, z])


def _put(b, x, target, index, size: int):
    """Store a vector as float32 (4 bytes) or bfloat16 (2 bytes) at element `index`."""
    if size == 2:
        x = b.bitcast(b.fptrunc(x, ir.VectorType(BFloat(), x.type.count)), ir.VectorType(_I16, x.type.count))
    _store(b, x, b.add(target, b.mul(index, _n(size))), size)


def _at(address, b, index):
    return b.add(address, b.mul(index, _n(4)))


def _total(b, name: str, x):
    start = [ir.Constant(_F32, -0.0)] if name == "fadd" else []
    function = _declare(b, f"llvm.vector.reduce.{name}.v{LANES}f32", _F32, *(s.type for s in start), _VECTOR)
    return b.call(function, [*start, x], fastmath=("reassoc",))


@intrinsic(prefer_literal=True)
def rms_norm_row(typing, size, x, weight, count, eps, target):
    """target[i] = weight[i] x[i] / sqrt(mean(x²) + eps); `eps` is a float32's address, `count` a multiple of 16."""
    width = size.literal_value

    def gen(ctx, b, sig, args):
        _, x, weight, count, eps, target = args
        squares = _Loop(b, _n(0), count, LANES, [ir.Constant(_VECTOR, None)])
        row = _load(b, _at(x, b, squares.i), _VECTOR, 4)
        (total,) = squares.close([_fma(b, row, row, squares.values[0])])
        mean = b.fdiv(_total(b, "fadd", total), b.sitofp(count, _F32))
        root = _declare(b, "llvm.sqrt.f32", _F32, _F32)
        size_of = b.call(root, [b.fadd(mean, _load(b, eps, _F32, 4))])
        scale = _splat(b, b.fdiv(ir.Constant(_F32, 1.0), size_of), LANES)
        loop = _Loop(b, _n(0), count, LANES, [])
        row = b.fmul(_load(b, _at(x, b, loop.i), _VECTOR, 4), scale)
        _put(b, b.fmul(row, _load(b, _at(weight, b, loop.i), _VECTOR, 4)), target, loop.i, width)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(size, *[_int] * 5), gen


@intrinsic(prefer_literal=True)
def silu_times_row(typing, size, gate, up, count, target):
    """target[i] = silu(gate[i]) up[i], `count` a multiple of 16."""
    width = size.literal_value

    def gen(ctx, b, sig, args):
        _, gate, up, count, target = args
        loop = _Loop(b, _n(0), count, LANES, [])
        opened = activations.emit(Vector(b, LANES), SILU, _load(b, _at(gate, b, loop.i), _VECTOR, 4))
        _put(b, b.fmul(opened, _load(b, _at(up, b, loop.i), _VECTOR, 4)), target, loop.i, width)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(size, *[_int] * 4), gen


@intrinsic(prefer_literal=True)
def turn_heads(typing, lanes, x, heads, width, cosine, sine):
    """Rotate the two halves of every head against each other, in place: `width` is a multiple of two vectors."""
    L = lanes.literal_value
    kind = ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        _, x, heads, width, cosine, sine = args
        half = b.sdiv(width, _n(2))
        head = _Loop(b, _n(0), heads, 1, [])
        row = _at(x, b, b.mul(head.i, width))
        loop = _Loop(b, _n(0), half, L, [])
        near, far = _at(row, b, loop.i), _at(row, b, b.add(loop.i, half))
        c, s = (_load(b, _at(table, b, loop.i), kind, 4) for table in (cosine, sine))
        low, high = _load(b, near, kind, 4), _load(b, far, kind, 4)
        _store(b, _fma(b, low, c, b.fneg(b.fmul(high, s))), near, 4)
        _store(b, _fma(b, high, c, b.fmul(low, s)), far, 4)
        loop.close([])
        head.close([])
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 5), gen


@intrinsic
def keep_column(typing, source, target, count, stride):
    """target[i * stride] = source[i]: one key into its column of the transposed cache."""

    def gen(ctx, b, sig, args):
        source, target, count, stride = args
        loop = _Loop(b, _n(0), count, 1, [])
        value = _load(b, _at(source, b, loop.i), _F32, 4)
        _store(b, value, _at(target, b, b.mul(loop.i, stride)), 4)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(*[_int] * 4), gen


@intrinsic
def weigh_keys(typing, query, keys, width, stride, count, scale, scores):
    """scores[t] = softmax over t < count of scale · query · keys[:, t]; keys are [width, stride], sixteen per step.

    Scores are padded with zeros up to a multiple of sixteen. `scale` is the address of a float32.
    """

    def gen(ctx, b, sig, args):
        query, keys, width, stride, count, scale, scores = args
        zero, least = ir.Constant(_VECTOR, None), ir.Constant(_VECTOR, [ir.Constant(_F32, -3.0e38)] * LANES)
        factor = _splat(b, _load(b, scale, _F32, 4), LANES)
        end = b.add(count, _n(LANES - 1))
        blocks = _Loop(b, _n(0), end, LANES, [least])
        column = _at(keys, b, blocks.i)
        dot = _Loop(b, _n(0), width, 4, [zero] * 4)
        sums = list(dot.values)
        for u in range(4):
            d = b.add(dot.i, _n(u))
            key = _load(b, b.add(column, b.mul(b.mul(d, stride), _n(4))), _VECTOR, 4)
            sums[u] = _fma(b, _splat(b, _load(b, _at(query, b, d), _F32, 4), LANES), key, sums[u])
        sums = dot.close(sums)
        score = b.fmul(b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3])), factor)
        score = b.select(_lane_mask(b, b.sub(count, blocks.i), LANES), score, least)
        _store(b, score, _at(scores, b, blocks.i), 4)
        best = b.select(b.fcmp_ordered(">", score, blocks.values[0]), score, blocks.values[0])
        (best,) = blocks.close([best])
        top = _splat(b, _total(b, "fmax", best), LANES)
        v = Vector(b, LANES)
        powers = _Loop(b, _n(0), end, LANES, [zero])
        power = v.exp(b.fsub(_load(b, _at(scores, b, powers.i), _VECTOR, 4), top))
        power = b.select(_lane_mask(b, b.sub(count, powers.i), LANES), power, zero)
        _store(b, power, _at(scores, b, powers.i), 4)
        (total,) = powers.close([b.fadd(powers.values[0], power)])
        share = _splat(b, b.fdiv(ir.Constant(_F32, 1.0), _total(b, "fadd", total)), LANES)
        last = _Loop(b, _n(0), end, LANES, [])
        place = _at(scores, b, last.i)
        _store(b, b.fmul(_load(b, place, _VECTOR, 4), share), place, 4)
        last.close([])
        return ctx.get_dummy_value()

    return types.void(*[_int] * 7), gen


@intrinsic(prefer_literal=True)
def mix_values(typing, lanes, vectors, size, scores, values, row, count, target):
    """target[:] = sum over t < count of scores[t] · values[t, :], for lanes x vectors columns; `row` is in floats."""
    L, V, width = lanes.literal_value, vectors.literal_value, size.literal_value
    kind = ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        scores, values, row, count, target = args[3:]
        loop = _Loop(b, _n(0), count, 1, [ir.Constant(kind, None)] * V)
        weight = _splat(b, _load(b, _at(scores, b, loop.i), _F32, 4), L)
        place = _at(values, b, b.mul(loop.i, row))
        sums = [_fma(b, weight, _load(b, b.add(place, _n(4 * L * v)), kind, 4), loop.values[v]) for v in range(V)]
        for v, total in enumerate(loop.close(sums)):
            _put(b, total, target, _n(L * v), width)
        return ctx.get_dummy_value()

    return types.void(lanes, vectors, size, *[_int] * 5), gen
