"""Entries in the order in which the product reads them: block of columns by block, and within one group by group.

Shapes: E stored entries, N row groups, B blocks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.cpu.stream import Stream


@dataclass(frozen=True)
class Arranged:
    """A stream cut into blocks of columns, each block's entries in one piece so that reading ahead works.

    Args:
        blocks: B.
        starts_R: int32 [B * N + 1]; run b * N + n holds the entries of group n in block b.
        indices_E: as in `Stream`.
        values_EG: as in `Stream`. One block shares the stream's memory, more are a copy.
        order_E: which entry of the stream stands where in the copy; None without a copy.
    """

    blocks: int
    starts_R: Tensor
    indices_E: Tensor
    values_EG: Tensor
    order_E: Tensor | None = None

    @property
    def groups(self) -> int:
        """N."""
        return (self.starts_R.numel() - 1) // self.blocks

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where starts, indices and values lie."""
        return self.starts_R.data_ptr(), self.indices_E.data_ptr(), self.values_EG.data_ptr()

    def refresh(self, values_EG: Tensor) -> None:
        """Copy values again after the stream's own have changed; plans that read this copy stay good."""
        if self.order_E is not None:
            torch.index_select(values_EG.detach(), 0, self.order_E, out=self.values_EG)


def arrange(stream: Stream, blocks: int) -> Arranged:
    """Cut the columns into `blocks` pieces of equal width.

    Example:
        >>> arrange(weights, 1).values_EG.data_ptr() == weights.values_EG.data_ptr()
        True
    """
    indptr_N = torch.cat([stream.starts_BG[0], stream.starts_BG[-1, -1:]])
    if blocks == 1 or stream.groups == 0:
        return Arranged(1, indptr_N.contiguous(), stream.indices_E, stream.values_EG)
    column_E, width = stream.indices_E.to(torch.int64), -(-stream.cols // blocks)
    group_E = torch.repeat_interleave(torch.arange(stream.groups), indptr_N.diff().to(torch.int64))
    run_E = column_E // width * stream.groups + group_E
    order_E = run_E.argsort(stable=True)
    starts_R = torch.zeros(blocks * stream.groups + 1, dtype=torch.int32)
    starts_R[1:] = torch.bincount(run_E, minlength=blocks * stream.groups).cumsum(0)
    indices_E = column_E[order_E].to(stream.indices_E.dtype)
    return Arranged(blocks, starts_R, indices_E, stream.values_EG.detach()[order_E], order_E)
