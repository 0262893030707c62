"""Int4Groups: groups of sixteen neighbours kept or dropped whole, the kept ones at four bits.

Shapes: M rows, K columns, g groups of sixteen columns a row, C chunks of eight kept groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.budget import Density
from gossamer.core.errors import FormatError
from gossamer.core.pattern import Pattern
from gossamer.core.select import select
from gossamer.formats.checks import exactly, kept, matrix, owners, pointer, pointer_part, sized, whole
from gossamer.formats.format import Format
from gossamer.formats.shared_grid import quantise

GROUP, CHUNK = 16, 8
MOST_COLUMNS = GROUP * 16383


@dataclass(frozen=True, eq=False, repr=False)
class Int4Groups(Format):
    """Sixteen neighbours of a row share a fate; eight kept groups of a row share a scale and a lowest value.

    w = low + scale q with q in 0..15, low and scale in bfloat16, and dropped groups are zero. Every kept entry comes
    back within scale / 2 (and what float32 rounds): `scale` is (highest - lowest) / 15 rounded up, `low` the lowest
    rounded down, so the range always covers the values. Weights
    that lie on such a grid and use both its ends, as `gqsa` leaves them, come back to the bit.
    A row's kept groups are padded to whole chunks by groups at `dropped`, one place beyond the last column.
    Bytes: 84 C + 4 (M + 1): 5.25 bits per kept weight, 2.6 per weight with half of the groups dropped.

    Example:
        >>> stored = Int4Groups.from_dense(torch.randn(8, 64), density=0.5)
        >>> stored.density, stored.nbytes
        (0.5, 708)

    Reference: Zeng et al. 2025, "GQSA: Group Quantization and Sparsity for Accelerating LLM Inference",
    arXiv:2412.17560.
    Departs from: eight kept groups share a scale, so that it costs a quarter of a bit; `gossamer.recipes.gqsa` trains.
    """

    name: ClassVar[str] = "int4groups"
    PARTS: ClassVar[tuple[str, ...]] = ("indptr", "indices", "values", "codes")

    rows: int
    cols: int
    indptr: Tensor
    indices: Tensor
    values: Tensor
    codes: Tensor

    @classmethod
    def from_dense(
        cls,
        w_MK: Tensor,
        support_mask: Tensor | None = None,
        *,
        density: float | None = None,
        saliency: Tensor | None = None,
    ) -> Self:
        """Quantise a matrix, keeping its best groups.

        Args:
            w_MK: the weight; K a multiple of 16.
            support_mask: bool [M, K]; a group is kept where any entry is. Default: where any weight is not zero.
            density: fraction of each row's groups to keep, by summed saliency; None keeps all that the mask keeps.
            saliency: worth of each entry [M, K], such as |w| · ‖x‖; |w| by default.

        Raises:
            FormatError: K is not a multiple of 16 or beyond 262 128; a weight is not finite; a scale overflows.
        """
        # Four bits cannot hold -0.0, which masks leave behind, so it does not keep a group either.
        w_MK, mask_MK = kept(matrix(w_MK), w_MK != 0 if support_mask is None else support_mask)
        if w_MK.shape[1] % GROUP or w_MK.shape[1] > MOST_COLUMNS:
            raise FormatError(
                f"int4groups stores columns in groups of {GROUP}, at most {MOST_COLUMNS}; got {w_MK.shape[1]}: pad them"
            )
        if density is not None:
            worth_MK = w_MK.abs() if saliency is None else saliency
            chosen = select(worth_MK.float(), Pattern(f"o ([g] {{{GROUP}}})"), Density(density))
            mask_MK = mask_MK & chosen.kept
        rows, cols = w_MK.shape
        return cls._quantised(w_MK.float(), mask_MK.view(rows, cols // GROUP, GROUP).any(-1))

    @classmethod
    def _quantised(cls, w_MK: Tensor, keep_Mg: Tensor) -> Self:
        rows, cols = w_MK.shape
        counts_M = keep_Mg.sum(1)
        chunks_M = (counts_M + CHUNK - 1) // CHUNK
        indptr = pointer(chunks_M)
        row_E, group_E = keep_Mg.nonzero(as_tuple=True)
        first_M = pad(counts_M.cumsum(0), (1, 0))[:-1]
        place_E = CHUNK * indptr[:-1].long()[row_E] + torch.arange(row_E.numel()) - first_M[row_E]
        slots = CHUNK * int(indptr[-1])
        groups_Et = w_MK.view(rows, cols // GROUP, GROUP)[row_E, group_E]
        indices = torch.full((slots,), cols // GROUP, dtype=torch.int32).index_copy_(0, place_E, group_E.int())
        # Padding repeats a chunk's own first group, so that it does not widen the range.
        starts = torch.arange(slots) // CHUNK * CHUNK
        filled = w_MK.new_zeros(slots, GROUP).index_copy_(0, place_E, groups_Et)
        real = (indices < cols // GROUP).view(-1, 1)
        chunks_Cw = torch.where(real, filled, filled[starts]).view(-1, CHUNK * GROUP)
        values, codes = quantise(chunks_Cw)
        codes = codes.view(-1, GROUP).mul_(real).view(-1, CHUNK * GROUP)
        # Four times the group: what the kernel adds to an address with its largest factor, 8.
        return cls(rows, cols, indptr, (4 * indices).to(torch.uint16).view(-1, CHUNK), values, _nibbles(codes))

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols = whole(meta, "rows"), whole(meta, "cols", 0, MOST_COLUMNS)
        indptr, indices, values, codes = exactly(parts, cls.PARTS)
        chunks = values.shape[0] if values.dim() == 2 else -1
        pointer_part(indptr, rows, chunks)
        sized(indices, "indices", torch.uint16, [chunks, CHUNK])
        sized(codes, "codes", torch.uint8, [chunks, CHUNK * GROUP // 2])
        sized(values, "values", torch.bfloat16, [chunks, 2])
        stored = cls(rows, cols, indptr, indices, values, codes)
        stored._check()
        return stored

    def _check(self) -> None:
        if self.cols % GROUP:
            raise FormatError(f"int4groups stores columns in groups of {GROUP}, got {self.cols}")
        wide_C8 = self.indices.int()
        if bool((wide_C8 % 4 != 0).any()) or bool((wide_C8 > self.cols // 4).any()):
            raise FormatError(f"indices must be four times a group up to {self.cols // GROUP}; these parts are damaged")
        if not bool(self.values.isfinite().all()) or bool((self.values[:, 1] < 0).any()):
            raise FormatError("scales and lowest values must be finite, scales not negative; these parts are damaged")

    @property
    def nnz(self) -> int:
        """Kept entries: sixteen for every kept group, zeros among them too."""
        return GROUP * int((self.indices.int() < self.cols // 4).sum())

    @property
    def stored(self) -> int:
        return self.indices.numel() * GROUP

    def entries(self) -> Tensor:
        """The dequantised entries of every slot, float32 [C, 8, 16]; zero in padding."""
        codes_Cw = _codes(self.codes).view(-1, CHUNK, GROUP).float()
        low, scale = self.values.float()[:, :, None, None].unbind(1)
        return (low + scale * codes_Cw) * (self.indices.int() < self.cols // 4)[..., None]

    def slots(self) -> Tensor:
        """Flat position of every stored entry, int64 [C, 8, 16]; padding lies in a group beyond the last column."""
        row_C = owners(self.indptr, self.indices.shape[0])
        first_C8 = row_C[:, None] * self.grid[1] + GROUP * (self.indices.long() // 4)
        return first_C8[..., None] + torch.arange(GROUP, device=first_C8.device)

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, self.cols + GROUP

    def to_dense(self) -> Tensor:
        """The dequantised matrix [M, K], float32."""
        out = torch.zeros(self.rows * self.grid[1], dtype=torch.float32, device=self.device)
        out.scatter_(0, self.slots().reshape(-1), self.entries().reshape(-1))
        return out.view(self.grid)[:, : self.cols].contiguous()

    def gather(self, dense_MK: Tensor) -> Tensor:
        raise FormatError("int4groups stores codes, which have no gradient; train the dense weight and store it again")


def _nibbles(codes_Cw: Tensor) -> Tensor:
    """Codes of a chunk to bytes, sixteen of a group to eight: code 4 s + j is nibble s of 16-bit word j."""
    quads = codes_Cw.view(-1, 4, 4).int()
    words = quads[:, 0] | quads[:, 1] << 4 | quads[:, 2] << 8 | quads[:, 3] << 12
    octets = torch.stack([words & 255, words >> 8], -1).to(torch.uint8)
    return octets.view(-1, CHUNK * GROUP // 2)


def _codes(bytes_Ch: Tensor) -> Tensor:
    """The inverse of `_nibbles`."""
    octets = bytes_Ch.view(-1, 4, 2).int()
    words = octets[..., 0] | octets[..., 1] << 8
    return torch.stack([words >> 4 * s & 15 for s in range(4)], 1).view(-1, CHUNK * GROUP)
