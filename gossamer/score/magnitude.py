"""Magnitude: an entry is worth its absolute value."""

from __future__ import annotations

from torch import Tensor

from gossamer.core import Stats


def magnitude(w: Tensor, stats: Stats) -> Tensor:
    """|w|, in the weight's own shape, dtype and unit. Uses no statistics.

    Example:
        >>> magnitude(torch.tensor([[-2.0, 1.0]]), {}).tolist()
        [[2.0, 1.0]]
    """
    return w.detach().abs()
