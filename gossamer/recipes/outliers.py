"""OWL: layers whose scores have more outliers keep more.

Shape suffixes: K input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from ..attach.blocks import blocks_of
from ..attach.calibrate import Arrival, Batch, stream
from ..attach.statistics import Collector
from ..attach.targets import Target
from ..core.allocation import by_outliers
from ..score import weight_times_input_norm

Progress = Callable[[str, int, int], None]


def outlier_share(scores: Sequence[Tensor], times: float = 5.0) -> float:
    """Share of entries, of all these tensors together, above `times` their common mean."""
    size = sum(s.numel() for s in scores)
    bar = times * sum(float(s.double().sum()) for s in scores) / max(size, 1)
    return sum(int((s > bar).sum()) for s in scores) / max(size, 1)


def outlier_shares(
    model: nn.Module,
    targets: Sequence[Target],
    data: Iterable[Batch],
    *,
    times: float = 5.0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Per layer, the share of outliers among Wanda's scores of its whole block; the model stays as it was.

    Args:
        targets: the layers. A block is an entry of an outermost list of modules; a layer outside of them is its own.
        data: calibration batches, run once through the dense model.
        times: an outlier is above this many times the block's mean score.
        progress: called with (layer, done, total).

    Returns:
        Layers no batch reached are missing, and do not count in their block.
    """
    collect, norms = Collector(("input_norm",)), {}

    def visit(arrival: Arrival) -> None:
        norms[arrival.target.name] = collect(arrival, arrival.target.module(model))
        if progress is not None:
            progress(f"outliers of {arrival.target.name}", len(norms), len(targets))

    stream(model, data, targets, visit)
    weights = {t.name: t.weight(model) for t in targets if t.name in norms}
    blocks = list(blocks_of(model, targets).values())
    alone = set(weights) - {name for inner in blocks for name in inner}
    shares = {}
    for inner in [*blocks, *((name,) for name in alone)]:
        reached = [name for name in inner if name in weights]
        share = outlier_share([weight_times_input_norm(weights[n], norms[n]) for n in reached], times)
        shares |= dict.fromkeys(reached, share)
    return {t.name: shares[t.name] for t in targets if t.name in shares}


def allocate_by_outliers(
    model: nn.Module,
    targets: Sequence[Target],
    data: Iterable[Batch],
    *,
    density: float,
    times: float = 5.0,
    within: float = 0.08,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Densities per layer: blocks with more outliers keep more, all within 2·`within` of each other.

    Args:
        targets, data: as for `outlier_shares`; scores are Wanda's, whatever prunes.
        density: model-wide fraction to keep.
        times: an outlier is above this many times the block's mean score (the paper's M).
        within: half the distance between the densest block and the sparsest (the paper's λ).

    Raises:
        BudgetError: the density is not from 0 to 1, or `within` is negative.

    Reference: Yin et al., Outlier Weighed Layerwise Sparsity (OWL), arXiv:2310.05175.
    Departs from: blocks of unequal size count by their entries and densities end at 0 and 1, so that the model's count
        is exact.
    """
    shares = outlier_shares(model, targets, data, times=times, progress=progress)
    sizes = {t.name: math.prod(t.weight(model).shape) for t in targets if t.name in shares}
    spread = by_outliers(shares, sizes, density, within=within)
    return {t.name: spread.get(t.name, density) for t in targets}
