"""What every storage format answers: its parts, its bytes, its dense twin.

Shapes: M output rows, K input columns, E stored entries. A format's value slots live on a grid of at least M x K
(padded up to whole groups or blocks); `slots()` says where on that grid each stored value belongs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.formats.checks import nonzero_bits


class Format(ABC):
    """A 2-D weight [M, K], stored. Subclasses are frozen dataclasses of tensors (`PARTS`) and integers (`OPTIONS`).

    A kept entry is one whose bits are not all zero, so -0.0 and NaN survive the round trip; under an explicit
    support mask the mask decides, and kept zeros stay as entries.
    """

    name: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[str, ...]] = ("rows", "cols")

    rows: int
    cols: int
    values: Tensor

    @classmethod
    @abstractmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None) -> Self:
        """Store a dense matrix. Raises FormatError when it does not fit the format."""

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Rebuild from `parts()` and `meta()`, checking everything. Raises FormatError on any disagreement."""

    @abstractmethod
    def slots(self) -> Tensor:
        """Flat grid position (int64) of every stored value, in the shape of the values."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that make up the format, by name, without copying."""
        return {name: getattr(self, name) for name in self.PARTS}

    def meta(self) -> dict[str, Any]:
        """What the parts do not say: the format's name, its shape and options. JSON-able."""
        return {"format": self.name} | {name: getattr(self, name) for name in self.OPTIONS}

    def with_parts(self, parts: Mapping[str, Tensor]) -> Self:
        """The same structure over other tensors (moved or cast ones), unchecked."""
        return replace(self, **parts)

    def to_dense(self) -> Tensor:
        """The dense matrix [M, K], bit for bit."""
        rows, cols = self.grid
        out = self.values.new_zeros(rows * cols).scatter_(0, self.slots().reshape(-1), self.entries().reshape(-1))
        return out.view(rows, cols)[: self.rows, : self.cols].contiguous()

    def gather(self, dense_MK: Tensor) -> Tensor:
        """Read a dense matrix at the stored positions: the adjoint of `to_dense`, in the shape of `values`.

        With `to_dense` as a linear map D of the values, `gather` is its transpose: <D(v), A> = <v, gather(A)>.
        """
        rows, cols = self.grid
        grid = pad(dense_MK, (0, cols - self.cols, 0, rows - self.rows)) if self.grid != self.shape else dense_MK
        return grid.reshape(-1)[self.slots()]

    def entries(self) -> Tensor:
        """The stored values without read-ahead padding, matching `slots()` in shape."""
        return self.values

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns after padding to whole groups and blocks."""
        return self.shape

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts: what a file holds, to the byte, before its header."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @cached_property
    def nnz(self) -> int:
        """Kept entries. Padding and the zeros that a group or block carries along do not count."""
        return int(nonzero_bits(self.entries()).sum())

    @property
    def stored(self) -> int:
        """Value slots: the multiplications a kernel spends per token. Never below `nnz`."""
        return self.entries().numel()

    @property
    def density(self) -> float:
        """Fraction of the M x K entries that is kept (0 for an empty matrix)."""
        return self.nnz / (self.rows * self.cols) if self.rows * self.cols else 0.0

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)}" for name in self.OPTIONS if name not in ("rows", "cols"))
        what = f"{self.name}({options})" if options else self.name
        return f"<{what} {self.rows}x{self.cols} {str(self.dtype).removeprefix('torch.')}, {self.nbytes} bytes>"
