"""Runs of a row's kept weights that share a lowest value and a step: what 4-bit groups store and training rounds to.

Shape suffixes: M rows, K columns, C runs, w weights of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gossamer.core.errors import FormatError

LEVELS = 15


@dataclass(frozen=True, eq=False)
class SharedGrid:
    """w = low + scale·q, q in 0 … 2^bits − 1, with low and scale in bfloat16, shared by `width` kept weights of a row.

    The last run of a row may be shorter. With 4 bits, width 128 and a support of whole groups of sixteen, this is the
    grid of `Int4Groups`, bit for bit.

    Args:
        index_Cw: places of each run's weights in the flattened matrix; where a run is short, its first once more.
        real_Cw: False there.
        shape: (M, K).
        levels: 2^bits − 1.
    """

    index_Cw: Tensor
    real_Cw: Tensor
    shape: tuple[int, int]
    levels: int

    @classmethod
    def of(cls, kept_MK: Tensor, *, bits: int = 4, width: int = 128) -> Self:
        """The runs of a support.

        Raises:
            FormatError: bits are not from 1 to 8, or width is below 1.
        """
        if not 1 <= bits <= 8 or width < 1:
            raise FormatError(f"a grid has 1 to 8 bits and runs of at least 1 weight, got {bits} and {width}")
        row_E, column_E = kept_MK.nonzero(as_tuple=True)
        counts_M = kept_MK.sum(1)
        runs_M = (counts_M + width - 1) // width
        first_M, start_M = counts_M.cumsum(0) - counts_M, runs_M.cumsum(0) - runs_M
        place_E = width * start_M[row_E] + torch.arange(len(row_E), device=row_E.device) - first_M[row_E]
        index = place_E.new_zeros(width * int(runs_M.sum())).index_copy_(
            0, place_E, row_E * kept_MK.shape[1] + column_E
        )
        real = torch.zeros_like(index, dtype=torch.bool).index_fill_(0, place_E, True)
        index_Cw, real_Cw = index.view(-1, width), real.view(-1, width)
        index_Cw = torch.where(real_Cw, index_Cw, index_Cw[:, :1])
        return cls(index_Cw, real_Cw, (kept_MK.shape[0], kept_MK.shape[1]), 2**bits - 1)

    def encode(self, w_MK: Tensor) -> tuple[Tensor, Tensor]:
        """(low, scale) in bfloat16 [C, 2] and codes uint8 [C, w]."""
        return quantise(w_MK.detach().float().reshape(-1)[self.index_Cw], self.levels)

    def decode(self, values_C2: Tensor, codes_Cw: Tensor) -> Tensor:
        """The matrix [M, K] in float32, zero off the support. Gradients flow to the values."""
        low_C1, scale_C1 = values_C2.float()[:, :, None].unbind(1)
        entries_E = (low_C1 + scale_C1 * codes_Cw.float())[self.real_Cw]
        flat = entries_E.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.index_Cw[self.real_Cw],), entries_E).view(self.shape)

    def rounded(self, w_MK: Tensor) -> Tensor:
        """The nearest weights on the grid; weights on it stay, to the bit."""
        return self.decode(*self.encode(w_MK))

    @property
    def count(self) -> int:
        """Kept entries."""
        return int(self.real_Cw.sum())

    @property
    def nbits(self) -> int:
        """Bits of codes, scales and lowest values; where the kept entries lie comes on top."""
        return self.count * self.levels.bit_length() + 32 * len(self.real_Cw)


def quantise(w_Cw: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Rows to (low, scale) in bfloat16 [C, 2] and codes uint8 [C, w]: |low + scale q − w| <= scale / 2.

    low is the lowest rounded down, scale = (highest − low)/levels rounded up, so the range covers the values; but where
    the nearest bfloat16 of both give all of a row's weights exactly, these are taken: what was rounded once stays.

    Raises:
        FormatError: a weight is not finite, or its row's range overflows bfloat16.
    """
    if not bool(w_Cw.isfinite().all()):
        raise FormatError("int4groups stores finite weights only; find where NaN or infinity came from")
    lowest_C, highest_C = w_Cw.amin(1), w_Cw.amax(1)
    low_C = _towards(lowest_C, -torch.inf)
    scale_C = _towards((highest_C - low_C) / levels, torch.inf)
    near_C = ((highest_C - lowest_C) / levels).bfloat16().float()
    codes_Cw, near_Cw = (_codes_on(w_Cw, low_C, s, levels) for s in (scale_C, near_C))
    again_C = (low_C[:, None] + near_C[:, None] * near_Cw == w_Cw).all(1)
    values = torch.stack([low_C, torch.where(again_C, near_C, scale_C)], 1).bfloat16()
    if not bool(values.isfinite().all()):
        raise FormatError("the weights' range overflows the scale; scale them down")
    return values, torch.where(again_C[:, None], near_Cw, codes_Cw).to(torch.uint8)


def _codes_on(w_Cw: Tensor, low_C: Tensor, scale_C: Tensor, levels: int) -> Tensor:
    steps_C1 = torch.where(scale_C > 0, scale_C, 1.0)[:, None]
    return ((w_Cw - low_C[:, None]) / steps_C1).round().clamp(0, levels)


def _towards(x: Tensor, end: float) -> Tensor:
    """The bfloat16 number next to x in the direction of `end`, x itself where it is one; as float32."""
    near = x.bfloat16()
    short = near.float() > x if end < 0 else near.float() < x
    ahead = torch.nextafter(near, torch.full_like(near, end))
    return torch.where(short, ahead, near).float()
