"""A look at the factors before their product: whether they can be read, how many terms each row has, fair tasks.

A task is a run of rows with bounded work and a bounded number of entries; a row beyond the bounds is a task alone.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.lanes import address_of, get, get_i32, take
from gossamer.kernels.cpu.rowlanes import beyond, falls, set_int
from gossamer.kernels.cpu.threads import Entry

(
    SLOT, NEXT, SCRATCH, A_STARTS, A_COLUMNS, B_STARTS, B_COLUMNS, CUTS, TERMS, FOUND,
    CHUNKS, ROWS, INNER, WIDTH, A_ENTRIES, B_ENTRIES, MOST_ENTRIES, MOST_WORK,
) = range(0, 8 * 18, 8)  # fmt: skip
# What is found out per chunk of rows, in this order.
TASKS, LARGEST, ENTRIES, ALL_TERMS, MOST_TERMS, DAMAGED, UNTIDY = range(7)
# A row costs about as much as this many terms, whatever is in it.
ROW_WORK = 8


@functools.cache
def survey_kernel() -> Entry:
    """The compiled survey; it does not read values."""

    def survey(pointer):
        args = address_of(pointer)
        take(args + SLOT)
        chunks, rows, inner, width = get(args + CHUNKS), get(args + ROWS), get(args + INNER), get(args + WIDTH)
        a_starts, a_columns, a_entries = get(args + A_STARTS), get(args + A_COLUMNS), get(args + A_ENTRIES)
        b_starts, b_columns, b_entries = get(args + B_STARTS), get(args + B_COLUMNS), get(args + B_ENTRIES)
        most_entries, most_work = get(args + MOST_ENTRIES), get(args + MOST_WORK)
        while True:
            chunk = take(args + NEXT)
            if chunk >= chunks:
                break
            found = get(args + FOUND) + 64 * chunk
            # B: columns in range, and rising but where a row ends.
            first, until = chunk * b_entries // chunks, (chunk + 1) * b_entries // chunks
            damaged = beyond(b_columns + 4 * first, until - first, width)
            first = max(first, 1)
            untidy = falls(b_columns + 4 * first, max(until - first, 0))
            first, until = chunk * inner // chunks, (chunk + 1) * inner // chunks
            last = get(b_starts + 8 * first)
            if (first == 0 and last != 0) or (until == inner and get(b_starts + 8 * inner) != b_entries):
                damaged += 1
            for k in range(first, until):
                s, e = get(b_starts + 8 * k), get(b_starts + 8 * k + 8)
                if s > e or e > b_entries:
                    damaged += 1
                elif s < e and s > 0 and get_i32(b_columns + 4 * s) <= get_i32(b_columns + 4 * s - 4):
                    untidy -= 1
            # A: terms row by row, cut into tasks.
            first, until = chunk * rows // chunks, (chunk + 1) * rows // chunks
            if (first == 0 and get(a_starts) != 0) or (until == rows and get(a_starts + 8 * rows) != a_entries):
                damaged += 1
            cuts = get(args + CUTS) + 8 * first
            tasks, largest, all_entries, entries, work, all_terms, most_terms = 0, 0, 0, 0, 0, 0, 0
            for row in range(first, until):
                p, p_end, terms = get(a_starts + 8 * row), get(a_starts + 8 * row + 8), 0
                if p > p_end or p < 0 or p_end > a_entries:
                    damaged += 1
                    p_end = p
                while p < p_end:
                    k = get_i32(a_columns + 4 * p)
                    if k < 0 or k >= inner:
                        damaged += 1
                    else:
                        terms += get(b_starts + 8 * k + 8) - get(b_starts + 8 * k)
                    p += 1
                set_int(get(args + TERMS) + 8 * row, terms)
                all_terms, most_terms, bound = all_terms + terms, max(most_terms, terms), min(terms, width)
                if row == first or entries + bound > most_entries or work + terms + ROW_WORK > most_work:
                    largest, all_entries = max(largest, entries), all_entries + entries
                    set_int(cuts + 8 * tasks, row)
                    tasks, entries, work = tasks + 1, 0, 0
                entries, work = entries + bound, work + terms + ROW_WORK
            set_int(found + 8 * TASKS, tasks)
            set_int(found + 8 * LARGEST, max(largest, entries))
            set_int(found + 8 * ENTRIES, all_entries + entries)
            set_int(found + 8 * ALL_TERMS, all_terms)
            set_int(found + 8 * MOST_TERMS, most_terms)
            set_int(found + 8 * DAMAGED, damaged)
            set_int(found + 8 * UNTIDY, untidy)

    return Entry(compile_kernel(survey, "survey of sparse factors"))
