"""Block: whole a x b tiles are kept or dropped.

Shapes: M rows, K columns, a rows by b columns a block, R = ceil(M / a) block rows, P kept blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.formats.checks import (
    column_part,
    exactly,
    floats,
    index_dtype,
    kept,
    owners,
    pointer,
    pointer_part,
    whole,
    zero_padding,
)
from gossamer.formats.format import Format

LARGEST_SIDE = 1024


@dataclass(frozen=True, eq=False, repr=False)
class Block(Format):
    """The kept a x b blocks, each column-major, so that it reads as b kept columns of a group of a rows.

    Bytes: 4 (R + 1) + P (i + a b bytes-a-value). Ragged edges hold zeros.

    Example:
        >>> Block.from_dense(torch.ones(2, 4), a=2, b=2).indices.tolist()
        [0, 1]
    """

    name: ClassVar[str] = "block"
    PARTS: ClassVar[tuple[str, ...]] = ("indptr", "indices", "values")
    OPTIONS: ClassVar[tuple[str, ...]] = ("rows", "cols", "a", "b")

    rows: int
    cols: int
    a: int
    b: int
    indptr: Tensor
    indices: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None, *, a: int = 4, b: int = 8) -> Self:
        """Store every block that keeps at least one entry.

        Args:
            a: rows per block; CPU kernels serve 1, 2, 4 and 8.
            b: columns per block.

        Raises:
            FormatError: a or b is out of range, or the weight is not a 2-D float matrix or is on `meta`.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        if not (1 <= a <= LARGEST_SIDE and 1 <= b <= LARGEST_SIDE):
            raise FormatError(f"a block's sides lie in 1 to {LARGEST_SIDE}, got a={a}, b={b}")
        rows, cols = w_MK.shape
        tall, wide = -(-rows // a), -(-cols // b)
        mask_RC = pad(mask_MK, (0, -cols % b, 0, -rows % a)).view(tall, a, wide, b).any(3).any(1)
        indices = (mask_RC.view(-1).nonzero().squeeze(1) % max(wide, 1)).to(index_dtype(wide))
        support = cls(rows, cols, a, b, pointer(mask_RC.sum(1)), indices, w_MK.new_zeros(0))
        return replace(support, values=support.gather(w_MK))

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols = whole(meta, "rows"), whole(meta, "cols")
        a, b = whole(meta, "a", 1, LARGEST_SIDE), whole(meta, "b", 1, LARGEST_SIDE)
        indptr, indices, values = exactly(parts, cls.PARTS)
        pointer_part(indptr, -(-rows // a), indices.numel())
        column_part(indices, indptr, -(-cols // b))
        stored = cls(rows, cols, a, b, indptr, indices, floats(values, [indices.numel(), b, a]))
        zero_padding(stored.slots(), values, stored.grid, stored.shape)
        return stored

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows + -self.rows % self.a, self.cols + -self.cols % self.b

    def columns(self) -> Tensor:
        """The grid column of every column of every block: int64 [P, b]; at a ragged edge some reach past K."""
        return self.indices.long().unsqueeze(1) * self.b + torch.arange(self.b, device=self.indices.device)

    def slots(self) -> Tensor:
        width = self.grid[1]
        top_P = owners(self.indptr, self.indices.numel()) * (self.a * width)
        first_Pb = top_P.unsqueeze(1) + self.columns()
        return first_Pb.unsqueeze(2) + torch.arange(self.a, device=self.indices.device) * width
