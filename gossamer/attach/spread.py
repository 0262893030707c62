"""spread: one density for the model → a sparsifier per layer, by rule or as the user named them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..core.allocation import ALLOCATIONS
from ..core.allocation import allocation as rule
from ..core.budget import Density
from ..core.errors import BudgetError, TargetError, near, unknown
from ..core.registry import get_method, methods
from ..core.sparsifier import Sparsifier
from ..score import Trial
from .start import first_supports
from .targets import Target


def spread(
    model: nn.Module,
    targets: Sequence[Target],
    sparsifier: Sparsifier,
    allocation: str | Mapping[str, float],
    trial: Trial | None = None,
    *,
    besides: Sequence[str] = (),
) -> dict[str, Sparsifier]:
    """The sparsifier of every layer, each at its own density.

    Args:
        allocation: "uniform", "er", "erk", a method in which layers compete ("snip"), or a density per layer name.
        trial: data and loss, for such a method.
        besides: rules that the caller has of its own, to be named where one is misspelt.

    Raises:
        BudgetError: the pattern fixes the density, as 2:4 does, or a layer's density is not above 0 and up to 1.
        TargetError: the layers compete in one pool already, a layer has no density, or a name is no layer's.
        UnknownName: no such rule.
    """
    if allocation == "uniform":
        return {t.name: sparsifier for t in targets}
    refuse_spreading(sparsifier, allocation)
    chosen = _asked(model, targets, sparsifier, allocation, trial, besides)
    return {name: sparsifier.at_density(d) for name, d in chosen.items()}


def tries_out(sparsifier: Sparsifier, allocation: str | Mapping[str, float]) -> bool:
    """True if the method, or the one its densities come from, tries the model out on data before it chooses."""
    if not isinstance(allocation, str) or allocation not in methods():
        return sparsifier.probe is not None
    return sparsifier.probe is not None or _rival(allocation, 0.5).probe is not None


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


def _asked(
    model: nn.Module,
    targets: Sequence[Target],
    sparsifier: Sparsifier,
    allocation: str | Mapping[str, float],
    trial: Trial | None,
    besides: Sequence[str],
) -> dict[str, float]:
    if not isinstance(allocation, str):
        return _named(targets, allocation)
    density = sparsifier.final_density()
    if allocation in methods():
        return ratios(model, targets, allocation, density, trial)
    if allocation not in ALLOCATIONS:
        raise unknown("allocation", allocation, [*ALLOCATIONS, *besides, *methods()])
    shapes = {t.name: tuple(t.weight(model).shape) for t in targets}
    return rule(allocation)(shapes, density)


def ratios(
    model: nn.Module, targets: Sequence[Target], name: str, density: float, trial: Trial | None
) -> dict[str, float]:
    """The densities that a method gives the layers where they compete in one pool; which entries win is forgotten.

    Raises:
        TargetError: the method has no pool over layers.
        CalibrationError: it needs data and there are none.
    """
    sparsifier = _rival(name, density)
    return {t.name: s.density for t, s in first_supports(model, targets, sparsifier, {}, trial).items()}


def _rival(name: str, density: float) -> Sparsifier:
    """A method in which layers compete, at this density."""
    found = get_method(name)
    if not found.needs_density_alone or (rival := found(density=density)).scope != "model":
        raise TargetError(f"layers do not compete in method {name!r}, so it is no allocation; use 'uniform'")
    return rival


def _named(targets: Sequence[Target], allocation: Mapping[str, float]) -> dict[str, float]:
    names = [t.name for t in targets]
    missing = [name for name in names if name not in allocation]
    if missing:
        raise TargetError(f"allocation= names no density for {', '.join(missing[:5])}; give one, or skip= the layer")
    for name, density in allocation.items():
        if name not in names:
            raise TargetError(f"allocation= names {name!r}, which is no layer to be made sparse; {near(name, names)}")
        if not 0.0 < density <= 1.0:
            raise BudgetError(
                f"density is the fraction KEPT, above 0 and up to 1, but allocation= gives layer {name!r} {density:g}"
            )
    return {name: allocation[name] for name in names}
