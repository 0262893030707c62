"""What the planners of image planes share: launches with addresses left out, bounds, and fair shares of work."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gossamer.kernels.cpu.bands import Bands, Part
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.threads import Entry

# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 500_000

_BOUNDS: dict[float, Tensor] = {}


def laid_out(
    entry: Entry,
    *,
    addresses: int,
    absent: int = 0,
    fixed: tuple[int, ...],
    threads: int,
    scratch_bytes: int = 0,
    holds: tuple[Tensor, ...] = (),
    bands: Bands | None = None,
) -> Launch:
    """`launch` of a kernel of which calls bring all addresses but the last, `absent` ones: those are 0."""
    fixed = (0,) * absent + fixed
    if bands is not None and absent:
        part = bands.part

        def shorter(first: int, last: int) -> Part:
            made = part(first, last)
            return replace(made, fixed=(0,) * absent + made.fixed, shifts=made.shifts[:addresses])

        bands = replace(bands, part=shorter)
    return launch(
        entry, addresses=addresses, fixed=fixed, threads=threads, scratch_bytes=scratch_bytes, holds=holds, bands=bands
    )


def _address(number: float) -> int:
    """Where a constant lies that kernels read by address; the same tensor for all threads, which lives on."""
    return _BOUNDS.setdefault(number, torch.full((16,), number, dtype=torch.float32, device="cpu")).data_ptr()


def zeros_at() -> int:
    """Address of sixteen zeros, for a missing bias."""
    return _address(0.0)


def bounds_of(activation: str) -> tuple[int, int, int]:
    """What a kernel applies in place afterwards, and the addresses of its bounds; UnknownName for another name."""
    from gossamer.kernels.cpu.conv_lanes import finish_of

    code, low, high = finish_of(activation)
    return code, _address(low), _address(high)


def shares(units: int, each: int, threads: int) -> tuple[int, int]:
    """Threads that `units` pieces of `each` multiply-adds pay for, and into how many tasks to cut them."""
    threads = max(1, min(threads, units, units * each // GRAIN))
    return threads, min(units, 1 if threads == 1 else 4 * threads)


def run_on(plan: Launch, x: Tensor, y: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Run a convolution's plan on these tensors."""
    more = () if residual is None else (residual.data_ptr(),)
    plan.run(x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), *more)
