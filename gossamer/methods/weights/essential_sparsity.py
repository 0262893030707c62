"""Essential sparsity: one-shot magnitude, as far as it costs almost nothing. The knee: `recipes/curve.py`."""

from __future__ import annotations

from dataclasses import replace

from gossamer.core import Pattern, Sparsifier, method
from gossamer.core.pattern import pattern as read

from .global_magnitude import global_magnitude
from .magnitude import magnitude


@method("essential_sparsity", paper="arXiv:2306.03805", row="P009")
def essential_sparsity(*, density: float | None = None, pattern: str | Pattern = "unstructured") -> Sparsifier:
    """Cut the smallest |w| of a pretrained model at once, all layers in one pool; N:M patterns group by group.

    Run it through `gossamer.recipes.curve.sparsity_curve` to find how far one may go: beyond the knee the loss
    grows several times faster.

    Args:
        density: fraction kept, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: unstructured (one pool over the model) or N:M (each group its own pool).

    Raises:
        BudgetError: density disagrees with the pattern's own.

    Example:
        >>> essential_sparsity(pattern="2:4").scope, essential_sparsity().scope
        ('layer', 'model')

    Reference: Jaiswal et al., The Emergence of Essential Sparsity, arXiv:2306.03805.
    """
    who = read(pattern)
    if who.kept is not None:
        return replace(magnitude(density=density, pattern=who), name="essential_sparsity")
    return replace(
        global_magnitude(density=0.5 if density is None else density, pattern=who), name="essential_sparsity"
    )
