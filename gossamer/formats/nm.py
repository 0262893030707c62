"""N:M: exactly n kept slots in every m neighbours of a row.

Shapes: M rows, K columns, S slots a row, G groups a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.formats.checks import exactly, floats, kept, sized, whole
from gossamer.formats.format import Format


def position_bits(m: int) -> int:
    """Bits that hold a position in a group of m: 1, 2, 4 or 8, so that no position straddles two bytes."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


@dataclass(frozen=True, eq=False, repr=False)
class NM(Format):
    """n value slots for every m neighbours along a row, each with its position in the group.

    Bytes: S M b + M ceil(S p / 8), for S = K n / m slots a row and p = 1, 2, 4 or 8 bits a position.
    A group that keeps fewer than n entries is filled up with zeros at its lowest free positions.

    Example:
        >>> NM.from_dense(torch.tensor([[0.0, 2.0, 3.0, 0.0]]), n=2, m=4).values.tolist()
        [[2.0, 3.0]]

    Reference: Mishra et al. 2021, "Accelerating sparse deep neural networks", arXiv:2104.08378.
    Departs from: any n <= m <= 256, not just 2:4; row-major positions, not the hardware's interleaved metadata.
    """

    name: ClassVar[str] = "nm"
    PARTS: ClassVar[tuple[str, ...]] = ("values", "positions")
    OPTIONS: ClassVar[tuple[str, ...]] = ("rows", "cols", "n", "m")

    rows: int
    cols: int
    n: int
    m: int
    values: Tensor
    positions: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None, *, n: int = 2, m: int = 4) -> Self:
        """Store a matrix that keeps at most n of every m neighbours in a row.

        Args:
            n: entries kept per group, 1 to m.
            m: neighbours per group, up to 256; must divide K.

        Raises:
            FormatError: K is not a multiple of m, or a group keeps more than n; prune with the pattern "n:m" first.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        rows, cols = w_MK.shape
        _check_groups(cols, n, m)
        chosen = fill_groups(mask_MK.view(rows, cols // m, m), n)
        slots = cols // m * n
        flat_MS = chosen.view(-1).nonzero().view(rows, slots)
        positions = pack_positions((flat_MS % m).to(torch.uint8), position_bits(m))
        return cls(rows, cols, n, m, w_MK.reshape(-1)[flat_MS], positions)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols = whole(meta, "rows"), whole(meta, "cols")
        n, m = whole(meta, "n", 1, 256), whole(meta, "m", 1, 256)
        _check_groups(cols, n, m)
        values, positions = exactly(parts, cls.PARTS)
        slots = cols // m * n
        sized(positions, "positions", torch.uint8, [rows, -(-slots * position_bits(m) // 8)])
        stored = cls(rows, cols, n, m, floats(values, [rows, slots]), positions)
        stored._check_positions()
        return stored

    def _check_positions(self) -> None:
        at_MS = unpack_positions(self.positions, position_bits(self.m))
        at_MGn = at_MS[:, : self.values.shape[1]].reshape(self.rows, self.cols // self.m, self.n).short()
        if bool((at_MGn >= self.m).any()) or bool((at_MGn.diff(dim=-1) <= 0).any()):
            raise FormatError(f"positions must ascend below {self.m} within each group; these parts are damaged")
        if bool(at_MS[:, self.values.shape[1] :].any()):
            raise FormatError("spare position bits at the end of a row must be zero; these parts are damaged")

    def columns(self) -> Tensor:
        """The column of every slot: int64 [M, S], ascending along each row."""
        slots = self.values.shape[1]
        at_MS = unpack_positions(self.positions, position_bits(self.m))[:, :slots].long()
        return at_MS + torch.arange(slots, device=self.device) // self.n * self.m

    def slots(self) -> Tensor:
        return self.columns() + torch.arange(self.rows, device=self.device).unsqueeze(1) * self.cols


def _check_groups(cols: int, n: int, m: int) -> None:
    if not 1 <= n <= m <= 256:
        raise FormatError(f"N:M needs 1 <= n <= m <= 256, got n={n}, m={m}")
    if cols % m:
        raise FormatError(
            f"N:M needs columns in whole groups of m={m}, got K={cols}; "
            f"pad the weight and its input to {cols + -cols % m} columns, or store it as csr or bitmask"
        )


def fill_groups(mask_MGm: Tensor, n: int) -> Tensor:
    """Exactly n slots per group: the kept ones, then the lowest free positions.

    Raises:
        FormatError: a group keeps more than n; prune with that pattern first, or choose another format.
    """
    spare = n - mask_MGm.sum(-1, dtype=torch.int16)
    if bool((spare < 0).any()):
        raise FormatError(
            f"{int((spare < 0).sum())} of {spare.numel()} groups keep more than n={n} of m={mask_MGm.shape[-1]}; "
            f'prune with the pattern "{n}:{mask_MGm.shape[-1]}" first, or choose another format'
        )
    free_rank = torch.cumsum(~mask_MGm, -1, dtype=torch.int16)
    return mask_MGm | (free_rank <= spare.unsqueeze(-1))


def pack_positions(at_MS: Tensor, bits: int) -> Tensor:
    """Positions [M, S] of `bits` bits each to bytes [M, ceil(S bits / 8)], first slot in the lowest bits."""
    per_byte = 8 // bits
    rows, slots = at_MS.shape
    bytes_a_row = -(-slots // per_byte)
    fields = pad(at_MS, (0, bytes_a_row * per_byte - slots)).view(rows, bytes_a_row, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=at_MS.device)
    return (fields << shifts).sum(-1, dtype=torch.uint8)


def unpack_positions(packed: Tensor, bits: int) -> Tensor:
    """Bytes to positions, uint8 [M, S rounded up to a whole byte]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.view(packed.shape[0], packed.shape[1] * shifts.numel())
