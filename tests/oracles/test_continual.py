"""Tasks in turn against a naive twin, and what is promised: nothing is forgotten, and a stop changes nothing."""

from __future__ import annotations

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import LR, MOMENTUM, SIZES, gradients, net, numbers
from torch import nn
from torch.nn import functional

from gossamer.core.errors import BudgetError, FileDamaged, TargetError, UnknownName
from gossamer.recipes.continual import Continual

STEPS, EVERY = 9, 2
GROWTH = [("set", "random"), ("set", "unfired"), ("rigl", "gradient"), ("rigl", "momentum")]


def batch(task: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(100 * task + step), dtype=torch.float64)
    return x, (x[:, :8] * (2 + task)).sin()


def train(model, optimizer, handle, task: int) -> None:
    for step in range(handle.steps + 1, STEPS + 1):
        x, y = batch(task, step)
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        handle.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=0.01)


def begin(learner: Continual, method: str = "set", grow: str = "random", density: float = 0.3, make=sgd, **options):
    optimizer = make(learner.model)
    options = {"allocation": "uniform", "every": EVERY, "until": STEPS, "fraction": 0.4, "grow": grow, **options}
    return optimizer, learner.begin(method, density=density, optimizer=optimizer, total_steps=STEPS, **options)


def learn(learner: Continual, tasks: int, **how) -> None:
    for task in range(len(learner.tasks), tasks):
        optimizer, handle = begin(learner, **how)
        train(learner.model, optimizer, handle, task)
        learner.end()


def lots(name: str, shape, seed: int) -> np.ndarray:
    g = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % (1 << 63))
    return torch.rand(shape, generator=g).numpy()


def best(scores: np.ndarray, k: int) -> np.ndarray:
    won = np.zeros(scores.size, bool)
    won[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return won.reshape(scores.shape)


class Twin:
    """In NumPy, from the paper: one store, one mask per task, no step for what an earlier task used."""

    def __init__(self, grow: str, counts: dict[str, int], seed: int) -> None:
        self.store, self.b = numbers(net())
        self.used = {n: np.zeros(SIZES[n], bool) for n in SIZES}
        self.grow, self.counts, self.seed, self.masks, self.biases = grow, counts, seed, [], []

    def task(self, k: int) -> None:
        seed = self.seed + k
        m = {n: best(lots(n, SIZES[n], seed), self.counts[n]) for n in SIZES}
        w = {n: self.store[n] * m[n] for n in SIZES}
        v, vb = {n: np.zeros(SIZES[n]) for n in SIZES}, {n: np.zeros(SIZES[n][0]) for n in SIZES}
        mean, fired = {n: np.zeros(SIZES[n]) for n in SIZES}, {n: m[n].copy() for n in SIZES}
        for t in range(1, STEPS + 1):
            dw, db = gradients(w, self.b, batch(k, t))
            for n in SIZES:
                free = ~self.used[n]
                mean[n] = 0.9 * mean[n] + 0.1 * dw[n] * free
                v[n] = (MOMENTUM * v[n] + dw[n] + 0.01 * w[n]) * (m[n] & free)
                vb[n] = MOMENTUM * vb[n] + db[n] + 0.01 * self.b[n]
                w[n], self.b[n] = w[n] - LR * v[n], self.b[n] - LR * vb[n]
                if t % EVERY == 0:
                    drop = math.floor(0.4 * self.counts[n] + 0.5)
                    stays = m[n] & ~best(np.where(m[n], -np.abs(w[n]), -np.inf), drop)
                    worth = {
                        "gradient": np.abs(dw[n] * free),
                        "momentum": np.abs(mean[n]),
                        "random": lots(f"{n}@{t}", SIZES[n], seed),
                        "unfired": lots(f"{n}@{t}", SIZES[n], seed) - fired[n],
                    }[self.grow]
                    m[n] = stays | best(np.where(stays, -np.inf, worth), drop)
                    fired[n] |= m[n]
                    w[n], v[n] = np.where(m[n], np.where(free, w[n], self.store[n]), 0), v[n] * m[n]
        for n in SIZES:
            self.store[n] = np.where(m[n] & ~self.used[n], w[n], self.store[n])
            self.used[n] |= m[n]
        self.masks.append(m)
        self.biases.append({n: b.copy() for n, b in self.b.items()})


@pytest.mark.parametrize("method, grow", GROWTH)
def test_three_tasks(method, grow):
    learner = Continual(net(), seed=5)
    learn(learner, 3, method=method, grow=grow)
    twin = Twin(grow, {n: s.count for n, s in learner.tasks[0].supports.items()}, 5)
    assert sum(twin.counts.values()) == round(0.3 * 480)
    for k in range(3):
        twin.task(k)
    for k in range(3):
        model = learner.recall(k)
        for n in SIZES:
            assert (learner.tasks[k].supports[n].kept.numpy() == twin.masks[k][n]).all(), (k, n)
            w, b = (p.detach().numpy() for p in (model[int(n)].weight, model[int(n)].bias))
            np.testing.assert_allclose(w, twin.store[n] * twin.masks[k][n], atol=1e-12)
            np.testing.assert_allclose(b, twin.biases[k][n], atol=1e-12)
    shared = [twin.masks[0][n] & twin.masks[2][n] for n in SIZES]
    assert any(s.any() for s in shared)  # later tasks do use what earlier ones learned
    assert learner.free == pytest.approx(1 - sum(int(u.sum()) for u in twin.used.values()) / 480)


def image_net() -> nn.Sequential:
    """Convolution, batch statistics, a head of its own."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(24, 10), nn.Linear(10, 2))


def image_loss(model: nn.Module, task: int, step: int) -> torch.Tensor:
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(100 * task + step))
    return functional.cross_entropy(model(x), (x.mean((1, 2, 3)) * (1 + task) > 0).long())


@settings(max_examples=12, deadline=None)
@given(
    st.floats(0.1, 1), st.sampled_from(GROWTH), st.sampled_from(["erk", "uniform"]), st.booleans(), st.integers(0, 99)
)
def test_a_task_is_recalled_bit_for_bit_whatever_came_later(density, growth, allocation, adam, seed):
    model = image_net()
    learner = Continual(model, skip=["5"], seed=seed)
    make = (lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.3)) if adam else sgd
    x, seen, free = torch.randn(5, 1, 4, 4), [], [1.0]
    for task in range(3):
        optimizer, handle = begin(learner, *growth, density, make, allocation=allocation)
        for step in range(STEPS):
            optimizer.zero_grad()
            image_loss(model, task, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            handle.step()
            for n in ("0", "4"):  # what was learned stands still and has no momentum; counts are exact
                w, kept = model.get_submodule(n).parametrizations.weight.original, handle.supports()[n].kept
                old = learner._learned[n]
                assert torch.equal(w[old & kept], learner._weights[n][old & kept]) and not w.grad[old].any()
                assert not any(s[old].any() for s in optimizer.state[w].values() if s.shape == w.shape)
                assert torch.equal(model.get_submodule(n).weight != 0, kept & (w != 0))
        learner.end()
        seen.append(model.eval()(x).detach())
        model.train()
        free.append(learner.free)
        counts = [s.count for s in learner.tasks[-1].supports.values()]
        each = [math.floor(density * size + 0.5) for size in (54, 240)]
        assert counts == each if allocation == "uniform" else sum(counts) == math.floor(density * 294 + 0.5)
    assert all(a >= b for a, b in zip(free, free[1:]))
    for task in (1, 2, 0):
        assert torch.equal(learner.recall(task).eval()(x), seen[task])


@pytest.mark.parametrize("at", [0, 3, 4])
@pytest.mark.parametrize("method, grow", GROWTH)
def test_a_run_that_was_stopped_within_a_task_goes_on_as_if_it_had_not_been(method, grow, at, tmp_path):
    def first() -> Continual:
        learner = Continual(net(), seed=2)
        learn(learner, 1, method=method, grow=grow)
        return learner

    whole = first()
    optimizer, handle = begin(whole, method, grow)
    for step in range(1, at + 1):
        x, y = batch(1, step)
        optimizer.zero_grad()
        functional.mse_loss(whole.model(x), y).backward()
        optimizer.step()
        handle.step()
    parts = {"learner": whole, "model": whole.model, "optimizer": optimizer, "handle": handle}
    torch.save({n: p.state_dict() for n, p in parts.items()}, tmp_path / "state.pt")
    train(whole.model, optimizer, handle, 1)
    whole.end()
    learn(whole, 3, method=method, grow=grow)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Continual(net(), seed=2)
    again.load_state_dict(saved["learner"])
    optimizer, handle = begin(again, method, grow)
    for name, part in {"model": again.model, "optimizer": optimizer, "handle": handle}.items():
        part.load_state_dict(saved[name])
    train(again.model, optimizer, handle, 1)
    again.end()
    learn(again, 3, method=method, grow=grow)
    for k in range(3):
        a, b = copy.deepcopy(whole.recall(k).state_dict()), again.recall(k).state_dict()
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_cannot_be_is_refused_and_leaves_the_model_free():
    learner = Continual(net())
    with pytest.raises(TargetError, match="no task is under way"):
        learner.end()
    with pytest.raises(TargetError, match="there is no task 0; 0 are finished"):
        learner.recall(0)
    for method, options in (("sr_ste", {"pattern": "2:4"}), ("topkast", {}), ("static", {"backend": "sparse"})):
        asked = {"density": 0.5, "optimizer": sgd(learner.model), "total_steps": 9, "allocation": "uniform", **options}
        with pytest.raises(TargetError, match="cannot be frozen"):
            learner.begin(method, **asked)
        assert not hasattr(learner.model[0], "parametrizations")
    with pytest.raises(UnknownName, match="sett"):
        begin(learner, "sett")
    with pytest.raises(BudgetError, match="KEPT"):
        begin(learner, density=1.5)
    _, handle = begin(learner)
    some = {"0": handle.supports()["0"]}
    with pytest.raises(TargetError, match=r"values of layer '0' are \(2, 2\), its weight is \(24, 12\)"):
        handle.freeze(some, {"0": torch.ones(2, 2)})
    with pytest.raises(TargetError, match="values of layer '0' are missing"):
        handle.freeze(some, {})
    with pytest.raises(TargetError, match="no layer '7' is held"):
        handle.freeze({"7": some["0"]}, {})
    for refused in (lambda: begin(learner), lambda: learner.recall(0), lambda: learner.load_state_dict({})):
        with pytest.raises(TargetError, match="task 0 is under way"):
            refused()
    handle.remove()
    with pytest.raises(TargetError, match="begin it anew"):
        learner.end()
    assert not learner.tasks and begin(learner)[1].steps == 0
    with pytest.raises(FileDamaged, match="layers 0, 2"):
        Continual(net()).load_state_dict({"weights": {}})
    with pytest.raises(FileDamaged, match="layers 0, 4"):
        Continual(image_net(), skip=["5"]).load_state_dict(learner.state_dict())
    with pytest.raises(TargetError, match="matches none"):
        Continual(net(), skip=["head"])
