"""Products in bfloat16 and 8-bit integers on panels: what one thread does, in Numba.

A task is (tiles of positions, a run of row groups); shares and tiles are those of `resident`. Columns are not cut into
blocks: sums never leave their registers, and a panel of half or a quarter of the size stays in the caches for longer.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.lanes import address_of, get, get_i32, take_many, thread_number
from gossamer.kernels.cpu.launch import ADDRESSES, NEXT
from gossamer.kernels.cpu.narrow_tiles import WAYS, narrow_tile
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()

# Byte offset of each argument. A plan of bfloat16 passes a zero for X_SCALES as the first of the fixed numbers.
(
    X, Y, BIAS, X_SCALES,
    SHARES, SHARE_STARTS, TASKS, TILES, UNIT, Y_ROW, X_PANEL, Y_PANEL, SCALE_PANEL, ROWS, STARTS, INDICES, VALUES,
    OFFSETS, SCALES, SHIFT, MASK, ZERO, WHO,
) = range(ADDRESSES, ADDRESSES + 8 * 23, 8)  # fmt: skip


def widest(g: int) -> int:
    """Vectors of a full register tile for groups of g rows (measured with AVX-512; the others by their registers)."""
    if LANES == 8:
        return {1: 4, 2: 3, 4: 2, 8: 1}[g]
    return {1: 6, 2: 6, 4: 4, 8: 2}[g]


@functools.cache
def kernel(way: int, g: int, index_bytes: int, code: int, out_bytes: int, masked: int) -> Entry:
    """The compiled product: `way` as in `narrow_tiles.WAYS`, 2- or 4-byte indices and results."""
    N, G, B, C, S, L, W, M = way, g, index_bytes, code, out_bytes, LANES, widest(g), masked
    BYTES = WAYS[way].BYTES

    def narrow_kernel(pointer):
        args = address_of(pointer)
        shares, share_starts = get(args + SHARES), get(args + SHARE_STARTS)
        rows, unit, y_row = get(args + ROWS), get(args + UNIT), get(args + Y_ROW)
        indices, values, bias, bias_step = get(args + INDICES), get(args + VALUES), get(args + BIAS), 4
        offsets, scales = get(args + OFFSETS), get(args + SCALES)
        if bias == 0:
            bias, bias_step = get(args + ZERO), 0
        # A thread begins with the same share of the positions in every layer, which its own caches still hold.
        share = thread_number(get(args + WHO)) % shares
        tried = 0
        while tried < shares:
            number = (take_many(args + NEXT, 1 << 16 * share) >> 16 * share & 0xFFFF) + get_i32(
                share_starts + 4 * share
            )
            if number >= get_i32(share_starts + 4 * share + 4):
                tried, share = tried + 1, (share + 1) % shares
                continue
            task = get(args + TASKS) + 16 * number
            t0, t1, i0, i1 = get_i32(task), get_i32(task + 4), get_i32(task + 8), get_i32(task + 12)
            for t in range(t0, t1):
                at = get(args + TILES) + 12 * t
                panel, first, wide = get_i32(at), L * get_i32(at + 4), get_i32(at + 8)
                x = get(args + X) + panel * get(args + X_PANEL) + BYTES * first
                y = get(args + Y) + panel * get(args + Y_PANEL) + S * first + get(args + SHIFT)
                mask = get(args + MASK) + 4 * first
                by = get(args + X_SCALES) + panel * get(args + SCALE_PANEL) + 4 * first
                s = get_i32(get(args + STARTS) + 4 * i0)
                for i in range(i0, i1):
                    e = get_i32(get(args + STARTS) + 4 * i + 4)
                    to, add, here, at = y + i * G * y_row, bias + i * G * bias_step, rows - i * G, 4 * i * G
                    narrow_tile(
                        N, G, W, L, B, C, S, M, wide, e, s, indices, values, x, unit, to, y_row, here, add, bias_step,
                        offsets + at, scales + at, by, mask,
                    )  # fmt: skip
                    s = e

    return Entry(
        compile_kernel(narrow_kernel, f"{8 * BYTES}-bit sparse product, groups of {g}, {8 * index_bytes}-bit indices")
    )
