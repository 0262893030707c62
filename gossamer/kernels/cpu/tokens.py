"""Token panels: activations of a batch of sequences as [panels, features, 64], the layout of the runtime.

Shapes: B sequences, S positions, K features, P panels of W = 64 positions. Position p = b * padded(S) + s stands in
panel p // W, lane p % W; lanes beyond a sequence's end are padding.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gossamer.kernels.cpu.checks import need_floats
from gossamer.kernels.cpu.launch import Launch, launch

WIDTH = 64
# Elements that pay for waking one more thread: about ten microseconds of work.
GRAIN = 50_000
# Sequences start at whole vectors of AVX-512, the widest there are.
_VECTOR = 16


def padded(seq: int) -> int:
    """Positions that a sequence of `seq` takes up.

    Example:
        >>> padded(1), padded(16), padded(17)
        (16, 16, 32)
    """
    return -(-seq // _VECTOR) * _VECTOR


def panel_count(batch: int, seq: int) -> int:
    """Panels that a batch fills, the last one perhaps in part."""
    return -(-batch * padded(seq) // WIDTH)


def empty_panels(batch: int, seq: int, features: int) -> Tensor:
    """Uninitialised panels for [batch, seq, features]."""
    return torch.empty(panel_count(batch, seq), features, WIDTH, dtype=torch.float32, device="cpu")


def need_panels(name: str, data: Tensor, batch: int, seq: int, features: int) -> None:
    """Refuse what is not panels of this size."""
    shape = (panel_count(batch, seq), features, WIDTH)
    need_floats(name, data, f"{list(shape)} for {batch} x {seq} positions", tuple(data.shape) == shape)


def float_bits(x: float) -> int:
    """A float32 as the low half of an argument of a kernel, where the kernel loads it as a float."""
    return struct.unpack("=q", struct.pack("=f4x", x))[0]


def plan_rows_to_panels(batch: int, seq: int, features: int, *, row: int | None = None, threads: int = 1) -> Launch:
    """Lay out rows [B, S, K] -> token panels; `.run(x, y)` takes addresses. Padding lanes become zero.

    Args:
        batch: B; sequences follow each other without a gap. Plain rows [T, K] are one sequence of T.
        seq: S.
        features: K.
        row: floats from one row of x to the next; K unless given.
        threads: how many threads may work.

    Example:
        >>> plan_rows_to_panels(32, 64, 384).run(x.data_ptr(), panels.data_ptr())
    """
    from gossamer.kernels.cpu import token_loops as loops

    return _moving(loops.packing(), batch, seq, features, row, threads)


def plan_panels_to_rows(batch: int, seq: int, features: int, *, row: int | None = None, threads: int = 1) -> Launch:
    """Lay out token panels -> rows [B, S, K]; `.run(x, y)` takes addresses, arguments as `plan_rows_to_panels`.

    Example:
        >>> plan_panels_to_rows(32, 64, 384).run(panels.data_ptr(), y.data_ptr())
    """
    from gossamer.kernels.cpu import token_loops as loops

    return _moving(loops.unpacking(), batch, seq, features, row, threads)


def _moving(entry, batch: int, seq: int, features: int, row: int | None, threads: int) -> Launch:
    panels = panel_count(batch, seq) if features else 0
    threads = max(1, min(threads, 4 * panels, panels * features * WIDTH // GRAIN))
    fixed = (panels, batch, seq, padded(seq), features, WIDTH, 4 * (features if row is None else row))
    return launch(entry, addresses=2, fixed=fixed, threads=threads)


def rows_to_panels(x_BSK: Tensor) -> Tensor:
    """Token panels of rows; lanes of padding are zero.

    Args:
        x_BSK: float32 [B, S, K], or [T, K] for one sequence of T.

    Raises:
        FormatError: not float32, contiguous, on the CPU, or not of two or three axes.

    Example:
        >>> rows_to_panels(torch.randn(3, 17, 384)).shape
        torch.Size([2, 384, 64])
    """
    need_floats("x", x_BSK, "[B, S, K] or [T, K]", x_BSK.dim() in (2, 3))
    batch, seq, features = x_BSK.shape if x_BSK.dim() == 3 else (1, *x_BSK.shape)
    y_PKW = empty_panels(batch, seq, features)
    plan = plan_rows_to_panels(batch, seq, features, threads=torch.get_num_threads())
    plan.run(x_BSK.data_ptr(), y_PKW.data_ptr())
    return y_PKW


def panels_to_rows(x_PKW: Tensor, batch: int, seq: int) -> Tensor:
    """Rows [B, S, K] of token panels.

    Raises:
        FormatError: the panels do not belong to B x S positions.

    Example:
        >>> panels_to_rows(rows_to_panels(torch.randn(3, 17, 384)), 3, 17).shape
        torch.Size([3, 17, 384])
    """
    need_panels("x", x_PKW, batch, seq, x_PKW.shape[1] if x_PKW.dim() == 3 else 0)
    features = x_PKW.shape[1]
    y_BSK = torch.empty(batch, seq, features, dtype=torch.float32, device="cpu")
    plan = plan_panels_to_rows(batch, seq, features, threads=torch.get_num_threads())
    plan.run(x_PKW.data_ptr(), y_BSK.data_ptr())
    return y_BSK
