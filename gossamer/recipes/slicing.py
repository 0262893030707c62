"""Slicing: how much is asked of `slice`, and what it answers. D columns of the stream."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import fmean

from torch import Tensor

from ..core.errors import BudgetError

MULTIPLE = 8  # of widths: what vector units and GPUs like, and the official code's default


@dataclass(frozen=True)
class Cut:
    """How many columns stay: the same number everywhere, or as many as hold a fraction of the energy."""

    width: int | None
    energy: float | None

    @classmethod
    def of(cls, wide: int, keep: float | None, energy: float | None) -> Cut:
        """From what was asked of a stream of `wide` columns."""
        if keep is not None and energy is not None:
            raise BudgetError(f"keep={keep} and energy={energy} both say how many columns stay; give one of the two")
        if energy is not None:
            return cls(None, _fraction("energy", energy))
        keep = _fraction("keep", 0.75 if keep is None else keep)
        width = wide if keep == 1 else math.floor(keep * wide) // MULTIPLE * MULTIPLE
        if not width:
            raise BudgetError(
                f"keep={keep} leaves fewer than {MULTIPLE} of {wide} columns; give {MULTIPLE / wide:.3f} or more"
            )
        return cls(width, None)

    def width_for(self, values_D: Tensor) -> int:
        """Columns to keep where the stream has these eigenvalues, largest first."""
        if self.width is not None:
            return self.width
        held_D = values_D.cumsum(0)
        fewest = int((held_D < (self.energy or 1.0) * held_D[-1]).sum()) + 1
        return min(-(-fewest // MULTIPLE) * MULTIPLE, len(values_D))


def _fraction(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise BudgetError(f"{name} is a fraction, above 0 and up to 1; got {value}")
    return value


@dataclass(frozen=True)
class Turned:
    """The stream at one place.

    Args:
        name: the place: before the first block, or behind one half of a block.
        width: columns kept.
        energy: fraction of the calibration tokens' Σ x² that they hold.
        seconds: statistics and eigenvectors.
        resumed: taken from an earlier run's journal.
    """

    name: str
    width: int
    energy: float
    seconds: float
    resumed: bool = False


@dataclass(frozen=True)
class SliceReport:
    """What `slice` did.

    Args:
        width_before: of the residual stream.
        width: the same now, where it is widest.
        places: where the stream was turned and cut.
        parameters_before, parameters: of the whole model, tied ones once.
        products_before, products: multiplications per token in the linear layers.
        tokens: real tokens that it was calibrated with.
    """

    width_before: int
    width: int
    places: tuple[Turned, ...]
    parameters_before: int
    parameters: int
    products_before: int
    products: int
    tokens: int
    seconds: float

    @property
    def keep(self) -> float:
        """Fraction of the stream's columns kept, on average over the places."""
        return fmean(p.width for p in self.places) / self.width_before

    @property
    def resumed(self) -> int:
        """Places taken over from an earlier run."""
        return sum(p.resumed for p in self.places)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {**asdict(self), "keep": self.keep, "resumed": self.resumed}
