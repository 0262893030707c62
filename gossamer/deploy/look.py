"""Look: a layer as measuring sees it."""

from __future__ import annotations

from dataclasses import dataclass

from .structure import Structure


@dataclass(frozen=True)
class Look:
    """Layers that look alike share their times, in one call of `pack` and on one machine.

    Args:
        kind: "linear", or the convolution and its images in words.
        shape: of the weight as a matrix.
        dtype: of the weight.
        tokens: as in `Layer`.
        bias: whether there is one.
        activation: fused in.
        structures: of the zeros.
        percent: of the weight that is kept.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    tokens: tuple[int, ...]
    bias: bool
    activation: str
    structures: tuple[Structure, ...]
    percent: int
