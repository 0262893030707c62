"""Row-grouped: g rows share their kept columns: neighbours, or rows brought together by a stored order.

Shapes: M rows, K columns, G = ceil(M / g) groups, E kept columns summed over the groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
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
    sized,
    whole,
    zero_padding,
)
from gossamer.formats.format import Format

LARGEST_GROUP = 1024
# A kept weight may happen to be zero: neighbours share their columns when the groups carry less than 5 % more slots.
ENOUGH, WORTHWHILE = 1.05, 0.95


@dataclass(frozen=True, eq=False, repr=False)
class RowGrouped(Format):
    """One list of kept columns per g rows; each entry holds g values, one per row.

    Bytes: 4 (G + 1) + E (i + g b), and 4 M more where the rows are stored in an order of their own. A kernel loads each
    activation once for g rows, so this pattern, `(o {g}) [i]`, runs near dense speed per kept weight. A matrix without
    the pattern is stored by the union of its rows' columns, zeros included. The last group may be ragged; its missing
    rows hold zeros.

    `order` is int32 [M]: stored row r is row order[r] of the matrix; empty where the rows stand in their own order.

    Example:
        >>> RowGrouped.from_dense(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), g=2).values.tolist()
        [[1.0, 2.0]]
    """

    name: ClassVar[str] = "rowgrouped"
    PARTS: ClassVar[tuple[str, ...]] = ("indptr", "indices", "values", "order")
    OPTIONS: ClassVar[tuple[str, ...]] = ("rows", "cols", "g")

    rows: int
    cols: int
    g: int
    indptr: Tensor
    indices: Tensor
    values: Tensor
    order: Tensor

    @classmethod
    def from_dense(
        cls, w_MK: Tensor, support_mask: Tensor | None = None, *, g: int = 4, order: Tensor | None = None
    ) -> Self:
        """Store a matrix by groups of g rows.

        Args:
            g: rows per group, 1 or more; CPU kernels serve 1, 2, 4 and 8.
            order: a permutation of the rows, [M]: which rows are stored side by side. None: their own order, or,
                where neighbours do not share their columns and other rows do, the order that brings those together.

        Raises:
            FormatError: g is out of range, `order` is no permutation, or the weight is not a 2-D float matrix or is
                on `meta`.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        if not 1 <= g <= LARGEST_GROUP:
            raise FormatError(f"a row group holds 1 to {LARGEST_GROUP} rows, got g={g}")
        rows, cols = w_MK.shape
        order = alike_first(mask_MK, g) if order is None else order.to(w_MK.device, torch.int32)
        _permutation(order, rows)
        mask_MK = mask_MK[order.long()] if order.numel() else mask_MK
        mask_GK = groups_of(mask_MK, g)
        columns_E = mask_GK.view(-1).nonzero().squeeze(1) % max(cols, 1)
        indices = columns_E.to(index_dtype(cols))
        support = cls(rows, cols, g, pointer(mask_GK.sum(1)), indices, w_MK.new_zeros(0), order)
        return replace(support, values=support.gather(w_MK))

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols, g = whole(meta, "rows"), whole(meta, "cols"), whole(meta, "g", 1, LARGEST_GROUP)
        # Files written before rows could be re-ordered have no such part.
        parts = {"order": _own_order(parts["indptr"].device), **parts} if "indptr" in parts else parts
        indptr, indices, values, order = exactly(parts, cls.PARTS)
        _permutation(order, rows)
        pointer_part(indptr, -(-rows // g), indices.numel())
        column_part(indices, indptr, cols)
        stored = cls(rows, cols, g, indptr, indices, floats(values, [indices.numel(), g]), order)
        zero_padding(stored.slots(), values, stored.grid, stored.shape)
        return stored

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows + -self.rows % self.g, self.cols

    def slots(self) -> Tensor:
        rows_Gg = torch.arange(self.grid[0], device=self.indices.device)
        if self.order.numel():
            rows_Gg[: self.rows] = self.order.long()
        first_Eg = rows_Gg.view(-1, self.g)[owners(self.indptr, self.indices.numel())] * self.cols
        return first_Eg + self.indices.long().unsqueeze(1)


def groups_of(mask_MK: Tensor, g: int) -> Tensor:
    """Where any of g neighbouring rows is kept: bool [ceil(M / g), K]."""
    rows, cols = mask_MK.shape
    return pad(mask_MK, (0, 0, 0, -rows % g)).view(-(-rows // g), g, cols).any(1)


def alike_first(mask_MK: Tensor, g: int) -> Tensor:
    """The order that makes groups of g rows out of rows with the same support, int32 [M].

    Empty (their own order) where neighbours share their supports as it is, or where the other order would not need
    5 % fewer slots. Rows are taken as they come; those left over go last, the like beside the like.

    Example:
        >>> alike_first(torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]]).bool(), 2).tolist()
        [0, 2, 1, 3]
    """
    own = _own_order(mask_MK.device)
    rows, kept_entries = len(mask_MK), int(mask_MK.sum())
    slots = int(groups_of(mask_MK, g).sum()) * g
    if g == 1 or rows <= g or slots <= ENOUGH * kept_entries:
        return own
    bits = np.packbits(mask_MK.cpu().numpy(), axis=1)
    _, first, kind_M = np.unique(bits.view(f"V{bits.shape[1]}").ravel(), return_index=True, return_inverse=True)
    by_kind = np.argsort(first[kind_M], kind="stable")  # kinds in the order of their first rows
    kind = first[kind_M][by_kind]
    run = np.arange(rows) - np.searchsorted(kind, kind)  # place within a kind
    size = np.searchsorted(kind, kind, side="right") - np.searchsorted(kind, kind)
    whole_groups = run < size // g * g
    order = np.concatenate([by_kind[whole_groups], by_kind[~whole_groups]])
    found = torch.from_numpy(order.astype(np.int32)).to(mask_MK.device)
    better = int(groups_of(mask_MK[found.long()], g).sum()) * g < WORTHWHILE * slots
    return found if better else own


def _own_order(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=device)


def _permutation(order: Tensor, rows: int) -> None:
    """Refuse an order that is neither empty nor a permutation of the rows."""
    if order.dtype == torch.int32 and order.dim() == 1 and order.numel() == 0:
        return
    sized(order, "order", torch.int32, [rows])
    if not torch.equal(order.long().sort().values, torch.arange(rows, device=order.device)):
        raise FormatError(f"order must hold each of the {rows} rows once; it does not, so rows would be lost")
