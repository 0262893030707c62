"""Grids of whole rows: the values that a b-bit weight with one scale per output may take, zero among them.

Shape suffixes: M output rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gossamer.core.errors import BudgetError


@dataclass(frozen=True)
class RowGrid:
    """scale·q with whole q from `lowest` to `highest`, per row."""

    scale_M: Tensor
    lowest_M: Tensor
    highest_M: Tensor

    @classmethod
    def of(cls, w_KM: Tensor, bits: int, *, symmetric: bool = False) -> Self:
        """The grid over each row's range, zero included; a row is a column here, as solvers hold the transpose.

        symmetric: scale = max|w|/(2^(b−1) − 1) and q up to that on both sides, as int8 products take it; otherwise
        scale = (max − min)/(2^b − 1), with all 2^b values between.

        Raises:
            BudgetError: bits are not from 2 to 8.
        """
        if not 2 <= bits <= 8:
            raise BudgetError(f"weights are rounded to 2 to 8 bits, got {bits}; leave bits= out for no rounding")
        least_M, most_M = w_KM.amin(0).clamp(max=0), w_KM.amax(0).clamp(min=0)
        if symmetric:
            side = torch.full_like(most_M, 2 ** (bits - 1) - 1)
            return cls(_positive(torch.maximum(most_M, -least_M) / side), -side, side)
        scale_M = _positive((most_M - least_M) / (2**bits - 1))
        zero_M = (-least_M / scale_M).round()
        return cls(scale_M, -zero_M, 2**bits - 1 - zero_M)

    def rounded(self, w_M: Tensor) -> Tensor:
        """The nearest values on the grid, one weight of each row."""
        return (w_M / self.scale_M).round_().clamp_(self.lowest_M, self.highest_M).mul_(self.scale_M)


def _positive(scale_M: Tensor) -> Tensor:
    return torch.where(scale_M > 0, scale_M, 1.0)
