"""float32 panels as 8-bit integers with a scale per position, made anew for every batch.

Shapes: P panels, K features, W positions of a panel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import need_floats
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import Entry

# Elements that pay for waking one more thread: about ten microseconds of work.
GRAIN = 50_000


@dataclass(frozen=True)
class Quantised:
    """x = scale (code - 128) for every position: codes uint8 [P, K, W], scales float32 [P, W]."""

    codes_PKW: Tensor
    scales_PW: Tensor


@functools.cache
def _kernel() -> Entry:
    from gossamer.kernels.cpu import quantise_loops

    return quantise_loops.kernel()


def plan_quantise(*, panels: int, features: int, width: int, used: int | None = None, threads: int = 1) -> Launch:
    """Lay out float32 panels [P, K, W] -> codes and scales; `.run(x, codes, scales)` takes addresses.

    Symmetric: scale = max over K of |x| / 127, codes round(x / scale) + 128 in 1..255. A position with a number that is
    not finite gets the scale NaN, so that its results are NaN, too; vectors beyond `used` are left as they were.

    Example:
        >>> plan_quantise(panels=2, features=384, width=64).run(x.data_ptr(), codes.data_ptr(), scales.data_ptr())
    """
    vectors = -(-(width if used is None else used) // lanes())
    threads = max(1, min(threads, panels * vectors, panels * features * width // GRAIN))
    return launch(_kernel(), addresses=3, fixed=(panels, vectors, features, width), threads=threads)


def quantise_panels(x_PKW: Tensor, used: int | None = None) -> Quantised:
    """Quantise panels, position by position.

    Args:
        x_PKW: float32 [P, K, W], W a multiple of 64.
        used: positions of every panel that matter.

    Raises:
        FormatError: x is no float32 panels, or holds what is not finite and so has no scale.

    Example:
        >>> quantise_panels(torch.randn(2, 384, 64)).scales_PW.shape
        torch.Size([2, 64])
    """
    need_floats("x", x_PKW, "[P, K, W]", x_PKW.dim() == 3)
    panels, features, width = x_PKW.shape
    used = width if used is None else used
    if width % 64 or not 0 < used <= width:
        raise FormatError(
            f"8-bit panels are a multiple of 64 positions wide, of which 1..W are used; got {width}, {used}"
        )
    codes = torch.empty(panels, features, width, dtype=torch.uint8, device="cpu")
    scales = torch.zeros(panels, width, dtype=torch.float32, device="cpu")
    plan = plan_quantise(panels=panels, features=features, width=width, used=used, threads=torch.get_num_threads())
    plan.run(x_PKW.data_ptr(), codes.data_ptr(), scales.data_ptr())
    need_scales(scales[:, :used])
    return Quantised(codes, scales)


def need_scales(scales: Tensor) -> None:
    """Refuse scales that are not finite."""
    if not bool(scales.isfinite().all()):
        raise FormatError("a position of x has no finite scale: its numbers are NaN, infinite or too large to quantise")
