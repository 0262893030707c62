"""Token panels: activations of a batch of sequences as [panels, features, 64], the layout of the runtime.

Shapes: B sequences, S positions, K features, P panels of W = 64 positions. Position p = b * padded(S) + s stands in
panel p // W, lane p % W; lanes beyond a sequence's end are padding.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gossamer.kernels.cpu.checks import need_floats

WIDTH = 64
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
