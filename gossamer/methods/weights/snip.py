"""SNIP: prune before training what the loss would miss least."""

from __future__ import annotations

from gossamer.core import Pattern, Sparsifier, budget_for, method
from gossamer.core.pattern import pattern as read
from gossamer.score import gradient_times_weight, loss_gradient


@method("snip", paper="arXiv:1810.02340")
def snip(*, density: float | None = None, pattern: str | Pattern = "unstructured", rounds: int = 1) -> Sparsifier:
    """Keep the largest |w·∂L/∂w| of the untrained model, all layers in one pool, by the gradient of a few batches.

    Needs `data=` and `loss=`; the gradient is the mean over the batches, taken before the absolute value. The model
    runs in the mode it is in, and is left as it was. As an allocation (`attach(model, "static", allocation="snip",
    data=..., loss=...)`) only the layers' densities are taken.

    Args:
        density: fraction kept, 0 to 1; 0.1 unless given or fixed by the pattern.
        pattern: only its tied axes matter; N:M patterns are chosen group by group instead of in one pool.
        rounds: choose again this many times, at densities d^(1/n) … d, each by the gradient of the pruned model.

    Raises:
        BudgetError: density disagrees with the pattern's own, or several rounds of a pattern that fixes it.

    Example:
        >>> snip().scope, snip(pattern="2:4").scope
        ('model', 'layer')

    Reference: Lee et al., SNIP, arXiv:1810.02340; rounds: de Jorge et al., Iterative SNIP, arXiv:2006.09081.
    Departs from: biases are not pruned; ties go to the lower index, so counts are exact.
    """
    who = read(pattern)
    return Sparsifier(
        score=gradient_times_weight,
        pattern=who,
        budget=budget_for(who, density, default=0.1),
        needs=("gradient",),
        scope="layer" if who.kept is not None else "model",
        name="snip",
        probe=loss_gradient,
        rounds=rounds,
    )
