"""G2GNet against a naive twin, its groups by brute force, and the correlations it goes by against NumPy's."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import LR, MOMENTUM, SIZES, batch, gradients, net, numbers
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.attach.activity import Activity
from gossamer.attach.targets import find
from gossamer.core import get_method
from gossamer.core.errors import BudgetError, TargetError, UnknownName
from gossamer.score import Groups
from gossamer.score.groups import WAYS


def lots(name: str, shape, seed: int) -> np.ndarray:
    g = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % (1 << 63))
    return torch.rand(shape, generator=g).numpy()


def best(scores: np.ndarray, k: int) -> np.ndarray:
    won = np.zeros(scores.size, bool)
    won[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return won.reshape(scores.shape)


def together(w: dict, b: dict, data) -> dict[str, np.ndarray]:
    """|corr| of every output with every input, by np.corrcoef."""
    x = data[0].numpy()
    h = np.tanh(x @ w["0"].T + b["0"])
    flows = {"0": (x, x @ w["0"].T + b["0"]), "2": (h, h @ w["2"].T + b["2"])}
    return {n: np.abs(np.corrcoef(y.T, x.T)[: y.shape[1], y.shape[1] :]) for n, (x, y) in flows.items()}


class Twin:
    """In NumPy, from the rule: blocks and lots, then the weakest out and the most correlated in."""

    def __init__(self, drop: str, grow: str, groups: int, density: float, seed: int) -> None:
        self.w, self.b = numbers(net())
        self.drop, self.grow, self.seed = drop, grow, seed
        self.m = {}
        for n, (rows, columns) in SIZES.items():
            score = lots(n, SIZES[n], seed).astype(np.float32)
            for i in range(rows):
                for j in range(columns):
                    score[i, j] += i * groups // rows == j * groups // columns
            self.m[n] = best(score, math.floor(density * rows * columns + 0.5))
        self.w = {n: self.w[n] * self.m[n] for n in SIZES}
        self.v = {n: np.zeros(SIZES[n]) for n in SIZES}
        self.vb = {n: np.zeros(SIZES[n][0]) for n in SIZES}

    def step(self, t: int) -> None:
        hebb = together(self.w, self.b, batch(t))
        dw, db = gradients(self.w, self.b, batch(t))
        for n in SIZES:
            self.v[n] = (MOMENTUM * self.v[n] + dw[n]) * self.m[n]
            self.vb[n] = MOMENTUM * self.vb[n] + db[n]
            self.w[n], self.b[n] = self.w[n] - LR * self.v[n], self.b[n] - LR * self.vb[n]
            if t % 3 == 0:
                lot = lots(f"{n}@{t}", SIZES[n], self.seed)
                worth = {"magnitude": np.abs(self.w[n]), "hebb": hebb[n], "random": lot}
                k = math.floor(0.2 * self.m[n].sum() + 0.5)
                stays = self.m[n] & ~best(np.where(self.m[n], -worth[self.drop], -np.inf), k)
                self.m[n] = stays | best(np.where(stays, -np.inf, worth[self.grow]), k)
                self.w[n], self.v[n] = self.w[n] * self.m[n], self.v[n] * self.m[n]


def attached(model: nn.Module, optimizer, **options):
    how = {"density": 0.4, "groups": 4, "total_steps": 20, "every": 3, "fraction": 0.2, "seed": 7, **options}
    return gossamer.attach(model, "g2gnet", optimizer=optimizer, **how)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


@pytest.mark.parametrize("backend", ["masked", "sparse"])
@pytest.mark.parametrize(
    "drop, grow", [("magnitude", "hebb"), ("hebb", "hebb"), ("hebb", "random"), ("random", "hebb")]
)
def test_twenty_steps(drop, grow, backend):
    model, twin = net(), Twin(drop, grow, 4, 0.4, 7)
    optimizer = sgd(model)
    handle = attached(model, optimizer, drop=drop, grow=grow, backend=backend)
    first = {n: s.kept.clone() for n, s in handle.supports().items()}
    for t in range(1, 21):
        x, y = batch(t)
        optimizer.zero_grad()
        for a, b in zip(x.chunk(2), y.chunk(2)):  # sums go over the passes of a step
            (functional.mse_loss(model(a), b) / 2).backward()
        with torch.no_grad():
            model(3 * x)  # no pass that trains
        optimizer.step()
        handle.step()
        twin.step(t)
        for n in SIZES:
            assert (handle.supports()[n].kept.numpy() == twin.m[n]).all(), (t, n)
            np.testing.assert_allclose(model[int(n)].weight.detach().numpy(), twin.w[n], atol=1e-12)
    assert any(not torch.equal(first[n], s.kept) for n, s in handle.supports().items())
    handle.remove()
    assert not model[0]._forward_hooks and not model[2]._forward_hooks


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.sampled_from(WAYS))
def test_groups_are_even_and_come_first(number, m, k, by):
    score = Groups(number, by=by, seed=3)(torch.ones(m, k, 2), {"place": torch.tensor(1)})
    same = score >= 1
    number = min(number, m, k)
    assert torch.equal(same[..., 0], same[..., 1])
    rows, columns = ({tuple(line) for line in table.tolist()} for table in (same[..., 0], same[..., 0].t()))
    assert len(rows) == len(columns) == number  # each group a block of its own
    sizes = [int((same[..., 0] == torch.tensor(row)).all(1).sum()) for row in rows]
    assert max(sizes) - min(sizes) <= 1 and not any(sum(c) == 0 for c in rows | columns)
    if by in ("mixer", "interleaved"):  # the second layer
        assert all(bool(same[i, j, 0]) == (i % number == j % number) for i in range(m) for j in range(k))
    if by == "index":
        assert all(bool(same[i, j, 0]) == (i * number // m == j * number // k) for i in range(m) for j in range(k))


def test_layers_take_turns_under_mixer_and_draw_apart_under_random():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    how = {"density": 0.25, "groups": 4, "every": 0, "optimizer": sgd(model)}
    kept = lambda handle: [s.kept for s in handle.supports().values()]
    a, b, c = kept(attached(model, grouping="mixer", **how))
    assert torch.equal(a, c) and not torch.equal(a, b)
    assert all(bool(a[i, j]) == (i // 2 == j // 2) for i in range(8) for j in range(8))
    assert all(bool(b[i, j]) == (i % 4 == j % 4) for i in range(8) for j in range(8))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    a, b = kept(attached(model, grouping="random", **{**how, "optimizer": sgd(model)}))
    assert not torch.equal(a, b) and a.sum() == b.sum() == 16


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 3), dilation=(1, 2), padding=1), (4, 3, 6, 7)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_correlations_are_those_of_numpy(layer):
    torch.manual_seed(1)
    build, shape = LAYERS[layer]
    model = nn.Sequential(build())
    target = find(model, ("*",)).targets[0]
    activity = Activity(model, [target], lambda t: t.module(model).weight)
    activity.on()
    parts = [torch.randn(shape) + 2, torch.randn(shape)]
    y = torch.cat([model(x) for x in parts]).detach()
    x = torch.cat(parts)
    if layer == "linear":
        columns, rows = x.reshape(-1, 6), y.reshape(-1, 5)
    else:  # one output at a time is a dot product of a window with a one-hot kernel
        m = model[0]
        flat = (lambda z: z.unsqueeze(2)) if layer == "conv1d" else (lambda z: z)
        shared = {n: getattr(m, n) for n in ("stride", "padding", "dilation")}
        k = math.prod(m.weight.shape[1:])
        one_hot = torch.eye(k).view(k, *m.weight.shape[1:])
        windows = (functional.conv1d if layer == "conv1d" else functional.conv2d)(x, one_hot, **shared)
        columns = flat(windows).flatten(2).transpose(1, 2).reshape(-1, k)
        rows = flat(y).flatten(2).transpose(1, 2).reshape(-1, 5)
    want = np.corrcoef(rows.double().numpy().T, columns.double().numpy().T)[:5, 5:]
    got = activity.take()["0"]
    assert got.shape == model[0].weight.shape
    np.testing.assert_allclose(got.detach().flatten(1).numpy(), want, atol=2e-5)
    activity.off()
    assert activity.take() == {}


def test_what_never_changes_is_correlated_with_nothing():
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias.fill_(1000.3)
    activity = Activity(model, find(model, ("*",)).targets, lambda t: t.module(model).weight)
    activity.on()
    x = torch.randn(50, 3)
    x[:, 2] = 1234.567
    model(x)
    found = activity.take()["0"]
    assert found.isfinite().all() and not found[1].any() and not found[:, 2].any() and found[0, :2].abs().max() > 0.01


def test_a_gap_within_groups_where_the_density_is_below_theirs():
    model = nn.Sequential(nn.Linear(16, 16))
    handle = attached(model, sgd(model), density=0.1, every=0)
    kept = handle.supports()["0"].kept
    assert kept.sum() == 26 and not any(kept[i, j] and i // 4 != j // 4 for i in range(16) for j in range(16))


def test_what_cannot_be_is_refused():
    rule = get_method("g2gnet")
    assert rule(total_steps=10, every=0).policy.due(0) and not rule(total_steps=10, every=0).policy.due(5)
    for options, said in (
        ({"groups": 0}, "groups=0"),
        ({"grow": "gradient"}, "'hebb' or 'random', got 'gradient'"),
        ({"drop": "age"}, "'hebb' or 'magnitude' or 'random', got 'age'"),
        ({"total_steps": 10}, "would never move"),
        ({"every": -1}, "would never move"),
        ({"until": 4000}, "shorten until="),
        ({"fraction": 2.0}, "between 0 and 1"),
    ):
        with pytest.raises(BudgetError, match=said):
            rule(**{"total_steps": 3000, **options})
    with pytest.raises(UnknownName, match="mixr"):
        rule(total_steps=3000, grouping="mixr")
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten())
    with pytest.raises(TargetError, match="cannot move by correlation: a grouped convolution"):
        attached(model, sgd(model))
    assert not hasattr(model[0], "parametrizations")
    model = net()
    handle = attached(model, sgd(model), every=1)
    with pytest.raises(TargetError, match="no forward pass with gradients reached"):
        handle.step()
