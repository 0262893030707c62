"""Sparse model soups: retrain one pruned network several times, average, prune the average further, and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..attach.targets import find
from ..core.errors import BudgetError
from ..core.support import Support
from .batch_norm import reestimate_batch_norms
from .cycles import State, choose_within, copied, rules, sparse_run

Evaluate = Callable[[nn.Module], float]
TrainMember = Callable[[nn.Module, object, int], object]


@dataclass(frozen=True)
class Phase:
    """One round of pruning, retraining and averaging.

    Args:
        density: fraction of the layers' weights kept.
        results: what `train` returned, by member.
        values: what `evaluate` gave each member, and the soup last; empty without it.
        chosen: the members that are in the soup.
    """

    density: float
    results: tuple[object, ...]
    values: tuple[float, ...]
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class Soup:
    """supports: what every layer keeps, in the layout its weight is stored in."""

    supports: Mapping[str, Support]
    phases: tuple[Phase, ...]


def sparse_soup(
    model: nn.Module,
    train: TrainMember,
    *,
    density: float,
    phases: int = 3,
    members: int = 3,
    average: str = "uniform",
    evaluate: Evaluate | None = None,
    recalibrate: Iterable[object] = (),
    method: str = "global_magnitude",
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> Soup:
    """Prune a trained model in phases; each retrains several members and goes on from their average. In place.

    Phase i keeps density^(i/phases). All members start from the same weights under the same support, so that their
    average, W = Σ Wₖ/n, is exactly as sparse as they are.

    Args:
        model: trained, dense.
        train: `train(model, handle, member)` retrains, calls `handle.step()` after every optimizer step, and lets
            something depend on the member 0, 1, ...: batch order, weight decay, length.
        density: fraction kept in the end, above 0 and below 1.
        average: "uniform", or "greedy": members join from the best down while the value does not fall.
        evaluate: model → value on held-out data, higher is better; "greedy" needs it.
        recalibrate: batches to take statistics of batch norms from, once per average; see `reestimate_batch_norms`.
        method: "global_magnitude" or "magnitude".
        targets, skip: layers, as for `gossamer.attach`.

    Example:
        >>> soup = sparse_soup(model, train, density=0.1, evaluate=accuracy)  # doctest: +SKIP
        >>> soup.phases[-1].values  # members, then the soup  # doctest: +SKIP

    Raises:
        BudgetError: the density is not between 0 and 1, fewer than one phase or member, an unknown average.
        UnknownName: no such method.
        TargetError: no layer to prune, or a method that goes by more than the weights.

    Reference: Zimmer, Spiegel and Pokutta, Sparse Model Soups, arXiv:2306.16788.
    """
    _check(density, phases, members, average, evaluate)
    found = find(model, tuple(targets), tuple(skip)).targets
    sparsifiers = rules(model, found, method, [density ** (phase / phases) for phase in range(1, phases + 1)])
    batches, supports, held = list(recalibrate), None, []
    for sparsifier in sparsifiers:
        supports = choose_within(model, found, sparsifier, supports)
        retrained = _retrain(model, train, supports, members, evaluate)
        stir = partial(_stir, model, retrained.states, batches)
        chosen = _greedy(stir, retrained.values, evaluate) if average == "greedy" else tuple(range(members))
        stir(chosen)
        values = (*retrained.values, evaluate(model)) if evaluate else ()
        held.append(Phase(retrained.density, retrained.results, values, chosen))
    assert supports is not None
    return Soup(supports, tuple(held))


@dataclass(frozen=True)
class _Members:
    """What one phase's training runs left."""

    density: float
    states: tuple[State, ...]
    results: tuple[object, ...]
    values: tuple[float, ...]


def _retrain(
    model: nn.Module, train: TrainMember, supports: Mapping[str, Support], members: int, evaluate: Evaluate | None
) -> _Members:
    """All members of a phase, each from the weights that the model has now."""
    start, states, runs, values = copied(model), [], [], []
    for member in range(members):
        runs.append(sparse_run(model, partial(_with, train, member), supports, state=start))
        states.append(copied(model))
        values += [evaluate(model)] if evaluate else []
    return _Members(runs[0].density, tuple(states), tuple(r.result for r in runs), tuple(values))


def mean_state(states: Sequence[State]) -> State:
    """Mean of every floating tensor, summed in float32 at least; counters are the first state's."""
    first = states[0]
    return {n: _mean([s[n] for s in states]) if v.is_floating_point() else v.clone() for n, v in first.items()}


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    wide = torch.promote_types(values[0].dtype, torch.float32)
    return torch.stack([v.to(wide) for v in values]).mean(0).to(values[0].dtype)


def _with(train: TrainMember, member: int, model: nn.Module, handle: object) -> object:
    return train(model, handle, member)


def _stir(model: nn.Module, states: Sequence[State], batches: Sequence[object], chosen: Sequence[int]) -> nn.Module:
    model.load_state_dict(mean_state([states[k] for k in chosen]))
    return reestimate_batch_norms(model, batches) if batches else model


def _greedy(
    stir: Callable[[Sequence[int]], nn.Module], values: Sequence[float], evaluate: Evaluate | None
) -> tuple[int, ...]:
    """Members from the best down; one stays if the soup is worth no less with it than without."""
    assert evaluate is not None
    ranked = sorted(range(len(values)), key=lambda k: -values[k])
    chosen, best = ranked[:1], values[ranked[0]]
    for k in ranked[1:]:
        value = evaluate(stir([*chosen, k]))
        if value >= best:
            chosen, best = [*chosen, k], value
    return tuple(chosen)


def _check(density: float, phases: int, members: int, average: str, evaluate: Evaluate | None) -> None:
    if not 0.0 < density < 1.0:
        raise BudgetError(f"density is the fraction kept in the end, above 0 and below 1, got {density:g}")
    if phases < 1 or members < 1:
        raise BudgetError(f"a soup needs phases >= 1 and members >= 1, got {phases} and {members}")
    if average not in ("uniform", "greedy"):
        raise BudgetError(f"average is 'uniform' or 'greedy', got {average!r}")
    if average == "greedy" and evaluate is None:
        raise BudgetError("a greedy soup adds a member where the value does not fall; pass evaluate=")
