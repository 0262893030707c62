"""select: the winners of each pool. Everything sparse in gossamer comes out of this function."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .budget import Budget, resolve
from .errors import NonFiniteError
from .pattern import Pattern, units
from .pattern import pattern as read
from .support import Support


def select(
    scores: Tensor, pattern: str | Pattern, budget: Budget, *, within: Support | None = None, step: int = 0
) -> Support:
    """Keep the best units of each pool.

    Args:
        scores: any shape the pattern names; higher = kept; +inf = always first; unitless.
        pattern: who competes with whom; a name or an expression.
        budget: spent once per pool.
        within: only entries of this support may win (nested pools are two selects).
        step: where scheduled budgets stand. Unit: optimizer steps.

    Law: each pool keeps exactly min(k, eligible) units; ties go to the lower index.

    Example:
        >>> select(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), "2:4", Keep(2)).kept.tolist()
        [[False, True, True, False]]

    Raises:
        PatternError: the pattern does not fit the shape.
        NonFiniteError: a score is NaN, which has no rank; find where it came from.
    """
    pattern = read(pattern)
    u_RC = _ranked(scores, pattern, within)
    kept = pattern.merge(resolve(budget, step).choose(u_RC), scores.shape)
    return Support(kept if within is None else kept & within.kept)


def select_across(
    scores: Mapping[str, Tensor],
    pattern: str | Pattern,
    budget: Budget,
    *,
    within: Mapping[str, Support] | None = None,
    step: int = 0,
) -> dict[str, Support]:
    """One pool that spans several tensors: all their units compete together.

    Units of unequal size compete by their mean, so that a large block does not win by size alone.

    Args:
        scores: one tensor per name, each of a shape the pattern names.
        pattern: only its tied axes matter here; repeats and competitors all join the one pool.
        budget: spent once, over everything.
        within: an earlier support of each tensor; nothing outside it is kept.
        step: where scheduled budgets stand. Unit: optimizer steps.
    """
    pattern = read(pattern)
    inside = within or {}
    units_by_name = {n: _ranked(s, pattern, inside.get(n)) / pattern.pools(s.shape)[2] for n, s in scores.items()}
    pool_C = torch.cat([u.reshape(-1) for u in units_by_name.values()])
    won_C = resolve(budget, step).choose(pool_C[None])[0]
    won = dict(zip(units_by_name, won_C.split([u.numel() for u in units_by_name.values()])))
    chosen = {n: Support(pattern.merge(won[n].view_as(u), scores[n].shape)) for n, u in units_by_name.items()}
    return {n: s & inside[n] if n in inside else s for n, s in chosen.items()}


def _ranked(scores: Tensor, pattern: Pattern, within: Support | None) -> Tensor:
    if within is not None:
        scores = torch.where(within.kept, scores, -math.inf)
    u_RC = units(scores, pattern)
    # A data-dependent raise would break the graph; compiled callers check their inputs before.
    # A sum that is a number has no NaN in it, and costs a twentieth of looking for one.
    if not torch.compiler.is_compiling() and not bool(u_RC.sum().isfinite()) and bool(u_RC.isnan().any()):
        bad = int(scores.isnan().sum())
        raise NonFiniteError(f"{bad} of {scores.numel()} scores are NaN (shape {tuple(scores.shape)}); NaN has no rank")
    return u_RC
