"""The sparse x sparse product, row by row (Gustavson): what one thread does, in Numba.

A row of C is made in three steps: its terms are listed (products and columns, in the order of A's row), they are added
up by column in an accumulator that suits their number, and the sums are taken out in ascending order of columns.

A task is a run of rows. Its entries go to a list of the thread's own; as soon as all tasks before it know how many
entries they have, the list is copied to its place in C. So C is computed once, without a pass for its sizes.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.accumulate import hash_add, hash_harvest, sort_entries
from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.lanes import address_of, get, get_i32, take
from gossamer.kernels.cpu.rowlanes import (
    BLOCK,
    collect,
    copy_bytes,
    fill_bytes,
    forget,
    give_way,
    harvest,
    harvest_listed,
    lowest_bit,
    publish,
    published,
    rank_row,
    scale_row,
    scatter_add,
    scatter_row,
    scatter_slots,
    set_i32,
    set_int,
    take_marks,
)
from gossamer.kernels.cpu.threads import Entry

# Terms listed before they are added up: with their columns a fifth of a first-level cache.
TERMS = 1024
# Entries of B's rows, on average, up to which terms are added up at once: listing them would cost more.
BRIEF = 8
# Lists of one thread that may wait for their place in C, and the bytes before their entries: task and count.
WAITING, HEAD = 4, 64
# Which rows go where: `sort` takes all rows, `hash` and `dense` leave the shortest to a sort in one register.
DENSE, HASH, SORT = range(3)
# What a kernel makes: C; the values of a C whose pattern is known; the entries of C that a mask names.
PRODUCT, REFILL, MASKED = range(3)

(
    SLOT, NEXT, SCRATCH, A_STARTS, A_COLUMNS, A_VALUES, B_STARTS, B_COLUMNS, B_VALUES, BOUNDS, ROW_TERMS, ENDS,
    C_STARTS, C_COLUMNS, C_VALUES, MASK_STARTS, MASK_COLUMNS, MEMORY,
    TASKS, WIDTH, TIDY, KIND, FAR, ORDERED, BITS, ROOM, BYTES, MARKS_AT, FAR_AT, TERMS_AT, TERM_VALUES_AT, OTHER_AT,
    OTHER_VALUES_AT, LENGTHS_AT, LISTS_AT, LIST_BYTES, COLUMNS_ROOM,
) = range(0, 8 * 37, 8)  # fmt: skip
ADDRESSES = 15


@helper
def deliver(args, list_at, size):
    """Copy a finished list to its place in C if that is known by now; returns how many lists that were: 0 or 1."""
    task, count = get(list_at), get(list_at + 8)
    ends = get(args + ENDS) + 8 * task
    start = published(ends)
    if start < 0:
        return 0
    publish(ends + 8, start + count)
    first, until = get(get(args + BOUNDS) + 8 * task), get(get(args + BOUNDS) + 8 * task + 8)
    starts, entries = get(args + C_STARTS) + 8, list_at + HEAD
    for row in range(first, until):
        set_int(starts + 8 * row, get(starts + 8 * row) + start)
    if get(args + C_VALUES) != 0:
        copy_bytes(entries, get(args + C_COLUMNS) + 4 * start, 4 * count)
        copy_bytes(entries + get(args + COLUMNS_ROOM), get(args + C_VALUES) + size * start, size * count)
    return 1


@helper
def deliver_or_wait(args, list_at, size):
    """`deliver`; where the list cannot go yet, the thread that holds it up may be waiting for this processor."""
    delivered = deliver(args, list_at, size)
    if delivered == 0:
        give_way()
    return delivered


@helper
def clear_table(keys, bits):
    """Empty a hash table."""
    for at in range(1 << bits):
        set_i32(keys + 4 * at, -1)


@helper
def table_bits(terms, width):
    """Logarithm of a table that is at most half full."""
    bits = 5
    while (1 << bits) < 2 * min(terms, width):
        bits += 1
    return bits


@helper
def mark_slots(columns, count, slots, clear):
    """Give the listed columns the sums from sixteen on, or take them back."""
    for q in range(count):
        set_i32(slots + 4 * get_i32(columns + 4 * q), 0 if clear else BLOCK + q)


@functools.cache
def kernel(size: int, making: int) -> Entry:
    """The compiled product for values of 4 or 8 bytes; `making` is PRODUCT, REFILL or MASKED."""
    S, M = size, making

    def spgemm_kernel(pointer):
        args = address_of(pointer)
        scratch = get(args + MEMORY) + take(args + SLOT) * get(args + BYTES)
        tasks, bounds, c_starts, row_terms = (
            get(args + TASKS),
            get(args + BOUNDS),
            get(args + C_STARTS),
            get(args + ROW_TERMS),
        )
        a_starts, a_columns, a_values = get(args + A_STARTS), get(args + A_COLUMNS), get(args + A_VALUES)
        b_starts, b_columns, b_values = get(args + B_STARTS), get(args + B_COLUMNS), get(args + B_VALUES)
        m_starts, m_columns = get(args + MASK_STARTS), get(args + MASK_COLUMNS)
        width, tidy, kind, far_on = get(args + WIDTH), get(args + TIDY), get(args + KIND), get(args + FAR)
        ordered, room, columns_room = get(args + ORDERED), get(args + ROOM), get(args + COLUMNS_ROOM)
        # Dense: sums, marks, far marks. Hash: sums and keys, places in use. Masked: few sums, a slot per column.
        sums, marks, far = scratch, scratch + get(args + MARKS_AT), scratch + get(args + FAR_AT)
        columns, values = scratch + get(args + TERMS_AT), scratch + get(args + TERM_VALUES_AT)
        other, other_values = scratch + get(args + OTHER_AT), scratch + get(args + OTHER_VALUES_AT)
        lengths = scratch + get(args + LENGTHS_AT)
        lists, list_bytes = scratch + get(args + LISTS_AT), get(args + LIST_BYTES)
        ready, done, made = False, 0, 0
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            if not ready:
                if kind == DENSE:
                    forget(S, sums, get(args + MARKS_AT) // (S * BLOCK))
                    fill_bytes(marks, get(args + TERMS_AT) - get(args + MARKS_AT))
                elif kind == HASH:
                    clear_table(marks, get(args + BITS))
                ready = True
            while made - done == WAITING:
                done += deliver_or_wait(args, lists + done % WAITING * list_bytes, S)
            at = lists + made % WAITING * list_bytes
            to_columns, to_values = at + HEAD, at + HEAD + columns_room
            total = 0
            for row in range(get(bounds + 8 * task), get(bounds + 8 * task + 8)):
                terms = get(row_terms + 8 * row)
                p, p_end = get(a_starts + 8 * row), get(a_starts + 8 * row + 8)
                wanted, wanted_from = 0, 0
                if M == MASKED:
                    wanted_from = get(m_starts + 8 * row)
                    wanted = get(m_starts + 8 * row + 8) - wanted_from
                    if wanted == 0:
                        terms = 0
                    else:
                        mark_slots(m_columns + 4 * wanted_from, wanted, marks, False)
                if terms == 0:
                    p = p_end
                bits = table_bits(terms, width) if kind == HASH else 0
                heavy = 4 * terms >= width
                direct = M == PRODUCT and p_end - p == 1 and tidy != 0
                if direct:
                    columns, values = to_columns + 4 * total, to_values + S * total
                # List the terms. They are added up when the list is full, and stay there if all fit.
                listed, flushed, used, low, high = 0, 0, 0, width, -1
                brief = M == PRODUCT and kind == DENSE and far_on == 0 and not heavy
                if brief and BLOCK < terms <= BRIEF * (p_end - p):
                    while p < p_end:
                        k = get_i32(a_columns + 4 * p)
                        s, e = get(b_starts + 8 * k), get(b_starts + 8 * k + 8)
                        if s < e:
                            low = min(low, get_i32(b_columns + 4 * s))
                            high = max(high, get_i32(b_columns + 4 * e - 4))
                        scatter_row(S, a_values + S * p, b_columns + 4 * s, b_values + S * s, e - s, sums, marks)
                        p += 1
                while p < p_end:
                    k = get_i32(a_columns + 4 * p)
                    s, e = get(b_starts + 8 * k), get(b_starts + 8 * k + 8)
                    if M == PRODUCT and s < e:
                        low = min(low, get_i32(b_columns + 4 * s))
                        high = max(high, get_i32(b_columns + 4 * e - 4))
                    while s < e:
                        count = min(e - s, room - listed)
                        if direct:
                            count = e - s
                        scale_row(
                            S, a_values + S * p, b_columns + 4 * s, b_values + S * s, count,
                            columns + 4 * listed, values + S * listed,
                        )  # fmt: skip
                        listed += count
                        s += count
                        if listed == room and not direct:
                            if M == REFILL:
                                scatter_add(S, 0, columns, values, listed, sums, marks, far)
                            elif M == MASKED:
                                scatter_slots(S, columns, values, listed, marks, sums)
                            elif kind == HASH:
                                used = hash_add(columns, values, listed, marks, sums, bits, far, used, S)
                            elif heavy:
                                scatter_add(S, 0, columns, values, listed, sums, marks, far)
                            elif far_on == 0:
                                scatter_add(S, 1, columns, values, listed, sums, marks, far)
                            else:
                                scatter_add(S, 2, columns, values, listed, sums, marks, far)
                            flushed += listed
                            listed = 0
                    p += 1
                if M == REFILL:
                    scatter_add(S, 0, columns, values, listed, sums, marks, far)
                    start = get(c_starts + 8 * row)
                    count = get(c_starts + 8 * row + 8) - start
                    collect(S, get(args + C_COLUMNS) + 4 * start, count, sums, get(args + C_VALUES) + S * start)
                    continue
                if M == MASKED:
                    if terms > 0:
                        scatter_slots(S, columns, values, listed, marks, sums)
                        for q in range(0, wanted, BLOCK):
                            total += harvest_listed(
                                S, sums + S * (BLOCK + q), m_columns + 4 * (wanted_from + q), wanted - q,
                                to_columns + 4 * total, to_values + S * total,
                            )  # fmt: skip
                    mark_slots(m_columns + 4 * wanted_from, wanted, marks, True)
                elif direct:
                    columns, values = scratch + get(args + TERMS_AT), scratch + get(args + TERM_VALUES_AT)
                    total += listed
                elif terms == 0:
                    pass
                elif terms <= BLOCK:
                    total += rank_row(S, columns, values, listed, to_columns + 4 * total, to_values + S * total)
                elif kind == SORT:
                    total += sort_entries(
                        columns, values, listed, other, other_values, lengths,
                        to_columns + 4 * total, to_values + S * total, S,
                    )  # fmt: skip
                elif kind == HASH:
                    used = hash_add(columns, values, listed, marks, sums, bits, far, used, S)
                    if ordered == 0:
                        hash_harvest(marks, sums, far, used, to_columns + 4 * total, to_values + S * total, S)
                    else:
                        hash_harvest(marks, sums, far, used, columns, values, S)
                        sort_entries(
                            columns, values, used, other, other_values, lengths,
                            to_columns + 4 * total, to_values + S * total, S,
                        )  # fmt: skip
                    total += used
                else:
                    if tidy == 0:
                        low, high = 0, width - 1
                    if heavy:
                        scatter_add(S, 0, columns, values, listed, sums, marks, far)
                        for column in range(low >> 4 << 4, high + 1, BLOCK):
                            total += harvest(S, sums, column, to_columns + 4 * total, to_values + S * total)
                    elif far_on == 0:
                        scatter_add(S, 1, columns, values, listed, sums, marks, far)
                        for group in range(low >> 10, (high >> 10) + 1):
                            found = take_marks(marks + 64 * group)
                            while found != 0:
                                column = (group << 10) + (lowest_bit(found) << 4)
                                found &= found - 1
                                total += harvest(S, sums, column, to_columns + 4 * total, to_values + S * total)
                    else:
                        scatter_add(S, 2, columns, values, listed, sums, marks, far)
                        for hall in range(low >> 16, (high >> 16) + 1):
                            groups = take_marks(far + 64 * hall)
                            while groups != 0:
                                group = (hall << 6) + lowest_bit(groups)
                                groups &= groups - 1
                                found = take_marks(marks + 64 * group)
                                while found != 0:
                                    column = (group << 10) + (lowest_bit(found) << 4)
                                    found &= found - 1
                                    total += harvest(S, sums, column, to_columns + 4 * total, to_values + S * total)
                set_int(c_starts + 8 * row + 8, total)
            if M == REFILL:
                continue
            set_int(at, task)
            set_int(at + 8, total)
            made += 1
            while done < made:
                if deliver(args, lists + done % WAITING * list_bytes, S) == 0:
                    break
                done += 1
        while done < made:
            done += deliver_or_wait(args, lists + done % WAITING * list_bytes, S)

    what = ("sparse x sparse product", "sparse x sparse product of known pattern", "masked sparse x sparse product")
    return Entry(compile_kernel(spgemm_kernel, f"{what[making]}, {8 * size}-bit values"))
