"""The bitmask product for one to eight tokens: what one thread does, in Numba.

Weights are read once, front to back; a task is a run of rows. x is copied once per thread to float32 rows of whole
vectors, so that no load passes the end of the caller's memory.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.activations import GELU, GELU_TANH, HARD_SWISH, NONE, RELU, RELU6, SILU
from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.lanes import address_of, bitmask_rows, copy_row, finish_row, get, take, widen_row
from gossamer.kernels.cpu.threads import Entry

# Byte offset of each argument in the block of int64 that the kernel receives.
(
    SLOT, NEXT, TASKS, ROWS_PER_TASK, SCRATCH, SCRATCH_BYTES, X, X_BYTES, Y, TOKENS, ROWS, COLS,
    BITS, BITS_ROW, OFFSETS, VALUES, BIAS, ACTIVATION, WIDTH,
) = range(0, 8 * 19, 8)  # fmt: skip


@helper
def finish_tokens(y, count, bias, code):
    """Bias and activation for a run of outputs of one token, in place; a zero bias address means none."""
    if bias == 0:
        return
    if code == 0:
        finish_row(16, NONE, 1, y, y, count, bias)
    elif code == 1:
        finish_row(16, RELU, 1, y, y, count, bias)
    elif code == 2:
        finish_row(16, GELU, 1, y, y, count, bias)
    elif code == 3:
        finish_row(16, GELU_TANH, 1, y, y, count, bias)
    elif code == 4:
        finish_row(16, SILU, 1, y, y, count, bias)
    elif code == 5:
        finish_row(16, RELU6, 1, y, y, count, bias)
    else:
        finish_row(16, HARD_SWISH, 1, y, y, count, bias)


@helper
def copy_tokens(args, scratch, tokens, width):
    """Rows of x as float32, zero up to `width` floats; tokens that do not exist are zero throughout."""
    x, size, cols = get(args + X), get(args + X_BYTES), get(args + COLS)
    for t in range(tokens):
        target = scratch + 4 * t * width
        if t >= get(args + TOKENS):
            copy_row(16, target, target, 0, width)
        elif size == 4:
            copy_row(16, x + 4 * t * cols, target, cols, width)
        else:
            copy_row(16, target, target, 0, width)
            widen_row(x + 2 * t * cols, target, cols)


@functools.cache
def kernel(tokens: int, value_bytes: int) -> Entry:
    """The compiled product for 1, 2, 4 or 8 tokens and float32 (4 bytes) or bfloat16 (2 bytes) values."""
    T, B, R = tokens, value_bytes, 2 if tokens == 8 else 4

    def bitmask_kernel(pointer):
        args = address_of(pointer)
        slot, tasks, rows, each = take(args + SLOT), get(args + TASKS), get(args + ROWS), get(args + ROWS_PER_TASK)
        bits, bits_row, offsets = get(args + BITS), get(args + BITS_ROW), get(args + OFFSETS)
        values, width, count = get(args + VALUES), get(args + WIDTH), get(args + TOKENS)
        x = get(args + SCRATCH) + slot * get(args + SCRATCH_BYTES)
        sums = x + 4 * T * width
        bias, code = get(args + BIAS), get(args + ACTIVATION)
        copied = False
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            if not copied:
                copy_tokens(args, x, T, width)
                copied = True
            begin, end = task * each, min(rows, (task + 1) * each)
            r = begin
            while r < end:
                left, to = end - r, sums + 4 * (r - begin)
                mask, start = bits + r * bits_row, offsets + 4 * r
                if left >= R:
                    bitmask_rows(R, T, B, mask, bits_row, start, values, x, 4 * width, width // 16, to, 4 * each)
                    r += R
                else:
                    bitmask_rows(1, T, B, mask, bits_row, start, values, x, 4 * width, width // 16, to, 4 * each)
                    r += 1
            for t in range(count):
                line, y = sums + 4 * t * each, get(args + Y) + 4 * (t * rows + begin)
                finish_tokens(line, end - begin, bias + 4 * begin if bias else 0, code)
                copy_row(16, line, y, end - begin, end - begin)

    return Entry(compile_kernel(bitmask_kernel, f"bitmask product, {tokens} tokens, {8 * value_bytes}-bit values"))
