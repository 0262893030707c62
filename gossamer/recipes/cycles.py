"""Train, prune, rewind, train again: the loop under iterative magnitude pruning, lottery tickets and soups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attach.fit import refuse_misfits
from ..attach.handle import Handle
from ..attach.targets import Target
from ..attach.weights import hold
from ..core.errors import BudgetError, TargetError
from ..core.policy import OneShot
from ..core.registry import get_method
from ..core.sparsifier import Sparsifier, Stats, require_finite
from ..core.support import Support

State = dict[str, Tensor]
Train = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class Cycle:
    """One training run among several. density: kept while it ran; result: what `train` returned."""

    density: float
    result: object


class DenseRun:
    """What `train` gets in place of a handle while nothing is pruned: it counts steps and notes the state to rewind to.

    Args:
        rewind_to: the step whose state is wanted, 0 or later. Unit: optimizer steps.

    Raises:
        BudgetError: rewind_to is below 0.
    """

    def __init__(self, model: nn.Module, rewind_to: int) -> None:
        if rewind_to < 0:
            raise BudgetError(f"rewind_to counts optimizer steps from 0 on, got {rewind_to}")
        self.model, self.rewind_to, self.steps = model, rewind_to, 0
        self.state: State | None = copied(model) if rewind_to == 0 else None

    def step(self) -> None:
        """One optimizer step has been taken."""
        self.steps += 1
        if self.steps == self.rewind_to:
            self.state = copied(self.model)

    def noted(self) -> State:
        """The state of the model at the step to rewind to.

        Raises:
            BudgetError: the run ended before that step.
        """
        if self.state is None:
            raise BudgetError(
                f"the dense run took {self.steps} steps, so there is no state of step {self.rewind_to} to rewind to; "
                "call handle.step() after every optimizer step, or give a smaller rewind_to"
            )
        return self.state


def shrinking(density: float, per_round: float) -> tuple[float, ...]:
    """Densities that fall by the share `per_round` of what is left, down to `density` exactly.

    Example:
        >>> shrinking(0.5, 0.2)
        (0.8, 0.64, 0.512, 0.5)

    Raises:
        BudgetError: density is not between 0 and 1, or per_round is not.
    """
    if not 0.0 < density < 1.0 or not 0.0 < per_round < 1.0:
        raise BudgetError(f"give a density and a per_round between 0 and 1, got {density:g} and {per_round:g}")
    rounds = math.ceil(math.log(density) / math.log(1.0 - per_round) - 1e-9)
    return (*(round((1.0 - per_round) ** r, 12) for r in range(1, rounds)), density)


def rules(
    model: nn.Module, targets: Sequence[Target], method: str, densities: Sequence[float]
) -> tuple[Sparsifier, ...]:
    """The method at each density, built before anything is trained.

    Raises:
        UnknownName: there is no such method.
        TargetError: it goes by more than the weights, or chooses while the model trains.
        PatternError: a layer does not fit its pattern.
    """
    found = get_method(method)
    made = tuple(found(density=d) for d in densities) if found.needs_density_alone else ()
    if not made or made[0].needs or made[0].solve or made[0].probe or not isinstance(made[0].policy, OneShot):
        raise TargetError(
            f"the loop cuts once between two runs, by the weights alone, which method {method!r} does not; use "
            "'global_magnitude' or 'magnitude'"
        )
    refuse_misfits(model, made[0], targets)
    return made


def choose_within(
    model: nn.Module,
    targets: Sequence[Target],
    sparsifier: Sparsifier,
    within: Mapping[str, Support] | None = None,
    stats: Mapping[str, Stats] | None = None,
) -> dict[str, Support]:
    """The support of every layer by its weights of now, in the layout they are stored in, inside earlier supports.

    Args:
        stats: of each layer by name, outputs first, where the sparsifier's score goes by more than the weights.
    """
    weights = {t.name: t.weight(model).detach() for t in targets}
    for name, w in weights.items():
        require_finite(w, f"the weight of layer {name!r}")
    scores = {n: sparsifier.score(w, (stats or {}).get(n, {})) for n, w in weights.items()}
    turned = lambda t, support: Support(t.turned(support.kept))
    before = {t.name: turned(t, within[t.name]) for t in targets} if within else None
    if sparsifier.scope == "model":
        won = sparsifier.choose_across(scores, within=before)
    else:
        won = {n: sparsifier.choose(s, within=before and before[n]) for n, s in scores.items()}
    return {t.name: turned(t, won[t.name]) for t in targets}


def sparse_run(
    model: nn.Module, train: Train, supports: Mapping[str, Support], *, state: State | None = None, first_step: int = 0
) -> Cycle:
    """One run of `train` under fixed supports, from `state` and `first_step`; leaves the zeros in the weights."""
    if state is not None:
        model.load_state_dict(state)
    handle = hold(model, supports=supports)
    handle.steps = first_step
    try:
        result = train(model, handle)
        return Cycle(handle.density, _of_this_run(result, handle, first_step))
    finally:
        handle.remove()


def _of_this_run(result: object, handle: Handle, first_step: int) -> object:
    if handle.steps == first_step:
        raise TargetError("train() called handle.step() not once; call it after every optimizer.step()")
    return result


def copied(model: nn.Module) -> State:
    """A copy of the model's state, of which later training changes nothing."""
    with torch.no_grad():
        return {n: v.detach().clone() for n, v in model.state_dict().items()}
