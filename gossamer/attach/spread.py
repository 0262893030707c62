"""spread: one density for the model → a sparsifier per layer, by rule or as the user named them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..core.allocation import allocation as rule
from ..core.budget import Density
from ..core.errors import BudgetError, TargetError
from ..core.schedule import Span, at
from ..core.sparsifier import Sparsifier
from .targets import Target


def spread(
    model: nn.Module, targets: Sequence[Target], sparsifier: Sparsifier, allocation: str | Mapping[str, float]
) -> dict[str, Sparsifier]:
    """The sparsifier of every layer, each at its own density.

    Args:
        allocation: "uniform", "er", "erk", or a density per layer name.

    Raises:
        BudgetError: the pattern fixes the density, as 2:4 does.
        TargetError: the layers compete in one pool already, or a layer has no density.
        UnknownName: no such rule.
    """
    if allocation == "uniform":
        return {t.name: sparsifier for t in targets}
    refuse_spreading(sparsifier, allocation)
    if isinstance(allocation, str):
        shapes = {t.name: tuple(t.weight(model).shape) for t in targets}
        chosen = rule(allocation)(shapes, final_density(sparsifier))
    else:
        chosen = _named(targets, allocation)
    return {name: sparsifier.at_density(d) for name, d in chosen.items()}


def refuse_spreading(sparsifier: Sparsifier, allocation: str | Mapping[str, float]) -> None:
    """Raise where a density per layer would contradict the pool or the pattern."""
    if sparsifier.scope == "model":
        raise TargetError(
            f"{sparsifier.name!r} lets all layers compete in one pool, which sets their densities; "
            "use allocation='uniform'"
        )
    if allocation == "global":
        raise TargetError("allocation 'global' is one pool over all layers: use method 'global_magnitude'")
    if not isinstance(sparsifier.budget, Density):
        raise BudgetError(
            f"allocation {allocation!r} spreads a density over layers, but pattern {str(sparsifier.pattern)!r} "
            "fixes it; use allocation='uniform'"
        )


def final_density(sparsifier: Sparsifier) -> float:
    """The fraction kept once every schedule has run its course."""
    d = sparsifier.budget.d  # type: ignore[attr-defined]  # refuse_spreading left only Density
    return d.end if isinstance(d, Span) else at(d, 0)


def _named(targets: Sequence[Target], allocation: Mapping[str, float]) -> dict[str, float]:
    missing = [t.name for t in targets if t.name not in allocation]
    if missing:
        raise TargetError(f"allocation= names no density for {', '.join(missing[:5])}; give one, or skip= the layer")
    return {t.name: allocation[t.name] for t in targets}
