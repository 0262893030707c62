"""Group lasso: a group is kept or goes as a whole.

Shape suffixes: R pools, C competitors, T tied entries of a pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import BudgetError
from ..core.pattern import Pattern
from ..core.pattern import pattern as read


@dataclass(frozen=True)
class Group:
    """λ·Σ_g ‖x_g‖₂, and its proximal step: x_g ← max(1 − t·λ/‖x_g‖₂, 0)·x_g.

    Entries that a pattern ties share a fate, so they are a group: "filter" makes each output's weights one. A group may
    also be several whole tensors, given as a list; it then has one norm over all of them. Groups of norms below t·λ
    become exactly zero, which steps along the value's gradient do not reach.

    Args:
        strength: λ, at least 0.
        pattern: what is tied is a group; "[o] {...}" (one per output) unless given. Not used for lists of tensors.

    Example:
        >>> rows = Group(strength=1.0)
        >>> x = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> rows.value(x).item(), rows.prox(x).tolist()
        (5.5, [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]])

    Raises:
        BudgetError: λ or t is negative.
        PatternError: the pattern does not fit the tensor.

    Reference: Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, J. R. Stat. Soc. B 68,
        2006. Departs from: no weight √(size of the group).
    """

    strength: float = 1.0
    pattern: str | Pattern = "filter"

    def __post_init__(self) -> None:
        _at_least_zero("strength", self.strength)

    def value(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """λ·Σ_g ‖x_g‖₂, a scalar. Its gradient at a group of zeros is 0."""
        return self.strength * (self._norms(x).sum() if isinstance(x, Tensor) else _norm(x))

    def prox(self, x: Tensor | Sequence[Tensor], step: float = 1.0) -> Tensor | list[Tensor]:
        """The minimiser z of ½‖z − x‖² + t·λ·Σ_g ‖z_g‖₂: new tensors of the shapes of x.

        Args:
            step: t, at least 0; the learning rate, after a step of gradient descent.
        """
        limit = _at_least_zero("step", step) * self.strength
        if isinstance(x, Tensor):
            return x * read(self.pattern).merge(_left(self._norms(x), limit), x.shape).to(x.dtype)
        left = _left(_norm(x), limit)
        return [part * left.to(part.dtype) for part in x]

    def _norms(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(read(self.pattern).split(x), dim=-1)  # R C


def _norm(parts: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))


def _left(norm: Tensor, limit: float) -> Tensor:
    """1 − limit/norm where the norm is larger, else exactly 0; 1 at limit 0, also for a norm of 0."""
    return torch.where(norm > limit, 1 - limit / norm, torch.zeros_like(norm)) if limit else torch.ones_like(norm)


def _at_least_zero(name: str, value: float) -> float:
    if not value >= 0:
        raise BudgetError(f"{name} is a number of at least 0, got {value}")
    return value
