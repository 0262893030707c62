"""Sparse pre-training: dense first, pruned in the middle, sparse to the end, by shares of the run's compute."""

from __future__ import annotations

import math
from dataclasses import replace

from gossamer.core import Density, Pattern, Sparsifier, method
from gossamer.core.errors import BudgetError

from .gradual_magnitude import gradual_magnitude


@method("sparse_pretraining", paper="arXiv:2501.12486", row="P145")
def sparse_pretraining(
    *,
    density: float = 0.2,
    total_steps: int,
    start: float = 0.25,
    end: float = 0.75,
    every: int = 100,
    pattern: str | Pattern = "unstructured",
) -> Sparsifier:
    """Dense up to 25 % of the run's compute, cut the smallest |w| along a cubic ramp up to 75 %, then train on sparse.

    A step at density d costs d of a dense one. With μ = d + (1 − d)/4, the mean of the ramp, a run of T steps costs
    C = T / (start + (end − start)/μ + (1 − end)/d) dense ones, and the ramp goes from step start·C to
    start·C + (end − start)·C/μ.

    Args:
        density: fraction kept at the end of the ramp, 0 to 1.
        total_steps: length of the run. Unit: optimizer steps.
        start: share of the run's compute spent before the first cut, 0 to 1.
        end: share spent by the last cut, above `start` and up to 1.
        every: steps between cuts, at least 1.
        pattern: who competes with whom.

    Raises:
        BudgetError: shares out of order, a density outside 0 to 1, a pattern that fixes its own, as 2:4 does, or a run
            too short for the ramp.

    Example:
        >>> ramp = sparse_pretraining(density=0.2, total_steps=1000).policy
        >>> ramp.begin, ramp.end  # early steps are dear, so 25 % of the compute are 9 % of the steps
        (91, 545)

    Reference: Jin et al., The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense
        Scaling Laws, arXiv:2501.12486; the law is in `gossamer.recipes.scaling_law`.
    Departs from: compute counts the held weights alone; what the head, embedding and attention cost moves neither end.
    """
    Density(density)
    begin, until = _ramp(density, total_steps, start, end)
    made = gradual_magnitude(
        density=density, total_steps=total_steps, begin=begin, until=until, every=every, pattern=pattern
    )
    return replace(made, name="sparse_pretraining")


def _ramp(density: float, total_steps: int, start: float, end: float) -> tuple[int, int]:
    """First and last step of the ramp."""
    if not 0.0 <= start < end <= 1.0:
        raise BudgetError(f"start and end are shares of the compute, 0 <= start < end <= 1, got {start:g} and {end:g}")
    on_the_ramp = density + (1.0 - density) / 4
    recovery = (1.0 - end) / density if density else math.inf  # an empty network trains on for nothing
    compute = total_steps / (start + (end - start) / on_the_ramp + recovery)
    begin = round(start * compute)
    return begin, min(max(begin + 1, round(start * compute + (end - start) * compute / on_the_ramp)), total_steps)
