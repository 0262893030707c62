"""ALPS: choose which weights stay and what they become together, by ADMM on a layer's output error."""

from __future__ import annotations

from functools import partial

from gossamer.core import Pattern, Sparsifier, budget_for, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.solve import alps as solve
from gossamer.solve import saliency


@method("alps", paper="arXiv:2406.07831")
def alps(
    *,
    density: float | None = None,
    pattern: str | Pattern = "unstructured",
    damping: float = 0.01,
    iterations: int = 300,
    every: int = 3,
    refit: int = 10,
) -> Sparsifier:
    """Minimise ‖(W − B)X‖² over sparse B: a free and a sparse copy of B are pulled together, then B is refitted.

    Where SparseGPT decides once, column by column, ALPS goes over the whole layer again and again, so a weight cut
    early can come back. It costs about 30 products with the Gram matrix and one eigendecomposition of it.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: who competes with whom. Give the budget to the whole matrix ("unstructured") where you can.
        damping: added to the Gram matrix's diagonal, as a share of its mean; > 0. 0.1 for few calibration tokens.
        iterations: at most; it stops when the support has settled, after about 30.
        every: iterations between two looks at the support; after each the copies are pulled harder. 2 is a third
            faster and hardly worse.
        refit: steps of conjugate gradients for the values on the final support.

    Raises:
        BudgetError: density disagrees with the pattern's own, or a number is out of range.

    Example:
        >>> import torch
        >>> w, gram = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> [round(v, 1) for v in alps().apply(w, {"gram": gram})[0].flatten().tolist()]
        [1.9, 0.0]

    Reference: Meng, Behdin, Wang, Mazumder, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
        Language Models, arXiv:2406.07831.
    Departs from: any pattern, not only matrices and N:M; see `gossamer.solve.alps`.
    """
    if damping <= 0 or iterations < 1 or every < 1 or refit < 0:
        raise BudgetError(
            f"alps needs damping > 0, iterations >= 1, every >= 1 and refit >= 0, got {damping}, {iterations}, {every} "
            f"and {refit}; try 0.01, 300, 3 and 10"
        )
    who = read(pattern)
    return Sparsifier(
        score=partial(saliency, damping=damping),
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        needs=("gram",),
        solve=partial(solve, damping=damping, iterations=iterations, every=every, refit=refit),
        name="alps",
    )
