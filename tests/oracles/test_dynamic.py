"""Supports that move, against a naive twin: its own forward pass, its own momentum SGD, full sorts, 20 steps."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.core import DropGrow, Pattern, Support, pattern
from gossamer.core.errors import BudgetError, PatternError

SIZES = {"0": (24, 12), "2": (8, 24)}
LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(10, 12, generator=g, dtype=torch.float64)
    return x, (x[:, :8] * 2).sin()


def lots(name: str, shape, seed: int) -> np.ndarray:
    g = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % (1 << 63))
    return torch.rand(shape, generator=g).numpy()


def best(scores: np.ndarray, k: int) -> np.ndarray:
    won = np.zeros(scores.size, bool)
    won[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return won.reshape(scores.shape)


def erk_counts(density: float) -> dict[str, int]:
    """By hand for these two layers: no layer fills up, and the largest remainder takes what rounding leaves."""
    size = {n: a * b for n, (a, b) in SIZES.items()}
    scale = density * sum(size.values()) / sum(map(sum, SIZES.values()))
    ideal = {n: scale * sum(s) for n, s in SIZES.items()}
    counts = {n: math.floor(v) for n, v in ideal.items()}
    left = math.floor(density * sum(size.values()) + 0.5) - sum(counts.values())
    for n in sorted(counts, key=lambda n: counts[n] - ideal[n])[:left]:
        counts[n] += 1
    return counts


class Twin:
    """The method in NumPy, written from the papers."""

    def __init__(self, density: float, grow: str, fraction, every: int, until: int, seed: int = 0) -> None:
        model = net()
        self.w = {n: model[int(n)].weight.detach().numpy().copy() for n in SIZES}
        self.b = {n: model[int(n)].bias.detach().numpy().copy() for n in SIZES}
        self.grow, self.fraction, self.every, self.until, self.seed = grow, fraction, every, until, seed
        counts = erk_counts(density)
        self.m = {n: best(lots(n, SIZES[n], seed), counts[n]) for n in SIZES}
        self.v = {n: np.zeros(SIZES[n]) for n in SIZES}
        self.mean = {n: np.zeros(SIZES[n]) for n in SIZES}
        self.fired = {n: m.copy() for n, m in self.m.items()}
        self.vb = {n: np.zeros(SIZES[n][0]) for n in SIZES}
        for n in SIZES:
            self.w[n] *= self.m[n]

    def step(self, t: int) -> None:
        x, y = (z.numpy() for z in batch(t))
        h = np.tanh(x @ self.w["0"].T + self.b["0"])
        out = h @ self.w["2"].T + self.b["2"]
        d_out = 2 * (out - y) / out.size
        d_h = (d_out @ self.w["2"]) * (1 - h * h)
        dense = {"0": d_h.T @ x, "2": d_out.T @ h}
        bias = {"0": d_h.sum(0), "2": d_out.sum(0)}
        for n in SIZES:
            self.v[n] = (MOMENTUM * self.v[n] + dense[n] + DECAY * self.w[n]) * self.m[n]
            self.vb[n] = MOMENTUM * self.vb[n] + bias[n] + DECAY * self.b[n]
            self.w[n] = (self.w[n] - LR * self.v[n]) * self.m[n]
            self.b[n] = self.b[n] - LR * self.vb[n]
            self.mean[n] = 0.9 * self.mean[n] + 0.1 * dense[n]
            if t % self.every == 0 and t <= self.until:
                self.move(n, t, dense[n])

    def move(self, n: str, t: int, gradient: np.ndarray) -> None:
        k = math.floor(self.fraction(t) * self.m[n].sum() + 0.5)
        stays = self.m[n] & ~best(np.where(self.m[n], -np.abs(self.w[n]), -np.inf), k)
        self.m[n] = stays | best(np.where(stays, -np.inf, self.worth(n, t, gradient)), k)
        self.fired[n] |= self.m[n]
        self.w[n] *= self.m[n]
        self.v[n] *= self.m[n]

    def worth(self, n: str, t: int, gradient: np.ndarray) -> np.ndarray:
        if self.grow in ("gradient", "momentum"):
            return np.abs(gradient if self.grow == "gradient" else self.mean[n])
        return lots(f"{n}@{t}", SIZES[n], self.seed) - (self.grow == "unfired") * self.fired[n]


def half_cosine(start: float, end: float, steps: int):
    return lambda t: end + (start - end) * (1 + math.cos(math.pi * t / steps)) / 2


@pytest.mark.parametrize(
    "method, grow",
    [("rigl", "gradient"), ("rigl", "momentum"), ("set", "random"), ("set", "unfired"), ("static", None)],
)
def test_twenty_steps(method, grow):
    twin = {
        "rigl": lambda: Twin(0.3, grow, half_cosine(0.3, 0.0, 16), 3, 16),
        "set": lambda: Twin(0.3, grow, half_cosine(0.5, 0.005, 20), 3, 20),
        "static": lambda: Twin(0.3, "random", lambda t: 0.0, 1, 0),
    }[method]()
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    extra = {} if method == "static" else {"every": 3, "grow": grow}
    handle = gossamer.attach(model, method, density=0.3, optimizer=opt, total_steps=20, **extra)
    first = {n: s.kept.clone() for n, s in handle.supports().items()}
    for t in range(1, 21):
        x, y = batch(t)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        handle.step()
        twin.step(t)
        for n in SIZES:
            assert (handle.supports()[n].kept.numpy() == twin.m[n]).all(), (t, n)
            np.testing.assert_allclose(model[int(n)].weight.detach().numpy(), twin.w[n], atol=1e-12)
    moved = any(not torch.equal(first[n], s.kept) for n, s in handle.supports().items())
    assert moved == (method != "static")


SPECS = ["unstructured", "2:4", "row", "4-row", "2x2"]


def rule(**changes) -> DropGrow:
    fields = {"drop": lambda w, _: w.abs(), "grow": "gradient", "fraction": 0.3, "until": 10, "every": 1}
    return DropGrow(**{**fields, **changes})


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.sampled_from(["unstructured", "2:4", "row", "4-row", "2x2"]),
    st.booleans(),
)
def test_a_move_keeps_every_pools_count_and_takes_the_best(seed, fraction, spec, regrow):
    g = torch.Generator().manual_seed(seed)
    drop, grow = torch.rand(8, 16, generator=g), torch.rand(8, 16, generator=g)
    who = pattern(spec)
    start = gossamer.select(torch.rand(8, 16, generator=g), who, gossamer.core.Density(0.5))
    new = rule(fraction=fraction, regrow=regrow).move(start, drop, grow, who, 1)
    split = lambda s: who.split(s.kept)[..., 0]
    assert (split(new).sum(1) == split(start).sum(1)).all()
    came, went = split(new - start), split(start - new)
    n = int(split(start).sum())
    assert int(went.sum()) <= math.floor(fraction * n + 0.5)
    if not regrow:
        worth = who.split(grow).sum(-1)
        assert int(came.sum()) == math.floor(fraction * n + 0.5) or (~split(start)).sum(1).min() <= went.sum(1).max()
        for row in range(len(came)):  # nothing outside was worth more than what came in
            outside = ~split(start)[row] & ~came[row]
            if came[row].any() and outside.any():
                assert worth[row][came[row]].min() >= worth[row][outside].max()


def test_a_dropped_link_may_come_back_or_not():
    w, g = torch.tensor([[3.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 1.0, 2.0]])
    start, flat = Support(w != 0), Pattern("[...]")
    assert rule(fraction=0.5).move(start, w, g, flat, 1) == start
    assert rule(fraction=0.5, regrow=False).move(start, w, g, flat, 1).kept.tolist() == [[True, False, False, True]]


def test_counts_wander_between_layers_only_where_asked():
    a, b = torch.tensor([[5.0, 4.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    ga, gb = torch.tensor([[0.0, 0.0, 8.0, 9.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    starts, drop, grow = {"a": Support(a != 0), "b": Support(b != 0)}, {"a": a, "b": b}, {"a": ga, "b": gb}
    new = rule(fraction=0.5).move_across(starts, drop, grow, Pattern("[...]"), 1)
    assert (new["a"].count, new["b"].count) == (4, 0)
    with pytest.raises(PatternError, match="several pools"):
        rule().move_across(starts, drop, grow, Pattern("o (g [2])"), 1)


def test_policies_out_of_range_are_refused():
    with pytest.raises(BudgetError, match="would never move"):
        rule(every=11)
    with pytest.raises(BudgetError, match="between 0 and 1"):
        rule(fraction=1.5)
    with pytest.raises(BudgetError, match="'gradient', 'momentum', 'random', 'unfired', got 'momentu'"):
        rule(grow="momentu")
    with pytest.raises(BudgetError, match="names 'taste'"):
        rule(needs=("taste",))
    with pytest.raises(BudgetError, match="'random' or 'unfired', got 'gradient'"):
        gossamer.get_method("set")(total_steps=2000, grow="gradient")
    with pytest.raises(BudgetError, match="'gradient' or 'momentum', got 'random'"):
        gossamer.get_method("rigl")(total_steps=2000, grow="random")
