"""GraSP: prune before training what carries the gradient least."""

from __future__ import annotations

from gossamer.core import Pattern, Sparsifier, budget_for, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.score import HessianGradient, gradient_flow


@method("grasp", paper="arXiv:2002.07376")
def grasp(
    *, density: float | None = None, pattern: str | Pattern = "unstructured", temperature: float = 200.0
) -> Sparsifier:
    """Keep the largest signed w·(Hg) of the untrained model, all layers in one pool: what speeds its first steps.

    Needs `data=` and `loss=`, of (output, target), which must be twice differentiable; the paper takes ten samples of
    each class. g is the gradient and H the Hessian of the loss of outputs divided by T. The model runs in the mode it
    is in, and is left as it was.

    Args:
        density: fraction kept, 0 to 1; 0.1 unless given or fixed by the pattern.
        pattern: only its tied axes matter; N:M patterns are chosen group by group instead of in one pool.
        temperature: T, above 0; 1 where the model returns its own loss.

    Raises:
        BudgetError: density disagrees with the pattern's own, or T is not above 0.

    Example:
        >>> grasp(density=0.2).probe
        HessianGradient(temperature=200.0)

    Reference: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, arXiv:2002.07376.
    Departs from: the score's sign, so that higher is kept as everywhere (the paper prunes the highest −w·Hg); the
        official code draws linear layers anew before it scores, and keeps a few too many where scores tie; here the
        weights are those that will be trained, and counts are exact.
    """
    if temperature <= 0:
        raise BudgetError(f"the temperature divides the outputs, so it is above 0, got {temperature}")
    who = read(pattern)
    return Sparsifier(
        score=gradient_flow,
        pattern=who,
        budget=budget_for(who, density, default=0.1),
        needs=("hessian_gradient",),
        scope="layer" if who.kept is not None else "model",
        name="grasp",
        probe=HessianGradient(temperature),
    )
