"""The sparse x dense product on panels that stay where they are: what one thread does, in Numba.

x is read in place and y written in place, so nothing is packed: a task is (panel, a few vectors of positions, a run of
row groups). Where columns come in several blocks, y itself holds the sums between them.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.lanes import address_of, copy_row, get, get_i32, take, take_many, thread_number
from gossamer.kernels.cpu.panels import finish
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry
from gossamer.kernels.cpu.tiles import product_tile

LANES = lanes()
# Rows whose activation is applied in one go, while they are in the first-level cache; a multiple of every group size.
BATCH = 16

# Byte offset of each argument. A plan without residual passes a zero in its place as the first of the fixed numbers.
# NEXT counts the tasks taken from each share in 16 bits of its own.
(
    SLOT, NEXT, SCRATCH, X, Y, BIAS, RESIDUAL,
    SHARES, SHARE_STARTS, TASKS, TILES, ROW, X_PANEL, Y_PANEL, ROWS, GROUPS, BLOCKS,
    STARTS, INDICES, VALUES, BOUNDS, CODE, ZERO, HOLD, SCRATCH_BYTES, WHO, ORDER,
) = range(0, 8 * 27, 8)  # fmt: skip


def widest(g: int) -> int:
    """Vectors of a full register tile for groups of g rows (measured)."""
    if LANES == 16:
        return {1: 4, 2: 4, 4: 4, 8: 3}[g]
    if LANES == 8:
        return {1: 6, 2: 4, 4: 3, 8: 1}[g]
    return {1: 4, 2: 4, 4: 5, 8: 3}[g]


@helper
def place_of(order, r):
    """Which row of y the r-th stored row is."""
    return get(order + 8 * r) if order != 0 else r


@helper
def ragged_start(held, row_bytes, bias, bias_step, rows, residual, residual_row, group, count, order):
    """Let held memory stand for a last group that lacks rows: sixteen biases, then its rows of sums."""
    for r in range(group):
        given = r < rows
        place = place_of(order, r) if given else 0
        copy_row(LANES, bias + bias_step * place, held + 4 * r, 1 if given else 0, 1)
        target = held + 64 + r * row_bytes
        given = residual != 0 and given
        source = residual + place * residual_row if given else target
        copy_row(LANES, source, target, count if given else 0, count)


@helper
def ragged_end(held, row_bytes, y, y_row, rows, count, order):
    """Write the rows that a last group does have."""
    for r in range(rows):
        copy_row(LANES, held + 64 + r * row_bytes, y + place_of(order, r) * y_row, count, count)


@helper
def apply(code, y, y_row, rows, count, zero, order):
    """The activation of finished rows, in place."""
    if order == 0:
        finish(y, y_row, y, y_row, rows, count, zero, 0, code)
    else:
        for r in range(rows):
            at = y + get(order + 8 * r) * y_row
            finish(at, y_row, at, y_row, 1, count, zero, 0, code)


@functools.cache
def kernel(g: int, index_bytes: int, ordered: int) -> Entry:
    """The compiled product for groups of g rows and 2- or 4-byte indices; `ordered` where rows have another order."""
    G, B, L, R = g, index_bytes, LANES, ordered
    V2, V3, V4, V5, V6 = (min(v, widest(g)) for v in (2, 3, 4, 5, 6))

    def resident_kernel(pointer):
        args = address_of(pointer)
        slot, shares, share_starts = take(args + SLOT), get(args + SHARES), get(args + SHARE_STARTS)
        rows, groups, blocks, row = get(args + ROWS), get(args + GROUPS), get(args + BLOCKS), get(args + ROW)
        indices, values = get(args + INDICES), get(args + VALUES)
        code, zero = get(args + CODE), get(args + ZERO)
        bias, residual, scratch = get(args + BIAS), get(args + RESIDUAL), get(args + SCRATCH)
        scratch += slot * get(args + SCRATCH_BYTES)
        whole, order = rows // G, get(args + ORDER)
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
            for turn in range(blocks * (t1 - t0)):
                block, tile = turn // (t1 - t0), get(args + TILES) + 12 * (t0 + turn % (t1 - t0))
                # What a ragged group has summed so far, for each tile of the task.
                held = scratch + turn % (t1 - t0) * get(args + HOLD)
                panel, first, wide = get_i32(tile), 4 * L * get_i32(tile + 4), get_i32(tile + 8)
                count = L * wide
                x = get(args + X) + panel * get(args + X_PANEL) + first
                offset = panel * get(args + Y_PANEL) + first
                y = get(args + Y) + offset
                # Sums start from bias and residual in the first block, and from what y holds in later ones.
                bias_at, step, base_at, bounds = zero, 0, y, 0
                if block == 0:
                    base_at = residual + offset if residual != 0 else 0
                    if bias != 0:
                        bias_at, step = bias, 4
                if block == blocks - 1:
                    bounds = get(args + BOUNDS)
                done, starts = i0, get(args + STARTS) + 4 * (groups * block + i0)
                s = get_i32(starts)
                for i in range(i0, i1):
                    starts += 4
                    e = get_i32(starts)
                    # Places of rows: by the stored order from the first row of y, else from this group's first one.
                    places, own = 0, i * G
                    if R:
                        places, own = order + 8 * i * G, 0
                    to, to_row, base, add = y + own * row, row, 0, bias_at + own * step
                    if base_at != 0:
                        base = base_at + own * row
                    ragged = i == whole
                    if ragged:
                        if block == 0:
                            ragged_start(held, 4 * count, add, step, rows - i * G, base, row, G, count, places)
                        places = order + 8 * groups * G
                        to, to_row, base, add = held + 64, 4 * count, held + 64, held if block == 0 else zero
                        step = 4 if block == 0 else 0
                    if wide == 1:
                        product_tile(
                            G, 1, L, B, R, e, s, indices, values, x, row, to, to_row, base, add, step, bounds, places
                        )
                    elif wide == 2:
                        product_tile(
                            G, V2, L, B, R, e, s, indices, values, x, row, to, to_row, base, add, step, bounds, places
                        )
                    elif wide == 3:
                        product_tile(
                            G, V3, L, B, R, e, s, indices, values, x, row, to, to_row, base, add, step, bounds, places
                        )
                    elif wide == 4:
                        product_tile(
                            G, V4, L, B, R, e, s, indices, values, x, row, to, to_row, base, add, step, bounds, places
                        )
                    elif wide == 5:
                        product_tile(
                            G, V5, L, B, R, e, s, indices, values, x, row, to, to_row, base, add, step, bounds, places
                        )
                    else:
                        product_tile(
                            G, V6, L, B, R, e, s, indices, values, x, row, to, to_row, base, add, step, bounds, places
                        )
                    s = e
                    if block == blocks - 1:
                        if ragged:
                            first_of = order + 8 * i * G if R else 0
                            ragged_end(held, 4 * count, y + own * row, row, rows - i * G, count, first_of)
                        if code != 0 and ((i + 1 - done) * G >= BATCH or i == i1 - 1):
                            at, first_of = y + done * G * row, 0
                            if R:
                                at, first_of = y, order + 8 * done * G
                            apply(code, at, row, min(rows, (i + 1) * G) - done * G, count, zero, first_of)
                            done = i + 1

    return Entry(
        compile_kernel(
            resident_kernel,
            f"resident sparse product, groups of {g}, {8 * index_bytes}-bit indices{', re-ordered' * ordered}",
        )
    )
