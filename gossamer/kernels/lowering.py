"""Formats lowered to the stream that the CPU product reads: groups of rows that share kept columns.

Indices and values are shared with the format wherever their layout allows. Shapes: M rows, K columns.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import TYPE_CHECKING

import torch

from gossamer.formats import CSR, NM, Block, Format, KernelPatterns, RowGrouped
from gossamer.formats.checks import index_dtype, pointer

if TYPE_CHECKING:
    from gossamer.kernels.cpu.stream import Stream


def group_rows(fmt: Format) -> int:
    """Rows of a group once lowered."""
    return {RowGrouped: lambda: fmt.g, Block: lambda: fmt.a}.get(type(fmt), lambda: 1)()


@singledispatch
def lower(fmt: Format) -> Stream:
    """The stream of a stored weight, with the order of its rows where that is not their own. Values must be float32."""
    raise NotImplementedError(f"{type(fmt).__name__} does not lower to a stream")


@lower.register(CSR)
@lower.register(RowGrouped)
def _(fmt: CSR | RowGrouped) -> Stream:
    from gossamer.kernels.cpu.stream import stream

    g, order = group_rows(fmt), getattr(fmt, "order", None)
    stored = stream(g, fmt.rows, fmt.cols, fmt.indptr, fmt.indices, fmt.values.reshape(-1, g))
    return stored if order is None or not order.numel() else replace(stored, order_M=order.long())


@lower.register(NM)
def _(fmt: NM) -> Stream:
    from gossamer.kernels.cpu.stream import stream

    slots = fmt.values.shape[1]
    indptr = torch.arange(fmt.rows + 1, dtype=torch.int32) * slots
    indices = fmt.columns().reshape(-1).to(index_dtype(fmt.cols))
    return stream(1, fmt.rows, fmt.cols, indptr, indices, fmt.values.reshape(-1, 1))


@lower.register(Block)
def _(fmt: Block) -> Stream:
    from gossamer.kernels.cpu.stream import stream

    # Columns past a ragged edge hold zero values, so they may read any real column: the last.
    columns = fmt.columns().clamp(max=max(fmt.cols - 1, 0)).reshape(-1)
    indices = columns.to(index_dtype(fmt.cols))
    return stream(fmt.a, fmt.rows, fmt.cols, fmt.indptr * fmt.b, indices, fmt.values.reshape(-1, fmt.a))


@lower.register(KernelPatterns)
def _(fmt: KernelPatterns) -> Stream:
    from gossamer.kernels.cpu.stream import stream

    slots = fmt.slots()
    indptr = pointer(torch.bincount(slots // max(fmt.cols, 1), minlength=fmt.rows))
    indices = (slots % max(fmt.cols, 1)).to(index_dtype(fmt.cols))
    return replace(stream(1, fmt.rows, fmt.cols, indptr, indices, fmt.values.unsqueeze(1)), runs=True)
