"""Explore: entries beside the support that learn while they are not used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cut import cut
from .errors import BudgetError
from .support import Support


@dataclass(frozen=True)
class Explore:
    """The forward pass sees the support A; the gradient reaches a wider support B, by the same scores.

    Args:
        density: fraction of entries in B, above the support's own and up to 1. Where layers differ in density, their B
            are wider than their A by the same factor. What is kept always learns, so B is wider still where rows are
            regrouped for each.
        penalty: λ >= 0 of ½·λ·Σ_A w² + ½·(λ/D)·Σ_{B∖A} w², D the layer's density: explored weights must earn more.

    Raises:
        BudgetError: a field is out of range.

    Reference: Jayakumar et al., Top-KAST, arXiv:2106.03517.
    """

    density: float
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.density <= 1.0:
            raise BudgetError(f"the fraction of weights that learn is between 0 and 1, got {self.density}")
        if self.penalty < 0:
            raise BudgetError(f"a penalty draws weights to 0, so it is at least 0, got {self.penalty}")


class _Explored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, kept: Tensor, learning: Tensor) -> Tensor:
        ctx.save_for_backward(learning)
        return cut(w, kept)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (learning,) = ctx.saved_tensors
        return cut(grad_outputs[0], learning), None, None


def explored(w: Tensor, support: Support, learning: Support) -> Tensor:
    """w on the support and 0 off it; the gradient reaches `learning`, which holds the support and more."""
    return _Explored.apply(w, support.kept, learning.kept)
