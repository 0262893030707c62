"""Rows to token panels and back, and embedding rows summed into panels: what one thread does, in Numba.

A task is one vector of positions of a panel, with all its features.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.elementwise_lanes import sum_three
from gossamer.kernels.cpu.lanes import address_of, copy_row, get, take, transpose
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()

# Byte offset of each argument of `packing` and `unpacking` in the block of int64 that the kernel receives.
SLOT, NEXT, SCRATCH, X, Y, PANELS, BATCH, SEQ, PITCH, FEATURES, WIDTH, ROW = range(0, 8 * 12, 8)
# Those of `embedding`: up to three tables, each with its ids, rows and ids between sequences.
(
    E_IDS, E_TABLE, E_IDS_2, E_TABLE_2, E_IDS_3, E_TABLE_3, E_Y, E_BAD,
    E_PANELS, E_BATCH, E_SEQ, E_PITCH, E_FEATURES, E_WIDTH, E_LINE, E_SCRATCH_BYTES, E_ROWS,
) = range(24, 24 + 8 * 17, 8)  # fmt: skip


@helper
def real_positions(first, batch, seq, pitch):
    """How many of the vector of positions from `first` on belong to a sequence."""
    return max(0, min(LANES, seq - first % pitch)) if first // pitch < batch else 0


@helper
def panel_place(base, first, features, width):
    """Address of position `first` in panels of this many features."""
    return base + 4 * (first // width * features * width + first % width)


@helper
def into_panel(source, source_row, real, features, target, width):
    """Transpose `real` rows into a vector of lanes of a panel; the other lanes become zero."""
    for k in range(0, features, LANES):
        x, y, cols = source + 4 * k, target + 4 * k * width, features - k
        if real == LANES and cols >= LANES:
            transpose(LANES, 0, 0, x, source_row, LANES, LANES, y, 4 * width, LANES, 0, 0)
        else:
            transpose(LANES, 1, 0, x, source_row, real, cols, y, 4 * width, LANES, 0, 0)


@helper
def out_of_panel(source, width, real, features, target, target_row):
    """Transpose `real` lanes of a panel into rows."""
    for k in range(0, features, LANES):
        x, y, cols = source + 4 * k * width, target + 4 * k, features - k
        if real == LANES and cols >= LANES:
            transpose(LANES, 0, 0, x, 4 * width, LANES, LANES, y, target_row, LANES, 0, 0)
        else:
            transpose(LANES, 1, 0, x, 4 * width, cols, real, y, target_row, cols, 0, 0)


@functools.cache
def packing() -> Entry:
    """The compiled rows-to-panels."""

    def rows_to_panels_kernel(pointer):
        args = address_of(pointer)
        x, y, row, features, width = (
            get(args + X), get(args + Y), get(args + ROW), get(args + FEATURES), get(args + WIDTH),
        )  # fmt: skip
        batch, seq, pitch = get(args + BATCH), get(args + SEQ), get(args + PITCH)
        tasks = get(args + PANELS) * width // LANES
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            first = task * LANES
            real = real_positions(first, batch, seq, pitch)
            source = x + (first // pitch * seq + first % pitch) * row if real > 0 else x
            into_panel(source, row, real, features, panel_place(y, first, features, width), width)

    return Entry(compile_kernel(rows_to_panels_kernel, "rows to panels"))


@functools.cache
def unpacking() -> Entry:
    """The compiled panels-to-rows."""

    def panels_to_rows_kernel(pointer):
        args = address_of(pointer)
        x, y, row, features, width = (
            get(args + X), get(args + Y), get(args + ROW), get(args + FEATURES), get(args + WIDTH),
        )  # fmt: skip
        batch, seq, pitch = get(args + BATCH), get(args + SEQ), get(args + PITCH)
        tasks = get(args + PANELS) * width // LANES
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            first = task * LANES
            real = real_positions(first, batch, seq, pitch)
            if real > 0:
                target = y + (first // pitch * seq + first % pitch) * row
                out_of_panel(panel_place(x, first, features, width), width, real, features, target, row)

    return Entry(compile_kernel(panels_to_rows_kernel, "panels to rows"))


@helper
def row_of(args, table, sequence, s, zeros):
    """Address of the row that a table gives to a position: of zeros without a table, row 0 for an id outside it."""
    base, ids = get(args + E_TABLE + 16 * table), get(args + E_IDS + 16 * table)
    if base == 0:
        return zeros
    rows, apart = get(args + E_ROWS + 16 * table), get(args + E_ROWS + 16 * table + 8)
    row = s if ids == 0 else get(ids + 8 * (sequence * apart + s))
    if row < 0 or row >= rows:
        take(get(args + E_BAD))
        row = 0
    return base + 4 * row * get(args + E_FEATURES)


@helper
def sum_of_rows(args, sequence, s, zeros, target):
    """One embedding row of each table, summed."""
    rows = row_of(args, 0, sequence, s, zeros), row_of(args, 1, sequence, s, zeros), row_of(args, 2, sequence, s, zeros)
    sum_three(LANES, rows[0], rows[1], rows[2], target, get(args + E_FEATURES))


@functools.cache
def embedding() -> Entry:
    """The compiled sum of embeddings."""

    def embed_kernel(pointer):
        args = address_of(pointer)
        rows = get(args + SCRATCH) + take(args + SLOT) * get(args + E_SCRATCH_BYTES)
        y, features, width, line = get(args + E_Y), get(args + E_FEATURES), get(args + E_WIDTH), get(args + E_LINE)
        batch, seq, pitch = get(args + E_BATCH), get(args + E_SEQ), get(args + E_PITCH)
        tasks, zeros = get(args + E_PANELS) * width // LANES, rows + 4 * line * LANES
        copy_row(LANES, zeros, zeros, 0, line)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            first = task * LANES
            real = real_positions(first, batch, seq, pitch)
            for t in range(real):
                sum_of_rows(args, first // pitch, first % pitch + t, zeros, rows + 4 * t * line)
            into_panel(rows, 4 * line, real, features, panel_place(y, first, features, width), width)

    return Entry(compile_kernel(embed_kernel, "embedding"))
