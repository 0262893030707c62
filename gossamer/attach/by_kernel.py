"""What masks ask of the CPU kernels in every step: whether they can serve, and zeros off a support."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from ..core import cut

_log = logging.getLogger("gossamer")
SMALL = 2**16  # entries below which torch takes microseconds, too


@functools.cache
def refusal() -> str | None:
    """Why no kernel serves here, found out once and logged; None if they do."""
    from ..kernels.cpu.trial import cannot_compile

    if reason := cannot_compile():
        _log.info("torch chooses supports and sets zeros, not kernels: %s", reason)
    return reason


def _cut(form: str, x: Tensor, kept: Tensor, y: Tensor, factor: float = 0.0) -> bool:
    if x.numel() < SMALL or refusal():
        return False
    from ..kernels.cpu.cutting import cut_by_kernel

    return cut_by_kernel(form, x, kept, y, factor)


cut.ask_first(_cut)
