"""Dictionary: pools that may use only a few different supports, such as the tap patterns of convolution kernels.

Shapes: R pools, C competitors, N candidate supports, P supports of the dictionary.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .errors import BudgetError, NonFiniteError
from .pattern import Pattern, units
from .pattern import pattern as read
from .support import Support

CANDIDATES = 512  # all supports of 4 out of 9 are 126
POOLS = 1 << 14  # a dictionary is chosen on at most so many pools, evenly spaced
SWEEPS = 8


def select_from_dictionary(
    scores: Tensor, pattern: str | Pattern, keep: int, patterns: int, *, within: Support | None = None
) -> Support:
    """Keep `keep` units of each pool, all pools together using at most `patterns` different supports.

    Maximises Σ_r max_p Σ_{c in p} u_rc over dictionaries {p}: greedily, which reaches 1 - 1/e of the best or more where
    scores are not negative, then by exchanging single supports while that helps. Candidates are all supports of that
    size where they are at most 512, else the 512 that pools would most often choose for themselves.

    Args:
        scores: any shape the pattern names; higher = kept; finite; unitless.
        pattern: each pool's support comes from the dictionary: "o i [h w]" gives every kernel a pattern of taps,
            "(o {4}) i [h w]" every four neighbouring filters the same one.
        keep: units of every support, 1 to C.
        patterns: how many supports the dictionary holds, at least 1.
        within: only entries of this support may win: whole pools that lie outside keep nothing.

    Example:
        >>> s = torch.tensor([[9.0, 8.0, 1.0], [7.0, 9.0, 2.0], [1.0, 8.0, 9.0]])
        >>> select_from_dictionary(s, "r [c]", 2, 1).kept.int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 0]]

    Raises:
        PatternError: the pattern does not fit the shape.
        BudgetError: keep or patterns is out of range.
        NonFiniteError: a score is NaN or infinite; supports are compared by sums.
    """
    who = read(pattern)
    if not bool(scores.isfinite().all()):
        raise NonFiniteError(f"scores of shape {tuple(scores.shape)} are not all finite, so their sums have no rank")
    u_RC = units(scores if within is None else torch.where(within.kept, scores, 0), who)
    if not 1 <= keep <= u_RC.shape[1] or patterns < 1:
        raise BudgetError(
            f"pools of {u_RC.shape[1]} keep 1 to {u_RC.shape[1]} units by 1 or more patterns, "
            f"got keep={keep}, patterns={patterns}"
        )
    sets_PC = dictionary(u_RC, keep, patterns)
    chosen_RC = sets_PC[(u_RC @ sets_PC.to(u_RC.dtype).t()).argmax(1)]
    support = Support(who.merge(chosen_RC, scores.shape))
    return support if within is None else support & within


def dictionary(u_RC: Tensor, keep: int, patterns: int) -> Tensor:
    """The supports of `keep` units that serve all pools best when each takes the one it likes most: bool [P, C].

    Example:
        >>> dictionary(torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), 2, 2).int().tolist()
        [[1, 1, 0], [0, 1, 1]]
    """
    u_RC = u_RC[:: max(1, -(-len(u_RC) // POOLS))]
    sets_NC = _candidates(u_RC, keep)
    worth_RN = u_RC @ sets_NC.to(u_RC.dtype).t()
    chosen: list[int] = []
    for _ in range(min(patterns, len(sets_NC))):
        chosen.append(_best_beside(worth_RN, chosen)[0])
    for _ in range(SWEEPS):
        if not _exchange(worth_RN, chosen):
            break
    return sets_NC[list(dict.fromkeys(chosen))]


def _candidates(u_RC: Tensor, keep: int) -> Tensor:
    """Supports to choose from: bool [N, C]."""
    competitors = u_RC.shape[1]
    if math.comb(competitors, keep) <= CANDIDATES:
        members = torch.tensor(list(itertools.combinations(range(competitors), keep)), device=u_RC.device)
        empty = torch.zeros(len(members), competitors, dtype=torch.bool, device=u_RC.device)
        return empty.scatter_(1, members, True)
    own_RC = torch.zeros_like(u_RC, dtype=torch.bool).scatter_(1, u_RC.topk(keep).indices, True)
    sets_NC, counts_N = own_RC.unique(dim=0, return_counts=True)
    return sets_NC[counts_N.argsort(descending=True, stable=True)[:CANDIDATES]]


def _best_beside(worth_RN: Tensor, others: list[int]) -> tuple[int, float]:
    """The candidate that adds most to these, and what all pools then keep."""
    if not others:
        total_N = worth_RN.sum(0)
    else:
        total_N = torch.maximum(worth_RN, worth_RN[:, others].amax(1, keepdim=True)).sum(0)
    best = int(total_N.argmax())
    return best, float(total_N[best])


def _exchange(worth_RN: Tensor, chosen: list[int]) -> bool:
    """Replace every support by the best one beside the rest; whether that helped."""
    before = float(worth_RN[:, chosen].amax(1).sum())
    now = before
    for place in range(len(chosen)):
        others = chosen[:place] + chosen[place + 1 :]
        best, total = _best_beside(worth_RN, others)
        if total > now * (1 + 1e-6) + 1e-12:
            chosen[place], now = best, total
    return now > before
