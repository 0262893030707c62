"""Layouts: how activations lie in memory between the runtime's kernels.

Token panels are [panels, features, width]: positions of all sequences run through the lanes one after the other, each
sequence rounded up to whole vectors. Image planes are [images, channels, plane stride].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from ..kernels.cpu.planes import plane_stride

# Positions of a panel: four vectors of AVX-512.
WIDTH = 64
# Every sequence starts at a whole vector.
VECTOR = 16


@dataclass(frozen=True)
class Tokens:
    """Token panels of a tensor [*lead, features]: the last of `lead` counts positions, the others sequences.

    Example:
        >>> t = Tokens((3, 20), 8)
        >>> t.sequences, t.padded, t.panels, t.width
        (3, 32, 2, 64)
    """

    lead: tuple[int, ...]
    features: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor these panels stand for."""
        return (*self.lead, self.features)

    @property
    def sequences(self) -> int:
        return prod(self.lead[:-1])

    @property
    def positions(self) -> int:
        """Of one sequence."""
        return self.lead[-1] if self.lead else 1

    @property
    def padded(self) -> int:
        """Positions of one sequence rounded up to whole vectors."""
        return -(-self.positions // VECTOR) * VECTOR

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def panels(self) -> int:
        return -(-self.sequences * self.padded // self.width)

    @property
    def used(self) -> int:
        """Positions of each panel that matter."""
        return WIDTH

    @property
    def used_last(self) -> int:
        """The same of the last panel."""
        return self.sequences * self.padded - (self.panels - 1) * WIDTH

    @property
    def nbytes(self) -> int:
        return 4 * self.panels * self.features * self.width

    def with_features(self, features: int) -> Tokens:
        return replace(self, features=features)


@dataclass(frozen=True)
class Planes:
    """Image planes of a tensor [images, channels, high, wide]."""

    images: int
    features: int
    high: int
    wide: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.images, self.features, self.high, self.wide)

    @property
    def panels(self) -> int:
        return self.images

    @property
    def width(self) -> int:
        return plane_stride(self.high * self.wide)

    @property
    def used(self) -> int:
        """Pixels of each plane."""
        return self.high * self.wide

    @property
    def used_last(self) -> int:
        return self.used

    @property
    def nbytes(self) -> int:
        return 4 * self.images * self.features * self.width

    def with_features(self, features: int) -> Planes:
        return replace(self, features=features)


Layout = Tokens | Planes
