"""SparseGPT: prune column by column and let the rest of each row make up for it."""

from __future__ import annotations

from functools import partial

from gossamer.core import Pattern, Sparsifier, budget_for, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.solve import saliency
from gossamer.solve import sparsegpt as solve


@method("sparsegpt", paper="arXiv:2301.00774")
def sparsegpt(
    *,
    density: float | None = None,
    pattern: str | Pattern = "unstructured",
    damping: float = 0.01,
    block: int = 128,
) -> Sparsifier:
    """Cut the entries with least w²/[H⁻¹]_jj, H = the inputs' Gram matrix, and correct the weights that remain.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: who competes with whom. Give the budget to the whole matrix ("unstructured") where you can.
        damping: added to H's diagonal, as a share of its mean; > 0. More for few calibration tokens.
        block: columns pruned between updates of the rest; at least 1. Unit: columns.

    Raises:
        BudgetError: density disagrees with the pattern's own, or damping or block is out of range.

    Example:
        >>> import torch
        >>> w, gram = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> [round(v, 1) for v in sparsegpt().apply(w, {"gram": gram})[0].flatten().tolist()]
        [0.0, 1.9]

    Reference: Frantar & Alistarh, Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv:2301.00774.
    Departs from: counts are exact, see `gossamer.solve.sparsegpt`.
    """
    if damping <= 0 or block < 1:
        raise BudgetError(f"sparsegpt needs damping > 0 and block >= 1, got {damping} and {block}; try 0.01 and 128")
    who = read(pattern)
    return Sparsifier(
        score=partial(saliency, damping=damping),
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        needs=("gram",),
        solve=partial(solve, damping=damping, block=block),
        name="sparsegpt",
    )
