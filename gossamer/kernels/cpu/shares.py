"""Who does what: the positions of all panels cut into tiles, and tiles x row groups dealt out as tasks.

Shapes: Q tiles, T tasks, N row groups, R runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.cpu.arrange import Arranged

# Counters of 16 bits in one word of 64: more threads than these work on shares together.
MOST_SHARES = 4
# Far from what 16 bits count, with every thread asking once too often.
_MOST_TASKS = 32_000
# A share may be this much longer than the mean before its rows are cut, so that others can help: what one thread writes
# into another's share has to come back through the caches in the next layer, which costs more than waiting.
_UNEVEN = 1.15


@dataclass(frozen=True)
class Work:
    """What a kernel reads: share s owns tasks share_starts[s]..share_starts[s + 1].

    Args:
        tiles_Q3: int32, panel, first vector and vectors of each tile.
        tasks_T4: int32, first and last + 1 tile, first and last + 1 row group.
        share_starts: int32 [shares + 1].
        together: most tiles of a task.
    """

    tiles_Q3: Tensor
    tasks_T4: Tensor
    share_starts: Tensor
    together: int


def share_out(
    vectors: list[int], wide: int, together: int, arranged: Arranged, threads: int, *, alike: bool = True, line: int = 1
) -> Work:
    """Give every share about as many vectors of positions, the same ones for any weights.

    Args:
        vectors: of each panel.
        wide: most vectors of a tile.
        together: tiles of a task that share each block of weights.
        arranged: the weights, whose rows are cut where shares are uneven.
        threads: how many will work.
        alike: tiles about equally wide; False: as wide as they can be, and one that is left over.
        line: vectors of a cache line, which no two shares divide: threads that write one line wait for each other.
    """
    shares, total, tiles, tasks, starts = min(threads, MOST_SHARES), sum(vectors), [], [], [0]
    edges = [min(total, round(n * total / (shares * line)) * line) for n in range(shares)] + [total]
    even = threads == shares and max(j - i for i, j in zip(edges, edges[1:])) * shares <= _UNEVEN * total
    cuts = _row_cuts(arranged, 1 if even else 2 * threads)
    together = max(together, -(-total * len(cuts) // _MOST_TASKS))
    for share in range(shares):
        first = len(tiles)
        tiles += _tiles(vectors, wide, edges[share], edges[share + 1], alike)
        spans = [(t, min(t + together, len(tiles))) for t in range(first, len(tiles), together)]
        tasks += [(*span, i, j) for span in spans for i, j in zip(cuts, cuts[1:]) if i < j]
        starts.append(len(tasks))
    return Work(_table(tiles, 3), _table(tasks, 4), torch.tensor(starts, dtype=torch.int32), together)


def share_of(vectors: list[int], wide: int, together: int, arranged: Arranged, begin: int, end: int) -> Work:
    """The one share of vectors begin..end - 1, counted over all panels; other arguments as for `share_out`."""
    tiles, groups = _tiles(vectors, wide, begin, end), arranged.groups
    tasks = [(t, min(t + together, len(tiles)), 0, groups) for t in range(0, len(tiles), together) if groups]
    return Work(_table(tiles, 3), _table(tasks, 4), torch.tensor([0, len(tasks)], dtype=torch.int32), together)


def _table(rows: list[tuple], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, columns)


def _tiles(vectors: list[int], wide: int, begin: int, end: int, alike: bool = True) -> list[tuple[int, int, int]]:
    """Tiles of vectors begin..end, counted over all panels; none straddles two panels."""
    tiles, before = [], 0
    for panel, count in enumerate(vectors):
        low, high = max(begin - before, 0), min(end - before, count)
        pieces = -(-(high - low) // wide)
        for p in range(pieces):
            v0, v1 = low + p * wide, min(high, low + (p + 1) * wide)
            if alike:
                v0, v1 = low + p * (high - low) // pieces, low + (p + 1) * (high - low) // pieces
            tiles.append((panel, v0, v1 - v0))
        before += count
    return tiles


def _row_cuts(arranged: Arranged, pieces: int) -> list[int]:
    """Group numbers that cut the rows into pieces of about as many entries each."""
    runs_BN, groups = arranged.starts_R.diff().reshape(arranged.blocks, -1).to(torch.int64), arranged.groups
    if pieces == 1 or groups == 0:
        return [0, groups]
    # Starting and ending a run costs about four entries.
    reached_N = (runs_BN + 4).sum(0).cumsum(0)
    wanted = torch.arange(1, pieces) * int(reached_N[-1]) / pieces
    return [0, *torch.searchsorted(reached_N.double(), wanted.double()).tolist(), groups]
