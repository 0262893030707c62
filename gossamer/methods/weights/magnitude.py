"""Magnitude pruning, one shot, layer by layer."""

from __future__ import annotations

from gossamer.core import Pattern, Schedule, Sparsifier, budget_for, method
from gossamer.core.pattern import pattern as read
from gossamer.score import magnitude as score


@method("magnitude", paper="arXiv:1506.02626")
def magnitude(*, density: float | Schedule | None = None, pattern: str | Pattern = "unstructured") -> Sparsifier:
    """Keep the largest |w| of each pool, once, with no data and no update.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern ("2:4").
        pattern: who competes with whom.

    Raises:
        BudgetError: density disagrees with the pattern's own.

    Example:
        >>> magnitude(pattern="2:4").apply(torch.tensor([[4.0, -3.0, 2.0, 1.0]]), {})[0].tolist()
        [[4.0, -3.0, 0.0, 0.0]]

    Reference: Han et al., Learning both Weights and Connections, arXiv:1506.02626.
    Departs from: the paper sets a threshold per layer from its standard deviation, here counts are exact.
    """
    who = read(pattern)
    return Sparsifier(score=score, pattern=who, budget=budget_for(who, density, default=0.5), name="magnitude")
