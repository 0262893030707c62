"""RigL: the weakest links go, those with the largest gradient come."""

from __future__ import annotations

from gossamer.core import Cosine, DropGrow, Pattern, Schedule, Sparsifier, budget_for, method
from gossamer.core.dropgrow import one_of
from gossamer.core.pattern import pattern as read
from gossamer.core.policy import within_run
from gossamer.score import magnitude
from gossamer.score import random as by_lot

SHARE = 25 / 32  # of the run in which links move: 25k of the paper's 32k steps


@method("rigl", paper="arXiv:1911.11134")
def rigl(
    *,
    density: float | None = None,
    total_steps: int,
    fraction: float | Schedule | None = None,
    every: int = 100,
    until: int | None = None,
    pattern: str | Pattern = "unstructured",
    across: bool = False,
    grow: str = "gradient",
    seed: int = 0,
) -> Sparsifier:
    """Every few steps drop the f(t)·nnz smallest |w| of each layer and grow as many where |∂L/∂w| is largest, from 0.

    f(t) = α/2·(1 + cos(πt/T_end)) with α = 0.3; densities per layer by ERK; the start is random. Links that go and
    come in the same step keep their values and momenta; new ones start with none.

    Args:
        density: fraction kept, 0 to 1; 0.1 unless given or fixed by the pattern.
        total_steps: length of the run. Unit: optimizer steps.
        fraction: f, or a schedule of it.
        every: ΔT, steps between moves. Unit: optimizer steps.
        until: T_end, last step that may move links; 25/32 of the run unless given. Unit: optimizer steps.
        pattern: its pools keep their counts, so "2:4" stays 2:4.
        across: let counts wander between layers.
        grow: "gradient", or "momentum": |m| of the running mean m ← 0.9·m + 0.1·∂L/∂w in its place, for which every
            step computes the dense gradient (a GradScaler's scaled ones, so that m lags a change of the scale).
        seed: of the start.

    Raises:
        BudgetError: density disagrees with the pattern's own, the schedule does not fit into the run, or no such grow.

    Example:
        >>> rule = rigl(total_steps=1000).policy
        >>> [t for t in range(1001) if rule.due(t)], round(rule.fraction(400), 3)
        ([0, 100, 200, 300, 400, 500, 600, 700], 0.144)

    Reference: Evci et al., Rigging the Lottery, arXiv:1911.11134; growth by momentum: Dettmers and Zettlemoyer, Sparse
        Networks from Scratch, arXiv:1907.04840.
    Departs from: a step that moves links also takes the optimizer's step, which the official code leaves out; the
        gradient is that of the batches of this step, and the links to drop are chosen after it.
    """
    who = read(pattern)
    until = round(SHARE * total_steps) if until is None else within_run(until, total_steps)
    policy = DropGrow(
        drop=magnitude,
        grow=one_of(grow, ("gradient", "momentum"), "random and unfired are 'set'"),
        fraction=Cosine(0.3, 0.0, steps=max(until, 1)) if fraction is None else fraction,
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
        name="rigl",
        allocation="erk",
    )
