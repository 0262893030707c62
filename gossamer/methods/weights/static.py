"""Static sparse training: a random support, chosen before the first step and kept to the last."""

from __future__ import annotations

from dataclasses import replace

from gossamer.core import Pattern, Sparsifier, method

from .random import random


@method("static", paper="arXiv:2202.02643", row="P004")
def static(*, density: float | None = None, pattern: str | Pattern = "unstructured", seed: int = 0) -> Sparsifier:
    """Train a random sparse network: exact counts by lot, densities per layer by ERK, never changed.

    Attached to a model the density is spread by `allocation=`: "erk" unless given; "er", "uniform", or a density per
    layer name. The paper's SNIP ratios with a random support are `allocation="snip"` with `data=` and `loss=`.

    Args:
        density: fraction kept, 0 to 1; 0.1 unless given or fixed by the pattern.
        pattern: who competes with whom.
        seed: of the lots.

    Raises:
        BudgetError: density disagrees with the pattern's own.

    Example:
        >>> static(density=0.2).allocation
        'erk'

    Reference: Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv:2202.02643.
    Departs from: the official code draws each entry by chance, so its counts drift; here they are exact.
    """
    return replace(random(density=density, pattern=pattern, seed=seed), allocation="erk", name="static")
