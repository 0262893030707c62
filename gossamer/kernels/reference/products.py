"""The plain torch twin of every product: y = act(x Wᵀ + b), walked by each format's own structure.

Readable first. Kernels are tested against these, and these against the dense product.
Shapes: T tokens, M output rows, K input columns, E stored entries of g rows each, P blocks of a rows x b columns.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.formats import CSR, NM, Bitmask, Block, Dense, Format, Int4Groups, KernelPatterns, RowGrouped, TileBitmask
from gossamer.formats.checks import owners
from gossamer.kernels.reference.activation import activate

# Floats of scratch per step, so that a large product does not hold T x E numbers at once (64 MB).
SCRATCH = 1 << 24


def spmm_reference(fmt: Format, x_TK: Tensor, bias_M: Tensor | None = None, activation: str = "none") -> Tensor:
    """act(x Wᵀ + b), summed in float32 (float64 for float64 weights), returned in x's dtype.

    Args:
        fmt: the stored weight [M, K].
        x_TK: activations, one token a row, any number of rows.
        bias_M: added before the activation.
        activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".

    Example:
        >>> spmm_reference(CSR.from_dense(torch.eye(2)), torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """
    wide = torch.promote_types(torch.float32, fmt.dtype)
    y_MT = product(fmt, x_TK.to(wide).t().contiguous())
    z_TM = y_MT.t() if bias_M is None else y_MT.t() + bias_M.to(wide)
    return activate(z_TM, activation).to(x_TK.dtype).contiguous()


@singledispatch
def product(fmt: Format, x_KT: Tensor) -> Tensor:
    """W x in the columns' layout: [K, T] to [M, T]."""
    raise NotImplementedError(f"no reference product for {type(fmt).__name__}")


@product.register
def _(fmt: Dense, x_KT: Tensor) -> Tensor:
    return fmt.values.to(x_KT.dtype) @ x_KT


@product.register
def _(fmt: Int4Groups, x_KT: Tensor) -> Tensor:
    return fmt.to_dense().to(x_KT.dtype) @ x_KT


@product.register
def _(fmt: CSR, x_KT: Tensor) -> Tensor:
    rows_E = owners(fmt.indptr, fmt.nnz)
    return grouped(fmt.values.unsqueeze(1), rows_E, fmt.indices, fmt.rows, x_KT)


@product.register(Bitmask)
@product.register(TileBitmask)
@product.register(KernelPatterns)
def _(fmt: Bitmask | TileBitmask | KernelPatterns, x_KT: Tensor) -> Tensor:
    slots_E = fmt.slots()
    rows_E, columns_E = slots_E // fmt.grid[1], slots_E % fmt.grid[1]
    return grouped(fmt.entries().unsqueeze(1), rows_E, columns_E, fmt.rows, x_KT)


@product.register
def _(fmt: NM, x_KT: Tensor) -> Tensor:
    rows_E = torch.arange(fmt.rows, device=fmt.device).repeat_interleave(fmt.values.shape[1])
    return grouped(fmt.values.reshape(-1, 1), rows_E, fmt.columns().reshape(-1), fmt.rows, x_KT)


@product.register
def _(fmt: RowGrouped, x_KT: Tensor) -> Tensor:
    groups_E = owners(fmt.indptr, fmt.indices.numel())
    y_MT = grouped(fmt.values, groups_E, fmt.indices, fmt.grid[0] // fmt.g, x_KT)[: fmt.rows]
    return torch.empty_like(y_MT).index_copy_(0, fmt.order.long(), y_MT) if fmt.order.numel() else y_MT


@product.register
def _(fmt: Block, x_KT: Tensor) -> Tensor:
    tokens = x_KT.shape[1]
    panels = pad(x_KT, (0, 0, 0, fmt.grid[1] - fmt.cols)).view(fmt.grid[1] // fmt.b, fmt.b, tokens)
    owner_P = owners(fmt.indptr, fmt.indices.numel())
    y_RaT = x_KT.new_zeros(fmt.grid[0] // fmt.a, fmt.a, tokens)
    step = max(1, SCRATCH // max(1, (fmt.a + fmt.b) * tokens))
    for first in range(0, owner_P.numel(), step):
        chunk = slice(first, first + step)
        tiles = fmt.values[chunk].to(x_KT.dtype).transpose(1, 2) @ panels[fmt.indices[chunk].long()]
        y_RaT.index_add_(0, owner_P[chunk], tiles)
    return y_RaT.view(fmt.grid[0], tokens)[: fmt.rows]


def grouped(values_Eg: Tensor, group_E: Tensor, column_E: Tensor, groups: int, x_KT: Tensor) -> Tensor:
    """Sum value x activation over the entries of each group: y[group, row in group] += values[e, row] x[column[e]]."""
    g, tokens = values_Eg.shape[1], x_KT.shape[1]
    y_GgT = x_KT.new_zeros(groups, g, tokens)
    step = max(1, SCRATCH // max(1, (g + 1) * tokens))
    for first in range(0, column_E.numel(), step):
        chunk = slice(first, first + step)
        x_ET = x_KT[column_E[chunk].long()]
        y_GgT.index_add_(0, group_E[chunk], values_Eg[chunk].to(x_KT.dtype).unsqueeze(2) * x_ET.unsqueeze(1))
    return y_GgT.view(groups * g, tokens)
