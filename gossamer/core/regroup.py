"""Regroup: which rows share a support. Rows whose scores are alike are brought together before the pattern is laid on.

Rows of a weight may stand in any order: whoever stores or multiplies it can put the outputs back. So a pattern that
ties g neighbouring rows, `(o {4}) [i]`, is free to choose the neighbours.

Shape suffixes: M rows, C groups of g rows, U units (entries of a row that are decided separately), N candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .budget import Budget, resolve
from .errors import PatternError
from .pattern import Pattern
from .select import select
from .support import Support

CANDIDATES = 32  # partners tried for each row in a sweep; 16 loses 0.05 % of the kept score, 256 gains none
SWEEPS = 8
LEAST_GAIN = 1e-5  # of a group's worth: below it rounding decides
WORTHWHILE = 0.01  # a sweep that moves fewer of the rows than this is the last


def regroup(scores: Tensor, pattern: Pattern, budget: Budget) -> Tensor:
    """An order of the rows in which the pattern keeps more: int64 [M], `scores[order]` is what to select on.

    Maximises Σ kept scores over all ways to form groups, by exchanging rows between groups while that helps. With
    S_c = Σ_{r in c} s_r and each pool's threshold τ held for a sweep, exchanging a and b gains
    Σ_u (S_A − s_a + s_b − τ)₊ + (S_B − s_b + s_a − τ)₊ − (S_A − τ)₊ − (S_B − τ)₊, and of the rows that promise most the
    best is taken. No randomness; the order found never keeps less than the one given.

    Args:
        scores: of a weight, outputs first, finite.
        pattern: one whose last factor of the first axis is tied: "4-row", "64:2:8", "4x4", "([o] {4}) [i] {h w}".
        budget: spent once per pool, as in `select`.

    Example:
        >>> from gossamer.core import Density, pattern
        >>> s = torch.tensor([[9.0, 1.0], [1.0, 9.0], [8.0, 0.0], [0.0, 8.0]])
        >>> regroup(s, pattern("2-row"), Density(0.5)).tolist()
        [1, 3, 0, 2]

    Raises:
        PatternError: the pattern ties no neighbouring rows, so that their order changes nothing.
    """
    own = torch.arange(len(scores), device=scores.device)
    g = tied_rows(pattern, scores.shape)
    if g == 1 or len(scores) <= g or not scores.numel():
        return own
    order = _Search(scores, pattern, budget, g).run()
    return order if _kept(scores[order], pattern, budget) > _kept(scores, pattern, budget) else own


def select_regrouped(
    scores: Tensor, pattern: Pattern, budget: Budget, *, within: Support | None = None, step: int = 0
) -> Support:
    """`select` on the rows in the order that `regroup` finds; the support comes back in their own order."""
    budget = resolve(budget, step)
    eligible = scores if within is None else torch.where(within.kept, scores, 0)
    order = regroup(eligible, pattern, budget)
    inside = None if within is None else Support(within.kept[order])
    return Support(select(scores[order], pattern, budget, within=inside).kept[order.argsort()])


def tied_rows(pattern: Pattern, shape: Sequence[int]) -> int:
    """How many neighbouring rows the pattern ties.

    Raises:
        PatternError: none, or rows that are not neighbours.
    """
    first = [p for p in pattern.place(shape) if p.dim == 0]
    if first[-1].role != "tied" or any(p.role == "tied" for p in first[:-1]):
        raise PatternError(
            f"regrouping needs a pattern that ties neighbouring rows, such as '4-row' or '([o] {{4}}) [i]'; "
            f"got {str(pattern)!r}"
        )
    return first[-1].length


def _kept(scores: Tensor, pattern: Pattern, budget: Budget) -> float:
    kept = scores[select(scores, pattern, budget).kept].double()
    return float(kept[kept.isfinite()].sum())


class _Search:
    """Exchanges of rows between groups, until they stop paying."""

    def __init__(self, scores: Tensor, pattern: Pattern, budget: Budget, g: int) -> None:
        self.scores, self.pattern, self.budget, self.g = scores, pattern, budget, g
        inner = [p for p in pattern.place(scores.shape) if p.dim > 0]
        self.tied = [i + 1 for i, p in enumerate(inner) if p.role == "tied"]
        self.lengths = [len(scores), *(p.length for p in inner)]
        self.s_MU = _scaled(self._units(scores.float()).cpu())
        pools, competitors, _ = pattern.pools(scores.shape)
        numbers_RC = torch.arange(pools)[:, None].expand(pools, competitors)
        self.pool_CU = self._first(pattern.merge(numbers_RC, scores.shape))
        self.group_M = torch.arange(len(scores)) // g

    def _units(self, scores: Tensor) -> Tensor:
        """Each row's scores, summed over what is tied inside the row: [M, U]."""
        split = scores.reshape(self.lengths)
        return (split.sum(self.tied) if self.tied else split).flatten(1)

    def _first(self, x: Tensor) -> Tensor:
        """One entry for each decision: x over the whole weight → [C, U]."""
        x = x.reshape(self.lengths)[:: self.g]
        for axis in self.tied:
            x = x.narrow(axis, 0, 1)
        return x.flatten(1)

    def run(self) -> Tensor:
        for _ in range(SWEEPS):
            if self._sweep() <= WORTHWHILE * len(self.group_M):
                break
        return self._order()

    def _order(self) -> Tensor:
        return self.group_M.argsort(stable=True).to(self.scores.device)

    def _thresholds(self, sums_CU: Tensor) -> Tensor:
        """Per unit, the least score that its pool keeps: halfway between the last winner and the first loser."""
        kept_CU = self._first(select(self.scores[self._order()], self.pattern, self.budget).kept).cpu()
        flat, kept, pool = sums_CU.flatten(), kept_CU.flatten(), self.pool_CU.flatten()
        pools = int(pool.max()) + 1
        low = torch.full((pools,), math.inf).scatter_reduce(0, pool[kept], flat[kept], "amin")
        high = torch.full((pools,), -math.inf).scatter_reduce(0, pool[~kept], flat[~kept], "amax")
        middle = torch.where(low.isinf(), high, torch.where(high.isinf(), low, (low + high) / 2))
        return middle[self.pool_CU]

    def _sweep(self) -> int:
        """Offer every row an exchange, with the thresholds of now. Returns how many were made."""
        sums_CU = torch.zeros(self.pool_CU.shape).index_add_(0, self.group_M, self.s_MU)
        self.over_CU = sums_CU - self._thresholds(sums_CU)
        self.fit_MC = self.s_MU @ (self.over_CU > 0).float().t()  # what each group's support holds of a row
        self.worth_C = self.over_CU.clamp_min(0).sum(1)
        self.own_M = self.worth_C[self.group_M] - (self.over_CU[self.group_M] - self.s_MU).clamp_min(0).sum(1)
        return sum(self._exchange(a) for a in range(len(self.group_M)))

    def _exchange(self, a: int) -> bool:
        """Swap row a with the row of another group that gains most, if any gains."""
        home, s_U = int(self.group_M[a]), self.s_MU[a]
        b_N = self._promising(a, home)
        to_N, s_NU = self.group_M[b_N], self.s_MU[b_N]
        here_N = (s_NU + (self.over_CU[home] - s_U)).clamp_min_(0).sum(1)
        there_N = (self.over_CU[to_N] - s_NU + s_U).clamp_min_(0).sum(1)
        gain_N = here_N + there_N - self.worth_C[home] - self.worth_C[to_N]
        best = int(gain_N.argmax())
        if float(gain_N[best]) <= LEAST_GAIN * float(self.worth_C[home]):
            return False
        b, other = int(b_N[best]), int(to_N[best])
        change_U = self.s_MU[b] - s_U
        self.over_CU[home] += change_U
        self.over_CU[other] -= change_U
        self.group_M[a], self.group_M[b] = other, home
        for c in (home, other):
            self._refresh(c)
        return True

    def _promising(self, a: int, home: int) -> Tensor:
        """The rows most likely worth an exchange: by what each would bring to the other's support as it stands."""
        promise_M = self.fit_MC[a][self.group_M] - self.own_M + self.fit_MC[:, home]
        promise_M[self.group_M == home] = -math.inf
        return promise_M.topk(min(CANDIDATES, len(promise_M) - self.g)).indices

    def _refresh(self, c: int) -> None:
        """What group c is worth, and what it would lose without each of its rows."""
        rows = (self.group_M == c).nonzero().squeeze(1)
        self.worth_C[c] = self.over_CU[c].clamp_min(0).sum()
        self.own_M[rows] = self.worth_C[c] - (self.over_CU[c] - self.s_MU[rows]).clamp_min(0).sum(1)


def _scaled(s_MU: Tensor) -> Tensor:
    """Scores of mean size 1; what is out of the competition is worth nothing, what is always first a great deal."""
    finite = s_MU[s_MU.isfinite()]
    scale = float(finite.abs().mean()) if finite.numel() else 0.0
    most = 4 * float(finite.abs().max()) if finite.numel() else 1.0
    return s_MU.nan_to_num(nan=0.0, posinf=most, neginf=0.0).div(scale or 1.0).contiguous()
