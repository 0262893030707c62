"""Values on a support and others off it in one pass, as training with masks asks for in every step.

Memory sets the pace, so nothing is written that is only passed through, and zeros that are in place are only read.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.checks import lies_flat
from gossamer.kernels.cpu.lanes import address_of, get, take
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry
from gossamer.kernels.cpu.tokens import float_bits

FORMS = {"cut": 0, "fade": 1, "clear": 2, "add": 3}
# Entries that pay for waking one more thread: about ten microseconds of work.
GRAIN = 100_000
# Entries of a task: 64 KiB of values.
_EACH = 16_384
_SLOT, _NEXT, _SCRATCH, _X, _KEPT, _Y, _FACTOR, _TASKS, _COUNT, _SHARE = range(0, 8 * 10, 8)


@functools.cache
def _cutting(form: str) -> Entry:
    from gossamer.kernels.cpu.cut_lanes import CLEAR, clear_vectors, write_vectors

    L, F, C = lanes(), FORMS[form], CLEAR

    def cut_kernel(pointer):
        args = address_of(pointer)
        tasks, count, share = get(args + _TASKS), get(args + _COUNT), get(args + _SHARE)
        x, kept, y, factor = get(args + _X), get(args + _KEPT), get(args + _Y), args + _FACTOR
        while True:
            task = take(args + _NEXT)
            if task >= tasks:
                break
            i, stop = task * share, min(count, task * share + share)
            while i + 4 * L <= stop:
                if F == C:
                    clear_vectors(L, 4, x + 4 * i, kept + i)
                else:
                    write_vectors(L, 4, F, x + 4 * i, kept + i, factor, y + 4 * i)
                i += 4 * L
            while i < stop:
                if F == C:
                    clear_vectors(1, 1, x + 4 * i, kept + i)
                else:
                    write_vectors(1, 1, F, x + 4 * i, kept + i, factor, y + 4 * i)
                i += 1

    return Entry(compile_kernel(cut_kernel, f"values on a support, {form}"))


def plan_cut(count: int, form: str, *, threads: int = 1) -> Launch:
    """Lay out `count` values; `.run(x, kept, y, float_bits(factor))` takes addresses of float32, bytes, and float32.

    | form | y |
    |---|---|
    | "cut" | x where kept, else +0 |
    | "fade" | x where kept, else factor·x |
    | "clear" | x itself: +0 where not kept |
    | "add" | y + factor·x where kept, rounded once |
    """
    tasks = -(-count // _EACH)
    threads = max(1, min(threads, tasks, count // GRAIN))
    return launch(_cutting(form), addresses=4, fixed=(tasks, count, _EACH), threads=threads)


def cut_by_kernel(form: str, x: Tensor, kept: Tensor, y: Tensor, factor: float = 0.0) -> bool:
    """Write y by one of the forms of `plan_cut`; False, and nothing done, where the kernel cannot read these tensors.

    Twins: `gossamer.core.cut`.
    """
    flat = lies_flat(x) and lies_flat(kept) and lies_flat(y)
    here = x.is_cpu and kept.is_cpu and y.is_cpu
    alike = x.dtype is y.dtype is torch.float32 and kept.dtype is torch.bool and x.shape == kept.shape == y.shape
    if not (flat and here and alike):
        return False
    plan = plan_cut(x.numel(), form, threads=torch.get_num_threads())
    plan.run(x.data_ptr(), kept.data_ptr(), y.data_ptr(), float_bits(factor))
    if form in ("clear", "add"):
        torch.autograd.graph.increment_version(y)
    return True
