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
    bits: int | None = None,
    symmetric: bool = False,
) -> Sparsifier:
    """Cut the entries with least w²/[H⁻¹]_jj, H = the inputs' Gram matrix, and correct the weights that remain.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: who competes with whom. Give the budget to the whole matrix ("unstructured") where you can.
        damping: added to H's diagonal, as a share of its mean; > 0. More for few calibration tokens.
        block: columns pruned between updates of the rest; at least 1. Unit: columns.
        bits: round kept weights to 2 … 8 bits, one scale per output, in the same solve; None = not.
        symmetric: of the rounding: as many values below 0 as above, instead of the row's own range.

    Raises:
        BudgetError: density disagrees with the pattern's own, or damping, block or bits is out of range.

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
    if bits is not None and not 2 <= bits <= 8:
        raise BudgetError(f"sparsegpt rounds to 2 to 8 bits, got {bits}; leave bits= out for no rounding")
    who = read(pattern)
    return Sparsifier(
        score=partial(saliency, damping=damping),
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        needs=("gram",),
        solve=partial(solve, damping=damping, block=block, bits=bits, symmetric=symmetric),
        name="sparsegpt",
    )
