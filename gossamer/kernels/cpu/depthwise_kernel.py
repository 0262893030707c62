"""Depthwise convolution: what one thread does. Tasks are runs of planes; results do not depend on who takes them."""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel, helper
from gossamer.kernels.cpu.conv_lanes import GELU, GELU_TANH, HARD_SWISH, SILU, activate_row
from gossamer.kernels.cpu.depthwise_lanes import slide, stride, walk
from gossamer.kernels.cpu.depthwise_small import flat, fold
from gossamer.kernels.cpu.lanes import address_of, copy_row, get, prefetch, take
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()
# Planes copied before the first of them is convolved, so that no load waits for the store before it.
BATCH = 8

# Byte offsets in the argument block, in the order in which `plan_depthwise` writes them.
(
    SLOT, NEXT, SCRATCH, X, Y, BIAS, RESIDUAL,
    TASKS, PLANES, CHANNELS, WEIGHT, TAPS, X_PLANE, Y_PLANE,
    HIGH, WIDE, OUT_HIGH, OUT_WIDE, KERNEL_HIGH, KERNEL_WIDE, STRIDE_HIGH, STRIDE_WIDE,
    DILATION_HIGH, DILATION_WIDE, TOP, LEFT, ACTIVATION, LOW, UP, ZERO, NOTHING,
    SCRATCH_BYTES, ROOM, MASKS, TOGETHER, BEGIN, END, AHEAD, HEAD, TAIL, SKEW,
) = range(0, 8 * 41, 8)  # fmt: skip


@helper
def activate(code, y, count):
    """Apply an activation that is no bound to `count` floats in place."""
    if code == GELU:
        activate_row(LANES, GELU, y, count)
    elif code == GELU_TANH:
        activate_row(LANES, GELU_TANH, y, count)
    elif code == SILU:
        activate_row(LANES, SILU, y, count)
    elif code == HARD_SWISH:
        activate_row(LANES, HARD_SWISH, y, count)


@helper
def ask_for(at, end):
    """Ask for the cache lines from `at` on that begin before `end`."""
    while at < end:
        prefetch(at)
        at += 64


def _most_vectors(kernel: int) -> int:
    """Vectors of one walk: sums of `kernel` output lines each, within the registers."""
    return (4 if LANES == 16 else 2) if kernel == 3 else (4 if LANES == 16 else 1)


@functools.cache
def walk_kernel(step: int, kernel: int, left: int, right: int, narrow: int, adding: int) -> Entry:
    """The compiled kernel for square windows of stride 1 or 2."""
    S, K, PL, PR, NARROW, ADD, L = step, kernel, left, right, narrow, adding, LANES
    MOST = 1 if narrow or step == 2 else _most_vectors(kernel)

    def depthwise_walk(pointer):
        args = address_of(pointer)
        tasks, planes, channels, taps = get(args + TASKS), get(args + PLANES), get(args + CHANNELS), get(args + TAPS)
        h, w, top, none = get(args + HIGH), get(args + WIDE), get(args + TOP), get(args + NOTHING)
        oh, ow, low, up = get(args + OUT_HIGH), get(args + OUT_WIDE), get(args + LOW), get(args + UP)
        bias, step, code = get(args + BIAS), 4, get(args + ACTIVATION)
        if bias == 0:
            bias, step = get(args + ZERO), 0
        vectors = (ow + L - 1) // L
        tiles = (vectors + MOST - 1) // MOST
        ahead, head, tail, area = get(args + AHEAD), get(args + HEAD), get(args + TAIL), 4 * h * w
        skew = get(args + SKEW)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for turn in range(task * planes // tasks, (task + 1) * planes // tasks):
                plane = turn + skew if turn + skew < planes else turn + skew - planes
                channel = plane % channels
                x, y = get(args + X) + plane * get(args + X_PLANE), get(args + Y) + plane * get(args + Y_PLANE)
                r = get(args + RESIDUAL) + plane * get(args + Y_PLANE)
                k, add = get(args + WEIGHT) + 4 * taps * channel, bias + step * channel
                # What another thread has written comes from its caches, which takes longer than a plane.
                ask_for(x + ahead, x + ahead + head)
                ask_for(x + ahead + area - tail, x + ahead + area)
                for tile in range(tiles):
                    v0, v1 = tile * vectors // tiles, (tile + 1) * vectors // tiles
                    c = v0 * L
                    if S == 2:
                        stride(K, PL, L, NARROW, ADD, x, y, k, add, r, none, h, w, oh, ow, top, c, low, up)
                    elif MOST == 1 or v1 - v0 == 1:
                        walk(K, PL, PR, 1, L, NARROW, ADD, x, y, k, add, r, h, w, oh, ow, top, c, low, up)
                    elif v1 - v0 == 2:
                        walk(K, PL, PR, 2, L, NARROW, ADD, x, y, k, add, r, h, w, oh, ow, top, c, low, up)
                    elif v1 - v0 == 3:
                        walk(K, PL, PR, 3, L, NARROW, ADD, x, y, k, add, r, h, w, oh, ow, top, c, low, up)
                    else:
                        walk(K, PL, PR, 4, L, NARROW, ADD, x, y, k, add, r, h, w, oh, ow, top, c, low, up)
                if code > 0:
                    activate(code, y, oh * ow)

    return Entry(compile_kernel(depthwise_walk, f"depthwise {kernel}x{kernel}, stride {step}"))


@functools.cache
def slide_kernel(step: int, adding: int) -> Entry:
    """The compiled kernel for any window; `step` 1 where its columns follow each other."""
    S, ADD, L = step, adding, LANES

    def depthwise_slide(pointer):
        args = address_of(pointer)
        tasks, planes, channels, taps = get(args + TASKS), get(args + PLANES), get(args + CHANNELS), get(args + TAPS)
        high, wide, top, left = get(args + HIGH), get(args + WIDE), get(args + TOP), get(args + LEFT)
        out_high, out_wide, low, up = get(args + OUT_HIGH), get(args + OUT_WIDE), get(args + LOW), get(args + UP)
        kernel_high, kernel_wide = get(args + KERNEL_HIGH), get(args + KERNEL_WIDE)
        stride_high, stride_wide = get(args + STRIDE_HIGH), get(args + STRIDE_WIDE)
        dilation_high, dilation_wide = get(args + DILATION_HIGH), get(args + DILATION_WIDE)
        bias, residual, code = get(args + BIAS), get(args + RESIDUAL), get(args + ACTIVATION)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for plane in range(task * planes // tasks, (task + 1) * planes // tasks):
                channel = plane % channels
                x, y = get(args + X) + plane * get(args + X_PLANE), get(args + Y) + plane * get(args + Y_PLANE)
                r = residual + plane * get(args + Y_PLANE)
                w, add = get(args + WEIGHT) + 4 * taps * channel, bias + 4 * channel
                if bias == 0:
                    add = get(args + ZERO)
                for column in range(0, out_wide, L):
                    slide(
                        S, L, ADD, x, y, w, add, r, high, wide, out_high, out_wide, kernel_high, kernel_wide,
                        stride_high, stride_wide, dilation_high, dilation_wide, top, left, column, low, up,
                    )  # fmt: skip
                if code > 0:
                    activate(code, y, out_high * out_wide)

    return Entry(compile_kernel(depthwise_slide, "depthwise, any window"))


@functools.cache
def fold_kernel(kernel: int, adding: int) -> Entry:
    """The compiled kernel for square windows of stride 1 on narrow images."""
    K, ADD, L = kernel, adding, LANES

    def depthwise_fold(pointer):
        args = address_of(pointer)
        tasks, planes, channels, taps = get(args + TASKS), get(args + PLANES), get(args + CHANNELS), get(args + TAPS)
        high, wide, top, left = get(args + HIGH), get(args + WIDE), get(args + TOP), get(args + LEFT)
        oh, low, up, code = get(args + OUT_HIGH), get(args + LOW), get(args + UP), get(args + ACTIVATION)
        bias, step, masks, together = get(args + BIAS), 4, get(args + MASKS), get(args + TOGETHER)
        if bias == 0:
            bias, step = get(args + ZERO), 0
        each, bytes_ = get(args + ROOM), get(args + SCRATCH_BYTES)
        rooms = get(args + SCRATCH) + take(args + SLOT) * bytes_
        copy_row(LANES, rooms, rooms, 0, bytes_ // 4)
        # A vector of zeros before the first line: the left padding reaches into it.
        rooms += 64
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            p0, p1 = task * planes // tasks, (task + 1) * planes // tasks
            for first in range(p0, p1, BATCH):
                last = min(p1, first + BATCH)
                for plane in range(first, last):
                    room = rooms + (plane - first) * each + 4 * top * wide
                    copy_row(LANES, get(args + X) + plane * get(args + X_PLANE), room, high * wide, high * wide)
                for plane in range(first, last):
                    channel = plane % channels
                    y, r = (
                        get(args + Y) + plane * get(args + Y_PLANE),
                        get(args + RESIDUAL) + plane * get(args + Y_PLANE),
                    )
                    k, add = get(args + WEIGHT) + 4 * taps * channel, bias + step * channel
                    room = rooms + (plane - first) * each
                    fold(K, L, ADD, room, y, k, add, r, masks, left, wide, together, oh, low, up)
                    if code > 0:
                        activate(code, y, oh * wide)

    return Entry(compile_kernel(depthwise_fold, f"depthwise {kernel}x{kernel}, narrow"))


@functools.cache
def flat_kernel(kernel: int, high: int, wide: int, out_high: int, top: int, left: int, adding: int) -> Entry:
    """The compiled kernel for square windows of stride 1 on images of a few vectors."""
    K, H, W, OH, T, PL, ADD, L = kernel, high, wide, out_high, top, left, adding, LANES
    PIXELS = out_high * wide

    def depthwise_flat(pointer):
        args = address_of(pointer)
        tasks, planes, channels, taps = get(args + TASKS), get(args + PLANES), get(args + CHANNELS), get(args + TAPS)
        low, up, code, bias, step = get(args + LOW), get(args + UP), get(args + ACTIVATION), get(args + BIAS), 4
        begin, end = get(args + BEGIN), get(args + END)
        if bias == 0:
            bias, step = get(args + ZERO), 0
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for plane in range(task * planes // tasks, (task + 1) * planes // tasks):
                channel = plane % channels
                x, y = get(args + X) + plane * get(args + X_PLANE), get(args + Y) + plane * get(args + Y_PLANE)
                r = get(args + RESIDUAL) + plane * get(args + Y_PLANE)
                k, add = get(args + WEIGHT) + 4 * taps * channel, bias + step * channel
                flat(K, H, W, OH, T, PL, L, ADD, x, y, k, add, r, begin, end, low, up)
                if code > 0:
                    activate(code, y + 4 * L * begin, min(PIXELS, L * end) - L * begin)

    return Entry(compile_kernel(depthwise_flat, f"depthwise {kernel}x{kernel} on {high} x {wide} pixels"))
