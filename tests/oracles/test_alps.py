"""ALPS against its naive twin, against all supports of tiny layers, and against what it must withstand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from alps_naive import naive_alps
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import Density, Keep, pattern
from gossamer.core.errors import BudgetError, CalibrationError, NonFiniteError
from gossamer.methods.weights.alps import alps as method
from gossamer.solve import alps, sparsegpt
from gossamer.solve.alps import conjugate_gradients
from gossamer.solve.spectrum import spectrum


def problem(rows: int, columns: int, *, tokens: int | None = None, seed: int = 0):
    """Weights, and inputs with correlated columns of unequal size."""
    g = torch.Generator().manual_seed(seed)
    kind = {"generator": g, "dtype": torch.float64}
    mix = torch.eye(columns, dtype=torch.float64) + torch.randn(columns, columns, **kind) / columns**0.5
    x = torch.randn(tokens or 4 * columns, columns, **kind) @ mix * (torch.rand(columns, **kind) + 0.1)
    return torch.randn(rows, columns, **kind), x, {"gram": x.T @ x / len(x)}


def loss(w, new, h) -> float:
    return float((((w - new) @ h) * (w - new)).sum())


def damped(gram, share=0.01):
    return gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("rows, columns, density", [(24, 64, 0.5), (13, 100, 0.2), (1, 16, 0.87)])
def test_unstructured_matches_the_naive_twin(rows, columns, density):
    w, _, stats = problem(rows, columns)
    want = naive_alps(w, stats["gram"], keep=math.floor(density * w.numel() + 0.5))
    got, support = alps(w, stats, pattern("unstructured"), Density(density))
    assert ((want != 0) == support.kept).all()
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kept, of", [(2, 4), (1, 8)])
def test_groups_match_the_naive_twin(kept, of):
    w, _, stats = problem(9, 64)
    want = naive_alps(w, stats["gram"], group=(kept, of))
    got, support = alps(w, stats, pattern(f"{kept}:{of}"), Keep(kept))
    assert ((want != 0) == support.kept).all()
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_more_looks_end_sooner_and_cost_little():
    w, _, stats = problem(32, 96)
    h = damped(stats["gram"])
    slow, fast = (loss(w, alps(w, stats, pattern("2:4"), Keep(2), every=n)[0], h) for n in (3, 2))
    assert fast < 1.03 * slow


def best_of_all(w, h, keep):
    """The least loss over every support of one row, by least squares on each."""
    costs = []
    for on in map(list, itertools.combinations(range(len(w)), keep)):
        b = torch.zeros_like(w)
        b[on] = torch.linalg.solve(h[on][:, on], (h @ w)[on])
        costs.append(loss(w[None], b[None], h))
    return min(costs)


def test_close_to_the_best_of_all_supports():
    ratios = []
    for seed in range(20):
        w, _, stats = problem(1, 8, seed=seed)
        h = damped(stats["gram"])
        got = alps(w, stats, pattern("unstructured"), Keep(4))[0]
        ratios.append(loss(w, got, h) / best_of_all(w[0], h, 4))
    assert min(ratios) > 1 - 1e-9
    assert sorted(ratios)[10] < 1.0001 and sum(ratios) / 20 < 1.2


@given(seed=st.integers(0, 99), rows=st.integers(1, 6), columns=st.integers(1, 24), steps=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_every_step_of_the_refit_lowers_the_error_and_stays_on_the_support(seed, rows, columns, steps):
    w, _, stats = problem(rows, columns, seed=seed)
    s = spectrum(stats["gram"])
    kept = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    errors = [loss(w, conjugate_gradients(w * kept, w, s.h_KK, kept, n), s.h_KK) for n in range(0, steps + 1)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    assert not conjugate_gradients(w * kept, w, s.h_KK, kept, steps)[~kept].any()


def test_a_full_refit_is_least_squares():
    w, _, stats = problem(4, 24)
    got, support = alps(w, stats, pattern("row"), Density(0.5), refit=50)
    h = damped(stats["gram"])
    for row, new, on in zip(w, got, support.kept):
        torch.testing.assert_close(new[on], torch.linalg.solve(h[on][:, on], (h @ row)[on]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spec", ["unstructured", "2:4", "4x8"])
def test_beats_sparsegpt_on_its_own_objective(spec):
    w, _, stats = problem(32, 128)
    who = pattern(spec)
    budget, h = Keep(who.kept) if who.kept else Density(0.5), damped(stats["gram"])
    ours, theirs = alps(w, stats, who, budget)[0], sparsegpt(w, stats, who, budget)[0]
    assert loss(w, ours, h) < 0.95 * loss(w, theirs, h)


@pytest.mark.parametrize(
    "spec, shape",
    [("row", (9, 30)), ("4-row", (12, 30)), ("4x3", (12, 30)), ("filter", (12, 5, 3, 3)), ("3:5", (4, 60))],
)
@pytest.mark.parametrize("d", [0.0, 0.6, 1.0])
def test_every_pool_keeps_exactly_its_count(spec, shape, d):
    w, _, stats = problem(shape[0], math.prod(shape[1:]))
    who = pattern(spec)
    got, support = alps(w.view(shape), stats, who, Keep(who.kept) if who.kept else Density(d))
    won_RCT = who.split(support.kept)
    count = who.kept or math.floor(d * won_RCT.shape[1] + 0.5)
    assert (won_RCT == won_RCT[..., :1]).all() and (won_RCT[..., 0].sum(1) == count).all()
    assert not got[~support.kept].any() and got.shape == shape
    if count == won_RCT.shape[1]:
        torch.testing.assert_close(got, w.view(shape))


def test_float32_follows_float64_and_half_types_stay():
    w, _, stats = problem(16, 64)
    want, support = method().apply(w, stats)
    got, same = method().apply(w.float(), {"gram": stats["gram"].float()})
    assert float((support.kept != same.kept).float().mean()) < 0.01
    assert loss(w, got.double(), stats["gram"]) < 1.01 * loss(w, want, stats["gram"])
    assert method().apply(w.bfloat16(), stats)[0].dtype == torch.bfloat16


def test_layers_with_the_same_inputs_share_one_decomposition():
    stats = problem(4, 16)[2]
    first = spectrum(stats["gram"])
    assert spectrum(stats["gram"]) is first
    assert spectrum(stats["gram"], damping=0.1) is not first
    stats["gram"].mul_(2)
    assert not torch.equal(spectrum(stats["gram"]).scale_K, first.scale_K)


def test_dead_inputs_lose_and_few_tokens_are_enough():
    w, x, _ = problem(6, 32, tokens=10)
    x[:, 5] = 0
    got, support = method(density=0.5).apply(w, {"gram": x.T @ x / len(x)})
    assert support.count == 96 and not support.kept[:, 5].any() and got.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1), (1, 8), (8, 1)])
def test_thin_and_empty_layers(shape):
    got, support = method().apply(torch.ones(shape), {"gram": torch.eye(shape[1])})
    assert got.shape == shape and support.count == math.floor(0.5 * math.prod(shape) + 0.5)


def test_bad_input_is_refused_with_the_way_out():
    w, _, stats = problem(4, 8)
    for options in ({"damping": 0}, {"iterations": 0}, {"every": 0}, {"refit": -1}):
        with pytest.raises(BudgetError, match="try"):
            method(**options)
    with pytest.raises(BudgetError, match="damping"):
        spectrum(stats["gram"], damping=0)
    with pytest.raises(CalibrationError, match="all 8 inputs"):
        method().apply(w, {"gram": torch.zeros(8, 8)})
    with pytest.raises(CalibrationError, match="missing"):
        method().apply(w, {})
    with pytest.raises(NonFiniteError):
        method().apply(w, {"gram": torch.full((8, 8), math.nan)})
