"""The sparse x dense product on panels: what one thread does, in Numba.

A panel is a copy of x for a few vectors of tokens, transposed to [K, lanes of tokens], so that each kept weight is one
broadcast and a few multiply-adds. Tasks are (image, panel, chunk of rows); a thread takes the next one until none is
left. Results do not depend on who takes what: each output is summed by one task in one order.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.activations import GELU, GELU_TANH, HARD_SWISH, NONE, RELU, RELU6, SILU
from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.lanes import address_of, copy_row, finish_row, get, get_i32, take, tile, transpose
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()
# Rows whose sums are finished together, a multiple of every group size and of the lanes.
BATCH = 64

# Byte offset of each argument in the block of int64 that a kernel receives; `spmm` writes them in this order.
(
    SLOT, NEXT, SCRATCH, X, Y, BIAS,
    TASKS, CHUNKS, PANELS, SCRATCH_BYTES, X_KIND, Y_KIND, X_ROW, X_IMAGE, Y_ROW, Y_IMAGE,
    TOKENS, ROWS, COLS, GROUPS, BLOCKS, STARTS, INDICES, VALUES, ACTIVATION, LOW, ZERO,
    VECTORS, PANEL_VECTORS, UNIT, SUMS, HOLD,
) = range(0, 8 * 32, 8)  # fmt: skip

# How x and y lie in memory: [T, features], [features, T], or panels.
ROW_MAJOR, COLUMN_MAJOR, PANEL_MAJOR = range(3)


@helper
def pack_rows(x, x_row, tokens, cols, panel, width):
    """Transpose `tokens` rows of x into a panel [cols, width]; missing tokens are zero."""
    for t in range(0, width, LANES):
        for k in range(0, cols, LANES):
            source, target = x + t * x_row + 4 * k, panel + 4 * (k * width + t)
            if tokens - t >= LANES and cols - k >= LANES:
                transpose(LANES, 0, 0, source, x_row, LANES, LANES, target, 4 * width, LANES, 0, 0)
            else:
                transpose(LANES, 1, 0, source, x_row, tokens - t, cols - k, target, 4 * width, width - t, 0, 0)


@helper
def pack_columns(x, x_row, tokens, cols, panel, width):
    """Copy `tokens` floats of every row of x into a panel [cols, width]; the rest is zero."""
    for k in range(cols):
        copy_row(LANES, x + k * x_row, panel + 4 * k * width, tokens, width)


@helper
def finish(source, source_row, target, target_row, rows, count, bias, bias_step, code):
    """Rows of `count` sums through bias and activation; the choice of activation is made once for all rows."""
    if code == 0:
        for r in range(rows):
            finish_row(LANES, NONE, 0, source + r * source_row, target + r * target_row, count, bias + r * bias_step)
    elif code == 1:
        for r in range(rows):
            finish_row(LANES, RELU, 0, source + r * source_row, target + r * target_row, count, bias + r * bias_step)
    elif code == 2:
        for r in range(rows):
            finish_row(LANES, GELU, 0, source + r * source_row, target + r * target_row, count, bias + r * bias_step)
    elif code == 3:
        for r in range(rows):
            finish_row(
                LANES, GELU_TANH, 0, source + r * source_row, target + r * target_row, count, bias + r * bias_step
            )
    elif code == 4:
        for r in range(rows):
            finish_row(LANES, SILU, 0, source + r * source_row, target + r * target_row, count, bias + r * bias_step)
    elif code == 5:
        for r in range(rows):
            finish_row(LANES, RELU6, 0, source + r * source_row, target + r * target_row, count, bias + r * bias_step)
    else:
        for r in range(rows):
            finish_row(
                LANES, HARD_SWISH, 0, source + r * source_row, target + r * target_row, count, bias + r * bias_step
            )


@helper
def store_rows(args, sums, sums_row, row, rows, y, tokens):
    """Finish a batch of `rows` rows of sums and write it transposed into y [T, M]."""
    code, bias, bias_step, y_row = get(args + ACTIVATION), get(args + BIAS), 4, get(args + Y_ROW)
    zero, low = get(args + ZERO), get(args + LOW)
    if bias == 0:
        bias, bias_step = zero, 0
    if code > 1:
        finish(sums, sums_row, sums, sums_row, rows, tokens, bias + bias_step * row, bias_step, code)
        bias, bias_step = zero, 0
    # Tokens outside, rows inside: consecutive lines of a few tokens, which the memory takes better than one of many.
    for t in range(0, tokens, LANES):
        for r in range(0, rows, LANES):
            add = bias + bias_step * (row + r)
            source, target = sums + r * sums_row + 4 * t, y + t * y_row + 4 * (row + r)
            if tokens - t >= LANES and rows - r >= LANES:
                transpose(LANES, 0, 1, source, sums_row, LANES, LANES, target, y_row, LANES, add, low)
            else:
                transpose(LANES, 1, 1, source, sums_row, rows - r, tokens - t, target, y_row, rows - r, add, low)


@helper
def store_columns(args, sums, sums_row, row, rows, y, tokens):
    """Finish a batch of rows of sums into y [M, T], or into a panel of it."""
    code, bias, bias_step, y_row = get(args + ACTIVATION), get(args + BIAS), 4, get(args + Y_ROW)
    if bias == 0:
        bias, bias_step = get(args + ZERO), 0
    finish(sums, sums_row, y + row * y_row, y_row, rows, tokens, bias + bias_step * row, bias_step, code)


@helper
def in_panels(base, first, features, panel_vectors):
    """Address of position `first` (a multiple of the lanes) in panels [.., features, panel_vectors * lanes]."""
    width = panel_vectors * LANES
    return base + 4 * (first // width * features * width + first % width)


@helper
def pack_panel(args, image, first, tokens, panel, width):
    """Bring positions first.. of x into a panel of the given width."""
    x, x_row, cols = get(args + X) + image * get(args + X_IMAGE), get(args + X_ROW), get(args + COLS)
    if get(args + X_KIND) == ROW_MAJOR:
        pack_rows(x + first * x_row, x_row, tokens, cols, panel, width)
    else:
        pack_columns(x + 4 * first, x_row, tokens, cols, panel, width)


@helper
def store_batch(args, image, first, tokens, row, rows, sums, sums_row):
    """Write a finished batch of rows to wherever y lies."""
    y, kind = get(args + Y) + image * get(args + Y_IMAGE), get(args + Y_KIND)
    if kind == ROW_MAJOR:
        store_rows(args, sums, sums_row, row, rows, y + first * get(args + Y_ROW), tokens)
    elif kind == COLUMN_MAJOR:
        store_columns(args, sums, sums_row, row, rows, y + 4 * first, tokens)
    else:
        y = in_panels(y, first, get(args + ROWS), get(args + PANEL_VECTORS))
        store_columns(args, sums, sums_row, row, rows, y, tokens)


def widest(g: int) -> int:
    """Vectors of a full register tile for groups of g rows: most of the register file, the rest for x (measured)."""
    if LANES == 8:
        return {1: 6, 2: 4, 4: 3, 8: 1}[g]
    return {1: 6, 2: 6, 4: 5, 8: 3}[g]


@functools.cache
def kernel(g: int, index_bytes: int) -> Entry:
    """The compiled product for groups of g rows and 2- or 4-byte indices."""
    G, B, L = g, index_bytes, LANES
    V2, V3, V4, V5, V6 = (min(v, widest(g)) for v in (2, 3, 4, 5, 6))

    def spmm_kernel(pointer):
        args = address_of(pointer)
        slot, tasks, chunks, panels = take(args + SLOT), get(args + TASKS), get(args + CHUNKS), get(args + PANELS)
        tokens, rows, groups, blocks = get(args + TOKENS), get(args + ROWS), get(args + GROUPS), get(args + BLOCKS)
        starts, indices, values = get(args + STARTS), get(args + INDICES), get(args + VALUES)
        scratch, x_kind = get(args + SCRATCH) + slot * get(args + SCRATCH_BYTES), get(args + X_KIND)
        sums, hold = scratch + get(args + SUMS), get(args + HOLD)
        y_kind = get(args + Y_KIND)
        vectors, unit = get(args + VECTORS), get(args + UNIT)
        sums_row = 4 * L * vectors
        batches = (rows + BATCH - 1) // BATCH
        packed = -1
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            place, chunk = task // chunks, task % chunks
            image, number = place // panels, place % panels
            b0, b1 = chunk * batches // chunks, (chunk + 1) * batches // chunks
            narrow, panel, step = 0, scratch, unit
            all_vectors = (tokens + L - 1) // L
            v0, v1 = number * all_vectors // panels, (number + 1) * all_vectors // panels
            if x_kind == PANEL_MAJOR or y_kind == PANEL_MAJOR:
                v0, v1 = number * vectors, min(all_vectors, (number + 1) * vectors)
            first, count, width = v0 * L, min(tokens, v1 * L) - v0 * L, (v1 - v0) * L
            if x_kind == PANEL_MAJOR:
                panel = in_panels(get(args + X), first, get(args + COLS), get(args + PANEL_VECTORS))
            else:
                if L == 16 and count <= 8:
                    narrow = 4 if count <= 4 else 8
                    width = narrow
                step = 4 * width
                if place != packed:
                    pack_panel(args, image, first, count, panel, width)
            packed = place
            for block in range(blocks):
                begin = starts + 4 * groups * block
                for batch in range(b0, b1):
                    at = sums + (batch - b0) * hold
                    i0, i1 = batch * (BATCH // G), min(groups, (batch + 1) * (BATCH // G))
                    for i in range(i0, i1):
                        s, e = get_i32(begin + 4 * i), get_i32(begin + 4 * (i + groups))
                        fresh, to = 1 if block == 0 else 0, at + (i - i0) * G * sums_row
                        if narrow == 4:
                            tile(G, 1, 4, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                        elif narrow == 8:
                            tile(G, 1, 8, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                        elif v1 - v0 == 1:
                            tile(G, 1, L, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                        elif v1 - v0 == 2:
                            tile(G, V2, L, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                        elif v1 - v0 == 3:
                            tile(G, V3, L, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                        elif v1 - v0 == 4:
                            tile(G, V4, L, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                        elif v1 - v0 == 5:
                            tile(G, V5, L, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                        else:
                            tile(G, V6, L, B, fresh, e, s, indices, values, panel, step, to, sums_row)
                    if block == blocks - 1:
                        left = min(BATCH, rows - batch * BATCH)
                        store_batch(args, image, first, count, batch * BATCH, left, at, sums_row)

    return Entry(compile_kernel(spmm_kernel, f"sparse product, groups of {g}, {8 * index_bytes}-bit indices"))
