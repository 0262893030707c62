"""The first support of methods that look at the whole model before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.budget import Density
from ..core.errors import BudgetError, CalibrationError
from ..core.sparsifier import Sparsifier, require_finite
from ..core.support import Support
from ..score import Trial, salt
from .targets import Target

Supports = dict[Target, Support]


def first_supports(
    model: nn.Module,
    targets: Sequence[Target],
    sparsifier: Sparsifier,
    per_layer: Mapping[str, Sparsifier],
    trial: Trial | None,
) -> Supports:
    """Probe the model if need be, choose, and again within what was chosen, as many rounds as the sparsifier asks for.

    The model is left as it was: in each round the pruned weights only stand for its own.

    Args:
        per_layer: the sparsifier of each layer, where they do not compete in one pool.
        trial: data and loss for the probe, if the sparsifier has one.

    Returns:
        A support for each target, outputs first.

    Raises:
        CalibrationError: no data, or the model fails on them.
        NonFiniteError: a weight or a statistic is NaN or infinite; the layer is named.
        BudgetError: several rounds of a pattern that fixes its density, as 2:4 does.
    """
    if sparsifier.probe and trial is None:
        raise CalibrationError(f"method {sparsifier.name!r} tries the model out first; pass data= (and loss=)")
    if sparsifier.rounds > 1 and (sparsifier.regroup or not isinstance(sparsifier.budget, Density)):
        raise BudgetError(
            f"{sparsifier.name!r} chooses in {sparsifier.rounds} rounds of falling density, which regrouped rows and "
            f"fixed counts (pattern {str(sparsifier.pattern)!r}) do not have; use rounds=1 or another pattern"
        )
    held: Supports = {}
    for done in range(1, sparsifier.rounds + 1):
        share = done / sparsifier.rounds
        scores = _scores(model, targets, sparsifier, held, trial)
        if sparsifier.scope == "model":
            held = _at(sparsifier, share).choose_across(scores, within=held or None)  # type: ignore[arg-type, assignment]
        else:
            held = {t: _at(per_layer[t.name], share).choose(s, within=held.get(t)) for t, s in scores.items()}
    return held


def _at(sparsifier: Sparsifier, share: float) -> Sparsifier:
    """The sparsifier with a density that falls from 1 to its own as share rises from 0 to 1."""
    return sparsifier if share == 1.0 else sparsifier.at_density(sparsifier.final_density() ** share)


def _scores(
    model: nn.Module, targets: Sequence[Target], sparsifier: Sparsifier, held: Supports, trial: Trial | None
) -> dict[Target, Tensor]:
    """Worth of every entry in the model as pruned so far."""
    weights = {t: t.weight(model).detach() for t in targets}
    for t, w in weights.items():
        require_finite(w, f"the weight of layer {t.name!r}")
    if held:
        weights = {t: torch.where(held[t].kept, w, 0) for t, w in weights.items()}
    found = _probed(model, weights, sparsifier, trial)
    return {t: sparsifier.score(w, {**found.get(t, {}), "salt": salt(t.name)}) for t, w in weights.items()}


def _probed(
    model: nn.Module, weights: Mapping[Target, Tensor], sparsifier: Sparsifier, trial: Trial | None
) -> dict[Target, dict[str, Tensor]]:
    if sparsifier.probe is None:
        return {}
    found = sparsifier.probe(model, {t.parameter: t.turned(w) for t, w in weights.items()}, trial)
    stats = {t: {name: t.turned(x) for name, x in found[t.parameter].items()} for t in weights}
    for t, of_layer in stats.items():
        for name, x in of_layer.items():
            require_finite(x, f"the {name} of layer {t.name!r}")
    return stats
