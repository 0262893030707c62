"""The k best of each pool of a few competitors, as N:M training asks for in every step: one pass over the scores.

Shapes: A blocks of m competitors for B pools side by side; scores and winners are [A, m, B].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.checks import need_floats
from gossamer.kernels.cpu.lanes import address_of, get, take
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

MOST = 8  # competitors: they and their ranks are in registers, and each is compared with all others
# Entries that pay for waking one more thread: about ten microseconds of work.
GRAIN = 50_000
# Entries of a task, about: 64 KiB of scores.
_EACH = 16_384
_SLOT, _NEXT, _SCRATCH, _SCORES, _WINNERS, _TASKS, _BLOCKS, _COLUMNS, _EACH_AT = range(0, 8 * 9, 8)


@functools.cache
def _ranking(size: int, kept: int, absolute: bool, neighbours: bool) -> Entry:
    from gossamer.kernels.cpu.few_lanes import rank_columns, rank_neighbours

    L, M, K, A, side = lanes(), size, kept, int(absolute), int(neighbours)

    def few_kernel(pointer):
        args = address_of(pointer)
        tasks, blocks, columns, each = (
            get(args + _TASKS),
            get(args + _BLOCKS),
            get(args + _COLUMNS),
            get(args + _EACH_AT),
        )
        while True:
            task = take(args + _NEXT)
            if task >= tasks:
                break
            block, stop = task * each, min(blocks, task * each + each)
            if side:
                while block + L <= stop:
                    at = block * M
                    rank_neighbours(L, M, K, A, get(args + _SCORES) + 4 * at, get(args + _WINNERS) + at)
                    block += L
            while block < stop:
                at = block * M * columns
                scores, winners = get(args + _SCORES) + 4 * at, get(args + _WINNERS) + at
                for first in range(0, columns, L):
                    rank_columns(L, M, K, A, scores + 4 * first, winners + first, columns, min(L, columns - first))
                block += 1

    return Entry(compile_kernel(few_kernel, f"{kept}:{size} ranking{' of sizes' if absolute else ''}"))


def plan_best_of_few(
    blocks: int, size: int, columns: int, kept: int, *, absolute: bool = False, threads: int = 1
) -> Launch:
    """Lay out the choice of the `kept` highest of every pool, ties to the first; `.run(scores, winners)`.

    Args:
        blocks: A.
        size: m, competitors of a pool, from 2 to 8.
        columns: B, pools that lie side by side; 1 where a pool's competitors are neighbours.
        kept: winners per pool, from 0 to m.
        absolute: rank by |score|.
        threads: how many threads may work.

    Raises:
        FormatError: a size is out of range.
    """
    if not 2 <= size <= MOST or not 0 <= kept <= size:
        raise FormatError(f"this ranks 2 to {MOST} competitors and keeps some of them, got {kept} of {size}")
    each = max(1, _EACH // (size * columns))
    tasks = -(-blocks // each)
    entry = _ranking(size, kept, absolute, columns == 1 and size & (size - 1) == 0)
    threads = max(1, min(threads, tasks, blocks * size * columns // GRAIN))
    return launch(entry, addresses=2, fixed=(tasks, blocks, columns, each), threads=threads)


def best_of_few(scores_AmB: Tensor, kept: int, *, absolute: bool = False) -> Tensor:
    """True for the `kept` highest of every pool, exactly; ties go to the first. Twin: `gossamer.core.select`.

    Args:
        scores_AmB: float32, contiguous, on the CPU; finite, for a NaN has no rank.
        kept: winners per pool.
        absolute: rank by |score|.

    Raises:
        FormatError: other scores, or more than 8 competitors.
    """
    need_floats("scores", scores_AmB, "[A, m, B]", scores_AmB.dim() == 3)
    winners_AmB = torch.empty(scores_AmB.shape, dtype=torch.bool, device="cpu")
    if scores_AmB.numel():
        plan = plan_best_of_few(*scores_AmB.shape, kept, absolute=absolute, threads=torch.get_num_threads())
        plan.run(scores_AmB.data_ptr(), winners_AmB.data_ptr())
    return winners_AmB
