"""The average-parameter scaling law: one curve for runs that are dense, sparse, or become sparse on the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import BudgetError, NonFiniteError, need
from ..core.schedule import Schedule

HUBER = 1e-3  # residuals of log L beyond this weigh linearly, as in the law this one modifies
# Where the search begins, every combination: logarithms of the three terms in the middle of the runs, and exponents.
STARTS = ((-3.0, -1.0), (-3.0, -1.0), (-3.0, -0.3), (0.2, 0.7), (0.2, 0.7))


@dataclass(frozen=True)
class Run:
    """One run. parameters: N̄, mean number at work; data: D, tokens or samples seen; loss: L, on held-out data."""

    parameters: float
    data: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(N̄, D) = E + A/N̄^α + B/D^β.

    Example:
        >>> round(ScalingLaw(floor=1.7, a=400.0, alpha=0.34, b=410.0, beta=0.28)(70e9, 1.4e12), 3)
        1.945
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, parameters: float, data: float) -> float:
        return self.floor + self.a / parameters**self.alpha + self.b / data**self.beta

    def error(self, runs: Iterable[Run]) -> float:
        """Root mean square of ln(predicted/measured): the typical relative error."""
        squares = [math.log(self(r.parameters, r.data) / r.loss) ** 2 for r in runs]
        return math.sqrt(sum(squares) / len(squares))


def average_density(density: Schedule, total_steps: int, *, every: int = 1) -> float:
    """Mean of a density schedule over the steps of a run, N̄/N of the weights that follow it.

    Step t runs at the density of the last cut before it. A cubic ramp over the middle half gives 1 − 0.625·(1 − d).

    Args:
        density: step → fraction kept.
        total_steps: length of the run, at least 1. Unit: optimizer steps.
        every: steps between cuts, at least 1.

    Example:
        >>> average_density(lambda step: 1.0 if step < 50 else 0.2, 100)
        0.6

    Raises:
        BudgetError: no steps.
    """
    if total_steps < 1 or every < 1:
        raise BudgetError(f"a run has steps to average over, got total_steps={total_steps} and every={every}")
    return math.fsum(density(step - step % every) for step in range(total_steps)) / total_steps


def fit_scaling_law(runs: Sequence[Run]) -> ScalingLaw:
    """The law that runs obey: least Σ Huber(ln L(N̄ᵢ, Dᵢ) − ln Lᵢ), δ = 10⁻³, over E, A, B > 0 and 0 ≤ α, β ≤ 2.

    ln L is computed as logsumexp(ln A − α ln N̄, ln B − β ln D, ln E), and L-BFGS goes out from a grid of starts.

    Args:
        runs: at least six, of at least three different N̄ and two D: the law has five constants.

    Example:
        >>> law = ScalingLaw(floor=1.5, a=30.0, alpha=0.4, b=90.0, beta=0.5)
        >>> runs = [Run(n, d, law(n, d)) for n in (1e4, 1e5, 1e6) for d in (1e5, 1e6)]
        >>> fit_scaling_law(runs).error(runs) < 1e-3
        True

    Raises:
        BudgetError: too few runs to tell the constants apart.
        NonFiniteError: a count or a loss is not a positive number.
        MissingDependency: scipy is not installed.

    Reference: Jin et al., arXiv:2501.12486: the law of Hoffmann et al., Training Compute-Optimal Large Language Models,
        arXiv:2203.15556, with N̄ in place of N.
    Departs from: exponents are bounded, so that few runs cannot make a term a step; N and D are scaled to their
        geometric means within the fit, and the grid of starts is smaller.
    """
    optimize, special = need("scipy.optimize", "demo"), need("scipy.special", "demo")
    _check(runs)
    x, y, z = (np.log([getattr(r, name) for r in runs]) for name in ("parameters", "data", "loss"))
    at_x, at_y, at_z = x.mean(), y.mean(), z.mean()

    def misfit(p: np.ndarray) -> tuple[float, np.ndarray]:
        terms = np.stack([p[0] - p[3] * (x - at_x), p[1] - p[4] * (y - at_y), np.full_like(x, p[2])])
        off = special.logsumexp(terms, axis=0) - (z - at_z)
        shares = special.softmax(terms, axis=0) * np.clip(off / HUBER, -1.0, 1.0)
        slopes = (-(shares[0] * (x - at_x)).sum(), -(shares[1] * (y - at_y)).sum())
        return float(special.huber(HUBER, off).sum() / HUBER), np.array([*shares.sum(1), *slopes])

    bounds = [(-12.0, 4.0)] * 3 + [(0.0, 2.0)] * 2
    tries = [
        optimize.minimize(misfit, s, jac=True, method="L-BFGS-B", bounds=bounds) for s in itertools.product(*STARTS)
    ]
    a, b, e, alpha, beta = min(tries, key=lambda t: t.fun).x
    return ScalingLaw(
        floor=math.exp(e + at_z),
        a=math.exp(a + at_z + alpha * at_x),
        alpha=float(alpha),
        b=math.exp(b + at_z + beta * at_y),
        beta=float(beta),
    )


def _check(runs: Sequence[Run]) -> None:
    for r in runs:
        if not all(math.isfinite(v) and v > 0 for v in (r.parameters, r.data, r.loss)):
            raise NonFiniteError(f"parameters, data and loss are positive numbers, got {r}; leave that run out")
    if len(runs) < 6 or len({r.parameters for r in runs}) < 3 or len({r.data for r in runs}) < 2:
        raise BudgetError(
            "the law has five constants: give six runs or more, of three average sizes and two lengths, got "
            f"{len(runs)} of {len({r.parameters for r in runs})} and {len({r.data for r in runs})}"
        )
