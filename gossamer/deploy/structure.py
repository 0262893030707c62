"""Structure: what regularity the zeros of a weight have, and so which formats store it without waste.

Shapes: M rows, K columns, t taps of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats.kernelpatterns import MOST_PATTERNS
from ..formats.rowgrouped import alike_first

# A kept weight may happen to be zero: a pattern counts as found when its padding stays under 5 %.
WASTE = 1.05
# The same over the first rows alone, where chance weighs more.
SAMPLE_ROWS, HINT = 64, 1.2
GROUPS = (8, 4, 2)
SPANS = (4, 8, 16)
BLOCK_ROWS = (8, 4)
BLOCK_COLUMNS = (16, 8, 4)
# Fewer taps a kernel, or kernels a pattern, and patterns save nothing.
FEWEST_TAPS, FEWEST_ALIKE = 2, 4


@dataclass(frozen=True)
class Structure:
    """One regularity, and the format that stores it.

    Args:
        name: in words, such as "4-row groups".
        format: name of the format.
        options: the format's own options, such as (("g", 4),).
        reordered: the format brings rows together that do not stand together.
    """

    name: str
    format: str
    options: tuple[tuple[str, int], ...] = ()
    reordered: bool = False


def detect(w_MK: Tensor, taps: int = 1) -> tuple[Structure, ...]:
    """Every regularity that the zeros of a weight obey, the most regular first; empty for unstructured zeros.

    Args:
        taps: columns of one kernel, of a convolution's flattened weight.

    Example:
        >>> w = torch.zeros(4, 8); w[:, ::3] = 1
        >>> [s.name for s in detect(w)]
        ['4-row groups', '2-row groups']
    """
    mask_MK = support_of(w_MK)
    kept = int(mask_MK.count_nonzero())
    if kept == mask_MK.numel():
        return ()
    return (*_rows_and_columns(mask_MK, kept), *_kernels(mask_MK, kept, taps))


def _rows_and_columns(mask_MK: Tensor, kept: int) -> tuple[Structure, ...]:
    # Most weights show in their first rows that they lack a structure; only those that may have it are read whole.
    corner_RK = mask_MK[:SAMPLE_ROWS]
    few = int(corner_RK.count_nonzero())
    if kept and few and len(corner_RK) < len(mask_MK):
        hints = _all(corner_RK, few, HINT) or twins(mask_MK)
        return _all(mask_MK, kept, WASTE) if hints else ()
    return _all(mask_MK, kept, WASTE)


def _all(mask_MK: Tensor, kept: int, waste: float) -> tuple[Structure, ...]:
    return (*_blocks(mask_MK, kept, waste), *_groups(mask_MK, kept, waste), *_n_of_m(mask_MK, kept, waste))


def support_of(w: Tensor) -> Tensor:
    """Where a weight is not zero. -0.0, which `weight * mask` leaves behind, is zero; NaN is not."""
    return w.detach().contiguous() != 0


def density_of(w: Tensor) -> float:
    """Fraction of entries that are not zero."""
    return float(w.detach().count_nonzero()) / max(w.numel(), 1)


def tile_fill(mask_MK: Tensor, a: int, b: int) -> int:
    """Entries that the kept a x b tiles cover."""
    rows, cols = mask_MK.shape
    padded = pad(mask_MK, (0, -cols % b, 0, -rows % a))
    tiles = padded.view(-(-rows // a), a, -(-cols // b), b).any(3).any(1)
    return int(tiles.sum()) * a * b


def _blocks(mask_MK: Tensor, kept: int, waste: float) -> list[Structure]:
    found = []
    for a in BLOCK_ROWS:
        if a > mask_MK.shape[0]:
            continue
        for b in BLOCK_COLUMNS:
            if b <= mask_MK.shape[1] and tile_fill(mask_MK, a, b) <= waste * kept:
                found.append(Structure(f"{a}x{b} blocks", "block", (("a", a), ("b", b))))
                break
    return found


def _groups(mask_MK: Tensor, kept: int, waste: float) -> list[Structure]:
    found = []
    for g in GROUPS:
        if g > mask_MK.shape[0]:
            continue
        order = alike_first(mask_MK, g)  # as the format would store it
        if tile_fill(mask_MK[order.long()] if order.numel() else mask_MK, g, 1) <= waste * kept:
            words = ", rows re-ordered" if order.numel() else ""
            found.append(Structure(f"{g}-row groups{words}", "rowgrouped", (("g", g),), bool(order.numel())))
    return found


def twins(mask_MK: Tensor) -> bool:
    """Whether about every row shares its support with another one, wherever that stands."""
    return _different(mask_MK) <= HINT * len(mask_MK) / 2


def _different(mask_MK: Tensor) -> int:
    """How many different rows a mask has."""
    bits = np.packbits(mask_MK.cpu().numpy(), axis=1)
    return np.unique(bits.view(f"V{bits.shape[1]}").ravel()).size


def _n_of_m(mask_MK: Tensor, kept: int, waste: float) -> list[Structure]:
    rows, cols = mask_MK.shape
    for m in SPANS:
        if rows == 0 or cols == 0 or cols % m:
            continue
        n = int(mask_MK.view(rows, cols // m, m).sum(-1, dtype=torch.int16).max())
        if 0 < n < m and rows * cols * n <= waste * kept * m:
            return [Structure(f"{n}:{m}", "nm", (("n", n), ("m", m)))]
    return []


def _kernels(mask_MK: Tensor, kept: int, taps: int) -> list[Structure]:
    if taps < FEWEST_TAPS or not kept:
        return []
    for part_RK in (mask_MK[:SAMPLE_ROWS], mask_MK):
        mask_Et = part_RK.reshape(-1, taps)
        mask_Et = mask_Et[mask_Et.any(1)]
        count = _different(mask_Et) if len(mask_Et) else 0
        few = int(mask_Et.count_nonzero()) < FEWEST_TAPS * len(mask_Et)
        if few or count > MOST_PATTERNS or count * FEWEST_ALIKE > len(mask_Et):
            return []
    words = f"kernels of {count} patterns" if count > 1 else "kernels of one pattern"
    return [Structure(words, "kernelpatterns", (("taps", taps),))]
