"""Where links go and come: one move of a support by drop and grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..core.dropgrow import DropGrow, Worth
from ..core.pattern import Pattern
from ..core.sparsifier import Stats, require_finite
from ..core.support import Support
from ..score import random, salt
from .targets import Target


def moved(
    policy: DropGrow,
    pattern: Pattern,
    held: Mapping[Target, Support],
    weight: Callable[[Target], Tensor],
    found: Mapping[Target, Stats],
    step: int,
) -> dict[Target, Support]:
    """The next support of every layer in `held`, by scores of its weight, of what training found, or by lot.

    Args:
        held: the supports of now, outputs first.
        weight: a layer's weight, outputs first.
        found: what the policy goes by beside the weight, see `DropGrow.evidence`; outputs first.
        step: optimizer steps taken; with the layer's name it is the salt of all lots.

    Raises:
        NonFiniteError: a score is NaN or infinite; the layer is named.
    """
    stats = {t: {**found[t], "salt": salt(f"{t.name}@{step}")} for t in held}
    drop = {t: policy.drop(weight(t), stats[t]) for t in held}
    grow = {t: _grown_by(policy)(weight(t), stats[t]) for t in held}
    for t in held:
        for scores in (drop[t], grow[t]):
            require_finite(scores, f"the score that is to move the support of layer {t.name!r}")
    if policy.across:
        return policy.move_across(held, drop, grow, pattern, step)  # type: ignore[arg-type, return-value]
    return {t: policy.move(held[t], drop[t], grow[t], pattern, step) for t in held}


def _grown_by(policy: DropGrow) -> Worth:
    """The score of links that could come in."""
    if callable(policy.grow):
        return policy.grow
    lots = random(policy.seed)
    ways: dict[str, Worth] = {
        "gradient": lambda _, stats: stats["gradient"].abs(),
        "momentum": lambda _, stats: stats["momentum"].abs(),
        "random": lots,
        "unfired": lambda w, stats: lots(w, stats) - stats["fired"].float(),  # lots lie below 1: these come last
    }
    return ways[policy.grow]
