"""Lottery jackpots: find a sparse network inside a trained one, and train none of its weights."""

from __future__ import annotations

from gossamer.core import Always, Cosine, Pattern, Schedule, Search, Sparsifier, budget_for, method, straight_through
from gossamer.core.pattern import pattern as read
from gossamer.core.search import refuse_pools
from gossamer.score import magnitude


@method("lottery_jackpots", paper="arXiv:2104.08700", row="P089")
def lottery_jackpots(
    *,
    density: float = 0.1,
    total_steps: int,
    swap: float | Schedule | None = None,
    gap: float = 0.01,
    every: int = 1,
    pattern: str | Pattern = "unstructured",
) -> Sparsifier:
    """Freeze a trained model and train scores: s ← s − γ·w⊙∂L/∂(m⊙w); m moves towards the largest s, less and less.

    m starts as the largest |w| of all layers in one pool, which sets every layer's count; s as 1 on m, 1 − gap off it.
    Where n entries of a layer would change places for m to hold its largest s, ⌈r(t)·n⌉ pairs do, the best ones: the
    short restriction, for entries that change together spoil each other's gradients. r(t) = ½·(1 + cos(πt/T)).

    Biases, norms and layers that are not held are frozen too; statistics of batch norms go on. The optimizer trains the
    scores in the weights' place, with its own rate (the paper's: SGD, 0.1, momentum 0.9) and weight decay; `remove()`
    gives the weights back, zeros cut, and lets everything learn again.

    Args:
        density: fraction kept, 0 to 1.
        total_steps: T, length of the run. Unit: optimizer steps.
        swap: r, in [0, 1], or a schedule of it; 1 = no restriction.
        gap: lead of what magnitude keeps, at least 0.
        every: steps between exchanges, at least 1. Unit: optimizer steps.
        pattern: one in which all of a layer competes.

    Raises:
        BudgetError: an option is out of range.
        PatternError: the pattern has several pools per layer, as 2:4 has.

    Example:
        >>> rule = lottery_jackpots(total_steps=100).search
        >>> [round(rule.swap(t), 2) for t in (0, 50, 100)]
        [1.0, 0.5, 0.0]

    Reference: Zhang et al., Lottery Jackpots Exist in Pre-trained Models, arXiv:2104.08700.
    Departs from: the schedule is that of the official ImageNet code; its CIFAR code rounds (1 − t/T)⁴ up to 1, and so
        does not restrict. That code moves nothing where scores tie at the threshold; here ties go to the lower index.
    """
    who = read(pattern)
    if who.kept is not None:
        refuse_pools(who, (1, 2 * (who.pool_size or 1)))
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=budget_for(who, density),
        shrink=straight_through,
        policy=Always(every),
        name="lottery_jackpots",
        allocation="global_magnitude",
        search=Search(Cosine(1.0, 0.0, steps=max(total_steps, 1)) if swap is None else swap, gap),
    )
