"""Global magnitude pruning: all layers compete in one pool."""

from __future__ import annotations

from gossamer.core import Density, Pattern, Schedule, Sparsifier, method
from gossamer.core.errors import PatternError
from gossamer.core.pattern import pattern as read
from gossamer.score import magnitude


@method("global_magnitude", paper="arXiv:1902.09574")
def global_magnitude(*, density: float | Schedule = 0.5, pattern: str | Pattern = "unstructured") -> Sparsifier:
    """Keep the largest |w| of the whole model, so that each layer finds its own density.

    Args:
        density: fraction kept of the model, 0 to 1.
        pattern: only its tied axes matter ("4-row", "4x4"): their units compete by mean |w|, across all layers.

    Raises:
        PatternError: the pattern fixes a count per pool, as 2:4 does, which leaves nothing to compete for.

    Example:
        >>> global_magnitude(density=0.1).scope
        'model'

    Reference: the baseline of Gale et al., The State of Sparsity, arXiv:1902.09574.
    """
    who = read(pattern)
    if who.kept is not None:
        raise PatternError(
            f"pattern {who.expr!r} keeps {who.kept} in every pool, so layers cannot compete; use method 'magnitude'"
        )
    return Sparsifier(score=magnitude, pattern=who, budget=Density(density), scope="model", name="global_magnitude")
