"""Decaying mask (MdGf): what is pruned fades from the forward pass, so that gradients dry up slowly."""

from __future__ import annotations

from gossamer.core import (
    Always,
    Exponential,
    Linear,
    Pattern,
    Schedule,
    Sparsifier,
    StraightThrough,
    Until,
    budget_for,
    method,
)
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.core.policy import within_run
from gossamer.score import magnitude

SPARSE = 1 / 4  # of the run that is left for training with pruned weights at exactly 0
FAINT = 1e-2  # what the exponential has come down to when it is cut to 0


@method("decaying_mask", paper="arXiv:2402.04744", row="P001")
def decaying_mask(
    *,
    density: float | None = None,
    total_steps: int,
    pattern: str | Pattern = "2:4",
    shape: str = "exponential",
    begin: int = 0,
    until: int | None = None,
    every: int = 1,
) -> Sparsifier:
    """Multiply pruned weights by β in the forward pass, β falling from 1 to 0: w̃ = w⊙(m + (1 − m)·β_t).

    The support is that of the largest |w|, anew after each step; gradients go straight through to all weights. β is 1
    up to `begin`; "linear": β = 1 − c·(t − begin); "exponential": β = e^(−c·(t − begin)); from `until` on β = 0. c is
    such that at `until` β has come to 0, or to 0.01 for the exponential.

    Args:
        density: fraction kept, 0 to 1, for patterns that do not fix it (0.5 unless given).
        total_steps: length of the run. Unit: optimizer steps.
        pattern: "N:M", N kept of M neighbouring inputs; or any other.
        shape: "exponential" or "linear".
        begin: last dense step. Unit: optimizer steps.
        until: first step with pruned weights at 0; 3/4 of the run unless given. Unit: optimizer steps.
        every: steps between choices of the support. Unit: optimizer steps.

    Raises:
        BudgetError: density disagrees with the pattern's own, no such shape, or the schedule does not fit into the run.

    Example:
        >>> fade = decaying_mask(pattern="1:16", total_steps=1000).shrink.fade
        >>> [round(fade(t), 3) for t in (0, 375, 749, 750)]
        [1.0, 0.1, 0.01, 0.0]

    Reference: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
        arXiv:2402.04744.
    Departs from: the official code fixes c (1e-4 per step) and no end unless told; here c follows the length of the
        run, so that short runs end sparse as well.
    """
    who = read(pattern)
    until = round((1 - SPARSE) * total_steps) if until is None else within_run(until, total_steps)
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        shrink=StraightThrough(fade=_fade(shape, begin, until)),
        policy=Always(every),
        name="decaying_mask",
    )


def _fade(shape: str, begin: int, until: int) -> Schedule:
    if not 0 <= begin < until:
        raise BudgetError(f"the mask decays from step begin={begin} to until={until}, so 0 <= begin < until")
    if shape == "linear":
        return Linear(1.0, 0.0, begin, until - begin)
    if shape == "exponential":
        return Until(Exponential(1.0, FAINT, begin, until - begin), until, 0.0)
    raise BudgetError(f"a mask decays by shape 'exponential' or 'linear', got {shape!r}")
