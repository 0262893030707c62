"""How a solver that walks columns left to right meets a pattern: which pools fall due where.

A pattern's axes belong either to rows (the weight's axis 0) or to columns (all others), so every pool is a product
of a set of rows and a set of columns. Pools narrow in columns (2:4 groups) are decided whole, at their first column.
Wide ones (a row, the matrix) are decided a column block at a time, each block getting its share of the pool's count;
shares are cut by cumulative rounding, so they add up to the pool's count exactly.

Shape suffixes: K columns, M rows, R pools, C competitors, T tied entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.core import Budget, Density, Keep, Pattern
from gossamer.core.budget import FEW, count, top, top_of_few
from gossamer.core.pattern import Placed

WIDEST = 512  # pools wider than this many columns are shared out over blocks; narrower ones widen their block


@dataclass(frozen=True)
class Choice:
    """Units that are decided together.

    Args:
        cols_RCT: columns of each unit; all these pools decide the same number of units here.
        before: column units of each pool that were decided earlier.
        total: column units of each pool in all.
    """

    cols_RCT: Tensor
    before: int
    total: int

    @cached_property
    def index(self) -> Tensor | slice:
        """All its columns, as a slice where they are consecutive (which saves a copy)."""
        flat = self.cols_RCT.flatten()
        listed = flat.tolist()
        stop = listed[0] + len(listed)
        return slice(listed[0], stop) if listed == list(range(listed[0], stop)) else flat


@dataclass(frozen=True)
class Span:
    """Columns start…stop−1.

    Args:
        inner: the shorter spans it is walked in.
        due: the choices that fall due here, by column.
    """

    start: int
    stop: int
    inner: tuple[tuple[int, int], ...]
    due: dict[int, list[Choice]]

    @property
    def reach(self) -> int:
        """One past the last column that its choices look at: beyond `stop` where tied entries lie far apart."""
        return max([self.stop, *(int(c.cols_RCT.max()) + 1 for cs in self.due.values() for c in cs)])


@dataclass(frozen=True)
class Walk:
    """A pattern laid on a weight for a walk along its columns."""

    rows_RCT: Tensor
    shuffled: bool
    spans: tuple[Span, ...]

    def units(self, s_KM: Tensor, choice: Choice) -> Tensor:
        """Scores of the columns of `choice` (in its own order) → one score per unit, u_RC."""
        r, c, t = choice.cols_RCT.shape
        s_RCM = s_KM.view(r, c, t, -1).sum(2) if t > 1 else s_KM.view(r, c, -1)
        s = s_RCM[..., self.rows_RCT.flatten()] if self.shuffled else s_RCM
        s = s.view(r, c, *self.rows_RCT.shape)
        s = s.sum(-1) if s.shape[-1] > 1 else s[..., 0]
        return s.permute(2, 0, 3, 1).reshape(s.shape[2] * r, s.shape[3] * c)

    def spread(self, won_RC: Tensor, choice: Choice) -> Tensor:
        """The reverse: one decision per unit → one per entry, in the order of `choice.cols_RCT.flatten()`, [·, M]."""
        r, c, t = choice.cols_RCT.shape
        rr, rc, rt = self.rows_RCT.shape
        won = won_RC.view(rr, r, rc, c).permute(1, 3, 0, 2)[..., None].expand(r, c, rr, rc, rt)
        won_RCM = won.reshape(r, c, rr * rc * rt)
        if self.shuffled:
            won_RCM = won_RCM[..., self.rows_RCT.flatten().argsort()]
        return won_RCM[:, :, None].expand(r, c, t, won_RCM.shape[-1]).reshape(r * c * t, -1)

    def decide(self, s_KM: Tensor, choice: Choice, budget: Budget) -> Tensor:
        """Entries that win, bool in the shape of s_KM."""
        quota = _quota(budget, choice, self.rows_RCT.shape[1])
        if quota is not None and self._is_one_group(choice):
            return top_of_few(s_KM, quota)
        u_RC = self.units(s_KM, choice)
        return self.spread(budget.choose(u_RC) if quota is None else top(u_RC, quota), choice)

    def _is_one_group(self, choice: Choice) -> bool:
        """2:4 and its like: a few columns compete in every row, and nothing is tied or needs rearranging."""
        r, c, t = choice.cols_RCT.shape
        return r == t == 1 and c <= FEW and self.rows_RCT.shape[1:] == (1, 1)


def _quota(budget: Budget, choice: Choice, per_column: int) -> int | None:
    """Units to keep of this choice, or None where the budget is no count and is simply spent block by block."""
    pool = choice.total * per_column
    if isinstance(budget, Keep):
        whole = min(int(budget.k), pool)  # type: ignore[arg-type]
    elif isinstance(budget, Density):
        whole = count(budget.d, pool)  # type: ignore[arg-type]
    else:
        return None
    after = choice.before + choice.cols_RCT.shape[1]
    return _share(whole, after, choice.total) - _share(whole, choice.before, choice.total)


def _share(whole: int, part: int, total: int) -> int:
    return (2 * whole * part + total) // (2 * total)  # whole·part/total, halves up, in integers


def walk(
    pattern: Pattern,
    shape: Sequence[int],
    *,
    block: int = 128,
    inner: int = 16,
    device: torch.device | str = "cpu",
) -> Walk:
    """Lay `pattern` on a weight of `shape` for a walk in blocks of about `block` columns.

    Blocks end where no narrow pool is cut, so they can be shorter (126 for 3:6) or, for wide groups, longer.

    Raises:
        PatternError: the pattern does not fit the shape.
    """
    placed = pattern.place(shape)
    cols_RCT, rows_RCT = _grid([p for p in placed if p.dim > 0]), _grid([p for p in placed if p.dim == 0])
    narrow = _narrow(cols_RCT)
    whole = _whole(cols_RCT) if narrow else list(range(1, cols_RCT.numel() + 1))
    spans = tuple(
        Span(a, b, tuple(_chop(whole, a, b, inner)), _due(cols_RCT, a, b, narrow=narrow, device=device))
        for a, b in _chop(whole, 0, cols_RCT.numel(), block)
    )
    rows = rows_RCT.flatten()
    return Walk(rows_RCT.to(device), bool((rows[1:] < rows[:-1]).any()), spans)


def _grid(placed: Sequence[Placed]) -> Tensor:
    """Indices of the elements that `placed` axes span, arranged [repeat, compete, tied]."""
    order = [i for role in ("repeat", "compete", "tied") for i, p in enumerate(placed) if p.role == role]
    sizes = [math.prod(p.length for p in placed if p.role == role) for role in ("repeat", "compete", "tied")]
    index = torch.arange(math.prod(sizes)).reshape([p.length for p in placed])
    return index.permute(order).reshape(sizes)


def _narrow(cols_RCT: Tensor) -> bool:
    flat = cols_RCT.flatten(1)
    width = int((flat.amax(1) - flat.amin(1)).max()) + 1
    return width < cols_RCT.numel() and width <= WIDEST


def _whole(cols_RCT: Tensor) -> list[int]:
    """Boundaries 1…K that cut no pool."""
    flat = cols_RCT.flatten(1)
    opened = torch.zeros(cols_RCT.numel() + 1, dtype=torch.int64)
    one = torch.ones(len(flat), dtype=torch.int64)
    opened.index_add_(0, flat.amin(1) + 1, one).index_add_(0, flat.amax(1) + 1, -one)
    return [i for i, n in enumerate(opened.cumsum(0).tolist()) if n == 0 and i]


def _chop(whole: list[int], start: int, stop: int, width: int) -> list[tuple[int, int]]:
    """start…stop in pieces of at most `width` where whole boundaries allow, else the shortest that do."""
    pieces, begin, end = [], start, start
    for cut in [c for c in whole if start < c <= stop]:
        if cut > begin + width and end > begin:
            pieces.append((begin, end))
            begin = end
        end = cut
    return [*pieces, (begin, end)]


def _due(
    cols_RCT: Tensor, start: int, stop: int, *, narrow: bool, device: torch.device | str
) -> dict[int, list[Choice]]:
    first_RC = cols_RCT.amin(-1)
    if narrow:
        first_R = first_RC.amin(1)
        starts = first_R[(first_R >= start) & (first_R < stop)].unique().tolist()
        return {j: [Choice(cols_RCT[first_R == j].to(device), 0, first_RC.shape[1])] for j in starts}
    now_RC = (first_RC >= start) & (first_RC < stop)
    kinds = torch.stack([(first_RC < start).sum(1), now_RC.sum(1)], 1)
    choices = []
    for before, n in kinds.unique(dim=0).tolist():
        pools = (kinds == torch.tensor([before, n])).all(1)
        if n:
            cols = cols_RCT[pools][now_RC[pools]].view(-1, n, cols_RCT.shape[2])
            choices.append(Choice(cols.to(device), before, first_RC.shape[1]))
    return {start: choices}
