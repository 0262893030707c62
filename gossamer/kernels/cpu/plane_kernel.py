"""Pooling, layout changes and elementwise work on image planes: what one thread does. Tasks are runs of planes."""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.depthwise_kernel import activate
from gossamer.kernels.cpu.lanes import address_of, copy_row, get, take
from gossamer.kernels.cpu.panels import pack_rows
from gossamer.kernels.cpu.plane_lanes import add_row, mean_row, pool_lines, scale_row
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()

# Byte offsets in the argument block. Every kernel here has three addresses and then starts alike; X and Y are strides.
SLOT, NEXT, SCRATCH, FIRST, SECOND, THIRD, TASKS, PLANES, COUNT, X_PLANE, Y_PLANE = range(0, 8 * 11, 8)
# Pooling goes on with the window, the sum with its activation, the change of layout with channels.
(
    HIGH, WIDE, OUT_HIGH, OUT_WIDE, KERNEL_HIGH, KERNEL_WIDE,
    STRIDE_HIGH, STRIDE_WIDE, DILATION_HIGH, DILATION_WIDE, TOP, LEFT,
) = range(8 * 11, 8 * 23, 8)  # fmt: skip
ACTIVATION, LOW, UP = range(8 * 11, 8 * 14, 8)
(CHANNELS,) = range(8 * 11, 8 * 12, 8)


@functools.cache
def pool_kernel(how: int, step: int) -> Entry:
    """Max or mean of windows; `step` is 1 where columns follow each other, 0 for any stride."""
    H, S, L = how, step, LANES

    def pool(pointer):
        args = address_of(pointer)
        tasks, planes = get(args + TASKS), get(args + PLANES)
        high, wide, out_high, out_wide = get(args + HIGH), get(args + WIDE), get(args + OUT_HIGH), get(args + OUT_WIDE)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for plane in range(task * planes // tasks, (task + 1) * planes // tasks):
                x, y = get(args + FIRST) + plane * get(args + X_PLANE), get(args + SECOND) + plane * get(args + Y_PLANE)
                for column in range(0, out_wide, L):
                    pool_lines(
                        H, S, L, x, y, high, wide, out_high, out_wide,
                        get(args + KERNEL_HIGH), get(args + KERNEL_WIDE), get(args + STRIDE_HIGH),
                        get(args + STRIDE_WIDE), get(args + DILATION_HIGH), get(args + DILATION_WIDE),
                        get(args + TOP), get(args + LEFT), column,
                    )  # fmt: skip

    return Entry(compile_kernel(pool, "pooling"))


@functools.cache
def mean_kernel() -> Entry:
    """The mean of every plane."""

    def mean(pointer):
        args = address_of(pointer)
        tasks, planes, count = get(args + TASKS), get(args + PLANES), get(args + COUNT)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for plane in range(task * planes // tasks, (task + 1) * planes // tasks):
                mean_row(LANES, get(args + FIRST) + plane * get(args + X_PLANE), count, get(args + SECOND) + 4 * plane)

    return Entry(compile_kernel(mean, "mean of planes"))


@functools.cache
def copy_kernel() -> Entry:
    """Planes of one stride copied to planes of another, zeros behind the pixels where there is room."""

    def copy(pointer):
        args = address_of(pointer)
        tasks, planes, count = get(args + TASKS), get(args + PLANES), get(args + COUNT)
        x_plane, y_plane = get(args + X_PLANE), get(args + Y_PLANE)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for plane in range(task * planes // tasks, (task + 1) * planes // tasks):
                x, y = get(args + FIRST) + plane * x_plane, get(args + SECOND) + plane * y_plane
                copy_row(LANES, x, y, count, y_plane // 4)

    return Entry(compile_kernel(copy, "copy of planes"))


@functools.cache
def gather_kernel() -> Entry:
    """Planes made of pixels whose channels follow each other; tasks are runs of channels of an image."""

    def gather(pointer):
        args = address_of(pointer)
        tasks, planes, count = get(args + TASKS), get(args + PLANES), get(args + COUNT)
        channels, y_plane = get(args + CHANNELS), get(args + Y_PLANE)
        images = planes // channels
        parts = tasks // images
        groups = (channels + LANES - 1) // LANES
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            image, part = task // parts, task % parts
            c0, c1 = part * groups // parts * LANES, min(channels, (part + 1) * groups // parts * LANES)
            x = get(args + FIRST) + 4 * (image * count * channels + c0)
            y = get(args + SECOND) + (image * channels + c0) * y_plane
            pack_rows(x, 4 * channels, count, c1 - c0, y, y_plane // 4)

    return Entry(compile_kernel(gather, "planes of channels-last images"))


@functools.cache
def add_kernel() -> Entry:
    """The sum of two sets of planes, and an activation."""

    def add(pointer):
        args = address_of(pointer)
        tasks, planes, count = get(args + TASKS), get(args + PLANES), get(args + COUNT)
        code, low, up, stride = get(args + ACTIVATION), get(args + LOW), get(args + UP), get(args + X_PLANE)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for plane in range(task * planes // tasks, (task + 1) * planes // tasks):
                at = plane * stride
                y = get(args + THIRD) + at
                add_row(LANES, get(args + FIRST) + at, get(args + SECOND) + at, y, count, low, up)
                if code > 0:
                    activate(code, y, count)

    return Entry(compile_kernel(add, "sum of planes"))


@functools.cache
def scale_kernel(gate: int) -> Entry:
    """Every plane times its gate."""
    GATE = gate

    def scale(pointer):
        args = address_of(pointer)
        tasks, planes, count, stride = get(args + TASKS), get(args + PLANES), get(args + COUNT), get(args + X_PLANE)
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            for plane in range(task * planes // tasks, (task + 1) * planes // tasks):
                at = plane * stride
                scale_row(
                    LANES, GATE, get(args + FIRST) + at, get(args + SECOND) + 4 * plane, get(args + THIRD) + at, count
                )

    return Entry(compile_kernel(scale, "scale of planes"))
