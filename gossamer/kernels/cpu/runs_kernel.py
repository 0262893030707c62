"""Convolution by weights whose taps come in runs: what one thread does.

Arguments and tasks are those of `conv_kernel`; starts have a line for each length of run, and four numbers are added.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu import conv_kernel as conv
from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.depthwise_kernel import activate
from gossamer.kernels.cpu.lanes import address_of, get, take
from gossamer.kernels.cpu.runs_tile import LONGEST, runs_tile, take_column
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()
# Columns of a line, bytes of a column with all its copies, lines of a column, and lines from output line to line.
ACROSS, STRIP, DEPTH, STRIDE_HIGH = range(conv.ORDER + 8, conv.ORDER + 40, 8)
# Output lines of a register tile, up to what the registers hold beside three weights and a vector of x.
HEIGHTS = (2, 4, 7, 9, 11) if LANES == 8 else (2, 4, 7, 10, 14)


@helper
def pack(args, x, number, panel):
    """Copy the columns that panel `number` needs, of every channel of the image at x."""
    table, count, depth = get(args + conv.LINES), get(args + conv.LINE_COUNT), get(args + DEPTH)
    high, wide, step = get(args + conv.HIGH), get(args + conv.WIDE), get(args + conv.STRIDE_WIDE)
    down, above = get(args + STRIDE_HIGH), number * get(args + conv.PANEL_HIGH)
    channels_at, channel = get(args + conv.X_CHANNELS), get(args + conv.CHANNEL)
    for c in range(get(args + conv.CHANNELS)):
        source, target = x + get(channels_at + 8 * c), panel + c * channel
        for k in range(count):
            row, first = above + get(table + 24 * k), get(table + 24 * k + 8)
            # Lines above the image, in it, and below it.
            top = min(depth, max(0, (down - 1 - row) // down))
            end = max(top, min(depth, (high - row + down - 1) // down))
            to, line = target + get(table + 24 * k + 16), source + 4 * row * wide
            if step == 1:
                take_column(1, LANES, line, 4 * down * wide, first, step, wide, to, top, end, depth)
            elif step == 2:
                take_column(2, LANES, line, 4 * down * wide, first, step, wide, to, top, end, depth)
            else:
                take_column(0, LANES, line, 4 * down * wide, first, step, wide, to, top, end, depth)


@functools.cache
def kernel(adding: int) -> Entry:
    """The compiled convolution."""
    ADD, L, EDGES = adding, LANES, LONGEST + 1
    R1, R2, R3, R4, MOST = HEIGHTS

    def runs_kernel(pointer):
        args = address_of(pointer)
        slot, tasks, chunks = take(args + conv.SLOT), get(args + conv.TASKS), get(args + conv.CHUNKS)
        rows, blocks, panels = get(args + conv.ROWS), get(args + conv.BLOCKS), get(args + conv.PANELS)
        starts, d, k = get(args + conv.STARTS), get(args + conv.OFFSETS), get(args + conv.VALUES)
        scratch = get(args + conv.SCRATCH) + slot * get(args + conv.SCRATCH_BYTES)
        sums, y_row = scratch + get(args + conv.SUMS), get(args + conv.Y_ROW)
        low, up = get(args + conv.LOW), get(args + conv.UP)
        bias, step, code = get(args + conv.BIAS), 4, get(args + conv.ACTIVATION)
        if bias == 0:
            bias, step = get(args + conv.ZERO), 0
        across, strip, s = get(args + ACROSS), get(args + STRIP), 4 * rows
        line, ps, packed = 4 * L, 16 * across, -1
        while True:
            task = take(args + conv.NEXT)
            if task >= tasks:
                break
            place, chunk = task // chunks, task % chunks
            image, number = place // panels, place % panels
            i0, i1 = chunk * rows // chunks, (chunk + 1) * rows // chunks
            if place != packed:
                pack(args, get(args + conv.X) + image * get(args + conv.X_IMAGE), number, scratch)
            packed = place
            vectors = get(args + conv.VECTORS) if number < panels - 1 else get(args + conv.LAST_VECTORS)
            shift = image * get(args + conv.Y_IMAGE)
            y, more = get(args + conv.Y) + shift, get(args + conv.RESIDUAL) + shift
            to = get(args + conv.PLACES) + number * get(args + conv.PLACES_PANEL)
            high = vectors // across
            tiles = (high + MOST - 1) // MOST
            for tile_block in range(across * tiles * blocks):
                tile, block = tile_block // blocks, tile_block % blocks
                column, t = tile // tiles, tile % tiles
                v = t * high // tiles
                n = (t + 1) * high // tiles - v
                panel, p = scratch + strip * column + line * v, to + 16 * (v * across + column)
                a, z = 1 if block == 0 else 0, 1 if block == blocks - 1 else 0
                begin = starts + s * EDGES * block
                for i in range(i0, i1):
                    f, m, w = begin + 4 * i, sums + (i - i0) * 4 * L * MOST, bias + i * step
                    o, q = y + i * y_row, more + i * y_row
                    if n <= R1:
                        runs_tile(R1, L, ADD, a, z, f, s, d, k, panel, line, m, o, p, ps, q, w, low, up, n)
                    elif n <= R2:
                        runs_tile(R2, L, ADD, a, z, f, s, d, k, panel, line, m, o, p, ps, q, w, low, up, n)
                    elif n <= R3:
                        runs_tile(R3, L, ADD, a, z, f, s, d, k, panel, line, m, o, p, ps, q, w, low, up, n)
                    elif n <= R4:
                        runs_tile(R4, L, ADD, a, z, f, s, d, k, panel, line, m, o, p, ps, q, w, low, up, n)
                    else:
                        runs_tile(MOST, L, ADD, a, z, f, s, d, k, panel, line, m, o, p, ps, q, w, low, up, n)
            if code > 0:
                first = number * get(args + conv.PANEL_BYTES)
                count = min(get(args + conv.PANEL_BYTES), get(args + conv.OUT_BYTES) - first) // 4
                for i in range(i0, i1):
                    activate(code, y + i * y_row + first, count)

    return Entry(compile_kernel(runs_kernel, f"sparse convolution by runs of taps{' and sum' * adding}"))
