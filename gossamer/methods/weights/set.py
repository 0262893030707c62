"""SET: sparse evolutionary training. The weakest links go, random ones come."""

from __future__ import annotations

from gossamer.core import Cosine, DropGrow, Pattern, Schedule, Sparsifier, budget_for, method
from gossamer.core.dropgrow import one_of
from gossamer.core.pattern import pattern as read
from gossamer.core.policy import within_run
from gossamer.score import magnitude
from gossamer.score import random as by_lot


@method("set", paper="arXiv:1707.04780")
def set(
    *,
    density: float | None = None,
    total_steps: int,
    fraction: float | Schedule | None = None,
    every: int = 1500,
    until: int | None = None,
    pattern: str | Pattern = "unstructured",
    across: bool = False,
    grow: str = "random",
    seed: int = 0,
) -> Sparsifier:
    """Every few steps drop the ζ·nnz smallest |w| of each layer and grow as many links at random, starting from 0.

    ζ falls along a cosine from 0.5 to 0.005 over the run; densities per layer by ERK; the start is random.

    Args:
        density: fraction kept, 0 to 1; 0.1 unless given or fixed by the pattern.
        total_steps: length of the run. Unit: optimizer steps.
        fraction: ζ, or a schedule of it.
        every: steps between moves. Unit: optimizer steps.
        until: last step that may move links; the run's end unless given. Unit: optimizer steps.
        pattern: its pools keep their counts.
        across: let counts wander between layers.
        grow: "random", or "unfired": links that were never kept before come first.
        seed: of the start and of growth.

    Raises:
        BudgetError: density disagrees with the pattern's own, the schedule does not fit into the run, or no such grow.

    Example:
        >>> rule = set(total_steps=9000).policy
        >>> [t for t in range(9001) if rule.due(t)], rule.fraction(0)
        ([0, 1500, 3000, 4500, 6000, 7500, 9000], 0.5)

    Reference: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity,
        arXiv:1707.04780; the defaults are those of Liu et al., ITOP, arXiv:2102.02887; "unfired" is from Yildirim et
        al., Continual Learning with Dynamic Sparse Training, arXiv:2308.14831.
    Departs from: counts are exact (published codes draw masks and growth entry by entry, so theirs drift); new links
        start at 0 as in ITOP, the original draws N(0, 0.1²); the smallest |w| go, the original takes the smallest
        positive and the largest negative ones in equal shares.
    """
    who = read(pattern)
    until = total_steps if until is None else within_run(until, total_steps)
    policy = DropGrow(
        drop=magnitude,
        grow=one_of(grow, ("random", "unfired"), "gradient and momentum are 'rigl'"),
        fraction=Cosine(0.5, 0.005, steps=max(until, 1)) if fraction is None else fraction,
        until=until,
        every=every,
        across=across,
        seed=seed,
    )
    return Sparsifier(
        score=by_lot(seed),
        pattern=who,
        budget=budget_for(who, density, default=0.1),
        policy=policy,
        name="set",
        allocation="erk",
    )
