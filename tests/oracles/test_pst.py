"""PST against the formulas of its official layer, with autograd through them as written there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.core.errors import BudgetError, TargetError
from tests.oracles.adapters import batch, blocks, train


class Binarizer(torch.autograd.Function):
    """Prunes the int(n·sparsity) smallest scores; the gradient of the mask goes to the scores."""

    @staticmethod
    def forward(ctx, scores, sparsity):
        mask = torch.ones_like(scores)
        mask.view(-1)[scores.flatten().argsort()[: int(scores.numel() * sparsity)]] = 0
        return mask

    @staticmethod
    def backward(ctx, g):
        return g, None


def official(x, w, bias, p, sparsity, *, beta=1.0, alpha1=1.0, alpha2=1.0):
    weight = w + beta * p["U"] @ p["V"]
    scores = weight.abs() + alpha1 * p["A"] @ p["B"] + alpha2 * (p["R"].unsqueeze(1) + p["C"].unsqueeze(0))
    return functional.linear(x, Binarizer.apply(scores, sparsity) * weight, bias)


def test_output_and_gradients_of_the_official_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).double()
    w, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    options = {"rank": 2, "score_rank": 3, "beta": 0.5, "alpha": (2.0, 0.7)}
    adapters = gossamer.adapt(model, "pst", density=0.25, total_steps=10, **options)
    delta = adapters.deltas("default")["0"]
    for p in delta.parameters():
        nn.init.normal_(p, std=0.1)
    for _ in range(7):
        adapters.step()
    twin = {n: p.detach().clone().requires_grad_() for n, p in delta.named_parameters()}
    x = torch.randn(5, 12, dtype=torch.float64)
    y, expected = model(x), official(x, w, bias, twin, 0.75, beta=0.5, alpha1=2.0, alpha2=0.7)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for n, p in delta.named_parameters():
        torch.testing.assert_close(p.grad, twin[n].grad)


def test_the_ramp_of_the_official_schedule():
    """schedule_sparsity_ratio with its defaults: flat for a tenth, cubic, flat for three tenths."""
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    adapters = gossamer.adapt(model, "pst", density=0.1, total_steps=20)
    for step in range(21):
        kept = int((adapters.deltas("default")["0"].change(model[0].weight) != -model[0].weight).sum())
        left = 1 - (step - 2) / 12 if 2 < step <= 14 else 1.0 if step <= 2 else 0.0
        assert abs(kept - 10000 * (0.1 + 0.9 * left**3)) <= 1
        adapters.step()


def test_what_is_left_is_a_plain_sparse_model():
    model = blocks()
    adapters = gossamer.adapt(model, "pst", density=0.25, total_steps=10, rank=1)
    train(model, adapters.parameters(), steps=10, after=adapters.step)
    learnt = model(batch(model))
    report = adapters.merge()
    adapters.remove()
    assert all(r.zeros_after == 96 for r in report)
    assert all(int((m.weight == 0).sum()) == 96 for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(model(batch(model)), learnt)


def test_bad_options():
    with pytest.raises(BudgetError, match="ranks of 1 or more"):
        gossamer.adapt(blocks(), "pst", total_steps=10, rank=0)
    with pytest.raises(BudgetError, match="a ramp within the run"):
        gossamer.adapt(blocks(), "pst", total_steps=10, warmup=0.6, cooldown=0.4)
    with pytest.raises(TargetError, match="linear layers"):
        gossamer.adapt(nn.Sequential(nn.Conv2d(2, 2, 3)), "pst", total_steps=10)
