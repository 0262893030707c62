"""Layouts: a weight's zeros left out in files of other libraries, as tensors beside each other under the weight's name.

Shapes: M rows (the first axis), K columns (all other axes), E entries that are not zero, B = ceil(K / 8) mask bytes.
Bit j of a row, in little bit order, is column j. Zeros of either sign come back as +0.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import FileDamaged, FormatError
from gossamer.formats.bitmask import pack_bits, popcounts, unpack_bits
from gossamer.formats.checks import BITS_OF

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one weight lies in a file.

    Args:
        name: what other libraries call it.
        names: the names of its tensors, for a weight of a given name; the first holds the values.
        write: a weight to its tensors, in the order of `names`.
        read: the tensors back to the weight; raises FileDamaged where they disagree.
    """

    name: str
    names: Callable[[str], tuple[str, ...]]
    write: Callable[[Tensor], tuple[Tensor, ...]]
    read: Callable[..., Tensor]

    def parts(self, name: str, w: Tensor) -> Parts:
        """The tensors of a weight by their names in the file.

        Raises:
            FormatError: the layout cannot hold this weight; it says why.
        """
        try:
            return dict(zip(self.names(name), self.write(w.detach()), strict=True))
        except FormatError as error:
            raise FormatError(f"{name!r} as {self.name}: {error}") from None

    def holds(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a file's tensors hold a weight of that name in this layout."""
        return all(part in tensors for part in self.names(name))

    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, from a file's tensors.

        Raises:
            FileDamaged: its tensors disagree with each other; the weight is named.
        """
        try:
            return self.read(*(tensors[part] for part in self.names(name)))
        except FileDamaged as error:
            raise FileDamaged(f"{name!r} as {self.name}: {error}") from None


def _rows(w: Tensor) -> Tensor:
    if w.dtype not in BITS_OF or w.dim() < 2 or w.is_meta:
        raise FormatError(
            f"needs real float values and two axes or more, got {w.dtype} {list(w.shape)}; leave it dense"
        )
    return w.cpu().contiguous().flatten(1)


def _bits(mask_MK: Tensor) -> Tensor:
    """Bytes [M, B], first column in the lowest bit."""
    return pack_bits(mask_MK)[:, : -(-mask_MK.shape[1] // 8)].contiguous()


def _mask(bits_MB: Tensor, rows: int, cols: int) -> Tensor:
    if bits_MB.dtype is not torch.uint8 or tuple(bits_MB.shape) != (rows, -(-cols // 8)):
        raise FileDamaged(f"a mask of {bits_MB.dtype} {list(bits_MB.shape)} does not fit {rows}x{cols} entries")
    bits_MK = unpack_bits(bits_MB)
    if bool(bits_MK[:, cols:].any()):
        raise FileDamaged(f"mask bits beyond column {cols} are set")
    return bits_MK[:, :cols].contiguous()


def _sizes(shape: Tensor) -> list[int]:
    sizes = [int(n) for n in shape.flatten()]
    if len(sizes) < 2 or min(sizes) < 0:
        raise FileDamaged(f"{sizes} is not the shape of a weight")
    return sizes


def _filled(values: Tensor, mask_MK: Tensor, sizes: list[int]) -> Tensor:
    if values.numel() != int(mask_MK.count_nonzero()):
        raise FileDamaged(f"{values.numel()} values and {int(mask_MK.count_nonzero())} mask bits that are set")
    return values.new_zeros(mask_MK.shape).masked_scatter_(mask_MK, values.flatten()).view(sizes)


def _write_bitmask(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w_MK = _rows(w)
    return w_MK[w_MK != 0], _bits(w_MK != 0), torch.tensor(w.shape)


def _read_bitmask(values_E: Tensor, bits_MB: Tensor, shape: Tensor) -> Tensor:
    sizes = _sizes(shape)
    rows, cols = sizes[0], int(torch.tensor(sizes[1:]).prod())
    return _filled(values_E, _mask(bits_MB.cpu(), rows, cols).to(values_E.device), sizes)


def _write_sparse_bitmask(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values_E, bits_MB, shape = _write_bitmask(_matrix(w))
    counts_M = (w.cpu() != 0).sum(1)
    return values_E, bits_MB, shape, counts_M.cumsum(0) - counts_M


def _read_sparse_bitmask(values_E: Tensor, bits_MB: Tensor, shape: Tensor, offsets_M: Tensor) -> Tensor:
    counts_M = popcounts(bits_MB).sum(1, dtype=torch.int64)
    if not torch.equal(counts_M.cumsum(0) - counts_M, offsets_M.flatten()):
        raise FileDamaged("the row offsets disagree with the mask")
    return _read_bitmask(values_E, bits_MB, shape)


def _matrix(w: Tensor) -> Tensor:
    if w.dim() != 2:
        raise FormatError(f"holds matrices, got shape {list(w.shape)}; leave it dense")
    return w


def _write_two_of_four(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w_MK = _rows(_matrix(w))
    rows, cols = w_MK.shape
    if cols % 4:
        raise FormatError(f"needs columns in fours, got {cols}; leave it dense")
    kept_Gm = w_MK.view(-1, 4) != 0
    worst = int(kept_Gm.sum(1).max()) if kept_Gm.numel() else 0
    if worst > 2:
        share = float((kept_Gm.sum(1) > 2).float().mean())
        raise FormatError(
            f"{share:.1%} of its groups of four keep more than two entries, which the layout would prune; "
            "prune with pattern='2:4' first, or choose sparse-bitmask"
        )
    mask_MK = _two(kept_Gm).view(rows, cols)
    return w_MK[mask_MK].view(rows, cols // 2), _bits(mask_MK), torch.tensor([[rows], [cols]])


def _two(kept_Gm: Tensor) -> Tensor:
    """Exactly two slots a group: the kept ones, and the first of the others where they are fewer."""
    order_Gm = torch.sort(kept_Gm.to(torch.int8), dim=1, descending=True, stable=True).indices
    return torch.zeros_like(kept_Gm).scatter_(1, order_Gm[:, :2], True)


def _read_two_of_four(values_Mk: Tensor, bits_MB: Tensor, shape: Tensor) -> Tensor:
    rows, cols = sizes = _sizes(shape)
    if tuple(values_Mk.shape) != (rows, cols // 2):
        raise FileDamaged(f"values of shape {list(values_Mk.shape)} do not fit 2:4 in {rows}x{cols}")
    mask_MK = _mask(bits_MB, rows, cols)
    if cols % 4 or bool((mask_MK.view(-1, 4).sum(1) != 2).any()):
        raise FileDamaged("its mask is not two of every four")
    return _filled(values_Mk, mask_MK, sizes)


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


# Values under the weight's own name: a reader that does not know the layout stops at their shape, instead of starting
# from random weights.
BITMASK = Layout("bitmask", lambda n: (n, f"{n}_bitmask", f"{n}_shape"), _write_bitmask, _read_bitmask)
SPARSE_BITMASK = Layout(
    "sparse-bitmask",
    lambda n: tuple(f"{_stem(n)}.{part}" for part in ("compressed", "bitmask", "shape", "row_offsets")),
    _write_sparse_bitmask,
    _read_sparse_bitmask,
)
SPARSE_24_BITMASK = Layout(
    "sparse-24-bitmask",
    lambda n: tuple(f"{_stem(n)}.{part}" for part in ("compressed", "bitmask", "shape")),
    _write_two_of_four,
    _read_two_of_four,
)
