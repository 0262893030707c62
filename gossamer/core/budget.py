"""Budgets: how many win in each pool. Each is a frozen record; `choose(s_RC)` returns the winners as bool_RC.

A score of −inf means "not in this competition": it never wins, and does not count towards means or masses.
Ties go to the lower index, so counts are exact. Shape suffixes: R pools, C competitors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .errors import BudgetError
from .pattern import FEW
from .schedule import Schedule, at
from .support import counted

B = TypeVar("B", bound="Budget")
FEW_POOLS = 8192  # below this, what costs is the number of calls, not the work
_NUMPY_PARTITIONS = (torch.float32, torch.float64)


@runtime_checkable
class Budget(Protocol):
    """What `select` spends once per pool."""

    def choose(self, s_RC: Tensor) -> Tensor:
        """Winners of each pool, bool_RC."""
        ...


def resolve(budget: B, step: int = 0) -> B:
    """Replace schedules in a budget's fields by their value at `step`."""
    values = {f.name: at(getattr(budget, f.name), step) for f in fields(budget)}  # type: ignore[arg-type]
    if "k" in values:  # a count on its way from one whole number to another
        values["k"] = math.floor(values["k"] + 0.5)
    return replace(budget, **values)  # type: ignore[type-var]


def count(density: float, size: int) -> int:
    """Entries that `density` keeps of `size`: round(density·size), halves up, so 0.5 of 3 keeps 2."""
    return min(size, math.floor(density * size + 0.5))


@dataclass(frozen=True)
class Keep:
    """Exactly k winners per pool (all of them where the pool is smaller)."""

    k: int | Schedule

    def __post_init__(self) -> None:
        if not callable(self.k) and (self.k < 0 or self.k != int(self.k)):
            raise BudgetError(f"keep(k) needs a whole number >= 0, got {self.k}; for a fraction use density(d)")

    def choose(self, s_RC: Tensor) -> Tensor:
        return top(s_RC, int(at(self.k, 0)))


@dataclass(frozen=True)
class Density:
    """The fraction d of each pool, rounded to the nearest whole number of winners (halves up)."""

    d: float | Schedule

    def __post_init__(self) -> None:
        if not callable(self.d) and not 0.0 <= self.d <= 1.0:
            raise BudgetError(f"density is the fraction KEPT, from 0 to 1, got {self.d}; for 80 % zeros write 0.2")

    def choose(self, s_RC: Tensor) -> Tensor:
        return top(s_RC, count(at(self.d, 0), s_RC.shape[1]))


@dataclass(frozen=True)
class Above:
    """Every score strictly above tau."""

    tau: float | Schedule

    def choose(self, s_RC: Tensor) -> Tensor:
        return (s_RC > at(self.tau, 0)) & (s_RC != -math.inf)


@dataclass(frozen=True)
class Mass:
    """The smallest set that holds at least the fraction p of its pool's total (nucleus top-p). Scores are >= 0."""

    p: float | Schedule

    def __post_init__(self) -> None:
        if not callable(self.p) and not 0.0 < self.p <= 1.0:
            raise BudgetError(f"mass(p) needs 0 < p <= 1, got {self.p}")

    def choose(self, s_RC: Tensor) -> Tensor:
        live_RC = s_RC != -math.inf
        s_RC = torch.where(live_RC, s_RC, 0).double()  # float32 sums of many small parts stall short of the total
        if not torch.compiler.is_compiling() and bool((s_RC < 0).any()):
            raise BudgetError("mass(p) adds scores up, so they must not be negative; pass probabilities or magnitudes")
        sorted_RC, order_RC = s_RC.sort(dim=1, descending=True, stable=True)
        before_RC = sorted_RC.cumsum(1) - sorted_RC
        inside_RC = (before_RC < at(self.p, 0) * s_RC.sum(1, keepdim=True)) & (sorted_RC > 0)
        return torch.zeros_like(live_RC).scatter(1, order_RC, inside_RC) & live_RC


@dataclass(frozen=True)
class Gaussian:
    """score > mean + Φ⁻¹(1 − d)·std: hits density d without sorting if the pool is normal. arXiv:2506.06644."""

    d: float | Schedule

    def __post_init__(self) -> None:
        if not callable(self.d) and not 0.0 < self.d < 1.0:
            raise BudgetError(f"gaussian(d) needs 0 < d < 1, got {self.d}; use density(d) at the ends")

    def choose(self, s_RC: Tensor) -> Tensor:
        live_RC = s_RC.isfinite()  # +inf is always first: it wins, but has no part in mean or deviation
        n_R1 = live_RC.sum(1, keepdim=True).clamp(min=1)
        mean_R1 = torch.where(live_RC, s_RC, 0).sum(1, keepdim=True) / n_R1
        var_R1 = torch.where(live_RC, (s_RC - mean_R1) ** 2, 0).sum(1, keepdim=True) / n_R1
        return (s_RC > mean_R1 + NormalDist().inv_cdf(1.0 - at(self.d, 0)) * var_R1.sqrt()) & (s_RC != -math.inf)


def top(s_RC: Tensor, k: int) -> Tensor:
    """The k highest of each row, exactly, ties to the lower index. Linear time: no sort."""
    pools, size = s_RC.shape
    if k >= size:
        return s_RC != -math.inf
    if k <= 0 or pools == 0:
        return torch.zeros_like(s_RC, dtype=torch.bool)
    if size <= FEW and pools > 1:
        return top_of_few(s_RC.t().contiguous(), k).t()
    kth_R1 = _kth(s_RC, size - k + 1)
    if _eager_cpu(s_RC):
        # Without ties at the threshold, which is the usual case, one comparison is all; looking costs no wait here.
        # At least k of each pool reach it, so where k·R do in all, each pool has k.
        reached_RC = s_RC >= kth_R1
        if counted(reached_RC) == k * pools and bool((kth_R1 != -math.inf).all()):
            return reached_RC
    above_RC = s_RC > kth_R1
    tied_RC = (s_RC == kth_R1) & (kth_R1 != -math.inf)
    room_R1 = k - above_RC.sum(1, keepdim=True)
    return above_RC | (tied_RC & (tied_RC.cumsum(1, dtype=torch.int32) <= room_R1))


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _kth(s_RC: Tensor, k: int) -> Tensor:
    """The k-th lowest of each row, [R, 1]. On the CPU NumPy's vectorised partition is many times faster."""
    if not _eager_cpu(s_RC) or s_RC.dtype not in _NUMPY_PARTITIONS:
        return s_RC.kthvalue(k, dim=1, keepdim=True).values
    part_RC = np.partition(s_RC.detach().numpy(), k - 1, axis=1)
    return torch.from_numpy(part_RC[:, k - 1 : k].copy())


def top_of_few(s_CR: Tensor, k: int) -> Tensor:
    """`top` of pools that lie in columns, by counting who beats whom: for few competitors faster than any sort."""
    size, pools = s_CR.shape
    if pools <= FEW_POOLS and _eager_cpu(s_CR):
        first, second, votes_CP, start_C1 = _duels(size)
        lost_PR = (s_CR[second] > s_CR[first]).to(votes_CP.dtype)
        return (torch.addmm(start_C1, votes_CP, lost_PR) < k) & (s_CR != -math.inf)
    # Ranks count from −k, so that winners are those below zero: their sign is the answer.
    rank_CR = torch.arange(-k, size - k, dtype=torch.int8, device=s_CR.device)[:, None].repeat(1, pools)
    for gap in range(1, size):
        later_wins = (s_CR[gap:] > s_CR[:-gap]).view(torch.int8)
        rank_CR[:-gap] += later_wins
        rank_CR[gap:] -= later_wins
    won_CR = (rank_CR >> 7).neg_().view(torch.bool)
    # A sum that is a number has no −inf in it, and costs a twentieth of looking for one.
    return won_CR if _eager_cpu(s_CR) and bool(s_CR.sum().isfinite()) else won_CR & (s_CR != -math.inf)


@lru_cache(maxsize=FEW)
def _duels(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs (first < second), and how a duel lost by `first` moves the ranks: +1 there, −1 at `second`."""
    first, second = torch.triu_indices(size, size, 1)
    pairs = torch.arange(len(first))
    votes_CP = torch.zeros(size, len(first))
    votes_CP[first, pairs], votes_CP[second, pairs] = 1, -1
    return first, second, votes_CP, torch.arange(float(size))[:, None]


def keep(k: int | Schedule) -> Keep:
    """Exactly k winners per pool."""
    return Keep(k)


def density(d: float | Schedule) -> Density:
    """The fraction d of each pool."""
    return Density(d)


def above(tau: float | Schedule) -> Above:
    """Every score strictly above tau."""
    return Above(tau)


def mass(p: float | Schedule) -> Mass:
    """The smallest set that holds the fraction p of its pool's total."""
    return Mass(p)


def gaussian(d: float | Schedule) -> Gaussian:
    """About the fraction d, by mean and standard deviation alone."""
    return Gaussian(d)
