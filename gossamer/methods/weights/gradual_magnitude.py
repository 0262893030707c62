"""Gradual magnitude pruning: a cubic ramp while training."""

from __future__ import annotations

from gossamer.core import Cubic, Density, Pattern, Ramp, Sparsifier, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.score import magnitude


@method("gradual_magnitude", paper="arXiv:1710.01878", row="P036")
def gradual_magnitude(
    *,
    density: float = 0.1,
    total_steps: int,
    begin: int = 0,
    every: int = 100,
    start_density: float = 1.0,
    pattern: str | Pattern = "unstructured",
) -> Sparsifier:
    """Cut the smallest |w| again every few steps: d_t = d_end + (d_start − d_end)·(1 − (t − begin)/total_steps)³.

    Args:
        density: fraction kept at the end of the ramp, 0 to 1.
        total_steps: length of the ramp, at least 1; train on for a while after it. Unit: optimizer steps.
        begin: first step of the ramp. Unit: optimizer steps.
        every: steps between cuts, at least 1.
        start_density: fraction kept at `begin`.
        pattern: who competes with whom.

    Raises:
        BudgetError: a density outside 0…1, or a pattern that fixes its own, as 2:4 does, and so cannot ramp.

    Example:
        >>> ramp = gradual_magnitude(density=0.1, total_steps=1000)
        >>> [round(ramp.budget.d(t), 3) for t in (0, 500, 1000)]
        [1.0, 0.213, 0.1]

    Reference: Zhu & Gupta, To prune, or not to prune, arXiv:1710.01878.
    """
    who = read(pattern)
    if who.kept is not None:
        raise BudgetError(f"pattern {who.expr!r} fixes its density, so it cannot ramp; use method 'magnitude'")
    for d in (density, start_density):
        Density(d)
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=Density(Cubic(start_density, density, begin, total_steps)),
        policy=Ramp(begin, begin + total_steps, every),
        name="gradual_magnitude",
    )
