"""Accumulators for rows of a sparse x sparse product that are too wide for a dense row of sums: hashing and sorting.

Entries are (int32 column, value) in two lists by address; `size` is the bytes of a value, 4 or 8.
"""

from __future__ import annotations

from gossamer.kernels.cpu.cache import helper
from gossamer.kernels.cpu.lanes import get, get_i32
from gossamer.kernels.cpu.rowlanes import (
    BLOCK,
    copy_bytes,
    merge_entry,
    move,
    move_add,
    rank_row,
    set_i32,
    set_int,
)

# Knuth's multiplicative hash: 2^32 over the golden ratio, odd.
GOLDEN = 2654435769


@helper
def hash_add(columns, values, count, keys, sums, bits, touched, used, size):
    """Add entries to a table of 2^bits places by linear probing; -1 is an empty place. Returns how many are used."""
    last = (1 << bits) - 1
    for e in range(count):
        column = get_i32(columns + 4 * e)
        at = ((column * GOLDEN) & 0xFFFFFFFF) >> (32 - bits)
        key = get_i32(keys + 4 * at)
        while key != column and key != -1:
            at = (at + 1) & last
            key = get_i32(keys + 4 * at)
        if key == -1:
            set_i32(keys + 4 * at, column)
            set_i32(touched + 4 * used, at)
            used += 1
            if size == 4:
                move(4, values + 4 * e, sums + 4 * at)
            else:
                move(8, values + 8 * e, sums + 8 * at)
        elif size == 4:
            move_add(4, values + 4 * e, sums + 4 * at)
        else:
            move_add(8, values + 8 * e, sums + 8 * at)
    return used


@helper
def hash_harvest(keys, sums, touched, used, to_columns, to_values, size):
    """List what a table holds, in the order in which columns first came, and empty it."""
    for u in range(used):
        at = get_i32(touched + 4 * u)
        set_i32(to_columns + 4 * u, get_i32(keys + 4 * at))
        set_i32(keys + 4 * at, -1)
        if size == 4:
            move(4, sums + 4 * at, to_values + 4 * u)
        else:
            move(8, sums + 8 * at, to_values + 8 * u)


@helper
def merge(columns, values, x, x_end, y, y_end, to_columns, to_values, size):
    """Merge two sorted runs, adding entries that share a column; returns how many entries there are."""
    made = 0
    while x < x_end and y < y_end:
        if size == 4:
            took = merge_entry(4, columns, values, x, y, to_columns + 4 * made, to_values + 4 * made)
        else:
            took = merge_entry(8, columns, values, x, y, to_columns + 4 * made, to_values + 8 * made)
        x += took & 1
        y += took >> 1
        made += 1
    if x == x_end:
        x, x_end = y, y_end
    copy_bytes(columns + 4 * x, to_columns + 4 * made, 4 * (x_end - x))
    copy_bytes(values + size * x, to_values + size * made, size * (x_end - x))
    return made + x_end - x


@helper
def sort_entries(columns, values, count, other_columns, other_values, lengths, to_columns, to_values, size):
    """Sort entries by column and add those that share one: runs of sixteen by rank, then merges.

    Both pairs of lists are overwritten; the result goes to a third. Returns how many entries there are.
    """
    runs, span = (count + BLOCK - 1) // BLOCK, BLOCK
    for r in range(runs):
        at, some = BLOCK * r, min(BLOCK, count - BLOCK * r)
        if size == 4:
            n = rank_row(4, columns + 4 * at, values + 4 * at, some, other_columns + 4 * at, other_values + 4 * at)
        else:
            n = rank_row(8, columns + 4 * at, values + 8 * at, some, other_columns + 4 * at, other_values + 8 * at)
        set_int(lengths + 8 * r, n)
    while runs > 1:
        columns, values, other_columns, other_values = other_columns, other_values, columns, values
        for r in range(0, runs, 2):
            x, y = r * span, (r + 1) * span
            y_end = y + get(lengths + 8 * r + 8) if r + 1 < runs else y
            to = other_columns + 4 * x
            n = merge(columns, values, x, x + get(lengths + 8 * r), y, y_end, to, other_values + size * x, size)
            set_int(lengths + 4 * r, n)
        runs, span = (runs + 1) // 2, 2 * span
    made = get(lengths) if count > 0 else 0
    copy_bytes(other_columns, to_columns, 4 * made)
    copy_bytes(other_values, to_values, size * made)
    return made
