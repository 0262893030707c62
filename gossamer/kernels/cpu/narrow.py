"""Weights in bfloat16 or int8 as dot-product instructions eat them: kept columns in runs, one per instruction.

Shapes: M output rows, K columns, G row groups of g rows, E kept columns of all groups, R runs of d columns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.formats import CSR, RowGrouped
from gossamer.formats.checks import index_dtype, owners
from gossamer.kernels.cpu.integers import LEVELS, ZERO_POINT
from gossamer.kernels.cpu.memory import floats
from gossamer.kernels.cpu.stream import GROUPS
from gossamer.kernels.reference.quantised import quantise_rows

DEPTH = {torch.bfloat16: 2, torch.int8: 4}
# 255 x 127 x this many columns is still a 32-bit integer.
MOST_INT8_COLUMNS = 65536


@dataclass(frozen=True, eq=False)
class Narrow:
    """Groups of `g` output rows that share kept columns, in runs of d columns: two in bfloat16, four in int8.

    Any kept columns make a run: they need not be neighbours. Where the last run of a group lacks columns, its first one
    stands there again: with weight zero in int8, with half of its weight each time in bfloat16, so that an infinity
    there stays one.

    Args:
        g: output rows per group: 1, 2, 4 or 8.
        rows: M, the real rows; the last group may be ragged, its missing rows are zero.
        cols: K.
        starts_G: int32 [G + 1]; group i owns runs starts[i]..starts[i + 1].
        indices_Rd: uint16 (K <= 65536) or int32 [R, d].
        values_Rgd: bfloat16 or int8 [R, g, d].
        scales_M: float32 [G g], for int8: row m of W is scales[m] times its integers.
        offsets_M: int32 [G g], for int8: minus 128 times the sum of a row's integers, because activations come 128 up.
    """

    g: int
    rows: int
    cols: int
    starts_G: Tensor
    indices_Rd: Tensor
    values_Rgd: Tensor
    scales_M: Tensor | None = None
    offsets_M: Tensor | None = None

    def __getstate__(self) -> dict:
        """Copies and pickles carry the weights only: laid-out plans hold addresses of this very object."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def dtype(self) -> torch.dtype:
        """torch.bfloat16 or torch.int8."""
        return self.values_Rgd.dtype

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


def narrow(fmt: CSR | RowGrouped, dtype: torch.dtype = torch.bfloat16) -> Narrow:
    """Arrange a stored weight for products on bfloat16 panels, or quantise it for products of 8-bit integers.

    int8 is symmetric with a scale per row: w = scale q, scale = max |w| / 127, q in -127..127. Values are copied, so
    that later changes need a new one. Rows stay in the order they are stored in (`fmt.order`).

    Raises:
        FormatError: another dtype; a bfloat16 arrangement of other weights; groups of other than 1, 2, 4 or 8 rows;
            weights that are not finite or too many columns for int8.

    Example:
        >>> weights = narrow(RowGrouped.from_dense(w_MK, g=4), torch.int8)
    """
    g, own = getattr(fmt, "g", 1), fmt.dtype
    if dtype not in DEPTH or g not in GROUPS:
        raise FormatError(f"narrow weights are bfloat16 or int8 in groups of {GROUPS} rows, got {dtype} by {g}")
    if dtype == torch.bfloat16 and own != dtype:
        raise FormatError(f"the weight is {own}; convert it with .bfloat16() and store it again, or take torch.int8")
    run_E, starts_G, lane_E = _runs(fmt.indptr, DEPTH[dtype])
    runs, values_Eg = int(starts_G[-1]), fmt.values.detach().reshape(-1, g)
    if dtype == torch.bfloat16:
        indices_Rd, values_Rgd, missing_Rd = _filled(fmt, values_Eg, run_E, lane_E, runs, 2)
        odd = missing_Rd[:, 1]
        values_Rgd[odd] = (values_Rgd[odd, :, :1] / 2).expand(-1, -1, 2)
        return Narrow(g, fmt.rows, fmt.cols, starts_G, indices_Rd, values_Rgd)
    scales_M, codes_Eg, sums_M = _quantised(fmt, values_Eg)
    indices_Rd, values_Rgd, _ = _filled(fmt, codes_Eg, run_E, lane_E, runs, 4)
    return Narrow(g, fmt.rows, fmt.cols, starts_G, indices_Rd, values_Rgd, scales_M, -ZERO_POINT * sums_M)


def _runs(indptr: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The run of every entry, where the runs of each group start, and an entry's place in its run."""
    runs_G = (indptr.diff().long() + depth - 1) // depth
    starts_G = pad(runs_G.cumsum(0), (1, 0))
    owner_E = owners(indptr, int(indptr[-1]))
    place_E = torch.arange(owner_E.numel()) - indptr.long()[owner_E]
    return starts_G[owner_E] + place_E // depth, starts_G.int(), place_E % depth


def _filled(
    fmt: CSR | RowGrouped, values_Eg: Tensor, run_E: Tensor, lane_E: Tensor, runs: int, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and values by runs, and which places of the runs are filled up with the run's first column."""
    indices_Rd = torch.full((runs, depth), -1).index_put_((run_E, lane_E), fmt.indices.long())
    values_Rgd = values_Eg.new_zeros(runs, values_Eg.shape[1], depth)
    values_Rgd[run_E, :, lane_E] = values_Eg
    missing_Rd = indices_Rd < 0
    indices_Rd = torch.where(missing_Rd, indices_Rd[:, :1], indices_Rd)
    return indices_Rd.to(index_dtype(fmt.cols)), values_Rgd, missing_Rd


def _quantised(fmt: CSR | RowGrouped, values_Eg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale of every row (missing ones too), the integers of every entry, and their sums over rows."""
    if fmt.cols > MOST_INT8_COLUMNS:
        raise FormatError(f"int8 products sum at most {MOST_INT8_COLUMNS} columns in 32 bits, got {fmt.cols}")
    if not bool(values_Eg.isfinite().all()):
        raise FormatError("a weight is not finite, so its row has no finite scale; mend it before it is quantised")
    owner_Eg = owners(fmt.indptr, values_Eg.shape[0])[:, None].expand_as(values_Eg)
    groups = fmt.indptr.numel() - 1
    most_Gg = floats(groups, values_Eg.shape[1]).zero_().scatter_reduce_(0, owner_Eg, values_Eg.float().abs(), "amax")
    scales_Gg = most_Gg / LEVELS
    codes_Eg = quantise_rows(values_Eg.float(), scales_Gg[owner_Eg[:, 0]]) if groups else values_Eg.to(torch.int8)
    sums_Gg = torch.zeros(groups, values_Eg.shape[1], dtype=torch.int32).scatter_add_(0, owner_Eg, codes_Eg.int())
    return scales_Gg.flatten(), codes_Eg, sums_Gg.flatten()
