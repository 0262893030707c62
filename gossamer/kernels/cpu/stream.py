"""What the CPU sparse product eats: groups of output rows that share kept columns, cut into blocks of columns.

Shapes: M output rows, K columns, G rows of a group, B blocks of columns, E stored entries.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import need_counts

GROUPS = (1, 2, 4, 8)

# A block of 128 columns x 64 tokens is two thirds of a 48 KiB first-level cache (one of 32 KiB holds it too); a panel
# of 2048 columns is half a second-level cache. Twenty entries pay for the start and end of a group's turn (measured).
_L1_COLUMNS, _L2_COLUMNS, _WORTHWHILE = 128, 2048, 20


@dataclass(frozen=True, eq=False)
class Stream:
    """Groups of `g` output rows that share their kept columns, cut into blocks of columns.

    Args:
        g: output rows per group: 1, 2, 4 or 8.
        rows: M, the real rows; the last group may be ragged, its missing rows are zero in `values_EG`.
        cols: K.
        block: columns per block, so that a panel of block x lanes stays in the first-level cache.
        starts_BG: int32 [n_blocks + 1, n_groups]; group i in block b owns entries starts[b, i]..starts[b + 1, i].
        indices_E: uint16 (K <= 65536) or int32; the column of each entry, ascending within a group.
        values_EG: float32 [E, g].
        order_M: int64 [M]; stored row r is row order[r] of the matrix. None where rows stand in their own order.
        runs: convolutions take taps that stand below each other in one kernel together (groups of one row only).
    """

    g: int
    rows: int
    cols: int
    block: int
    starts_BG: Tensor
    indices_E: Tensor
    values_EG: Tensor
    order_M: Tensor | None = None
    runs: bool = False

    def places(self) -> Tensor:
        """For kernels: the row of each stored row, up to whole groups, and then the places 0 to g - 1 of a group."""
        order_M = torch.arange(self.rows) if self.order_M is None else self.order_M
        missing = order_M.new_zeros(self.groups * self.g - self.rows)
        return torch.cat([order_M, missing, torch.arange(self.g)])

    def __getstate__(self) -> dict:
        """Copies and pickles carry the weights only: laid-out plans hold addresses of this very object."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where starts, indices and values lie in memory now; `share_memory_` may have moved them since last time."""
        return self.starts_BG.data_ptr(), self.indices_E.data_ptr(), self.values_EG.data_ptr()

    @cached_property
    def arrangements(self) -> dict:
        """Copies of the entries in the order of wide products, made on first use."""
        return {}

    @cached_property
    def plans(self) -> dict:
        """How the work was laid out for each size of x that came by."""
        return {}

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return self.starts_BG.shape[1]

    @property
    def blocks(self) -> int:
        """Number of column blocks."""
        return self.starts_BG.shape[0] - 1


def default_block(g: int, cols: int, density: float) -> int:
    """Columns per block: a panel that stays in L1 for groups of one or two, in L2 for larger ones.

    Four rows use each loaded panel vector four times, so the second-level cache keeps up with them. Very sparse
    groups take wider blocks, because each turn of a group in a block has a fixed cost.
    """
    wanted = _L2_COLUMNS if g >= 4 else min(_L2_COLUMNS, max(_L1_COLUMNS, round(_WORTHWHILE / max(density, 1e-6))))
    pieces = max(1, -(-cols // wanted))
    return max(1, -(-cols // pieces))


def stream(
    g: int, rows: int, cols: int, indptr: Tensor, indices: Tensor, values: Tensor, *, block: int | None = None
) -> Stream:
    """Cut ordinary group-compressed weights into column blocks; memory of indices and values is shared, not copied.

    Args:
        g: rows per group: 1, 2, 4 or 8.
        rows: real output rows, at least 0.
        cols: input columns, at least 0.
        indptr: int32 [ceil(rows / g) + 1].
        indices: uint16 or int32 [E], ascending within a group.
        values: float32 [E, g]; [E] is accepted for g = 1.
        block: columns per block; None takes the default for this g.

    Raises:
        FormatError: sizes, dtypes or layout do not fit; the message says which.

    Example:
        >>> s = stream(1, 1, 3, torch.tensor([0, 1], dtype=torch.int32),
        ...            torch.tensor([2], dtype=torch.int32), torch.tensor([[5.0]]))
        >>> s.starts_BG.tolist()
        [[0], [1]]
    """
    need_counts(rows=rows, cols=cols)
    values = values.unsqueeze(1) if values.dim() == 1 and g == 1 else values
    _check(g, rows, cols, indptr, indices, values)
    density = indices.shape[0] / max(1, (indptr.shape[0] - 1) * cols)
    block = default_block(g, cols, density) if block is None else max(1, min(int(block), max(cols, 1)))
    if block < cols:
        _check_order(cols, indptr, indices)
    starts = _starts(indptr.to(torch.int32), indices, cols, block)
    return Stream(g, rows, cols, block, starts, indices, values)


def _check(g: int, rows: int, cols: int, indptr: Tensor, indices: Tensor, values: Tensor) -> None:
    for name, part in (("indptr", indptr), ("indices", indices), ("values", values)):
        if not part.is_cpu or part.layout is not torch.strided:
            raise FormatError(f"{name} must be an ordinary tensor on the CPU, got {part.layout} on {part.device}")
    if g not in GROUPS:
        raise FormatError(f"rows per group must be one of {GROUPS}, got {g}")
    groups = -(-rows // g)
    if tuple(indptr.shape) != (groups + 1,):
        raise FormatError(f"indptr must have ceil({rows} / {g}) + 1 = {groups + 1} entries, got {tuple(indptr.shape)}")
    if indices.dim() != 1:
        raise FormatError(f"indices must be flat, one per stored group, got shape {tuple(indices.shape)}; flatten them")
    if indices.dtype not in (torch.uint16, torch.int32):
        raise FormatError(f"indices must be uint16 or int32, got {indices.dtype}")
    if indices.dtype == torch.uint16 and cols > 65536:
        raise FormatError(f"uint16 indices reach 65536 columns, got {cols}; store them as int32")
    if values.dtype != torch.float32:
        raise FormatError(f"values must be float32, got {values.dtype}; convert them once when packing")
    if tuple(values.shape) != (indices.shape[0], g):
        raise FormatError(f"values must be [{indices.shape[0]}, {g}], got {tuple(values.shape)}")
    if not (indices.is_contiguous() and values.is_contiguous()):
        raise FormatError("indices and values must be contiguous; call .contiguous() when packing")
    if indptr.dtype not in (torch.int32, torch.int64):
        raise FormatError(f"indptr must be int32, got {indptr.dtype}; counts of entries are whole numbers")
    _check_ranges(cols, indptr, indices)


def _check_ranges(cols: int, indptr: Tensor, indices: Tensor) -> None:
    """The kernel trusts every index, so a damaged one is refused here rather than read out of bounds later."""
    wide = indptr.to(torch.int64)
    if int(wide[0]) != 0 or int(wide[-1]) != indices.shape[0] or bool((wide.diff() < 0).any()):
        raise FormatError(f"indptr must rise from 0 to {indices.shape[0]} entries, got {wide[0]}..{wide[-1]}")
    if indices.numel():
        wide = indices.to(torch.int32)
        low, high = int(wide.min()), int(wide.max())
        if low < 0 or high >= cols:
            raise FormatError(f"column indices must lie in 0..{cols - 1}, got {low}..{high}")


def _check_order(cols: int, indptr: Tensor, indices: Tensor) -> None:
    """Blocks are found by position, so the columns of a group must rise."""
    sizes = indptr.diff().to(torch.int64)
    key_E = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes) * cols + indices.to(torch.int64)
    if bool((key_E.diff() < 0).any()):
        raise FormatError("columns must rise within each group of rows; sort each group's entries when packing")


def _starts(indptr: Tensor, indices: Tensor, cols: int, block: int) -> Tensor:
    """Count entries of each (block, group), then add them up along blocks from each group's first entry."""
    groups, blocks = indptr.shape[0] - 1, max(1, -(-cols // block))
    if blocks == 1:
        return torch.stack([indptr[:-1], indptr[1:]]).contiguous()
    sizes = indptr.diff().to(torch.int64)
    group_E = torch.repeat_interleave(torch.arange(groups), sizes)
    key_E = (indices.to(torch.int64) // block) * groups + group_E
    counts_BG = torch.bincount(key_E, minlength=blocks * groups).reshape(blocks, groups)
    starts = torch.zeros(blocks + 1, groups, dtype=torch.int64)
    starts[0] = indptr[:-1]
    starts[1:] = indptr[:-1] + counts_BG.cumsum(0)
    return starts.to(torch.int32)
