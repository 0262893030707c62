"""allocate: one density for the model → a sparsifier per layer, by rule, by measurement, or as the user named them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from ..attach.calibrate import Batch
from ..attach.targets import Target
from ..core.allocation import allocation as rule
from ..core.budget import Density
from ..core.errors import BudgetError, CalibrationError, TargetError
from ..core.files import whole_file
from ..core.schedule import at
from ..core.sparsifier import Sparsifier
from .sensitivity import allocate_by_sensitivity

Progress = Callable[[str, int, int], None]


def allocate(
    model: nn.Module,
    targets: Sequence[Target],
    sparsifier: Sparsifier,
    allocation: str | dict[str, float],
    *,
    data: list[Batch] | None = None,
    progress: Progress | None = None,
    workdir: str | Path | None = None,
) -> dict[str, Sparsifier]:
    """The sparsifier of every layer, each at its own density.

    Args:
        allocation: "uniform", "er", "erk", "sensitivity", or a density per layer name.
        data: calibration batches, for "sensitivity".
        workdir: a measured allocation is kept here and taken again by the run that goes on.

    Raises:
        BudgetError: the pattern fixes the density, as 2:4 does.
        TargetError: the layers compete in one pool already, or a layer has no density.
        CalibrationError: "sensitivity" without data.
        UnknownName: no such rule.
    """
    if allocation == "uniform":
        return {t.name: sparsifier for t in targets}
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
    if allocation == "sensitivity":
        if data is None:
            raise CalibrationError(
                "allocation 'sensitivity' measures layers on inputs; pass data= (calibration batches)"
            )
        density = at(sparsifier.budget.d, 0)
        measure = partial(allocate_by_sensitivity, model, sparsifier, targets, data, density=density, progress=progress)
        chosen = measure() if workdir is None else _kept_aside(Path(workdir) / "allocation.json", measure)
    elif isinstance(allocation, dict):
        chosen = _named(targets, allocation)
    else:
        shapes = {t.name: tuple(t.weight(model).shape) for t in targets}
        chosen = rule(allocation)(shapes, at(sparsifier.budget.d, 0))
    return {name: sparsifier.at_density(d) for name, d in chosen.items()}


def _kept_aside(file: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was measured before a kill counts when the run goes on: measured again, the last bits would differ."""
    if file.exists():
        return json.loads(file.read_text())
    chosen = measure()
    with whole_file(file) as draft:
        draft.write_text(json.dumps(chosen))
    return chosen


def _named(targets: Sequence[Target], allocation: dict[str, float]) -> dict[str, float]:
    missing = [t.name for t in targets if t.name not in allocation]
    if missing:
        raise TargetError(f"allocation= names no density for {', '.join(missing[:5])}; give one, or skip= the layer")
    return {t.name: allocation[t.name] for t in targets}
