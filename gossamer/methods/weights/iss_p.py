"""ISS-P: the smallest weights shrink by a share after each step, can still come back, and are cut later."""

from __future__ import annotations

from gossamer.core import Attenuate, Pattern, Ramp, Sparsifier, budget_for, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.core.policy import within_run
from gossamer.score import magnitude

SHRINKING = 1 / 4  # of the run, as for the official EDSR: 100,000 iterations, then 300,000 at the last support


@method("iss_p", paper="arXiv:2303.09650", row="P103")
def iss_p(
    *,
    density: float | None = None,
    total_steps: int,
    until: int | None = None,
    ratio: float = 0.95,
    every: int = 1,
    pattern: str | Pattern = "unstructured",
) -> Sparsifier:
    """Train from scratch, and after each step shrink what is not among the largest |w|: w ← m⊙w + (1 − m)⊙α·w.

    The support m is chosen anew in every layer after every step. The forward pass sees all weights, and all learn: the
    shrinkage is in proportion to |w|, so a weight that the loss needs grows back faster than it is taken away. At
    `until` the support is fixed, its complement set to 0, and the network trained on.

    Args:
        density: fraction kept, 0 to 1 (0.1 unless given, or what the pattern fixes).
        total_steps: length of the run. Unit: optimizer steps.
        until: step of the cut, at least 1; 1/4 of the run unless given. Unit: optimizer steps.
        ratio: α, what a step leaves of a pruned weight, 0 to 1; 0 is iterative hard thresholding.
        every: steps between choices of the support; the shrinkage is applied in every step. Unit: optimizer steps.
        pattern: who competes with whom.

    Raises:
        BudgetError: density disagrees with the pattern's own, a ratio outside 0 to 1, or a cut that is not in the run.

    Example:
        >>> iss_p(density=0.1, total_steps=1000).shrink
        Attenuate(ratio=0.95, until=250)

    Reference: Wang et al., Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution, arXiv:2303.09650.
    Departs from: the official code ends its first stage by a penalty that it counts up and never applies (0 to 0.5 in
        steps of 1e-4 every 20 iterations), here it is a share of the run; it begins the second stage with a new
        optimizer, here moments of kept weights go on and those of pruned ones are zeroed; counts are exact.
    """
    who = read(pattern)
    until = max(1, round(SHRINKING * total_steps)) if until is None else within_run(until, total_steps)
    if until < 1:
        raise BudgetError(f"the cut comes after a step or more, got until={until}")
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=budget_for(who, density, default=0.1),
        shrink=Attenuate(ratio, until),
        policy=Ramp(0, until, every),
        name="iss_p",
    )
