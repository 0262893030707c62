"""Top-KAST: train with the largest weights, and let the next largest learn."""

from __future__ import annotations

from gossamer.core import Always, Density, Explore, Pattern, Sparsifier, method
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.score import magnitude


@method("topkast", paper="arXiv:2106.03517")
def topkast(
    *,
    density: float = 0.1,
    backward_density: float | None = None,
    penalty: float = 1e-4,
    every: int = 100,
    pattern: str | Pattern = "unstructured",
) -> Sparsifier:
    """Forward with A, the top D of |w| in each layer; the gradient reaches B ⊃ A, the top D + M. Both are chosen anew.

    ½·λ·Σ_A w² + ½·(λ/D)·Σ_{B∖A} w² joins the loss, so that a weight that is only explored must earn its place. Nothing
    ever needs a dense gradient. Weights outside A keep their values, which the forward pass sees as 0: in the
    parameter they are not zero, in `layer.weight` and after `handle.remove()` they are. Outside B nothing is updated,
    and optimizer slots are 0. `handle.learning()` is B.

    Args:
        density: D, fraction kept in the forward pass, 0 to 1.
        backward_density: D + M, fraction that learns, from D to 1; 2·D unless given (the paper's 90 % and 80 % zeros).
        penalty: λ, at least 0.
        every: steps between choices, at least 1. Unit: optimizer steps.
        pattern: who competes with whom.

    Raises:
        BudgetError: a density out of range, fewer that learn than are kept, or a pattern that fixes its own density, as
            2:4 does, and so cannot be widened.

    Example:
        >>> topkast(density=0.1).explore
        Explore(density=0.2, penalty=0.0001)

    Reference: Jayakumar et al., Top-KAST: Top-K Always Sparse Training, arXiv:2106.03517.
    Departs from: the penalty joins the gradient once per optimizer step, not in every backward pass; slots outside B
        are emptied at once, where the paper speaks of plain SGD; the optimizer's own weight decay, if it has one, still
        shrinks all weights, so leave it 0 for the paper's rule. All layers are sparse: skip= those to keep dense.
    """
    who = read(pattern)
    if who.kept is not None:
        raise BudgetError(f"pattern {who.expr!r} fixes its density, so the gradient cannot reach further; use 'sr_ste'")
    wide = min(1.0, 2.0 * density) if backward_density is None else backward_density
    if wide < density:
        raise BudgetError(f"the gradient reaches all that is kept: backward_density >= density, got {wide} < {density}")
    return Sparsifier(
        score=magnitude,
        pattern=who,
        budget=Density(density),
        policy=Always(every),
        name="topkast",
        explore=Explore(wide, penalty),
    )
