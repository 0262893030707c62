"""The product of a tile bitmask with one to eight tokens: what one thread does, in Numba.

Weights are read once, front to back; a task is a run of row groups. Every thread lays x out for itself, as pairs that
the inner loop broadcasts. The bfloat16 dot product needs finite inputs (a pruned weight multiplies as zero there), so
x is looked over while it is copied, and anything else goes through float32 with masks.
"""

from __future__ import annotations

import functools

from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.bitmask import finish_tokens
from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.expand import expand_dot, expand_fma
from gossamer.kernels.cpu.lanes import _I16, _I32, _I64, _int, _load, _store, address_of, copy_row, get, get_i32, take
from gossamer.kernels.cpu.launch import ADDRESSES, NEXT, SCRATCH, SLOT
from gossamer.kernels.cpu.threads import Entry

X, BITS, STARTS, VALUES, BIAS, Y = range(ADDRESSES, ADDRESSES + 48, 8)
(
    TOKENS, ROWS, COLS, PAIRS, GROUPS, TASKS, GROUPS_PER_TASK, SCRATCH_BYTES, X_BYTES, ACTIVATION, MOST, DOT,
) = range(Y + 8, Y + 8 * 13, 8)  # fmt: skip
FIXED = 12


@intrinsic
def get_u16(typing, address):
    """The 16 bits stored at an address, as a non-negative number."""
    return _int(_int), lambda ctx, b, sig, args: b.zext(_load(b, args[0], _I16, 2), _I64)


@intrinsic
def put_i32(typing, address, value):
    """Store the low 32 bits of a number."""

    def gen(ctx, b, sig, args):
        _store(b, b.trunc(args[1], _I32), args[0], 4)
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@helper
def pair_bf16(x, cols, tokens, padded, target):
    """bfloat16 rows to pairs [ceil(cols / 2), padded]; returns whether all numbers are finite."""
    bad = 0
    for t in range(padded):
        row = x + 2 * t * cols
        for p in range(cols // 2):
            pair = get_i32(row + 4 * p) if t < tokens else 0
            bad |= ((pair & 0x7F80) == 0x7F80) | ((pair & 0x7F800000) == 0x7F800000)
            put_i32(target + 4 * (p * padded + t), pair)
        if cols % 2:
            last = get_u16(row + 2 * (cols - 1)) if t < tokens else 0
            bad |= (last & 0x7F80) == 0x7F80
            put_i32(target + 4 * (cols // 2 * padded + t), last)
    return bad == 0


@helper
def pair_f32(x, size, cols, tokens, padded, target):
    """float32 or bfloat16 rows to pairs of float32, [ceil(cols / 2), padded, 2]."""
    for t in range(padded):
        for k in range(cols + cols % 2):
            bits = 0
            if t < tokens and k < cols:
                bits = get_i32(x + 4 * (t * cols + k)) if size == 4 else get_u16(x + 2 * (t * cols + k)) << 16
            put_i32(target + 4 * ((k // 2 * padded + t) * 2 + k % 2), bits)


@functools.cache
def kernel(tokens: int, value_bytes: int) -> Entry:
    """The compiled product for 1, 2, 4 or 8 tokens and float32 (4 bytes) or bfloat16 (2 bytes) values."""
    T, B = tokens, value_bytes

    def tile_kernel(pointer):
        args = address_of(pointer)
        slot, tasks, rows, each = take(args + SLOT), get(args + TASKS), get(args + ROWS), get(args + GROUPS_PER_TASK)
        bits, starts, values, pairs = get(args + BITS), get(args + STARTS), get(args + VALUES), get(args + PAIRS)
        x = get(args + SCRATCH) + slot * get(args + SCRATCH_BYTES)
        sums, row = x + 8 * T * pairs, 64 * each
        bias, code, most = get(args + BIAS), get(args + ACTIVATION), get(args + MOST)
        dot = get(args + DOT)
        ready = False
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            if not ready:
                if dot and not pair_bf16(get(args + X), get(args + COLS), get(args + TOKENS), T, x):
                    dot = 0
                if not dot:
                    pair_f32(get(args + X), get(args + X_BYTES), get(args + COLS), get(args + TOKENS), T, x)
                ready = True
            first, stop = task * each, min(get(args + GROUPS), (task + 1) * each)
            for g in range(first, stop):
                mask, place = bits + 4 * g * pairs, values + B * get_i32(starts + 4 * g)
                to = sums + 64 * (g - first)
                if B == 4 or not dot:
                    expand_fma(T, B, mask, place, x, pairs, to, row)
                elif most == 0:
                    expand_dot(T, 0, mask, place, x, pairs, to, row)
                elif most == 16:
                    expand_dot(T, 16, mask, place, x, pairs, to, row)
                else:
                    expand_dot(T, 32, mask, place, x, pairs, to, row)
            begin, count = 16 * first, min(rows, 16 * stop) - 16 * first
            for t in range(get(args + TOKENS)):
                line, y = sums + row * t, get(args + Y) + 4 * (t * rows + begin)
                finish_tokens(line, count, bias + 4 * begin if bias else 0, code)
                copy_row(16, line, y, count, count)

    return Entry(compile_kernel(tile_kernel, f"tile bitmask product, {tokens} tokens, {8 * value_bytes}-bit values"))
