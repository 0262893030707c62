"""Decaying structure (SdGf): N:M reached in stages, each with half as many kept."""

from __future__ import annotations

from gossamer.core import Always, Keep, Pattern, Sparsifier, Step, method, straight_through
from gossamer.core.errors import BudgetError, PatternError
from gossamer.core.pattern import pattern as read
from gossamer.core.policy import within_run
from gossamer.score import magnitude


@method("decaying_structure", paper="arXiv:2402.04744", row="P001")
def decaying_structure(
    *, total_steps: int, pattern: str | Pattern = "2:4", begin: int = 0, until: int | None = None, every: int = 1
) -> Sparsifier:
    """Keep M−1 of every M, then M/2, M/4, … and at last N, in stages of equal length; masked weights keep learning.

    The support is that of the largest |w|, anew after each step; gradients go straight through to all weights.

    Args:
        total_steps: length of the run. Unit: optimizer steps.
        pattern: "N:M", N kept at the end of M neighbouring inputs.
        begin: last dense step. Unit: optimizer steps.
        until: end of the last stage, whose N then stays; the run's end unless given. Unit: optimizer steps.
        every: steps between choices of the support, which is also chosen when a stage begins. Unit: optimizer steps.

    Raises:
        PatternError: the pattern is no N:M.
        BudgetError: the stages do not fit into the run.

    Example:
        >>> kept = decaying_structure(pattern="1:8", total_steps=400).budget.k
        >>> [kept(t) for t in (0, 100, 200, 300, 400)]
        [7, 4, 2, 1, 1]

    Reference: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
        arXiv:2402.04744.
    Departs from: only the stepwise rule is here; the geometric one (8N:8M → … → N:M) changes M as well. Where M/N is no
        power of two the official code never comes to N; here a last stage does.
    """
    who = read(pattern)
    size = who.pool_size
    if who.kept is None or size is None:
        raise PatternError(f"decaying_structure goes from M−1 to N of M, so it needs an N:M pattern, got {str(who)!r}")
    until = total_steps if until is None else within_run(until, total_steps)
    stages = _stages(who.kept, size)
    if not begin >= 0 or until - begin < len(stages):
        raise BudgetError(
            f"{len(stages)} stages ({', '.join(f'{n}:{size}' for n in stages)}) do not fit between steps {begin} and "
            f"{until}; train longer"
        )
    starts = [begin + i * (until - begin) // len(stages) for i in range(len(stages))]
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=Keep(Step(size, tuple(zip(starts, stages)))),
        shrink=straight_through,
        policy=Always(every, at=tuple(starts)),
        name="decaying_structure",
    )


def _stages(n: int, m: int) -> list[int]:
    """M−1, M/2, M/4, …, N: falling, each once."""
    halves = [m >> i for i in range(1, m.bit_length()) if m >> i > n]
    return sorted({*halves, *([m - 1] if m - 1 > n else []), n}, reverse=True)
