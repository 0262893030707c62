"""Dense: every entry, in order. What runs where sparsity does not pay. Shapes: M rows, K columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gossamer.formats.checks import exactly, floats, kept, matrix, whole
from gossamer.formats.format import Format


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Format):
    """All M x K values, row-major.

    Bytes: M K b, for b bytes a value.

    Example:
        >>> Dense.from_dense(torch.eye(3)).nbytes
        36
    """

    name: ClassVar[str] = "dense"
    PARTS: ClassVar[tuple[str, ...]] = ("values",)

    rows: int
    cols: int
    values: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None) -> Self:
        """Store every entry; a support mask zeroes what lies outside it.

        Raises:
            FormatError: the weight is not a 2-D float matrix; flatten or cast it.
        """
        w_MK = matrix(w_MK) if support_mask is None else kept(w_MK, support_mask)[0]
        return cls(*w_MK.shape, values=w_MK.clone(memory_format=torch.contiguous_format))

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols = whole(meta, "rows"), whole(meta, "cols")
        (values,) = exactly(parts, cls.PARTS)
        return cls(rows, cols, floats(values, [rows, cols]))

    def slots(self) -> Tensor:
        return torch.arange(self.rows * self.cols, device=self.device).view(self.rows, self.cols)

    def to_dense(self) -> Tensor:
        return self.values.clone()

    def gather(self, dense_MK: Tensor) -> Tensor:
        return dense_MK
