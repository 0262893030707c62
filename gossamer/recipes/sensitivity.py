"""sensitivity: how much each layer's output suffers at each density, measured, and the allocation that follows.

Shape suffixes: M outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from ..attach.calibrate import Arrival, Batch, stream
from ..attach.statistics import Collector
from ..attach.targets import Target
from ..core.allocation import by_sensitivity
from ..core.errors import BudgetError
from ..core.sparsifier import Sparsifier

Progress = Callable[[str, int, int], None]
# Around the asked density, far enough out that no layer's share is cut off by the grid.
STEPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def output_error(w_MK: Tensor, new_MK: Tensor, gram_KK: Tensor) -> float:
    """‖x(W − W')ᵀ‖² / ‖xWᵀ‖² over the calibration inputs, from their Gram matrix: tr(ΔGΔᵀ)/tr(WGWᵀ)."""
    delta_MK = (w_MK - new_MK).float().flatten(1)
    w_MK = w_MK.float().flatten(1)
    lost = ((delta_MK @ gram_KK) * delta_MK).sum()
    return float(lost / ((w_MK @ gram_KK) * w_MK).sum().clamp(min=1e-30))


def sensitivity(
    model: nn.Module,
    sparsifier: Sparsifier,
    targets: Sequence[Target],
    data: Iterable[Batch],
    *,
    densities: Sequence[float],
    progress: Progress | None = None,
) -> dict[str, dict[float, float]]:
    """Prune each layer on trial at each density and measure its relative output error; the model stays as it was.

    Args:
        sparsifier: how a layer is pruned on trial.
        targets: the layers.
        data: calibration batches, run once.
        densities: fractions kept to try, in [0, 1].
        progress: called with (layer, done, total).

    Returns:
        Per layer, error by density. Layers no batch reached are missing.
    """
    collect, curves = Collector(tuple({*sparsifier.needs, "gram"})), {}

    def visit(arrival: Arrival) -> None:
        target, w = arrival.target, arrival.target.weight(model).detach()
        stats = collect(arrival, target.module(model))
        trials = {d: sparsifier.at_density(d).apply(w, stats)[0] for d in densities}
        curves[target.name] = {d: output_error(w, new, stats["gram"]) for d, new in trials.items()}
        if progress is not None:
            progress(f"sensitivity of {target.name}", len(curves), len(targets))

    stream(model, data, targets, visit)
    return curves


def allocate_by_sensitivity(
    model: nn.Module,
    sparsifier: Sparsifier,
    targets: Sequence[Target],
    data: Iterable[Batch],
    *,
    density: float,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Densities per layer that minimise the sum of measured relative output errors at a model-wide density.

    Raises:
        BudgetError: the density is 0 or 1, where there is nothing to allocate.
    """
    if not 0.0 < density < 1.0:
        raise BudgetError(f"density {density} leaves nothing to allocate; use allocation='uniform'")
    grid = sorted({min(1.0, round(density * s, 6)) for s in STEPS})
    curves = sensitivity(model, sparsifier, targets, data, densities=grid, progress=progress)
    sizes = {t.name: math.prod(t.weight(model).shape) for t in targets if t.name in curves}
    spread = by_sensitivity(curves, sizes, density)
    return {t.name: spread.get(t.name, density) for t in targets}
