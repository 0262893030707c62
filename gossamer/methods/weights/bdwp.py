"""BDWP: N:M in both directions. The forward pass prunes along the inputs, the gradient by them along the outputs."""

from __future__ import annotations

from gossamer.core import Always, Pattern, Sparsifier, StraightThrough, budget_for, method
from gossamer.core.errors import PatternError
from gossamer.core.pattern import pattern as read
from gossamer.score import magnitude


@method("bdwp", paper="arXiv:2309.13015", row="P034")
def bdwp(*, pattern: str = "2:8", pull: float = 0.0, every: int = 1) -> Sparsifier:
    """Keep N of every M inputs for y = x·(m_F⊙w)ᵀ, and N of every M outputs for ∂L/∂x = ∂L/∂y·(m_B⊙w).

    Both supports keep the largest |w|, anew after each step, so two of a step's three products are N:M along the axis
    they add up over. ∂L/∂w = ∂L/∂yᵀ·x is dense and goes straight through to every weight. The gradient by the inputs
    is not that of the function computed, except where M = N: a finite-difference test fails, by design.

    Args:
        pattern: "N:M"; for convolutions M are channels.
        pull: λ of SR-STE on weights the forward pass prunes, at least 0.
        every: steps between choices of the supports. Unit: optimizer steps.

    Raises:
        PatternError: the pattern is no "N:M".

    Example:
        >>> bdwp().backward
        Pattern(expr='(g [8]) ...', kept=2, sizes=())

    Reference: Fang et al., Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design,
        arXiv:2309.13015.
    Departs from: only the paper's abstract was read; the axes follow from which axis each product adds up over.
    """
    who = read(pattern)
    if who.kept is None or who.expr != read(f"{who.kept}:{who.pool_size}").expr:
        raise PatternError(f"bdwp turns an N:M pattern to the outputs, got {pattern!r}; write pattern='2:8'")
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=budget_for(who, None),
        shrink=StraightThrough(pull=pull),
        policy=Always(every),
        name="bdwp",
        backward=Pattern(f"(g [{who.pool_size}]) ...", kept=who.kept),
    )
