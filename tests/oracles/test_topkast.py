"""Top-KAST against a naive twin, and what it promises about what is not kept."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import LR, MOMENTUM, SIZES, batch, gradients, net, numbers, tied_runs
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.core import Explore, Support, get_method
from gossamer.core.errors import BudgetError, TargetError


def largest(w: np.ndarray, d: float) -> np.ndarray:
    won = np.zeros(w.size, bool)
    won[np.argsort(-np.abs(w).ravel(), kind="stable")[: math.floor(d * w.size + 0.5)]] = True
    return won.reshape(w.shape)


class Twin:
    """In NumPy, from the paper: A and B by magnitude, gradient by A, cut to B, an L2 term with 1/D on B∖A."""

    def __init__(self, d: float, wide: float, penalty: float, every: int) -> None:
        self.w, self.b = numbers(net())
        self.d, self.wide, self.penalty, self.every = d, wide, penalty, every
        self.v = {n: np.zeros(SIZES[n]) for n in SIZES}
        self.vb = {n: np.zeros(SIZES[n][0]) for n in SIZES}
        self.choose()

    def choose(self) -> None:
        self.a = {n: largest(w, self.d) for n, w in self.w.items()}
        self.wider = {n: largest(w, self.wide) for n, w in self.w.items()}
        for n in SIZES:
            self.v[n] *= self.wider[n]

    def step(self, t: int) -> None:
        dw, db = gradients({n: self.w[n] * self.a[n] for n in SIZES}, self.b, batch(t))
        for n in SIZES:
            drawn = self.penalty * np.where(self.a[n], self.w[n], self.w[n] / self.d)
            self.v[n] = (MOMENTUM * self.v[n] + dw[n] + drawn) * self.wider[n]
            self.vb[n] = MOMENTUM * self.vb[n] + db[n]
            self.w[n], self.b[n] = self.w[n] - LR * self.v[n], self.b[n] - LR * self.vb[n]
        if t % self.every == 0:
            self.choose()


def start(model: nn.Module, make=torch.optim.SGD, **options):
    kinds = {"lr": LR, "momentum": MOMENTUM} if make is torch.optim.SGD else {"lr": 0.05}
    opt = make(model.parameters(), **kinds)
    options = {"density": 0.2, "backward_density": 0.5, "penalty": 0.05, "every": 3, **options}
    return opt, gossamer.attach(model, "topkast", optimizer=opt, **options)


def train(model, opt, handle, steps) -> None:
    for t in steps:
        opt.zero_grad()
        x, y = batch(t)
        functional.mse_loss(model(x), y).backward()
        opt.step()
        handle.step()


def test_twenty_steps():
    model, twin = net(), Twin(0.2, 0.5, 0.05, 3)
    opt, handle = start(model)
    first = {n: s.kept.clone() for n, s in handle.supports().items()}
    for t in range(1, 21):
        train(model, opt, handle, range(t, t + 1))
        twin.step(t)
        for n in SIZES:
            held = model[int(n)].parametrizations.weight
            assert (handle.supports()[n].kept.numpy() == twin.a[n]).all(), (t, n)
            assert (handle.learning()[n].kept.numpy() == twin.wider[n]).all(), (t, n)
            np.testing.assert_allclose(held.original.detach().numpy(), twin.w[n], atol=1e-12)
            np.testing.assert_allclose(model[int(n)].weight.detach().numpy(), twin.w[n] * twin.a[n], atol=1e-12)
    assert any(not torch.equal(first[n], s.kept) for n, s in handle.supports().items())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1), st.floats(0, 1), st.sampled_from(["sgd", "adamw"]))
def test_what_moves_and_what_does_not(seed, d, more, kind):
    """A ⊂ B, both exact; outside B values, gradients and slots stand still; outside A the layer sees zeros."""
    torch.manual_seed(seed % 10_000)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8)).double()
    wide = d + more * (1 - d)
    make = torch.optim.SGD if kind == "sgd" else lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)
    opt, handle = start(model, make, density=d, backward_density=wide, every=2)
    for t in range(1, 6):
        held = {n: model[int(n)].parametrizations.weight.original.detach().clone() for n in SIZES}
        learned = {n: s.kept.clone() for n, s in handle.learning().items()}
        train(model, opt, handle, range(t, t + 1))
        for n, w in held.items():
            layer, size = model[int(n)], math.prod(SIZES[n])
            original = layer.parametrizations.weight.original
            a, b = handle.supports()[n], handle.learning()[n]
            assert a <= b and a.count == math.floor(d * size + 0.5) and b.count == math.floor(wide * size + 0.5)
            assert torch.equal(original[~learned[n]], w[~learned[n]])
            assert not original.grad[~learned[n]].any() and not layer.weight[~a.kept].any()
            assert not any(s[~b.kept].any() for s in opt.state[original].values() if s.shape == original.shape)
    handle.remove()
    assert all(int((model[int(n)].weight != 0).sum()) == math.floor(d * math.prod(SIZES[n]) + 0.5) for n in SIZES)
    assert not opt._optimizer_step_pre_hooks


def test_the_penalty_counts_once_per_step():
    def moved(parts: int, scale: float = 1.0) -> torch.Tensor:
        model = net()
        opt, _ = start(model)
        x, y = batch(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        for a, b in zip(x.chunk(parts), y.chunk(parts)):
            scaler.scale(functional.mse_loss(model(a), b) / parts).backward()
        scaler.step(opt)
        scaler.update()
        return model[0].parametrizations.weight.original.detach()

    torch.testing.assert_close(moved(1), moved(2))
    torch.testing.assert_close(moved(1), moved(1, scale=1024.0))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_gets_the_penalty_with_the_gradients_it_makes(by_name):
    plain, closed = net(), net()
    (opt, handle), (opt_closed, handle_closed) = start(plain), start(closed)
    for t in range(5):
        train(plain, opt, handle, range(t, t + 1))

        def closure(t=t):
            opt_closed.zero_grad()
            loss = functional.mse_loss(closed(batch(t)[0]), batch(t)[1])
            loss.backward()
            return loss

        assert (opt_closed.step(closure=closure) if by_name else opt_closed.step(closure)) > 0
        handle_closed.step()
    assert all(torch.equal(x, y) for x, y in zip(plain.state_dict().values(), closed.state_dict().values()))
    handle_closed.follow(torch.optim.SGD(closed.parameters(), lr=LR))
    assert not opt_closed._optimizer_step_pre_hooks


def test_without_exploring_whatever_was_never_used_keeps_its_first_value():
    model = net()
    start_values, _ = numbers(model)
    opt, handle = start(model, backward_density=0.2, penalty=0.05, every=1)
    used = {n: s.kept.clone() for n, s in handle.supports().items()}
    first = copy.deepcopy(used)
    for t in range(12):
        train(model, opt, handle, range(t, t + 1))
        for n, support in handle.supports().items():
            assert support == handle.learning()[n]
            used[n] |= support.kept
    assert any(not torch.equal(used[n], first[n]) for n in used)
    for n, ever in used.items():
        original = model[int(n)].parametrizations.weight.original.detach()
        assert torch.equal(original[~ever], torch.from_numpy(start_values[n])[~ever])
    assert handle.report().flops.backward == handle.report().flops.forward * 2


def test_the_work_counts_what_learns():
    model = net()
    opt, handle = start(model)
    train(model, opt, handle, range(1))
    kept, learning = {"0": 58, "2": 38}, {"0": 144, "2": 96}
    assert handle.report().flops.forward == sum(2 * k * 10 for k in kept.values())
    assert handle.report().flops.backward == sum(2 * (kept[n] + learning[n]) * 10 for n in kept)


def test_layers_of_other_densities_explore_in_proportion():
    model = net()
    _, handle = start(model, allocation={"0": 0.1, "2": 0.5}, density=0.25, backward_density=0.5)
    assert [handle.learning()[n].density for n in SIZES] == [pytest.approx(0.2, abs=2e-3), 1.0]
    _, handle = start(net(), allocation="erk")
    assert handle.density == pytest.approx(0.2)


def test_resuming_needs_the_dormant_values_and_has_them(tmp_path):
    model = net()
    opt, handle = start(model)
    train(model, opt, handle, range(4))
    torch.save([x.state_dict() for x in (model, opt, handle)], tmp_path / "state.pt")
    train(model, opt, handle, range(4, 12))
    other = net()
    parts = (other, *start(other))
    for part, state in zip(parts, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    train(*parts, range(4, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_tied_weights_and_compiled_graphs():
    runs = []
    for _, handle in tied_runs("topkast", every=2):
        runs.append(handle.supports()["0"])
    assert runs[0] == runs[1]


def test_an_optimizer_may_come_later():
    now, later = net(), net()
    opt, handle = start(now)
    waiting = gossamer.attach(
        later, "topkast", density=0.2, backward_density=0.5, penalty=0.05, every=3, optimizer="later"
    )
    given = torch.optim.SGD(later.parameters(), lr=LR, momentum=MOMENTUM)
    waiting.follow(given)
    train(now, opt, handle, range(5))
    train(later, given, waiting, range(5))
    assert torch.equal(now[0].weight, later[0].weight)


def test_what_cannot_be_is_refused_in_words():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(TargetError, match="optimizer="):
        gossamer.attach(model, "topkast", density=0.2)
    with pytest.raises(BudgetError, match="fixes its density"):
        gossamer.attach(model, "topkast", pattern="2:4", optimizer=opt)
    with pytest.raises(BudgetError, match="backward_density >= density"):
        gossamer.attach(model, "topkast", density=0.5, backward_density=0.2, optimizer=opt)
    with pytest.raises(BudgetError, match="above 0 and up to 1"):
        gossamer.attach(model, "topkast", density=0.0, optimizer=opt)
    with pytest.raises(BudgetError, match="between 0 and 1"):
        get_method("topkast")(density=0.5, backward_density=1.5)
    with pytest.raises(BudgetError, match="at least 0"):
        Explore(0.5, penalty=-1.0)
    with pytest.raises(TargetError, match="backend='masked'"):
        gossamer.attach(model, "topkast", density=0.2, optimizer=opt, backend="sparse")
    with pytest.raises(TargetError, match="while the model trains"):
        gossamer.prune(model, "topkast", density=0.2)
    handle = gossamer.attach(model, "topkast", density=0.2, optimizer=opt)
    with pytest.raises(TargetError, match="still carries a mask"):
        gossamer.attach(model, "topkast", density=0.2, optimizer=opt)
    assert handle.density == pytest.approx(0.2, abs=0.01)


def test_whatever_is_kept_learns_however_it_was_chosen():
    opt, handle = start(net(), pattern="4-row", regroup=True)  # A and B group the rows in different ways
    inside = lambda: all(s <= handle.learning()[n] for n, s in handle.supports().items())
    assert inside()
    dormant = {n: Support(~s.kept) for n, s in handle.learning().items()}
    handle.take(dormant)
    assert handle.supports() == dormant and inside()
    narrow = replace(get_method("topkast")(density=0.5), explore=Explore(0.2))
    with pytest.raises(BudgetError, match="as much or more"):
        gossamer.attach(net(), narrow, optimizer=opt)


def test_a_layer_that_an_allocation_empties_rests():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-9)
    opt, handle = start(model, allocation="snip", data=batch(0), loss=functional.mse_loss)
    assert handle.report().collapsed == ("0",)
    before = model[0].parametrizations.weight.original.detach().clone()
    train(model, opt, handle, range(4))
    assert torch.equal(model[0].parametrizations.weight.original, before) and handle.supports()["2"].count == 96


def test_counts_of_what_learns_follow_a_state_that_was_loaded():
    model, other = net(), net()
    _, handle = start(model)
    start(other, density=0.1, backward_density=0.3)
    assert handle._learning() == {"0": 144, "2": 96}
    model.load_state_dict(other.state_dict())
    assert handle._learning() == {n: s.count for n, s in handle.learning().items()} == {"0": 86, "2": 58}


def test_an_optimizer_that_was_promised_is_asked_for_at_the_first_step():
    handle = gossamer.attach(net(), "topkast", density=0.2, optimizer="later")
    with pytest.raises(TargetError, match=r"handle\.follow"):
        handle.step()
