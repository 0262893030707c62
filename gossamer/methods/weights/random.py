"""Random pruning: the baseline that every score must beat, and the start of static sparse training."""

from __future__ import annotations

from gossamer.core import Pattern, Schedule, Sparsifier, budget_for, method
from gossamer.core.pattern import pattern as read
from gossamer.score import random as by_lot


@method("random", paper="arXiv:2202.02643", row="P004")
def random(
    *, density: float | Schedule | None = None, pattern: str | Pattern = "unstructured", seed: int = 0
) -> Sparsifier:
    """Keep a fixed, exactly counted random set from initialisation on; densities per layer come from an allocation.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.1 unless given or fixed by the pattern.
        pattern: who competes with whom.
        seed: of the lots. `stats["salt"]` (see `gossamer.score.salt`) separates layers of equal shape.

    Raises:
        BudgetError: density disagrees with the pattern's own.

    Example:
        >>> random(density=0.25).apply(torch.ones(4, 4), {})[1].count
        4

    Reference: Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv:2202.02643.
    Departs from: the official code draws each entry by chance, so its counts drift; here they are exact.
    """
    who = read(pattern)
    budget = budget_for(who, density, default=0.1)
    return Sparsifier(score=by_lot(seed), pattern=who, budget=budget, name="random")
