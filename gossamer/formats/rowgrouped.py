"""Row-grouped: g neighbouring rows share their kept columns.

Shapes: M rows, K columns, G = ceil(M / g) groups, E kept columns summed over the groups.
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

LARGEST_GROUP = 1024


@dataclass(frozen=True, eq=False, repr=False)
class RowGrouped(Format):
    """One list of kept columns per g rows; each entry holds g values, one per row.

    Bytes: 4 (G + 1) + E (i + g b). A kernel loads each activation once for g rows, so this pattern,
    `(o {g}) [i]`, runs near dense speed per kept weight. A matrix without the pattern is stored by the union
    of its rows' columns, zeros included. The last group may be ragged; its missing rows hold zeros.

    Example:
        >>> RowGrouped.from_dense(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), g=2).values.tolist()
        [[1.0, 2.0]]
    """

    name: ClassVar[str] = "rowgrouped"
    PARTS: ClassVar[tuple[str, ...]] = ("indptr", "indices", "values")
    OPTIONS: ClassVar[tuple[str, ...]] = ("rows", "cols", "g")

    rows: int
    cols: int
    g: int
    indptr: Tensor
    indices: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None, *, g: int = 4) -> Self:
        """Store a matrix by groups of g rows.

        Args:
            g: rows per group, 1 or more; CPU kernels serve 1, 2, 4 and 8.

        Raises:
            FormatError: g is out of range, or the weight is not a 2-D float matrix or is on `meta`.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        if not 1 <= g <= LARGEST_GROUP:
            raise FormatError(f"a row group holds 1 to {LARGEST_GROUP} rows, got g={g}")
        rows, cols = w_MK.shape
        mask_GK = pad(mask_MK, (0, 0, 0, -rows % g)).view(-(-rows // g), g, cols).any(1)
        columns_E = mask_GK.view(-1).nonzero().squeeze(1) % max(cols, 1)
        indices = columns_E.to(index_dtype(cols))
        support = cls(rows, cols, g, pointer(mask_GK.sum(1)), indices, w_MK.new_zeros(0))
        return replace(support, values=support.gather(w_MK))

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols, g = whole(meta, "rows"), whole(meta, "cols"), whole(meta, "g", 1, LARGEST_GROUP)
        indptr, indices, values = exactly(parts, cls.PARTS)
        pointer_part(indptr, -(-rows // g), indices.numel())
        column_part(indices, indptr, cols)
        stored = cls(rows, cols, g, indptr, indices, floats(values, [indices.numel(), g]))
        zero_padding(stored.slots(), values, stored.grid, stored.shape)
        return stored

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows + -self.rows % self.g, self.cols

    def slots(self) -> Tensor:
        first_E = owners(self.indptr, self.indices.numel()) * (self.g * self.cols) + self.indices.long()
        return first_E.unsqueeze(1) + torch.arange(self.g, device=self.indices.device) * self.cols
