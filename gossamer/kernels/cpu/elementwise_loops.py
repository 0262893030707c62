"""Sums, products, activations and rotary turns on panels: what one thread does, in Numba."""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.elementwise_lanes import combine_row, rotate_column
from gossamer.kernels.cpu.lanes import address_of, get, take
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()

# Byte offset of each argument of `combining` in the block of int64 that the kernel receives; offsets are in bytes.
(
    SLOT, NEXT, SCRATCH, X, Z, Y,
    TASKS, PARTS, COUNT, EACH, X_PANEL, X_OFFSET, Z_PANEL, Z_OFFSET, Y_PANEL, Y_OFFSET,
) = range(0, 8 * 16, 8)  # fmt: skip
# Those of `rotating`.
(
    R_X, R_COS, R_SIN, R_Y,
    R_TASKS, R_HEADS, R_HALF, R_WIDTH, R_PITCH, R_POSITIONS, R_TABLE_ROW, R_X_PANEL, R_X_OFFSET, R_Y_PANEL, R_Y_OFFSET,
) = range(24, 24 + 8 * 15, 8)  # fmt: skip


@functools.cache
def combining(how: int, code: int) -> Entry:
    """The compiled y = act(x), act(x + z), act(x) * z or act(x * z[0]); a task is part of a panel."""
    H, A, L = how, code, LANES

    def elementwise_kernel(pointer):
        args = address_of(pointer)
        tasks, parts, count, each = get(args + TASKS), get(args + PARTS), get(args + COUNT), get(args + EACH)
        x, z, y = get(args + X) + get(args + X_OFFSET), get(args + Z), get(args + Y) + get(args + Y_OFFSET)
        x_panel, z_panel, y_panel = get(args + X_PANEL), get(args + Z_PANEL), get(args + Y_PANEL)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            panel, start = task // parts, task % parts * each
            other = z if H == 3 else z + get(args + Z_OFFSET) + panel * z_panel + 4 * start
            source, target = x + panel * x_panel + 4 * start, y + panel * y_panel + 4 * start
            combine_row(L, H, A, source, other, target, min(each, count - start))

    return Entry(compile_kernel(elementwise_kernel, f"elementwise, form {how}, activation {code}"))


@functools.cache
def rotating() -> Entry:
    """The compiled rotary embedding; a task is one head of one panel."""
    L = LANES

    def rotary_kernel(pointer):
        args = address_of(pointer)
        tasks, heads, half, width = get(args + R_TASKS), get(args + R_HEADS), get(args + R_HALF), get(args + R_WIDTH)
        pitch, positions, table_row = get(args + R_PITCH), get(args + R_POSITIONS), get(args + R_TABLE_ROW)
        x, y = get(args + R_X) + get(args + R_X_OFFSET), get(args + R_Y) + get(args + R_Y_OFFSET)
        cos, sin = get(args + R_COS), get(args + R_SIN)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            panel, head = task // heads, task % heads * 2 * half * 4 * width
            for lane in range(0, width, L):
                first = panel * width + lane
                # Lanes beyond the last sequence turn by the first angles: they are padding, but stay finite.
                angle = 4 * (first % pitch) if first < positions else 0
                source = x + panel * get(args + R_X_PANEL) + head + 4 * lane
                target = y + panel * get(args + R_Y_PANEL) + head + 4 * lane
                rotate_column(L, source, target, 4 * width, half, cos + angle, sin + angle, table_row)

    return Entry(compile_kernel(rotary_kernel, "rotary embedding"))
