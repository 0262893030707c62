"""Shrink rules: what becomes of the values once the support is known, and of their gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BudgetError
from .support import Support

Shrink = Callable[[Tensor, Support], Tensor]


def hard(w: Tensor, support: Support) -> Tensor:
    """w on the support, exactly 0 off it (a NaN off the support does not leak: it is replaced, not multiplied)."""
    return torch.where(support.kept, w, torch.zeros((), dtype=w.dtype, device=w.device))


@dataclass(frozen=True)
class Soft:
    """sign(w)·max(|w| − tau, 0) on the support, 0 off it: the proximal step of tau·‖w‖₁. tau is in units of w."""

    tau: float

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise BudgetError(f"soft(tau) needs tau >= 0, got {self.tau}")

    def __call__(self, w: Tensor, support: Support) -> Tensor:
        return hard(w.sign() * (w.abs() - self.tau).clamp(min=0), support)


def soft(tau: float) -> Soft:
    """Soft threshold: sign(w)·max(|w| − tau, 0)."""
    return Soft(tau)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept, w, torch.zeros((), dtype=w.dtype, device=w.device))

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(w: Tensor, support: Support) -> Tensor:
    """Forward as `hard`; backward as if nothing had been cut, so pruned weights keep learning. arXiv:1308.3432."""
    return _StraightThrough.apply(w, support.kept)
