"""RIA: relative importance and activations, no update."""

from __future__ import annotations

from functools import partial

from gossamer.core import Pattern, Schedule, Sparsifier, budget_for, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.score import relative_importance


@method("ria", paper="Zhang et al., ICLR 2024")
def ria(
    *, density: float | Schedule | None = None, pattern: str | Pattern = "unstructured", power: float = 0.5
) -> Sparsifier:
    """Keep the largest (|w_ij|/Σ_i|w_ij| + |w_ij|/Σ_j|w_ij|)·‖x_j‖^power, so that no input or output loses all.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: who competes with whom; the whole matrix in the official code, or "2:4".
        power: how much the inputs count, >= 0.

    Raises:
        BudgetError: density disagrees with the pattern's own, or power is negative.

    Example:
        >>> w = torch.tensor([[8.0, 1.5], [1.0, 1.0]])
        >>> ria().apply(w, {"input_norm": torch.ones(2)})[0].tolist()  # magnitude would keep 8 and 1.5
        [[8.0, 0.0], [0.0, 1.0]]

    Reference: Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models (RIA),
        ICLR 2024.
    Departs from: counts are exact; the channel permutation of the paper is not here: `rearrange` renumbers channels.
    """
    if power < 0:
        raise BudgetError(f"ria needs power >= 0, got {power}; the paper has 0.5")
    who = read(pattern)
    return Sparsifier(
        score=partial(relative_importance, power=power),
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        needs=("input_norm",),
        sequential="block",
        name="ria",
    )
