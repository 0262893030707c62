"""Where links go and come: one move of a support by drop and grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..core.dropgrow import DropGrow
from ..core.pattern import Pattern
from ..core.sparsifier import require_finite
from ..core.support import Support
from ..score import random, salt
from .targets import Target


def moved(
    policy: DropGrow,
    pattern: Pattern,
    held: Mapping[Target, Support],
    weight: Callable[[Target], Tensor],
    gradients: Mapping[str, Tensor],
    step: int,
) -> dict[Target, Support]:
    """The next support of every layer in `held`, by scores of its weight, of its dense gradient, or by lot.

    Args:
        held: the supports of now, outputs first.
        weight: a layer's weight, outputs first.
        gradients: of the dense weights by layer name, in the layout they are stored in, where the policy grows by them.
        step: optimizer steps taken; with the layer's name it is the salt of all lots.

    Raises:
        NonFiniteError: a score is NaN or infinite; the layer is named.
    """
    lots = {t: {"salt": salt(f"{t.name}@{step}")} for t in held}
    drop = {t: policy.drop(weight(t), lots[t]) for t in held}
    grow = {t: _worth(policy, t, weight, gradients, lots[t]) for t in held}
    for t in held:
        for scores in (drop[t], grow[t]):
            require_finite(scores, f"the score that is to move the support of layer {t.name!r}")
    if policy.across:
        return policy.move_across(held, drop, grow, pattern, step)  # type: ignore[arg-type, return-value]
    return {t: policy.move(held[t], drop[t], grow[t], pattern, step) for t in held}


def _worth(
    policy: DropGrow,
    target: Target,
    weight: Callable[[Target], Tensor],
    gradients: Mapping[str, Tensor],
    lot: Mapping[str, Tensor],
) -> Tensor:
    """Of links that could come in."""
    if policy.grow == "gradient":
        return target.turned(gradients[target.name]).abs()
    score = random(policy.seed) if policy.grow == "random" else policy.grow
    assert not isinstance(score, str)
    return score(weight(target), lot)
