"""Kernel patterns: convolution kernels that keep a few taps, by patterns from a small dictionary."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from gossamer.core import Density, Pattern, Sparsifier, Stats, Support, hard, method, select, select_from_dictionary
from gossamer.core.budget import Budget
from gossamer.core.errors import BudgetError
from gossamer.score import magnitude


@method("kernel_patterns", paper="arXiv:2001.00138")
def kernel_patterns(*, density: float = 0.3, taps: int = 4, patterns: int = 8, group: int = 1) -> Sparsifier:
    """Keep `taps` taps of a kernel, in one of a few patterns per layer, and the kernels that keep most |w|.

    The patterns are those that together keep most, see `gossamer.core.select_from_dictionary`. Where the density asks
    for more than `taps` of every kernel, all kernels stay and keep more taps. 1x1 convolutions and linear layers have
    kernels of one tap, and are pruned entry by entry. `pack` stores such layers as `KernelPatterns`, whose convolution
    loads a vector once for up to three taps that stand below each other.

    Args:
        density: fraction of weights kept, 0 to 1.
        taps: taps of every kept kernel, at least 1. Unit: weights.
        patterns: different patterns of a layer, at least 1.
        group: neighbouring filters that share kernels and patterns, at least 1.

    Raises:
        BudgetError: an option below 1, or density outside 0 to 1.

    Example:
        >>> w = torch.tensor([[9.0, 7.0, 1.0], [8.0, 6.0, 2.0], [2.0, 3.0, 1.0]]).view(1, 3, 3)  # one filter, 3 lines
        >>> kernel_patterns(density=0.45, taps=2, patterns=1).apply(w, {})[0][0].tolist()
        [[9.0, 7.0, 0.0], [8.0, 6.0, 0.0], [0.0, 0.0, 0.0]]

    Reference: Niu et al., PatDNN: Achieving Real-Time DNN Execution on Mobile Devices with Pattern-based Weight
        Pruning, arXiv:2001.00138. Groups of filters: Xu et al., SparseByteNN, arXiv:2310.19509.
    Departs from: written from the papers' descriptions. Theirs takes the patterns that kernels would most often choose
        for themselves, always with the centre, and trains with ADMM; ours maximises what is kept, one shot (train on
        with `gossamer.attach.hold`). Counts are exact.
    """
    if min(taps, patterns, group) < 1:
        raise BudgetError(
            f"taps, patterns and group are at least 1, got {taps}, {patterns} and {group}; try 4, 8 and 1"
        )
    return Sparsifier(
        score=magnitude,
        pattern=Pattern(f"([o] {{{group}}}) [i] {{...}}"),
        budget=Density(density),
        solve=partial(_solve, taps=taps, patterns=patterns, group=group),
        name="kernel_patterns",
    )


def _solve(
    w: Tensor, stats: Stats, kernels: Pattern, budget: Budget, *, taps: int, patterns: int, group: int
) -> tuple[Tensor, Support]:
    support = _choose(magnitude(w, stats), kernels, budget, taps, patterns, group)
    return hard(w, support), support


def _choose(scores: Tensor, kernels: Pattern, budget: Budget, taps: int, patterns: int, group: int) -> Support:
    size = math.prod(scores.shape[2:])
    if size == 1 or not isinstance(budget, Density):
        return select(scores, kernels, budget)
    keep = min(size, max(taps, math.ceil(float(budget.d) * size - 1e-9)))
    kept = Density(min(1.0, float(budget.d) * size / keep))
    each = partial(select_from_dictionary, scores, f"(o {{{group}}}) i [...]", keep, patterns)
    # Patterns for all kernels say which kernels stay; those then choose their patterns among themselves.
    return each(within=select(torch.where(each().kept, scores, 0), kernels, kept))
