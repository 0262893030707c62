"""Support: which entries were kept. Frozen; the one thing every method makes and every format reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import PatternError


@dataclass(frozen=True, eq=False)
class Support:
    """A set of kept entries of one tensor.

    Args:
        kept: bool tensor in the shape of the tensor it speaks of; True = kept.

    Example:
        >>> a = Support(torch.tensor([True, False, True]))
        >>> (a & ~a).count
        0
    """

    kept: Tensor

    def __post_init__(self) -> None:
        if self.kept.dtype != torch.bool:
            raise PatternError(f"a support is a bool tensor, got {self.kept.dtype}; write Support(weight != 0)")

    def mask(self, dtype: torch.dtype = torch.bool) -> Tensor:
        """The support as a tensor of 0 and 1 (or False and True)."""
        return self.kept.to(dtype)

    def indices(self) -> Tensor:
        """Coordinates of the kept entries, int64 [count, rank], in row-major order."""
        return self.kept.nonzero()

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor it speaks of."""
        return self.kept.shape

    @property
    def count(self) -> int:
        """Number of kept entries (waits for the device)."""
        return int(counted(self.kept))

    @property
    def density(self) -> float:
        """Fraction kept, in [0, 1]; 0 for an empty tensor."""
        return self.count / max(self.kept.numel(), 1)

    def to(self, device: torch.device | str) -> Support:
        """The same support on another device."""
        return Support(self.kept.to(device))

    def propagate(self, rule: Callable[[Tensor], Tensor]) -> Support:
        """The support that an operator turns this one into; `rule` maps bool tensor → bool tensor.

        Left open on purpose: what a convolution does to occupied voxels is the operator's knowledge, not ours.
        """
        return Support(rule(self.kept))

    def __or__(self, other: Support) -> Support:
        return Support(self.kept | self._same(other).kept)

    def __and__(self, other: Support) -> Support:
        return Support(self.kept & self._same(other).kept)

    def __sub__(self, other: Support) -> Support:
        return Support(self.kept & ~self._same(other).kept)

    def __invert__(self) -> Support:
        return Support(~self.kept)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Support) and self.shape == other.shape and bool((self.kept == other.kept).all())

    __hash__ = None  # type: ignore[assignment]

    def __le__(self, other: Support) -> bool:
        """True if every entry kept here is kept there too."""
        return not bool((self.kept & ~self._same(other).kept).any())

    def __repr__(self) -> str:
        return f"Support({self.count} of {self.kept.numel()} kept, shape {tuple(self.shape)})"

    def _same(self, other: Support) -> Support:
        if self.shape != other.shape:
            raise PatternError(
                f"supports of shapes {tuple(self.shape)} and {tuple(other.shape)} speak of different tensors"
            )
        return other


def counted(kept: Tensor) -> Tensor | int:
    """How many entries of a bool tensor are True; on a device a tensor, so that nobody waits. NumPy is the faster."""
    plain = type(kept) is Tensor and kept.device.type == "cpu" and not torch.compiler.is_compiling()
    return int(np.count_nonzero(kept.numpy())) if plain else kept.count_nonzero()
