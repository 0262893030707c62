"""GQSA: groups of sixteen weights kept or cut whole, the kept ones at four bits."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from gossamer.core import Budget, Pattern, Sparsifier, Stats, Support, budget_for, method, select
from gossamer.core.errors import BudgetError
from gossamer.core.pattern import pattern as read
from gossamer.formats.shared_grid import SharedGrid
from gossamer.solve import saliency

GROUPS = "o ([g] {16})"


@method("gqsa", paper="arXiv:2412.17560", row="P050")
def gqsa(
    *,
    density: float | None = None,
    pattern: str | Pattern = GROUPS,
    bits: int = 4,
    width: int = 128,
    damping: float = 0.01,
) -> Sparsifier:
    """Keep the groups of each row with most Σ w²/[H⁻¹]_jj and round what is kept to 4 bits: W4 at any density.

    This is where the paper's two stages of training start from; `gossamer.recipes.gqsa` runs them. With the default
    pattern, bits and width, `Int4Groups` stores the result to the bit.

    Args:
        density: fraction kept of each pool, 0 to 1; 0.5 unless given or fixed by the pattern.
        pattern: who competes with whom: groups of sixteen neighbours within a row, or any other ("2:4").
        bits: of a kept weight, 1 to 8.
        width: kept weights of a row that share a scale and a lowest value. Unit: weights.
        damping: added to H's diagonal, as a share of its mean; > 0.

    Raises:
        BudgetError: density disagrees with the pattern's own, or bits, width or damping is out of range.

    Example:
        >>> w = torch.cat([torch.linspace(0, 1.5, 16), torch.zeros(16)])[None]
        >>> new, support = gqsa().apply(w, {"gram": torch.eye(32)})
        >>> support.density, new.unique().numel()
        (0.5, 16)

    Reference: Zeng et al., GQSA: Group Quantization and Sparsity, arXiv:2412.17560.
    Departs from: there is no official code; here 128 kept weights (eight groups) share a scale, as the kernel reads
        them, where the paper gives every group its own.
    """
    if not 1 <= bits <= 8 or width < 1 or damping <= 0:
        raise BudgetError(
            f"gqsa needs 1 to 8 bits, width >= 1 and damping > 0, got {bits}, {width}, {damping}; try 4, 128 and 0.01"
        )
    who = read(pattern)
    score = partial(saliency, damping=damping)
    return Sparsifier(
        score=score,
        pattern=who,
        budget=budget_for(who, density, default=0.5),
        needs=("gram",),
        solve=partial(_selected_and_rounded, score=score, bits=bits, width=width),
        name="gqsa",
    )


def _selected_and_rounded(
    w: Tensor, stats: Stats, pattern: Pattern, budget: Budget, *, score, bits: int, width: int
) -> tuple[Tensor, Support]:
    support = select(score(w, stats), pattern, budget)
    grid = SharedGrid.of(support.kept.flatten(1), bits=bits, width=width)
    return grid.rounded(w.flatten(1)).view(w.shape).to(w.dtype), support
