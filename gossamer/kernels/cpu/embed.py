"""Embedding rows of tokens, positions and types, gathered and summed straight into token panels.

Shapes: B sequences, S positions, K features, N rows of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import need_floats
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.tokens import GRAIN, WIDTH, empty_panels, padded, panel_count

MOST_TABLES = 3


def plan_embed(
    batch: int,
    seq: int,
    features: int,
    rows: tuple[int, ...],
    *,
    ids_apart: tuple[int, ...] | None = None,
    threads: int = 1,
) -> Launch:
    """Lay out the sum of up to three embeddings; `.run(ids, table, ids, table, ids, table, y, bad)` takes addresses.

    Ids are int64 [B, S]; at address 0 they stand for the positions 0, 1, ... themselves. A table at address 0 is left
    out. `bad` is the address of an int64 that is raised by one for every id outside its table, which then counts as
    row 0: set it to zero before the call and look at it after. Padding lanes become zero.

    Args:
        batch: B.
        seq: S.
        features: K.
        rows: N of each table.
        ids_apart: ids from one sequence to the next, for each table; S, or 0 where all sequences share one row of ids.
        threads: how many threads may work.

    Raises:
        FormatError: no table, or more than three.

    Example:
        >>> plan = plan_embed(32, 64, 384, rows=(30522, 512, 2), ids_apart=(64, 0, 64))
    """
    from gossamer.kernels.cpu import token_loops as loops

    if not 1 <= len(rows) <= MOST_TABLES:
        raise FormatError(
            f"embeddings are summed from one to {MOST_TABLES} tables, got {len(rows)}; add the rest later"
        )
    ids_apart = (seq,) * len(rows) if ids_apart is None else ids_apart
    panels = panel_count(batch, seq) if features else 0
    threads = max(1, min(threads, 4 * panels, panels * features * WIDTH // GRAIN))
    # One cache line more than whole vectors, so that the rows of a transpose never share a set of the cache.
    line = padded(features) + 16
    scratch = 4 * line * (lanes() + 1)
    tables = [number for pair in zip(rows, ids_apart) for number in pair]
    tables += [0] * (2 * MOST_TABLES - len(tables))
    fixed = (panels, batch, seq, padded(seq), features, WIDTH, line, scratch, *tables)
    return launch(loops.embedding(), addresses=8, fixed=fixed, threads=threads, scratch_bytes=scratch * threads)


def embed(*tables: tuple[Tensor | None, Tensor]) -> Tensor:
    """Token panels of the sum of embeddings.

    Args:
        tables: up to three pairs of ids, int64 [B, S], and table, float32 [N, K]. The first pair has ids; None in
            another stands for the positions 0, 1, ....

    Raises:
        FormatError: a shape, dtype or layout does not fit, or an id lies outside its table.

    Example:
        >>> x = embed((input_ids, words), (None, positions), (token_type_ids, types))
    """
    if not tables or tables[0][0] is None or tables[0][0].dim() != 2:
        raise FormatError("the first pair must bring int64 ids [B, S]; give (ids, table) pairs")
    (batch, seq), features = tables[0][0].shape, tables[0][1].shape[-1] if tables[0][1].dim() else 0
    for ids_BS, table_NK in tables:
        _check(ids_BS, table_NK, batch, seq, features)
    rows = tuple(len(table_NK) for _, table_NK in tables)
    plan = plan_embed(batch, seq, features, rows, threads=torch.get_num_threads())
    y_PKW, bad = empty_panels(batch, seq, features), torch.zeros(1, dtype=torch.int64, device="cpu")
    at = [0 if tensor is None else tensor.data_ptr() for pair in tables for tensor in pair]
    plan.run(*at, *[0] * (2 * MOST_TABLES - len(at)), y_PKW.data_ptr(), bad.data_ptr())
    if int(bad):
        raise FormatError(f"{int(bad)} ids lie outside their tables of {rows} rows; ids count from 0")
    return y_PKW


def _check(ids_BS: Tensor | None, table_NK: Tensor, batch: int, seq: int, features: int) -> None:
    need_floats("table", table_NK, f"[N, {features}]", table_NK.dim() == 2 and table_NK.shape[1] == features)
    if ids_BS is None:
        return
    if ids_BS.dtype is not torch.int64 or ids_BS.shape != (batch, seq) or not ids_BS.is_contiguous():
        raise FormatError(f"ids must be contiguous int64 [{batch}, {seq}], got {ids_BS.dtype} {tuple(ids_BS.shape)}")
    if not ids_BS.is_cpu:
        raise FormatError(f"ids must be on the CPU, got {ids_BS.device}; call .cpu()")
