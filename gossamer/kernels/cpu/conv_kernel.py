"""Convolution by sparse weights: what one thread does.

Tasks are (image, panel of output lines, chunk of row groups). A thread packs the lines that a panel needs, then runs
register tiles of row groups x vectors over them, channels in blocks that stay in the first-level cache. Each output is
summed by one task in one order, so results do not depend on who takes what.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.conv_tile import conv_tile, take_row
from gossamer.kernels.cpu.depthwise_kernel import activate
from gossamer.kernels.cpu.lanes import address_of, get, get_i32, take
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()

# Byte offsets in the argument block, in the order in which `conv` writes them.
(
    SLOT, NEXT, SCRATCH, X, Y, BIAS, RESIDUAL,
    TASKS, CHUNKS, PANELS, SCRATCH_BYTES, SUMS, X_IMAGE, X_CHANNELS, Y_IMAGE, Y_ROW,
    ROWS, GROUPS, BLOCKS, STARTS, OFFSETS, VALUES, CHANNELS, CHANNEL,
    LINES, LINE_COUNT, PITCH, PANEL_HIGH, STRIDE_WIDE, HIGH, WIDE,
    VECTORS, LAST_VECTORS, PLACES, PLACES_PANEL, PANEL_BYTES, OUT_BYTES, ACTIVATION, LOW, UP, ZERO, ORDER,
) = range(0, 8 * 42, 8)  # fmt: skip


def widths(g: int) -> tuple[int, ...]:
    """Vectors of a register tile for groups of g rows, up to most of the register file."""
    if LANES == 8:
        return {1: (1, 2, 3, 4, 5, 6), 2: (1, 2, 3, 4), 4: (1, 2, 3), 8: (1,)}[g]
    return {1: (1, 2, 4, 7, 10, 14), 2: (1, 2, 3, 4, 5, 6), 4: (1, 2, 3, 4, 5), 8: (1, 2, 3)}[g]


@helper
def pack(args, x, number, panel):
    """Copy the lines that panel `number` needs, of every channel of the image at x."""
    table, count, pitch = get(args + LINES), get(args + LINE_COUNT), get(args + PITCH)
    high, wide, step = get(args + HIGH), get(args + WIDE), get(args + STRIDE_WIDE)
    channels_at, channel, above = get(args + X_CHANNELS), get(args + CHANNEL), number * get(args + PANEL_HIGH)
    for c in range(get(args + CHANNELS)):
        source, target = x + get(channels_at + 8 * c), panel + c * channel
        for k in range(count):
            row = above + get(table + 24 * k)
            first, to = get(table + 24 * k + 8), target + get(table + 24 * k + 16)
            inside = wide
            if row < 0 or row >= high:
                row, inside = 0, 0
            line = source + 4 * row * wide
            if step == 1:
                take_row(1, LANES, line, first, step, inside, to, pitch)
            elif step == 2:
                take_row(2, LANES, line, first, step, inside, to, pitch)
            else:
                take_row(0, LANES, line, first, step, inside, to, pitch)


@functools.cache
def kernel(g: int, pieces: int, adding: int, ordered: int = 0) -> Entry:
    """The compiled convolution for groups of g rows; `ordered` where rows have another order."""
    G, P, ADD, R, L = g, pieces, adding, ordered, LANES
    V1, V2, V3, V4, V5, V6 = (widths(g) + (widths(g)[-1],) * 6)[:6]
    MOST = V6

    def conv_kernel(pointer):
        args = address_of(pointer)
        slot, tasks, chunks, panels = take(args + SLOT), get(args + TASKS), get(args + CHUNKS), get(args + PANELS)
        rows, groups, blocks = get(args + ROWS), get(args + GROUPS), get(args + BLOCKS)
        starts, d, k = get(args + STARTS), get(args + OFFSETS), get(args + VALUES)
        scratch = get(args + SCRATCH) + slot * get(args + SCRATCH_BYTES)
        sums, y_row, low, up = scratch + get(args + SUMS), get(args + Y_ROW), get(args + LOW), get(args + UP)
        bias, step, code, order = get(args + BIAS), 4, get(args + ACTIVATION), get(args + ORDER)
        if bias == 0:
            bias, step = get(args + ZERO), 0
        packed = -1
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            place, chunk = task // chunks, task % chunks
            image, number = place // panels, place % panels
            i0, i1 = chunk * groups // chunks, (chunk + 1) * groups // chunks
            if place != packed:
                pack(args, get(args + X) + image * get(args + X_IMAGE), number, scratch)
            packed = place
            vectors = get(args + VECTORS) if number < panels - 1 else get(args + LAST_VECTORS)
            y, more = get(args + Y) + image * get(args + Y_IMAGE), get(args + RESIDUAL) + image * get(args + Y_IMAGE)
            to = get(args + PLACES) + number * get(args + PLACES_PANEL)
            tiles = (vectors + MOST - 1) // MOST
            for tile_block in range(tiles * blocks):
                t, block = tile_block // blocks, tile_block % blocks
                v0 = t * vectors // tiles
                n = (t + 1) * vectors // tiles - v0
                panel, p = scratch + 4 * L * v0, to + 16 * P * v0
                a, z, begin = 1 if block == 0 else 0, 1 if block == blocks - 1 else 0, starts + 4 * groups * block
                for i in range(i0, i1):
                    s, e = get_i32(begin + 4 * i), get_i32(begin + 4 * (i + groups))
                    r, m = i * G, sums + (i - i0) * 4 * L * MOST * G
                    # Rows count from the first one of y where they have an order, else from this group's first.
                    own, u = r, 0
                    if R:
                        own, u = 0, order + 8 * r
                    o, q, w, h = y + own * y_row, more + own * y_row, bias + own * step, rows - r
                    if n <= V1:
                        conv_tile(
                            G, V1, L, P, ADD, R, a, z, e, s, d, k, panel, m, o, y_row, p, q, w, step, low, up, h, n, u
                        )
                    elif n <= V2:
                        conv_tile(
                            G, V2, L, P, ADD, R, a, z, e, s, d, k, panel, m, o, y_row, p, q, w, step, low, up, h, n, u
                        )
                    elif n <= V3:
                        conv_tile(
                            G, V3, L, P, ADD, R, a, z, e, s, d, k, panel, m, o, y_row, p, q, w, step, low, up, h, n, u
                        )
                    elif n <= V4:
                        conv_tile(
                            G, V4, L, P, ADD, R, a, z, e, s, d, k, panel, m, o, y_row, p, q, w, step, low, up, h, n, u
                        )
                    elif n <= V5:
                        conv_tile(
                            G, V5, L, P, ADD, R, a, z, e, s, d, k, panel, m, o, y_row, p, q, w, step, low, up, h, n, u
                        )
                    else:
                        conv_tile(
                            G, V6, L, P, ADD, R, a, z, e, s, d, k, panel, m, o, y_row, p, q, w, step, low, up, h, n, u
                        )
            if code > 0:
                first = number * get(args + PANEL_BYTES)
                count = min(get(args + PANEL_BYTES), get(args + OUT_BYTES) - first) // 4
                for r in range(i0 * G, min(rows, i1 * G)):
                    place = get(order + 8 * r) if R else r
                    activate(code, y + place * y_row + first, count)

    return Entry(compile_kernel(conv_kernel, f"sparse convolution, groups of {g}{', re-ordered' * ordered}"))
