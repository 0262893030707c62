"""The sparsity curve of a model and its knee: how far one-shot pruning goes before the loss drops off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gossamer.core.errors import BudgetError, NonFiniteError

FLAT = 0.1  # a plateau counts as at least this share of the whole curve's mean slope, so that noise makes no knee


@dataclass(frozen=True)
class Curve:
    """A measured curve.

    Args:
        points: (density, loss), densest first.
        knee: the density after which the loss rises `factor` times faster than before, or None if it never does
            (also where it rises from the start, and there is no plateau).
        before: mean rise of the loss per unit of sparsity up to the knee.
        beyond: the same from the knee to the last point; both are 0 without a knee.
    """

    points: tuple[tuple[float, float], ...]
    knee: float | None
    before: float
    beyond: float

    @property
    def ratio(self) -> float:
        """How many times faster the loss rises beyond the knee; infinite after a flat plateau."""
        return self.beyond / self.before if self.before > 0 else float("inf") if self.knee is not None else 1.0


def sparsity_curve(densities: Iterable[float], measure: Callable[[float], float], *, factor: float = 3.0) -> Curve:
    """Measure a loss at each density and find where it drops off.

    Args:
        densities: fractions kept, 0 to 1, at least three different ones; begin with 1.
        measure: density → loss (lower is better), such as cross-entropy or 1 − accuracy.
        factor: how many times faster the loss must rise; > 1.

    Example:
        >>> sparsity_curve([1.0, 0.8, 0.6, 0.4, 0.2], lambda d: max(0.0, 0.6 - d)).knee
        0.6

    Raises:
        BudgetError: fewer than three densities.
        NonFiniteError: a loss is NaN or infinite; leave out densities at which the model breaks altogether.
    """
    points = tuple((d, float(measure(d))) for d in sorted(set(densities), reverse=True))
    return with_knee(points, factor=factor)


def with_knee(points: Sequence[tuple[float, float]], *, factor: float = 3.0) -> Curve:
    """The curve through measured points, with its knee.

    The knee is the densest point i after the first such that the mean slope from i to EVERY later point exceeds
    `factor` times the plateau's: the mean slope up to i, or FLAT times that of the whole curve where this is more.
    Asking it of every later point keeps one noisy measurement from making a knee.
    """
    _check(points)
    x = [1.0 - d for d, _ in points]
    y = [loss for _, loss in points]
    whole = (y[-1] - y[0]) / (x[-1] - x[0])
    for i in range(1, len(points) - 1):
        before = (y[i] - y[0]) / (x[i] - x[0])
        bar = factor * max(before, FLAT * whole, 0.0)
        if all((y[j] - y[i]) / (x[j] - x[i]) > bar for j in range(i + 1, len(points))):
            return Curve(tuple(points), points[i][0], before, (y[-1] - y[i]) / (x[-1] - x[i]))
    return Curve(tuple(points), None, 0.0, 0.0)


def _check(points: Sequence[tuple[float, float]]) -> None:
    if len(points) < 3:
        raise BudgetError(f"a knee needs at least three densities, got {len(points)}; add some between 1 and 0.1")
    broken = [d for d, loss in points if not abs(loss) < float("inf")]
    if broken:
        raise NonFiniteError(f"the loss is NaN or infinite at densities {broken}; leave them out")
