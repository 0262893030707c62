"""The sampled dense-dense product: what one thread does, in Numba.

A task is a run of row groups with about its share of the entries; it sums over all tokens, so no two tasks
write the same value and results do not depend on the number of threads. Columns come in the blocks of the stream: a
block of x stays in the second-level cache while the rows pass.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.dots import dots
from gossamer.kernels.cpu.lanes import address_of, get, get_i32, take
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()
# Positions that are summed at a time: four vectors, which divide a panel of 64.
STRIP = 4 * LANES

# Byte offset of each argument of the product; `sddmm` writes them in this order.
(
    SLOT, NEXT, SCRATCH, X, Y, OUT, STARTS, INDICES,
    TASKS, WIDTH, TOKENS, X_PANEL, Y_PANEL, GROUPS, BLOCKS, ENTRIES,
) = range(0, 8 * 16, 8)  # fmt: skip


@helper
def first_group(starts, groups, wanted):
    """The first group that starts at or after the entry `wanted`; the number of groups if there is none."""
    low, high = 0, groups
    while low < high:
        middle = (low + high) // 2
        if get_i32(starts + 4 * middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@functools.cache
def kernel(g: int, index_bytes: int) -> Entry:
    """The compiled sampled product for groups of g rows and 2- or 4-byte indices."""
    G, B, L, S = g, index_bytes, LANES, STRIP

    def sampled_kernel(pointer):
        args = address_of(pointer)
        tasks, width, tokens = get(args + TASKS), get(args + WIDTH), get(args + TOKENS)
        groups, blocks, entries = get(args + GROUPS), get(args + BLOCKS), get(args + ENTRIES)
        starts, indices, out = get(args + STARTS), get(args + INDICES), get(args + OUT)
        row = 4 * width
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            i0 = first_group(starts, groups, entries * task // tasks)
            i1 = first_group(starts, groups, entries * (task + 1) // tasks)
            for first in range(0, tokens, S):
                panel, lane = first // width, 4 * (first % width)
                x, y = get(args + X) + panel * get(args + X_PANEL), get(args + Y) + panel * get(args + Y_PANEL)
                x, y, vectors = x + lane, y + lane, min(4, (tokens - first + L - 1) // L)
                for block in range(blocks):
                    begin = starts + 4 * groups * block
                    for i in range(i0, i1):
                        s, e = get_i32(begin + 4 * i), get_i32(begin + 4 * (i + groups))
                        at = y + i * G * row
                        if vectors == 4:
                            dots(G, 4, L, B, first, s, e, indices, x, row, at, row, out)
                        elif vectors == 3:
                            dots(G, 3, L, B, first, s, e, indices, x, row, at, row, out)
                        elif vectors == 2:
                            dots(G, 2, L, B, first, s, e, indices, x, row, at, row, out)
                        else:
                            dots(G, 1, L, B, first, s, e, indices, x, row, at, row, out)

    return Entry(compile_kernel(sampled_kernel, f"sampled product, groups of {g}, {8 * index_bytes}-bit indices"))
