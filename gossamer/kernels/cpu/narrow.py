"""Weights in bfloat16 as the dot-product instruction eats them: kept columns in runs, one run per instruction.

Shapes: M output rows, K columns, G row groups of g rows, E kept columns of all groups, R runs of d columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.formats import CSR, RowGrouped
from gossamer.formats.checks import index_dtype, owners
from gossamer.kernels.cpu.stream import GROUPS

DEPTH = {torch.bfloat16: 2}


@dataclass(frozen=True, eq=False)
class Narrow:
    """Groups of `g` output rows that share kept columns, in runs of two columns.

    Any two kept columns make a run: they need not be neighbours. Where a group keeps an odd number, its last column
    stands twice in the last run, with half of its weight each time, so that an infinity there stays one.

    Args:
        g: output rows per group: 1, 2, 4 or 8.
        rows: M, the real rows; the last group may be ragged, its missing rows are zero in `values_Rgd`.
        cols: K.
        starts_G: int32 [G + 1]; group i owns runs starts[i]..starts[i + 1].
        indices_Rd: uint16 (K <= 65536) or int32 [R, d].
        values_Rgd: bfloat16 [R, g, d].
    """

    g: int
    rows: int
    cols: int
    starts_G: Tensor
    indices_Rd: Tensor
    values_Rgd: Tensor

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return self.starts_G.numel() - 1

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where starts, indices and values lie."""
        return self.starts_G.data_ptr(), self.indices_Rd.data_ptr(), self.values_Rgd.data_ptr()

    @cached_property
    def plans(self) -> dict:
        """How the work was laid out for each size of x that came by."""
        return {}


def narrow(fmt: CSR | RowGrouped) -> Narrow:
    """Arrange a stored bfloat16 weight for products on bfloat16 panels.

    Values are copied, so that later changes need a new one. Rows stay in the order they are stored in (`fmt.order`).

    Raises:
        FormatError: the weight is not bfloat16, or is grouped by other than 1, 2, 4 or 8 rows.

    Example:
        >>> weights = narrow(RowGrouped.from_dense(w_MK.bfloat16(), g=4))
    """
    g = getattr(fmt, "g", 1)
    if fmt.dtype not in DEPTH or g not in GROUPS:
        raise FormatError(
            f"narrow products take bfloat16 weights in groups of {GROUPS} rows, got {fmt.dtype} by {g}; convert the "
            "weight with .bfloat16() and store it again"
        )
    slots_E, indptr, lane_E = _runs(fmt.indptr, DEPTH[fmt.dtype])
    return Narrow(g, fmt.rows, fmt.cols, indptr, *_filled(fmt, g, slots_E, lane_E, int(indptr[-1])))


def _runs(indptr: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The run of every entry, where the runs of each group start, and an entry's place in its run."""
    sizes_G = indptr.diff().long()
    runs_G = -(-sizes_G // depth)
    starts_G = pad(runs_G.cumsum(0), (1, 0))
    owner_E = owners(indptr, int(indptr[-1]))
    place_E = torch.arange(owner_E.numel()) - indptr.long()[owner_E]
    return starts_G[owner_E] + place_E // depth, starts_G.int(), place_E % depth


def _filled(fmt: CSR | RowGrouped, g: int, run_E: Tensor, lane_E: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Indices and values by runs."""
    columns_E, values_Eg = fmt.indices.long(), fmt.values.detach().reshape(-1, g)
    indices_Rd = torch.full((runs, 2), -1).index_put_((run_E, lane_E), columns_E)
    values_Rgd = values_Eg.new_zeros(runs, g, 2)
    values_Rgd[run_E, :, lane_E] = values_Eg
    odd = indices_Rd[:, 1] < 0
    indices_Rd[odd, 1] = indices_Rd[odd, 0]
    values_Rgd[odd] = (values_Rgd[odd, :, :1] / 2).expand(-1, -1, 2)
    return indices_Rd.to(index_dtype(fmt.cols)), values_Rgd
