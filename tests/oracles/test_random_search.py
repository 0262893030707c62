"""Random search against networks that are small for real: cutting nodes must be the same as never having had them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from gossamer.core.errors import BudgetError, NonFiniteError, TargetError
from gossamer.recipes.random_search import random_search

STEPS = 12


class Residual(nn.Module):
    """Two convolutions onto one sum, norms with values that matter, a flattened reader."""

    def __init__(self, a: int = 6, b: int = 5) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, a, 3, padding=1), nn.BatchNorm2d(a)
        self.second, self.other = nn.Conv2d(a, a, 3, padding=1), nn.BatchNorm2d(a)
        self.hidden, self.out = nn.Linear(a * 16, b), nn.Linear(b, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).sigmoid()
        x = x + self.other(self.second(x)).relu()
        return self.out(self.hidden(x.flatten(1)).tanh())


def network(a: int = 6, b: int = 5) -> Residual:
    torch.manual_seed(1)
    net = Residual(a, b)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net.double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x.flatten(1)[:, :3].argmax(1)


def train(model: nn.Module, handle=None) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model.train()(x), y)
        loss.backward()
        optimizer.step()
        if handle is not None:
            handle.step()
    return loss.item()


def value(model: nn.Module) -> float:
    x, y = batch(99)
    return -functional.cross_entropy(model.eval()(x), y).item()


def small(full: nn.Module, nodes: dict[str, torch.Tensor]) -> nn.Module:
    """The network that has only the kept nodes, written out for this architecture."""
    a, b = nodes["first"].nonzero()[:, 0], nodes["hidden"].nonzero()[:, 0]
    columns = (a[:, None] * 16 + torch.arange(16)).flatten()
    at = {"first.weight": (a, None), "second.weight": (a, a), "hidden.weight": (b, columns), "out.weight": (None, b)}
    net = network(len(a), len(b))
    state = {}
    for name, x in full.state_dict().items():
        layer = name.split(".")[0]
        rows, cols = at.get(name, ({"hidden": b, "out": None}.get(layer, a) if x.ndim else None, None))
        x = x if rows is None else x[rows]
        state[name] = x if cols is None else x[:, cols]
    net.load_state_dict(state)
    return net


def search(model: nn.Module, **options):
    return random_search(model, value, batch(0)[0], **{"density": 0.5, "draws": 8, **options})


def test_the_best_draw_is_the_best_small_network_and_the_model_stays():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = search(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    by_hand = [value(small(network(), nodes)) for nodes in found.draws]
    assert found.values == pytest.approx(by_hand, abs=1e-9)
    assert found.best == max(range(8), key=by_hand.__getitem__) and len(set(found.values)) > 4


@pytest.mark.parametrize("draw", [None, 2])
def test_training_a_draw_is_training_the_small_network(draw):
    model = network()
    found = search(model)
    twin = small(network(), found.draws[found.best if draw is None else draw])
    cycle = found.train(model, train, draw=draw)
    assert cycle.result == pytest.approx(train(twin), abs=1e-9)
    x = batch(50)[0]
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), atol=1e-7, rtol=1e-7)
    for name, support in found.supports(draw).items():
        assert not model.get_submodule(name).weight[~support.kept].any()
    gone = ~found.draws[found.best if draw is None else draw]["hidden"]
    assert gone.any() and not model.hidden.bias[gone].any()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))
def test_every_layer_keeps_its_count_of_nodes_and_every_draw_can_be_drawn_again(density, seed, a, b):
    model = nn.Sequential(nn.Linear(3, a), nn.ReLU(), nn.Linear(a, b), nn.Tanh(), nn.Linear(b, 2))
    look = lambda draws: random_search(model, lambda m: 0.0, torch.ones(1, 3), density=density, draws=draws, seed=seed)
    found, more = look(2), look(3)
    kept = [max(1, math.floor(density * n + 0.5)) for n in (a, b)]
    for nodes, again in zip(found.draws, more.draws):
        assert [int(k.sum()) for k in nodes.values()] == kept
        assert all(torch.equal(k, again[n]) for n, k in nodes.items())
    assert found.best == 0  # the first of equals
    counts = [s.count for s in found.supports(1).values()]
    assert counts == [3 * kept[0], kept[0] * kept[1], 2 * kept[1]]


def test_draws_differ_between_layers_and_seeds():
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    look = lambda seed: random_search(model, lambda m: 0.0, torch.ones(1, 3), density=0.5, draws=2, seed=seed).draws
    a, b = look(0), look(1)
    masks = [a[0]["0"], a[0]["2"], a[1]["0"], b[0]["0"]]
    assert not any(torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


def test_layers_left_out_keep_all_their_nodes():
    found = search(network(), skip=["hidden"])
    assert set(found.draws[0]) == {"first"} and found.supports()["hidden"].count == 3 * 16 * 5
    assert set(search(network(), targets=["hidden"]).supports()) == {"hidden", "out"}


def test_what_cannot_be_searched_is_refused_in_words():
    for density in (0.0, 1.0, 1.5):
        with pytest.raises(BudgetError, match="between 0 and 1"):
            search(network(), density=density)
    with pytest.raises(BudgetError, match="draws >= 1"):
        search(network(), draws=0)
    with pytest.raises(TargetError, match=r"no layer of Sequential.*the network's output"):
        random_search(nn.Sequential(nn.Linear(2, 3)), lambda m: 0.0, torch.ones(1, 2), density=0.5)
    with pytest.raises(TargetError, match="not among the targets"):
        search(network(), targets=["second"])
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="draw 0"):
        random_search(model, lambda m: math.nan, batch(0)[0], density=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(TargetError, match=r"handle.step\(\)"):
        search(model).train(model, lambda model, handle: None)
