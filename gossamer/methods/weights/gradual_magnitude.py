"""Gradual magnitude pruning: a cubic ramp while training."""

from __future__ import annotations

from gossamer.core import Cubic, Density, Pattern, Ramp, Sparsifier, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.core.policy import within_run
from gossamer.score import magnitude

RAMP = 3 / 4  # of the run: what is left is for training at the last density


@method("gradual_magnitude", paper="arXiv:1710.01878", row="P036")
def gradual_magnitude(
    *,
    density: float = 0.1,
    total_steps: int,
    begin: int = 0,
    until: int | None = None,
    every: int = 100,
    start_density: float = 1.0,
    pattern: str | Pattern = "unstructured",
) -> Sparsifier:
    """Cut the smallest |w| again every few steps: d_t = d_end + (d_start − d_end)·(1 − (t − begin)/(until − begin))³.

    Args:
        density: fraction kept at the end of the ramp, 0 to 1.
        total_steps: length of the run. Unit: optimizer steps.
        begin: first step of the ramp. Unit: optimizer steps.
        until: its last step, with the last cut; 3/4 of the run unless given. Unit: optimizer steps.
        every: steps between cuts, at least 1.
        start_density: fraction kept at `begin`.
        pattern: who competes with whom.

    Raises:
        BudgetError: a density outside 0…1, a pattern that fixes its own, as 2:4 does, and so cannot ramp, or a ramp
            that does not fit into the run.

    Example:
        >>> ramp = gradual_magnitude(density=0.1, total_steps=1000)
        >>> [round(ramp.budget.d(t), 3) for t in (0, 375, 750)]
        [1.0, 0.213, 0.1]

    Reference: Zhu & Gupta, To prune, or not to prune, arXiv:1710.01878.
    """
    who = read(pattern)
    if who.kept is not None:
        raise BudgetError(f"pattern {who.expr!r} fixes its density, so it cannot ramp; use method 'magnitude'")
    for d in (density, start_density):
        Density(d)
    until = round(RAMP * total_steps) if until is None else within_run(until, total_steps)
    if not 0 <= begin < until:
        raise BudgetError(
            f"the ramp goes from step begin={begin} to until={until}, so 0 <= begin < until; begin earlier, or give "
            f"until= up to {total_steps}, the end of the run"
        )
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=Density(Cubic(start_density, density, begin, until - begin)),
        policy=Ramp(begin, until, every),
        name="gradual_magnitude",
    )
