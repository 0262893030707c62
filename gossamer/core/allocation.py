"""Allocations: one model-wide density → a density per layer, with the model's count exact.

Every rule takes the layers' shapes and returns densities whose counts add up to `count(density, total)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from .budget import count
from .errors import BudgetError, unknown

Shapes = Mapping[str, Sequence[int]]
Curves = Mapping[str, Mapping[float, float]]
Rule = Callable[[Shapes, float], dict[str, float]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density everywhere."""
    return _exact(shapes, {name: density for name in shapes}, density)


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdős–Rényi: density_l ∝ (n_in + n_out)/(n_in·n_out), so narrow layers stay denser. Mocanu et al., 2018."""
    return _scaled(shapes, density, {n: sum(s[:2]) / max(math.prod(s[:2]), 1) for n, s in shapes.items()})


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdős–Rényi with kernels: density_l ∝ Σ dims / Π dims. Evci et al., RigL, arXiv:1911.11134.

    A layer whose share would pass 1 is made dense and the rest is solved again, as RigL's code does.
    """
    return _scaled(shapes, density, {n: sum(s) / max(math.prod(s), 1) for n, s in shapes.items()})


def by_sensitivity(curves: Curves, sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """Spend each weight where the measured error falls most per weight.

    minimise Σ_l error_l(d_l) subject to Σ_l n_l·d_l = n·density, along each layer's lower convex hull, on which
    taking the steepest piece first is optimal.

    Args:
        curves: per layer, measured error at a few densities (at least two, the lowest is where it starts).
        sizes: entries per layer.
        density: model-wide fraction to keep, between the lowest and highest measured averages.

    Raises:
        BudgetError: the density lies outside what the curves cover; measure a wider range.
    """
    hulls = {name: _hull(sorted(curve.items())) for name, curve in curves.items()}
    chosen = {name: hull[0][0] for name, hull in hulls.items()}
    left = density * sum(sizes.values()) - sum(chosen[n] * sizes[n] for n in chosen)
    most = sum((h[-1][0] - h[0][0]) * sizes[n] for n, h in hulls.items())
    if not -1e-6 <= left <= most + 1e-6:
        raise BudgetError(f"density {density} lies outside the measured curves; measure errors below and above it")
    pieces = [
        ((e0 - e1) / ((d1 - d0) * sizes[n]), n, d1 - d0)
        for n, hull in hulls.items()
        if sizes[n]
        for (d0, e0), (d1, e1) in zip(hull, hull[1:])
    ]
    for _, name, width in sorted(pieces, key=lambda p: -p[0]):
        taken = min(width, left / sizes[name])
        chosen[name] += taken
        left -= taken * sizes[name]
        if left <= 0:
            break
    return _exact({n: (sizes[n],) for n in chosen}, chosen, density)


def by_outliers(
    shares: Mapping[str, float], sizes: Mapping[str, int], density: float, *, within: float = 0.08
) -> dict[str, float]:
    """density_l = 2λ·(D_l − min D)/(max D − min D) + c, from 0 to 1, with c such that the model's density is right.

    Args:
        shares: D, share of outliers, per layer; layers of one block have the same.
        sizes: entries per layer.
        density: model-wide fraction to keep.
        within: λ; no two layers are further than 2λ apart.

    Raises:
        BudgetError: `within` is negative, or the density is not from 0 to 1.

    Reference: Yin et al., Outlier Weighed Layerwise Sparsity (OWL), arXiv:2310.05175.
    """
    if within < 0:
        raise BudgetError(f"within= is half the distance between the extremes, >= 0, got {within}; the paper has 0.08")
    least, most = min(shares.values(), default=0.0), max(shares.values(), default=0.0)
    above = {n: 2 * within * (d - least) / (most - least) if most > least else 0.0 for n, d in shares.items()}
    low, high = -2 * within, 1.0
    for _ in range(60):  # what they add up to grows with c, and is cut at both ends
        c = (low + high) / 2
        got = sum(min(1.0, max(0.0, above[n] + c)) * sizes[n] for n in above)
        low, high = (c, high) if got < density * sum(sizes.values()) else (low, c)
    return _exact({n: (sizes[n],) for n in above}, {n: min(1.0, max(0.0, a + high)) for n, a in above.items()}, density)


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull of (density, error), left to right."""
    hull: list[tuple[float, float]] = []
    for d, e in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (d - hull[-2][0]) >= (e - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((d, e))
    return hull


def _scaled(shapes: Shapes, density: float, weight: Mapping[str, float]) -> dict[str, float]:
    """density_l = min(1, ε·weight_l), ε such that the model's density is right."""
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    full: set[str] = set()
    while True:
        rest = [n for n in shapes if n not in full]
        left = density * sum(sizes.values()) - sum(sizes[n] for n in full)
        mass = sum(weight[n] * sizes[n] for n in rest)
        scale = left / mass if mass else 0.0
        over = {n for n in rest if scale * weight[n] > 1.0}
        if not over:
            break
        full |= over
    return _exact(shapes, {n: 1.0 if n in full else scale * weight[n] for n in shapes}, density)


def _exact(shapes: Shapes, densities: Mapping[str, float], density: float) -> dict[str, float]:
    """Round to whole counts by largest remainder, so that the model's count is exact."""
    if not 0.0 <= density <= 1.0:
        raise BudgetError(f"density is the fraction KEPT, from 0 to 1, got {density}; for 80 % zeros write 0.2")
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    ideal = {n: densities[n] * sizes[n] for n in shapes}
    counts = {n: min(sizes[n], math.floor(v + 1e-9)) for n, v in ideal.items()}
    short = count(density, sum(sizes.values())) - sum(counts.values())
    by_remainder = sorted(counts, key=lambda n: counts[n] - ideal[n])
    while short > 0:
        open_layers = [n for n in by_remainder if counts[n] < sizes[n]]
        for name in open_layers[:short]:
            counts[name] += 1
        short -= min(short, len(open_layers))
    return {n: counts[n] / sizes[n] if sizes[n] else density for n in shapes}


ALLOCATIONS: dict[str, Rule] = {"uniform": uniform, "er": er, "erk": erk}


def allocation(name: str) -> Rule:
    """The rule called `name`: "uniform", "er" or "erk". ("global" is a scope: see `select_across`.)

    Raises:
        UnknownName: no such rule; the message lists near names.
    """
    if name not in ALLOCATIONS:
        raise unknown("allocation", name, [*ALLOCATIONS, "sensitivity", "owl"])
    return ALLOCATIONS[name]
