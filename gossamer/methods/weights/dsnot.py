"""DSnoT: another method's mask, refined without training."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from gossamer.core import Budget, Pattern, Sparsifier, Stats, Support, budget_for, hard, method, select
from gossamer.core.errors import BudgetError, unknown
from gossamer.core.pattern import pattern as read
from gossamer.core.sparsifier import Score
from gossamer.score import magnitude, weight_times_input_norm
from gossamer.solve import Rule, saliency, swapped

# What chooses the first mask, and the statistics it needs besides those of the swaps.
INITIAL: dict[str, tuple[Score, tuple[str, ...]]] = {
    "wanda": (weight_times_input_norm, ()),
    "magnitude": (magnitude, ()),
    "sparsegpt": (saliency, ("gram",)),
}


@method("dsnot", paper="arXiv:2310.08915", row="P014")
def dsnot(
    *,
    density: float | None = None,
    pattern: str | Pattern = "row",
    initial: str = "wanda",
    cycles: int = 50,
    threshold: float = 5e-5,
    variance_power: float = 1.0,
    keep_sign: bool = False,
) -> Sparsifier:
    """Start from another method's mask; trade kept for cut weights until each output's expected error is small.

    ε_i = Σ_cut w_ij·E[x_j]. Each cycle and row: grow the cut weight with largest sign(ε)·w_ij·E[x_j]/Var[x_j]^p, cut
    the kept one with least |w_ij|·√E[x_j²] among those whose w_ij·E[x_j] opposes ε. Values stay as they are.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: who competes with whom; single weights ("row", "unstructured", "2:4"), none tied.
        initial: whose score chooses the first mask: "wanda", "magnitude" or "sparsegpt" (w²/[H⁻¹]_jj, no update).
        cycles: most trades per row; at least 1.
        threshold: a row whose |ε| is no larger is left alone; >= 0. Unit: the output, per token.
        variance_power: p; 0 grows by the mean alone.
        keep_sign: end a row before the trade that would turn the first sign of its ε.

    Raises:
        UnknownName: no such initial method.
        BudgetError: density disagrees with the pattern's own, or cycles or threshold is out of range.
        PatternError: the pattern ties weights (when a weight is pruned).

    Example:
        >>> one = torch.ones(4)
        >>> stats = {"input_norm": one, "input_mean": one, "input_var": one}
        >>> w = torch.tensor([[3.0, -2.5, 2.0, 1.0]])
        >>> dsnot(density=0.5).apply(w, stats)[0].tolist()  # wanda keeps 3 and -2.5, and loses 3 on average
        [[3.0, 0.0, 2.0, 0.0]]

    Reference: Zhang et al., Dynamic Sparse No Training, arXiv:2310.08915.
    Departs from: the official code takes sums over a sequence for means, so that its threshold of 0.1 depends on the
        length (5e-5 is 0.1 over its 2048 tokens), and averages the variances within sequences, here it is that over
        all tokens; leaves MLPs unrefined by default; at the end of its lists moves weights of the other sign, or kept
        ones, so that counts drift in narrow layers; in N:M always keeps the sign, and weighs what is cut by the first
        method's score, here by Wanda's everywhere.
    """
    if initial not in INITIAL:
        raise unknown("initial method", initial, INITIAL)
    if cycles < 1 or threshold < 0:
        raise BudgetError(f"dsnot needs cycles >= 1 and threshold >= 0, got {cycles} and {threshold}; try 50 and 5e-5")
    who = read(pattern)
    score, needs = INITIAL[initial]
    rule = Rule(cycles, threshold, variance_power, keep_sign)
    return Sparsifier(
        score=score,
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        needs=("input_norm", "input_mean", "input_var", *needs),
        sequential="block",
        solve=partial(_refined, score=score, rule=rule),
        name="dsnot",
    )


def _refined(
    w: Tensor, stats: Stats, pattern: Pattern, budget: Budget, *, score: Score, rule: Rule
) -> tuple[Tensor, Support]:
    support = swapped(w, select(score(w, stats), pattern, budget), stats, pattern, rule)
    return hard(w.detach(), support), support
