"""Attention on token panels: what one thread does, in Numba.

A task is a tile of queries of one head of one sequence. Its keys pass by in blocks, each inside one panel; the largest
score and the sum of weights so far go with them, so that no more than a block of scores exists at a time.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.attention_lanes import begin, give, hide_later, score, soften, take_mask, take_queries, weigh
from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.lanes import address_of, get, take
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()
# Vectors of queries in a tile, and rows of a register tile for up to three and for four: most of the register file,
# which AVX2 has half as much of.
WIDEST = 2 if LANES == 8 else 4
NARROW_ROWS, WIDE_ROWS = (8 if LANES != 8 else 4), 4
# Scratch rows beyond the last key or feature that a register tile may compute.
SPARE = 8

# Byte offset of each argument in the block of int64 that the kernel receives.
(
    SLOT, NEXT, SCRATCH, Q, K, V, Y, MASK,
    TASKS, SCRATCH_BYTES, SEQ, HEADS, SHARED, DEPTH, TILES, WIDTH, PITCH, CAUSAL, SCALE, MASK_ROW,
    Q_PANEL, Q_OFFSET, K_PANEL, K_OFFSET, V_PANEL, V_OFFSET, Y_PANEL, Y_OFFSET,
) = range(0, 8 * 28, 8)  # fmt: skip


@helper
def place(base, panel_bytes, offset, position, feature, width):
    """Address of one feature at one position of panels `panel_bytes` apart."""
    return base + position // width * panel_bytes + offset + 4 * (feature * width + position % width)


@helper
def score_keys(vectors, query, key, panel_row, depth, count, start, scores):
    """Scores of `count` keys, rounded up to whole register tiles."""
    row = 4 * LANES * vectors
    if vectors == 1:
        for t in range(0, count, NARROW_ROWS):
            score(NARROW_ROWS, 1, LANES, query, key + 4 * t, panel_row, depth, start + 4 * t, scores + t * row)
    elif vectors == 2:
        for t in range(0, count, NARROW_ROWS):
            score(NARROW_ROWS, 2, LANES, query, key + 4 * t, panel_row, depth, start + 4 * t, scores + t * row)
    elif vectors == 3:
        for t in range(0, count, NARROW_ROWS):
            score(NARROW_ROWS, 3, LANES, query, key + 4 * t, panel_row, depth, start + 4 * t, scores + t * row)
    else:
        for t in range(0, count, WIDE_ROWS):
            score(WIDE_ROWS, 4, LANES, query, key + 4 * t, panel_row, depth, start + 4 * t, scores + t * row)


@helper
def soften_keys(vectors, scores, count, state, causal, first):
    """Weights of `count` keys in place of their scores; with `causal`, lanes below first + t do not see key t."""
    if vectors == 1:
        if causal:
            hide_later(1, LANES, scores, count, first)
        soften(1, LANES, scores, count, state)
    elif vectors == 2:
        if causal:
            hide_later(2, LANES, scores, count, first)
        soften(2, LANES, scores, count, state)
    elif vectors == 3:
        if causal:
            hide_later(3, LANES, scores, count, first)
        soften(3, LANES, scores, count, state)
    else:
        if causal:
            hide_later(4, LANES, scores, count, first)
        soften(4, LANES, scores, count, state)


@helper
def weigh_values(vectors, value, panel_row, depth, weights, count, shrink, sums):
    """Add `count` weighted values to the sums of all features."""
    row = 4 * LANES * vectors
    if vectors == 1:
        for d in range(0, depth, NARROW_ROWS):
            v, last = value + d * panel_row, depth - 1 - d
            weigh(NARROW_ROWS, 1, LANES, v, panel_row, last, weights, count, shrink, sums + d * row)
    elif vectors == 2:
        for d in range(0, depth, NARROW_ROWS):
            v, last = value + d * panel_row, depth - 1 - d
            weigh(NARROW_ROWS, 2, LANES, v, panel_row, last, weights, count, shrink, sums + d * row)
    elif vectors == 3:
        for d in range(0, depth, NARROW_ROWS):
            v, last = value + d * panel_row, depth - 1 - d
            weigh(NARROW_ROWS, 3, LANES, v, panel_row, last, weights, count, shrink, sums + d * row)
    else:
        for d in range(0, depth, WIDE_ROWS):
            v, last = value + d * panel_row, depth - 1 - d
            weigh(WIDE_ROWS, 4, LANES, v, panel_row, last, weights, count, shrink, sums + d * row)


@helper
def open_tile(vectors, args, origin, first, feature, query, sums, state):
    """Bring the tile's queries into scratch memory, scaled, and start its sums."""
    base, panel, offset = get(args + Q), get(args + Q_PANEL), get(args + Q_OFFSET)
    width, depth, seq, scale = get(args + WIDTH), get(args + DEPTH), get(args + SEQ), args + SCALE
    for v in range(vectors):
        s = first + v * LANES
        source, at = place(base, panel, offset, origin + s, feature, width), 4 * LANES * v
        if vectors == 1:
            take_queries(1, LANES, source, 4 * width, depth, seq - s, scale, query + at, sums + at)
        elif vectors == 2:
            take_queries(2, LANES, source, 4 * width, depth, seq - s, scale, query + at, sums + at)
        elif vectors == 3:
            take_queries(3, LANES, source, 4 * width, depth, seq - s, scale, query + at, sums + at)
        else:
            take_queries(4, LANES, source, 4 * width, depth, seq - s, scale, query + at, sums + at)
    if vectors == 1:
        begin(1, LANES, state)
    elif vectors == 2:
        begin(2, LANES, state)
    elif vectors == 3:
        begin(3, LANES, state)
    else:
        begin(4, LANES, state)


@helper
def close_tile(vectors, args, origin, first, feature, sums, total):
    """Write the tile's sums over the sums of weights."""
    base, panel, offset = get(args + Y), get(args + Y_PANEL), get(args + Y_OFFSET)
    width, depth = get(args + WIDTH), get(args + DEPTH)
    for v in range(vectors):
        target, at = place(base, panel, offset, origin + first + v * LANES, feature, width), 4 * LANES * v
        if vectors == 1:
            give(1, LANES, sums + at, total + at, depth, target, 4 * width)
        elif vectors == 2:
            give(2, LANES, sums + at, total + at, depth, target, 4 * width)
        elif vectors == 3:
            give(3, LANES, sums + at, total + at, depth, target, 4 * width)
        else:
            give(4, LANES, sums + at, total + at, depth, target, 4 * width)


@helper
def attend(args, scratch, task):
    """One tile of queries against all keys that it may see."""
    seq, heads, tiles, width, depth, pitch = (
        get(args + SEQ), get(args + HEADS), get(args + TILES), get(args + WIDTH), get(args + DEPTH), get(args + PITCH),
    )  # fmt: skip
    number, pair = task % tiles, task // tiles
    head, sequence = pair % heads, pair // heads
    feature, shared = head * depth, head // get(args + SHARED) * depth
    # Padding queries take part, so that what is written for them is finite.
    in_all, origin = pitch // LANES, sequence * pitch
    v0, v1 = number * in_all // tiles, (number + 1) * in_all // tiles
    vectors, first = v1 - v0, v0 * LANES
    row, causal, mask = 4 * LANES * vectors, get(args + CAUSAL), get(args + MASK)
    query, scores, start = scratch, scratch + depth * row, scratch + (depth + width + SPARE) * row
    sums, state = start + 4 * (width + SPARE), start + 4 * (width + SPARE) + (depth + SPARE) * row
    open_tile(vectors, args, origin, first, feature, query, sums, state)
    take_mask(LANES, 0, 0, start, width + SPARE)
    keys = min(seq, v1 * LANES) if causal else seq
    t = 0
    while t < keys:
        count = min(keys - t, width - (origin + t) % width)
        if mask != 0:
            take_mask(LANES, mask + sequence * get(args + MASK_ROW) + 4 * t, count, start, count + SPARE)
        key = place(get(args + K), get(args + K_PANEL), get(args + K_OFFSET), origin + t, shared, width)
        score_keys(vectors, query, key, 4 * width, depth, count, start, scores)
        soften_keys(vectors, scores, count, state, causal and t + count > first + 1, t - first)
        value = place(get(args + V), get(args + V_PANEL), get(args + V_OFFSET), origin + t, shared, width)
        weigh_values(vectors, value, 4 * width, depth, scores, count, state + 2 * row, sums)
        t += count
    close_tile(vectors, args, origin, first, feature, sums, state + row)


@functools.cache
def kernel() -> Entry:
    """The compiled attention."""

    def attention_kernel(pointer):
        args = address_of(pointer)
        scratch = get(args + SCRATCH) + take(args + SLOT) * get(args + SCRATCH_BYTES)
        tasks = get(args + TASKS)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            attend(args, scratch, task)

    return Entry(compile_kernel(attention_kernel, "attention"))
