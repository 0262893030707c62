"""Bitmask: one bit per entry and the kept values back to back.

Shapes: M rows, K columns, E kept entries, B mask bytes a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.formats.checks import exactly, floats, kept, nonzero_bits, pointer, pointer_part, sized, whole
from gossamer.formats.format import Format

# Kernels load 16 values at a time from any offset, so 16 readable zeros follow the last value.
READ_AHEAD = 16


def row_bytes(cols: int) -> int:
    """Mask bytes of a row: whole 16-bit words."""
    return 2 * -(-cols // 16)


@dataclass(frozen=True, eq=False, repr=False)
class Bitmask(Format):
    """A bit per entry (bit j of a row, little bit order, is column j), row offsets, and the kept values.

    Bytes: 2 M ceil(K / 16) + 4 (M + 1) + (E + 16) b. Smaller than CSR from density 1/16 up, and read
    front to back, which is what one-token decode wants.

    Example:
        >>> Bitmask.from_dense(torch.tensor([[0.0, 2.0, 0.0, 4.0]])).bits.tolist()
        [[10, 0]]
    """

    name: ClassVar[str] = "bitmask"
    PARTS: ClassVar[tuple[str, ...]] = ("bits", "offsets", "values")

    rows: int
    cols: int
    bits: Tensor
    offsets: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None) -> Self:
        """Store the kept entries of any matrix.

        Raises:
            FormatError: the weight is not a 2-D float matrix, is on `meta`, or keeps 2^31 entries or more.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        values = pad(w_MK[mask_MK], (0, READ_AHEAD))
        return cls(*w_MK.shape, bits=pack_bits(mask_MK), offsets=pointer(mask_MK.sum(1)), values=values)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols = whole(meta, "rows"), whole(meta, "cols")
        bits, offsets, values = exactly(parts, cls.PARTS)
        sized(bits, "bits", torch.uint8, [rows, row_bytes(cols)])
        kept_entries = values.numel() - READ_AHEAD
        pointer_part(offsets, rows, kept_entries, "offsets")
        stored = cls(rows, cols, bits, offsets, floats(values, [values.numel()]))
        stored._check_bits()
        return stored

    def _check_bits(self) -> None:
        counts_M = popcounts(self.bits).sum(1, dtype=torch.int32)
        if not torch.equal(counts_M, self.offsets.diff()):
            raise FormatError("a row's set bits disagree with its offsets; these parts are damaged or mixed up")
        if bool(unpack_bits(self.bits)[:, self.cols :].any()):
            raise FormatError(f"mask bits beyond column {self.cols} must be zero; these parts are damaged")
        if bool(nonzero_bits(self.values[-READ_AHEAD:]).any()):
            raise FormatError(f"the last {READ_AHEAD} values are read-ahead and must be zero; these parts are damaged")

    @property
    def nnz(self) -> int:
        """Kept entries, explicit zeros included."""
        return self.values.numel() - READ_AHEAD

    def mask(self) -> Tensor:
        """The support as bool [M, K]."""
        return unpack_bits(self.bits)[:, : self.cols].contiguous()

    def entries(self) -> Tensor:
        return self.values[: self.nnz]

    def slots(self) -> Tensor:
        return self.mask().view(-1).nonzero().squeeze(1)

    def to_dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).masked_scatter_(self.mask(), self.values)

    def gather(self, dense_MK: Tensor) -> Tensor:
        return pad(dense_MK[self.mask()], (0, READ_AHEAD))


def pack_bits(mask_MK: Tensor) -> Tensor:
    """Bool [M, K] to bytes [M, B], first column in the lowest bit."""
    rows, cols = mask_MK.shape
    bytes_a_row = row_bytes(cols)
    octets = pad(mask_MK, (0, 8 * bytes_a_row - cols)).view(rows, bytes_a_row, 8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask_MK.device)
    return (octets * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(bits_MB: Tensor) -> Tensor:
    """Bytes [M, B] to bool [M, 8 B]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits_MB.device)
    octets = (bits_MB.unsqueeze(-1) >> shifts) & 1
    return octets.view(bits_MB.shape[0], 8 * bits_MB.shape[1]).bool()


@cache
def _popcount_table() -> Tensor:
    return torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


def popcounts(bits: Tensor) -> Tensor:
    """Set bits of every byte, uint8."""
    return _popcount_table().to(bits.device)[bits.int()]
