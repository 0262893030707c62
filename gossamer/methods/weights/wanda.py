"""Wanda: weights and activations, no update."""

from __future__ import annotations

from gossamer.core import Pattern, Schedule, Sparsifier, budget_for, method
from gossamer.core.pattern import pattern as read
from gossamer.score import weight_times_input_norm


@method("wanda", paper="arXiv:2306.11695")
def wanda(*, density: float | Schedule | None = None, pattern: str | Pattern = "row") -> Sparsifier:
    """Keep the largest |w_ij|·‖x_j‖ of each output row; the values stay as they are.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: who competes with whom; per output row in the paper, or "2:4", "4:8".

    Raises:
        BudgetError: density disagrees with the pattern's own.

    Example:
        >>> wanda().apply(torch.tensor([[3.0, 2.0]]), {"input_norm": torch.tensor([1.0, 2.0])})[0].tolist()
        [[0.0, 2.0]]

    Reference: Sun et al., A Simple and Effective Pruning Approach for LLMs, arXiv:2306.11695.
    Departs from: the official code cuts ⌊s·n⌋ of each row, here the number kept is round(density·n).
    """
    who = read(pattern)
    return Sparsifier(
        score=weight_times_input_norm,
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        needs=("input_norm",),
        sequential="block",
        name="wanda",
    )
