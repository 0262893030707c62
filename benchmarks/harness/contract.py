"""What problems and solvers hand to the harness: cases and things that are ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One setting that solvers are timed on.

    Args:
        id: letters, digits, dots and dashes; unique in its problem.
        labels: what sets it apart, in the order of the table's columns, such as {"stack": "mlp", "density": 0.1}.
            The label "density" (fraction kept) is the abscissa of the problem's plot.
        quick: measured with --quick.

    Example:
        >>> Case("mlp-0.1", {"stack": "mlp", "density": 0.1}).labels["density"]
        0.1
    """

    id: str
    labels: Mapping[str, str | float | int] = field(default_factory=dict)
    quick: bool = True


@dataclass(frozen=True)
class Prepared:
    """A solver ready to be timed. A plain function does where only time is measured and its result is what is checked.

    Args:
        run: what is timed; called many times.
        check: what the numerics gate compares with the truth, where that is not what `run` returns.
        measures: further figures, such as {"bytes": 81920.0}; the names are keys of the problem's MEASURES. Called
            after the timing.
    """

    run: Callable[[], object]
    check: Callable[[], object] | None = None
    measures: Callable[[], Mapping[str, float]] | None = None

    @classmethod
    def of(cls, ready: Callable[[], object] | Prepared) -> Prepared:
        """A plain function as a Prepared."""
        return ready if isinstance(ready, Prepared) else cls(ready)

    def output(self) -> object:
        """What the gate compares."""
        return (self.check or self.run)()
