"""SR-STE: N:M from scratch. Pruned weights keep learning, and are drawn to zero so that the support settles."""

from __future__ import annotations

from gossamer.core import Always, Pattern, Sparsifier, StraightThrough, budget_for, method
from gossamer.core.pattern import pattern as read
from gossamer.score import magnitude


@method("sr_ste", paper="arXiv:2102.04010", row="P008")
def sr_ste(
    *, density: float | None = None, pattern: str | Pattern = "2:4", pull: float = 2e-4, every: int = 1
) -> Sparsifier:
    """Keep the N largest |w| of every M inputs, anew after each step: w ← w − γ·(∂L/∂w̃ + λ·(1 − m)⊙w), w̃ = m⊙w.

    All weights get the gradient of the masked ones; `pull` = 0 is the plain straight-through estimator. How much the
    support changes is in the report: `handle.report().sad` = Σ_t |m_t − m_{t−1}|, the paper's SAD summed over steps.

    Args:
        density: fraction kept, 0 to 1, for patterns that do not fix it (0.5 unless given).
        pattern: "N:M", N kept of M neighbouring inputs (of M input channels at one place of a kernel); or any other.
        pull: λ, at least 0.
        every: steps between choices of the support. Unit: optimizer steps.

    Raises:
        BudgetError: density disagrees with the pattern's own, or pull is negative.

    Example:
        >>> sr_ste(pattern="1:4").shrink.pull
        0.0002

    Reference: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv:2102.04010.
    Departs from: the official code adds λ·(1 − m)⊙w in every backward pass, here it joins the gradient once, before the
        optimizer's step; for one backward pass without gradient scaling it is the same. Layers whose inputs are no
        multiple of M are refused; the official code lets groups run on across rows. Its linear layer drops the bias.
    """
    who = read(pattern)
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        shrink=StraightThrough(pull=pull),
        policy=Always(every),
        name="sr_ste",
    )
