"""The product of 4-bit groups with one to four tokens: vector code, and what one thread does with it.

A kept group is sixteen neighbouring weights of a row in eight bytes. Two groups fill a register: their codes are
spread by shifts, turned into bfloat16 by one table look-up, and multiplied by the two runs of inputs they name. The
scale and the lowest value of eight groups are applied to their two sums, of code times input and of inputs.
"""

from __future__ import annotations

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.bitmask import finish_tokens
from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.expand import dot_pairs, prefetch
from gossamer.kernels.cpu.lanes import (
    _F32,
    _I16,
    _I32,
    _I64,
    _declare,
    _int,
    _load,
    _Loop,
    _n,
    _splat,
    _store,
    address_of,
    copy_row,
    get,
    get_i32,
    take,
)
from gossamer.kernels.cpu.launch import ADDRESSES, NEXT, SCRATCH, SLOT
from gossamer.kernels.cpu.threads import Entry
from gossamer.kernels.cpu.tilemask import put_i32

X, INDPTR, INDICES, VALUES, CODES, BIAS, Y = range(ADDRESSES, ADDRESSES + 56, 8)
(
    TOKENS, ROWS, COLS, TASKS, ROWS_PER_TASK, SCRATCH_BYTES, X_BYTES, X_ROW, ACTIVATION,
) = range(Y + 8, Y + 8 * 10, 8)  # fmt: skip
# Chunks ahead of the multiplier that memory is asked for.
AHEAD = 128
_VECTOR, _WORDS = ir.VectorType(_F32, 16), ir.VectorType(_I16, 32)
# bfloat16 of 0 to 15, twice, so that the fifth bit of an index does not matter.
_TABLE = [0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, *range(0x4100, 0x4180, 0x10)]
_ONE = 0x3F80


@intrinsic(prefer_literal=True)
def int4_row(typing, tokens, whole, first, last, indices, values, codes, x, x_row, y, y_row):
    """y[t] = sum over chunks first..last of one row, for a few tokens.

    x holds rows of bfloat16 with a run of sixteen zeros beyond the last column; x_row and y_row are in bytes. `whole`
    rows keep every group in order, so their indices are not read.
    """
    T, in_order = tokens.literal_value, whole.literal_value
    zero = ir.Constant(_VECTOR, None)

    def gen(ctx, b, sig, args):
        first, last, indices, values, codes, x, x_row, y, y_row = args[2:]
        table = ir.Constant(_WORDS, [_TABLE[i % 16] for i in range(32)])
        ones = ir.Constant(_WORDS, [_ONE] * 32)
        shifts = ir.Constant(_WORDS, [i // 4 % 4 * 4 for i in range(32)])
        look_up = _declare(b, "llvm.x86.avx512.permvar.hi.512", _WORDS, _WORDS, _WORDS)
        fma = _declare(b, "llvm.fma.v16f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR)
        half = ir.VectorType(_I16, 16)
        both = ir.Constant(ir.VectorType(_I32, 32), list(range(32)))
        twice = ir.Constant(ir.VectorType(_I32, 8), [0] * 4 + [1] * 4)

        loop = _Loop(b, first, last, 1, [zero] * T)
        totals = list(loop.values)
        code = b.add(codes, b.mul(loop.i, _n(64)))
        index = b.add(indices, b.mul(loop.i, _n(16)))
        value = b.add(values, b.mul(loop.i, _n(4)))
        prefetch(b, b.add(code, _n(64 * AHEAD)))
        prefetch(b, b.add(value, _n(4 * AHEAD)))
        if not in_order:
            prefetch(b, b.add(index, _n(16 * AHEAD)))
        sums, inputs = [zero] * T, [zero] * T
        since = b.mul(b.sub(loop.i, first), _n(256))
        for pair in range(4):
            raw = _load(b, b.add(code, _n(16 * pair)), ir.VectorType(_I64, 2), 1)
            spread = b.bitcast(b.shuffle_vector(raw, raw, twice), _WORDS)
            w = b.call(look_up, [table, b.lshr(spread, shifts)])
            if not in_order:
                at = [b.zext(_load(b, b.add(index, _n(4 * pair + 2 * i)), _I16, 2), _I64) for i in range(2)]
                at = [b.mul(a, _n(8)) for a in at]
            for t in range(T):
                row = b.add(x, b.mul(x_row, _n(t)))
                if in_order:
                    xs = _load(b, b.add(b.add(row, since), _n(64 * pair)), _WORDS, 2)
                else:
                    low, high = (_load(b, b.add(row, a), half, 2) for a in at)
                    xs = b.shuffle_vector(low, high, both)
                sums[t] = dot_pairs(b, sums[t], w, xs)
                inputs[t] = dot_pairs(b, inputs[t], ones, xs)
        word = _load(b, value, _I32, 4)
        low = _splat(b, b.bitcast(b.shl(word, ir.Constant(_I32, 16)), _F32), 16)
        scale = _splat(b, b.bitcast(b.and_(word, ir.Constant(_I32, -65536)), _F32), 16)
        for t in range(T):
            totals[t] = b.call(fma, [sums[t], scale, totals[t]])
            totals[t] = b.call(fma, [inputs[t], low, totals[t]])
        totals = loop.close(totals)
        add = _declare(b, "llvm.vector.reduce.fadd.v16f32", _F32, _F32, _VECTOR)
        for t in range(T):
            scalar = b.call(add, [ir.Constant(_F32, -0.0), totals[t]], fastmath=("reassoc",))
            _store(b, scalar, b.add(y, b.mul(y_row, _n(t))), 4)
        return ctx.get_dummy_value()

    return types.void(tokens, whole, *[_int] * 9), gen


@helper
def narrow_rows(x, size, cols, tokens, padded, target, row):
    """Rows of x as bfloat16 (rounded to nearest, ties to even), then zeros; tokens that do not exist are zero."""
    for t in range(padded):
        at = target + t * row
        for k in range(0, row // 2, 2):
            pair = 0
            if t < tokens and k < cols:
                if size == 2:
                    pair = get_i32(x + 2 * (t * cols + k))
                else:
                    pair = _narrow(get_i32(x + 4 * (t * cols + k))) | _narrow(get_i32(x + 4 * (t * cols + k) + 4)) << 16
            put_i32(at + 2 * k, pair)


@helper
def _narrow(bits):
    bits &= 0xFFFFFFFF
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FC0
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


@functools.cache
def kernel(tokens: int, whole: int) -> Entry:
    """The compiled product for 1, 2 or 4 tokens; `whole` (0 or 1) for weights that keep every group in order."""
    T, W = tokens, whole

    def int4_kernel(pointer):
        args = address_of(pointer)
        slot, tasks, rows, each = take(args + SLOT), get(args + TASKS), get(args + ROWS), get(args + ROWS_PER_TASK)
        indptr, indices, values = get(args + INDPTR), get(args + INDICES), get(args + VALUES)
        codes, x_row, bias, code = get(args + CODES), get(args + X_ROW), get(args + BIAS), get(args + ACTIVATION)
        x = get(args + SCRATCH) + slot * get(args + SCRATCH_BYTES)
        sums, line = x + T * x_row, 4 * each
        ready = False
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            if not ready:
                narrow_rows(get(args + X), get(args + X_BYTES), get(args + COLS), get(args + TOKENS), T, x, x_row)
                ready = True
            begin, end = task * each, min(rows, (task + 1) * each)
            for r in range(begin, end):
                start, stop = get_i32(indptr + 4 * r), get_i32(indptr + 4 * r + 4)
                int4_row(T, W, start, stop, indices, values, codes, x, x_row, sums + 4 * (r - begin), line)
            for t in range(get(args + TOKENS)):
                y = get(args + Y) + 4 * (t * rows + begin)
                finish_tokens(sums + line * t, end - begin, bias + 4 * begin if bias else 0, code)
                copy_row(16, sums + line * t, y, end - begin, end - begin)

    return Entry(compile_kernel(int4_kernel, f"4-bit group product, {tokens} tokens{', every group' * whole}"))
