"""Sparse pre-training: its ramp against compute added up step by step, and the law against its own points."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.core import Cubic, get_method
from gossamer.core.errors import BudgetError, NonFiniteError
from gossamer.recipes.scaling_law import Run, ScalingLaw, average_density, fit_scaling_law

LAW = ScalingLaw(floor=1.5, a=30.0, alpha=0.4, b=90.0, beta=0.5)
GRID = [(n, d) for n in (1e4, 3e4, 1e5, 1e6) for d in (1e5, 3e5, 1e6)]


@given(density=st.floats(0.02, 1.0), start=st.floats(0.0, 0.6), length=st.floats(0.05, 0.4))
def test_the_ramp_begins_and_ends_at_shares_of_the_compute(density, start, length):
    steps = 20000
    rule = get_method("sparse_pretraining")(
        density=density, total_steps=steps, start=start, end=start + length, every=1
    )
    spent = np.cumsum([rule.budget.d(t) for t in range(steps)])  # step t runs at the density of t
    before = lambda step: spent[step - 1] / spent[-1] if step else 0.0
    slack = 2.0 / spent[-1]  # rounded to whole steps, the dearest of which cost 1
    assert abs(before(rule.policy.begin) - start) <= slack
    assert abs(before(rule.policy.end) - (start + length)) <= slack


def test_twenty_steps_by_hand():
    """Dense, then the largest |w| along the ramp, then the last support: a loop that multiplies masks in."""
    torch.manual_seed(3)
    build = lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    layer, mask = twin[0], torch.ones(10, 6)
    opt, hand = (torch.optim.SGD(m.parameters(), lr=0.2) for m in (model, twin))
    handle = gossamer.attach(
        model, "sparse_pretraining", density=0.2, total_steps=20, every=3, targets=["0"], optimizer=opt
    )
    ramp = handle.sparsifier.policy
    dense = 0.25 * 20 / (0.25 + 0.5 / 0.4 + 0.25 / 0.2)
    assert (ramp.begin, ramp.end) == (round(dense), round(dense * 6))
    kept = []
    for t in range(1, 21):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        for m, o in ((model, opt), (twin, hand)):
            o.zero_grad()
            (m(x) - x[:, :4]).square().mean().backward()
            if m is twin:
                layer.weight.grad.mul_(mask)
            o.step()
        handle.step()
        if ramp.begin <= t <= ramp.end and ((t - ramp.begin) % 3 == 0 or t == ramp.end):
            done = (t - ramp.begin) / (ramp.end - ramp.begin)
            count = math.floor((0.2 + 0.8 * (1 - done) ** 3) * 60 + 0.5)
            mask = torch.zeros(60).index_fill(0, layer.weight.data.abs().flatten().argsort(descending=True)[:count], 1)
            mask = mask.view(10, 6)
        layer.weight.data.mul_(mask)
        kept.append(int(mask.sum()))
        torch.testing.assert_close(model[0].weight, layer.weight)
    assert kept[0] == 60 and kept[-1] == 12
    mean = (60 + sum(kept[:-1])) / 20 / 60  # a step runs under the mask of the step before it
    assert handle.report().flops.forward * 3 / handle.report().flops.dense == pytest.approx(mean)


def test_the_mean_of_a_schedule():
    ramp = Cubic(1.0, 0.2, 2500, 5000)
    assert average_density(ramp, 10000) == pytest.approx(1 - 0.625 * 0.8, abs=1e-4)
    assert average_density(lambda t: 1.0 - t / 10, 10, every=5) == pytest.approx(0.75)
    assert average_density(lambda t: 0.3, 7) == pytest.approx(0.3)
    with pytest.raises(BudgetError, match="total_steps=0"):
        average_density(ramp, 0)
    with pytest.raises(BudgetError, match="every=0"):
        average_density(ramp, 10, every=0)


def test_a_law_is_found_again_from_its_points():
    fitted = fit_scaling_law([Run(n, d, LAW(n, d)) for n, d in GRID])
    for name in ("floor", "a", "alpha", "b", "beta"):
        assert getattr(fitted, name) == pytest.approx(getattr(LAW, name), rel=1e-3), name


def test_a_law_is_found_again_from_noisy_points_and_one_wild_one():
    lots = random.Random(0)
    noisy = [Run(n, d, LAW(n, d) * math.exp(lots.gauss(0, 0.002))) for n, d in GRID]
    noisy[5] = Run(noisy[5].parameters, noisy[5].data, noisy[5].loss * 1.3)
    truth = [Run(n, d, LAW(n, d)) for n, d in GRID]
    assert fit_scaling_law(noisy).error(truth) < 0.004


def test_the_fit_is_no_worse_than_the_law_that_made_the_points():
    lots = random.Random(1)
    noisy = [Run(n, d, LAW(n, d) * math.exp(lots.gauss(0, 0.01))) for n, d in GRID]
    away = lambda law: sum(_huber(math.log(law(r.parameters, r.data) / r.loss)) for r in noisy)
    assert away(fit_scaling_law(noisy)) <= away(LAW)


def _huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1e-3 else 1e-3 * (abs(x) - 1e-3 / 2)


def test_errors_of_a_law():
    runs = [Run(1e5, 1e6, LAW(1e5, 1e6)), Run(1e6, 1e6, LAW(1e6, 1e6) * math.exp(0.02))]
    assert LAW.error(runs) == pytest.approx(0.02 / math.sqrt(2))


@pytest.mark.parametrize("bad", [Run(0, 1, 1), Run(1, 1, float("nan")), Run(1, float("inf"), 1), Run(1, 1, -2.0)])
def test_what_has_no_logarithm_is_refused(bad):
    with pytest.raises(NonFiniteError, match="positive numbers"):
        fit_scaling_law([*(Run(n, d, LAW(n, d)) for n, d in GRID), bad])


def test_too_few_runs_are_refused():
    runs = [Run(n, d, LAW(n, d)) for n, d in GRID]
    with pytest.raises(BudgetError, match="got 5"):
        fit_scaling_law(runs[:5])
    with pytest.raises(BudgetError, match="of 4 and 1"):
        fit_scaling_law(2 * [r for r in runs if r.data == 1e5])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 0.8}, "start < end"),
        ({"end": 1.1}, "start < end"),
        ({"start": -0.1}, "start < end"),
        ({"density": 1.2}, "KEPT"),
        ({"pattern": "2:4"}, "cannot ramp"),
        ({"every": 0}, "every >= 1"),
        ({"total_steps": 1, "start": 0.9, "end": 1.0}, "begin < until"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        get_method("sparse_pretraining")(**{"total_steps": 1000, **options})
