"""ALPS: choose a support and the values on it together, by ADMM on a layer's squared output error.

Shape suffixes: K input columns, M output rows. ℓ(B) = ½·tr((B−W)·H·(B−W)ᵀ) with H the scaled Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import Budget, Pattern, Stats, Support, select
from gossamer.core.budget import resolve
from gossamer.core.stats import statistic

from .spectrum import Spectrum, spectrum

SETTLED, LOOKS = 3e-4, 10  # it may stop when no more of the support moves, after so many looks
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # above this share of change, ρ grows by that factor
START, DROP = 0.1, 5.0
Choose = Callable[[Tensor], Tensor]


def alps(
    w: Tensor,
    stats: Stats,
    pattern: Pattern,
    budget: Budget,
    *,
    damping: float = 0.01,
    iterations: int = 300,
    every: int = 3,
    refit: int = 10,
) -> tuple[Tensor, Support]:
    """New weights and their support, minimising ‖(W − B)X‖² + λ‖W − B‖² over both.

    B splits into a free copy and a sparse one D that are pulled together ever harder, V being the price of their gap:
    B = (WH − V + ρD)(H + ρ)⁻¹;  D = the units of B + V/ρ with the largest squares;  V += ρ(B − D).
    Then conjugate gradients solve for the values on the support that was found.

    Args:
        w: rank 2 or more, any float dtype; axes after the first are input columns. Math is float32 (float64 stays).
        stats: needs "gram", [K, K], mean over tokens of x xᵀ.
        pattern: any pattern; a unit is worth the sum of squares of its tied entries.
        budget: spent on the whole layer at once.
        damping: λ as a share of the mean diagonal of the Gram matrix.
        iterations: of ADMM at most; it stops sooner once the support has settled.
        every: iterations between two looks at the support, after which ρ grows. 2 takes a third off the time and costs
            less than 1 % of the error on layers of SmolLM2; 1 takes half and costs up to 4 %.
        refit: steps of conjugate gradients at the end; 0 leaves ADMM's values.

    Raises:
        CalibrationError: no Gram matrix, or all inputs are dead.
        NonFiniteError: the Gram matrix holds NaN or infinity; calibrate in float32.

    Reference: Meng, Behdin, Wang, Mazumder, ALPS, arXiv:2406.07831.
    Departs from: products are float32 after a float64 eigendecomposition, which layers with the same inputs share; any
        pattern is projected on, not only whole matrices and N:M; a support that rests early does not end the search,
        since that of a small layer often rests long before the copies have met.
    """
    if w.numel() == 0:
        return w.detach().clone(), select(w.detach().abs(), pattern, resolve(budget))
    k = w[0].numel()
    exact = torch.float64 if w.dtype == torch.float64 else torch.float32
    gram_KK = statistic(stats, "gram", (k, k))
    s = spectrum(gram_KK, damping=damping).to(w.device, exact)
    scaled_MK = w.detach().flatten(1).to(exact) * s.scale_K
    scaled_MK[:, gram_KK.diagonal().to(w.device) == 0] = 0  # dead inputs lose

    def choose(b_MK: Tensor) -> Tensor:
        return select(b_MK.square().view(w.shape), pattern, resolve(budget)).kept.view_as(b_MK)

    sparse_MK, kept_MK = _admm(scaled_MK, s, choose, iterations, every)
    new_MK = conjugate_gradients(sparse_MK, scaled_MK, s.h_KK, kept_MK, refit) / s.scale_K
    return new_MK.view(w.shape).to(w.dtype), Support(kept_MK.view(w.shape))


@dataclass
class _Penalty:
    """ρ: how hard the two copies are pulled together; it grows as long as the support still moves."""

    rho: float = START
    moved: bool = False

    def restart(self, change: float) -> bool:
        """ρ began so high that the support hardly moves: begin again lower."""
        early = 0 < change <= GROWTH[1][0] and not self.moved and self.rho > 1e-4
        self.rho /= DROP if early else 1.0
        return early

    def grow(self, change: float) -> None:
        self.moved |= change > GROWTH[1][0]
        self.rho *= next(factor for above, factor in GROWTH if change >= above)


def _admm(w_MK: Tensor, s: Spectrum, choose: Choose, iterations: int, every: int) -> tuple[Tensor, Tensor]:
    """D and its support; scaled weights in, scaled weights out."""
    target_MK, penalty = w_MK @ s.h_KK, _Penalty()
    d_MK, v_MK = w_MK, torch.zeros_like(w_MK)
    kept_MK = looked_MK = choose(w_MK)
    for step in range(1, iterations + 1):
        rho = penalty.rho
        b_MK = s.solve(target_MK - v_MK + rho * d_MK, rho)
        free_MK = b_MK + v_MK / rho
        kept_MK = choose(free_MK)
        d_MK = free_MK * kept_MK
        v_MK = v_MK.add_(b_MK - d_MK, alpha=rho)
        if step % every:
            continue
        change = float((kept_MK ^ looked_MK).sum() / (2 * kept_MK.sum().clamp(min=1)))
        looked_MK = kept_MK
        if step >= LOOKS * every and change < SETTLED:
            break
        if penalty.restart(change):
            d_MK, v_MK = w_MK, torch.zeros_like(w_MK)
            continue
        penalty.grow(change)
    return b_MK * kept_MK, kept_MK


def conjugate_gradients(b_MK: Tensor, w_MK: Tensor, h_KK: Tensor, kept_MK: Tensor, steps: int) -> Tensor:
    """The values on a fixed support that minimise ℓ, all rows at once; each step lowers the sum over rows.

    Args:
        b_MK: where to start; zero outside the support.
        w_MK: the weights whose products are to be met.
        h_KK: symmetric, positive definite. With a unit diagonal, no preconditioner is needed.
        kept_MK: the support, bool.
        steps: at most; an exact solution needs as many as a row keeps entries.
    """
    r_MK = ((w_MK - b_MK) @ h_KK).mul_(kept_MK)
    p_MK, norm_M1 = r_MK, r_MK.square().sum(1, keepdim=True)
    for _ in range(steps):
        hp_MK = (p_MK @ h_KK).mul_(kept_MK)
        curve_M1 = (p_MK * hp_MK).sum(1, keepdim=True)
        live_M1 = curve_M1 > 0  # a row that is solved has no direction left
        if not bool(live_M1.any()):
            break
        step_M1 = torch.where(live_M1, norm_M1 / curve_M1, 0)
        b_MK = b_MK + step_M1 * p_MK
        r_MK = r_MK - step_M1 * hp_MK
        next_M1 = r_MK.square().sum(1, keepdim=True)
        p_MK = r_MK + torch.where(live_M1, next_M1 / norm_M1, 0) * p_MK
        norm_M1 = next_M1
    return b_MK
