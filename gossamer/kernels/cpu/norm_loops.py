"""Layer norm and root-mean-square norm on token panels: what one thread does, in Numba.

A task is a few vectors of positions of one panel, with all their features.
"""

from __future__ import annotations

import functools

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.lanes import address_of, get, take
from gossamer.kernels.cpu.norm_lanes import normalise
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

LANES = lanes()

# Byte offset of each argument in the block of int64 that the kernel receives.
(
    SLOT, NEXT, SCRATCH, X, RESIDUAL, GAMMA, BETA, Y,
    TASKS, PARTS, FEATURES, WIDTH, SHARE, EPS, ONE, ZERO,
) = range(0, 8 * 16, 8)  # fmt: skip


@functools.cache
def kernel(vectors: int, centred: int) -> Entry:
    """The compiled norm of 1, 2 or 4 vectors of positions at once; `centred` 1 for layer norm, 0 for RMS norm."""
    V, C, L = vectors, centred, LANES

    def norm_kernel(pointer):
        args = address_of(pointer)
        tasks, parts, features, row = get(args + TASKS), get(args + PARTS), get(args + FEATURES), 4 * get(args + WIDTH)
        x, residual, gamma, beta, y = (
            get(args + X), get(args + RESIDUAL), get(args + GAMMA), get(args + BETA), get(args + Y),
        )  # fmt: skip
        while True:
            task = take(args + NEXT)
            if task >= tasks:
                break
            at = task // parts * features * row + task % parts * (4 * L * V)
            if residual != 0:
                normalise(V, L, C, 1, x + at, residual + at, gamma, beta, y + at, features, row, args + SHARE)
            else:
                normalise(V, L, C, 0, x + at, 0, gamma, beta, y + at, features, row, args + SHARE)

    return Entry(compile_kernel(norm_kernel, f"{'layer' if centred else 'RMS'} norm, {vectors} vectors"))
