"""CSR: compressed rows, with 16-bit column indices where they fit. Shapes: M rows, K columns, E kept entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

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
)
from gossamer.formats.format import Format


@dataclass(frozen=True, eq=False, repr=False)
class CSR(Format):
    """Row pointers, column indices and values of the kept entries.

    Bytes: 4 (M + 1) + E (i + b), for b bytes a value and i = 2 bytes an index up to 65 536 columns, else 4.

    Example:
        >>> CSR.from_dense(torch.eye(3)).indices.tolist()
        [0, 1, 2]
    """

    name: ClassVar[str] = "csr"
    PARTS: ClassVar[tuple[str, ...]] = ("indptr", "indices", "values")

    rows: int
    cols: int
    indptr: Tensor
    indices: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None) -> Self:
        """Store the kept entries of any matrix.

        Raises:
            FormatError: the weight is not a 2-D float matrix, is on `meta`, or keeps 2^31 entries or more.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        rows, cols = w_MK.shape
        flat_E = mask_MK.reshape(-1).nonzero().squeeze(1)
        indices = (flat_E % max(cols, 1)).to(index_dtype(cols))
        return cls(rows, cols, pointer(mask_MK.sum(1)), indices, w_MK.reshape(-1)[flat_E])

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols = whole(meta, "rows"), whole(meta, "cols")
        indptr, indices, values = exactly(parts, cls.PARTS)
        pointer_part(indptr, rows, indices.numel())
        column_part(indices, indptr, cols)
        return cls(rows, cols, indptr, indices, floats(values, [indices.numel()]))

    @property
    def nnz(self) -> int:
        """Kept entries, explicit zeros included."""
        return self.values.numel()

    def slots(self) -> Tensor:
        return owners(self.indptr, self.indices.numel()) * self.cols + self.indices.long()
