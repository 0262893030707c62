"""Lottery tickets: train, cut the smallest weights, put the rest back to where they were early on, and train again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..attach.targets import find
from ..core.support import Support
from .cycles import Cycle, DenseRun, State, Train, choose_within, rules, shrinking, sparse_run


@dataclass(frozen=True)
class Ticket:
    """A sparse network that can be trained by itself.

    Args:
        supports: what each layer keeps, in the layout its weight is stored in.
        start: the model's state, dense, that training goes on from.
        first_step: the step that `start` is of. Unit: optimizer steps.
        cycles: the dense run and every sparse one after it.
    """

    supports: Mapping[str, Support]
    start: State
    first_step: int
    cycles: tuple[Cycle, ...]

    def train(self, model: nn.Module, train: Train, *, state: State | None = None) -> Cycle:
        """Train the ticket in `model` once more, or from another `state`, such as a new random start."""
        start, first = (self.start, self.first_step) if state is None else (state, 0)
        return sparse_run(model, train, self.supports, state=start, first_step=first)


def lottery_ticket(
    model: nn.Module,
    train: Train,
    *,
    density: float,
    rewind_to: int = 0,
    per_round: float = 0.2,
    method: str = "global_magnitude",
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> Ticket:
    """Iterative magnitude pruning with rewinding. The model ends as the trained ticket, its zeros in the weights.

    W ← train(W₀); then, round by round: m ← the largest (1−p) of |W| inside m; W ← train(m ⊙ W_k), from step k.

    Args:
        model: dense, at its start.
        train: `train(model, handle)` trains the model from step `handle.steps` to the end of the run and calls
            `handle.step()` after every optimizer step; what it returns is kept. It builds its own optimizer.
        density: fraction of the weights kept in the end, above 0 and below 1.
        rewind_to: k, the step that every round starts from again; 0 is the paper's, a few per cent of the run is what
            large networks need. Unit: optimizer steps.
        per_round: p, share of what is left that each round takes away.
        method: "global_magnitude" (one pool over the layers) or "magnitude" (each layer by itself).
        targets, skip: layers, as for `gossamer.attach`.

    Example:
        >>> ticket = lottery_ticket(model, train, density=0.2, rewind_to=100)  # doctest: +SKIP
        >>> [(c.density, c.result) for c in ticket.cycles]  # doctest: +SKIP

    Raises:
        BudgetError: the density is not between 0 and 1, or the dense run ended before step k.
        UnknownName: no such method.
        TargetError: no layer to prune, a method that goes by more than the weights, or train() never called
            handle.step().

    Reference: Frankle and Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635; rewinding to a later step from
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671.
    Departs from: output layers are pruned at half the rate in the paper's fully-connected networks; here a layer is
        pruned like the others or left out by `skip`.
    """
    found = find(model, tuple(targets), tuple(skip)).targets
    sparsifiers = rules(model, found, method, shrinking(density, per_round))
    dense = DenseRun(model, rewind_to)
    cycles, supports = [Cycle(1.0, train(model, dense))], None
    for sparsifier in sparsifiers:
        supports = choose_within(model, found, sparsifier, supports)
        cycles.append(sparse_run(model, train, supports, state=dense.noted(), first_step=rewind_to))
    assert supports is not None
    return Ticket(supports, dense.noted(), rewind_to, tuple(cycles))
