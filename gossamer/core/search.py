"""Search: weights stay as they are, and what learns is how much each is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import top
from .errors import BudgetError, PatternError
from .pattern import Pattern, units
from .schedule import Schedule, at
from .support import Support


@dataclass(frozen=True)
class Search:
    """A score s of every weight is trained in the weight's place; the support is drawn towards the best scores.

    The forward pass sees m⊙w; the gradient goes straight through the mask: ∂L/∂s = w⊙∂L/∂(m⊙w). Scores start at 1
    where the support is, at 1 − gap elsewhere. Where n entries of a layer would have to be exchanged for m to hold its
    best scores, the ⌈r·n⌉ best of those outside change places with the ⌈r·n⌉ worst of those inside.

    Args:
        swap: r, in [0, 1], or a schedule of it.
        gap: by how much the scores of what is kept lead at the start, at least 0.

    Raises:
        BudgetError: a field is out of range.

    Example:
        >>> rule, s = Search(swap=0.5), torch.tensor([[0.2, 0.1, 0.9, 0.8]])
        >>> rule.move(Support(torch.tensor([[True, True, False, False]])), s, Pattern("[...]"), 1).kept.tolist()
        [[True, False, True, False]]

    Reference: Zhang et al., Lottery Jackpots Exist in Pre-trained Models, arXiv:2104.08700.
    """

    swap: float | Schedule = 1.0
    gap: float = 0.01

    def __post_init__(self) -> None:
        if not callable(self.swap) and not 0.0 <= self.swap <= 1.0:
            raise BudgetError(f"the share that may change places is between 0 and 1, got {self.swap}")
        if self.gap < 0:
            raise BudgetError(
                f"what is kept starts ahead of the rest, so gap >= 0, got {self.gap}; the paper's is 0.01"
            )

    def start(self, support: Support, like: Tensor) -> Tensor:
        """The first scores, in the shape and type of `like`."""
        return torch.where(support.kept, torch.ones_like(like), 1.0 - self.gap)

    def move(self, support: Support, scores: Tensor, pattern: Pattern, step: int) -> Support:
        """The next support of one layer, with as many entries.

        Raises:
            PatternError: the pattern has several pools.
        """
        refuse_pools(pattern, support.shape)
        (kept_C,), (s_C,) = pattern.split(support.kept)[..., 0], units(scores, pattern)
        best_C = top(s_C[None], int(kept_C.sum()))[0]
        coming, going = (best_C & ~kept_C).nonzero()[:, 0], (kept_C & ~best_C).nonzero()[:, 0]
        number = math.ceil(at(self.swap, step) * len(coming))
        new_C = kept_C.clone()
        new_C[coming[s_C[coming].argsort(descending=True, stable=True)[:number]]] = True
        new_C[going[s_C[going].argsort(stable=True)[:number]]] = False
        return Support(pattern.merge(new_C[None], support.shape))


def refuse_pools(pattern: Pattern, shape: Sequence[int]) -> None:
    """Raise unless all of a layer competes.

    Raises:
        PatternError: the pattern has several pools, each of which would exchange entries of its own.
    """
    if pattern.pools(shape)[0] != 1:
        raise PatternError(
            f"a search exchanges entries over the whole layer, but pattern {pattern.expr!r} has pools of its own; "
            "use 'unstructured', 'filter' or blocks"
        )


class _Searched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s: Tensor, w: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return torch.where(kept, w, torch.zeros((), dtype=w.dtype, device=w.device))

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return grad_outputs[0] * w, None, None


def searched(s: Tensor, w: Tensor, support: Support) -> Tensor:
    """w on the support and 0 off it; all scores s get w⊙ the gradient of that."""
    return _Searched.apply(s, w, support.kept)
