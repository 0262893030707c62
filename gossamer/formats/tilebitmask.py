"""TileBitmask: a bit per entry, in the order in which one-token decode multiplies.

Shapes: M rows, K columns, G groups of sixteen rows, P pairs of columns, E kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.formats.bitmask import popcounts, unpack_bits
from gossamer.formats.checks import exactly, floats, kept, nonzero_bits, pointer, pointer_part, sized, whole
from gossamer.formats.format import Format

# A tile is sixteen rows by two columns: one 32-bit word of mask, one vector of 16-bit values.
ROWS, COLUMNS = 16, 2
# Kernels load a whole tile of values from any offset, so 32 readable zeros follow the last value.
READ_AHEAD = ROWS * COLUMNS


@dataclass(frozen=True, eq=False, repr=False)
class TileBitmask(Format):
    """A bitmask in tiles of sixteen rows by two columns, and the kept values in tile order.

    Word p of row group g holds columns 2p and 2p + 1 of rows 16g to 16g + 15: bit 2r + c is row r, column c. The
    tiles of a row group follow each other along the columns, so a kernel keeps sixteen outputs in one register,
    multiplies each tile by one broadcast pair of inputs, and never adds across lanes.
    Bytes: 4 ceil(M / 16) ceil(K / 2) + 4 (ceil(M / 16) + 1) + (E + 32) b: a little less than `Bitmask`, which has an
    offset for every row.

    Example:
        >>> TileBitmask.from_dense(torch.tensor([[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]])).bits.tolist()
        [[6, 1]]

    Reference: AbouElhamayed et al. 2025, "SparAMX", arXiv:2502.12444.
    Departs from: one layout for 16- and 32-bit values; offsets only where a row group starts.
    """

    name: ClassVar[str] = "tilebitmask"
    PARTS: ClassVar[tuple[str, ...]] = ("bits", "starts", "values")

    rows: int
    cols: int
    bits: Tensor
    starts: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None) -> Self:
        """Store the kept entries of any matrix.

        Raises:
            FormatError: the weight is not a 2-D float matrix, is on `meta`, or keeps 2^31 entries or more.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        mask_GPt = tiled(mask_MK)
        values = pad(tiled(w_MK)[mask_GPt], (0, READ_AHEAD))
        return cls(*w_MK.shape, bits=_words(mask_GPt), starts=pointer(mask_GPt.sum((1, 2))), values=values)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols = whole(meta, "rows"), whole(meta, "cols")
        bits, starts, values = exactly(parts, cls.PARTS)
        groups, pairs = _tiles(rows, cols)
        sized(bits, "bits", torch.int32, [groups, pairs])
        pointer_part(starts, groups, values.numel() - READ_AHEAD, "starts")
        stored = cls(rows, cols, bits, starts, floats(values, [values.numel()]))
        stored._check_bits()
        return stored

    def _check_bits(self) -> None:
        if not torch.equal(self.counts().sum(1, dtype=torch.int32), self.starts.diff()):
            raise FormatError("a row group's set bits disagree with its start; these parts are damaged or mixed up")
        rows, cols = self.grid
        full_MK = untiled(self._mask(), rows, cols)
        if bool(full_MK[self.rows :].any()) or bool(full_MK[:, self.cols :].any()):
            raise FormatError(f"mask bits outside {self.rows}x{self.cols} must be zero; these parts are damaged")
        if bool(nonzero_bits(self.values[-READ_AHEAD:]).any()):
            raise FormatError(f"the last {READ_AHEAD} values are read-ahead and must be zero; these parts are damaged")

    @property
    def nnz(self) -> int:
        """Kept entries, explicit zeros included."""
        return self.values.numel() - READ_AHEAD

    @property
    def grid(self) -> tuple[int, int]:
        groups, pairs = _tiles(self.rows, self.cols)
        return ROWS * groups, COLUMNS * pairs

    def counts(self) -> Tensor:
        """Kept entries of every tile, int32 [G, P]."""
        bytes_GP4 = popcounts(self.bits.contiguous().view(torch.uint8)).view(*self.bits.shape, 4)
        return bytes_GP4.sum(-1, dtype=torch.int32)

    def mask(self) -> Tensor:
        """The support as bool [M, K]."""
        return untiled(self._mask(), self.rows, self.cols)

    def _mask(self) -> Tensor:
        groups, pairs = self.bits.shape
        return unpack_bits(self.bits.contiguous().view(torch.uint8).view(groups, 4 * pairs)).view(
            groups, pairs, READ_AHEAD
        )

    def entries(self) -> Tensor:
        return self.values[: self.nnz]

    def slots(self) -> Tensor:
        rows, cols = self.grid
        numbers = torch.arange(rows * cols, device=self.device).view(rows, cols)
        return tiled(numbers)[self._mask()]

    def to_dense(self) -> Tensor:
        mask_GPt = self._mask()
        tiles_GPt = self.values.new_zeros(mask_GPt.shape).masked_scatter_(mask_GPt, self.values)
        return untiled(tiles_GPt, self.rows, self.cols)

    def gather(self, dense_MK: Tensor) -> Tensor:
        return pad(tiled(dense_MK)[self._mask()], (0, READ_AHEAD))


def _tiles(rows: int, cols: int) -> tuple[int, int]:
    return -(-rows // ROWS), -(-cols // COLUMNS)


def tiled(x_MK: Tensor) -> Tensor:
    """A matrix as tiles [G, P, 32]: entry 2r + c of tile (g, p) is row 16g + r, column 2p + c; zeros beyond."""
    rows, cols = x_MK.shape
    groups, pairs = _tiles(rows, cols)
    full = pad(x_MK, (0, COLUMNS * pairs - cols, 0, ROWS * groups - rows))
    return full.view(groups, ROWS, pairs, COLUMNS).transpose(1, 2).reshape(groups, pairs, ROWS * COLUMNS)


def untiled(tiles_GPt: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `tiled`, cut to rows x cols."""
    groups, pairs, _ = tiles_GPt.shape
    full = tiles_GPt.view(groups, pairs, ROWS, COLUMNS).transpose(1, 2).reshape(ROWS * groups, COLUMNS * pairs)
    return full[:rows, :cols].contiguous()


def _words(mask_GPt: Tensor) -> Tensor:
    """32 flags per tile to one int32, flag 0 in the lowest bit."""
    groups, pairs, _ = mask_GPt.shape
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask_GPt.device)
    octets = (mask_GPt.view(groups, pairs, 4, 8) * powers).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32).view(groups, pairs)
