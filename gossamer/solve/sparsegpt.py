"""SparseGPT: prune columns left to right and let the columns still to come make up for each cut.

Shape suffixes: K input columns, M output rows. Work is done on the transpose, so that a column is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import Budget, Pattern, Stats, Support, select
from gossamer.core.budget import resolve
from gossamer.core.stats import statistic

from .columns import Choice, Span, Walk, walk
from .hessian import factor
from .row_grid import RowGrid


def sparsegpt(
    w: Tensor,
    stats: Stats,
    pattern: Pattern,
    budget: Budget,
    *,
    damping: float = 0.01,
    block: int = 128,
    bits: int | None = None,
    symmetric: bool = False,
) -> tuple[Tensor, Support]:
    """New weights and their support, minimising ‖(W − Ŵ)X‖² greedily.

    For each column j: err = (w_j − ŵ_j)/U_jj, then w_l −= err·U_jl for every later column l, where UᵀU = (G+λI)⁻¹.
    ŵ_j is 0 where cut, else w_j, rounded if bits are given: what rounding loses is made up for as cuts are.
    A unit is worth Σ w²/U_jj² over its tied entries, with w as compensated so far.

    Args:
        w: rank 2 or more, any float dtype; axes after the first are input columns. Math is float32 (float64 stays).
        stats: needs "gram", [K, K], mean over tokens of x xᵀ.
        pattern: any pattern; pools wider than a block are shared out over blocks so that their count stays exact.
        budget: counts (Keep, Density) are exact over the layer; others are spent block by block.
        damping: λ as a share of the mean diagonal.
        block: columns between updates of everything to the right. Unit: columns.
        bits, symmetric: kept weights are rounded to this grid of their row (`RowGrid`); None = not rounded.

    Raises:
        BudgetError: bits are not from 2 to 8.
        CalibrationError: no Gram matrix, or one that no damping makes positive definite.
        NonFiniteError: the Gram matrix holds NaN or infinity; calibrate in float32.

    Reference: Frantar & Alistarh, SparseGPT, arXiv:2301.00774.
    Departs from: the official code prunes ⌊s·n⌋ + 1 entries per block and all that tie with the threshold, here counts
        are exact; the damping's mean leaves dead inputs out; one float64 Cholesky of G taken from the last column up
        replaces two and an inverse, and later columns are updated block by block from it (same values).
    """
    if w.numel() == 0:
        return w.detach().clone(), select(w.detach().abs(), pattern, resolve(budget))
    k = w[0].numel()
    v_KK, dead_K = factor(statistic(stats, "gram", (k, k)).to(w.device), damping=damping)
    exact = torch.float64 if w.dtype == torch.float64 else torch.float32
    w_KM = w.detach().flatten(1).t().to(exact).clone(memory_format=torch.contiguous_format)
    w_KM[dead_K] = 0
    plan = walk(pattern, w.shape, block=block, device=w.device)
    grid = None if bits is None else RowGrid.of(w_KM, bits, symmetric=symmetric)
    sweep = _Sweep(w_KM, v_KK.to(exact), torch.zeros_like(w_KM), torch.zeros_like(w_KM), plan, resolve(budget), grid)
    for span in plan.spans:
        sweep.block(span)
    support = Support((sweep.cut_KM == 0).t().reshape(w.shape))
    return w_KM.t().reshape(w.shape).to(w.dtype), support


def saliency(w: Tensor, stats: Stats, *, damping: float = 0.01) -> Tensor:
    """w_ij²/U_jj²: what cutting each entry costs before any of them is made up for; ranks rows for regrouping.

    Args:
        w: as for `sparsegpt`.
        stats: needs "gram", [K, K].
        damping: as for `sparsegpt`.

    Raises:
        CalibrationError: no Gram matrix, or one that no damping makes positive definite.
    """
    k = w[0].numel()
    v_KK, dead_K = factor(statistic(stats, "gram", (k, k)).to(w.device), damping=damping)
    scale_K = torch.where(dead_K, 0, v_KK.diagonal()).to(torch.float32)
    return (w.detach().float().flatten(1) * scale_K).square_().view(w.shape)


@dataclass(frozen=True)
class _Sweep:
    """One walk over a weight. With D = W − Ŵ, a column's value when its turn comes is w_j + (Σ_{i<j} d_i V_ij)/V_jj.

    So a block is brought up to date from V, the plain Cholesky factor; U = V⁻¹ is needed only inside the block.

    Args:
        w_KM: the weights; blocks already walked hold their new values.
        v_KK: upper triangular, VVᵀ = G + λI.
        change_KM: D, filled as blocks are walked.
        cut_KM: V_jj = 1/U_jj where an entry is cut, 0 where it is kept; filled as choices fall due.
        grid: what kept weights are rounded to, or None.
    """

    w_KM: Tensor
    v_KK: Tensor
    change_KM: Tensor
    cut_KM: Tensor
    plan: Walk
    budget: Budget
    grid: RowGrid | None

    def block(self, span: Span) -> None:
        # Three levels (column, a few columns, block) turn most rank-one updates into matrix products.
        a, b, reach = span.start, span.stop, span.reach
        u_EE = _inverse(self.v_KK[a:reach, a:reach])
        past_EM = self.v_KK[:a, a:reach].t() @ self.change_KM[:a]
        now_EM = self.w_KM[a:reach].addmm(u_EE.t(), past_EM)
        err_BM = torch.empty_like(now_EM[: b - a])
        for i, j in span.inner:
            self.columns(now_EM, u_EE, err_BM, range(i, j), span)
            now_EM[j - a :].addmm_(u_EE[i - a : j - a, j - a :].t(), err_BM[i - a : j - a], alpha=-1)
        now_BM = now_EM[: b - a].mul_(self.cut_KM[a:b] == 0).add_(0.0)  # adding 0 turns −0 into 0
        torch.sub(self.w_KM[a:b], now_BM, out=self.change_KM[a:b])
        self.w_KM[a:b] = now_BM

    def columns(self, now_EM: Tensor, u_EE: Tensor, err_BM: Tensor, columns: range, span: Span) -> None:
        a, stop = span.start, columns.stop - span.start
        for j in columns:
            for choice in span.due.get(j, ()):
                self.choose(now_EM, choice, a)
            e = j - a
            torch.mul(now_EM[e], self.cut_KM[j], out=err_BM[e])
            if self.grid is not None:
                self.round(now_EM[e], err_BM[e], j)
            now_EM[e + 1 : stop].addr_(u_EE[e, e + 1 : stop], err_BM[e], alpha=-1)

    def round(self, now_M: Tensor, err_M: Tensor, j: int) -> None:
        """Kept weights of column j go to the grid; what that changes joins the error."""
        new_M = self.grid.rounded(now_M)  # type: ignore[union-attr]
        err_M += torch.where(self.cut_KM[j] == 0, (now_M - new_M) * self.v_KK[j, j], 0)
        now_M.copy_(new_M)

    def choose(self, now_EM: Tensor, choice: Choice, start: int) -> None:
        cols = choice.index
        scale_K1 = self.v_KK.diagonal()[cols, None]
        now_KM = now_EM[_shifted(cols, start)]
        won_KM = self.plan.decide((now_KM * scale_K1).square_(), choice, self.budget)
        self.cut_KM[cols] = ~won_KM * scale_K1


def _inverse(v_EE: Tensor) -> Tensor:
    eye_EE = torch.eye(len(v_EE), dtype=v_EE.dtype, device=v_EE.device)
    return torch.linalg.solve_triangular(v_EE, eye_EE, upper=True)


def _shifted(columns: Tensor | slice, start: int) -> Tensor | slice:
    if isinstance(columns, slice):
        return slice(columns.start - start, columns.stop - start)
    return columns - start
