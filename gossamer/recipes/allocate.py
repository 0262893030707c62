"""allocate: one density for the model → a sparsifier per layer, by rule, by measurement, or as the user named them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from ..attach.calibrate import Batch
from ..attach.spread import refuse_spreading, spread
from ..attach.targets import Target
from ..core.errors import CalibrationError
from ..core.files import whole_file
from ..core.sparsifier import Sparsifier
from ..score import Trial
from .outliers import allocate_by_outliers
from .sensitivity import allocate_by_sensitivity

Progress = Callable[[str, int, int], None]
# Rules that look at the model's inputs.
MEASURED = {
    "sensitivity": allocate_by_sensitivity,
    "owl": lambda model, _, targets, data, **how: allocate_by_outliers(model, targets, data, **how),
}


def allocate(
    model: nn.Module,
    targets: Sequence[Target],
    sparsifier: Sparsifier,
    allocation: str | dict[str, float],
    *,
    data: list[Batch] | None = None,
    trial: Trial | None = None,
    progress: Progress | None = None,
    workdir: str | Path | None = None,
) -> dict[str, Sparsifier]:
    """The sparsifier of every layer, each at its own density.

    Args:
        allocation: "uniform", "er", "erk", "sensitivity", "owl", a method in which layers compete ("snip"), or a
            density per layer name.
        data: calibration batches, for "sensitivity" and "owl".
        trial: data and loss, for such a method.
        workdir: a measured allocation is kept here and taken again by the run that goes on.

    Raises:
        BudgetError: the pattern fixes the density, as 2:4 does.
        TargetError: the layers compete in one pool already, a layer has no density, or a name is no layer's.
        CalibrationError: "sensitivity", "owl", or a method that tries the model out, without data.
        UnknownName: no such rule.
    """
    if not isinstance(allocation, str) or allocation not in MEASURED:
        return spread(model, targets, sparsifier, allocation, trial, besides=tuple(MEASURED))
    refuse_spreading(sparsifier, allocation)
    if data is None:
        raise CalibrationError(f"allocation {allocation!r} measures layers on inputs; pass data= (calibration batches)")
    density = sparsifier.final_density()
    measure = partial(MEASURED[allocation], model, sparsifier, targets, data, density=density, progress=progress)
    chosen = measure() if workdir is None else _kept_aside(Path(workdir) / "allocation.json", measure)
    return {name: sparsifier.at_density(d) for name, d in chosen.items()}


def _kept_aside(file: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was measured before a kill counts when the run goes on: measured again, the last bits would differ."""
    if file.exists():
        return json.loads(file.read_text())
    chosen = measure()
    with whole_file(file) as draft:
        draft.write_text(json.dumps(chosen))
    return chosen
