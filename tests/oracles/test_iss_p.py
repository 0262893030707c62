"""ISS-P against a naive twin (sorted weights, its own backward pass and momentum SGD), and official values.

Official values were printed by get_score_layer and pick_pruned_layer of github.com/Jiamian-Wang/
Iterative-Soft-Shrinkage-SR (basicsr/pruner/utils.py) under the three lines of `_iht` that use them, with torch 2.13.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gossamer
from gossamer.core import Attenuate, Support, get_method
from gossamer.core.errors import BudgetError, TargetError

SIZES = {"0": (24, 12), "2": (8, 24)}
LR, MOMENTUM, DECAY, STEPS = 0.1, 0.9, 0.01, 20
W = ((torch.arange(16.0) * 7 + 3) % 17 - 8.25).view(2, 8)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, (x[:, :8] * 2).sin()


def largest(w: np.ndarray, density: float) -> np.ndarray:
    kept = np.zeros(w.size, bool)
    kept[np.argsort(-np.abs(w).ravel(), kind="stable")[: int(density * w.size + 0.5)]] = True
    return kept.reshape(w.shape)


class Twin:
    """The method in NumPy, from the paper."""

    def __init__(self, density: float, until: int, ratio: float, every: int) -> None:
        model = net()
        self.density, self.until, self.ratio, self.every = density, until, ratio, every
        self.w = {n: model[int(n)].weight.detach().numpy().copy() for n in SIZES}
        self.b = {n: model[int(n)].bias.detach().numpy().copy() for n in SIZES}
        self.v = {n: np.zeros(SIZES[n]) for n in SIZES}
        self.vb = {n: np.zeros(SIZES[n][0]) for n in SIZES}
        self.m = {n: largest(self.w[n], density) for n in SIZES}

    def step(self, t: int) -> None:
        x, y = (z.numpy() for z in batch(t))
        h = np.tanh(x @ self.w["0"].T + self.b["0"])
        d_out = 2 * (h @ self.w["2"].T + self.b["2"] - y) / (10 * 8)
        d_h = (d_out @ self.w["2"]) * (1 - h * h)
        dense, bias = {"0": d_h.T @ x, "2": d_out.T @ h}, {"0": d_h.sum(0), "2": d_out.sum(0)}
        cut = t > self.until
        for n in SIZES:
            gradient = dense[n] * self.m[n] if cut else dense[n]
            self.v[n] = MOMENTUM * self.v[n] + gradient + DECAY * self.w[n]
            self.w[n] = self.w[n] - LR * self.v[n]
            self.vb[n] = MOMENTUM * self.vb[n] + bias[n] + DECAY * self.b[n]
            self.b[n] = self.b[n] - LR * self.vb[n]
            if t == self.until or (t < self.until and t % self.every == 0):
                self.m[n] = largest(self.w[n], self.density)
            if t < self.until:
                self.w[n] = np.where(self.m[n], self.w[n], self.ratio * self.w[n])
            else:
                self.w[n], self.v[n] = self.w[n] * self.m[n], self.v[n] * self.m[n]


@pytest.mark.parametrize("until, ratio, every", [(12, 0.95, 1), (7, 0.5, 3), (20, 0.9, 1), (5, 0.0, 1)])
def test_twenty_steps(until, ratio, every):
    model, twin = net(), Twin(0.3, until, ratio, every)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    options = {"until": until, "ratio": ratio, "every": every}
    handle = gossamer.attach(model, "iss_p", density=0.3, optimizer=opt, total_steps=STEPS, **options)
    dense = 0
    for t in range(1, STEPS + 1):
        x, y = batch(t)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        handle.step()
        twin.step(t)
        dense += t <= until
        for n in SIZES:
            layer = model[int(n)]
            original = layer.parametrizations.weight.original
            assert np.array_equal(handle.supports()[n].kept.numpy(), twin.m[n]), (t, n)
            np.testing.assert_allclose(original.detach().numpy(), twin.w[n], atol=1e-12)
            assert torch.equal(layer.weight, original)  # what is used is what is stored, before the cut and after
            slot = opt.state[original]["momentum_buffer"]
            assert t < until or not slot[~handle.supports()[n].kept].any()
    spent, kept = handle.report().flops, sum(twin.m[n].sum() for n in SIZES)
    size = sum(a * b for a, b in SIZES.values())
    assert spent.forward == 2 * 10 * (dense * size + (STEPS - dense) * kept)
    handle.remove()
    assert [int((model[int(n)].weight != 0).sum()) for n in SIZES] == [int(twin.m[n].sum()) for n in SIZES]


def test_three_steps_are_what_the_official_code_printed():
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    model[0].weight.data = W.clone()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = gossamer.attach(model, "iss_p", density=0.25, optimizer=opt, total_steps=40)
    for _ in range(3):
        handle.step()
    printed = [-4.501218, 1.500406, -8.25, -1.071719, 4.929906, -3.643844, 2.357781, -7.25]
    printed += [-0.214344, 6.75, -2.786469, 3.215156, -5.358593, 0.643031, 7.75, -1.929094]
    torch.testing.assert_close(model[0].weight.flatten(), torch.tensor(printed), rtol=0, atol=1e-5)
    assert handle.supports()["0"].kept.flatten().nonzero().flatten().tolist() == [2, 7, 9, 14]


def test_an_early_end_leaves_zeros_and_the_right_count():
    model = net()
    handle = gossamer.attach(model, "iss_p", density=0.25, total_steps=100)
    handle.step()
    assert (model[0].weight != 0).all()
    handle.remove()
    assert int((model[0].weight != 0).sum()) == 72


def test_weights_that_are_needed_come_back():
    """Only the first input matters; its weight starts among the smallest and ends kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.01, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = gossamer.attach(model, "iss_p", density=0.125, optimizer=opt, total_steps=80, until=60)
    assert not handle.supports()["0"].kept[0, 0]
    for _ in range(80):
        x = torch.randn(32, 8)
        opt.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        opt.step()
        handle.step()
    assert handle.supports()["0"].kept.flatten().tolist() == [True] + [False] * 7
    assert abs(float(model[0].weight[0, 0].detach()) - 1) < 0.1 and not model[0].weight[0, 1:].any()


def test_an_average_of_weights_is_cut_with_its_model():
    model = net()
    handle = gossamer.attach(model, "iss_p", density=0.25, total_steps=8, until=2)
    mean = AveragedModel(model)
    for _ in range(3):
        handle.step()
        mean.update_parameters(model)
    assert int((mean.module[0].weight != 0).sum()) == 72 < int((model[0].weight == 0).sum())


@given(ratio=st.floats(0, 1), step=st.integers(0, 20), until=st.integers(1, 10))
def test_the_rule_shrinks_what_is_pruned_and_nothing_else(ratio, step, until):
    w = torch.arange(-4.0, 4.0)
    support = Support(w.abs() > 2)
    rule = Attenuate(ratio, until)
    out = rule.at(step)(w, support)
    assert torch.equal(out[support.kept], w[support.kept])
    assert torch.equal(out[~support.kept], w[~support.kept] * (ratio if step < until else 0.0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 1.5}, "from 0 to 1, got 1.5"),
        ({"ratio": -0.1}, "from 0 to 1"),
        ({"until": 0}, "until=0"),
        ({"until": 101}, "run ends at 100"),
        ({"density": 0.5, "pattern": "1:4"}, "keeps 1 of 4"),
        ({"every": 0}, "every >= 1"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        get_method("iss_p")(total_steps=100, **options)


def test_sparse_layers_cannot_shrink_what_they_do_not_store():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TargetError, match="masked"):
        gossamer.attach(model, "iss_p", density=0.05, total_steps=10, optimizer=opt, backend="sparse")
