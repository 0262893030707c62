"""Lottery jackpots against a naive twin and the official code's printed values, and what frozen weights promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import LR, MOMENTUM, SIZES, batch, gradients, net, numbers, tied_runs
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.core import Pattern, Search, Support, get_method
from gossamer.core.errors import BudgetError, NonFiniteError, PatternError, TargetError
from gossamer.integrations.brought import Brought

STEPS = 20


class Twin:
    """In NumPy, from the paper and its code: frozen w, trained s, the best ⌈r·n⌉ pairs of each layer change places."""

    def __init__(self, d: float, swap) -> None:
        self.w, self.b = numbers(net())
        flat = np.concatenate([np.abs(w).ravel() for w in self.w.values()])
        threshold = np.sort(flat)[-math.floor(d * flat.size + 0.5)]
        self.m = {n: np.abs(w) >= threshold for n, w in self.w.items()}
        self.s = {n: np.where(m, 1.0, 0.99) for n, m in self.m.items()}
        self.v, self.swap = {n: np.zeros(SIZES[n]) for n in SIZES}, swap

    def step(self, t: int) -> None:
        dw, _ = gradients({n: self.w[n] * self.m[n] for n in SIZES}, self.b, batch(t))
        for n in SIZES:
            self.v[n] = MOMENTUM * self.v[n] + self.w[n] * dw[n]
            self.s[n] = self.s[n] - LR * self.v[n]
            self.exchange(n, t)

    def exchange(self, n: str, t: int) -> None:
        s, m = self.s[n].ravel(), self.m[n].ravel()
        threshold = np.sort(s)[(~m).sum() - 1]
        coming = [i for i in range(s.size) if not m[i] and s[i] > threshold]
        going = [i for i in range(s.size) if m[i] and s[i] <= threshold]
        assert len(coming) == len(going)
        number = math.ceil(self.swap(t) * len(coming))
        for i in sorted(coming, key=lambda i: -s[i])[:number]:
            m[i] = True
        for i in sorted(going, key=lambda i: s[i])[:number]:
            m[i] = False


def start(model: nn.Module, **options):
    opt = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    options = {"density": 0.3, "total_steps": STEPS, **options}
    return opt, gossamer.attach(model, "lottery_jackpots", optimizer=opt, **options)


def train(model, opt, handle, steps) -> None:
    for t in steps:
        opt.zero_grad()
        x, y = batch(t)
        functional.mse_loss(model(x), y).backward()
        opt.step()
        handle.step()


@pytest.mark.parametrize("swap", [None, 1.0, 0.3])
def test_twenty_steps(swap):
    cosine = lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS)) if t < STEPS else 0.0
    model, twin = net(), Twin(0.3, cosine if swap is None else lambda t: swap)
    opt, handle = start(model, swap=swap)
    for t in range(1, STEPS + 1):
        train(model, opt, handle, range(t, t + 1))
        twin.step(t)
        for n in SIZES:
            held = model[int(n)].parametrizations.weight
            np.testing.assert_allclose(held.original.detach().numpy(), twin.s[n], atol=1e-12)
            assert (handle.supports()[n].kept.numpy() == twin.m[n]).all(), (t, n)
            assert (model[int(n)].weight.detach().numpy() == twin.w[n] * twin.m[n]).all()
    assert handle.report().sad > 4


# What zyxxmu/lottery-jackpots at 1b802ea printed: PretrainConv(3, 4, 2), weights and then four sets of scores from
# torch.Generator().manual_seed(0), set_prune_rate(0.75), final_pop_up at these rates, flat places of b_mask == 1.
OFFICIAL = {
    None: [7, 9, 13, 16, 17, 21, 23, 28, 29, 45, 46, 47],
    1.0: [2, 3, 6, 16, 20, 21, 25, 26, 27, 33, 34, 44],
    0.5: [4, 6, 17, 18, 20, 21, 25, 27, 34, 38, 44, 46],
    0.3: [4, 17, 20, 21, 25, 26, 27, 28, 34, 38, 46, 47],
    0.1: [4, 17, 20, 21, 25, 26, 28, 29, 38, 41, 46, 47],
}
# and mask.grad of conv(x).square().sum() there, with x = [0, 1, …, 47]/48 as [1, 3, 4, 4]: the first and last eight.
OFFICIAL_GRADIENT = [
    *(-0.8684, -1.0493, -0.3328, -0.6367, 2.5455, 2.1718, -1.1238, -7.8166),
    *(1.7547, -14.2331, 5.9065, -1.1132, -15.7429, -71.1821, 48.9858, 54.1991),
]


def test_the_values_of_the_official_code():
    rng = torch.Generator().manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False))
    conv[0].weight.data.copy_(torch.randn(4, 3, 2, 2, generator=rng))
    opt = torch.optim.SGD(conv.parameters(), 0.1)
    handle = gossamer.attach(conv, "lottery_jackpots", density=0.25, total_steps=9, optimizer=opt)
    places = lambda support: support.kept.flatten().nonzero()[:, 0].tolist()
    assert places(handle.supports()["0"]) == OFFICIAL[None]
    scores = conv[0].parametrizations.weight.original
    assert (
        torch.equal(scores.flatten().gt(0.995).nonzero()[:, 0], torch.tensor(OFFICIAL[None])) and scores.min() == 0.99
    )
    support = handle.supports()["0"]
    for rate in list(OFFICIAL)[1:]:
        s = torch.rand(4, 3, 2, 2, generator=rng)
        support = Search(swap=rate).move(support, s, Pattern("[...]"), 1)
        assert places(support) == OFFICIAL[rate]
    handle.take({"0": support})
    conv(torch.arange(48.0).view(1, 3, 4, 4) / 48).square().sum().backward()
    grad = scores.grad.flatten()
    assert torch.cat([grad[:8], grad[-8:]]).tolist() == pytest.approx(OFFICIAL_GRADIENT, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_exchanges_keep_the_count_and_are_the_best(seed, n, d, rate, tied):
    rng = torch.Generator().manual_seed(seed)
    s = torch.rand(n, generator=rng)
    s = (4 * s).round() if tied else s
    kept = torch.rand(n, generator=rng) < d
    new = Search(swap=rate).move(Support(kept), s, Pattern("[...]"), 0).kept
    came, went = new & ~kept, kept & ~new
    assert int(new.sum()) == int(kept.sum()) and int(came.sum()) == int(went.sum())
    if came.any():
        assert (
            s[came].min() >= s[went].max() and s[came].min() >= s[~new & ~kept].max() if (~new & ~kept).any() else True
        )
    whole = Search().move(Support(kept), s, Pattern("[...]"), 0).kept
    assert sorted(s[whole].tolist()) == sorted(s.tolist(), reverse=True)[: int(kept.sum())][::-1]
    assert int(came.sum()) == math.ceil(rate * int((whole & ~kept).sum()))


def test_no_weight_learns_and_all_come_back():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 3)
    ).train()
    model[4].bias.requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    x = torch.randn(12, 2, 4, 4)
    loss = lambda: functional.cross_entropy(model(x), torch.arange(12) % 3)
    loss().backward()
    opt.step()  # moments of weights, and gradients that nobody cleared
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    held = [model[0].weight, model[3].weight]
    handle = gossamer.attach(model, "lottery_jackpots", density=0.4, total_steps=9, optimizer=opt, skip=["4"])
    assert not any(opt.state.get(p) for p in held)
    for _ in range(6):
        loss().backward()
        opt.step()
        handle.step()
        opt.zero_grad()
    supports = handle.supports()
    assert handle.report().sad > 0 and [model[0].parametrizations.weight.original, *held][0] is held[0]
    handle.remove()
    for n, p in model.named_parameters():
        layer = n.removesuffix(".weight")
        want = torch.where(supports[layer].kept, before[n], 0) if layer in supports else before[n]
        assert torch.equal(p, want), n
        assert p.requires_grad == (n != "4.bias") and p.grad is None
    assert model[0].weight is held[0] and not any(opt.state.get(p) for p in held)
    loss().backward()
    opt.step()
    assert not torch.equal(model[4].weight, before["4.weight"])


def test_layers_find_their_densities_in_one_pool_unless_told_otherwise():
    model = net()
    model[2].weight.data.mul_(10)
    _, handle = start(model)
    assert [r.kept for r in handle.report()] == [0, 144]
    _, handle = start(net(), allocation="uniform")
    assert [r.kept for r in handle.report()] == [86, 58]


def test_given_supports_are_searched_on_from():
    model = net()
    opt, handle = start(model, swap=0.0)
    train(model, opt, handle, range(3))
    flipped = {"0": Support(~handle.supports()["0"].kept)}
    handle.take(flipped)
    scores = model[0].parametrizations.weight.original
    assert torch.equal(scores.detach(), torch.where(flipped["0"].kept, torch.ones_like(scores), 0.99))
    train(model, opt, handle, range(1))
    assert handle.supports()["0"] == flipped["0"]


def test_tied_and_compiled_layers():
    runs = []
    for model, handle in tied_runs("lottery_jackpots", total_steps=9):
        runs.append(handle.supports()["0"])
        assert handle.remove()[0].weight is model[2].weight and model[0].weight.count_nonzero() == 16
    assert runs[0] == runs[1]


def test_a_checkpoint_loads_into_the_plain_model_with_weights_not_scores():
    model, plain = net(), net()
    opt, handle = start(model)
    train(model, opt, handle, range(4))
    state = model.state_dict()
    Brought.to(plain)
    plain.load_state_dict(state)
    handle.remove()
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in model.named_parameters())


def test_what_cannot_be_is_refused_in_words():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    attach = lambda **options: gossamer.attach(
        model, "lottery_jackpots", **{"total_steps": 9, "optimizer": opt, **options}
    )
    with pytest.raises(TargetError, match="optimizer="):
        attach(optimizer=None)
    with pytest.raises(TargetError, match="total_steps="):
        attach(total_steps=None)
    with pytest.raises(PatternError, match="pools of its own"):
        attach(pattern="2:4")
    with pytest.raises(PatternError, match=r"layer '0'.*pools of its own"):
        attach(pattern="row")
    with pytest.raises(BudgetError, match="between 0 and 1"):
        attach(swap=1.5)
    with pytest.raises(BudgetError, match="gap >= 0"):
        attach(gap=-0.1)
    with pytest.raises(TargetError, match="backend='masked'"):
        attach(backend="sparse")
    with pytest.raises(TargetError, match="while the model trains"):
        gossamer.prune(model, "lottery_jackpots", total_steps=9)
    assert all(p.requires_grad for p in model.parameters())
    handle = attach(targets=["0"])
    with pytest.raises(TargetError, match="searched already"):
        attach(targets=["2"])
    with torch.no_grad():
        model[0].parametrizations.weight.original[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="scores of layer '0'"):
        handle.step()
    assert get_method("lottery_jackpots")(total_steps=9, pattern="filter").search is not None


def test_recurrent_weights_are_searched_too():
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 6)
    before = {n: p.detach().clone() for n, p in lstm.named_parameters()}
    opt = torch.optim.SGD(lstm.parameters(), 0.5)
    handle = gossamer.attach(lstm, "lottery_jackpots", density=0.4, total_steps=9, optimizer=opt)
    for t in range(5):
        opt.zero_grad()
        lstm(torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(t)))[0].square().mean().backward()
        opt.step()
        handle.step()
    supports = handle.supports()
    handle.remove()
    for n, p in lstm.named_parameters():
        assert torch.equal(p, torch.where(supports[n].kept, before[n], 0) if n in supports else before[n]), n
