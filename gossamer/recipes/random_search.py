"""Random search: of many random choices of neurons, train the one that does best before training. A baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attach.targets import find
from ..core.budget import Keep, count
from ..core.errors import BudgetError, NonFiniteError, TargetError
from ..core.select import select
from ..core.support import Support
from ..score import random as by_lot
from ..score import salt
from .channels import Space, spaces
from .cycles import Cycle, State, Train, copied, sparse_run

Nodes = dict[str, Tensor]


@dataclass(frozen=True)
class NodeSearch:
    """What `random_search` drew, and the start they share.

    Args:
        start: the model's state, dense.
        values: what `evaluate` gave each draw before training.
        draws: per draw and space (by the first layer that writes it) which nodes are kept, bool.
        best: the draw with the highest value; the first of equals.
    """

    start: State
    values: tuple[float, ...]
    draws: tuple[Nodes, ...]
    best: int
    _cuts: tuple[_Cut, ...]

    def supports(self, draw: int | None = None) -> dict[str, Support]:
        """What every layer keeps under a draw, the best unless given, in the layout its weight is stored in."""
        return _supports(self._cuts, self.start, self.draws[self.best if draw is None else draw])

    def train(self, model: nn.Module, train: Train, *, draw: int | None = None) -> Cycle:
        """Train a draw from the shared start: the best, or another to compare it with."""
        chosen = self.best if draw is None else draw
        state = _cut_state(self._cuts, self.start, self.draws[chosen])
        return sparse_run(model, train, self.supports(chosen), state=state)


def random_search(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    example: Tensor,
    *,
    density: float,
    draws: int = 100,
    seed: int = 0,
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> NodeSearch:
    """Draw sparse networks from an untrained one by cutting whole nodes; note which does best as it is.

    m* = argmax_{m₁…m_S} evaluate(f(θ₀ ⊙ m)). A mask m keeps round(d·n) of the n nodes of every hidden layer, by lot; of
    a node that goes, the weights into it, its bias, the norms over it and the weights out of it are 0, and stay 0. All
    draws share θ₀. The model is left as it was; `found.train(model, train)` trains the best draw,
    `found.train(model, train, draw=0)` one that nobody chose, which is what a search has to beat.

    Args:
        model: at its start; convolutions, batch norms, linear layers, activations, poolings and additions.
        evaluate: model → value, higher is better, such as the negative loss of a few batches.
        example: an input, by which layers that number their nodes alike are found.
        density: d, fraction of nodes kept in each hidden layer, above 0 and below 1; at least one stays.
        draws: S.
        seed: of the lots.
        targets, skip: layers whose outputs may be cut, as for `gossamer.attach`; outputs of the network never are.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> found = random_search(net, lambda m: -m(torch.ones(1, 4)).sum().item(), torch.ones(1, 4), density=0.3)
        >>> len(found.values), found.supports()["0"].count, found.supports()["2"].count
        (100, 12, 6)

    Raises:
        BudgetError: the density is not between 0 and 1, or there is no draw.
        TargetError: the forward cannot be traced, or no layer's nodes can be cut; the message says why.
        NonFiniteError: a draw's value is NaN or infinite.

    Reference: Farahani, Random Search as a Baseline for Sparse Neural Network Architecture Search, arXiv:2403.08265.
    Departs from: written from the abstract; that the draws share one start, and their number, are ours.
    """
    if not 0.0 < density < 1.0 or draws < 1:
        raise BudgetError(f"give a density between 0 and 1 and draws >= 1, got {density:g} and {draws}")
    cuts = _cuts(
        model, spaces(model, example), {t.name for t in find(model, tuple(targets) or ("*",), tuple(skip)).targets}
    )
    start = copied(model)
    drawn = tuple(_drawn(cuts, density, seed, draw) for draw in range(draws))
    try:
        values = tuple(_value(model, evaluate, _cut_state(cuts, start, nodes), d) for d, nodes in enumerate(drawn))
    finally:
        model.load_state_dict(start)
    return NodeSearch(start, values, drawn, max(range(draws), key=values.__getitem__), cuts)


@dataclass(frozen=True)
class _Cut:
    """A numbering of nodes that may lose some: the layers that write, keep and read it (with columns per node)."""

    size: int
    writers: tuple[str, ...]
    keepers: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.writers[0]


def _cuts(model: nn.Module, found: Sequence[Space], allowed: set[str]) -> tuple[_Cut, ...]:
    free, refused = [], []
    for s in found:
        reason = s.fixed or ("" if s.writers and allowed.issuperset(s.writers) else "not among the targets")
        if reason:
            refused.append(f"{', '.join(s.writers) or 'the input'}: {reason}")
        else:
            free.append(_Cut(s.size, tuple(s.writers), tuple(s.keepers), tuple(s.readers)))
    if not free:
        raise TargetError(f"no layer of {type(model).__name__} has nodes that can be cut ({'; '.join(refused[:4])})")
    return tuple(free)


def _drawn(cuts: Sequence[_Cut], density: float, seed: int, draw: int) -> Nodes:
    lots = by_lot(seed)
    kept = lambda c: Keep(max(1, count(density, c.size)))
    score = lambda c: lots(torch.zeros(c.size), {"salt": salt(f"{c.name}, draw {draw}")})
    return {c.name: select(score(c), "[n]", kept(c)).kept for c in cuts}


def _supports(cuts: Sequence[_Cut], start: State, nodes: Nodes) -> dict[str, Support]:
    """Rows of the layers that write nodes, columns of those that read them."""
    kept: dict[str, Tensor] = {}
    for c in cuts:
        for name in c.writers:
            _within(kept, start, name, nodes[c.name], 0)
        for name, repeat in c.readers:
            _within(kept, start, name, nodes[c.name].repeat_interleave(repeat), 1)
    return {name: Support(mask) for name, mask in kept.items()}


def _within(kept: dict[str, Tensor], start: State, name: str, along: Tensor, dim: int) -> None:
    w = start[_weight(name)]
    mask = kept.setdefault(name, torch.ones_like(w, dtype=torch.bool))
    mask &= along.to(w.device).view([-1 if d == dim else 1 for d in range(w.ndim)])


def _cut_state(cuts: Sequence[_Cut], start: State, nodes: Nodes) -> State:
    """The start with nothing left of the nodes that go. What is 0 here gets no gradient, for no layer reads it."""
    state = dict(start)
    for name, support in _supports(cuts, start, nodes).items():
        state[_weight(name)] = start[_weight(name)] * support.kept
    for c in cuts:
        values = [f"{n}.bias" for n in c.writers] + [f"{n}.{part}" for n in c.keepers for part in ("weight", "bias")]
        for key in values:
            if key in start:
                gone = ~nodes[c.name].to(start[key].device)
                state[key] = start[key].clone()
                state[key][gone] = 0
    return state


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _value(model: nn.Module, evaluate: Callable[[nn.Module], float], state: Mapping[str, Tensor], draw: int) -> float:
    model.load_state_dict(state)
    with torch.no_grad():
        value = float(evaluate(model))
    if not math.isfinite(value):
        raise NonFiniteError(
            f"evaluate gave {value} for draw {draw}, which has no rank; look at its batches and the start"
        )
    return value
