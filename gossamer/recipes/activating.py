"""AP: iterative magnitude pruning that leaves a small part of each cut to negative weights which barely learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attach.targets import find
from ..core.errors import BudgetError
from ..core.sparsifier import Stats
from .cycles import Cycle, DenseRun, Train, choose_within, rules, shrinking, sparse_run
from .lottery_ticket import Ticket


def activating_ticket(
    model: nn.Module,
    train: Train,
    *,
    density: float,
    rewind_to: int = 0,
    per_round: float = 0.2,
    activating: float = 0.02,
    method: str = "global_magnitude",
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> Ticket:
    """A lottery ticket whose neurons stay awake (Activating-while-Pruning). The model ends as the trained ticket.

    W ← train(W₀); then, round by round, with n weights left: m ← the largest |W| inside m, without p − q of n; m ← m
    without the q·n negative weights of least |W − W_k|; W ← train(m ⊙ W_k), from step k. Less negative weight means
    larger sums before each ReLU, and so fewer zeros after it: `dead_neurons` counts them. q = 0 is `lottery_ticket`.

    Args:
        model: dense, at its start.
        train: `train(model, handle)` trains the model from step `handle.steps` to the end of the run and calls
            `handle.step()` after every optimizer step; what it returns is kept. It builds its own optimizer.
        density: fraction of the weights kept in the end, above 0 and below 1.
        rewind_to: k, the step that every round starts from again. Unit: optimizer steps.
        per_round: p, share of what is left that each round takes away.
        activating: q, share of what is left that each round takes from negative weights, 0 to p. The last round takes
            q too, or all it takes where that is less.
        method: what makes the other cut: "global_magnitude" (one pool) or "magnitude" (each layer by itself, with this
            cut too).
        targets, skip: layers, as for `gossamer.attach`.

    Example:
        >>> ticket = activating_ticket(model, train, density=0.1)  # doctest: +SKIP
        >>> dead_neurons(model, [inputs]).dynamic  # doctest: +SKIP

    Raises:
        BudgetError: a density or share is out of its range, or the dense run ended before step k.
        UnknownName: no such method.
        TargetError: no layer to prune, a method that goes by more than the weights, or train() never called
            handle.step().

    Reference: Liu et al., AP: Selective Activation for De-sparsifying Pruned Neural Networks, arXiv:2212.06145.
    Departs from: the official code prunes one weight more than q·n and all that tie with it, batch norms' weights too,
        and trains every ticket twice; where negative weights run out, here the smallest positive ones go. Written from
        the abstract and that code.
    """
    if not 0.0 <= activating <= per_round:
        raise BudgetError(
            f"activating is a part of each round's cut, 0 to per_round={per_round:g}, got {activating:g}; 0.02 of 0.2 "
            "is the paper's"
        )
    found = find(model, tuple(targets), tuple(skip)).targets
    ends = shrinking(density, per_round)
    middles = [min(before, end + activating * before) for before, end in zip((1.0, *ends), ends)]
    by_size = rules(model, found, method, middles)
    by_learning = [replace(rule, score=learned) for rule in rules(model, found, method, ends)]
    dense = DenseRun(model, rewind_to)
    cycles, supports = [Cycle(1.0, train(model, dense))], None
    for first, second in zip(by_size, by_learning):
        supports = choose_within(model, found, first, supports)
        start = {t.name: {"start": t.turned(dense.noted()[t.parameter])} for t in found}
        supports = choose_within(model, found, second, supports, start)
        cycles.append(sparse_run(model, train, supports, state=dense.noted(), first_step=rewind_to))
    assert supports is not None
    return Ticket(supports, dense.noted(), rewind_to, tuple(cycles))


def learned(w: Tensor, stats: Stats) -> Tensor:
    """Worth of each weight: |w − w_start| of a negative one, squeezed below 1; others above 1, by their size."""
    change, size = (w - stats["start"]).double().abs(), w.double().abs()
    return torch.where(w < 0, change / (1 + change), 1 + size / (1 + size))
