"""Shrink rules: what becomes of the values once the support is known, and of their gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cut import cut, faded
from .errors import BudgetError
from .schedule import Schedule, Step, at
from .support import Support

Shrink = Callable[[Tensor, Support], Tensor]


def hard(w: Tensor, support: Support) -> Tensor:
    """w on the support, exactly 0 off it (a NaN off the support does not leak: it is replaced, not multiplied)."""
    return cut(w, support.kept)


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


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, kept: Tensor, fade: Tensor | float) -> Tensor:
        # A number is known to be 0 beforehand; a tensor may become 0 later in a compiled graph.
        return faded(w, kept, fade) if isinstance(fade, Tensor) or fade else cut(w, kept)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0], None, None


@dataclass(frozen=True)
class StraightThrough:
    """w on the support, fade·w off it; backward as if nothing had been cut, so pruned weights keep learning.

    Args:
        fade: β, what is left of a pruned weight in the forward pass, 0 to 1, or a schedule of it.
        pull: λ >= 0. A handle adds λ·(1 − m)⊙w to the gradient once per optimizer step, which draws pruned weights
            to 0 and so steadies the support (SR-STE). It is no part of the backward pass: accumulated batches, tied
            weights and scaled losses would count it several times.

    Raises:
        BudgetError: fade is not between 0 and 1, or pull is negative.

    Reference: Bengio et al., arXiv:1308.3432.
    """

    fade: float | Schedule = 0.0
    pull: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.fade) and not 0.0 <= self.fade <= 1.0:
            raise BudgetError(f"fade is what is left of a pruned weight, from 0 to 1, got {self.fade}")
        if self.pull < 0:
            raise BudgetError(f"pull draws pruned weights to 0, so pull >= 0, got {self.pull}; try 2e-4")

    def __call__(self, w: Tensor, support: Support, fade: Tensor | None = None) -> Tensor:
        """`fade` as a tensor where a schedule sets it, so that a compiled graph stays as it is."""
        return _Through.apply(w, support.kept, at(self.fade, 0) if fade is None else fade)

    def at(self, step: int) -> StraightThrough:
        """The rule as it stands after `step` optimizer steps."""
        return replace(self, fade=at(self.fade, step))


straight_through = StraightThrough()


@dataclass(frozen=True)
class Attenuate:
    """Shrink by a share: after every optimizer step w on the support and ratio·w off it; from the cut on 0 off it.

    Before the cut the forward pass sees all weights as they stand and all of them learn, so a weight that matters after
    all grows back; a pruned one without a gradient falls to ratio^t of itself.

    Args:
        ratio: α, what one step leaves of a pruned weight, 0 to 1.
        until: step of the cut, at least 1. Unit: optimizer steps.

    Raises:
        BudgetError: a field is out of range.

    Reference: Wang et al., Iterative Soft Shrinkage, arXiv:2303.09650.
    """

    ratio: float = 0.95
    until: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise BudgetError(f"ratio is what a step leaves of a pruned weight, from 0 to 1, got {self.ratio}")
        if self.until < 1:
            raise BudgetError(f"pruned weights shrink for a step or more, got until={self.until}")

    def __call__(self, w: Tensor, support: Support, fade: Tensor | None = None) -> Tensor:
        """What a step makes of w; with `fade`, 1 or 0, what the forward pass sees before or after the cut."""
        if fade is None:
            return torch.where(support.kept, w, w * self.ratio)
        return cut(w, support.kept | (fade > 0))

    def at(self, step: int) -> Shrink:
        """The rule as it stands after `step` optimizer steps."""
        return self if step < self.until else hard

    @property
    def fade(self) -> Schedule:
        """What the forward pass leaves of a pruned weight."""
        return Step(1.0, ((self.until, 0.0),))


def fade_of(shrink: Shrink) -> float | Schedule:
    """What is left of a pruned weight in the forward pass: a number, or a schedule of it."""
    return shrink.fade if isinstance(shrink, StraightThrough | Attenuate) else 0.0
