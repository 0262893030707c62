"""DSnoT's swaps: a support stays as large as it is, and single weights trade places to lower the expected error.

Shape suffixes: M output rows, R rows of a chunk, K input columns, G groups of columns, C columns of a group,
T swaps, S sides (0: the error is negative, 1: positive).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.core import Pattern, Stats, Support
from gossamer.core.budget import top
from gossamer.core.errors import PatternError
from gossamer.core.stats import statistic

CHUNK = 2**24  # entries of the weight worked on at once
CALM = 1e-12  # variances count as at least this share of the largest: an input that never changes is grown first


@dataclass(frozen=True)
class Rule:
    """When swaps end and what grows first: the arguments of `swapped`."""

    cycles: int = 50
    threshold: float = 5e-5
    variance_power: float = 1.0
    keep_sign: bool = False


def swapped(w: Tensor, support: Support, stats: Stats, pattern: Pattern, rule: Rule) -> Support:
    """Trade kept for cut weights, row by row, until the output's expected error ε = Σ_cut w_j·E[x_j] is small.

    With d_j = w_j·E[x_j], each cycle makes one trade in every row where |ε| > threshold:
    grow the cut weight with largest sign(ε)·d_j/Var[x_j]^p; cut, of the kept ones with sign(ε)·d_j < 0, the one with
    least |w_j|·√E[x_j²]; then ε += d_cut − d_grown. Where pools are narrower than a row (N:M), the one to cut is the
    least of the grown one's pool, whatever its sign. A weight moves once at most. A row ends where nothing is left to
    grow, or a trade would turn ε's first sign and `keep_sign` holds; a grown one with nothing to give way stays cut.

    Args:
        w: rank 2 or more; axes after the first are input columns.
        support: what is kept now.
        stats: "input_norm", "input_mean" and "input_var", [K] each: √mean x², mean x and variance over tokens.
        pattern: trades stay inside its pools, so its counts stand; single weights compete, none are tied.
        rule: cycles = most trades per row; threshold in units of the output, of one token; variance_power = p.

    Raises:
        PatternError: the pattern ties weights, which cannot trade places one by one.
        CalibrationError: a statistic is missing or of another layer.

    Reference: Zhang et al., Dynamic Sparse No Training, arXiv:2310.08915.
    Departs from: `gossamer.methods.weights.dsnot` lists what differs.
    """
    groups_GC = _column_groups(pattern, tuple(w.shape)).to(w.device)
    inputs = _Inputs(*(statistic(stats, n, (w[0].numel(),)).to(w.device).float() for n in _STATISTICS))
    w_MK, kept_MK = w.detach().float().flatten(1), support.kept.flatten(1).clone()
    rows = max(1, CHUNK // max(w_MK.shape[1], 1))
    for w_RK, kept_RK in zip(w_MK.split(rows), kept_MK.split(rows)):
        _Trades(w_RK, kept_RK, inputs, groups_GC, rule).run()
    return Support(kept_MK.view(w.shape))


def expected_error(w: Tensor, support: Support, stats: Stats) -> Tensor:
    """ε of each row: what the output loses on average, Σ_cut w_j·E[x_j], [M]."""
    mean_K = statistic(stats, "input_mean", (w[0].numel(),)).to(w.device).float()
    return torch.where(support.kept.flatten(1), 0, w.detach().float().flatten(1) * mean_K).sum(1)


_STATISTICS = ("input_norm", "input_mean", "input_var")


@dataclass(frozen=True)
class _Inputs:
    norm_K: Tensor
    mean_K: Tensor
    var_K: Tensor

    def calmness(self, power: float) -> Tensor:
        """1/Var^p, finite."""
        most = self.var_K.amax().clamp(min=torch.finfo(torch.float32).tiny)
        return (self.var_K / most).clamp(min=CALM) ** -power


def _column_groups(pattern: Pattern, shape: tuple[int, ...]) -> Tensor:
    """Columns that share a pool within a row, [G, C]."""
    pools, competitors, tied = pattern.pools(shape)
    if tied > 1:
        raise PatternError(
            f"pattern {str(pattern)!r} ties {tied} weights to one fate, but dsnot trades single weights; "
            "use 'row', 'unstructured' or N:M"
        )
    pool_RC = torch.arange(pools)[:, None].expand(pools, competitors)
    pool_K = pattern.merge(pool_RC, shape)[0].flatten()
    return pool_K.argsort(stable=True).view(len(pool_K.unique()), -1)


@dataclass(frozen=True)
class _Queue:
    """Columns in the order in which they move, for errors below and above zero, and how many there are."""

    columns_RST: Tensor
    length_RS: Tensor

    def at(self, side_R1: Tensor, turn_R1: Tensor) -> tuple[Tensor, Tensor]:
        """The column whose turn it is, and whether there is one."""
        columns_RT = self.columns_RST.take_along_dim(side_R1[..., None], 1)[:, 0]
        there_R1 = turn_R1 < self.length_RS.gather(1, side_R1)
        return columns_RT.gather(1, turn_R1.clamp(max=columns_RT.shape[1] - 1)), there_R1


def _queue(score_S: Sequence[Tensor], most: int) -> _Queue:
    """The best of each side's scores, best first, ties to the lower column; −inf is no candidate."""
    columns = torch.stack([_best(s_RK, most) for s_RK in score_S], 1)
    length = torch.stack([(s_RK != -math.inf).sum(1).clamp(max=columns.shape[2]) for s_RK in score_S], 1)
    return _Queue(columns, length)


def _best(score_RK: Tensor, most: int) -> Tensor:
    won_RK = torch.where(top(score_RK, most), score_RK, -math.inf)
    found_RT = won_RK.topk(min(most, score_RK.shape[1]), dim=1).indices.sort(1).values
    order_RT = won_RK.gather(1, found_RT).sort(dim=1, descending=True, stable=True).indices
    return found_RT.gather(1, order_RT)


class _Trades:
    """Rows that trade side by side; `kept_RK` changes in place."""

    def __init__(self, w_RK: Tensor, kept_RK: Tensor, inputs: _Inputs, groups_GC: Tensor, rule: Rule) -> None:
        self.kept_RK, self.groups_GC, self.rule = kept_RK, groups_GC, rule
        self.d_RK = w_RK * inputs.mean_K
        self.error_R1 = torch.where(kept_RK, 0, self.d_RK).sum(1, keepdim=True)
        self.first_R1 = self.error_R1.sign()
        self.turn_RS = torch.zeros(len(w_RK), 2, dtype=torch.int64, device=w_RK.device)
        pull_RK = self.d_RK * inputs.calmness(rule.variance_power)
        grows = [torch.where(~kept_RK & (self.d_RK * s > 0), s * pull_RK, -math.inf) for s in (-1, 1)]
        self.grow = _queue(grows, rule.cycles)
        # What a weight is worth where it may still be cut, else +inf.
        self.worth_RK = torch.where(kept_RK, w_RK.abs() * inputs.norm_K, math.inf)
        cuts = [torch.where(self.d_RK * s < 0, -self.worth_RK, -math.inf) for s in (-1, 1)]
        self.cut = _queue(cuts, rule.cycles) if len(groups_GC) == 1 else None

    def run(self) -> None:
        open_R1 = torch.ones_like(self.error_R1, dtype=torch.bool)
        for _ in range(self.rule.cycles):
            open_R1 &= self.error_R1.abs() > self.rule.threshold
            if not bool(open_R1.any()):
                return
            open_R1 &= self._cycle(open_R1)

    def _cycle(self, open_R1: Tensor) -> Tensor:
        """One trade in each open row that has one; returns the rows that can go on."""
        side_R1 = (self.error_R1 > 0).long()
        turn_R1 = self.turn_RS.gather(1, side_R1)
        grown_R1, grows_R1 = self.grow.at(side_R1, turn_R1)
        cut_R1, gives_R1 = self.cut.at(side_R1, turn_R1) if self.cut else self._least_of_group(grown_R1)
        after_R1 = self.error_R1 + self.d_RK.gather(1, cut_R1) - self.d_RK.gather(1, grown_R1)
        turns_R1 = gives_R1 & (after_R1.sign() != self.first_R1) & self.rule.keep_sign
        go_R1 = grows_R1 & ~turns_R1
        self._trade(grown_R1, cut_R1, open_R1 & go_R1 & gives_R1, after_R1)
        self.turn_RS.scatter_add_(1, side_R1, torch.ones_like(side_R1))
        return go_R1

    def _least_of_group(self, grown_R1: Tensor) -> tuple[Tensor, Tensor]:
        """What the pool of the grown weight cuts in return, and whether it has anything left to cut."""
        columns_RC = self.groups_GC[self.group_K[grown_R1[:, 0]]]
        least = self.worth_RK.gather(1, columns_RC).min(1, keepdim=True)
        return columns_RC.gather(1, least.indices), least.values.isfinite()

    @cached_property
    def group_K(self) -> Tensor:
        """The group of each column."""
        group_K = torch.empty(self.groups_GC.numel(), dtype=torch.int64, device=self.groups_GC.device)
        for_each_GC = torch.arange(len(self.groups_GC), device=self.groups_GC.device)[:, None]
        return group_K.index_put_((self.groups_GC.flatten(),), for_each_GC.expand_as(self.groups_GC).flatten())

    def _trade(self, grown_R1: Tensor, cut_R1: Tensor, where_R1: Tensor, after_R1: Tensor) -> None:
        rows_R1 = torch.arange(len(where_R1), device=where_R1.device)[:, None][where_R1]
        self.kept_RK[rows_R1, grown_R1[where_R1]] = True
        self.kept_RK[rows_R1, cut_R1[where_R1]] = False
        self.worth_RK[rows_R1, cut_R1[where_R1]] = math.inf
        self.error_R1 = torch.where(where_R1, after_R1, self.error_R1)
